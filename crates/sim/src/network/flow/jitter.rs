//! Chance: delays that differ from message to message, and what they make of a collective.

use units::Seconds;

/// Delays by chance, the same for the same seed: exponential, as the waiting time of a queue.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Jitter {
    /// The mean delay of a message.
    pub mean: Seconds,
    /// What chance begins with.
    pub seed: u64,
}

impl Jitter {
    /// The delay of a connection's n-th message.
    pub(super) fn delay(self, connection: u32, nth: u32) -> Seconds {
        let number = u64::from(connection) << 32 | u64::from(nth);
        let mixed = mix(mix(self.seed) ^ number);
        // A number above 0 and at most 1, of 53 random bits.
        let uniform = ((mixed >> 11) + 1) as f64 / (1_u64 << 53) as f64;
        self.mean * -uniform.ln()
    }

    /// Delays of whole ranks, for [`super::Conditions::ready`].
    #[must_use]
    pub fn stragglers(self, ranks: u32) -> Vec<Seconds> {
        (0..ranks).map(|rank| self.delay(u32::MAX, rank)).collect()
    }
}

/// The time below which this share of the samples lies, between two samples in proportion.
///
/// # Panics
/// When there are no samples, or the share is not between 0 and 1.
#[must_use]
pub fn quantile(samples: &[Seconds], share: f64) -> Seconds {
    assert!(!samples.is_empty() && (0.0..=1.0).contains(&share), "a share of some samples");
    let mut sorted: Vec<f64> = samples.iter().map(|sample| sample.0).collect();
    sorted.sort_by(f64::total_cmp);
    let place = share * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    Seconds(below + (above - below) * place.fract())
}

/// A well mixed function of 64 bits (splitmix64, Steele et al. 2014).
fn mix(seed: u64) -> u64 {
    let mut mixed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_have_their_mean_and_repeat() {
        let jitter = Jitter { mean: Seconds(2.0), seed: 7 };
        let delays: Vec<Seconds> = (0..20_000).map(|nth| jitter.delay(nth % 100, nth)).collect();
        let mean = delays.iter().map(|delay| delay.0).sum::<f64>() / 20_000.0;
        assert!((mean - 2.0).abs() < 0.05, "{mean}");
        // Half of an exponential lies below ln 2 of its mean.
        assert!((quantile(&delays, 0.5).0 - 2.0 * 2_f64.ln()).abs() < 0.05);
        assert_eq!(jitter.delay(3, 4), jitter.delay(3, 4));
        assert_ne!(jitter.delay(3, 4), Jitter { seed: 8, ..jitter }.delay(3, 4));
    }

    #[test]
    fn quantiles_lie_between_samples_in_proportion() {
        let samples = [Seconds(3.0), Seconds(1.0), Seconds(2.0)];
        let quantiles = [0.0, 0.25, 0.5, 1.0].map(|share| quantile(&samples, share).0);
        assert_eq!(quantiles, [1.0, 1.5, 2.0, 3.0]);
    }
}
