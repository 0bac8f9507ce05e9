//! Every rank with a time of its own.
//!
//! The ranks of a class go through their list together, instruction by instruction, each with its
//! own time: a computation adds to it, and who waits for a transfer has at least the time at which
//! it is complete, which is the time of the last of its members plus what it takes. No order of
//! events is needed, only that a class which waits for another is taken on after it. What a
//! transfer takes where it shares wires, and a computation that transfers slow down, is taken from
//! the folded simulation of the same step.

use program::{Axis, Breakdown};
use units::{Rank, Seconds};

use super::Times;
use super::disturbance::{Disturbance, Pause, normal};
use super::folded::Durations;
use super::script::{NONE, Op, Script};
use crate::Error;

/// What a class does at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Ready,
    /// Until the transfer of this party is known.
    Waiting(u32),
    Done,
}

/// The ranks of a class.
#[derive(Debug)]
struct Class {
    next: usize,
    state: State,
    /// How far each rank is.
    times: Vec<f64>,
    /// How much slower than its costs each rank computes.
    factors: Vec<f64>,
    /// Parties that have posted and that not every rank has waited for.
    open: Vec<u32>,
    pauses: Vec<Pause>,
    bubble: f64,
    exposed: [f64; Axis::ALL.len()],
}

/// A transfer that a party has posted and not all have waited for; times by group.
#[derive(Debug, Default)]
struct Slot {
    posted: u32,
    /// Parties that may still wait for it.
    left: u32,
    /// When the last member had posted.
    met: Vec<f64>,
    /// When the streams are free for it; when it is complete, once all parties have posted.
    done: Vec<f64>,
    /// The slowest link of its members.
    link: Vec<f64>,
    complete: bool,
}

/// The groups along an axis: of each rank of a class the number of its group.
#[derive(Debug, Default)]
struct Groups {
    of: Vec<u32>,
    count: usize,
    /// By class: the slowest link of each group's members there.
    links: Vec<Vec<f64>>,
}

/// A step of all ranks under way.
pub(crate) struct Unfolded<'s> {
    script: &'s Script,
    durations: &'s Durations,
    disturbance: &'s Disturbance,
    /// Ranks of a class.
    ranks: usize,
    classes: Vec<Class>,
    groups: Vec<Groups>,
    /// By stream: when it is free, by group.
    free: Vec<Vec<f64>>,
    /// By meeting; its place in `slots`.
    places: Vec<u32>,
    slots: Vec<Slot>,
    unused: Vec<u32>,
    runnable: Vec<u32>,
    /// By [`Script::costs`], summed over ranks.
    computed: Vec<f64>,
    end: f64,
}

impl<'s> Unfolded<'s> {
    pub(crate) fn new(
        script: &'s Script,
        durations: &'s Durations,
        disturbance: &'s Disturbance,
    ) -> Self {
        let (mesh, count) = (&script.mesh, script.ops.len());
        let ranks = mesh.stage_ranks() as usize;
        let rank = |class: usize, index: usize| Rank(script.representative(class).0 + index as u32);
        let class = |class| Class {
            next: 0,
            state: State::Ready,
            times: vec![0.0; ranks],
            factors: (0..ranks).map(|index| disturbance.of_rank(rank(class, index))).collect(),
            open: Vec::new(),
            pauses: of_class(&disturbance.pauses, rank(class, 0), ranks),
            bubble: 0.0,
            exposed: [0.0; Axis::ALL.len()],
        };
        Self {
            script,
            durations,
            disturbance,
            ranks,
            classes: (0..count).map(class).collect(),
            groups: Axis::ALL.map(|axis| Groups::new(script, disturbance, axis)).into(),
            free: vec![Vec::new(); script.streams.len()],
            places: vec![NONE; script.meetings.len()],
            slots: Vec::new(),
            unused: Vec::new(),
            runnable: (0..count as u32).rev().collect(),
            computed: vec![0.0; script.costs.len()],
            end: 0.0,
        }
    }

    /// Runs the step.
    pub(crate) fn run(mut self) -> Result<Times, Error> {
        while let Some(class) = self.runnable.pop() {
            self.go_on(class as usize);
        }
        if let Some(class) = self.classes.iter().position(|class| class.state != State::Done) {
            return Err(self.stuck(class));
        }
        let times = self.classes.iter().flat_map(|class| &class.times);
        self.end = times.fold(self.end, |end, time| end.max(*time));
        let classes = (0..self.classes.len()).map(|class| self.breakdown(class)).collect();
        Ok(Times { step_time: Seconds(self.end), classes })
    }

    /// Takes a class as far as it gets without another.
    fn go_on(&mut self, class: usize) {
        let script = self.script;
        self.classes[class].state = State::Ready;
        while let Some(op) = script.ops[class].get(self.classes[class].next) {
            match *op {
                Op::Nothing => {}
                Op::Compute(cost) => self.compute(class, cost),
                Op::Post(party) => {
                    if let Some(unknown) = self.window(class) {
                        self.classes[class].state = State::Waiting(unknown);
                        return;
                    }
                    self.post(class, party);
                }
                Op::Wait(party) => {
                    if self.is_unknown(party) {
                        self.classes[class].state = State::Waiting(party);
                        return;
                    }
                    self.wait(class, party);
                }
            }
            self.classes[class].next += 1;
        }
        self.classes[class].state = State::Done;
    }

    fn compute(&mut self, class: usize, cost: u32) {
        let state = &mut self.classes[class];
        let slowed = self.durations.slowed.get(class).map(|times| times[state.next]);
        let time = slowed.unwrap_or(self.script.costs[cost as usize].time);
        let before = state.paused_at();
        let mut sum = 0.0;
        if self.disturbance.jitter > 0.0 {
            let jitter = self.disturbance.jitter;
            let stream = self.disturbance.stream((class as u64) << 32 | state.next as u64);
            let ranks = 0_u32..;
            for ((at, factor), rank) in state.times.iter_mut().zip(&state.factors).zip(ranks) {
                let taken = time * factor * (1.0 + jitter * normal(stream, rank));
                *at += taken;
                sum += taken;
            }
        } else {
            for (at, factor) in state.times.iter_mut().zip(&state.factors) {
                *at += time * factor;
                sum += time * factor;
            }
        }
        self.computed[cost as usize] += sum;
        for (pause, before) in state.pauses.iter().zip(before) {
            let at = &mut state.times[pause.rank.index()];
            if (before..*at).contains(&pause.at.0) {
                *at += pause.lasts.0;
                self.computed[cost as usize] += pause.lasts.0;
            }
        }
    }

    fn is_unknown(&self, party: u32) -> bool {
        let meeting = self.script.parties[party as usize].meeting;
        let place = self.places[meeting as usize];
        self.slots.get(place as usize).is_some_and(|slot| !slot.complete)
    }

    /// The members of a class post their parts of a transfer.
    fn post(&mut self, class: usize, number: u32) {
        let party = &self.script.parties[number as usize];
        let meeting = party.meeting as usize;
        let groups = &self.groups[party.axis as usize];
        let place = match self.places[meeting] {
            NONE => self.unused.pop().unwrap_or_else(|| {
                self.slots.push(Slot::default());
                self.slots.len() as u32 - 1
            }),
            place => place,
        };
        let slot = &mut self.slots[place as usize];
        if self.places[meeting] == NONE {
            self.places[meeting] = place;
            slot.begin(groups.count, self.script.meetings[meeting].parties);
        }
        slot.posted += 1;
        for (group, time) in groups.of.iter().zip(&self.classes[class].times) {
            let met = &mut slot.met[*group as usize];
            *met = met.max(*time);
        }
        for (done, free) in slot.done.iter_mut().zip(&self.free[party.stream as usize]) {
            *done = done.max(*free);
        }
        for (slowest, link) in slot.link.iter_mut().zip(&groups.links[class]) {
            *slowest = slowest.max(*link);
        }
        self.classes[class].open.push(number);
        if slot.posted == self.script.meetings[meeting].parties {
            self.complete(meeting);
        }
    }

    /// All parties of a transfer have posted: when it is complete is known.
    fn complete(&mut self, meeting: usize) {
        let slot = &mut self.slots[self.places[meeting] as usize];
        let time = self.durations.meetings[meeting];
        for ((done, met), link) in slot.done.iter_mut().zip(&slot.met).zip(&slot.link) {
            *done = done.max(*met) + time * link;
            self.end = self.end.max(*done);
        }
        slot.complete = true;
        for (number, party) in self.script.parties_of(meeting) {
            self.free[party.stream as usize].clone_from(&slot.done);
            let class = &mut self.classes[party.class as usize];
            if class.state == State::Waiting(number) {
                class.state = State::Ready;
                self.runnable.push(party.class);
            }
        }
    }

    fn wait(&mut self, class: usize, number: u32) {
        let party = &self.script.parties[number as usize];
        let place = self.places[party.meeting as usize];
        let Some(slot) = self.slots.get(place as usize) else {
            return;
        };
        let state = &mut self.classes[class];
        let before = state.paused_at();
        let (mut bubble, mut exposed) = (0.0, 0.0);
        for (group, time) in self.groups[party.axis as usize].of.iter().zip(&mut state.times) {
            let (met, done) = (slot.met[*group as usize], slot.done[*group as usize]);
            let split = met.min(done).max(*time);
            bubble += split - *time;
            let end = done.max(split);
            exposed += end - split;
            *time = end;
        }
        state.bubble += bubble;
        state.exposed[party.axis as usize] += exposed;
        for (pause, before) in state.pauses.iter().zip(before) {
            let at = &mut state.times[pause.rank.index()];
            if (before..*at).contains(&pause.at.0) {
                let end = at.max(pause.at.0 + pause.lasts.0);
                state.bubble += end - *at;
                *at = end;
            }
        }
        self.close(class, number);
    }

    /// A class is done with a transfer.
    fn close(&mut self, class: usize, number: u32) {
        let open = &mut self.classes[class].open;
        let Some(index) = open.iter().position(|open| *open == number) else {
            return;
        };
        open.remove(index);
        let meeting = self.script.parties[number as usize].meeting as usize;
        let place = self.places[meeting];
        let slot = &mut self.slots[place as usize];
        slot.left -= 1;
        if slot.left == 0 {
            self.places[meeting] = NONE;
            self.unused.push(place);
        }
    }

    /// Holds up the ranks of a class that have too many transfers under way to post another; tells
    /// the transfer that must first be known, if there is one.
    fn window(&mut self, class: usize) -> Option<u32> {
        if self.classes[class].open.len() < self.script.in_flight {
            return None;
        }
        self.close_past(class);
        let open = std::mem::take(&mut self.classes[class].open);
        let unknown = open.iter().copied().find(|party| self.is_unknown(*party));
        if open.len() >= self.script.in_flight && unknown.is_none() {
            self.hold_up(class, &open);
        }
        let full = open.len() >= self.script.in_flight;
        self.classes[class].open = open;
        unknown.filter(|_| full)
    }

    /// Closes what is over for all ranks of a class. Its waits will find it closed.
    fn close_past(&mut self, class: usize) {
        let open = self.classes[class].open.clone();
        for number in open {
            let party = &self.script.parties[number as usize];
            let slot = &self.slots[self.places[party.meeting as usize] as usize];
            let groups = &self.groups[party.axis as usize].of;
            let mut members = groups.iter().zip(&self.classes[class].times);
            if slot.complete && members.all(|(group, time)| slot.done[*group as usize] <= *time) {
                self.close(class, number);
            }
        }
    }

    /// Each rank goes on when fewer than the limit of `open` are under way. It is held up by the
    /// oldest of them.
    fn hold_up(&mut self, class: usize, open: &[u32]) {
        let mut ends: Vec<f64> = Vec::with_capacity(open.len());
        for index in 0..self.ranks {
            let now = self.classes[class].times[index];
            ends.clear();
            let mut oldest = None;
            for number in open {
                let party = &self.script.parties[*number as usize];
                let slot = &self.slots[self.places[party.meeting as usize] as usize];
                let group = self.groups[party.axis as usize].of[index] as usize;
                if slot.done[group] > now {
                    ends.push(slot.done[group]);
                    oldest.get_or_insert((party.axis, slot.met[group]));
                }
            }
            if let Some((axis, met)) = oldest.filter(|_| ends.len() >= self.script.in_flight) {
                ends.sort_by(f64::total_cmp);
                let end = ends[ends.len() - self.script.in_flight];
                let class = &mut self.classes[class];
                let split = met.clamp(now, end);
                class.bubble += split - now;
                class.exposed[axis as usize] += end - split;
                class.times[index] = end;
            }
        }
    }

    fn breakdown(&self, class: usize) -> Breakdown {
        let state = &self.classes[class];
        let mean = |sum: f64| Seconds(sum / self.ranks as f64);
        let mut breakdown = Breakdown { bubble: mean(state.bubble), ..Breakdown::default() };
        for (cost, sum) in self.script.costs.iter().zip(&self.computed) {
            if cost.class as usize == class {
                breakdown.compute += mean(*sum);
                *breakdown.work.entry(cost.work).or_default() += mean(*sum);
            }
        }
        for axis in Axis::ALL {
            if self.script.parties.iter().any(|p| (p.axis, p.class) == (axis, class as u32)) {
                breakdown.exposed.insert(axis, mean(state.exposed[axis as usize]));
            }
        }
        breakdown.other = breakdown.rest_of(Seconds(self.end));
        breakdown
    }

    fn stuck(&self, class: usize) -> Error {
        let State::Waiting(party) = self.classes[class].state else {
            unreachable!("what is not done waits");
        };
        let (rank, index) = (self.script.representative(class), self.classes[class].next);
        let ticket = self.script.parties[party as usize].ticket;
        Error::Stuck { blocked: vec![format!("{rank} at instruction {index} for {ticket}")] }
    }
}

impl Class {
    /// The times of the ranks that are to pause.
    fn paused_at(&self) -> Vec<f64> {
        self.pauses.iter().map(|pause| self.times[pause.rank.index()]).collect()
    }
}

impl Slot {
    fn begin(&mut self, groups: usize, parties: u32) {
        for (times, value) in [(&mut self.met, 0.0), (&mut self.done, 0.0), (&mut self.link, 0.0)] {
            times.clear();
            times.resize(groups, value);
        }
        (self.posted, self.left, self.complete) = (0, parties, false);
    }
}

impl Groups {
    /// Members of a group have one leader, whose place in its class numbers the group.
    fn new(script: &Script, disturbance: &Disturbance, axis: Axis) -> Self {
        let mesh = &script.mesh;
        let ranks = mesh.stage_ranks();
        let mut numbers = vec![NONE; ranks as usize];
        let mut count = 0;
        let of: Vec<u32> = (0..ranks)
            .map(|rank| {
                let number = &mut numbers[(mesh.leader(Rank(rank), axis).0 % ranks) as usize];
                if *number == NONE {
                    *number = count;
                    count += 1;
                }
                *number
            })
            .collect();
        let links = |class| {
            let mut links = vec![0.0_f64; count as usize];
            for (group, rank) in of.iter().zip(script.representative(class).0..) {
                let link = &mut links[*group as usize];
                *link = link.max(disturbance.of_link(Rank(rank)));
            }
            links
        };
        let links = (0..script.ops.len()).map(links).collect();
        Self { of, count: count as usize, links }
    }
}

/// The pauses of the ranks from `first` on, numbered from it.
fn of_class(pauses: &[Pause], first: Rank, ranks: usize) -> Vec<Pause> {
    let mine = pauses
        .iter()
        .filter(|pause| (first.index()..first.index() + ranks).contains(&pause.rank.index()));
    mine.map(|pause| Pause { rank: Rank(pause.rank.0 - first.0), ..*pause }).collect()
}
