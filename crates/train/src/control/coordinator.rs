//! The decisions: who is started, who is given up, when all begin anew.

use std::net::SocketAddr;

use units::{Rank, Seconds};

use super::first_of;

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
    /// So long after it was last known that nobody else had taken over, a coordinator decides
    /// nothing. Without end where nobody can take over.
    pub lease: Seconds,
    /// A process to which no coordinator has granted so much more time since it asked ends by itself.
    pub fence: Seconds,
}

impl Policy {
    /// How much slower one clock may go than another.
    const DRIFT: f64 = 1.3;

    /// After so long whoever listens to another coordinator has ended.
    fn until_others_end(&self) -> Seconds {
        Seconds(Self::DRIFT * (self.lease.0 + self.fence.0))
    }
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
        /// When it said so, on its own clock.
        asked: Seconds,
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
    /// At this time, on this clock, nobody had taken over.
    Confirmed {
        /// When that was asked.
        asked: Seconds,
    },
    /// Somebody has taken over.
    Superseded,
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
    /// Tell a process that its word was heard: it may go on for so much longer since it said so.
    Grant {
        /// Whom to tell.
        rank: Rank,
        /// Its process.
        incarnation: u64,
        /// When it said so, on its own clock.
        asked: Seconds,
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
    /// Another coordinator has taken over.
    Superseded,
}

/// A process that was lost.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lost {
    /// Whose.
    pub rank: Rank,
    /// Which.
    pub incarnation: u64,
    /// For how long nothing had been heard of it.
    pub silence: Seconds,
    /// Whether it was killed for that.
    pub killed: bool,
}

/// Where a rank stands.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Phase {
    /// Of another coordinator's making, and not heard of yet.
    Unheard,
    Starting,
    Running,
    Ready(SocketAddr),
    Killed,
    Down {
        until: Seconds,
    },
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
///
/// What it knows it has from the ranks, so another can take over and hear it from them. Each is of a
/// term, higher than all before. Whoever turns to the new one listens to no older one again; who does
/// not has ended after [`Policy::lease`], in which the older one ceases to grant time to processes,
/// and [`Policy::fence`], after which they end that have been granted none. Only then does the new one
/// start others in their places.
#[derive(Debug, Clone)]
pub struct Coordinator {
    policy: Policy,
    /// When others than those that have turned to this one have ended.
    alone: Seconds,
    /// Until when nobody else decides.
    until: Seconds,
    /// What was heard after that.
    unanswered: Vec<Event>,
    term: u64,
    members: Vec<Member>,
    generation: u64,
    /// Ranks that are in no generation.
    ready: u32,
    /// The most steps that anyone has done.
    furthest: u64,
    /// Losses since then.
    losses: u32,
    /// What was lost since the ranks last met.
    lost: Vec<Lost>,
    verdict: Option<Verdict>,
}

impl Coordinator {
    /// At the start of a run: the first generation, the first process of every rank, is being started.
    #[must_use]
    pub fn new(policy: Policy, term: u64, now: Seconds) -> Self {
        Self::of_term(policy, term, Phase::Starting, now)
    }

    /// In the place of the one of the term before, of whose ranks none has been heard yet.
    #[must_use]
    pub fn succeed(policy: Policy, term: u64, now: Seconds) -> Self {
        let alone = now + policy.until_others_end();
        Self { alone, ..Self::of_term(policy, term, Phase::Unheard, now) }
    }

    fn of_term(policy: Policy, term: u64, phase: Phase, now: Seconds) -> Self {
        let member = Member { phase, incarnation: first_of(term), heard: now };
        let members = vec![member; policy.ranks as usize];
        Self {
            policy,
            alone: now,
            until: now + policy.lease,
            unanswered: vec![],
            term,
            members,
            generation: first_of(term),
            ready: 0,
            furthest: 0,
            losses: 0,
            lost: vec![],
            verdict: None,
        }
    }

    /// When time alone will next have something done, unless something is heard before.
    #[must_use]
    pub fn deadline(&self) -> Option<Seconds> {
        let limit = |member: &Member| match member.phase {
            Phase::Down { until } => Some(until.0),
            Phase::Starting => Some(member.heard.0 + self.policy.start.0),
            Phase::Running | Phase::Ready(_) => Some(member.heard.0 + self.policy.silence.0),
            Phase::Unheard => Some(self.alone.0),
            Phase::Killed => Some(self.ended_by_itself(member).0),
            Phase::Done => None,
        };
        let deadline = self.members.iter().filter_map(limit).min_by(f64::total_cmp);
        deadline.filter(|deadline| deadline.is_finite()).map(Seconds)
    }

    /// Whether nobody else decides.
    #[must_use]
    pub fn decides(&self, now: Seconds) -> bool {
        now <= self.until
    }

    /// How the run ended, if it has.
    #[must_use]
    pub fn verdict(&self) -> Option<Verdict> {
        self.verdict
    }

    /// The most steps that any rank has done.
    #[must_use]
    pub fn furthest(&self) -> u64 {
        self.furthest
    }

    /// What was lost since this was last asked.
    pub fn take_lost(&mut self) -> Vec<Lost> {
        std::mem::take(&mut self.lost)
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
            Event::Superseded => self.finish(Verdict::Superseded),
            Event::Confirmed { asked } => {
                self.until = Seconds(self.until.0.max(asked.0 + self.policy.lease.0));
                let unanswered = std::mem::take(&mut self.unanswered).into_iter();
                unanswered.flat_map(|event| self.hear(now, event)).collect()
            }
            Event::Tick if !self.decides(now) => vec![],
            event if !self.decides(now) => {
                self.unanswered.push(event);
                vec![]
            }
            event => self.answer(now, event),
        }
    }

    /// What to do about an event while nobody else decides.
    fn answer(&mut self, now: Seconds, event: Event) -> Vec<Action> {
        match event {
            Event::Alive { rank, incarnation, step, asked } => {
                let Some(member) = self.current(rank, incarnation) else { return vec![] };
                member.heard = now;
                let killed = member.phase == Phase::Killed;
                if matches!(member.phase, Phase::Starting | Phase::Unheard) {
                    self.enter(rank, Phase::Running);
                }
                self.progress(step);
                if killed { vec![] } else { vec![Action::Grant { rank, incarnation, asked }] }
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
            Event::Tick | Event::Confirmed { .. } | Event::Superseded => self.tick(now),
        }
    }

    /// The member, if that is its process and not one that has ended.
    fn current(&mut self, rank: Rank, incarnation: u64) -> Option<&mut Member> {
        let member = self.members.get_mut(rank.index())?;
        if member.phase == Phase::Unheard {
            member.incarnation = incarnation;
        }
        let here = !matches!(member.phase, Phase::Down { .. } | Phase::Done);
        (member.incarnation == incarnation && here).then_some(member)
    }

    /// When a process that was killed has ended, though nobody has seen it end.
    fn ended_by_itself(&self, member: &Member) -> Seconds {
        member.heard + Seconds(Policy::DRIFT * self.policy.fence.0)
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
        let Member { incarnation, heard, phase } = self.members[rank.index()];
        let (silence, killed) = (now - heard, phase == Phase::Killed);
        self.lost.push(Lost { rank, incarnation, silence, killed });
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

    /// Starts whose pause is over, kills who has been silent for too long, takes for lost who must
    /// have ended.
    fn tick(&mut self, now: Seconds) -> Vec<Action> {
        let mut actions = Vec::new();
        for rank in (0..self.policy.ranks).map(Rank) {
            let member = self.members[rank.index()];
            let silent = |limit: Seconds| now.0 - member.heard.0 >= limit.0;
            match member.phase {
                Phase::Down { until } if now >= until => {
                    let incarnation = (member.incarnation + 1).max(first_of(self.term) + 1);
                    let phase = Phase::Starting;
                    self.members[rank.index()] = Member { phase, incarnation, heard: now };
                    actions.push(Action::Start { rank, incarnation });
                }
                Phase::Starting if silent(self.policy.start) => actions.push(self.kill(rank)),
                Phase::Running | Phase::Ready(_) if silent(self.policy.silence) => {
                    actions.push(self.kill(rank));
                }
                // No fault of the run's: it does not count.
                Phase::Unheard if now >= self.alone => {
                    self.enter(rank, Phase::Down { until: now });
                    actions.extend(self.start_all_done(now));
                }
                Phase::Killed if now >= self.ended_by_itself(&member) => {
                    actions.extend(self.lost(now, rank));
                }
                _ => {}
            }
        }
        actions
    }

    fn kill(&mut self, rank: Rank) -> Action {
        self.enter(rank, Phase::Killed);
        Action::Kill { rank, incarnation: self.members[rank.index()].incarnation }
    }
}
