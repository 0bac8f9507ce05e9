//! The decisions: who is started, who is given up, when all begin anew.

use std::net::SocketAddr;

use units::{Rank, Seconds};

/// From this loss in a row on the pause grows no longer.
const DOUBLINGS: u32 = 8;

/// What the coordinator goes by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Policy {
    /// Ranks of the run.
    pub ranks: u32,
    /// How many losses in a row, with no step done in between, are made good.
    pub restarts: u32,
    /// A rank that is silent for so long is taken for dead, and killed.
    pub silence: Seconds,
    /// How long a process may take from its start to its first word.
    pub start: Seconds,
    /// The pause before a rank is started a second time in a row; it doubles with each. The first
    /// time there is none.
    pub back_off: Seconds,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Its work was done.
    Completed,
    /// It said why it cannot go on: another process would do no better.
    Failed,
    /// It was killed, or the host was.
    Lost,
}

/// What the coordinator hears.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Event {
    /// A rank is alive, having done so many steps.
    Alive {
        /// Who.
        rank: Rank,
        /// Which process of that rank.
        incarnation: u64,
        /// Steps done.
        step: u64,
    },
    /// A rank is in no generation, and listens for the others here.
    Ready {
        /// Who.
        rank: Rank,
        /// Which process of that rank.
        incarnation: u64,
        /// Where it listens.
        address: SocketAddr,
        /// Steps done.
        step: u64,
    },
    /// A process ended.
    Ended {
        /// Whose.
        rank: Rank,
        /// Which process of that rank.
        incarnation: u64,
        /// How.
        end: End,
    },
    /// Time has passed.
    Tick,
}

/// What the coordinator wants done.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Action {
    /// Start a process.
    Start {
        /// For which rank.
        rank: Rank,
        /// Its number among the processes of that rank.
        incarnation: u64,
    },
    /// Kill a process.
    Kill {
        /// Whose.
        rank: Rank,
        /// Which.
        incarnation: u64,
    },
    /// Tell a rank where to meet the others.
    Meet {
        /// Whom to tell.
        rank: Rank,
        /// Its process.
        incarnation: u64,
        /// The number of the meeting; each is higher than all before.
        generation: u64,
        /// Where rank 0 listens.
        master: SocketAddr,
    },
    /// The run is over; whoever is left is to end.
    Finish(Verdict),
}

/// How a run ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Every rank has done its work.
    Completed,
    /// A rank said why it cannot go on, or was lost when others had ended.
    Failed(Rank),
    /// A rank was lost once more than losses are made good without progress.
    GaveUp(Rank),
}

/// Where a rank stands.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Phase {
    Starting,
    Running,
    Ready(SocketAddr),
    Killed,
    Down { until: Seconds },
    Done,
}

#[derive(Debug, Clone, Copy)]
struct Member {
    phase: Phase,
    incarnation: u64,
    /// When it was last heard of, or started.
    heard: Seconds,
}

/// Decides who belongs to the run. One generation of ranks works at a time: the next begins only
/// when every rank has left the one before, so no two commit the same step.
#[derive(Debug, Clone)]
pub struct Coordinator {
    policy: Policy,
    members: Vec<Member>,
    generation: u64,
    /// The most steps that anyone has done.
    furthest: u64,
    /// Losses since then.
    losses: u32,
    verdict: Option<Verdict>,
}

impl Coordinator {
    /// At the start of a run: the first generation, incarnation 0 of every rank, is being started.
    #[must_use]
    pub fn new(policy: Policy, now: Seconds) -> Self {
        let member = Member { phase: Phase::Starting, incarnation: 0, heard: now };
        let members = vec![member; policy.ranks as usize];
        Self { policy, members, generation: 0, furthest: 0, losses: 0, verdict: None }
    }

    /// How the run ended, if it has.
    #[must_use]
    pub fn verdict(&self) -> Option<Verdict> {
        self.verdict
    }

    /// Losses with no step done in between, up to now.
    #[must_use]
    pub fn losses(&self) -> u32 {
        self.losses
    }

    /// What to do about an event. Words of processes that are no more are not heard.
    pub fn hear(&mut self, now: Seconds, event: Event) -> Vec<Action> {
        if self.verdict.is_some() {
            return vec![];
        }
        match event {
            Event::Alive { rank, incarnation, step } => {
                if let Some(member) = self.current(rank, incarnation) {
                    member.heard = now;
                    if member.phase == Phase::Starting {
                        member.phase = Phase::Running;
                    }
                    self.progress(step);
                }
                vec![]
            }
            Event::Ready { rank, incarnation, address, step } => {
                let Some(member) = self.current(rank, incarnation) else { return vec![] };
                member.heard = now;
                member.phase = Phase::Ready(address);
                self.progress(step);
                self.assemble()
            }
            Event::Ended { rank, incarnation, end } => match self.current(rank, incarnation) {
                Some(_) => self.ended(now, rank, end),
                None => vec![],
            },
            Event::Tick => self.tick(now),
        }
    }

    /// The member, if that is its process and not one that was killed or has ended.
    fn current(&mut self, rank: Rank, incarnation: u64) -> Option<&mut Member> {
        let member = self.members.get_mut(rank.index())?;
        let here = !matches!(member.phase, Phase::Down { .. } | Phase::Done);
        (member.incarnation == incarnation && here).then_some(member)
    }

    fn progress(&mut self, step: u64) {
        if step > self.furthest {
            self.furthest = step;
            self.losses = 0;
        }
    }

    /// Once every rank has left the generation, the next one meets where its rank 0 listens.
    fn assemble(&mut self) -> Vec<Action> {
        let address = |member: &Member| match member.phase {
            Phase::Ready(address) => Some(address),
            _ => None,
        };
        let Some(addresses) = self.members.iter().map(address).collect::<Option<Vec<_>>>() else {
            return vec![];
        };
        self.generation += 1;
        let (generation, master) = (self.generation, addresses[0]);
        let meet = |(rank, member): (u32, &mut Member)| {
            member.phase = Phase::Running;
            Action::Meet { rank: Rank(rank), incarnation: member.incarnation, generation, master }
        };
        (0..).zip(&mut self.members).map(meet).collect()
    }

    fn ended(&mut self, now: Seconds, rank: Rank, end: End) -> Vec<Action> {
        let member = &mut self.members[rank.index()];
        member.phase = Phase::Done;
        if end == End::Failed {
            return self.finish(Verdict::Failed(rank));
        }
        if end == End::Completed {
            let all = self.members.iter().all(|member| member.phase == Phase::Done);
            return if all { self.finish(Verdict::Completed) } else { vec![] };
        }
        self.losses += 1;
        if self.losses > self.policy.restarts {
            return self.finish(Verdict::GaveUp(rank));
        }
        // Those that are done cannot take part again.
        let others = self.members.iter().enumerate().filter(|(other, _)| *other != rank.index());
        if others.into_iter().any(|(_, member)| member.phase == Phase::Done) {
            return self.finish(Verdict::Failed(rank));
        }
        let doubled = 2_f64.powi(self.losses.min(DOUBLINGS) as i32 - 2);
        let pause = if self.losses == 1 { 0.0 } else { self.policy.back_off.0 * doubled };
        self.members[rank.index()].phase = Phase::Down { until: now + Seconds(pause) };
        self.tick(now)
    }

    fn finish(&mut self, verdict: Verdict) -> Vec<Action> {
        self.verdict = Some(verdict);
        vec![Action::Finish(verdict)]
    }

    /// Starts whose pause is over, kills who has been silent for too long.
    fn tick(&mut self, now: Seconds) -> Vec<Action> {
        let policy = self.policy;
        let act = |(rank, member): (u32, &mut Member)| {
            let silent = now.0 - member.heard.0;
            let limit = match member.phase {
                Phase::Down { until } if now.0 >= until.0 => {
                    *member = Member {
                        phase: Phase::Starting,
                        incarnation: member.incarnation + 1,
                        heard: now,
                    };
                    let incarnation = member.incarnation;
                    return Some(Action::Start { rank: Rank(rank), incarnation });
                }
                Phase::Starting => policy.start,
                Phase::Running | Phase::Ready(_) => policy.silence,
                Phase::Killed | Phase::Down { .. } | Phase::Done => return None,
            };
            if silent <= limit.0 {
                return None;
            }
            member.phase = Phase::Killed;
            Some(Action::Kill { rank: Rank(rank), incarnation: member.incarnation })
        };
        (0..).zip(&mut self.members).filter_map(act).collect()
    }
}
