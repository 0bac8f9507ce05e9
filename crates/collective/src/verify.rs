//! The symbolic verifier: every chunk is the set of members whose data it holds.

use std::collections::{BTreeMap, VecDeque};

use crate::{Action, Executor, Kind, Schedule, Step};

/// Why a schedule is wrong. Members, steps and chunks are numbered from 0.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A schedule has at least one member and lets at least one send be in flight.
    #[error("a schedule needs at least one member and an in-flight limit of at least 1")]
    Empty,
    /// A step names a member or a chunk that does not exist, or the member itself.
    #[error("member {member}, step {step}: no peer {peer} or chunk {chunk} in a group of {ranks}")]
    OutOfRange {
        /// Whose step.
        member: u32,
        /// Index in the member's list.
        step: usize,
        /// The peer it names.
        peer: u32,
        /// The chunk it names.
        chunk: u32,
        /// The size of the group.
        ranks: u32,
    },
    /// A receive meets a send of another chunk.
    #[error("member {member}, step {step}: expects chunk {chunk}, but member {from} sends {sent}")]
    WrongChunk {
        /// The receiving member.
        member: u32,
        /// Index in the receiving member's list.
        step: usize,
        /// The chunk that the receive expects.
        chunk: u32,
        /// The sending member.
        from: u32,
        /// The chunk that comes.
        sent: u32,
    },
    /// A contribution would be summed twice.
    #[error(
        "member {member}, step {step}: chunk {chunk} already holds member {contributor}'s part"
    )]
    DoubleReduction {
        /// The receiving member.
        member: u32,
        /// Index in the receiving member's list.
        step: usize,
        /// The chunk.
        chunk: u32,
        /// Whose contribution is in both.
        contributor: u32,
    },
    /// A chunk is sent, or reduced into, before anything meaningful is in it.
    #[error("member {member}, step {step}: chunk {chunk} has nothing in it yet")]
    Unfilled {
        /// The receiving member.
        member: u32,
        /// Index in the receiving member's list.
        step: usize,
        /// The chunk.
        chunk: u32,
    },
    /// A step never gets a partner: the schedule hangs.
    #[error(
        "member {member}, step {step}: chunk {chunk} waits for member {peer} for ever (deadlock \
         with {in_flight} in flight)"
    )]
    Deadlock {
        /// The waiting member.
        member: u32,
        /// Index in its list.
        step: usize,
        /// The chunk.
        chunk: u32,
        /// The member that never answers.
        peer: u32,
        /// The limit under which it hangs.
        in_flight: u32,
    },
    /// Everything ran, but a chunk does not hold what the kind of collective promises.
    #[error("member {member} ends with chunk {chunk} made of {held:?}, expected {expected:?}")]
    WrongResult {
        /// The member.
        member: u32,
        /// The chunk.
        chunk: u32,
        /// The contributors that the chunk holds.
        held: Vec<u32>,
        /// The contributors that it should hold.
        expected: Vec<u32>,
    },
}

impl Schedule {
    /// Proves that the schedule does what its kind promises, under its in-flight limit and with
    /// rendezvous semantics (a send is done only once its receive has started), and counts the
    /// synchronous rounds that takes.
    ///
    /// # Errors
    /// The first fault found, naming member, step and chunk.
    pub fn verify(&self) -> Result<u32, Error> {
        self.check_ranges()?;
        let mut run = Run::new(self);
        let mut rounds = 0;
        while run.round()? {
            rounds += 1;
        }
        run.check_finished()?;
        run.check_result()?;
        Ok(rounds)
    }

    fn check_ranges(&self) -> Result<(), Error> {
        let ranks = self.ranks();
        if ranks == 0 || self.in_flight == 0 {
            return Err(Error::Empty);
        }
        for (member, list) in (0..).zip(&self.steps) {
            for (step, action) in list.iter().enumerate() {
                let (peer, chunk) = (action.peer(), action.chunk());
                if peer >= ranks || peer == member || chunk >= ranks {
                    return Err(Error::OutOfRange { member, step, peer, chunk, ranks });
                }
            }
        }
        Ok(())
    }
}

/// A set of members.
#[derive(Clone, PartialEq)]
struct Contributors(Vec<u64>);

impl Contributors {
    fn none(ranks: u32) -> Self {
        Self(vec![0; ranks.div_ceil(64) as usize])
    }

    fn all(ranks: u32) -> Self {
        let mut set = Self::none(ranks);
        (0..ranks).for_each(|member| set.insert(member));
        set
    }

    fn only(ranks: u32, member: u32) -> Self {
        let mut set = Self::none(ranks);
        set.insert(member);
        set
    }

    fn insert(&mut self, member: u32) {
        self.0[member as usize / 64] |= 1 << (member % 64);
    }

    fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    fn first_shared(&self, other: &Self) -> Option<u32> {
        let shared = |(index, (a, b)): (u32, (&u64, &u64))| {
            (a & b != 0).then(|| 64 * index + (a & b).trailing_zeros())
        };
        (0..).zip(self.0.iter().zip(&other.0)).find_map(shared)
    }

    fn add(&mut self, other: &Self) {
        self.0.iter_mut().zip(&other.0).for_each(|(word, more)| *word |= more);
    }

    fn list(&self) -> Vec<u32> {
        let holds = |member: &u32| self.0[*member as usize / 64] >> (member % 64) & 1 == 1;
        (0..64 * self.0.len() as u32).filter(holds).collect()
    }
}

/// The started and unmatched steps from one member to another.
#[derive(Default)]
struct Pair {
    sends: VecDeque<usize>,
    receives: VecDeque<usize>,
}

/// A run of all members in synchronous rounds.
struct Run<'a> {
    schedule: &'a Schedule,
    executors: Vec<Executor>,
    /// What every member's every chunk holds.
    held: Vec<Vec<Contributors>>,
    /// By (from, to).
    pairs: BTreeMap<(u32, u32), Pair>,
    /// Sends that wait for the next round, because what they send may be of this one.
    next_sends: Vec<(u32, usize)>,
}

impl<'a> Run<'a> {
    fn new(schedule: &'a Schedule) -> Self {
        let ranks = schedule.ranks();
        let filled = |member, chunk| schedule.kind != Kind::AllGather || member == chunk;
        let start = |member, chunk| match filled(member, chunk) {
            true => Contributors::only(ranks, member),
            false => Contributors::none(ranks),
        };
        let executor = |steps: &Vec<Step>| Executor::new(steps, schedule.in_flight);
        let mut run = Self {
            schedule,
            executors: schedule.steps.iter().map(executor).collect(),
            held: (0..ranks).map(|m| (0..ranks).map(|c| start(m, c)).collect()).collect(),
            pairs: BTreeMap::new(),
            next_sends: Vec::new(),
        };
        (0..ranks).for_each(|member| drop(run.start_steps(member)));
        run
    }

    /// Lets the waiting sends go and delivers them; false when there was nothing to deliver.
    fn round(&mut self) -> Result<bool, Error> {
        let mut open = Vec::new();
        for (member, step) in std::mem::take(&mut self.next_sends) {
            let key = (member, self.schedule.steps[member as usize][step].peer());
            self.pairs.entry(key).or_default().sends.push_back(step);
            open.push(key);
        }
        let mut moved = false;
        while let Some(key) = open.pop() {
            while let Some((send, receive)) = self.matched(key) {
                moved = true;
                self.deliver(key, send, receive)?;
                self.executors[key.0 as usize].complete(send);
                self.executors[key.1 as usize].complete(receive);
                open.extend(self.start_steps(key.0));
                open.extend(self.start_steps(key.1));
            }
        }
        Ok(moved)
    }

    /// Starts what a member may start; the pairs on which it now receives.
    fn start_steps(&mut self, member: u32) -> Vec<(u32, u32)> {
        let mut receiving = Vec::new();
        while let Some(step) = self.executors[member as usize].start_next() {
            match self.schedule.steps[member as usize][step] {
                Step::Send { .. } => self.next_sends.push((member, step)),
                Step::Receive { from, .. } => {
                    self.pairs.entry((from, member)).or_default().receives.push_back(step);
                    receiving.push((from, member));
                }
            }
        }
        receiving
    }

    fn matched(&mut self, key: (u32, u32)) -> Option<(usize, usize)> {
        let Pair { sends, receives } = self.pairs.get_mut(&key)?;
        let matched = (*sends.front()?, *receives.front()?);
        sends.pop_front();
        receives.pop_front();
        Some(matched)
    }

    fn deliver(&mut self, (from, to): (u32, u32), send: usize, step: usize) -> Result<(), Error> {
        let sent = self.schedule.steps[from as usize][send].chunk();
        let Step::Receive { chunk, action, .. } = self.schedule.steps[to as usize][step] else {
            unreachable!("only receives are queued as receives");
        };
        if sent != chunk {
            return Err(Error::WrongChunk { member: to, step, chunk, from, sent });
        }
        let arriving = self.held[from as usize][chunk as usize].clone();
        let held = &mut self.held[to as usize][chunk as usize];
        if arriving.is_empty() || (action == Action::Reduce && held.is_empty()) {
            return Err(Error::Unfilled { member: to, step, chunk });
        }
        match (action, held.first_shared(&arriving)) {
            (Action::Copy, _) => *held = arriving,
            (Action::Reduce, None) => held.add(&arriving),
            (Action::Reduce, Some(contributor)) => {
                return Err(Error::DoubleReduction { member: to, step, chunk, contributor });
            }
        }
        Ok(())
    }

    fn check_finished(&self) -> Result<(), Error> {
        for (member, executor) in (0..).zip(&self.executors) {
            if let Some(step) = executor.pending().next() {
                let stuck = self.schedule.steps[member as usize][step];
                return Err(Error::Deadlock {
                    member,
                    step,
                    chunk: stuck.chunk(),
                    peer: stuck.peer(),
                    in_flight: self.schedule.in_flight,
                });
            }
        }
        Ok(())
    }

    fn check_result(&self) -> Result<(), Error> {
        let ranks = self.schedule.ranks();
        for (member, chunk) in (0..ranks).flat_map(|m| (0..ranks).map(move |c| (m, c))) {
            let expected = match self.schedule.kind {
                Kind::AllReduce => Contributors::all(ranks),
                Kind::AllGather => Contributors::only(ranks, chunk),
                Kind::ReduceScatter if member == chunk => Contributors::all(ranks),
                Kind::ReduceScatter => continue,
            };
            let held = &self.held[member as usize][chunk as usize];
            if *held != expected {
                let (held, expected) = (held.list(), expected.list());
                return Err(Error::WrongResult { member, chunk, held, expected });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Algorithm, direct, ring};

    fn schedules() -> impl Strategy<Value = Schedule> {
        let kinds = [Kind::AllReduce, Kind::ReduceScatter, Kind::AllGather];
        let algorithms = [Algorithm::Ring, Algorithm::Direct];
        (prop::sample::select(algorithms.to_vec()), prop::sample::select(kinds.to_vec()), 2..9_u32)
            .prop_map(|(algorithm, kind, ranks)| algorithm.schedule(kind, ranks))
    }

    proptest! {
        #[test]
        fn a_dropped_step_is_rejected(mut schedule in schedules(), at in any::<prop::sample::Index>()) {
            let member = at.index(schedule.steps.len());
            let step = at.index(schedule.steps[member].len());
            schedule.steps[member].remove(step);
            prop_assert!(schedule.verify().is_err());
        }

        #[test]
        fn a_wrong_chunk_peer_or_action_is_rejected(
            mut schedule in schedules(),
            at in any::<prop::sample::Index>(),
            shift in 1..8_u32,
            what in 0..3,
        ) {
            let ranks = schedule.ranks();
            let other = |value: u32| (value + 1 + shift % (ranks - 1).max(1)) % ranks;
            let member = at.index(schedule.steps.len());
            let step = at.index(schedule.steps[member].len());
            match (&mut schedule.steps[member][step], what) {
                (Step::Send { chunk, .. } | Step::Receive { chunk, .. }, 0) => *chunk = other(*chunk),
                (Step::Receive { action, .. }, 1) => {
                    let reduces = *action == Action::Reduce;
                    *action = if reduces { Action::Copy } else { Action::Reduce };
                }
                (Step::Send { to: peer, .. } | Step::Receive { from: peer, .. }, _) => {
                    *peer = other(*peer);
                }
            }
            prop_assert!(schedule.verify().is_err(), "{:?}", schedule);
        }
    }

    #[test]
    fn a_swapped_chunk_names_member_step_and_chunk() {
        let mut schedule = ring(Kind::AllReduce, 4);
        schedule.steps[2][0] = Step::Send { to: 3, chunk: 3 };
        let error = Error::WrongChunk { member: 3, step: 1, chunk: 1, from: 2, sent: 3 };
        assert_eq!(schedule.verify(), Err(error));
    }

    #[test]
    fn a_repeated_reduction_is_found() {
        let mut schedule = direct(Kind::ReduceScatter, 3);
        let again = Step::Receive { from: 1, chunk: 0, action: Action::Reduce };
        schedule.steps[0].push(again);
        schedule.steps[1].push(Step::Send { to: 0, chunk: 0 });
        let error = Error::DoubleReduction { member: 0, step: 4, chunk: 0, contributor: 1 };
        assert_eq!(schedule.verify(), Err(error));
    }

    #[test]
    fn a_cycle_of_waiting_members_is_a_deadlock() {
        let receive = |from| Step::Receive { from, chunk: 0, action: Action::Copy };
        let schedule = Schedule {
            kind: Kind::AllReduce,
            in_flight: 1,
            steps: vec![
                vec![receive(1), Step::Send { to: 1, chunk: 0 }],
                vec![receive(0), Step::Send { to: 0, chunk: 0 }],
            ],
        };
        let error = Error::Deadlock { member: 0, step: 0, chunk: 0, peer: 1, in_flight: 1 };
        assert_eq!(schedule.verify(), Err(error));
    }

    #[test]
    fn a_schedule_of_another_kind_has_the_wrong_result() {
        let mut schedule = ring(Kind::ReduceScatter, 2);
        schedule.kind = Kind::AllReduce;
        let error = Error::WrongResult { member: 0, chunk: 1, held: vec![0], expected: vec![0, 1] };
        assert_eq!(schedule.verify(), Err(error));
    }
}
