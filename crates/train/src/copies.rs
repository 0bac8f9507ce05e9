//! Which copies a rank keeps in its memory, and which of them the ranks go on from.
//!
//! A rank keeps the last two of its ward, the older of which is there while the newer is on its way,
//! and the last three of its own: it may be a step ahead of the keeper of another rank that is lost,
//! and then the keeper has no newer copy of that than this rank's oldest.

use std::collections::BTreeSet;

use checkpoint::sharded::{Kind, Run};
use model::Block;
use serde::{Deserialize, Serialize};
use units::Rank;

/// How many copies of different steps are kept of the rank's own part.
const OWN_KEPT: usize = 3;
/// How many of its ward's.
const WARD_KEPT: usize = 2;

/// A part of the state in a rank's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Holding {
    /// After which step.
    pub step: u64,
    /// Over how many ranks the state was spread, which says what the part of each is.
    pub ranks: u32,
    /// Whose part.
    pub of: Rank,
}

/// The copies in one rank's memory: of its own part and of its ward's, after the last few steps.
#[derive(Debug, Clone)]
pub(crate) struct Copies<T> {
    own: Vec<(Holding, T)>,
    ward: Vec<(Holding, T)>,
}

impl<T> Default for Copies<T> {
    fn default() -> Self {
        Self { own: vec![], ward: vec![] }
    }
}

impl<T> Copies<T> {
    /// Keeps a copy of the own part in place of the oldest, which it returns.
    pub(crate) fn keep_own(&mut self, holding: Holding, part: T) -> Option<T> {
        keep(&mut self.own, OWN_KEPT, holding, part)
    }

    /// Keeps a copy of the ward's part in place of the oldest, which it returns.
    pub(crate) fn keep_ward(&mut self, holding: Holding, part: T) -> Option<T> {
        keep(&mut self.ward, WARD_KEPT, holding, part)
    }

    /// Forgets the copies of later steps.
    pub(crate) fn forget_after(&mut self, step: u64) {
        self.own.retain(|(kept, _)| kept.step <= step);
        self.ward.retain(|(kept, _)| kept.step <= step);
    }

    /// What there is in the memory of a rank.
    pub(crate) fn holdings(&self) -> BTreeSet<Holding> {
        self.own.iter().chain(&self.ward).map(|(holding, _)| *holding).collect()
    }

    /// One of them.
    pub(crate) fn get(&self, holding: Holding) -> Option<&T> {
        let mut all = self.own.iter().chain(&self.ward);
        all.find(|(kept, _)| *kept == holding).map(|(_, part)| part)
    }
}

/// Keeps a copy in place of the oldest, which it returns.
fn keep<T>(kept: &mut Vec<(Holding, T)>, most: usize, holding: Holding, part: T) -> Option<T> {
    // What is newer was done in a generation that is lost. What the ranks of that had after this very
    // step stays: should another be lost before all have copied anew, they go on from there.
    let Holding { step, ranks, .. } = holding;
    kept.retain(|(other, _)| other.step < step || (other.step == step && other.ranks != ranks));
    kept.push((holding, part));
    (kept.len() > most).then(|| kept.remove(0).1)
}

/// The newest step whose whole state the ranks hold together, and for the part of every rank that it was
/// spread over the rank that has it: of the same number, or else the first that does. `None` if there
/// is no such step.
#[must_use]
pub fn agree(holdings: &[BTreeSet<Holding>]) -> Option<(u64, Vec<Rank>)> {
    let holders = |(step, ranks): (u64, u32)| {
        let holder = |of: Rank| {
            let has = |rank: &Rank| {
                let held = holdings.get(rank.index());
                held.is_some_and(|held| held.contains(&Holding { step, ranks, of }))
            };
            std::iter::once(of).chain((0..holdings.len() as u32).map(Rank)).find(has)
        };
        (0..ranks).map(Rank).map(holder).collect::<Option<Vec<Rank>>>()
    };
    let spreads = holdings.iter().flatten().map(|holding| (holding.step, holding.ranks));
    let spreads: BTreeSet<(u64, u32)> = spreads.collect();
    spreads.into_iter().rev().find_map(|spread| Some((spread.0, holders(spread)?)))
}

/// Elements that a rank hands to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    /// Whose part they are of.
    pub of: Rank,
    /// Who has them.
    pub from: Rank,
    /// Who needs them; may be the same.
    pub to: Rank,
    /// Which they are.
    pub runs: Vec<Run>,
}

/// Who hands what to whom, for every rank to get what it needs of the parts that `holders` have.
#[must_use]
pub fn deliveries(holders: &[Rank], parts: &[Vec<Run>], needs: &[Vec<Run>]) -> Vec<Delivery> {
    let mut deliveries = Vec::new();
    for (of, (from, part)) in (0..).map(Rank).zip(holders.iter().zip(parts)) {
        for (to, need) in (0..).map(Rank).zip(needs) {
            let runs = overlaps(part, need);
            if !runs.is_empty() {
                deliveries.push(Delivery { of, from: *from, to, runs });
            }
        }
    }
    deliveries
}

/// The elements that are in both lists, in the order of the first. Runs may be as many as the matrices
/// that ranks split by columns have rows, so no run of one is held against every run of the other.
fn overlaps(part: &[Run], need: &[Run]) -> Vec<Run> {
    let mut sorted = need.to_vec();
    sorted.sort_unstable_by_key(place);
    let near = |run: &Run| {
        let first = sorted.partition_point(|other| ends_before(other, run));
        sorted[first..].iter().map_while(|other| overlap(run, other)).collect::<Vec<_>>()
    };
    part.iter().flat_map(near).collect()
}

/// What runs that do not overlap are ordered by.
pub(crate) fn place(run: &Run) -> (Block, Kind, u64) {
    (run.block, run.kind, run.start)
}

/// Whether all of a run lies before another.
pub(crate) fn ends_before(run: &Run, other: &Run) -> bool {
    (run.block, run.kind, run.start + run.elements) <= place(other)
}

/// The elements that are in both.
pub(crate) fn overlap(one: &Run, other: &Run) -> Option<Run> {
    let start = one.start.max(other.start);
    let end = (one.start + one.elements).min(other.start + other.elements);
    let same = (one.block, one.kind) == (other.block, other.kind);
    (same && start < end).then(|| Run { start, elements: end - start, ..*one })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What ranks hold that each have made `made` copies, of step 0 on, of which the last
    /// `received` of the ward arrived.
    fn holdings(made: &[u64], received: &[u64]) -> Vec<BTreeSet<Holding>> {
        let ranks = made.len() as u32;
        let last = |count: u64, most: usize| count.saturating_sub(most as u64)..count;
        let of = |rank: u32| {
            let ward = Rank((rank + ranks - 1) % ranks);
            let own = last(made[rank as usize], OWN_KEPT);
            let own = own.map(move |step| Holding { step, ranks, of: Rank(rank) });
            let ward_steps = last(received[rank as usize], WARD_KEPT);
            own.chain(ward_steps.map(move |step| Holding { step, ranks, of: ward })).collect()
        };
        (0..ranks).map(of).collect()
    }

    /// Ranks are at most a step apart, since each step begins with words of all. Wherever they are
    /// in it, and whoever is lost, at most two steps are done again: two only where the copy of the
    /// step before had not all arrived at the keeper when the next was done.
    #[test]
    fn any_lost_rank_costs_at_most_two_steps_however_far_apart_the_others_are() {
        for (done, lost) in (2..6).flat_map(|done| (0..4).map(move |lost| (done, lost))) {
            for apart in 0..1 << 8 {
                // Each has copied after `done` steps or is about to; so with what it received.
                let is = |bit: u32| u64::from(apart >> bit & 1 == 1);
                let made: Vec<u64> = (0..4).map(|rank| done + is(rank)).collect();
                let received: Vec<u64> = (0..4)
                    .map(|rank| (made[rank] - 1).max(done + is(4 + rank as u32) - 1))
                    .collect();
                let mut held = holdings(&made, &received);
                held[lost].clear();
                let (step, holders) =
                    agree(&held).unwrap_or_else(|| panic!("{made:?} {received:?}"));
                // A rank that has copied k times has done k - 1 steps.
                assert!(
                    made.iter().max().unwrap() - 1 - step <= 2,
                    "{made:?} {received:?}: {step}"
                );
                assert_ne!(holders[lost], Rank(lost as u32));
            }
        }
    }

    #[test]
    fn what_is_held_nowhere_is_not_agreed_on() {
        let mut held = holdings(&[5, 5, 5], &[5, 5, 5]);
        held[0].clear();
        held[1].clear();
        assert_eq!(agree(&held), None);
        assert_eq!(agree(&holdings(&[0, 0], &[0, 0])), None);
    }

    #[test]
    fn parts_of_another_spread_are_gone_on_from_as_what_they_are() {
        let holding = |ranks, step, of| Holding { step, ranks, of: Rank(of) };
        let held = |parts: &[(u32, u64, u32)]| {
            parts.iter().map(|(ranks, step, of)| holding(*ranks, *step, *of)).collect()
        };
        // Four ranks, of which that with rank 2 was lost, and what was 3 is 2 now.
        let left: [BTreeSet<Holding>; 3] = [
            held(&[(4, 7, 0), (4, 7, 3)]),
            held(&[(4, 7, 1), (4, 7, 0)]),
            held(&[(4, 7, 3), (4, 7, 2)]),
        ];
        let (step, holders) = agree(&left).unwrap();
        assert_eq!((step, holders), (7, vec![Rank(0), Rank(1), Rank(2), Rank(0)]));
        // Only two of three have copied anew when the third is lost: these are no whole.
        let mut copies = Copies::default();
        copies.keep_own(holding(4, 6, 0), ());
        copies.keep_own(holding(4, 7, 0), ());
        copies.keep_own(holding(3, 7, 0), ());
        assert_eq!(copies.holdings(), held(&[(4, 6, 0), (4, 7, 0), (3, 7, 0)]));
        let [mut first, second, third] = left;
        first.insert(holding(3, 7, 0));
        let again = [first, &second | &held(&[(3, 7, 1)]), third];
        assert_eq!(agree(&again).unwrap().1.len(), 4);
    }

    #[test]
    fn runs_of_columns_are_found_among_many() {
        let run = |block, start, elements| Run { block, kind: Kind::Parameter, start, elements };
        let blocks = [Block::Head, Block::Embedding, Block::Layer(1)];
        // The right half of every row of 8, against pieces of 12, in any order.
        let columns = blocks.iter().flat_map(|b| (0..9).map(|row| run(*b, 8 * row + 4, 4)));
        let pieces = (0..6).flat_map(|piece| blocks.map(|b| run(b, 12 * piece, 12)));
        let (columns, mut pieces): (Vec<_>, Vec<_>) = (columns.collect(), pieces.collect());
        pieces.reverse();
        let mut found = overlaps(&columns, &pieces);
        let each = columns.iter().flat_map(|c| pieces.iter().filter_map(|p| overlap(c, p)));
        let mut expected: Vec<Run> = each.collect();
        found.sort_unstable_by_key(place);
        expected.sort_unstable_by_key(place);
        assert_eq!(found, expected);
        assert_eq!(found.iter().map(|run| run.elements).sum::<u64>(), 3 * 9 * 4);
    }

    #[test]
    fn deliveries_bring_every_rank_what_it_needs_once() {
        let run = |start, elements| {
            vec![Run { block: Block::Head, kind: Kind::Parameter, start, elements }]
        };
        let parts = [run(0, 40), run(40, 60)];
        let needs = [run(0, 100), run(30, 20)];
        let found = deliveries(&[Rank(1), Rank(1)], &parts, &needs);
        let all: Vec<_> = found.iter().map(|d| (d.from.0, d.to.0, d.runs.clone())).collect();
        let expected =
            [(1, 0, run(0, 40)), (1, 1, run(30, 10)), (1, 0, run(40, 60)), (1, 1, run(40, 10))];
        assert_eq!(all, expected);
    }
}
