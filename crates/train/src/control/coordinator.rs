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
    /// A rank said why it cannot go on.
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
    /// Ranks that are in no generation.
    ready: u32,
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
        let (generation, ready, furthest, losses) = (0, 0, 0, 0);
        Self { policy, members, generation, ready, furthest, losses, verdict: None }
    }

    /// When time alone will next have something done, unless something is heard before.
    #[must_use]
    pub fn deadline(&self) -> Option<Seconds> {
        let limit = |member: &Member| match member.phase {
            Phase::Down { until } => Some(until.0),
            Phase::Starting => Some(member.heard.0 + self.policy.start.0),
            Phase::Running | Phase::Ready(_) => Some(member.heard.0 + self.policy.silence.0),
            Phase::Killed | Phase::Done => None,
        };
        self.members.iter().filter_map(limit).min_by(f64::total_cmp).map(Seconds)
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
                        self.enter(rank, Phase::Running);
                    }
                    self.progress(step);
                }
                vec![]
            }
            Event::Ready { rank, incarnation, address, step } => {
                let Some(member) = self.current(rank, incarnation) else { return vec![] };
                member.heard = now;
                self.enter(rank, Phase::Ready(address));
                self.progress(step);
                // Who is done already is missed by now.
                let mut actions = self.start_all_done(now);
                actions.extend(self.assemble());
                actions
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

    fn enter(&mut self, rank: Rank, phase: Phase) {
        let before = std::mem::replace(&mut self.members[rank.index()].phase, phase);
        self.ready -= u32::from(matches!(before, Phase::Ready(_)));
        self.ready += u32::from(matches!(phase, Phase::Ready(_)));
    }

    fn progress(&mut self, step: u64) {
        if step > self.furthest {
            self.furthest = step;
            self.losses = 0;
        }
    }

    /// Once every rank has left the generation, the next one meets where its rank 0 listens.
    fn assemble(&mut self) -> Vec<Action> {
        let Phase::Ready(master) = self.members[0].phase else { return vec![] };
        if self.ready < self.policy.ranks {
            return vec![];
        }
        (self.generation, self.ready) = (self.generation + 1, 0);
        let generation = self.generation;
        let meet = |(rank, member): (u32, &mut Member)| {
            member.phase = Phase::Running;
            Action::Meet { rank: Rank(rank), incarnation: member.incarnation, generation, master }
        };
        (0..).zip(&mut self.members).map(meet).collect()
    }

    fn ended(&mut self, now: Seconds, rank: Rank, end: End) -> Vec<Action> {
        match end {
            End::Failed => {
                self.enter(rank, Phase::Done);
                self.finish(Verdict::Failed(rank))
            }
            End::Completed => self.completed(now, rank),
            End::Lost => self.lost(now, rank),
        }
    }

    /// A rank has done its work; but while another is being replaced, who could help it to end is
    /// started anew.
    fn completed(&mut self, now: Seconds, rank: Rank) -> Vec<Action> {
        self.enter(rank, Phase::Done);
        let well = |member: &Member| matches!(member.phase, Phase::Running | Phase::Done);
        if !self.members.iter().all(well) {
            return self.start_all_done(now);
        }
        let all = self.members.iter().all(|member| member.phase == Phase::Done);
        if all { self.finish(Verdict::Completed) } else { vec![] }
    }

    fn lost(&mut self, now: Seconds, rank: Rank) -> Vec<Action> {
        self.losses += 1;
        if self.losses > self.policy.restarts {
            self.enter(rank, Phase::Done);
            return self.finish(Verdict::GaveUp(rank));
        }
        let doubled = 2_f64.powi(self.losses.min(DOUBLINGS) as i32 - 2);
        let pause = if self.losses == 1 { 0.0 } else { self.policy.back_off.0 * doubled };
        self.enter(rank, Phase::Down { until: now + Seconds(pause) });
        self.start_all_done(now)
    }

    fn start_all_done(&mut self, now: Seconds) -> Vec<Action> {
        for member in self.members.iter_mut().filter(|member| member.phase == Phase::Done) {
            member.phase = Phase::Down { until: now };
        }
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
            if silent < limit.0 {
                return None;
            }
            self.ready -= u32::from(matches!(member.phase, Phase::Ready(_)));
            member.phase = Phase::Killed;
            Some(Action::Kill { rank: Rank(rank), incarnation: member.incarnation })
        };
        (0..).zip(&mut self.members).filter_map(act).collect()
    }
}
