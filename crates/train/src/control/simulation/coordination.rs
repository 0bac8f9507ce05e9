//! The coordinator and its words to and from the ranks; how a run is started, and started again.

use std::net::{Ipv4Addr, SocketAddr};

use units::{Rank, Seconds};

use super::Bug;
use super::world::{Doing, FENCE, Generation, Happening, Office, Process, Who, World, policy};
use crate::control::{Action, Coordinator, End, Event, Seat, Verdict, first_of};

/// Between two beats of a rank, in seconds.
const BEAT: f64 = 1.0;
/// From the end of a run whose launcher was lost until somebody starts it again.
const UNTIL_LAUNCH: f64 = 2.0;
/// Between two looks of a coordinator whether another has taken over, and of a rank without one.
const CONFIRM: f64 = 1.0;
const LOOK: f64 = 0.1;

fn address() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 1).into()
}

impl World {
    /// Starts the run, or goes on with it from the newest checkpoint.
    pub fn launch(&mut self) -> Result<(), String> {
        self.launch += u64::from(!self.processes.is_empty());
        self.survived.launches = self.launch;
        let who = Who { launch: self.launch, incarnation: first_of(0) };
        let none = Process { alive: false, ..Process::new(who, 0) };
        self.processes = vec![none; self.plan.seats() as usize];
        self.heard = vec![[0.0; 2]; self.plan.seats() as usize];
        (self.generation, self.before) = (Generation::default(), vec![]);
        (self.furthest, self.done) = (0, 0);
        self.offices.clear();
        self.checkpoints.check(&self.right)?;
        let plan = self.plan;
        self.open(|now| Coordinator::new(policy(&plan), 0, now));
        Ok(())
    }

    /// A coordinator begins.
    fn open(&mut self, coordinator: impl FnOnce(Seconds) -> Coordinator) {
        let rate = 0.9 + self.dice.below(200) as f64 * 1e-3;
        let clock = (rate, self.dice.below(1 << 20) as f64);
        let coordinator = coordinator(shown(clock, self.now));
        let (term, ticking) = (self.offices.len() as u64, f64::INFINITY);
        self.offices.push(Office { coordinator, clock, ticking, alive: true, cut: 0.0 });
        for host in 0..self.plan.hosts {
            let (delay, launch, event) = (self.delay(), self.launch, Event::Joined { host });
            if self.hosts[host as usize] {
                self.after(delay, Happening::Hear { launch, term, event });
            }
        }
        self.tick_in_time(term);
        if self.plan.standby {
            self.after(CONFIRM, Happening::Confirm { launch: self.launch, term });
        }
    }

    /// The newest term.
    pub fn newest(&self) -> u64 {
        self.offices.len() as u64 - 1
    }

    /// The coordinator looks at its clock when that has something done.
    fn tick_in_time(&mut self, term: u64) {
        let (now, launch) = (self.now, self.launch);
        let office = &mut self.offices[term as usize];
        let Some(deadline) = office.coordinator.deadline() else { return };
        let (rate, start) = office.clock;
        let at = ((deadline.0 - start) / rate).max(now) + 1e-3;
        if at < office.ticking {
            office.ticking = at;
            self.after(at - now, Happening::Hear { launch, term, event: Event::Tick });
        }
    }

    /// A coordinator looks whether another has taken over.
    pub fn confirm(&mut self, term: u64) {
        let (now, launch, newest) = (self.now, self.launch, self.newest());
        let Office { alive, cut, clock, .. } = self.offices[term as usize];
        if !alive {
            return;
        }
        if cut <= now {
            let delay = self.delay();
            let event = match newest > term {
                true => Event::Superseded,
                false => Event::Confirmed { asked: shown(clock, now) },
            };
            self.after(delay, Happening::Hear { launch, term, event });
        }
        self.after(CONFIRM, Happening::Confirm { launch, term });
    }

    /// Whoever stands by takes over from a coordinator that is lost, or cannot be reached.
    pub fn succeed(&mut self, term: u64) {
        if self.newest() != term || self.verdict.is_some() {
            return;
        }
        self.survived.takeovers += 1;
        let mut policy = policy(&self.plan);
        if self.bug == Some(Bug::StartsAtOnce) {
            (policy.lease, policy.fence) = (Seconds::ZERO, Seconds::ZERO);
        }
        self.open(|now| Coordinator::succeed(policy, term + 1, now));
    }

    /// A rank says something, which arrives after all that it said before.
    pub fn say(&mut self, seat: Seat, event: Event) {
        let at = self.arrival(seat, 0);
        let Process { who, term, .. } = *self.process(seat);
        self.after(at - self.now, Happening::Hear { launch: who.launch, term, event });
    }

    fn arrival(&mut self, seat: Seat, direction: usize) -> f64 {
        let held = self.held[self.plan.host(seat)][direction];
        let at = self.now.max(held) + self.delay();
        let last = &mut self.heard[seat.index()][direction];
        *last = last.max(at);
        *last
    }

    pub fn say_ready(&mut self, seat: Seat) {
        let Process { who, state, .. } = *self.process(seat);
        let incarnation = who.incarnation;
        self.say(seat, Event::Ready { seat, incarnation, address: address(), step: state.step });
    }

    /// A rank says that it lives, as long as it does; and looks for another coordinator when it has
    /// long not been told that it may go on.
    pub fn beat(&mut self, seat: Seat) {
        let now = self.now;
        let Process { who, state, orphaned, granted, seeks, .. } = *self.process(seat);
        if orphaned {
            return;
        }
        let (incarnation, asked) = (who.incarnation, Seconds(now));
        self.say(seat, Event::Alive { seat, incarnation, step: state.step, asked });
        self.to(BEAT, seat, Doing::Beat);
        if self.plan.standby && granted < now + 0.75 * FENCE && !seeks {
            self.process(seat).seeks = true;
            self.to(LOOK, seat, Doing::Seek);
        }
    }

    /// A rank looks for another coordinator, as long as there will be time to save.
    pub fn seek(&mut self, seat: Seat) {
        let (now, newest) = (self.now, self.newest());
        let process = self.process(seat);
        if !process.seeks || process.orphaned {
            return;
        }
        if process.term < newest {
            (process.term, process.seeks) = (newest, false);
            self.beat_once(seat);
            if self.process(seat).generation.is_none() {
                self.say_ready(seat);
            }
        } else if process.granted < now + 0.5 * FENCE {
            process.orphaned = true;
            if process.generation.is_none() {
                self.end(seat, End::Lost);
            }
        } else {
            self.to(LOOK, seat, Doing::Seek);
        }
    }

    fn beat_once(&mut self, seat: Seat) {
        let Process { who, state, .. } = *self.process(seat);
        let (incarnation, asked) = (who.incarnation, Seconds(self.now));
        self.say(seat, Event::Alive { seat, incarnation, step: state.step, asked });
    }

    pub fn hear(&mut self, term: u64, event: Event) -> Result<(), String> {
        let event = match (self.bug, event) {
            (Some(Bug::HearsTheDead), Event::Ready { seat, address, step, .. }) => {
                let incarnation = self.process(seat).who.incarnation;
                Event::Ready { seat, incarnation, address, step }
            }
            _ => event,
        };
        let now = self.now;
        let bug = self.bug;
        let office = &mut self.offices[term as usize];
        if event == Event::Tick {
            // It was to look earlier, and has since.
            if office.ticking > now + 1e-5 {
                return Ok(());
            }
            office.ticking = f64::INFINITY;
        }
        if !office.alive {
            return Ok(());
        }
        let clock = shown(office.clock, now);
        let mut actions = Vec::new();
        if bug == Some(Bug::NeverStepsDown) {
            actions = office.coordinator.hear(clock, Event::Confirmed { asked: clock });
        }
        if bug != Some(Bug::NeverStepsDown) || event != Event::Superseded {
            actions.extend(office.coordinator.hear(clock, event));
        }
        match office.coordinator.verdict() {
            Some(Verdict::Superseded) => office.alive = false,
            verdict => self.verdict = self.verdict.or(verdict),
        }
        for action in actions {
            self.act(term, action)?;
        }
        if let (Some(Bug::MeetsWithoutAll), Event::Ready { seat, .. }) = (self.bug, event)
            && seat.0 < self.plan.ranks
        {
            let number = self.generation.number.max(1);
            let (rank, ranks) = (Rank(seat.0), self.plan.ranks);
            self.to(0.01, seat, Doing::Meet { term, number, rank, ranks });
        }
        if self.offices[term as usize].coordinator.decides(clock) {
            self.tick_in_time(term);
        }
        Ok(())
    }

    fn act(&mut self, term: u64, action: Action) -> Result<(), String> {
        match action {
            Action::Start { seat, incarnation } => {
                if let Some(working) = self.works(seat) {
                    return Err(format!(
                        "another process of {seat} is started while one works in generation {working}"
                    ));
                }
                self.end(seat, End::Lost);
                let who = Who { launch: self.launch, incarnation };
                let alive = self.hosts[self.plan.host(seat)];
                *self.process(seat) = Process { alive, ..Process::new(who, term) };
                self.heard[seat.index()] = [0.0; 2];
                let start = 0.1 + self.delay();
                self.to(start, seat, Doing::Up);
            }
            Action::Kill { seat, incarnation } => {
                self.order(seat, incarnation, Doing::Killed);
                if self.bug == Some(Bug::CountsOnKills) {
                    let event = Event::Ended { seat, incarnation, end: End::Lost };
                    self.after(0.0, Happening::Hear { launch: self.launch, term, event });
                }
            }
            Action::Call { seat, incarnation } if self.bug != Some(Bug::NeverGrows) => {
                self.order(seat, incarnation, Doing::Called(term));
            }
            Action::Grant { seat, incarnation, asked } => {
                let until = asked.0 + policy(&self.plan).fence.0;
                self.order(seat, incarnation, Doing::Granted { term, until });
            }
            Action::Meet { seat, incarnation, generation, rank, ranks, .. } => {
                // Of all starts of the run no two have the same number.
                let number = self.launch << 48 | generation;
                self.order(seat, incarnation, Doing::Meet { term, number, rank, ranks });
            }
            Action::Call { .. } | Action::Finish(_) => {}
        }
        Ok(())
    }

    /// The coordinator's word to a process.
    fn order(&mut self, seat: Seat, incarnation: u64, doing: Doing) {
        let who = Who { launch: self.launch, incarnation };
        let at = self.arrival(seat, 1);
        self.after(at - self.now, Happening::To { seat, who, doing });
    }

    /// The launcher dies, and the coordinator with it. The ranks see it; if nobody takes over, they
    /// save and end, and then the run is started again.
    pub fn lose_launcher(&mut self) {
        let term = self.newest();
        self.offices[term as usize].alive = false;
        for seat in self.seats() {
            let delay = self.delay();
            self.to(delay, seat, Doing::Orphaned(term));
        }
        self.be_succeeded(10_000);
        self.launch_again();
    }

    /// The coordinator cannot see any more whether another takes over, which one does.
    pub fn cut_launcher(&mut self) {
        let term = self.newest() as usize;
        self.offices[term].cut = self.now + self.dice.below(15_000) as f64 * 1e-3;
        self.be_succeeded(3000);
    }

    /// Whoever stands by takes over within so many milliseconds.
    fn be_succeeded(&mut self, within: u64) {
        if self.plan.standby {
            let (launch, term) = (self.launch, self.newest());
            let delay = self.dice.below(within) as f64 * 1e-3;
            self.after(delay, Happening::Succeed { launch, term });
        }
    }

    /// Starts the run again if nobody does or will coordinate it and no process is left.
    pub fn launch_again(&mut self) {
        let coordinated = self.plan.standby || self.offices.iter().any(|office| office.alive);
        if !coordinated && self.processes.iter().all(|process| !process.alive) {
            self.after(UNTIL_LAUNCH, Happening::Launch);
        }
    }

    /// The generation that a process works in, if it does, as far as it may.
    pub fn works(&self, seat: Seat) -> Option<u64> {
        let Process { alive, halted, granted, generation, .. } = self.processes[seat.index()];
        generation.filter(|_| alive && !halted && granted > self.now)
    }

    /// A process is gone, which nobody but the others of its generation sees.
    pub fn vanish(&mut self, seat: Seat) {
        let number = Some(self.generation.number);
        let process = self.process(seat);
        (process.alive, process.halted) = (false, false);
        if process.generation.take() == number {
            self.lose(seat);
        }
        self.launch_again();
    }

    /// A process ends; the coordinator sees how, and the others of its generation that it is gone.
    pub fn end(&mut self, seat: Seat, end: End) {
        let standby = self.plan.standby;
        let process = self.process(seat);
        if !process.alive {
            return;
        }
        // Who has saved and ends for want of a coordinator has not done its work.
        let end = if process.orphaned && standby { End::Lost } else { end };
        (process.alive, process.halted) = (false, false);
        let (incarnation, generation) = (process.who.incarnation, process.generation.take());
        let term = process.term;
        // Not on the stream that its words come on: they may come later.
        let (delay, launch) = (self.delay(), self.launch);
        let event = Event::Ended { seat, incarnation, end };
        self.after(delay, Happening::Hear { launch, term, event });
        if end != End::Completed && generation == Some(self.generation.number) {
            self.lose(seat);
        }
        self.launch_again();
    }
}

/// What a clock shows.
fn shown((rate, start): (f64, f64), now: f64) -> Seconds {
    Seconds(start + rate * now)
}
