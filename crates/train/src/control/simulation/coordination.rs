//! The coordinator and its words to and from the ranks; how a run is started, and started again.

use std::net::{Ipv4Addr, SocketAddr};

use units::{Rank, Seconds};

use super::Bug;
use super::world::{Doing, FENCE, Generation, Happening, Office, Process, Who, World, policy};
use crate::control::{Action, Coordinator, End, Event, Verdict, first_of};

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
        self.processes = vec![Process::new(who, 0); self.plan.ranks as usize];
        self.heard = vec![[0.0; 2]; self.plan.ranks as usize];
        self.generation = Generation::default();
        (self.furthest, self.done) = (0, 0);
        self.offices.clear();
        self.checkpoints.check(&self.right)?;
        let plan = self.plan;
        self.open(|now| Coordinator::new(policy(&plan), 0, now));
        for rank in self.ranks() {
            let start = self.delay();
            self.to(start, rank, Doing::Up);
        }
        Ok(())
    }

    /// A coordinator begins.
    fn open(&mut self, coordinator: impl FnOnce(Seconds) -> Coordinator) {
        let rate = 0.9 + self.dice.below(200) as f64 * 1e-3;
        let clock = (rate, self.dice.below(1 << 20) as f64);
        let coordinator = coordinator(shown(clock, self.now));
        let (term, ticking) = (self.offices.len() as u64, f64::INFINITY);
        self.offices.push(Office { coordinator, clock, ticking, alive: true, cut: 0.0 });
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
    pub fn say(&mut self, rank: Rank, event: Event) {
        let at = self.arrival(rank, 0);
        let Process { who, term, .. } = *self.rank(rank);
        self.after(at - self.now, Happening::Hear { launch: who.launch, term, event });
    }

    fn arrival(&mut self, rank: Rank, direction: usize) -> f64 {
        let held = self.held[self.plan.host(rank)][direction];
        let at = self.now.max(held) + self.delay();
        let last = &mut self.heard[rank.index()][direction];
        *last = last.max(at);
        *last
    }

    pub fn say_ready(&mut self, rank: Rank) {
        let Process { who, state, .. } = *self.rank(rank);
        let incarnation = who.incarnation;
        self.say(rank, Event::Ready { rank, incarnation, address: address(), step: state.step });
    }

    /// A rank says that it lives, as long as it does; and looks for another coordinator when it has
    /// long not been told that it may go on.
    pub fn beat(&mut self, rank: Rank) {
        let now = self.now;
        let Process { who, state, orphaned, granted, seeks, .. } = *self.rank(rank);
        if orphaned {
            return;
        }
        let (incarnation, asked) = (who.incarnation, Seconds(now));
        self.say(rank, Event::Alive { rank, incarnation, step: state.step, asked });
        self.to(BEAT, rank, Doing::Beat);
        if granted < now + 0.75 * FENCE && !seeks {
            self.rank(rank).seeks = true;
            self.to(LOOK, rank, Doing::Seek);
        }
    }

    /// A rank looks for another coordinator, as long as there will be time to save.
    pub fn seek(&mut self, rank: Rank) {
        let (now, newest) = (self.now, self.newest());
        let process = self.rank(rank);
        if !process.seeks || process.orphaned {
            return;
        }
        if process.term < newest {
            (process.term, process.seeks) = (newest, false);
            self.beat_once(rank);
            if self.rank(rank).generation.is_none() {
                self.say_ready(rank);
            }
        } else if process.granted < now + 0.5 * FENCE {
            process.orphaned = true;
            if process.generation.is_none() {
                self.end(rank, End::Lost);
            }
        } else {
            self.to(LOOK, rank, Doing::Seek);
        }
    }

    fn beat_once(&mut self, rank: Rank) {
        let Process { who, state, .. } = *self.rank(rank);
        let (incarnation, asked) = (who.incarnation, Seconds(self.now));
        self.say(rank, Event::Alive { rank, incarnation, step: state.step, asked });
    }

    pub fn hear(&mut self, term: u64, event: Event) -> Result<(), String> {
        let event = match (self.bug, event) {
            (Some(Bug::HearsTheDead), Event::Ready { rank, address, step, .. }) => {
                let incarnation = self.rank(rank).who.incarnation;
                Event::Ready { rank, incarnation, address, step }
            }
            _ => event,
        };
        let now = self.now;
        let bug = self.bug;
        let office = &mut self.offices[term as usize];
        if event == Event::Tick {
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
        if let (Some(Bug::MeetsWithoutAll), Event::Ready { rank, .. }) = (self.bug, event) {
            let number = self.generation.number.max(1);
            self.to(0.01, rank, Doing::Meet { term, number });
        }
        if self.offices[term as usize].coordinator.decides(clock) {
            self.tick_in_time(term);
        }
        Ok(())
    }

    fn act(&mut self, term: u64, action: Action) -> Result<(), String> {
        match action {
            Action::Start { rank, incarnation } => {
                let now = self.now;
                let Process { alive, halted, generation, granted, .. } = *self.rank(rank);
                if let Some(working) = generation.filter(|_| alive && !halted && granted > now) {
                    return Err(format!(
                        "another process of {rank} is started while one works in generation {working}"
                    ));
                }
                self.end(rank, End::Lost);
                let who = Who { launch: self.launch, incarnation };
                *self.rank(rank) = Process::new(who, term);
                self.heard[rank.index()] = [0.0; 2];
                let start = 0.1 + self.delay();
                self.to(start, rank, Doing::Up);
            }
            Action::Kill { rank, incarnation } => self.order(rank, incarnation, Doing::Killed),
            Action::Grant { rank, incarnation, asked } => {
                let until = asked.0 + policy(&self.plan).fence.0;
                self.order(rank, incarnation, Doing::Granted { term, until });
            }
            Action::Meet { rank, incarnation, generation, .. } => {
                // Of all starts of the run no two have the same number.
                let number = self.launch << 48 | generation;
                self.order(rank, incarnation, Doing::Meet { term, number });
            }
            Action::Finish(_) => {}
        }
        Ok(())
    }

    /// The coordinator's word to a process.
    fn order(&mut self, rank: Rank, incarnation: u64, doing: Doing) {
        let who = Who { launch: self.launch, incarnation };
        let at = self.arrival(rank, 1);
        self.after(at - self.now, Happening::To { rank, who, doing });
    }

    /// The launcher dies, and the coordinator with it. The ranks see it; if nobody takes over, they
    /// save and end, and then the run is started again.
    pub fn lose_launcher(&mut self) {
        let term = self.newest();
        self.offices[term as usize].alive = false;
        for rank in self.ranks() {
            let delay = self.delay();
            self.to(delay, rank, Doing::Orphaned(term));
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

    /// A process ends; the coordinator sees how, and the others of its generation that it is gone.
    pub fn end(&mut self, rank: Rank, end: End) {
        let standby = self.plan.standby;
        let process = self.rank(rank);
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
        let event = Event::Ended { rank, incarnation, end };
        self.after(delay, Happening::Hear { launch, term, event });
        if end != End::Completed && generation.is_some() {
            self.lose(rank);
        }
        self.launch_again();
    }
}

/// What a clock shows.
fn shown((rate, start): (f64, f64), now: f64) -> Seconds {
    Seconds(start + rate * now)
}
