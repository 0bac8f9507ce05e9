//! Virtual time: what is to happen when.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use units::Seconds;

/// Events in order of time, and in order of scheduling where times are equal, so that a run is the
/// same every time.
#[derive(Debug)]
pub(crate) struct Agenda<Event> {
    now: Seconds,
    scheduled: u64,
    events: BTreeMap<(Moment, u64), Event>,
}

/// A time that is never NaN, and so has an order.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Moment(pub(crate) f64);

impl<Event> Agenda<Event> {
    pub(crate) fn new() -> Self {
        Self { now: Seconds::ZERO, scheduled: 0, events: BTreeMap::new() }
    }

    /// The time of the event taken last.
    pub(crate) fn now(&self) -> Seconds {
        self.now
    }

    /// Adds an event. Rounding may put it a hair before now; it then happens now.
    pub(crate) fn schedule(&mut self, at: Seconds, event: Event) {
        let moment = Moment(at.max(self.now).0);
        self.events.insert((moment, self.scheduled), event);
        self.scheduled += 1;
    }

    /// Takes the next event and moves the clock to its time.
    pub(crate) fn pop(&mut self) -> Option<Event> {
        let ((at, _), event) = self.events.pop_first()?;
        self.now = Seconds(at.0);
        Some(event)
    }
}

impl Eq for Moment {}

impl Ord for Moment {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.total_cmp(&other.0)
    }
}

impl PartialOrd for Moment {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

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
