//! What a rank does: meets the others, goes on from what they hold together, trains, copies, saves.

use std::collections::BTreeSet;

use units::Rank;

use super::Bug;
use super::world::{Doing, FENCE, Generation, Happening, Process, State, Who, World};
use crate::control::End;
use crate::copies::{Holding, agree};

/// How long a rank waits for the others at a meeting, in seconds.
const MEETING: f64 = 10.0;
/// How long it waits for words of others in a step.
const WAIT: f64 = 20.0;
/// Between two looks at what others have written.
const COMMIT_PAUSE: f64 = 0.05;

impl World {
    /// Something happens to a process. One that is halted does it when it goes on.
    pub fn do_to(&mut self, rank: Rank, who: Who, doing: Doing) -> Result<(), String> {
        let Process { who: now, alive, halted, generation, term, granted, .. } = *self.rank(rank);
        if now != who || !alive {
            return Ok(());
        }
        if halted && !matches!(doing, Doing::Killed) {
            self.to(0.5, rank, doing);
            return Ok(());
        }
        if granted < self.now {
            self.end(rank, End::Lost);
            return Ok(());
        }
        match doing {
            Doing::Up => self.come_up(rank),
            Doing::Beat => self.beat(rank),
            Doing::Killed => self.end(rank, End::Lost),
            Doing::Orphaned(of) if of == term => self.orphan(rank),
            Doing::Seek => self.seek(rank),
            Doing::Granted { term: of, until } if of == term => {
                let process = self.rank(rank);
                process.granted = process.granted.max(until);
            }
            Doing::Meet { term: of, number } if of == term => return self.meet(rank, number),
            Doing::Fail(of) if generation == Some(of) => self.fail(rank),
            Doing::Reach(of) if generation == Some(of) => self.reach(rank),
            Doing::Done(of) if generation == Some(of) => return self.done(rank),
            Doing::Write { generation: of, state } => return self.write(rank, of, state),
            Doing::Commit { generation: of, state } if generation == Some(of) => {
                return self.commit(rank, of, state);
            }
            Doing::Fail(_)
            | Doing::Reach(_)
            | Doing::Done(_)
            | Doing::Commit { .. }
            | Doing::Orphaned(_)
            | Doing::Granted { .. }
            | Doing::Meet { .. } => {}
        }
        Ok(())
    }

    /// A process turns to the coordinator that started it. If that is gone, so is the process.
    fn come_up(&mut self, rank: Rank) {
        let term = self.rank(rank).term;
        if !self.offices[term as usize].alive {
            return self.end(rank, End::Lost);
        }
        if self.plan.standby {
            self.rank(rank).granted = self.now + FENCE;
        }
        self.beat(rank);
        self.say_ready(rank);
    }

    /// Without a launcher a rank that is in no generation ends, others save and stop first; but if
    /// somebody may take over, they wait for that.
    fn orphan(&mut self, rank: Rank) {
        if self.plan.standby {
            if !self.rank(rank).seeks {
                self.rank(rank).seeks = true;
                self.seek(rank);
            }
            return;
        }
        self.rank(rank).orphaned = true;
        if self.rank(rank).generation.is_none() {
            self.end(rank, End::Failed);
        }
    }

    /// A rank comes to a meeting; when it is the last, all begin.
    fn meet(&mut self, rank: Rank, number: u64) -> Result<(), String> {
        let works = |process: &&Process| {
            process.alive && process.generation.is_some_and(|other| other != number)
        };
        if let Some(other) = self.processes.iter().find(works) {
            return Err(format!("generations {:?} and {number} at once", other.generation));
        }
        if self.rank(rank).generation.is_some() {
            return Err(format!("{rank} meets twice in generation {number}"));
        }
        if number > self.generation.number {
            self.generation = Generation { number, ..Generation::default() };
            self.survived.generations += 1;
        }
        self.rank(rank).generation = Some(number);
        self.generation.met += 1;
        if self.generation.broken || self.generation.works {
            let delay = self.delay();
            self.to(delay, rank, Doing::Fail(number));
        } else if self.generation.met == self.plan.ranks {
            let delay = 0.01 + self.delay();
            self.after(delay, Happening::Begin(number));
        } else {
            self.to(MEETING, rank, Doing::Fail(number));
        }
        Ok(())
    }

    /// A process of the generation is gone, so all others leave it, each when it sees that.
    pub fn lose(&mut self, rank: Rank) {
        if self.dice.one_in(2) {
            self.deliver(rank);
        }
        self.break_up();
    }

    fn break_up(&mut self) {
        if self.generation.broken {
            return;
        }
        self.generation.broken = true;
        let number = self.generation.number;
        for rank in self.ranks() {
            if self.rank(rank).generation == Some(number) {
                let delay = self.delay();
                self.to(delay, rank, Doing::Fail(number));
            }
        }
    }

    /// A rank has lost others, or has waited for them too long.
    fn fail(&mut self, rank: Rank) {
        if self.generation.broken || self.generation.met < self.plan.ranks {
            self.leave(rank);
        }
    }

    /// A rank leaves a generation and is ready for the next. What had come of its ward it keeps.
    fn leave(&mut self, rank: Rank) {
        let process = self.rank(rank);
        process.generation = None;
        process.sending = None;
        keep_arrived(process);
        let orphaned = process.orphaned;
        self.break_up();
        if orphaned {
            self.end(rank, End::Failed);
        } else {
            self.say_ready(rank);
        }
    }

    /// All have met: they go on from what they hold together, or else from a checkpoint.
    pub fn begin(&mut self, number: u64) -> Result<(), String> {
        if self.generation.number != number || self.generation.broken {
            return Ok(());
        }
        let found = match self.newest_copies() {
            Some(states) => states,
            None => {
                let newest = self.checkpoints.newest(&self.right)?.unwrap_or(State::START);
                vec![newest; self.processes.len()]
            }
        };
        let step = found[0].step;
        let redone = self.done.saturating_sub(step);
        self.done = step;
        if self.single_loss() && self.plan.copy_every == 1 && redone > 1 {
            return Err(format!("{redone} steps are to be done again for one rank"));
        }
        self.survived.redone += redone;
        for (process, state) in self.processes.iter_mut().zip(found) {
            process.state = state;
            if self.bug == Some(Bug::DropsTokens) && step > 0 {
                process.state.position += 8;
            }
            process.sending = None;
            process.arrived.clear();
            process.copies.keep_own(step, state);
        }
        for rank in self.ranks() {
            let (ward, state) = (self.ward(rank), self.processes[self.ward(rank).index()].state);
            if ward != rank {
                self.rank(rank).copies.keep_ward(step, state);
            }
        }
        self.generation.works = true;
        for rank in self.ranks() {
            if step == self.plan.steps {
                let state = self.rank(rank).state;
                self.to(0.01, rank, Doing::Write { generation: number, state });
            } else {
                self.compute(rank);
            }
        }
        Ok(())
    }

    /// Whether all processes but one hold what they have done.
    fn single_loss(&self) -> bool {
        let fresh = |process: &&Process| process.copies.get(true, process.state.step).is_none();
        self.furthest > 0 && self.processes.iter().filter(fresh).count() <= 1
    }

    /// What the ranks hold together after the newest step of which that is everything.
    fn newest_copies(&self) -> Option<Vec<State>> {
        let holdings: Vec<BTreeSet<Holding>> = self
            .ranks()
            .map(|rank| self.processes[rank.index()].copies.holdings(rank, self.ward(rank)))
            .collect();
        if self.bug == Some(Bug::RecoversHalf) {
            let newest = holdings.iter().flatten().max_by_key(|holding| holding.step)?;
            let find = |process: &Process| process.copies.get(true, newest.step).copied();
            let states =
                self.processes.iter().map(|process| find(process).unwrap_or(process.state));
            return Some(states.collect());
        }
        let (step, holders) = agree(&holdings)?;
        let state = |(of, holder): (Rank, &Rank)| {
            let own = of == *holder;
            self.processes[holder.index()].copies.get(own, step).copied()
        };
        self.ranks().zip(&holders).map(state).collect()
    }

    fn ward(&self, rank: Rank) -> Rank {
        Rank((rank.0 + self.plan.ranks - 1) % self.plan.ranks)
    }

    /// A rank begins a step.
    fn compute(&mut self, rank: Rank) {
        let time = 0.1 + self.dice.below(100) as f64 * 1e-3;
        let number = self.generation.number;
        self.to(time, rank, Doing::Reach(number));
    }

    /// A copy that was sent has come: a stream carries what was posted earlier first.
    fn deliver(&mut self, rank: Rank) {
        let keeper = Rank((rank.0 + 1) % self.plan.ranks);
        if let Some(state) = self.rank(rank).sending.take() {
            let number = Some(self.generation.number);
            let keeper = self.rank(keeper);
            if keeper.alive && keeper.generation == number {
                keeper.arrived.push(state);
            }
        }
    }

    fn reach(&mut self, rank: Rank) {
        self.deliver(rank);
        self.generation.reached += 1;
        if self.generation.reached == self.plan.ranks {
            self.generation.reached = 0;
            self.exchange(self.generation.number);
        }
    }

    /// The ranks exchange what a step needs, unless hosts do not hear each other, and agree whether
    /// to stop.
    pub fn exchange(&mut self, number: u64) {
        if self.generation.number != number || self.generation.broken {
            return;
        }
        let wait = self.cut - self.now;
        if wait > WAIT {
            return self.break_up();
        }
        if wait > 0.0 {
            return self.after(wait + 1e-3, Happening::Exchange(number));
        }
        if self.processes.iter().any(|process| process.orphaned) {
            self.generation.last = Some(self.processes[0].state.step + 1);
        }
        for rank in self.ranks() {
            let delay = self.delay();
            self.to(delay, rank, Doing::Done(number));
        }
    }

    /// A rank has updated its part: the step is done.
    fn done(&mut self, rank: Rank) -> Result<(), String> {
        let Plan { steps, copy_every, save_every } = self.intervals();
        let number = self.generation.number;
        let process = self.rank(rank);
        process.state = process.state.next();
        let state = process.state;
        if state.step.is_multiple_of(copy_every) {
            // What came before this step, which is the one before.
            keep_arrived(process);
            process.arrived.retain(|copy| copy.step >= state.step);
            process.copies.keep_own(state.step, state);
            process.sending = Some(state);
        }
        if self.right.get(state.step as usize) != Some(&state) {
            return Err(format!("step {} is not that of the undisturbed run", state.step));
        }
        self.done = self.done.max(state.step);
        self.furthest = self.furthest.max(state.step);
        let last = state.step == steps || self.generation.last == Some(state.step);
        let due = save_every > 0 && state.step.is_multiple_of(save_every);
        if last || due {
            // One save after the other.
            let at = (self.now + self.delay()).max(self.rank(rank).writes);
            self.rank(rank).writes = at + 1e-6;
            self.to(at - self.now, rank, Doing::Write { generation: number, state });
        }
        if !last {
            self.compute(rank);
        }
        Ok(())
    }

    fn intervals(&self) -> Plan {
        let super::world::Plan { steps, copy_every, save_every, .. } = self.plan;
        Plan { steps, copy_every, save_every }
    }

    /// A rank writes its part of a checkpoint; rank 0 then waits for the others.
    fn write(&mut self, rank: Rank, number: u64, state: State) -> Result<(), String> {
        if !self.checkpoints.write(rank, number, state) && number == self.generation.number {
            self.generation.unsaved = self.generation.unsaved.max(Some(state.step));
        }
        if self.checkpoints.crashed() {
            return self.lose_power(rank);
        }
        if rank == Rank(0) {
            self.to(COMMIT_PAUSE, rank, Doing::Commit { generation: number, state });
        } else if self.ends_after(rank, number, state) {
            // It says whether it has written, and ends.
            self.end(rank, End::Completed);
        }
        Ok(())
    }

    fn ends_after(&mut self, rank: Rank, number: u64, state: State) -> bool {
        let last = self.plan.steps == state.step || self.generation.last == Some(state.step);
        last && self.rank(rank).generation == Some(number)
    }

    fn commit(&mut self, rank: Rank, number: u64, state: State) -> Result<(), String> {
        let whole = self.checkpoints.commit(number, state);
        self.survived.checkpoints += u64::from(whole == Some(true));
        if self.checkpoints.crashed() {
            return self.lose_power(rank);
        }
        if whole == Some(false) && self.generation.unsaved < Some(state.step) {
            self.to(COMMIT_PAUSE, rank, Doing::Commit { generation: number, state });
        } else if self.ends_after(rank, number, state) {
            self.end(rank, End::Completed);
        }
        Ok(())
    }
}

/// How often what is done.
struct Plan {
    steps: u64,
    copy_every: u64,
    save_every: u64,
}

/// Keeps the oldest copy that has come, if the process waits for it by now.
fn keep_arrived(process: &mut Process) {
    let expected = |state: &&State| state.step <= process.state.step;
    if let Some(state) = process.arrived.first().filter(expected).copied() {
        process.arrived.remove(0);
        process.copies.keep_ward(state.step, state);
    }
}
