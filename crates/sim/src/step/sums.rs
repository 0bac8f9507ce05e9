//! Where the time goes, as running sums: what a trace would tell, without one.

use program::{Axis, Breakdown};
use units::Seconds;

use super::script::Script;

/// The sums of one class.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sums {
    axes: [AxisSums; Axis::ALL.len()],
    bubble: f64,
}

#[derive(Debug, Clone, Copy, Default)]
struct AxisSums {
    exposed: f64,
    /// While at least one transfer that all parties had posted was under way.
    under_way: f64,
    count: u32,
    since: f64,
    used: bool,
}

impl Sums {
    /// All parties of a transfer have posted it.
    pub(crate) fn met(&mut self, axis: Axis, now: f64) {
        let axis = &mut self.axes[axis as usize];
        if axis.count == 0 {
            axis.since = now;
        }
        axis.count += 1;
        axis.used = true;
    }

    /// A transfer is complete.
    pub(crate) fn completed(&mut self, axis: Axis, now: f64) {
        let axis = &mut self.axes[axis as usize];
        axis.count -= 1;
        if axis.count == 0 {
            axis.under_way += now - axis.since;
        }
    }

    /// The class was held up from `since` to `now` by a transfer that had met at `met`.
    pub(crate) fn waited(&mut self, axis: Axis, since: f64, met: f64, now: f64) {
        let split = met.clamp(since, now);
        self.bubble += split - since;
        self.axes[axis as usize].exposed += now - split;
    }

    /// The breakdown of `class` in a step of this length. `computed` is by [`Script::costs`].
    pub(crate) fn breakdown(
        &self,
        script: &Script,
        class: usize,
        computed: &[f64],
        step: f64,
    ) -> Breakdown {
        let mut breakdown = Breakdown { bubble: Seconds(self.bubble), ..Breakdown::default() };
        for (cost, time) in script.costs.iter().zip(computed) {
            if cost.class as usize == class {
                breakdown.compute += Seconds(*time);
                *breakdown.work.entry(cost.work).or_default() += Seconds(*time);
            }
        }
        for axis in Axis::ALL {
            let sums = self.axes[axis as usize];
            if sums.used {
                breakdown.exposed.insert(axis, Seconds(sums.exposed));
                let hidden = (sums.under_way - sums.exposed).max(0.0);
                breakdown.hidden.insert(axis, Seconds(hidden));
            }
        }
        breakdown.other = breakdown.rest_of(Seconds(step));
        breakdown
    }
}
