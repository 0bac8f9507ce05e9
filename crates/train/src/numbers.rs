//! What is done about a step whose numbers are wrong.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// What is done when the loss or the gradient is no number, or the gradient far larger than it was.
/// No rank ever applies such a gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnDivergence {
    /// The run stops, before the update.
    #[default]
    Stop,
    /// The step is left without an update, and training goes on.
    Skip,
    /// Training goes back to the state of the last checkpoint and on with the text after the step:
    /// what it saw in between is left out.
    RollBack,
}

/// Steps whose gradient norms a step is held against.
const WINDOW: usize = 50;
/// As long as there are fewer, only what is no number is wrong.
const FEWEST: usize = 10;

/// The gradient norms of the last steps that counted. All ranks have the same, so that they decide
/// alike; it begins empty whenever ranks begin anew.
#[derive(Debug, Clone, Default)]
pub struct Norms {
    spike: f64,
    recent: VecDeque<f64>,
}

impl Norms {
    /// A gradient is wrong when its norm is over `spike` times the median of late; 0 is never.
    #[must_use]
    pub fn new(spike: f64) -> Self {
        Self { spike, recent: VecDeque::new() }
    }

    /// The largest norm that is right at this moment.
    #[must_use]
    pub fn limit(&self) -> f64 {
        if self.spike == 0.0 || self.recent.len() < FEWEST {
            return f64::MAX;
        }
        let mut sorted: Vec<f64> = self.recent.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        self.spike * sorted[sorted.len() / 2]
    }

    /// Notes the norm of a step that counted.
    pub fn note(&mut self, norm: f64) {
        self.recent.push_back(norm);
        if self.recent.len() > WINDOW {
            self.recent.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spike_is_what_is_far_above_the_median_of_late() {
        let mut norms = Norms::new(10.0);
        (0..FEWEST).for_each(|step| {
            assert_eq!(norms.limit(), f64::MAX);
            norms.note(1.0 + step as f64 * 0.01);
        });
        assert!((10.0..10.6).contains(&norms.limit()), "{}", norms.limit());
        (0..WINDOW).for_each(|_| norms.note(0.5));
        assert_eq!(norms.limit(), 5.0);
        let mut never = Norms::new(0.0);
        (0..WINDOW).for_each(|_| never.note(1.0));
        assert_eq!(never.limit(), f64::MAX);
    }
}
