//! The decisions: who is started, who is given up, when all begin anew.

use std::fmt;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use units::{Rank, Seconds};

use super::first_of;

/// A place for a process on some host. Its processes come and go; which rank of a generation each is, if
/// any, is decided when that generation meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Seat(pub u32);

impl Seat {
    /// As a place in a list.
    #[must_use]
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seat {}", self.0)
    }
}

/// From this loss in a row on the pause grows no longer.
const DOUBLINGS: u32 = 8;

/// What the coordinator goes by.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    /// Ranks of the run.
    pub ranks: u32,
    /// With how many it can go on when some are missing, the most first; none where it waits for them.
    pub fewer: Vec<u32>,
    /// How long it waits for those that were lost before it goes on with fewer.
    pub patience: Seconds,
    /// Processes that a host has room for. Those that no generation needs are spare: they wait.
    pub seats_per_host: u32,
    /// How many losses of a process in a row, with no step done in between, are made good.
    pub restarts: u32,
    /// A process that is silent for so long is taken for dead, and killed.
    pub silence: Seconds,
    /// How long a process may take from its start to its first word.
    pub start: Seconds,
    /// The pause before a process is started a second time in a row; it doubles with each. The first
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

    /// The most ranks that so many processes can be.
    fn fitting(&self, processes: u32) -> u32 {
        let sizes = std::iter::once(&self.ranks).chain(&self.fewer);
        sizes.copied().find(|ranks| *ranks <= processes).unwrap_or_default()
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
    /// A process is alive, having done so many steps.
    Alive {
        /// Who.
        seat: Seat,
        /// Which process of that seat.
        incarnation: u64,
        /// Steps done.
        step: u64,
        /// When it said so, on its own clock.
        asked: Seconds,
    },
    /// A process is in no generation, and listens for the others here.
    Ready {
        /// Who.
        seat: Seat,
        /// Which process of that seat.
        incarnation: u64,
        /// Where it listens.
        address: SocketAddr,
        /// Steps done.
        step: u64,
    },
    /// A process ended.
    Ended {
        /// Whose.
        seat: Seat,
        /// Which process of that seat.
        incarnation: u64,
        /// How.
        end: End,
    },
    /// A host is there, and processes can be started on it.
    Joined {
        /// Which.
        host: u32,
    },
    /// A host is gone, or cannot be reached; nobody sees its processes end.
    Departed {
        /// Which.
        host: u32,
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
        /// In which seat.
        seat: Seat,
        /// Its number among the processes of that seat.
        incarnation: u64,
    },
    /// Kill a process.
    Kill {
        /// Whose.
        seat: Seat,
        /// Which.
        incarnation: u64,
    },
    /// Tell a process that its word was heard: it may go on for so much longer since it said so.
    Grant {
        /// Whom to tell.
        seat: Seat,
        /// Its process.
        incarnation: u64,
        /// When it said so, on its own clock.
        asked: Seconds,
    },
    /// Tell a process to leave its generation after the step at hand, since there could be more ranks.
    Call {
        /// Whom to tell.
        seat: Seat,
        /// Its process.
        incarnation: u64,
    },
    /// Tell a process where to meet the others.
    Meet {
        /// Whom to tell.
        seat: Seat,
        /// Its process.
        incarnation: u64,
        /// Which rank it is.
        rank: Rank,
        /// Of how many.
        ranks: u32,
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
    /// A process said why it cannot go on.
    Failed(Seat),
    /// A process was lost once more than losses are made good without progress.
    GaveUp(Seat),
    /// Another coordinator has taken over.
    Superseded,
}

/// A process that was lost.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lost {
    /// Of which rank.
    pub rank: Rank,
    /// In which seat.
    pub seat: Seat,
    /// Which.
    pub incarnation: u64,
    /// For how long nothing had been heard of it.
    pub silence: Seconds,
    /// Whether it was killed for that.
    pub killed: bool,
}

/// Where a seat's process stands.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Phase {
    /// Of another coordinator's making, and not heard of yet.
    Unheard,
    Starting,
    /// Alive, and not ready yet.
    Coming,
    /// In no generation.
    Ready(SocketAddr),
    /// In a generation.
    Working,
    Killed,
    /// There is none.
    Down {
        until: Seconds,
    },
    Done,
    /// It is not started again.
    GivenUp,
}

#[derive(Debug, Clone, Copy)]
struct Member {
    phase: Phase,
    /// Its newest process.
    incarnation: Option<u64>,
    /// When that was last heard of, or started.
    heard: Seconds,
    /// Its rank in the last generation.
    rank: Option<Rank>,
    /// How often it was lost when so many steps were done.
    losses: (u32, u64),
}

impl Member {
    /// What it counts as.
    fn counts(&self) -> Counts {
        let unknown = match self.phase {
            Phase::Unheard => true,
            Phase::Killed => self.rank.is_some(),
            _ => false,
        };
        Counts {
            ready: u32::from(matches!(self.phase, Phase::Ready(_))),
            coming: u32::from(matches!(self.phase, Phase::Starting | Phase::Coming)),
            working: u32::from(self.phase == Phase::Working),
            unknown: u32::from(unknown),
            done: u32::from(self.phase == Phase::Done),
        }
    }
}

/// How many processes there are of a kind.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Counts {
    ready: u32,
    coming: u32,
    working: u32,
    /// Nobody knows whether they still work.
    unknown: u32,
    done: u32,
}

/// Decides who belongs to the run. One generation of ranks works at a time: the next begins only
/// when all that are left have left the one before, so no two commit the same step. It has all ranks of
/// the run, or, when those that were lost do not come back in time, fewer; and as soon as there could be
/// more again, they are called together after the step at hand. Processes that it has no need of wait
/// until one is lost.
///
/// What it knows it has from the processes, so another can take over and hear it from them. Each is of a
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
    /// By seat.
    members: Vec<Member>,
    counts: Counts,
    /// Whether each host is there.
    hosts: Vec<bool>,
    generation: u64,
    /// Ranks of the generation; 0 before the first of this term.
    ranks: u32,
    /// Whether it was called together.
    called: bool,
    /// Until when the next one waits for all ranks; without end unless one was lost.
    patient: Option<Seconds>,
    /// The most steps that anyone has done.
    furthest: u64,
    /// What was lost since the ranks last met.
    lost: Vec<Lost>,
    verdict: Option<Verdict>,
}

impl Coordinator {
    /// At the start of a run, before any host has joined.
    #[must_use]
    pub fn new(policy: Policy, term: u64, now: Seconds) -> Self {
        Self {
            alone: now,
            until: now + policy.lease,
            unanswered: vec![],
            term,
            members: vec![],
            counts: Counts::default(),
            hosts: vec![],
            generation: first_of(term),
            ranks: 0,
            called: false,
            patient: None,
            furthest: 0,
            lost: vec![],
            verdict: None,
            policy,
        }
    }

    /// In the place of the one of the term before, of whose processes none has been heard yet.
    #[must_use]
    pub fn succeed(policy: Policy, term: u64, now: Seconds) -> Self {
        let alone = now + policy.until_others_end();
        let hosts = policy.ranks.div_ceil(policy.seats_per_host);
        let mut coordinator = Self::new(policy, term, now);
        (coordinator.alone, coordinator.generation) = (alone, first_of(term) + 1);
        (0..hosts).for_each(|host| coordinator.make_room(host, Phase::Unheard, now));
        coordinator
    }

    /// Seats for a host, and all before it, unless they are there.
    fn make_room(&mut self, host: u32, phase: Phase, now: Seconds) {
        let seats = (host + 1) as usize * self.policy.seats_per_host as usize;
        let member = Member { phase, incarnation: None, heard: now, rank: None, losses: (0, 0) };
        let hosts = self.hosts.len().max(host as usize + 1);
        self.hosts.resize(hosts, false);
        while self.members.len() < seats {
            self.counts.unknown += member.counts().unknown;
            self.members.push(member);
        }
    }

    /// Whether there is a host on which a seat's process can be started.
    fn has_host(&self, seat: usize) -> bool {
        self.hosts[seat / self.policy.seats_per_host as usize]
    }

    /// When time alone will next have something done, unless something is heard before.
    #[must_use]
    pub fn deadline(&self) -> Option<Seconds> {
        let limit = |(seat, member): (usize, &Member)| match member.phase {
            Phase::Down { until } if self.has_host(seat) => Some(until.0),
            Phase::Starting => Some(member.heard.0 + self.policy.start.0),
            Phase::Coming | Phase::Ready(_) | Phase::Working => {
                Some(member.heard.0 + self.policy.silence.0)
            }
            Phase::Unheard => Some(self.alone.0),
            Phase::Killed => Some(self.ended_by_itself(member).0),
            Phase::Down { .. } | Phase::Done | Phase::GivenUp => None,
        };
        let meeting = self.meets().map(|at| at.0);
        let limits = self.members.iter().enumerate().filter_map(limit).chain(meeting);
        limits.min_by(f64::total_cmp).filter(|limit| limit.is_finite()).map(Seconds)
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

    /// How often a seat's process was lost with no step done in between, up to now.
    #[must_use]
    pub fn losses(&self, seat: Seat) -> u32 {
        self.members[seat.index()].losses.0
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
            event => {
                let mut actions = self.answer(now, event);
                actions.extend(self.assemble(now));
                actions
            }
        }
    }

    /// What to do about an event while nobody else decides.
    fn answer(&mut self, now: Seconds, event: Event) -> Vec<Action> {
        if let Event::Alive { seat, .. } | Event::Ready { seat, .. } = event
            && now < self.alone
        {
            // It may be heard before its host.
            self.make_room(seat.0 / self.policy.seats_per_host, Phase::Unheard, now);
        }
        match event {
            Event::Alive { seat, incarnation, step, asked } => {
                let Some(member) = self.current(seat, incarnation) else { return vec![] };
                member.heard = now;
                let phase = member.phase;
                match phase {
                    Phase::Starting => self.enter(seat, Phase::Coming),
                    // Who waits for the others says so first of all.
                    Phase::Unheard => self.enter(seat, Phase::Working),
                    _ => {}
                }
                self.furthest = self.furthest.max(step);
                let killed = phase == Phase::Killed;
                if killed { vec![] } else { vec![Action::Grant { seat, incarnation, asked }] }
            }
            Event::Ready { seat, incarnation, address, step } => {
                let Some(member) = self.current(seat, incarnation) else { return vec![] };
                member.heard = now;
                let is_spare = member.rank.is_none();
                self.enter(seat, Phase::Ready(address));
                self.furthest = self.furthest.max(step);
                // Who is done already is missed by now.
                let done = self.counts.done > 0 && !is_spare;
                if done { self.start_all_done(now) } else { vec![] }
            }
            Event::Ended { seat, incarnation, end } => match self.current(seat, incarnation) {
                Some(_) => self.ended(now, seat, end),
                None => vec![],
            },
            Event::Joined { host } => {
                // Where another coordinator was before, so may be processes of it.
                let before = now < self.alone;
                let phase = if before { Phase::Unheard } else { Phase::Down { until: now } };
                self.make_room(host, phase, now);
                self.hosts[host as usize] = true;
                self.tick(now)
            }
            Event::Departed { host } => {
                // Its processes may go on without it, and are heard of if they do.
                let Some(there) = self.hosts.get_mut(host as usize) else { return vec![] };
                *there = false;
                let first = host * self.policy.seats_per_host;
                for seat in (first..first + self.policy.seats_per_host).map(Seat) {
                    // One that comes up nevertheless is granted no time.
                    if self.members[seat.index()].phase == Phase::Starting {
                        self.enter(seat, Phase::Down { until: now });
                    }
                }
                vec![]
            }
            Event::Tick | Event::Confirmed { .. } | Event::Superseded => self.tick(now),
        }
    }

    /// The member, if that is its process and not one that has ended.
    fn current(&mut self, seat: Seat, incarnation: u64) -> Option<&mut Member> {
        let ranks = self.policy.ranks;
        let member = self.members.get_mut(seat.index())?;
        if member.phase == Phase::Unheard {
            member.incarnation = Some(incarnation);
            // As good a guess as any.
            member.rank = (seat.0 < ranks).then_some(Rank(seat.0));
        }
        let here = !matches!(member.phase, Phase::Down { .. } | Phase::Done | Phase::GivenUp);
        (member.incarnation == Some(incarnation) && here).then_some(member)
    }

    /// When a process that was killed has ended, though nobody has seen it end.
    fn ended_by_itself(&self, member: &Member) -> Seconds {
        member.heard + Seconds(Policy::DRIFT * self.policy.fence.0)
    }

    fn enter(&mut self, seat: Seat, phase: Phase) {
        let member = &mut self.members[seat.index()];
        let before = member.counts();
        member.phase = phase;
        if phase == Phase::Working {
            member.rank.get_or_insert(Rank(seat.0));
        }
        let after = member.counts();
        let counts = &mut self.counts;
        counts.ready = counts.ready + after.ready - before.ready;
        counts.coming = counts.coming + after.coming - before.coming;
        counts.working = counts.working + after.working - before.working;
        counts.unknown = counts.unknown + after.unknown - before.unknown;
        counts.done = counts.done + after.done - before.done;
    }

    /// Once all that are left have left the generation, the next one meets: all ranks, or as many as
    /// there are when these have been waited for long enough.
    fn assemble(&mut self, now: Seconds) -> Vec<Action> {
        let Counts { ready, working, unknown, .. } = self.counts;
        if self.verdict.is_some() || unknown > 0 {
            return vec![];
        }
        if working > 0 {
            return self.call(now);
        }
        if self.meets().is_none_or(|at| now < at) {
            return vec![];
        }
        let ranks = self.policy.fitting(ready);
        let seats = self.placed(ranks);
        let Phase::Ready(master) = self.members[seats[0].index()].phase else {
            unreachable!("{} was chosen since it is ready", seats[0])
        };
        self.members.iter_mut().for_each(|member| member.rank = None);
        (self.generation, self.ranks) = (self.generation + 1, ranks);
        (self.called, self.patient) = (false, None);
        let generation = self.generation;
        let mut actions = Vec::with_capacity(seats.len());
        for (rank, seat) in (0..).map(Rank).zip(seats) {
            let member = &mut self.members[seat.index()];
            member.rank = Some(rank);
            let incarnation = member.incarnation.unwrap_or_default();
            self.enter(seat, Phase::Working);
            actions.push(Action::Meet { seat, incarnation, rank, ranks, generation, master });
        }
        actions
    }

    /// When those that are ready meet, if nothing is heard before.
    fn meets(&self) -> Option<Seconds> {
        let Counts { ready, working, unknown, .. } = self.counts;
        let ranks = self.policy.fitting(ready);
        if working + unknown > 0 || ranks == 0 {
            return None;
        }
        // Before, others may work on hosts of which nothing was heard yet.
        let alone = self.alone;
        if ranks == self.policy.ranks { Some(alone) } else { Some(self.patient?.max(alone)) }
    }

    /// Who is to be which rank: whoever can stays what it was, since it has that rank's state.
    fn placed(&self, ranks: u32) -> Vec<Seat> {
        let mut places = vec![None; ranks as usize];
        let mut others = Vec::new();
        for (seat, member) in (0..).map(Seat).zip(&self.members) {
            if !matches!(member.phase, Phase::Ready(_)) {
                continue;
            }
            match member.rank.and_then(|rank| places.get_mut(rank.index())) {
                Some(place @ None) => *place = Some(seat),
                _ => others.push(seat),
            }
        }
        let mut others = others.into_iter();
        places.into_iter().filter_map(|place| place.or_else(|| others.next())).collect()
    }

    /// Calls a generation together when there could be more ranks, and nobody else is about to come.
    fn call(&mut self, now: Seconds) -> Vec<Action> {
        let Counts { ready, coming, working, .. } = self.counts;
        // One that has lost somebody comes by itself.
        if self.called || coming > 0 || working < self.ranks {
            return vec![];
        }
        if self.policy.fitting(working + ready) <= working {
            return vec![];
        }
        (self.called, self.patient) = (true, Some(now));
        let call = |(seat, member): (u32, &Member)| {
            let incarnation = member.incarnation.filter(|_| member.phase == Phase::Working)?;
            Some(Action::Call { seat: Seat(seat), incarnation })
        };
        (0..).zip(&self.members).filter_map(call).collect()
    }

    fn ended(&mut self, now: Seconds, seat: Seat, end: End) -> Vec<Action> {
        let is_spare = self.ranks > 0 && self.members[seat.index()].rank.is_none();
        match end {
            End::Failed if is_spare => self.give_up(now, seat, Verdict::Failed(seat)),
            End::Failed => {
                self.enter(seat, Phase::GivenUp);
                self.finish(Verdict::Failed(seat))
            }
            End::Completed => self.completed(now, seat),
            End::Lost => self.lost(now, seat),
        }
    }

    /// A process has done its work; but while another is being replaced, who could help it to end is
    /// started anew.
    fn completed(&mut self, now: Seconds, seat: Seat) -> Vec<Action> {
        self.enter(seat, Phase::Done);
        let is_missed = |member: &Member| match member.phase {
            Phase::Unheard => true,
            Phase::Working | Phase::Done => false,
            _ => member.rank.is_some(),
        };
        if self.members.iter().any(is_missed) {
            return self.start_all_done(now);
        }
        if self.counts.working == 0 { self.finish(Verdict::Completed) } else { vec![] }
    }

    fn lost(&mut self, now: Seconds, seat: Seat) -> Vec<Action> {
        let furthest = self.furthest;
        let Member { incarnation, heard, phase, rank, losses } = self.members[seat.index()];
        let losses = 1 + if losses.1 == furthest { losses.0 } else { 0 };
        self.members[seat.index()].losses = (losses, furthest);
        if let Some(rank) = rank {
            let (silence, killed) = (now - heard, phase == Phase::Killed);
            let incarnation = incarnation.unwrap_or_default();
            self.lost.push(Lost { rank, seat, incarnation, silence, killed });
            self.patient.get_or_insert(now + self.policy.patience);
        }
        if losses > self.policy.restarts {
            return self.give_up(now, seat, Verdict::GaveUp(seat));
        }
        let doubled = 2_f64.powi(losses.min(DOUBLINGS) as i32 - 2);
        let pause = if losses == 1 { 0.0 } else { self.policy.back_off.0 * doubled };
        self.enter(seat, Phase::Down { until: now + Seconds(pause) });
        if rank.is_some() { self.start_all_done(now) } else { self.tick(now) }
    }

    /// A seat is of no use any more; neither is the run, if the others are too few.
    fn give_up(&mut self, now: Seconds, seat: Seat, verdict: Verdict) -> Vec<Action> {
        let is_spare = self.members[seat.index()].rank.is_none();
        self.enter(seat, Phase::GivenUp);
        let others = self.members.iter().filter(|member| member.phase != Phase::GivenUp).count();
        let most = self.policy.fitting(others as u32);
        if most == 0 {
            return self.finish(verdict);
        }
        if is_spare {
            return vec![];
        }
        if most < self.policy.ranks {
            self.patient = Some(now);
        }
        self.start_all_done(now)
    }

    fn start_all_done(&mut self, now: Seconds) -> Vec<Action> {
        for member in self.members.iter_mut().filter(|member| member.phase == Phase::Done) {
            member.phase = Phase::Down { until: now };
        }
        self.counts.done = 0;
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
        for seat in (0..self.members.len() as u32).map(Seat) {
            let member = self.members[seat.index()];
            let silent = |limit: Seconds| now.0 - member.heard.0 >= limit.0;
            match member.phase {
                Phase::Down { until } if now >= until && self.has_host(seat.index()) => {
                    let first = first_of(self.term);
                    let next = |last: u64| (last + 1).max(first + 1);
                    let incarnation = member.incarnation.map_or(first, next);
                    self.enter(seat, Phase::Starting);
                    let member = &mut self.members[seat.index()];
                    (member.incarnation, member.heard) = (Some(incarnation), now);
                    actions.push(Action::Start { seat, incarnation });
                }
                Phase::Starting if silent(self.policy.start) => {
                    actions.push(self.kill(seat, member));
                }
                Phase::Coming | Phase::Ready(_) | Phase::Working if silent(self.policy.silence) => {
                    actions.push(self.kill(seat, member));
                }
                // No fault of the run's: it does not count.
                Phase::Unheard if now >= self.alone => {
                    // Another term has had its first process.
                    self.members[seat.index()].incarnation = Some(first_of(self.term));
                    self.patient.get_or_insert(now + self.policy.patience);
                    self.enter(seat, Phase::Down { until: now });
                    actions.extend(self.start_all_done(now));
                }
                Phase::Killed if now >= self.ended_by_itself(&member) => {
                    actions.extend(self.lost(now, seat));
                }
                _ => {}
            }
        }
        actions
    }

    fn kill(&mut self, seat: Seat, member: Member) -> Action {
        self.enter(seat, Phase::Killed);
        Action::Kill { seat, incarnation: member.incarnation.unwrap_or_default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDRESS: SocketAddr =
        SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 1);

    fn policy(seats_per_host: u32) -> Policy {
        Policy {
            ranks: 4,
            fewer: vec![3, 2],
            patience: Seconds(5.0),
            seats_per_host,
            restarts: 2,
            silence: Seconds(10.0),
            start: Seconds(60.0),
            back_off: Seconds(0.5),
            lease: Seconds(f64::INFINITY),
            fence: Seconds(10.0),
        }
    }

    /// A run on some hosts, whose processes come up as soon as they are started.
    struct Run {
        coordinator: Coordinator,
        now: f64,
    }

    impl Run {
        fn on(hosts: u32, policy: Policy) -> Self {
            let mut run =
                Self { coordinator: Coordinator::new(policy, 0, Seconds::ZERO), now: 0.0 };
            for host in 0..hosts {
                let started = run.hear(Event::Joined { host });
                run.come_up(&started);
            }
            run
        }

        fn hear(&mut self, event: Event) -> Vec<Action> {
            self.coordinator.hear(Seconds(self.now), event)
        }

        fn incarnation(&self, seat: u32) -> u64 {
            self.coordinator.members[seat as usize].incarnation.unwrap()
        }

        fn alive(&mut self, seat: u32, step: u64) -> Vec<Action> {
            let incarnation = self.incarnation(seat);
            let (seat, asked) = (Seat(seat), Seconds::ZERO);
            self.hear(Event::Alive { seat, incarnation, step, asked })
        }

        fn ready(&mut self, seat: u32) -> Vec<Action> {
            let (incarnation, address, step) = (self.incarnation(seat), ADDRESS, 0);
            self.hear(Event::Ready { seat: Seat(seat), incarnation, address, step })
        }

        fn end(&mut self, seat: u32, end: End) -> Vec<Action> {
            let incarnation = self.incarnation(seat);
            self.hear(Event::Ended { seat: Seat(seat), incarnation, end })
        }

        /// What was started becomes ready; what the last has done.
        fn come_up(&mut self, actions: &[Action]) -> Vec<Action> {
            let mut done = vec![];
            for action in actions {
                if let Action::Start { seat, .. } = action {
                    self.alive(seat.0, 0);
                    done = self.ready(seat.0);
                }
            }
            done
        }
    }

    /// Who was told to be which rank, in their order.
    fn met(actions: &[Action]) -> Vec<u32> {
        let mut met = Vec::new();
        for action in actions {
            if let Action::Meet { seat, rank, .. } = action {
                assert_eq!(rank.index(), met.len());
                met.push(seat.0);
            }
        }
        met
    }

    fn started(actions: &[Action]) -> Vec<u32> {
        let seat = |action: &Action| match action {
            Action::Start { seat, .. } => Some(seat.0),
            _ => None,
        };
        actions.iter().filter_map(seat).collect()
    }

    #[test]
    fn a_host_that_never_joined_may_depart() {
        let mut run = Run::on(1, policy(4));
        assert_eq!(run.hear(Event::Departed { host: 1 }), []);
    }

    #[test]
    fn fewer_go_on_only_when_all_have_left_and_the_lost_was_waited_for() {
        let mut run = Run::on(1, policy(4));
        assert_eq!(run.coordinator.ranks, 4);
        run.now = 1.0;
        let again = run.end(1, End::Lost);
        assert_eq!(started(&again), [1]);
        for seat in [0, 2] {
            assert_eq!(met(&run.ready(seat)), [0_u32; 0]);
        }
        // Patience is over, but rank 3 may still be at work.
        run.now = 6.5;
        assert_eq!(run.hear(Event::Tick), []);
        // Who can stays the rank that it was; 3 takes the place of 1.
        assert_eq!(met(&run.ready(3)), [0, 3, 2]);
        // The lost one is there again: all are called, and meet as soon as they have left.
        run.alive(1, 0);
        let called = run.ready(1);
        assert!(called.iter().all(|action| matches!(action, Action::Call { .. })), "{called:?}");
        assert_eq!(called.len(), 3);
        assert_eq!(run.hear(Event::Tick), [], "once is enough");
        run.ready(0);
        run.ready(3);
        assert_eq!(met(&run.ready(2)), [0, 3, 2, 1]);
    }

    #[test]
    fn without_fewer_a_lost_rank_is_waited_for() {
        let waits = Policy { fewer: vec![], patience: Seconds(f64::INFINITY), ..policy(4) };
        let mut run = Run::on(1, waits);
        run.end(1, End::Lost);
        for seat in [0, 2, 3] {
            run.ready(seat);
        }
        run.now = 50.0;
        for seat in [0, 2, 3] {
            run.alive(seat, 0);
        }
        assert_eq!(run.hear(Event::Tick), []);
        run.alive(1, 0);
        assert_eq!(met(&run.ready(1)), [0, 1, 2, 3]);
    }

    #[test]
    fn a_spare_takes_the_place_of_the_lost_at_once() {
        let mut run = Run::on(1, policy(5));
        for seat in [0, 2, 3] {
            run.ready(seat);
        }
        assert_eq!(met(&run.end(1, End::Lost)), [0, 4, 2, 3]);
        // What is started in its place is the next spare, and nobody is called for it.
        run.alive(1, 0);
        assert_eq!(run.ready(1), []);
        // A spare that cannot even start does no harm.
        assert_eq!(run.end(1, End::Failed), []);
        for seat in [0, 4, 2] {
            assert_eq!(run.end(seat, End::Completed), []);
        }
        assert_eq!(run.end(3, End::Completed), [Action::Finish(Verdict::Completed)]);
    }

    #[test]
    fn a_host_that_is_gone_is_done_without_and_comes_back() {
        // The third host is spare.
        let mut run = Run::on(3, policy(2));
        run.hear(Event::Departed { host: 0 });
        run.end(0, End::Lost);
        assert_eq!(started(&run.end(1, End::Lost)), [0_u32; 0], "there is nothing to start it on");
        run.ready(2);
        assert_eq!(met(&run.ready(3)), [4, 5, 2, 3]);
        // Now there is no spare.
        run.now = 8.0;
        run.hear(Event::Departed { host: 1 });
        run.end(2, End::Lost);
        run.end(3, End::Lost);
        run.ready(4);
        assert_eq!(met(&run.ready(5)), [0_u32; 0]);
        assert_eq!(run.coordinator.deadline(), Some(Seconds(13.0)));
        run.now = 13.0;
        assert_eq!(met(&run.hear(Event::Tick)), [4, 5]);
        let again = run.hear(Event::Joined { host: 0 });
        assert_eq!(started(&again), [0, 1]);
        // The first would make three; but the second is about to come.
        run.alive(0, 0);
        run.alive(1, 0);
        assert_eq!(run.ready(0), []);
        assert_eq!(run.ready(1).len(), 2);
    }

    #[test]
    fn whoever_was_not_seen_to_end_is_waited_for_until_it_must_have() {
        let mut run = Run::on(2, policy(2));
        run.now = 1.0;
        // Nothing more is heard of host 1.
        run.hear(Event::Departed { host: 1 });
        run.now = 11.0;
        for seat in [0, 1] {
            run.alive(seat, 0);
        }
        let killed = run.hear(Event::Tick);
        assert_eq!(killed.len(), 2, "{killed:?}");
        run.ready(0);
        run.ready(1);
        // A fence of 10 s on a slow clock is over after 13 s; then patience begins.
        assert_eq!(run.coordinator.deadline(), Some(Seconds(13.0)));
        run.now = 13.0;
        assert_eq!(run.hear(Event::Tick), []);
        run.now = 18.0;
        assert_eq!(met(&run.hear(Event::Tick)), [0, 1]);
    }

    /// Another coordinator's run, taken over, of which the processes of two hosts say that they are ready.
    fn taken_over() -> Run {
        let policy = Policy { silence: Seconds(100.0), lease: Seconds(5.0), ..policy(2) };
        let coordinator = Coordinator::succeed(policy, 1, Seconds::ZERO);
        let mut run = Run { coordinator, now: 0.0 };
        for host in [0, 1] {
            run.hear(Event::Joined { host });
        }
        run.now = 1.0;
        for seat in (0..4).map(Seat) {
            let ready = Event::Ready { seat, incarnation: 0, address: ADDRESS, step: 7 };
            assert_eq!(run.hear(ready), []);
        }
        // A lease of 5 s and a fence of 10 s, on slow clocks.
        run.hear(Event::Confirmed { asked: Seconds(100.0) });
        run
    }

    #[test]
    fn who_takes_over_waits_for_hosts_that_it_has_not_heard_of() {
        let mut run = taken_over();
        assert_eq!(run.coordinator.deadline(), Some(Seconds(19.5)));
        run.now = 19.4;
        assert_eq!(run.hear(Event::Tick), []);
        let mut heard = taken_over();
        run.now = 19.5;
        assert_eq!(met(&run.hear(Event::Tick)), [0, 1, 2, 3]);
        // These four were spare: the generation works on other hosts.
        heard.now = 19.4;
        for seat in (4..8).map(Seat) {
            let asked = Seconds(19.0);
            heard.hear(Event::Alive { seat, incarnation: 0, step: 9, asked });
        }
        heard.now = 20.0;
        assert_eq!(heard.hear(Event::Tick), []);
    }

    #[test]
    fn patience_that_ends_before_a_coordinator_is_alone_is_no_deadline() {
        let mut run = taken_over();
        run.end(3, End::Lost);
        run.now = 6.0;
        assert_eq!(run.hear(Event::Tick), []);
        assert_eq!(run.coordinator.deadline(), Some(Seconds(19.5)));
        run.now = 19.5;
        assert_eq!(met(&run.hear(Event::Tick)), [0, 1, 2]);
    }

    #[test]
    fn a_run_is_given_up_when_too_few_are_left() {
        let patient = Policy { back_off: Seconds::ZERO, ..policy(4) };
        let mut run = Run::on(1, patient);
        for seat in [2, 0, 1] {
            assert_eq!(run.coordinator.verdict(), None);
            assert_eq!(started(&run.end(seat, End::Lost)), [seat]);
            assert_eq!(started(&run.end(seat, End::Lost)), [seat]);
            assert_eq!(started(&run.end(seat, End::Lost)), [0_u32; 0]);
        }
        assert_eq!(run.coordinator.verdict(), Some(Verdict::GaveUp(Seat(1))));
    }
}
