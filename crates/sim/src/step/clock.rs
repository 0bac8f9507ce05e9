//! Which of a fixed number of things happens next.

/// A time for each slot, or never; a tournament tree over them. The winner of a pair is written
/// above it, so a change costs the height of the tree and the next event is at its root.
#[derive(Debug)]
pub(crate) struct Clock {
    /// Times of the slots, a power of two of them.
    times: Vec<f64>,
    /// Winners: `tree[1]` of all, `tree[i]` of `tree[2 i]` and `tree[2 i + 1]`.
    tree: Vec<u32>,
    /// What was taken last, which the tree still has as a winner: most is set again at once.
    taken: Option<usize>,
}

impl Clock {
    pub(crate) fn new(slots: usize) -> Self {
        let slots = slots.next_power_of_two().max(2);
        let mut tree = vec![0; slots];
        for node in (1..slots).rev() {
            tree[node] = if 2 * node < slots { tree[2 * node] } else { (2 * node - slots) as u32 };
        }
        Self { times: vec![f64::INFINITY; slots], tree, taken: None }
    }

    /// Sets when `slot` is to happen; infinity is never.
    pub(crate) fn set(&mut self, slot: usize, time: f64) {
        self.times[slot] = time;
        if self.taken == Some(slot) {
            self.taken = None;
        }
        self.replay(slot);
    }

    /// Takes what happens next, and when: from then on it never does. Of several at once the lowest slot.
    pub(crate) fn take(&mut self) -> (usize, f64) {
        if let Some(slot) = self.taken.take() {
            self.replay(slot);
        }
        let slot = self.tree[1] as usize;
        self.taken = Some(slot);
        (slot, std::mem::replace(&mut self.times[slot], f64::INFINITY))
    }

    /// Works out again who wins where `slot` takes part.
    fn replay(&mut self, slot: usize) {
        let mut node = (self.times.len() + slot) / 2;
        let even = |slot: usize| slot & !1;
        let (a, b) = (even(slot), even(slot) + 1);
        self.tree[node] = self.earlier(a as u32, b as u32);
        while node > 1 {
            node /= 2;
            let winner = self.earlier(self.tree[2 * node], self.tree[2 * node + 1]);
            // Where another slot won and wins, nothing above has changed.
            if winner == self.tree[node] && winner as usize != slot {
                return;
            }
            self.tree[node] = winner;
        }
    }

    /// Of two slots in ascending order.
    fn earlier(&self, a: u32, b: u32) -> u32 {
        if self.times[b as usize] < self.times[a as usize] { b } else { a }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_next_is_the_earliest(
            slots in 1_usize..40,
            changes in prop::collection::vec(prop::option::of((0_usize..40, 0_u32..50)), 0..100),
        ) {
            let mut clock = Clock::new(slots);
            let mut times = vec![f64::INFINITY; slots];
            // No change is a take; at the end all that is left is taken.
            for change in changes.into_iter().chain((0..=slots).map(|_| None)) {
                if let Some((slot, time)) = change {
                    let slot = slot % slots;
                    times[slot] = if time == 0 { f64::INFINITY } else { f64::from(time) };
                    clock.set(slot, times[slot]);
                    continue;
                }
                let earliest = times.iter().copied().fold(f64::INFINITY, f64::min);
                let first = times.iter().position(|time| *time == earliest);
                let (slot, time) = clock.take();
                prop_assert_eq!(time, earliest);
                if earliest.is_finite() {
                    prop_assert_eq!(Some(slot), first);
                    times[slot] = f64::INFINITY;
                }
            }
        }
    }
}
