//! The coordinator and its words to and from the ranks; how a run is started, and started again.

use std::net::{Ipv4Addr, SocketAddr};

use units::{Rank, Seconds};

use super::Bug;
use super::world::{Doing, Generation, Happening, Process, Who, World, policy};
use crate::control::{Action, Coordinator, End, Event};

/// Between two beats of a rank, in seconds.
const BEAT: f64 = 1.0;
/// From the end of a run whose launcher was lost until somebody starts it again.
const UNTIL_LAUNCH: f64 = 2.0;

fn address() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 1).into()
}

impl World {
    /// Starts the run, or goes on with it from the newest checkpoint.
    pub fn launch(&mut self) -> Result<(), String> {
        self.launch += u64::from(!self.processes.is_empty());
        self.survived.launches = self.launch;
        let who = Who { launch: self.launch, incarnation: 0 };
        self.processes = vec![Process::new(who); self.plan.ranks as usize];
        self.heard = vec![[0.0; 2]; self.plan.ranks as usize];
        self.generation = Generation::default();
        (self.furthest, self.done, self.ticking) = (0, 0, f64::INFINITY);
        self.checkpoints.check(&self.right)?;
        let now = self.clock();
        self.coordinator = Some(Coordinator::new(policy(self.plan.ranks), now));
        for rank in self.ranks() {
            let start = self.delay();
            self.to(start, rank, Doing::Up);
        }
        self.tick_in_time();
        Ok(())
    }

    /// What the coordinator's clock shows.
    fn clock(&self) -> Seconds {
        let (rate, start) = self.plan.clock;
        Seconds(start + rate * self.now)
    }

    /// The coordinator looks at its clock when that has something done.
    fn tick_in_time(&mut self) {
        let Some(deadline) = self.coordinator.as_ref().and_then(Coordinator::deadline) else {
            return;
        };
        let (rate, start) = self.plan.clock;
        let at = ((deadline.0 - start) / rate).max(self.now) + 1e-3;
        if at < self.ticking {
            self.ticking = at;
            let launch = self.launch;
            self.after(self.ticking - self.now, Happening::Hear { launch, event: Event::Tick });
        }
    }

    /// A rank says something, which arrives after all that it said before.
    pub fn say(&mut self, rank: Rank, event: Event) {
        let at = self.arrival(rank, 0);
        let launch = self.rank(rank).who.launch;
        self.after(at - self.now, Happening::Hear { launch, event });
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

    /// A rank says that it lives, as long as it does.
    pub fn beat(&mut self, rank: Rank) {
        let Process { who, state, orphaned, .. } = *self.rank(rank);
        if !orphaned {
            self.say(rank, Event::Alive { rank, incarnation: who.incarnation, step: state.step });
            self.to(BEAT, rank, Doing::Beat);
        }
    }

    pub fn hear(&mut self, launch: u64, event: Event) {
        let event = match (self.bug, event) {
            (Some(Bug::HearsTheDead), Event::Ready { rank, address, step, .. }) => {
                let incarnation = self.rank(rank).who.incarnation;
                Event::Ready { rank, incarnation, address, step }
            }
            _ => event,
        };
        let now = self.clock();
        if event == Event::Tick && launch == self.launch {
            self.ticking = f64::INFINITY;
        }
        let Some(coordinator) = self.coordinator.as_mut().filter(|_| launch == self.launch) else {
            return;
        };
        let actions = coordinator.hear(now, event);
        self.verdict = coordinator.verdict();
        actions.into_iter().for_each(|action| self.act(action));
        if let (Some(Bug::MeetsWithoutAll), Event::Ready { rank, .. }) = (self.bug, event) {
            let generation = self.generation.number.max(1);
            self.to(0.01, rank, Doing::Meet(generation));
        }
        self.tick_in_time();
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Start { rank, incarnation } => {
                let who = Who { launch: self.launch, incarnation };
                *self.rank(rank) = Process::new(who);
                self.heard[rank.index()] = [0.0; 2];
                let start = 0.1 + self.delay();
                self.to(start, rank, Doing::Up);
            }
            Action::Kill { rank, incarnation } => self.order(rank, incarnation, Doing::Killed),
            Action::Meet { rank, incarnation, generation, .. } => {
                // Of all starts of the run no two have the same number.
                let number = self.launch << 32 | generation;
                self.order(rank, incarnation, Doing::Meet(number));
            }
            Action::Finish(_) => {}
        }
    }

    /// The coordinator's word to a process.
    fn order(&mut self, rank: Rank, incarnation: u64, doing: Doing) {
        let who = Who { launch: self.launch, incarnation };
        let at = self.arrival(rank, 1);
        self.after(at - self.now, Happening::To { rank, who, doing });
    }

    /// The launcher dies, and the coordinator with it. The ranks see it; when they have ended, the
    /// run is started again.
    pub fn lose_launcher(&mut self) {
        self.coordinator = None;
        for rank in self.ranks() {
            let delay = self.delay();
            self.to(delay, rank, Doing::Orphaned);
        }
        self.launch_again();
    }

    /// Starts the run again if it has no launcher and no process is left.
    pub fn launch_again(&mut self) {
        if self.coordinator.is_none() && self.processes.iter().all(|process| !process.alive) {
            self.after(UNTIL_LAUNCH, Happening::Launch);
        }
    }

    /// A process ends; the coordinator sees how, and the others of its generation that it is gone.
    pub fn end(&mut self, rank: Rank, end: End) {
        let process = self.rank(rank);
        if !process.alive {
            return;
        }
        (process.alive, process.halted) = (false, false);
        let (incarnation, generation) = (process.who.incarnation, process.generation.take());
        if self.coordinator.is_some() {
            // Not on the stream that its words come on: they may come later.
            let (delay, launch) = (self.delay(), self.launch);
            let event = Event::Ended { rank, incarnation, end };
            self.after(delay, Happening::Hear { launch, event });
        }
        if end != End::Completed && generation.is_some() {
            self.lose(rank);
        }
        self.launch_again();
    }
}
