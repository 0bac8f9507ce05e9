//! What makes equal ranks unequal: slow chips, noise, slow links, pauses.

use program::Mesh;
use units::{Rank, Seconds};

use crate::Error;

/// How ranks differ from their costs. The default disturbs nothing.
///
/// Random factors are drawn from an approximate normal distribution around 1, cut off at about 3.5
/// standard deviations, by a function of the seed, the rank and the instruction; so they do not
/// depend on the order in which a simulation comes to them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Disturbance {
    /// Of all random factors.
    pub seed: u64,
    /// Standard deviation of the factor by which each rank computes slower or faster throughout.
    pub rank_spread: f64,
    /// Standard deviation of the factor on each computation of each rank.
    pub jitter: f64,
    /// Standard deviation of the factor on the transfers of each rank throughout. A transfer takes
    /// the largest of its members.
    pub link_spread: f64,
    /// Ranks that compute slower than others, by this factor.
    pub slow_ranks: Vec<(Rank, f64)>,
    /// Ranks whose transfers take longer than others', by this factor.
    pub slow_links: Vec<(Rank, f64)>,
    /// Ranks that stand still for a while.
    pub pauses: Vec<Pause>,
}

/// A rank that stands still: a fault of its host from which it recovers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pause {
    /// Which.
    pub rank: Rank,
    /// From when on, counted from the start of the step.
    pub at: Seconds,
    /// For how long.
    pub lasts: Seconds,
}

/// The largest standard deviation of a factor: a quarter leaves all of them positive.
const WIDEST: f64 = 0.25;
/// Stands for a rank's own factors, where an instruction stands for those of a computation.
const OF_RANK: u64 = u64::MAX;
const OF_LINK: u64 = u64::MAX - 1;

impl Disturbance {
    /// Refuses what no rank or link can do.
    pub(crate) fn check(&self, mesh: &Mesh) -> Result<(), Error> {
        let spreads = [
            ("rank_spread", self.rank_spread),
            ("jitter", self.jitter),
            ("link_spread", self.link_spread),
        ];
        for (key, value) in spreads {
            if !(0.0..=WIDEST).contains(&value) {
                return Err(Error::Unusable { key, value });
            }
        }
        let factors = self.slow_ranks.iter().map(|(rank, factor)| ("slow_ranks", rank, *factor));
        let links = self.slow_links.iter().map(|(rank, factor)| ("slow_links", rank, *factor));
        for (key, rank, factor) in factors.chain(links) {
            crate::world::positive(key, factor)?;
            known(rank, mesh)?;
        }
        for pause in &self.pauses {
            crate::world::duration("pauses.at", pause.at)?;
            crate::world::duration("pauses.lasts", pause.lasts)?;
            known(&pause.rank, mesh)?;
        }
        Ok(())
    }

    /// How much slower than its costs a rank computes.
    pub(crate) fn of_rank(&self, rank: Rank) -> f64 {
        let slow = self.slow_ranks.iter().filter(|(slow, _)| *slow == rank);
        let drawn = 1.0 + self.rank_spread * normal(self.stream(OF_RANK), rank.0);
        slow.fold(drawn, |all, (_, factor)| all * factor)
    }

    /// How much longer than their costs a rank's transfers take.
    pub(crate) fn of_link(&self, rank: Rank) -> f64 {
        let slow = self.slow_links.iter().filter(|(slow, _)| *slow == rank);
        let drawn = 1.0 + self.link_spread * normal(self.stream(OF_LINK), rank.0);
        slow.fold(drawn, |all, (_, factor)| all * factor)
    }

    /// The source of the factors of one instruction of all ranks.
    pub(crate) fn stream(&self, instruction: u64) -> u64 {
        mix(self.seed ^ mix(instruction))
    }
}

fn known(rank: &Rank, mesh: &Mesh) -> Result<(), Error> {
    if rank.0 < mesh.ranks() {
        return Ok(());
    }
    Err(Error::NoSuchRank { rank: *rank, ranks: mesh.ranks() })
}

/// The finalizer of `SplitMix64` (Steele, Lea and Flood 2014).
fn mix(mut bits: u64) -> u64 {
    bits = bits.wrapping_add(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// A draw with mean 0 and standard deviation 1: the sum of four uniform ones (Irwin and Hall 1927).
pub(crate) fn normal(stream: u64, rank: u32) -> f64 {
    const STEPS: f64 = 65536.0;
    let bits = mix(stream ^ u64::from(rank));
    let sum = (bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48);
    // Four times the variance 1/12, whose root is that of 1/3.
    (sum as f64 + 2.0 - 2.0 * STEPS) / STEPS * 1.732_050_807_568_877_2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_have_mean_zero_and_deviation_one() {
        let count = 100_000_u32;
        let stream = Disturbance { seed: 7, ..Disturbance::default() }.stream(3);
        let draws: Vec<f64> = (0..count).map(|rank| normal(stream, rank)).collect();
        let mean = draws.iter().sum::<f64>() / f64::from(count);
        let variance = draws.iter().map(|draw| draw * draw).sum::<f64>() / f64::from(count);
        assert!(mean.abs() < 0.01, "{mean}");
        assert!((variance - 1.0).abs() < 0.01, "{variance}");
        assert!(draws.iter().all(|draw| draw.abs() < 3.5));
    }

    #[test]
    fn what_no_rank_can_do_is_refused() {
        let refused = |disturbance: Disturbance| {
            let mesh = Mesh { data: 4, ..Mesh::ONE };
            disturbance.check(&mesh).unwrap_err().to_string()
        };
        let wide = Disturbance { jitter: 0.5, ..Disturbance::default() };
        assert!(refused(wide).starts_with("`jitter` = 0.5"));
        let nobody = Disturbance { slow_ranks: vec![(Rank(4), 2.0)], ..Disturbance::default() };
        assert_eq!(refused(nobody), "there is no rank 4; ranks are numbered 0 to 3");
    }
}
