//! The algorithms: what each generates for one member, and its closed form.

use serde::{Deserialize, Serialize};
use units::Bytes;

use crate::{Action, Chunks, Contract, Error, Kind, Part, Schedule, Step};

/// A way to carry out a collective.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Algorithm {
    /// Every member talks to its two neighbours only: the fewest bytes, the most rounds.
    Ring,
    /// Every member talks to every other at once: as few bytes, and one round per phase.
    Direct,
}

/// A kind of collective, carried out by an algorithm among some ranks. Each member's steps are
/// generated without anyone else's.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Collective {
    kind: Kind,
    algorithm: Algorithm,
    ranks: u32,
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

impl Collective {
    /// A collective by [`Algorithm::Ring`].
    ///
    /// In every round each member sends one chunk to the next member. Chunk `c` is reduced in the
    /// order c+1, c+2, ..., c around the ring and ends on member `c`.
    ///
    /// # Panics
    /// When `ranks` is 0.
    #[must_use]
    pub fn ring(kind: Kind, ranks: u32) -> Self {
        assert!(ranks > 0, "a collective has at least one member");
        Self { kind, algorithm: Algorithm::Ring, ranks }
    }

    /// A collective by [`Algorithm::Direct`].
    ///
    /// Each member reduces into its own contribution the others' in the order in which they are
    /// sent, the member before it first, whichever arrives first.
    ///
    /// # Panics
    /// When `ranks` is 0.
    #[must_use]
    pub fn direct(kind: Kind, ranks: u32) -> Self {
        assert!(ranks > 0, "a collective has at least one member");
        Self { kind, algorithm: Algorithm::Direct, ranks }
    }

    /// A collective among `ranks` members.
    ///
    /// # Errors
    /// When the algorithm does not carry out this kind among so many ranks.
    pub fn new(kind: Kind, algorithm: Algorithm, ranks: u32) -> Result<Self, Error> {
        if ranks == 0 {
            return Err(Error::Empty);
        }
        Ok(Self { kind, algorithm, ranks })
    }

    /// What the members agree on.
    #[must_use]
    pub fn contract(&self) -> Contract {
        // Both algorithms send at most one chunk to a peer per round.
        Contract { kind: self.kind, ranks: self.ranks, chunks: self.ranks, in_flight: 1 }
    }

    /// How many members have steps.
    #[must_use]
    pub fn members(&self) -> u32 {
        self.ranks
    }

    /// Whether all members are alike: any one can be made any other by renumbering members and
    /// chunks, so that on equal links what holds for one holds for all.
    #[must_use]
    pub fn is_symmetric(&self) -> bool {
        match self.algorithm {
            Algorithm::Ring | Algorithm::Direct => true,
        }
    }

    /// What one member does. It takes time and memory for these steps and no other member's.
    ///
    /// # Panics
    /// When there is no such member.
    #[must_use]
    pub fn steps(&self, member: u32) -> Vec<Step> {
        let ranks = self.ranks;
        assert!(member < ranks, "member {member} of {ranks}");
        let actions: &[Action] = match self.kind {
            Kind::AllReduce => &[Action::Reduce, Action::Copy],
            Kind::ReduceScatter => &[Action::Reduce],
            Kind::AllGather => &[Action::Copy],
        };
        let phase = |action: &Action| match self.algorithm {
            Algorithm::Ring => ring_phase(member, ranks, *action),
            Algorithm::Direct => direct_phase(member, ranks, *action),
        };
        actions.iter().flat_map(phase).collect()
    }

    /// One member's part.
    ///
    /// # Panics
    /// When there is no such member.
    #[must_use]
    pub fn part(&self, member: u32) -> Part {
        Part { contract: self.contract(), member, steps: self.steps(member) }
    }

    /// Every member's steps.
    #[must_use]
    pub fn schedule(&self) -> Schedule {
        let steps = (0..self.members()).map(|member| self.steps(member)).collect();
        Schedule { contract: self.contract(), steps }
    }

    /// The closed form on a buffer of this size (the whole buffer, also for reduce-scatter and
    /// all-gather).
    #[must_use]
    pub fn cost(&self, buffer: Bytes) -> Cost {
        let phases = if self.kind == Kind::AllReduce { 2 } else { 1 };
        let rounds_per_phase = match self.algorithm {
            Algorithm::Ring => self.ranks - 1,
            Algorithm::Direct => (self.ranks - 1).min(1),
        };
        let chunks_sent = u64::from(phases * (self.ranks - 1));
        Cost {
            rounds: phases * rounds_per_phase,
            bytes_per_rank: Bytes((buffer.0 * chunks_sent).div_ceil(u64::from(self.ranks))),
        }
    }
}

/// One trip around the ring. A reduction starts one chunk earlier than a copy, so that it ends with
/// chunk `i` on member `i`, where the copy starts.
fn ring_phase(member: u32, ranks: u32, action: Action) -> Vec<Step> {
    let lag = u32::from(action == Action::Reduce);
    let back = |distance: u32| (member + 2 * ranks - distance) % ranks;
    (0..ranks - 1)
        .flat_map(|round| {
            let chunks = Chunks::one(back(round + lag));
            let send = Step::Send { to: (member + 1) % ranks, chunks };
            let chunks = Chunks::one(back(round + lag + 1));
            [send, Step::Receive { from: back(1), chunks, action }]
        })
        .collect()
}

/// Every member sends every other that one's chunk to be reduced, or its own to be copied. The next
/// neighbour comes first, so that no member is everyone's first target.
fn direct_phase(member: u32, ranks: u32, action: Action) -> Vec<Step> {
    let reduces = action == Action::Reduce;
    let chunk_of = |owner, other| Chunks::one(if reduces { other } else { owner });
    let after = |distance| (member + distance) % ranks;
    let before = |distance| (member + ranks - distance) % ranks;
    let send = |to| Step::Send { to, chunks: chunk_of(member, to) };
    let receive = |from| Step::Receive { from, chunks: chunk_of(from, member), action };
    let sends = (1..ranks).map(|distance| send(after(distance)));
    sends.chain((1..ranks).map(|distance| receive(before(distance)))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [Kind; 3] = [Kind::AllReduce, Kind::ReduceScatter, Kind::AllGather];
    const ALGORITHMS: [Algorithm; 2] = [Algorithm::Ring, Algorithm::Direct];

    /// The elements that each member of a schedule sends.
    fn elements_sent(schedule: &Schedule, elements: usize) -> Vec<usize> {
        let length = |step: &Step| schedule.contract.range(elements, step.chunks()).len();
        let sent = |list: &Vec<Step>| list.iter().filter(|s| s.is_send()).map(length).sum();
        schedule.steps.iter().map(sent).collect()
    }

    #[test]
    fn every_schedule_is_correct_and_costs_what_its_closed_form_says() {
        for (algorithm, kind) in ALGORITHMS.iter().flat_map(|a| KINDS.map(|k| (a, k))) {
            for ranks in 1..=64 {
                let collective = Collective::new(kind, algorithm.clone(), ranks).unwrap();
                let schedule = collective.schedule();
                let rounds = schedule.verify().unwrap();
                let elements = 10 * ranks as usize;
                let cost = collective.cost(Bytes(4 * elements as u64));
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
            let ring = Collective::ring(Kind::AllReduce, ranks);
            let cost = ring.cost(Bytes(4 * elements as u64));
            for sent in elements_sent(&ring.schedule(), elements) {
                let difference = (sent as i64 - cost.bytes_per_rank.0 as i64 / 4).abs();
                assert!(difference <= 2 * i64::from(ranks), "{ranks}: {difference}");
            }
        }
    }

    #[test]
    fn a_reduction_ends_where_a_copy_starts() {
        let steps = Collective::ring(Kind::ReduceScatter, 3).steps(1);
        let chunks = Chunks::one(1);
        let last = Step::Receive { from: 0, chunks, action: Action::Reduce };
        assert_eq!(steps.last(), Some(&last));
        let steps = Collective::ring(Kind::AllGather, 3).steps(1);
        assert_eq!(steps[0], Step::Send { to: 2, chunks });
    }

    #[test]
    fn members_of_a_symmetric_collective_are_rotations_of_each_other() {
        for (algorithm, kind) in ALGORITHMS.iter().flat_map(|a| KINDS.map(|k| (a, k))) {
            for ranks in 1..=16 {
                let collective = Collective::new(kind, algorithm.clone(), ranks).unwrap();
                assert!(collective.is_symmetric());
                for member in 0..ranks {
                    let turn = |chunks: Chunks| Chunks::one((chunks.first + member) % ranks);
                    let rotated = collective.steps(0).into_iter().map(|step| match step {
                        Step::Send { to, chunks } => {
                            Step::Send { to: (to + member) % ranks, chunks: turn(chunks) }
                        }
                        Step::Receive { from, chunks, action } => {
                            let (from, chunks) = ((from + member) % ranks, turn(chunks));
                            Step::Receive { from, chunks, action }
                        }
                    });
                    assert_eq!(rotated.collect::<Vec<_>>(), collective.steps(member));
                }
            }
        }
    }
}
