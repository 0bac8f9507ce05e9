//! What there is, and what happens next.

use std::collections::BTreeMap;

use checkpoint::store::simulated::Dice;
use units::{Rank, Seconds};

use super::disk::Checkpoints;
use super::{Bug, Survived};
use crate::control::{Coordinator, Event, Policy, Seat, Verdict};
use crate::copies::{Copies, Holding};

/// Virtual seconds of calm, after the faults, in which a run must come to its end.
const CALM: f64 = 600.0;
/// And events for each rank.
const EVENTS: u64 = 20_000;

/// Which process of a rank: of which start of the run, and which since then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Who {
    pub launch: u64,
    pub incarnation: u64,
}

/// What a run computes: each step mixes what came before with its number and the place in the text.
fn next_state(state: u64, step: u64, position: u64) -> u64 {
    Dice::new(state ^ step.rotate_left(17) ^ position.rotate_left(40)).roll()
}

/// Where a rank is in its history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct State {
    pub step: u64,
    /// Sequences trained on.
    pub position: u64,
    pub value: u64,
}

/// Sequences of a step.
const BATCH: u64 = 8;

impl State {
    pub const START: Self = Self { step: 0, position: 0, value: 7 };

    pub fn next(self) -> Self {
        let (step, position) = (self.step + 1, self.position + BATCH);
        Self { step, position, value: next_state(self.value, step, position) }
    }
}

/// What a seed decides before anything happens.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    pub ranks: u32,
    pub seats_per_host: u32,
    pub hosts: u32,
    /// With how many ranks it can go on: all multiples of this; none if 0.
    pub divisor: u32,
    /// How long it waits before it does, in virtual seconds.
    pub patience: f64,
    /// Hosts may be gone for long.
    pub hosts_leave: bool,
    pub steps: u64,
    pub copy_every: u64,
    pub save_every: u64,
    /// Virtual seconds during which there are faults, and between two of them.
    pub faulty: f64,
    pub pause: f64,
    /// Which faults there are, a bit for each.
    pub faults: u64,
    /// Whether somebody stands by to take the launcher's place.
    pub standby: bool,
}

impl Plan {
    fn new(dice: &mut Dice) -> Self {
        let ranks = match dice.below(1000) {
            0 => 65 + dice.below(448),
            1..20 => 9 + dice.below(56),
            _ => 2 + dice.below(7),
        };
        let (ranks, seats_per_host) = (ranks as u32, 1 << dice.below(4));
        let divisor = if dice.one_in(3) { 1 + dice.below(2) as u32 } else { 0 };
        // Long enough for ranks to come back.
        let more = if divisor > 0 && ranks < 9 { dice.below(200) } else { 0 };
        Self {
            ranks,
            seats_per_host,
            hosts: ranks.div_ceil(seats_per_host) + u32::from(dice.one_in(4)),
            divisor,
            patience: dice.below(3) as f64,
            hosts_leave: dice.one_in(3),
            steps: 20 + dice.below(30) + more,
            copy_every: 1 + dice.below(2) * dice.below(3),
            save_every: dice.below(2) * (3 + dice.below(10)),
            faulty: 5.0 + dice.below(30) as f64,
            pause: 0.3 + dice.below(50) as f64 * 0.1,
            faults: dice.roll() | 1,
            standby: dice.one_in(2),
        }
    }

    pub fn seats(&self) -> u32 {
        self.hosts * self.seats_per_host
    }

    /// Whether processes end by themselves when nobody grants them time.
    pub fn fenced(&self) -> bool {
        self.standby || self.hosts_leave
    }

    pub fn host(&self, seat: Seat) -> usize {
        (seat.0 / self.seats_per_host) as usize
    }
}

/// A process of a rank.
#[derive(Debug, Clone)]
pub struct Process {
    pub who: Who,
    pub alive: bool,
    /// Alive, and does nothing.
    pub halted: bool,
    /// What it will do first when it goes on.
    pub waiting: Vec<Doing>,
    /// It has lost its launcher, and nobody has taken over.
    pub orphaned: bool,
    /// Whose words it follows: the coordinator of this term.
    pub term: u64,
    /// Until when it may go on, as far as it was told.
    pub granted: f64,
    /// It looks for another coordinator.
    pub seeks: bool,
    /// It was told to leave its generation after the step at hand.
    pub called: bool,
    /// When its last save so far is written.
    pub writes: f64,
    /// The generation it works in, if it does.
    pub generation: Option<u64>,
    /// Which rank of that it is, or was of the last.
    pub rank: Rank,
    pub state: State,
    pub copies: Copies<State>,
    /// A copy that it is sending, and those that have come but are not kept yet, oldest first.
    pub sending: Option<State>,
    pub arrived: Vec<(Holding, State)>,
}

impl Process {
    pub fn new(who: Who, term: u64) -> Self {
        Self {
            who,
            alive: true,
            halted: false,
            waiting: vec![],
            orphaned: false,
            term,
            granted: f64::INFINITY,
            seeks: false,
            called: false,
            writes: 0.0,
            generation: None,
            rank: Rank(0),
            state: State::START,
            copies: Copies::default(),
            sending: None,
            arrived: vec![],
        }
    }
}

/// The ranks that work together, or try to meet.
#[derive(Debug, Clone, Default)]
pub struct Generation {
    pub number: u64,
    /// Who is which rank, as far as they have come.
    pub seats: Vec<Option<Seat>>,
    /// Ranks that have come.
    pub met: u32,
    /// It has begun to train.
    pub works: bool,
    /// With these processes.
    pub began: Vec<(Seat, Who)>,
    /// Somebody is missing.
    pub broken: bool,
    /// Ranks that have come to the exchange of the step at hand.
    pub reached: u32,
    /// After this step all save and stop.
    pub last: Option<u64>,
    /// After this step all leave, to meet with more.
    pub parts: Option<u64>,
    /// A part of the checkpoint of this step could not be written.
    pub unsaved: Option<u64>,
}

impl Generation {
    pub fn ranks(&self) -> u32 {
        self.seats.len() as u32
    }
}

/// What happens to a process.
#[derive(Debug, Clone, Copy)]
pub enum Doing {
    /// It begins to run.
    Up,
    /// It says that it lives.
    Beat,
    /// The coordinator of a term tells it to meet the others.
    Meet { term: u64, number: u64, rank: Rank, ranks: u32 },
    /// The coordinator of a term tells it to leave after the step at hand.
    Called(u64),
    /// The coordinator of a term lets it go on until then.
    Granted { term: u64, until: f64 },
    /// It looks whether somebody has taken over.
    Seek,
    /// It has waited for them in vain, or lost them.
    Fail(u64),
    /// It has computed its part of a step.
    Reach(u64),
    /// It has updated its part.
    Done(u64),
    /// It has seen that the coordinator of a term is gone.
    Orphaned(u64),
    /// It is killed by the coordinator.
    Killed,
    /// As which rank of how many it writes its part of a checkpoint.
    Write { generation: u64, place: (Rank, u32), state: State },
    /// Rank 0 looks whether all have written theirs.
    Commit { generation: u64, state: State },
}

#[derive(Debug, Clone, Copy)]
pub enum Happening {
    /// The coordinator of a term hears a word.
    Hear { launch: u64, term: u64, event: Event },
    /// It looks whether another has taken over.
    Confirm { launch: u64, term: u64 },
    /// Somebody takes over from the coordinator of a term.
    Succeed { launch: u64, term: u64 },
    /// To a process.
    To { seat: Seat, who: Who, doing: Doing },
    /// All of a generation have met.
    Begin(u64),
    /// All of a generation have reached the exchange of a step.
    Exchange(u64),
    /// Something bad.
    Fault,
    /// A halted rank goes on.
    Wake(Seat),
    /// A host is there again.
    Return(u32),
    /// The run is started again.
    Launch,
}

/// A coordinator.
pub struct Office {
    pub coordinator: Coordinator,
    /// How fast its clock goes, and what it shows at the start.
    pub clock: (f64, f64),
    /// When it will be asked for the time.
    pub ticking: f64,
    pub alive: bool,
    /// Until when it cannot see whether another has taken over.
    pub cut: f64,
}

pub struct World {
    pub now: f64,
    pub dice: Dice,
    pub plan: Plan,
    pub bug: Option<Bug>,
    order: u64,
    agenda: BTreeMap<(u64, u64), Happening>,
    pub launch: u64,
    /// Who has coordinated since then, by term.
    pub offices: Vec<Office>,
    pub processes: Vec<Process>,
    pub generation: Generation,
    /// Who worked in the one before.
    pub before: Vec<(Seat, Who)>,
    /// Whether each host is there.
    pub hosts: Vec<bool>,
    /// Since when nothing bad has happened.
    pub calm: f64,
    /// By rank: when its last words arrive at the coordinator, and the coordinator's at it.
    pub heard: Vec<[f64; 2]>,
    /// By host: until when its words to the coordinator, and those to it, are held up.
    pub held: Vec<[f64; 2]>,
    /// Until when hosts do not hear each other.
    pub cut: f64,
    pub checkpoints: Checkpoints,
    /// The undisturbed run, by step.
    pub right: Vec<State>,
    /// The most steps that any rank has done, since the run was last started.
    pub furthest: u64,
    /// And since ranks last began anew.
    pub done: u64,
    pub survived: Survived,
    pub verdict: Option<Verdict>,
}

/// How long a coordinator decides by itself, and a process goes on, in seconds.
pub const LEASE: f64 = 3.0;
pub const FENCE: f64 = 6.0;

pub fn policy(plan: &Plan) -> Policy {
    let time = |limit, limited| Seconds(if limited { limit } else { f64::INFINITY });
    let fits = |ranks: &u32| plan.divisor > 0 && ranks.is_multiple_of(plan.divisor);
    Policy {
        ranks: plan.ranks,
        fewer: (1..plan.ranks).rev().filter(fits).collect(),
        patience: time(plan.patience, plan.divisor > 0),
        seats_per_host: plan.seats_per_host,
        lease: time(LEASE, plan.standby),
        fence: time(FENCE, plan.fenced()),
        restarts: 1000,
        silence: Seconds(3.0),
        start: Seconds(10.0),
        back_off: Seconds(0.05),
    }
}

impl World {
    pub fn new(seed: u64, bug: Option<Bug>) -> Self {
        let mut dice = Dice::new(seed);
        let plan = Plan::new(&mut dice);
        let next = |state: &State| Some(state.next());
        let right = std::iter::successors(Some(State::START), next);
        let mut world = Self {
            now: 0.0,
            dice,
            plan,
            bug,
            order: 0,
            agenda: BTreeMap::new(),
            launch: 0,
            offices: vec![],
            processes: vec![],
            generation: Generation::default(),
            before: vec![],
            hosts: vec![true; plan.hosts as usize],
            calm: 0.0,
            heard: vec![],
            held: vec![[0.0; 2]; plan.hosts as usize],
            cut: 0.0,
            checkpoints: Checkpoints::new(bug),
            right: right.take(plan.steps as usize + 1).collect(),
            furthest: 0,
            done: 0,
            survived: Survived { ranks: plan.ranks, steps: plan.steps, ..Survived::default() },
            verdict: None,
        };
        world.after(0.0, Happening::Launch);
        world.after(plan.pause, Happening::Fault);
        world
    }

    /// Something happens after some virtual seconds.
    pub fn after(&mut self, delay: f64, happening: Happening) {
        self.order += 1;
        let at = ((self.now + delay) * 1e6) as u64;
        self.agenda.insert((at, self.order), happening);
    }

    /// Something happens to a process, unless it is another by then.
    pub fn to(&mut self, delay: f64, seat: Seat, doing: Doing) {
        let who = self.processes[seat.index()].who;
        self.after(delay, Happening::To { seat, who, doing });
    }

    /// A time of the network or the machine, in seconds: mostly short, sometimes long.
    pub fn delay(&mut self) -> f64 {
        let long = self.dice.one_in(20);
        (1 + self.dice.below(if long { 800 } else { 10 })) as f64 * 1e-3
    }

    pub fn seats(&self) -> impl Iterator<Item = Seat> + use<> {
        (0..self.plan.seats()).map(Seat)
    }

    pub fn process(&mut self, seat: Seat) -> &mut Process {
        &mut self.processes[seat.index()]
    }

    /// Runs until the end; what was violated, if anything.
    pub fn run(mut self) -> Result<Survived, String> {
        self.go().map_err(|violation| format!("after {:.3} s: {violation}", self.now))?;
        self.checkpoints.check(&self.right)?;
        self.survived.time = Seconds(self.now);
        Ok(self.survived)
    }

    fn go(&mut self) -> Result<(), String> {
        let most = self.order + EVENTS * u64::from(self.plan.seats());
        while let Some(((at, _), happening)) = self.agenda.pop_first() {
            self.now = at as f64 * 1e-6;
            if self.now > self.plan.faulty + CALM || self.order > most {
                return Err("the run has not ended, long after the last fault".to_owned());
            }
            self.happen(happening)?;
            match self.verdict {
                Some(Verdict::Completed) => return Ok(()),
                Some(verdict) => return Err(format!("{verdict:?}")),
                None => {}
            }
        }
        Err("nothing happens any more".to_owned())
    }

    fn happen(&mut self, happening: Happening) -> Result<(), String> {
        match happening {
            Happening::Hear { launch, term, event } if launch == self.launch => {
                return self.hear(term, event);
            }
            Happening::Confirm { launch, term } if launch == self.launch => self.confirm(term),
            Happening::Succeed { launch, term } if launch == self.launch => self.succeed(term),
            Happening::Hear { .. } | Happening::Confirm { .. } | Happening::Succeed { .. } => {}
            Happening::To { seat, who, doing } => return self.do_to(seat, who, doing),
            Happening::Begin(generation) => return self.begin(generation),
            Happening::Exchange(generation) => self.exchange(generation),
            Happening::Fault => self.fault(),
            Happening::Wake(seat) => self.wake(seat),
            Happening::Return(host) => self.host_returns(host),
            Happening::Launch => return self.launch(),
        }
        Ok(())
    }
}
