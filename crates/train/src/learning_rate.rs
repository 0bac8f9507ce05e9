//! The learning rate of each step.

use serde::{Deserialize, Serialize};

/// Linear warm-up, then half a cosine down to a floor (Loshchilov & Hutter 2017, eq. 5).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LearningRate {
    /// The highest rate, reached at the end of the warm-up.
    pub peak: f64,
    /// The rate of the last step.
    pub floor: f64,
    /// Steps of warm-up.
    pub warmup_steps: u64,
    /// Steps in all.
    pub steps: u64,
}

impl LearningRate {
    /// The rate of a step, from 0.
    #[must_use]
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.peak * (step + 1) as f64 / self.warmup_steps as f64;
        }
        let decaying = self.steps.saturating_sub(self.warmup_steps + 1).max(1);
        let done = ((step - self.warmup_steps) as f64 / decaying as f64).min(1.0);
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
        self.floor + (self.peak - self.floor) * cosine
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_rises_to_the_peak_and_falls_to_the_floor() {
        let rate = LearningRate { peak: 1.0, floor: 0.1, warmup_steps: 4, steps: 15 };
        assert_eq!(rate.at(0), 0.25);
        assert_eq!(rate.at(3), 1.0);
        assert_eq!(rate.at(4), 1.0);
        assert!((rate.at(9) - 0.55).abs() < 1e-12);
        assert!((rate.at(14) - 0.1).abs() < 1e-12);
        assert!((5..15).all(|step| rate.at(step) < rate.at(step - 1)));
    }
}
