//! The symbolic verifier: every chunk is the set of members whose data it holds.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use crate::{Action, Chunks, Contract, Error, Executor, Schedule, Step};

/// The most that sets of contributors may take: half a gibibyte.
const MOST_WORDS: u64 = 1 << 26;

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
        let Contract { kind, ranks, switches, chunks, in_flight, window } = self.contract;
        if ranks == 0 || in_flight == 0 || window == Some(0) {
            return Err(Error::Empty);
        }
        let (members, lists) = (u64::from(ranks) + u64::from(switches), self.steps.len());
        let blocks = kind.blocks(ranks);
        if lists as u64 != members || chunks == 0 || chunks % blocks != 0 {
            return Err(Error::Shape { kind, ranks, switches, blocks, lists, chunks });
        }
        let words = u64::from(ranks.div_ceil(64)).saturating_mul(u64::from(chunks));
        if words.saturating_mul(members) > MOST_WORDS {
            return Err(Error::Unverifiable { members: lists, chunks });
        }
        for (member, list) in (0..).zip(&self.steps) {
            for (step, action) in list.iter().enumerate() {
                let (peer, Chunks { first, count }) = (action.peer(), action.chunks());
                let inside = count > 0 && first.checked_add(count).is_some_and(|end| end <= chunks);
                if u64::from(peer) >= members || peer == member || !inside {
                    let range = action.chunks();
                    return Err(Error::OutOfRange { member, step, peer, range, lists, chunks });
                }
            }
        }
        Ok(())
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
    held: Holdings,
    /// By (from, to).
    pairs: BTreeMap<(u32, u32), Pair>,
    /// Sends that wait for the next round, because what they send may be of this one.
    next_sends: Vec<(u32, usize)>,
}

impl<'a> Run<'a> {
    fn new(schedule: &'a Schedule) -> Self {
        let Contract { in_flight, window, .. } = schedule.contract;
        let executor = |steps: &Vec<Step>| Executor::new(steps, in_flight).with_window(window);
        let mut run = Self {
            schedule,
            executors: schedule.steps.iter().map(executor).collect(),
            held: Holdings::new(schedule),
            pairs: BTreeMap::new(),
            next_sends: Vec::new(),
        };
        (0..schedule.steps.len() as u32).for_each(|member| drop(run.start_steps(member)));
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
        let sent = self.schedule.steps[from as usize][send].chunks();
        let Step::Receive { chunks, action, .. } = self.schedule.steps[to as usize][step] else {
            unreachable!("only receives are queued as receives");
        };
        if sent != chunks {
            return Err(Error::WrongChunk { member: to, step, expected: chunks, from, sent });
        }
        chunks.range().try_for_each(|chunk| self.held.receive((from, to), step, chunk, action))
    }

    fn check_finished(&self) -> Result<(), Error> {
        for (member, executor) in (0..).zip(&self.executors) {
            if let Some(step) = executor.pending().next() {
                let stuck = self.schedule.steps[member as usize][step];
                return Err(Error::Deadlock {
                    member,
                    step,
                    chunks: stuck.chunks(),
                    peer: stuck.peer(),
                    in_flight: self.schedule.contract.in_flight,
                });
            }
        }
        Ok(())
    }

    fn check_result(&self) -> Result<(), Error> {
        let Contract { ranks, chunks, .. } = self.schedule.contract;
        for (member, chunk) in (0..ranks).flat_map(|m| (0..chunks).map(move |c| (m, c))) {
            let Some(expected) = self.schedule.contract.promises(member, chunk) else {
                continue;
            };
            let held = self.held.list(member, chunk);
            if !expected.clone().eq(held.iter().copied()) {
                return Err(Error::WrongResult {
                    member,
                    chunk,
                    held,
                    expected: expected.collect(),
                });
            }
        }
        Ok(())
    }
}

/// What every member's every chunk holds: the set of members whose data are in it.
struct Holdings {
    chunks: u32,
    /// Words of 64 members in a set.
    words: usize,
    sets: Vec<u64>,
}

impl Holdings {
    /// What is there at the start.
    fn new(schedule: &Schedule) -> Self {
        let Contract { ranks, chunks, .. } = schedule.contract;
        let words = ranks.div_ceil(64) as usize;
        let sets = vec![0; schedule.steps.len() * chunks as usize * words];
        let mut held = Self { chunks, words, sets };
        for (member, chunk) in (0..ranks).flat_map(|m| (0..chunks).map(move |c| (m, c))) {
            if schedule.contract.starts_with(member, chunk) {
                let set = held.at(member, chunk);
                held.sets[set][member as usize / 64] |= 1 << (member % 64);
            }
        }
        held
    }

    fn at(&self, member: u32, chunk: u32) -> Range<usize> {
        let set = member as usize * self.chunks as usize + chunk as usize;
        set * self.words..(set + 1) * self.words
    }

    fn list(&self, member: u32, chunk: u32) -> Vec<u32> {
        let set = &self.sets[self.at(member, chunk)];
        let holds = |member: &u32| set[*member as usize / 64] >> (member % 64) & 1 == 1;
        (0..64 * set.len() as u32).filter(holds).collect()
    }

    /// A chunk goes from one member to another, whose step it completes.
    fn receive(
        &mut self,
        (from, to): (u32, u32),
        step: usize,
        chunk: u32,
        action: Action,
    ) -> Result<(), Error> {
        let arriving = self.sets[self.at(from, chunk)].to_vec();
        let held = self.at(to, chunk);
        let held = &mut self.sets[held];
        let empty = |set: &[u64]| set.iter().all(|word| *word == 0);
        if empty(&arriving) || (action == Action::Reduce && empty(held)) {
            return Err(Error::Unfilled { member: to, step, chunk });
        }
        if action == Action::Copy {
            held.copy_from_slice(&arriving);
            return Ok(());
        }
        let shared = (0..).zip(held.iter().zip(&arriving)).find(|(_, (a, b))| *a & *b != 0);
        if let Some((word, (a, b))) = shared {
            let contributor = 64 * word + (a & b).trailing_zeros();
            return Err(Error::DoubleReduction { member: to, step, chunk, contributor });
        }
        held.iter_mut().zip(&arriving).for_each(|(word, more)| *word |= more);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Algorithm, Collective, Kind};

    fn schedules() -> impl Strategy<Value = Schedule> {
        let kinds = [Kind::AllReduce, Kind::ReduceScatter, Kind::AllGather];
        let algorithms = [Algorithm::Ring, Algorithm::Direct];
        (prop::sample::select(algorithms.to_vec()), prop::sample::select(kinds.to_vec()), 2..9_u32)
            .prop_map(|(algorithm, kind, ranks)| {
                Collective::new(kind, algorithm, ranks).unwrap().schedule()
            })
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
            let ranks = schedule.contract.ranks;
            let other = |value: u32| (value + 1 + shift % (ranks - 1).max(1)) % ranks;
            let member = at.index(schedule.steps.len());
            let step = at.index(schedule.steps[member].len());
            match (&mut schedule.steps[member][step], what) {
                (Step::Send { chunks, .. } | Step::Receive { chunks, .. }, 0) => {
                    chunks.first = other(chunks.first);
                }
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
        let mut schedule = Collective::ring(Kind::AllReduce, 4).schedule();
        let (expected, sent) = (Chunks::one(1), Chunks::one(3));
        schedule.steps[2][0] = Step::Send { to: 3, chunks: sent };
        let error = Error::WrongChunk { member: 3, step: 1, expected, from: 2, sent };
        assert_eq!(schedule.verify(), Err(error));
    }

    #[test]
    fn a_repeated_reduction_is_found() {
        let mut schedule = Collective::direct(Kind::ReduceScatter, 3).schedule();
        let chunks = Chunks::one(0);
        schedule.steps[0].push(Step::Receive { from: 1, chunks, action: Action::Reduce });
        schedule.steps[1].push(Step::Send { to: 0, chunks });
        let error = Error::DoubleReduction { member: 0, step: 4, chunk: 0, contributor: 1 };
        assert_eq!(schedule.verify(), Err(error));
    }

    #[test]
    fn a_cycle_of_waiting_members_is_a_deadlock() {
        let chunks = Chunks::one(0);
        let receive = |from| Step::Receive { from, chunks, action: Action::Copy };
        let send = |to| Step::Send { to, chunks };
        let schedule = Schedule {
            contract: Contract::new(Kind::AllReduce, 2, 1, 1),
            steps: vec![vec![receive(1), send(1)], vec![receive(0), send(0)]],
        };
        let error = Error::Deadlock { member: 0, step: 0, chunks, peer: 1, in_flight: 1 };
        assert_eq!(schedule.verify(), Err(error));
    }

    #[test]
    fn what_is_too_large_to_verify_is_told() {
        let mut schedule = Collective::ring(Kind::AllReduce, 2).schedule();
        schedule.contract.chunks = u32::MAX;
        let error = Error::Unverifiable { members: 2, chunks: u32::MAX };
        assert_eq!(schedule.verify(), Err(error));
    }

    #[test]
    fn a_schedule_of_another_kind_has_the_wrong_result() {
        let mut schedule = Collective::ring(Kind::ReduceScatter, 2).schedule();
        schedule.contract.kind = Kind::AllReduce;
        let error = Error::WrongResult { member: 0, chunk: 1, held: vec![0], expected: vec![0, 1] };
        assert_eq!(schedule.verify(), Err(error));
    }
}
