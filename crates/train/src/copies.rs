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

/// A part of the state in this rank's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Holding {
    /// After which step.
    pub step: u64,
    /// Whose part.
    pub of: Rank,
}

/// The copies in one rank's memory: of its own part and of its ward's, after the last few steps.
#[derive(Debug, Clone)]
pub(crate) struct Copies<T> {
    own: Vec<(u64, T)>,
    ward: Vec<(u64, T)>,
}

impl<T> Default for Copies<T> {
    fn default() -> Self {
        Self { own: vec![], ward: vec![] }
    }
}

impl<T> Copies<T> {
    /// Keeps a copy of the own part in place of the oldest, which it returns.
    pub(crate) fn keep_own(&mut self, step: u64, part: T) -> Option<T> {
        keep(&mut self.own, OWN_KEPT, step, part)
    }

    /// Keeps a copy of the ward's part in place of the oldest, which it returns.
    pub(crate) fn keep_ward(&mut self, step: u64, part: T) -> Option<T> {
        keep(&mut self.ward, WARD_KEPT, step, part)
    }

    /// Forgets the copies of later steps.
    pub(crate) fn forget_after(&mut self, step: u64) {
        self.own.retain(|(kept, _)| *kept <= step);
        self.ward.retain(|(kept, _)| *kept <= step);
    }

    /// What there is in the memory of a rank.
    pub(crate) fn holdings(&self, rank: Rank, ward: Rank) -> BTreeSet<Holding> {
        let own = self.own.iter().map(|(step, _)| Holding { step: *step, of: rank });
        own.chain(self.ward.iter().map(|(step, _)| Holding { step: *step, of: ward })).collect()
    }

    /// One of them: of the rank's own part, or of its ward's.
    pub(crate) fn get(&self, own: bool, step: u64) -> Option<&T> {
        let kept = if own { &self.own } else { &self.ward };
        kept.iter().find(|(kept, _)| *kept == step).map(|(_, part)| part)
    }
}

/// Keeps a copy in place of the oldest, which it returns.
fn keep<T>(kept: &mut Vec<(u64, T)>, most: usize, step: u64, part: T) -> Option<T> {
    // What is newer was done in a generation that is lost.
    kept.retain(|(other, _)| *other < step);
    kept.push((step, part));
    (kept.len() > most).then(|| kept.remove(0).1)
}

/// The newest step whose whole state the ranks hold together, and for every rank's part of it the
/// rank that has it: itself, or else the first that does. `None` if there is no such step.
#[must_use]
pub fn agree(holdings: &[BTreeSet<Holding>]) -> Option<(u64, Vec<Rank>)> {
    let ranks = || (0..holdings.len() as u32).map(Rank);
    let holder = |step, of: Rank| {
        let has = |rank: &Rank| holdings[rank.index()].contains(&Holding { step, of });
        std::iter::once(of).chain(ranks()).find(has)
    };
    let steps: BTreeSet<u64> = holdings.iter().flatten().map(|holding| holding.step).collect();
    steps.into_iter().rev().find_map(|step| {
        let holders: Option<Vec<Rank>> = ranks().map(|of| holder(step, of)).collect();
        Some((step, holders?))
    })
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
            let own = own.map(move |step| Holding { step, of: Rank(rank) });
            let ward_steps = last(received[rank as usize], WARD_KEPT);
            own.chain(ward_steps.map(move |step| Holding { step, of: ward })).collect()
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
