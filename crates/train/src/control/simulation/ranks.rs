//! What a rank does: meets the others, goes on from what they hold together, trains, copies, saves.

use std::collections::BTreeSet;

use units::Rank;

use super::Bug;
use super::world::{Doing, FENCE, Generation, Happening, Process, State, Who, World};
use crate::control::{End, Seat};
use crate::copies::{Holding, agree};

/// How long a rank waits for the others at a meeting, in seconds.
const MEETING: f64 = 10.0;
/// How long it waits for words of others in a step.
const WAIT: f64 = 20.0;
/// How long fewer ranks may go on with nothing wrong: longer than the longest pause before a start, and
/// than any word is held up.
const SHORT: f64 = 20.0;
/// Between two looks at what others have written.
const COMMIT_PAUSE: f64 = 0.05;

impl World {
    /// Something happens to a process. One that is halted does it when it goes on, one after the other.
    pub fn do_to(&mut self, seat: Seat, who: Who, doing: Doing) -> Result<(), String> {
        let Process { who: now, alive, halted, generation, term, granted, .. } =
            *self.process(seat);
        if now != who || !alive {
            return Ok(());
        }
        if halted && !matches!(doing, Doing::Killed) {
            self.process(seat).waiting.push(doing);
            return Ok(());
        }
        if granted < self.now {
            self.end(seat, End::Lost);
            return Ok(());
        }
        let current = generation.filter(|number| *number == self.generation.number);
        match doing {
            Doing::Up => self.come_up(seat),
            Doing::Beat => self.beat(seat),
            Doing::Killed => self.end(seat, End::Lost),
            Doing::Orphaned(of) if of == term => self.orphan(seat),
            Doing::Seek => self.seek(seat),
            Doing::Granted { term: of, until } if of == term => {
                let process = self.process(seat);
                process.granted = process.granted.max(until);
            }
            Doing::Meet { term: of, number, rank, ranks } if of == term => {
                return self.meet(seat, number, (rank, ranks));
            }
            Doing::Called(of) if of == term => self.process(seat).called = true,
            Doing::Fail(of) if current == Some(of) => self.fail(seat),
            Doing::Fail(of) if generation == Some(of) => {
                // The others have gone on without it.
                self.process(seat).generation = None;
                self.say_ready(seat);
            }
            Doing::Reach(of) if current == Some(of) => self.reach(seat),
            Doing::Done(of) if current == Some(of) => return self.done(seat),
            Doing::Write { generation: of, place, state } => {
                return self.write(seat, of, place, state);
            }
            Doing::Commit { generation: of, state } if current == Some(of) => {
                return self.commit(seat, of, state);
            }
            Doing::Fail(_)
            | Doing::Reach(_)
            | Doing::Done(_)
            | Doing::Commit { .. }
            | Doing::Orphaned(_)
            | Doing::Granted { .. }
            | Doing::Called(_)
            | Doing::Meet { .. } => {}
        }
        Ok(())
    }

    /// A halted process goes on, with what has come meanwhile.
    pub fn wake(&mut self, seat: Seat) {
        let process = self.process(seat);
        process.halted = false;
        for doing in std::mem::take(&mut process.waiting) {
            self.to(0.0, seat, doing);
        }
    }

    /// A process turns to the coordinator that started it. If that is gone, so is the process.
    fn come_up(&mut self, seat: Seat) {
        let term = self.process(seat).term;
        if !self.offices[term as usize].alive {
            return self.end(seat, End::Lost);
        }
        if self.plan.fenced() {
            self.process(seat).granted = self.now + FENCE;
        }
        self.beat(seat);
        self.say_ready(seat);
    }

    /// Without a launcher a rank that is in no generation ends, others save and stop first; but if
    /// somebody may take over, they wait for that.
    fn orphan(&mut self, seat: Seat) {
        if self.plan.standby {
            if !self.process(seat).seeks {
                self.process(seat).seeks = true;
                self.seek(seat);
            }
            return;
        }
        self.process(seat).orphaned = true;
        if self.process(seat).generation.is_none() {
            self.end(seat, End::Failed);
        }
    }

    /// A rank comes to a meeting; when it is the last, all begin.
    fn meet(&mut self, seat: Seat, number: u64, (rank, ranks): (Rank, u32)) -> Result<(), String> {
        for generation in self.seats().filter_map(|seat| self.works(seat)) {
            if generation != number {
                return Err(format!("generations {generation} and {number} at once"));
            }
        }
        if self.process(seat).generation.is_some() {
            return Err(format!("{seat} meets twice in generation {number}"));
        }
        if number > self.generation.number {
            let seats = vec![None; ranks as usize];
            let last = Generation { number, seats, ..Generation::default() };
            let last = std::mem::replace(&mut self.generation, last);
            if last.works {
                self.before = last.began;
            }
            self.survived.generations += 1;
            self.survived.smaller += u64::from(ranks < self.plan.ranks);
        }
        let process = self.process(seat);
        (process.generation, process.rank, process.called) = (Some(number), rank, false);
        self.generation.met += 1;
        self.generation.seats[rank.index()] = Some(seat);
        if self.generation.broken || self.generation.works {
            let delay = self.delay();
            self.to(delay, seat, Doing::Fail(number));
        } else if self.generation.met == ranks {
            let delay = 0.01 + self.delay();
            self.after(delay, Happening::Begin(number));
        } else {
            self.to(MEETING, seat, Doing::Fail(number));
        }
        Ok(())
    }

    /// A process of the generation is gone, so all others leave it, each when it sees that.
    pub fn lose(&mut self, seat: Seat) {
        if self.dice.one_in(2) {
            self.deliver(seat);
        }
        self.break_up();
    }

    fn break_up(&mut self) {
        if self.generation.broken {
            return;
        }
        self.generation.broken = true;
        let number = self.generation.number;
        for seat in self.seats() {
            if self.process(seat).generation == Some(number) {
                let delay = self.delay();
                self.to(delay, seat, Doing::Fail(number));
            }
        }
    }

    /// A rank has lost others, or has waited for them too long.
    fn fail(&mut self, seat: Seat) {
        if self.generation.broken || self.generation.met < self.generation.ranks() {
            self.leave(seat);
        }
    }

    /// A rank leaves a generation and is ready for the next. What had come of its ward it keeps.
    fn leave(&mut self, seat: Seat) {
        let process = self.process(seat);
        process.generation = None;
        process.sending = None;
        keep_arrived(process);
        let orphaned = process.orphaned;
        self.break_up();
        if orphaned {
            self.end(seat, End::Failed);
        } else {
            self.say_ready(seat);
        }
    }

    /// All have met: they go on from what they hold together, or else from a checkpoint.
    pub fn begin(&mut self, number: u64) -> Result<(), String> {
        if self.generation.number != number || self.generation.broken {
            return Ok(());
        }
        let seats: Vec<Seat> = self.generation.seats.iter().copied().flatten().collect();
        let ranks = seats.len() as u32;
        let lost = self.before.iter().filter(|(seat, who)| {
            !seats.contains(seat) || self.processes[seat.index()].who != *who
        });
        let (single, from_memory) = (lost.count() <= 1, self.newest_copies(&seats));
        let state = match from_memory {
            Some(state) => state,
            None => self.checkpoints.newest(&self.right)?.unwrap_or(State::START),
        };
        let step = state.step;
        let redone = self.done.saturating_sub(step);
        self.done = step;
        // What one rank alone did nobody else keeps.
        let kept = single && self.before.len() > 1 && self.plan.copy_every == 1;
        if kept && redone > 1 {
            return Err(format!("{redone} steps are to be done again for one rank"));
        }
        self.survived.redone += redone;
        for (rank, seat) in (0..).map(Rank).zip(&seats) {
            let dropped = if self.bug == Some(Bug::DropsTokens) && step > 0 { 8 } else { 0 };
            let process = self.process(*seat);
            process.state = State { position: state.position + dropped, ..state };
            process.sending = None;
            process.arrived.clear();
            process.copies.keep_own(Holding { step, ranks, of: rank }, state);
            let ward = Rank((rank.0 + ranks - 1) % ranks);
            if ward != rank {
                process.copies.keep_ward(Holding { step, ranks, of: ward }, state);
            }
        }
        let who = |seat: &Seat| (*seat, self.processes[seat.index()].who);
        self.generation.began = seats.iter().map(who).collect();
        self.generation.works = true;
        self.calm = self.calm.max(self.now);
        for seat in seats {
            if step == self.plan.steps {
                let Process { state, rank, .. } = *self.process(seat);
                let place = (rank, ranks);
                self.to(0.01, seat, Doing::Write { generation: number, place, state });
            } else {
                self.compute(seat);
            }
        }
        Ok(())
    }

    /// What the ranks hold together after the newest step of which that is everything.
    fn newest_copies(&self, seats: &[Seat]) -> Option<State> {
        let copies = |seat: &Seat| &self.processes[seat.index()].copies;
        let mut holdings: Vec<BTreeSet<Holding>> =
            seats.iter().map(|seat| copies(seat).holdings()).collect();
        if self.bug == Some(Bug::RecoversHalf) {
            let newest = *holdings.iter().flatten().max_by_key(|holding| holding.step)?;
            let held =
                |of| seats.iter().find_map(|seat| copies(seat).get(Holding { of, ..newest }));
            return Some(together((0..newest.ranks).map(Rank).map(|of| held(of).copied())));
        }
        let ranks = seats.len() as u32;
        if self.bug == Some(Bug::MixesSpreads) {
            let as_now = |holding: &Holding| Holding { ranks, ..*holding };
            for held in &mut holdings {
                *held = held.iter().map(as_now).collect();
            }
        }
        let (step, holders) = agree(&holdings)?;
        let ranks = holders.len() as u32;
        let parts = (0..).map(Rank).zip(holders).map(|(of, holder)| {
            copies(&seats[holder.index()]).get(Holding { step, ranks, of }).copied()
        });
        Some(together(parts))
    }

    /// A rank begins a step.
    fn compute(&mut self, seat: Seat) {
        let time = 0.1 + self.dice.below(100) as f64 * 1e-3;
        let number = self.generation.number;
        self.to(time, seat, Doing::Reach(number));
    }

    /// A copy that was sent has come: a stream carries what was posted earlier first.
    fn deliver(&mut self, seat: Seat) {
        let (ranks, rank) = (self.generation.ranks(), self.process(seat).rank);
        let Some(state) = self.process(seat).sending.take() else { return };
        let Some(keeper) = self.generation.seats[((rank.0 + 1) % ranks) as usize] else { return };
        let number = Some(self.generation.number);
        let keeper = self.process(keeper);
        if keeper.alive && keeper.generation == number {
            keeper.arrived.push((Holding { step: state.step, ranks, of: rank }, state));
        }
    }

    fn reach(&mut self, seat: Seat) {
        self.deliver(seat);
        self.generation.reached += 1;
        if self.generation.reached == self.generation.ranks() {
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
        let seats: Vec<Seat> = self.generation.seats.iter().copied().flatten().collect();
        let any = |is: fn(&Process) -> bool| seats.iter().any(|s| is(&self.processes[s.index()]));
        let (orphaned, called) = (any(|process| process.orphaned), any(|process| process.called));
        let next = self.processes[seats[0].index()].state.step + 1;
        if orphaned {
            self.generation.last = Some(next);
        } else if called && next < self.plan.steps {
            self.generation.parts = Some(next);
        }
        for seat in seats {
            let delay = self.delay();
            self.to(delay, seat, Doing::Done(number));
        }
    }

    /// A rank has updated its part: the step is done.
    fn done(&mut self, seat: Seat) -> Result<(), String> {
        let Plan { steps, copy_every, save_every } = self.intervals();
        let (number, ranks) = (self.generation.number, self.generation.ranks());
        let parts = self.generation.parts;
        let process = self.process(seat);
        process.state = process.state.next();
        let (state, rank) = (process.state, process.rank);
        if state.step.is_multiple_of(copy_every) || parts == Some(state.step) {
            // What came before this step, which is the one before.
            keep_arrived(process);
            process.arrived.retain(|(holding, _)| holding.step >= state.step);
            process.copies.keep_own(Holding { step: state.step, ranks, of: rank }, state);
            process.sending = Some(state);
        }
        if self.right.get(state.step as usize) != Some(&state) {
            return Err(format!("step {} is not that of the undisturbed run", state.step));
        }
        self.done = self.done.max(state.step);
        self.furthest = self.furthest.max(state.step);
        self.check_growth()?;
        let last = state.step == steps || self.generation.last == Some(state.step);
        let due = save_every > 0 && state.step.is_multiple_of(save_every);
        if last || due {
            // One save after the other.
            let at = (self.now + self.delay()).max(self.process(seat).writes);
            self.process(seat).writes = at + 1e-6;
            let place = (rank, ranks);
            self.to(at - self.now, seat, Doing::Write { generation: number, place, state });
        }
        if parts == Some(state.step) {
            self.deliver(seat);
            self.part(seat);
        } else if !last {
            self.compute(seat);
        }
        Ok(())
    }

    /// A rank leaves a generation that was called together; the others do so too.
    fn part(&mut self, seat: Seat) {
        let process = self.process(seat);
        process.generation = None;
        keep_arrived(process);
        // It may have lost its launcher since they agreed on the step.
        if process.orphaned { self.end(seat, End::Failed) } else { self.say_ready(seat) }
    }

    /// Once nothing bad has happened for long, no generation goes on with fewer ranks than there could be.
    fn check_growth(&self) -> Result<(), String> {
        let there = self.processes.iter().filter(|process| process.alive && !process.halted);
        let long = self.now - self.calm.max(self.cut) > SHORT;
        let enough = there.count() >= self.plan.ranks as usize;
        let ranks = self.generation.ranks();
        if long && enough && ranks < self.plan.ranks {
            return Err(format!("{ranks} ranks go on by themselves"));
        }
        Ok(())
    }

    fn intervals(&self) -> Plan {
        let super::world::Plan { steps, copy_every, save_every, .. } = self.plan;
        Plan { steps, copy_every, save_every }
    }

    /// A rank writes its part of a checkpoint; rank 0 then waits for the others.
    fn write(
        &mut self,
        seat: Seat,
        number: u64,
        place: (Rank, u32),
        state: State,
    ) -> Result<(), String> {
        if !self.checkpoints.write(place, number, state) && number == self.generation.number {
            self.generation.unsaved = self.generation.unsaved.max(Some(state.step));
        }
        if self.checkpoints.crashed() {
            return self.lose_power(seat);
        }
        if place.0 == Rank(0) {
            self.to(COMMIT_PAUSE, seat, Doing::Commit { generation: number, state });
        } else if self.ends_after(seat, number, state) {
            // It says whether it has written, and ends.
            self.end(seat, End::Completed);
        }
        Ok(())
    }

    fn ends_after(&mut self, seat: Seat, number: u64, state: State) -> bool {
        let last = self.plan.steps == state.step || self.generation.last == Some(state.step);
        last && self.process(seat).generation == Some(number)
    }

    fn commit(&mut self, seat: Seat, number: u64, state: State) -> Result<(), String> {
        let whole = self.checkpoints.commit(self.generation.ranks(), number, state);
        self.survived.checkpoints += u64::from(whole == Some(true));
        if self.checkpoints.crashed() {
            return self.lose_power(seat);
        }
        if whole == Some(false) && self.generation.unsaved < Some(state.step) {
            self.to(COMMIT_PAUSE, seat, Doing::Commit { generation: number, state });
        } else if self.ends_after(seat, number, state) {
            self.end(seat, End::Completed);
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
    let expected = |(holding, _): &&(Holding, State)| holding.step <= process.state.step;
    if let Some((holding, state)) = process.arrived.first().filter(expected).copied() {
        process.arrived.remove(0);
        process.copies.keep_ward(holding, state);
    }
}

/// The state that parts of it make: nothing that is right unless all are there and of one spread.
fn together(parts: impl Iterator<Item = Option<State>>) -> State {
    let parts: Vec<State> = parts.map(|part| part.unwrap_or(State::START)).collect();
    let same = parts.iter().all(|part| *part == parts[0]);
    if same { parts[0] } else { State { value: 0, ..parts[0] } }
}
