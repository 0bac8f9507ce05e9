//! Hosts as measured: every rank has compute threads and one progress thread, and the threads of
//! all ranks of a host share its cores.
//!
//! A message is worked on by both progress threads at once, the receiver's a latency later, and is
//! there when both are done and its stream has carried it. A progress thread does one thing at a
//! time, transfers posted earlier first.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};

use collective::Action;
use program::Ticket;
use units::{Rank, Seconds};

use crate::Profile;
use crate::agenda::Agenda;
use crate::cores::Cores;
use crate::machine::{Completion, Machine, Message};

/// What has to happen to a message before it has arrived.
const PARTS: u32 = 3;

/// Ranks on hosts that behave as the profile says.
pub(crate) struct Measured<'a> {
    profile: &'a Profile,
    agenda: Agenda<Event>,
    hosts: Vec<Host>,
    progress: Vec<Progress>,
    /// When each stream from rank to rank has carried what it was given.
    streams: BTreeMap<(Rank, Rank), Seconds>,
    messages: Vec<UnderWay>,
    completions: VecDeque<Completion>,
}

struct Host {
    cores: Cores<Task>,
    /// Counts changes, so that an end that was foreseen before the last one is known as outdated.
    changes: u64,
}

/// A rank's progress thread.
#[derive(Default)]
struct Progress {
    busy: bool,
    arrivals: u64,
    queue: BinaryHeap<Reverse<(Ticket, u64, Task)>>,
}

struct UnderWay {
    message: Message,
    parts_left: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Task {
    Compute(Rank),
    Send(usize),
    Receive(usize),
}

enum Event {
    /// A host's next task ends, unless the host has changed since.
    TaskEnds { host: usize, change: u64 },
    /// The receiver can start on a message.
    Reached(usize),
    /// The stream has carried a message.
    Carried(usize),
}

impl<'a> Measured<'a> {
    pub(crate) fn new(profile: &'a Profile, ranks: u32) -> Self {
        let host = || Host { cores: Cores::new(profile.cores, profile.others), changes: 0 };
        Self {
            profile,
            agenda: Agenda::new(),
            hosts: (0..ranks.div_ceil(profile.ranks_per_host)).map(|_| host()).collect(),
            progress: (0..ranks).map(|_| Progress::default()).collect(),
            streams: BTreeMap::new(),
            messages: Vec::new(),
            completions: VecDeque::new(),
        }
    }

    fn host(&self, rank: Rank) -> usize {
        (rank.0 / self.profile.ranks_per_host) as usize
    }

    fn start_task(&mut self, rank: Rank, work: Seconds, threads: u32, task: Task) {
        let host = self.host(rank);
        let now = self.now();
        self.hosts[host].cores.start(now, work, threads, task);
        self.foresee(host);
    }

    /// Schedules the end of the host's next task.
    fn foresee(&mut self, host: usize) {
        let state = &mut self.hosts[host];
        state.changes += 1;
        let change = state.changes;
        if let Some(end) = state.cores.next_end() {
            self.agenda.schedule(end, Event::TaskEnds { host, change });
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::TaskEnds { host, change } if self.hosts[host].changes == change => {
                let ended = self.hosts[host].cores.end_next(self.agenda.now());
                self.foresee(host);
                ended.into_iter().for_each(|task| self.ended(task));
            }
            Event::TaskEnds { .. } => {}
            Event::Reached(message) => {
                let Message { to, ticket, .. } = self.messages[message].message;
                self.enqueue(to, ticket, Task::Receive(message));
            }
            Event::Carried(message) => self.part_done(message),
        }
    }

    fn ended(&mut self, task: Task) {
        match task {
            Task::Compute(rank) => self.completions.push_back(Completion::Computed(rank)),
            Task::Send(index) => {
                let message = self.messages[index].message;
                self.completions.push_back(Completion::Sent(message));
                self.part_done(index);
                self.progress[message.from.index()].busy = false;
                self.work_on(message.from);
            }
            Task::Receive(index) => {
                let rank = self.messages[index].message.to;
                self.part_done(index);
                self.progress[rank.index()].busy = false;
                self.work_on(rank);
            }
        }
    }

    fn part_done(&mut self, index: usize) {
        let under_way = &mut self.messages[index];
        under_way.parts_left -= 1;
        if under_way.parts_left == 0 {
            self.completions.push_back(Completion::Arrived(under_way.message));
        }
    }

    fn enqueue(&mut self, rank: Rank, ticket: Ticket, task: Task) {
        let progress = &mut self.progress[rank.index()];
        progress.queue.push(Reverse((ticket, progress.arrivals, task)));
        progress.arrivals += 1;
        self.work_on(rank);
    }

    /// Gives the progress thread its next task, if it is free.
    fn work_on(&mut self, rank: Rank) {
        let progress = &mut self.progress[rank.index()];
        if progress.busy {
            return;
        }
        let Some(Reverse((_, _, task))) = progress.queue.pop() else {
            return;
        };
        progress.busy = true;
        if let Task::Send(message) = task {
            self.put_on_stream(message);
        }
        self.start_task(rank, self.work(task), 1, task);
    }

    /// Dates what follows from the start of a send, whatever the cores do.
    fn put_on_stream(&mut self, index: usize) {
        let Message { from, to, bytes, .. } = self.messages[index].message;
        let link = &self.profile.link;
        let now = self.agenda.now();
        let free = self.streams.entry((from, to)).or_default();
        *free = free.max(now) + bytes / link.bandwidth;
        let carried = *free + link.latency;
        self.agenda.schedule(now + link.latency, Event::Reached(index));
        self.agenda.schedule(carried, Event::Carried(index));
    }

    /// Processor time of a progress thread's task.
    fn work(&self, task: Task) -> Seconds {
        let link = &self.profile.link;
        match task {
            Task::Compute(_) => Seconds::ZERO,
            Task::Send(index) => link.send_cpu * self.messages[index].message.bytes.as_f64(),
            Task::Receive(index) => {
                let Message { bytes, action, .. } = self.messages[index].message;
                let per_byte = match action {
                    Action::Copy => link.receive_cpu,
                    Action::Reduce => link.receive_cpu + link.reduce_cpu,
                };
                per_byte * bytes.as_f64()
            }
        }
    }
}

impl Machine for Measured<'_> {
    fn now(&self) -> Seconds {
        self.agenda.now()
    }

    fn compute(&mut self, rank: Rank, work: Seconds) {
        self.start_task(rank, work, self.profile.threads_per_rank, Task::Compute(rank));
    }

    fn send(&mut self, message: Message) {
        let index = self.messages.len();
        self.messages.push(UnderWay { message, parts_left: PARTS });
        self.enqueue(message.from, message.ticket, Task::Send(index));
    }

    fn next(&mut self) -> Option<Completion> {
        loop {
            if let Some(completion) = self.completions.pop_front() {
                return Some(completion);
            }
            let event = self.agenda.pop()?;
            self.handle(event);
        }
    }
}
