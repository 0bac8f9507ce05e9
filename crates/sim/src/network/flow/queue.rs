//! Events in order of time, those of one time together.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Picoseconds.
pub(super) type Time = u64;

/// Entries of the cache of times that have a bucket; a power of two.
const CACHED: usize = 64;
const NONE: (Time, u32) = (Time::MAX, 0);

/// Buckets of events by time. Ranks in lock step put thousands of events at one time, which then
/// cost no more than an append.
pub(super) struct Queue {
    heap: BinaryHeap<Reverse<(Time, u32)>>,
    buckets: Vec<Vec<u32>>,
    free: Vec<u32>,
    /// Some of the times in the heap, with their buckets.
    cache: [(Time, u32); CACHED],
}

impl Queue {
    pub(super) fn new() -> Self {
        Self {
            heap: BinaryHeap::new(),
            buckets: Vec::new(),
            free: Vec::new(),
            cache: [NONE; CACHED],
        }
    }

    pub(super) fn push(&mut self, at: Time, event: u32) {
        let cached = &mut self.cache[slot(at)];
        if cached.0 != at {
            let bucket = self.free.pop().unwrap_or_else(|| {
                self.buckets.push(Vec::new());
                self.buckets.len() as u32 - 1
            });
            self.heap.push(Reverse((at, bucket)));
            *cached = (at, bucket);
        }
        self.buckets[cached.1 as usize].push(event);
    }

    /// The next time, with its events in the order in which they were pushed. `events` is emptied
    /// for them. A time may come again when more is pushed for it.
    pub(super) fn pop(&mut self, events: &mut Vec<u32>) -> Option<Time> {
        events.clear();
        let Reverse((at, bucket)) = self.heap.pop()?;
        let cached = &mut self.cache[slot(at)];
        if *cached == (at, bucket) {
            *cached = NONE;
        }
        std::mem::swap(events, &mut self.buckets[bucket as usize]);
        self.free.push(bucket);
        Some(at)
    }
}

/// Times differ mostly in their middle bits: a multiplication mixes them.
fn slot(at: Time) -> usize {
    (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 58) as usize
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn events_come_in_order_of_time(times in prop::collection::vec(0_u64..200, 0..300)) {
            let mut queue = Queue::new();
            times.iter().enumerate().for_each(|(event, at)| queue.push(*at, event as u32));
            let (mut events, mut came) = (Vec::new(), Vec::new());
            while let Some(at) = queue.pop(&mut events) {
                prop_assert!(!events.is_empty());
                came.extend(events.iter().map(|event| (at, *event)));
            }
            prop_assert!(came.is_sorted_by_key(|(at, _)| *at));
            prop_assert!(came.iter().all(|(at, event)| times[*event as usize] == *at));
            prop_assert_eq!(came.len(), times.len());
        }
    }
}
