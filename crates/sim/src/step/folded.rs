//! One rank of each class in virtual time, from event to event.

use program::{Lane, Span, Trace};
use units::Seconds;

use super::Times;
use super::clock::Clock;
use super::script::{Op, Script};
use super::sums::Sums;
use super::wires::Wires;
use crate::Error;

/// What a class does at the moment.
#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    /// It goes on with the instruction it stands at.
    Ready,
    /// Its compute stream is busy with that instruction.
    Computing,
    /// That instruction has been held up by this party's transfer since then.
    Blocked { party: u32, since: f64 },
    /// Its list is at its end.
    Done,
}

#[derive(Debug)]
struct Class {
    next: usize,
    state: State,
    /// Transfers posted and not complete.
    under_way: usize,
    /// No party before this one is posted and not complete.
    oldest: u32,
    /// When the computation under way began.
    began: f64,
    /// What was left of it at `since`, if nothing slowed it down.
    left: f64,
    since: f64,
    /// Sum of the slowdowns of transfers under way, and how many there are.
    slowdown: f64,
    slowing: u32,
}

impl Class {
    /// How much longer computing takes than alone.
    fn stretch(&self) -> f64 {
        1.0 + self.slowdown
    }
}

/// How far a meeting is.
#[derive(Debug, Clone, Copy)]
struct Meeting {
    posted: u32,
    /// Parties that have posted and whose stream is free for it.
    ready: u32,
    /// When the last party had posted.
    met: f64,
    started: f64,
    on_wire: bool,
}

/// How far a party is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    Ahead,
    Posted,
    Complete,
}

/// How long things took where transfers shared wires and slowed computation down.
#[derive(Debug, Default)]
pub(crate) struct Durations {
    /// Of each meeting, from when its streams were free.
    pub(crate) meetings: Vec<f64>,
    /// Of each computation by class and instruction, if transfers slow computation down at all.
    pub(crate) slowed: Vec<Vec<f64>>,
}

/// A step under way.
pub(crate) struct Folded<'s> {
    script: &'s Script,
    classes: Vec<Class>,
    now: f64,
    /// Slots: the classes' compute streams, then the streams of transfers.
    clock: Clock,
    wires: Wires<'s>,
    meetings: Vec<Meeting>,
    standing: Vec<Standing>,
    posted_at: Vec<f64>,
    /// The party at the head of each stream.
    heads: Vec<u32>,
    runnable: Vec<u32>,
    sums: Vec<Sums>,
    /// By [`Script::costs`].
    computed: Vec<f64>,
    pub(crate) durations: Durations,
    spans: Option<Vec<Span>>,
}

impl<'s> Folded<'s> {
    /// At the start of the step; `traced` keeps a span of everything that happens.
    pub(crate) fn new(script: &'s Script, traced: bool) -> Self {
        let class = |oldest: &u32| Class {
            next: 0,
            state: State::Ready,
            under_way: 0,
            oldest: *oldest,
            began: 0.0,
            left: 0.0,
            since: 0.0,
            slowdown: 0.0,
            slowing: 0,
        };
        let ahead =
            Meeting { posted: 0, ready: 0, met: f64::INFINITY, started: 0.0, on_wire: false };
        let (count, streams) = (script.ops.len(), script.streams.len());
        Self {
            script,
            classes: script.first_parties.iter().map(class).collect(),
            now: 0.0,
            clock: Clock::new(count + streams),
            wires: Wires::new(script, streams),
            meetings: vec![ahead; script.meetings.len()],
            standing: vec![Standing::Ahead; script.parties.len()],
            posted_at: vec![0.0; script.parties.len()],
            heads: script.streams.clone(),
            runnable: (0..count as u32).rev().collect(),
            sums: vec![Sums::default(); count],
            computed: vec![0.0; script.costs.len()],
            durations: Durations {
                meetings: vec![0.0; script.meetings.len()],
                slowed: slowed(script),
            },
            spans: traced.then(Vec::new),
        }
    }

    /// Runs the step and says how long it took.
    pub(crate) fn run(&mut self) -> Result<f64, Error> {
        loop {
            while let Some(class) = self.runnable.pop() {
                self.go_on(class as usize);
            }
            let (slot, at) = self.clock.take();
            if at == f64::INFINITY {
                break;
            }
            // Rounding may put an event a hair before now; it then happens now.
            self.now = self.now.max(at);
            match slot.checked_sub(self.classes.len()) {
                None => self.computed(slot),
                Some(stream) => self.moved(stream),
            }
        }
        self.check_done()?;
        Ok(self.now)
    }

    /// Where the time went, after a run.
    pub(crate) fn times(&self, step_time: f64) -> Times {
        let breakdown = |(class, sums): (usize, &Sums)| {
            sums.breakdown(self.script, class, &self.computed, step_time)
        };
        let classes = self.sums.iter().enumerate().map(breakdown).collect();
        Times { step_time: Seconds(step_time), classes }
    }

    /// The spans of one rank of each class, if they were asked for.
    pub(crate) fn into_trace(self) -> Trace {
        Trace { spans: self.spans.unwrap_or_default() }
    }

    /// How long things took, after a run.
    pub(crate) fn into_durations(self) -> Durations {
        self.durations
    }

    /// Takes a class as far as it gets without time passing.
    fn go_on(&mut self, class: usize) {
        let script = self.script;
        let ops = &script.ops[class];
        self.end_wait(class);
        while let Some(op) = ops.get(self.classes[class].next) {
            match *op {
                Op::Nothing => {}
                Op::Compute(cost) => {
                    let time = script.costs[cost as usize].time;
                    if time > 0.0 {
                        return self.compute(class, time);
                    }
                    self.record(class, self.classes[class].next, Lane::Compute, self.now);
                }
                Op::Post(_) if self.classes[class].under_way >= script.in_flight => {
                    let oldest = self.oldest(class);
                    return self.block(class, oldest);
                }
                Op::Post(party) => self.post(class, party),
                Op::Wait(party) => {
                    if self.standing[party as usize] != Standing::Complete {
                        return self.block(class, party);
                    }
                }
            }
            self.classes[class].next += 1;
        }
        self.classes[class].state = State::Done;
    }

    // Computing.

    fn compute(&mut self, class: usize, time: f64) {
        let now = self.now;
        let state = &mut self.classes[class];
        state.state = State::Computing;
        (state.began, state.since, state.left) = (now, now, time);
        self.clock.set(class, now + time * state.stretch());
    }

    /// The computation that a class was at is done.
    fn computed(&mut self, class: usize) {
        let state = &mut self.classes[class];
        let (began, index) = (state.began, state.next);
        state.state = State::Ready;
        state.next += 1;
        if let Op::Compute(cost) = self.script.ops[class][index] {
            let time = self.now - began;
            self.computed[cost as usize] += time;
            if let Some(slowed) = self.durations.slowed.get_mut(class) {
                slowed[index] = time;
            }
        }
        self.record(class, index, Lane::Compute, began);
        self.go_on(class);
    }

    /// Transfers under way on a class slow its computing down by `change` more, or less.
    fn slow_down(&mut self, class: usize, change: f64) {
        let state = &mut self.classes[class];
        state.left -= (self.now - state.since) / state.stretch();
        state.since = self.now;
        if change > 0.0 {
            state.slowing += 1;
        } else {
            state.slowing -= 1;
        }
        // Nothing is left by rounding when nothing is under way.
        state.slowdown = if state.slowing == 0 { 0.0 } else { state.slowdown + change };
        if state.state == State::Computing {
            self.clock.set(class, self.now + state.left.max(0.0) * state.stretch());
        }
    }

    // Waiting.

    fn block(&mut self, class: usize, party: u32) {
        self.classes[class].state = State::Blocked { party, since: self.now };
    }

    fn end_wait(&mut self, class: usize) {
        let State::Blocked { party, since } = self.classes[class].state else {
            return;
        };
        self.classes[class].state = State::Ready;
        if since < self.now {
            let party = &self.script.parties[party as usize];
            let met = self.meetings[party.meeting as usize].met;
            self.sums[class].waited(party.axis, since, met, self.now);
            self.record(class, self.classes[class].next, Lane::Wait, since);
        }
    }

    /// What a post in a full window waits for.
    fn oldest(&mut self, class: usize) -> u32 {
        let oldest = &mut self.classes[class].oldest;
        while self.standing[*oldest as usize] != Standing::Posted {
            *oldest += 1;
        }
        *oldest
    }

    // Transferring.

    fn post(&mut self, class: usize, party: u32) {
        self.classes[class].under_way += 1;
        self.standing[party as usize] = Standing::Posted;
        self.posted_at[party as usize] = self.now;
        let number = self.script.parties[party as usize].meeting as usize;
        self.meetings[number].posted += 1;
        if self.meetings[number].posted == self.script.meetings[number].parties {
            self.meetings[number].met = self.now;
            for (_, party) in self.script.parties_of(number) {
                self.sums[party.class as usize].met(party.axis, self.now);
            }
        }
        self.ready_if_first(party);
    }

    /// A party that has posted and is at the head of its stream is ready; the last one to be so
    /// starts the transfer.
    fn ready_if_first(&mut self, number: u32) {
        let party = &self.script.parties[number as usize];
        if self.heads[party.stream as usize] != number {
            return;
        }
        let meeting = &mut self.meetings[party.meeting as usize];
        meeting.ready += 1;
        if meeting.ready == self.script.meetings[party.meeting as usize].parties {
            self.start(party.meeting as usize);
        }
    }

    fn start(&mut self, number: usize) {
        let route = self.script.route_of(number);
        self.meetings[number].started = self.now;
        if route.slowdown > 0.0 {
            for (_, party) in self.script.parties_of(number) {
                self.slow_down(party.class as usize, route.slowdown);
            }
        }
        let stream = self.script.slot_of(number);
        self.clock.set(self.classes.len() + stream, self.now + route.latency);
    }

    /// The transfer at the head of a stream has its latency behind it, or all of its wire time.
    fn moved(&mut self, stream: usize) {
        let number = self.script.parties[self.heads[stream] as usize].meeting as usize;
        let (clock, classes) = (&mut self.clock, self.classes.len());
        let ends = |stream: u32, at| clock.set(classes + stream as usize, at);
        if self.meetings[number].on_wire {
            self.wires.end(stream as u32, self.now, ends);
            self.complete(number);
        } else {
            self.meetings[number].on_wire = true;
            let route = self.script.meetings[number].route;
            self.wires.start(stream as u32, route, self.now, ends);
        }
    }

    fn complete(&mut self, number: usize) {
        let script = self.script;
        let slowdown = script.route_of(number).slowdown;
        self.durations.meetings[number] = self.now - self.meetings[number].started;
        for (index, party) in script.parties_of(number) {
            let class = party.class as usize;
            self.standing[index as usize] = Standing::Complete;
            self.sums[class].completed(party.axis, self.now);
            self.classes[class].under_way -= 1;
            if slowdown > 0.0 {
                self.slow_down(class, -slowdown);
            }
            let posted_at = self.posted_at[index as usize];
            self.record(class, party.instruction as usize, Lane::Transfer, posted_at);
            self.heads[party.stream as usize] = party.next;
            self.wake(class);
        }
        for (_, party) in script.parties_of(number) {
            if self.standing.get(party.next as usize) == Some(&Standing::Posted) {
                self.ready_if_first(party.next);
            }
        }
    }

    /// Lets a class go on that was held up and is no longer.
    fn wake(&mut self, class: usize) {
        let state = &self.classes[class];
        if !matches!(state.state, State::Blocked { .. }) {
            return;
        }
        let free = match self.script.ops[class][state.next] {
            Op::Wait(party) => self.standing[party as usize] == Standing::Complete,
            _ => true,
        };
        if free && !self.runnable.contains(&(class as u32)) {
            self.runnable.push(class as u32);
        }
    }

    fn record(&mut self, class: usize, index: usize, lane: Lane, start: f64) {
        if let Some(spans) = &mut self.spans {
            spans.push(Span {
                rank: self.script.representative(class),
                instruction: index as u32,
                lane,
                start: Seconds(start),
                end: Seconds(self.now),
            });
        }
    }

    fn check_done(&self) -> Result<(), Error> {
        let stuck = |(class, state): (usize, &Class)| match state.state {
            State::Blocked { party, .. } => Some(format!(
                "{} at instruction {} for {}",
                self.script.representative(class),
                state.next,
                self.script.parties[party as usize].ticket
            )),
            _ => None,
        };
        let blocked: Vec<String> = self.classes.iter().enumerate().filter_map(stuck).collect();
        if blocked.is_empty() { Ok(()) } else { Err(Error::Stuck { blocked }) }
    }
}

fn slowed(script: &Script) -> Vec<Vec<f64>> {
    let lists = script.ops.iter().filter(|_| script.slows_down);
    lists.map(|list| vec![0.0; list.len()]).collect()
}
