//! Who is slower than others that do the same.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};
use units::{Rank, Seconds};

/// Steps that are looked at together.
const WINDOW: usize = 10;
/// A rank is slow when it takes so much longer than its peers.
const SLOW: f64 = 1.2;
/// It has caught up when it takes no more than this.
const CAUGHT_UP: f64 = 1.1;

/// A rank that holds the others up.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Slow {
    /// Which.
    pub rank: Rank,
    /// How long it computes and reads data in a step, over what its peers take.
    pub factor: f64,
}

/// The speed of all ranks over the last steps.
#[derive(Debug, Clone)]
pub struct Pace {
    /// By rank: the stage, whose ranks do the same.
    stages: Vec<u32>,
    recent: VecDeque<Vec<f64>>,
    told: BTreeSet<Rank>,
}

impl Pace {
    /// Of ranks that do the same where their stages are the same.
    #[must_use]
    pub fn new(stages: Vec<u32>) -> Self {
        Self { stages, recent: VecDeque::new(), told: BTreeSet::new() }
    }

    /// Takes how long each rank was busy with a step; who is found to be slow, once each time. One
    /// slow step is chance, so a rank must be the slower one in nearly all of the last ten.
    pub fn see(&mut self, busy: &[Seconds]) -> Vec<Slow> {
        self.recent.push_back(self.factors(busy));
        if self.recent.len() > WINDOW {
            self.recent.pop_front();
        }
        if self.recent.len() < WINDOW {
            return vec![];
        }
        let mut slow = Vec::new();
        for rank in (0..self.stages.len() as u32).map(Rank) {
            let mut factors: Vec<f64> = self.recent.iter().map(|step| step[rank.index()]).collect();
            factors.sort_by(f64::total_cmp);
            // All but two of ten are above the third.
            let (low, factor) = (factors[2], factors[WINDOW / 2]);
            if low >= SLOW && self.told.insert(rank) {
                slow.push(Slow { rank, factor });
            } else if factor <= CAUGHT_UP {
                self.told.remove(&rank);
            }
        }
        slow
    }

    /// Each rank's time over the median of its peers'; 1 without peers.
    fn factors(&self, busy: &[Seconds]) -> Vec<f64> {
        let mut stages: BTreeMap<u32, Vec<(usize, f64)>> = BTreeMap::new();
        for (rank, (stage, time)) in self.stages.iter().zip(busy).enumerate() {
            stages.entry(*stage).or_default().push((rank, time.0));
        }
        let mut factors = vec![1.0; busy.len()];
        for members in stages.values().filter(|members| members.len() > 1) {
            for (rank, time) in members {
                let peers = members.iter().filter(|(other, _)| other != rank);
                let median = Seconds::median(peers.map(|(_, time)| Seconds(*time)).collect());
                factors[*rank] = time / median.0.max(f64::MIN_POSITIVE);
            }
        }
        factors
    }
}

#[cfg(test)]
mod tests {
    use checkpoint::store::simulated::Dice;

    use super::*;

    /// Four ranks in two stages, the second of which has less to do; each step with some noise.
    fn times(dice: &mut Dice, slow: Option<(usize, f64)>) -> Vec<Seconds> {
        let time = |rank: usize| {
            let noise = 1.0 + dice.below(100) as f64 * 1e-3;
            // A step in twenty is disturbed by something else.
            let disturbed = if dice.one_in(20) { 2.0 } else { 1.0 };
            let factor = slow.map_or(1.0, |(of, factor)| if of == rank { factor } else { 1.0 });
            Seconds([0.10, 0.07][rank / 2] * noise * disturbed * factor)
        };
        (0..4).map(time).collect()
    }

    #[test]
    fn a_rank_that_becomes_slow_is_named_within_so_many_steps() {
        for seed in 0..200 {
            let (mut dice, mut pace) = (Dice::new(seed), Pace::new(vec![0, 0, 1, 1]));
            let clean = (0..50).flat_map(|_| pace.see(&times(&mut dice, None))).count();
            assert_eq!(clean, 0, "seed {seed}");
            let rank = (seed % 4) as usize;
            let slow = (0..12).flat_map(|_| pace.see(&times(&mut dice, Some((rank, 1.4)))));
            let slow: Vec<Slow> = slow.collect();
            assert!(matches!(slow[..], [one] if one.rank.index() == rank), "{seed}: {slow:?}");
            assert!((1.2..1.6).contains(&slow[0].factor), "{slow:?}");
        }
    }

    #[test]
    fn nobody_is_slow_without_peers_and_who_caught_up_is_named_again() {
        let mut alone = Pace::new(vec![0, 1]);
        let found = (0..30).flat_map(|_| alone.see(&[Seconds(0.1), Seconds(0.5)])).count();
        assert_eq!(found, 0);
        let mut pace = Pace::new(vec![0, 0]);
        let mut named = 0;
        for slow in [true, false, true] {
            let time = if slow { 0.13 } else { 0.1 };
            named += (0..20).flat_map(|_| pace.see(&[Seconds(0.1), Seconds(time)])).count();
        }
        assert_eq!(named, 2);
    }
}
