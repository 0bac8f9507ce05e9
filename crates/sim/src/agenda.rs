//! Virtual time: what is to happen when.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use units::Seconds;

/// Events in order of time, and in order of scheduling where times are equal, so that a run is the
/// same every time.
#[derive(Debug)]
pub(crate) struct Agenda<Event> {
    now: Seconds,
    scheduled: u64,
    entries: BinaryHeap<Reverse<Entry<Event>>>,
}

#[derive(Debug)]
struct Entry<Event> {
    at: Seconds,
    sequence: u64,
    event: Event,
}

impl<Event> Agenda<Event> {
    pub(crate) fn new() -> Self {
        Self {
            now: Seconds::ZERO,
            scheduled: 0,
            entries: BinaryHeap::new(),
        }
    }

    /// The time of the event taken last.
    pub(crate) fn now(&self) -> Seconds {
        self.now
    }

    /// Adds an event. Rounding may put it a hair before now; it then happens now.
    pub(crate) fn schedule(&mut self, at: Seconds, event: Event) {
        self.entries.push(Reverse(Entry {
            at: at.max(self.now),
            sequence: self.scheduled,
            event,
        }));
        self.scheduled += 1;
    }

    /// Whether something is left to happen before time goes on.
    pub(crate) fn has_more_now(&self) -> bool {
        self.entries
            .peek()
            .is_some_and(|Reverse(entry)| entry.at <= self.now)
    }

    /// Takes the next event and moves the clock to its time.
    pub(crate) fn pop(&mut self) -> Option<Event> {
        let Reverse(entry) = self.entries.pop()?;
        self.now = entry.at;
        Some(entry.event)
    }
}

impl<Event> Ord for Entry<Event> {
    fn cmp(&self, other: &Self) -> Ordering {
        let by_time = self.at.0.total_cmp(&other.at.0);
        by_time.then(self.sequence.cmp(&other.sequence))
    }
}

impl<Event> PartialOrd for Entry<Event> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<Event> PartialEq for Entry<Event> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl<Event> Eq for Entry<Event> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_by_time_and_then_by_order_of_scheduling() {
        let mut agenda = Agenda::new();
        for (at, event) in [(2.0, "c"), (1.0, "a"), (2.0, "d"), (1.0, "b")] {
            agenda.schedule(Seconds(at), event);
        }
        let order: Vec<_> = std::iter::from_fn(|| agenda.pop()).collect();
        assert_eq!(order, ["a", "b", "c", "d"]);
        assert_eq!(agenda.now(), Seconds(2.0));
    }
}
