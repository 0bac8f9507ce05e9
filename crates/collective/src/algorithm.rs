//! The algorithms: what each generates, and its closed form.

use serde::{Deserialize, Serialize};
use units::Bytes;

use crate::{Action, Kind, Schedule, Step};

/// A way to carry out a collective.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Algorithm {
    /// Every member talks to its two neighbours only: the fewest bytes, the most rounds.
    Ring,
    /// Every member talks to every other at once: as few bytes, and one round per phase.
    Direct,
}

/// What a collective takes, before any knowledge of links.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cost {
    /// How many times a member waits for data that another member first had to receive, plus one:
    /// the number of latencies on the critical path.
    pub rounds: u32,
    /// What every member sends, and receives. Exact when the number of members divides the buffer.
    pub bytes_per_rank: Bytes,
}

impl Algorithm {
    /// The algorithm's schedule for `ranks` members.
    ///
    /// # Panics
    /// When `ranks` is 0.
    #[must_use]
    pub fn schedule(self, kind: Kind, ranks: u32) -> Schedule {
        match self {
            Self::Ring => ring(kind, ranks),
            Self::Direct => direct(kind, ranks),
        }
    }

    /// The closed form of [`Algorithm::schedule`] on a buffer of this size (the whole buffer, also
    /// for reduce-scatter and all-gather).
    ///
    /// # Panics
    /// When `ranks` is 0.
    #[must_use]
    pub fn cost(self, kind: Kind, ranks: u32, buffer: Bytes) -> Cost {
        assert!(ranks > 0, "a collective has at least one member");
        let phases = if kind == Kind::AllReduce { 2 } else { 1 };
        let rounds_per_phase = match self {
            Self::Ring => ranks - 1,
            Self::Direct => (ranks - 1).min(1),
        };
        let chunks_sent = u64::from(phases * (ranks - 1));
        Cost {
            rounds: phases * rounds_per_phase,
            bytes_per_rank: Bytes((buffer.0 * chunks_sent).div_ceil(u64::from(ranks))),
        }
    }
}

/// The ring schedule: in every round each member sends one chunk to the next member.
///
/// Chunk `c` is reduced in the order c+1, c+2, ..., c around the ring and ends on member `c`.
///
/// # Panics
/// When `ranks` is 0.
#[must_use]
pub fn ring(kind: Kind, ranks: u32) -> Schedule {
    phases(kind, ranks, |member, action| ring_phase(member, ranks, action))
}

/// The direct schedule: every member sends to every other in one round per phase.
///
/// Each member reduces into its own contribution the others' in ascending order, whichever arrives
/// first.
///
/// # Panics
/// When `ranks` is 0.
#[must_use]
pub fn direct(kind: Kind, ranks: u32) -> Schedule {
    phases(kind, ranks, |member, action| match action {
        Action::Reduce => direct_reduce(member, ranks),
        Action::Copy => direct_copy(member, ranks),
    })
}

/// Puts a collective together from its reducing and its copying phase. Both algorithms send at
/// most one chunk to a peer per round, so one send in flight is enough.
fn phases(kind: Kind, ranks: u32, phase: impl Fn(u32, Action) -> Vec<Step>) -> Schedule {
    assert!(ranks > 0, "a collective has at least one member");
    let actions: &[Action] = match kind {
        Kind::AllReduce => &[Action::Reduce, Action::Copy],
        Kind::ReduceScatter => &[Action::Reduce],
        Kind::AllGather => &[Action::Copy],
    };
    let list = |member| actions.iter().flat_map(|action| phase(member, *action)).collect();
    Schedule { kind, in_flight: 1, steps: (0..ranks).map(list).collect() }
}

/// One trip around the ring. A reduction starts one chunk earlier than a copy, so that it ends with
/// chunk `i` on member `i`, where the copy starts.
fn ring_phase(member: u32, ranks: u32, action: Action) -> Vec<Step> {
    let lag = u32::from(action == Action::Reduce);
    let back = |distance: u32| (member + 2 * ranks - distance) % ranks;
    (0..ranks - 1)
        .flat_map(|round| {
            let send = Step::Send { to: (member + 1) % ranks, chunk: back(round + lag) };
            let chunk = back(round + lag + 1);
            [send, Step::Receive { from: back(1), chunk, action }]
        })
        .collect()
}

/// Every member sends each other member that member's chunk, the next neighbour's first so that no
/// member is everyone's first target.
fn direct_reduce(member: u32, ranks: u32) -> Vec<Step> {
    let sends = others_after(member, ranks).map(|to| Step::Send { to, chunk: to });
    let receives = (0..ranks).filter(|from| *from != member).map(|from| Step::Receive {
        from,
        chunk: member,
        action: Action::Reduce,
    });
    sends.chain(receives).collect()
}

/// Every member sends its own chunk to every other member.
fn direct_copy(member: u32, ranks: u32) -> Vec<Step> {
    let sends = others_after(member, ranks).map(|to| Step::Send { to, chunk: member });
    let receives = (0..ranks).filter(|from| *from != member).map(|from| Step::Receive {
        from,
        chunk: from,
        action: Action::Copy,
    });
    sends.chain(receives).collect()
}

/// The other members in ring order, starting with the next one.
fn others_after(member: u32, ranks: u32) -> impl Iterator<Item = u32> {
    (1..ranks).map(move |distance| (member + distance) % ranks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk_range;

    const KINDS: [Kind; 3] = [Kind::AllReduce, Kind::ReduceScatter, Kind::AllGather];
    const ALGORITHMS: [Algorithm; 2] = [Algorithm::Ring, Algorithm::Direct];

    /// The elements that each member of a schedule sends.
    fn elements_sent(schedule: &Schedule, elements: usize) -> Vec<usize> {
        let length = |step: &Step| chunk_range(elements, schedule.ranks(), step.chunk()).len();
        let sent = |list: &Vec<Step>| list.iter().filter(|s| s.is_send()).map(length).sum();
        schedule.steps.iter().map(sent).collect()
    }

    #[test]
    fn every_schedule_is_correct_and_costs_what_its_closed_form_says() {
        for (algorithm, kind) in ALGORITHMS.into_iter().flat_map(|a| KINDS.map(|k| (a, k))) {
            for ranks in 1..=64 {
                let schedule = algorithm.schedule(kind, ranks);
                let rounds = schedule.verify().unwrap();
                let elements = 10 * ranks as usize;
                let cost = algorithm.cost(kind, ranks, Bytes(4 * elements as u64));
                assert_eq!(rounds, cost.rounds, "{algorithm:?} {kind:?} {ranks}");
                let expected = cost.bytes_per_rank.0 as usize / 4;
                let sent = elements_sent(&schedule, elements);
                assert!(sent.iter().all(|sent| *sent == expected), "{sent:?} {expected}");
            }
        }
    }

    #[test]
    fn an_uneven_buffer_costs_at_most_an_element_per_chunk_more() {
        for ranks in 2..=16_u32 {
            let elements = 10 * ranks as usize + 3;
            let cost = Algorithm::Ring.cost(Kind::AllReduce, ranks, Bytes(4 * elements as u64));
            for sent in elements_sent(&ring(Kind::AllReduce, ranks), elements) {
                let difference = (sent as i64 - cost.bytes_per_rank.0 as i64 / 4).abs();
                assert!(difference <= 2 * i64::from(ranks), "{ranks}: {difference}");
            }
        }
    }

    #[test]
    fn a_reduction_ends_where_a_copy_starts() {
        let schedule = ring(Kind::ReduceScatter, 3);
        let last = Step::Receive { from: 0, chunk: 1, action: Action::Reduce };
        assert_eq!(schedule.steps[1].last(), Some(&last));
        let schedule = ring(Kind::AllGather, 3);
        assert_eq!(schedule.steps[1][0], Step::Send { to: 2, chunk: 1 });
    }
}
