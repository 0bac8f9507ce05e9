//! The state machine that walks one member's steps: "what may start now?", "this one is done".

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use crate::Step;

/// One member's progress through its steps. It holds no clock, socket or buffer.
///
/// A step may start when
/// - every earlier step that touches a chunk of its is done, unless both only send it;
/// - every earlier step in the same direction with the same peer has started, so that the n-th send
///   meets the n-th receive;
/// - for a send, fewer than the in-flight limit to that peer are under way;
/// - for a send under a window, every earlier send has started and fewer are under way in all.
///
/// Nothing else orders steps: a receive completes while a send is under way and the reverse.
#[derive(Debug, Clone)]
pub struct Executor {
    in_flight: usize,
    window: Option<Window>,
    streams: Vec<Stream>,
    nodes: Vec<Node>,
    startable: BTreeSet<usize>,
    remaining: usize,
}

/// The steps in one direction with one peer, in order.
#[derive(Debug, Clone)]
struct Stream {
    sends: bool,
    steps: Vec<usize>,
    started: usize,
    done: usize,
}

/// The sends to all peers, in list order, when there is a limit to them.
#[derive(Debug, Clone)]
struct Window {
    size: usize,
    sends: Vec<usize>,
    started: usize,
    done: usize,
}

/// A step in the graph of what waits for what.
#[derive(Debug, Clone, Default)]
struct Node {
    stream: usize,
    blockers: usize,
    blocks: Vec<usize>,
    started: bool,
    done: bool,
}

impl Executor {
    /// An executor at the start of `steps` with at most `in_flight` sends to a peer under way.
    ///
    /// # Panics
    /// When `in_flight` is 0, with which nothing could ever be sent.
    #[must_use]
    pub fn new(steps: &[Step], in_flight: u32) -> Self {
        assert!(in_flight > 0, "at least one send must be allowed in flight");
        let mut executor = Self {
            in_flight: in_flight as usize,
            window: None,
            streams: Vec::new(),
            nodes: vec![Node::default(); steps.len()],
            startable: BTreeSet::new(),
            remaining: steps.len(),
        };
        executor.find_streams(steps);
        executor.find_blockers(steps);
        (0..executor.streams.len()).for_each(|stream| executor.admit(stream));
        executor
    }

    /// The same, not yet started, with a limit to the sends to all peers together, if there is one.
    ///
    /// # Panics
    /// When the limit is 0, with which nothing could ever be sent.
    #[must_use]
    pub fn with_window(mut self, window: Option<u32>) -> Self {
        let Some(size) = window else {
            return self;
        };
        assert!(size > 0, "at least one send must be allowed in flight");
        let is_send = |step: &usize| self.streams[self.nodes[*step].stream].sends;
        let sends = (0..self.nodes.len()).filter(is_send).collect();
        self.window = Some(Window { size: size as usize, sends, started: 0, done: 0 });
        self.startable.clear();
        (0..self.streams.len()).for_each(|stream| self.admit(stream));
        self
    }

    /// The next step that may start, which is thereby started; `None` until another step is done.
    pub fn start_next(&mut self) -> Option<usize> {
        let step = self.startable.pop_first()?;
        let stream = self.nodes[step].stream;
        self.nodes[step].started = true;
        self.streams[stream].started += 1;
        self.admit(stream);
        if self.streams[stream].sends {
            self.move_window(|window| window.started += 1);
        }
        Some(step)
    }

    /// Notes that a started step is done.
    ///
    /// # Panics
    /// When the step was not started or is done already.
    pub fn complete(&mut self, step: usize) {
        let node = &mut self.nodes[step];
        assert!(node.started && !node.done, "step {step} is not under way");
        node.done = true;
        self.remaining -= 1;
        let stream = node.stream;
        self.streams[stream].done += 1;
        self.admit(stream);
        if self.streams[stream].sends {
            self.move_window(|window| window.done += 1);
        }
        for blocked in std::mem::take(&mut self.nodes[step].blocks) {
            self.nodes[blocked].blockers -= 1;
            self.admit(self.nodes[blocked].stream);
        }
    }

    /// Whether every step is done.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.remaining == 0
    }

    /// The steps that are not done, in list order.
    pub fn pending(&self) -> impl Iterator<Item = usize> {
        (0..self.nodes.len()).filter(|step| !self.nodes[*step].done)
    }

    /// Lets a stream's next step start if nothing holds it back.
    fn admit(&mut self, stream: usize) {
        let Stream { sends, steps, started, done } = &self.streams[stream];
        let Some(&next) = steps.get(*started) else {
            return;
        };
        let open = self.window.as_ref().is_none_or(|window| window.is_open_to(next));
        let room = !sends || (started - done < self.in_flight && open);
        if room && self.nodes[next].blockers == 0 {
            self.startable.insert(next);
        }
    }

    /// Notes a send that started or is done, which may let the next one start.
    fn move_window(&mut self, change: impl FnOnce(&mut Window)) {
        let Some(window) = &mut self.window else {
            return;
        };
        change(window);
        if let Some(&next) = window.sends.get(window.started) {
            self.admit(self.nodes[next].stream);
        }
    }

    /// Sorts the steps into streams.
    fn find_streams(&mut self, steps: &[Step]) {
        let mut numbers = BTreeMap::new();
        for (index, step) in steps.iter().enumerate() {
            let key = (step.is_send(), step.peer());
            let number = *numbers.entry(key).or_insert_with(|| {
                let sends = step.is_send();
                self.streams.push(Stream { sends, steps: Vec::new(), started: 0, done: 0 });
                self.streams.len() - 1
            });
            self.streams[number].steps.push(index);
            self.nodes[index].stream = number;
        }
    }

    /// Finds what waits for what on each chunk: a send for the last receive, a receive for the last
    /// receive and for the sends since.
    fn find_blockers(&mut self, steps: &[Step]) {
        let mut history = History::new();
        for (index, step) in steps.iter().enumerate() {
            let mut blockers = history.note(index, *step);
            blockers.sort_unstable();
            blockers.dedup();
            self.nodes[index].blockers = blockers.len();
            blockers.into_iter().for_each(|blocker| self.nodes[blocker].blocks.push(index));
        }
    }
}

impl Window {
    fn is_open_to(&self, send: usize) -> bool {
        self.sends.get(self.started) == Some(&send) && self.started - self.done < self.size
    }
}

/// The steps that last touched each chunk. Chunks with the same past share a span, so that a step on
/// many chunks costs no more than one on a few.
struct History(BTreeMap<u32, Span>);

/// The past of the chunks up to `end`.
#[derive(Clone)]
struct Span {
    end: u32,
    receive: Option<usize>,
    sends_since: Vec<usize>,
}

impl History {
    fn new() -> Self {
        let untouched = Span { end: u32::MAX, receive: None, sends_since: Vec::new() };
        Self(BTreeMap::from([(0, untouched)]))
    }

    /// Notes a step and returns those that it waits for, some of them more than once.
    fn note(&mut self, index: usize, step: Step) -> Vec<usize> {
        let Range { start, end } = step.chunks().range();
        self.split(start);
        self.split(end);
        let mut blockers = Vec::new();
        for (_, span) in self.0.range_mut(start..end) {
            blockers.extend(span.receive);
            if step.is_send() {
                span.sends_since.push(index);
            } else {
                blockers.append(&mut span.sends_since);
            }
        }
        if !step.is_send() {
            let inside: Vec<u32> = self.0.range(start..end).map(|(start, _)| *start).collect();
            inside.iter().for_each(|start| drop(self.0.remove(start)));
            let received = Span { end, receive: Some(index), sends_since: Vec::new() };
            self.0.insert(start, received);
        }
        blockers
    }

    /// Makes a span begin at this chunk.
    fn split(&mut self, chunk: u32) {
        if let Some((_, span)) = self.0.range_mut(..chunk).next_back()
            && span.end > chunk
        {
            let after = span.clone();
            span.end = chunk;
            self.0.insert(chunk, after);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Action, Chunks, Collective, Kind};

    fn drain(executor: &mut Executor) -> Vec<usize> {
        std::iter::from_fn(|| executor.start_next()).collect()
    }

    #[test]
    fn a_send_waits_for_the_reduction_it_carries_on() {
        let steps = &Collective::ring(Kind::ReduceScatter, 3).steps(0);
        let mut executor = Executor::new(steps, 1);
        assert_eq!(drain(&mut executor), [0, 1, 3]);
        executor.complete(0);
        assert_eq!(drain(&mut executor), [], "the chunk has not arrived");
        executor.complete(1);
        assert_eq!(drain(&mut executor), [2]);
        executor.complete(3);
        executor.complete(2);
        assert!(executor.is_done());
    }

    #[test]
    fn the_in_flight_limit_holds_per_peer() {
        let to = |to, chunk| Step::Send { to, chunks: Chunks::one(chunk) };
        let steps = [to(1, 0), to(1, 1), to(1, 2), to(2, 0)];
        let mut executor = Executor::new(&steps, 2);
        assert_eq!(drain(&mut executor), [0, 1, 3]);
        executor.complete(1);
        assert_eq!(drain(&mut executor), [2]);
        assert_eq!(executor.pending().collect::<Vec<_>>(), [0, 2, 3]);
    }

    #[test]
    fn a_window_lets_sends_go_in_list_order() {
        let to = |to, chunk| Step::Send { to, chunks: Chunks::one(chunk) };
        let from = Step::Receive { from: 3, chunks: Chunks::one(1), action: Action::Copy };
        let steps = [to(1, 0), from, to(2, 1), to(1, 2), to(3, 3)];
        let mut executor = Executor::new(&steps, 2).with_window(Some(2));
        assert_eq!(drain(&mut executor), [0, 1]);
        executor.complete(0);
        assert_eq!(drain(&mut executor), [], "the next send waits for a chunk");
        executor.complete(1);
        assert_eq!(drain(&mut executor), [2, 3]);
        executor.complete(3);
        assert_eq!(drain(&mut executor), [4]);
    }

    #[test]
    fn a_chunk_under_way_is_not_overwritten() {
        let chunks = Chunks::one(0);
        let copy = Step::Receive { from: 1, chunks, action: Action::Copy };
        let mut executor = Executor::new(&[Step::Send { to: 1, chunks }, copy], 1);
        assert_eq!(drain(&mut executor), [0]);
        executor.complete(0);
        assert_eq!(drain(&mut executor), [1]);
    }

    #[test]
    fn only_steps_on_a_common_chunk_wait_for_each_other() {
        let receive = |from, first, count| {
            let chunks = Chunks { first, count };
            Step::Receive { from, chunks, action: Action::Copy }
        };
        let send = |first, count| Step::Send { to: 9, chunks: Chunks { first, count } };
        let steps = [receive(1, 0, 4), receive(2, 4, 4), send(2, 2), send(3, 2), receive(3, 5, 1)];
        let mut executor = Executor::new(&steps, 2);
        assert_eq!(drain(&mut executor), [0, 1]);
        executor.complete(1);
        assert_eq!(drain(&mut executor), [4], "chunk 5 is not of the sends");
        executor.complete(0);
        assert_eq!(drain(&mut executor), [2, 3]);
    }

    #[test]
    #[should_panic(expected = "step 0 is not under way")]
    fn completing_a_step_twice_is_a_bug() {
        let mut executor = Executor::new(&[Step::Send { to: 1, chunks: Chunks::one(0) }], 1);
        drain(&mut executor);
        executor.complete(0);
        executor.complete(0);
    }
}
