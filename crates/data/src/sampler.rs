//! Which tokens each position of each step reads.

use std::ops::Range;

use crate::Error;

/// How a run samples its text.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Tokens per sequence.
    pub sequence: u64,
    /// Sequences per step, over all ranks.
    pub global_batch: u64,
    /// Decides the order, and nothing else does.
    pub seed: u64,
    /// The share of the text set aside for evaluation, at most a half; at least one sequence is.
    pub held_out: f64,
}

impl Sampling {
    /// The share held out where a job names none: 2 %.
    pub const HELD_OUT: f64 = 0.02;
}

/// A pure function from a global index to a window of tokens.
///
/// The text is cut into windows of `sequence` tokens, each read with one token more, the target of
/// its last position. The last windows are held out; the others are visited in an order that is new
/// in every epoch, each exactly once. There is no state: index `step * global_batch + position` is
/// the same window whoever asks, so a run resumes at any step, and every layout and rank count
/// trains on the same text in the same order.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampler {
    sequence: u64,
    seed: u64,
    training: u64,
    held_out: u64,
}

impl Sampler {
    /// Cuts a text of `tokens` tokens as `sampling` says.
    ///
    /// # Errors
    /// [`Error::Setting`] for a value out of range; [`Error::TooShort`] where the windows that are
    /// not held out do not fill one batch.
    pub fn new(tokens: u64, sampling: Sampling) -> Result<Self, Error> {
        sampling.check()?;
        let windows = windows_in(tokens, sampling.sequence);
        let held_out = sampling.held_out_of(windows);
        let training = windows.saturating_sub(held_out);
        if training < sampling.global_batch {
            return Err(Error::TooShort {
                available: tokens,
                needed: sampling.needed_tokens(),
                global_batch: sampling.global_batch,
                sequence: sampling.sequence,
            });
        }
        Ok(Self {
            sequence: sampling.sequence,
            seed: sampling.seed,
            training,
            held_out,
        })
    }

    /// The tokens of training window `global_index`: `sequence` inputs and one more, since the
    /// targets are the same tokens one position on.
    #[must_use]
    pub fn train_window(&self, global_index: u64) -> Range<u64> {
        let (epoch, index) = (global_index / self.training, global_index % self.training);
        self.window(permute(index, self.training, self.seed, epoch) * self.sequence)
    }

    /// The held-out windows, in the order of the text.
    ///
    /// They begin one token after the training windows end, because the target of the last training
    /// position lies one token beyond its window and would otherwise be held out and trained on.
    pub fn evaluation_windows(&self) -> impl Iterator<Item = Range<u64>> + use<> {
        let sampler = *self;
        let first = sampler.training * sampler.sequence + 1;
        (0..sampler.held_out).map(move |window| sampler.window(first + window * sampler.sequence))
    }

    /// How many training windows one epoch visits.
    #[must_use]
    pub fn windows_per_epoch(&self) -> u64 {
        self.training
    }

    fn window(&self, start: u64) -> Range<u64> {
        start..start + self.sequence + 1
    }
}

/// How many windows fit: the last one needs a target beyond its end, and the held-out ones lie one
/// token further on than the training ones.
fn windows_in(tokens: u64, sequence: u64) -> u64 {
    tokens.saturating_sub(2) / sequence
}

impl Sampling {
    fn check(&self) -> Result<(), Error> {
        for (key, value) in [
            ("sequence", self.sequence),
            ("global_batch", self.global_batch),
        ] {
            if !(1..=u64::from(u32::MAX)).contains(&value) {
                let range = "from 1 to 4,294,967,295";
                return Err(Error::Setting {
                    key,
                    value: value.to_string(),
                    range,
                });
            }
        }
        if !(0.0..=0.5).contains(&self.held_out) {
            let (value, range) = (self.held_out.to_string(), "from 0 to 0.5");
            return Err(Error::Setting {
                key: "held_out",
                value,
                range,
            });
        }
        Ok(())
    }

    fn held_out_of(&self, windows: u64) -> u64 {
        ((windows as f64 * self.held_out) as u64).max(1)
    }

    /// The shortest text that leaves one batch to train on.
    fn needed_tokens(&self) -> u64 {
        let estimate = (self.global_batch as f64 / (1.0 - self.held_out)) as u64;
        let mut windows = estimate.saturating_sub(1).max(self.global_batch + 1);
        while windows - self.held_out_of(windows) < self.global_batch {
            windows += 1;
        }
        windows * self.sequence + 2
    }
}

/// Rounds of the Feistel network; four make it a good shuffle, the rest is margin.
const ROUNDS: u64 = 6;

/// Where `index` of `0..length` stands in the order of an epoch: a seeded bijection of `0..length`.
///
/// A Feistel network is a bijection of a power of four; walking along its cycle until the value
/// falls below `length` makes it one of `0..length`, in under four steps on average and no memory.
fn permute(index: u64, length: u64, seed: u64, epoch: u64) -> u64 {
    let half_bits = (64 - (length - 1).leading_zeros()).div_ceil(2).max(1);
    let key = mix(seed ^ mix(epoch));
    let mut value = feistel(index, half_bits, key);
    while value >= length {
        value = feistel(value, half_bits, key);
    }
    value
}

fn feistel(value: u64, half_bits: u32, key: u64) -> u64 {
    let mask = (1 << half_bits) - 1;
    let (mut left, mut right) = (value >> half_bits, value & mask);
    for round in 0..ROUNDS {
        let scrambled = mix(right ^ mix(key.wrapping_add(round)));
        (left, right) = (right, left ^ (scrambled & mask));
    }
    left << half_bits | right
}

/// The output function of SplitMix64: every input bit reaches every output bit.
fn mix(value: u64) -> u64 {
    let mut value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const SAMPLING: Sampling = Sampling {
        sequence: 8,
        global_batch: 4,
        seed: 7,
        held_out: Sampling::HELD_OUT,
    };

    /// The golden order: a change here changes what every resumed run reads.
    #[test]
    fn the_order_never_changes() {
        let sampler = Sampler::new(1_000, SAMPLING).unwrap();
        let starts = |from: u64| -> Vec<u64> {
            (from..from + 8)
                .map(|index| sampler.train_window(index).start)
                .collect()
        };
        assert_eq!(sampler.windows_per_epoch(), 122);
        assert_eq!(starts(0), [256, 296, 128, 728, 88, 688, 32, 96]);
        assert_eq!(starts(122), [560, 504, 72, 880, 904, 64, 256, 552]);
    }

    #[test]
    fn held_out_windows_end_the_text() {
        let sampler = Sampler::new(1_000, SAMPLING).unwrap();
        let held_out: Vec<_> = sampler.evaluation_windows().collect();
        assert_eq!(held_out, [977..986, 985..994]);
    }

    #[test]
    fn a_text_too_short_for_a_batch_says_how_much_is_needed() {
        let error = Sampler::new(41, SAMPLING).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the text is too short for one batch: 41 tokens, and 42 are needed for 4 sequences of 8 tokens beside the held-out ones; give more text, or lower `global_batch` or `sequence`"
        );
        assert!(Sampler::new(42, SAMPLING).is_ok());
    }

    #[test]
    fn settings_out_of_range_are_named() {
        let message = |sampling| Sampler::new(1_000, sampling).unwrap_err().to_string();
        assert_eq!(
            message(Sampling {
                sequence: 0,
                ..SAMPLING
            }),
            "`sequence` = 0 cannot be sampled; it must be from 1 to 4,294,967,295"
        );
        assert_eq!(
            message(Sampling {
                global_batch: 1 << 32,
                ..SAMPLING
            }),
            "`global_batch` = 4294967296 cannot be sampled; it must be from 1 to 4,294,967,295"
        );
        assert_eq!(
            message(Sampling {
                held_out: f64::NAN,
                ..SAMPLING
            }),
            "`held_out` = NaN cannot be sampled; it must be from 0 to 0.5"
        );
    }

    #[test]
    fn epochs_and_seeds_have_orders_of_their_own() {
        let order = |seed, epoch| -> Vec<u64> {
            (0..100)
                .map(|index| permute(index, 100, seed, epoch))
                .collect()
        };
        let orders: BTreeSet<_> = (0..10)
            .flat_map(|seed| (0..10).map(move |epoch| order(seed, epoch)))
            .collect();
        assert_eq!(orders.len(), 100);
    }

    proptest! {
        #[test]
        fn every_epoch_sees_every_window_once(
            tokens in 20_u64..5_000, sequence in 1_u64..9, seed: u64, epoch in 0_u64..1_000,
        ) {
            let sampling = Sampling { sequence, global_batch: 1, seed, held_out: 0.1 };
            let sampler = Sampler::new(tokens, sampling).unwrap();
            let first = epoch * sampler.windows_per_epoch();
            let starts: BTreeSet<u64> = (first..first + sampler.windows_per_epoch())
                .map(|index| sampler.train_window(index).start)
                .collect();
            let every: BTreeSet<u64> = (0..sampler.windows_per_epoch()).map(|window| window * sequence).collect();
            prop_assert_eq!(starts, every);
        }

        #[test]
        fn no_held_out_token_is_trained_on(
            tokens in 20_u64..5_000, sequence in 1_u64..9, seed: u64, share in 0.0..0.5,
        ) {
            let sampling = Sampling { sequence, global_batch: 1, seed, held_out: share };
            let sampler = Sampler::new(tokens, sampling).unwrap();
            let trained = (0..sampler.windows_per_epoch()).map(|index| sampler.train_window(index).end).max();
            let held_out = sampler.evaluation_windows().map(|window| window.start).min();
            prop_assert!(trained <= held_out);
            prop_assert!(sampler.evaluation_windows().all(|window| window.end <= tokens));
        }

        #[test]
        fn the_tokens_said_to_be_needed_are_the_fewest(
            global_batch in 1_u64..200, sequence in 1_u64..50, held_out in 0.0..0.5,
        ) {
            let sampling = Sampling { sequence, global_batch, seed: 0, held_out };
            let needed = sampling.needed_tokens();
            prop_assert!(Sampler::new(needed, sampling).is_ok());
            prop_assert!(Sampler::new(needed - 1, sampling).is_err());
        }

        #[test]
        fn large_permutations_stay_in_range(index: u64, length in 1_u64.., seed: u64) {
            prop_assert!(permute(index % length, length, seed, 0) < length);
        }
    }
}
