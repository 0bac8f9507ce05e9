//! How much of a long run is training: failures, checkpoints, restarts and spares.
//!
//! Failures come at a constant rate for each node ([`Failures`], from published runs). A
//! [`Reliability`] says what each of them costs, and [`Reliability::expected`] is a closed form of what is
//! left. Whole runs are played by the code that recovers them (`train::control::goodput`).

mod checkpoint;
mod failures;

pub use checkpoint::{best_interval, daly, effective, young};
pub use failures::{Failures, NODE};

use units::Seconds;

/// What goes wrong with a job, and how it is answered.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reliability {
    /// Mean time between failures of the whole job.
    pub between_failures: Seconds,
    /// From a failure until it is noticed.
    pub detect: Seconds,
    /// From then until the ranks train again: replacing nodes, starting processes, reading state.
    pub restart: Seconds,
    /// How long a checkpoint keeps the job from training.
    pub stall: Seconds,
    /// Training between checkpoints; the best there is unless given.
    pub every: Option<Seconds>,
    /// Copies in the memory of other nodes, if there are any.
    pub memory: Option<Memory>,
    /// Spare nodes; a replacement is always at hand unless given.
    pub spares: Option<Spares>,
}

/// Copies of the state in the memory of other nodes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Memory {
    /// Training between copies, which cost no time: they travel while the next steps are computed.
    pub every: Seconds,
    /// The share of failures that leaves a copy of everything.
    pub covers: f64,
}

/// Nodes kept to replace others.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spares {
    /// How many.
    pub nodes: u32,
    /// Until a node that failed is a spare.
    pub repair: Seconds,
}

impl Reliability {
    /// The mean time between failures that no copy in memory makes good; three centuries where copies
    /// make all good.
    fn between_losses(&self) -> Seconds {
        let lost = 1.0 - self.memory.map_or(0.0, |memory| memory.covers);
        Seconds((self.between_failures.0 / lost).min(1e10))
    }

    fn down(&self) -> Seconds {
        self.detect + self.restart
    }

    /// Training between checkpoints: as given, or the best there is.
    #[must_use]
    pub fn interval(&self) -> Seconds {
        let best = || best_interval(self.stall, self.between_losses(), self.down());
        self.every.unwrap_or_else(best)
    }

    /// The share of time that is training, on average, where spares never run out.
    ///
    /// Losses that only a checkpoint makes good are exact (see [`effective`]); the others cost
    /// the time until the ranks train again and half of what lies between two copies.
    #[must_use]
    pub fn expected(&self) -> f64 {
        let kept = effective(self.interval(), self.stall, self.between_losses(), self.down());
        let Some(memory) = self.memory else { return kept };
        let each = self.down() + memory.every * 0.5;
        kept / (1.0 + memory.covers * (each / self.between_failures))
    }
}

#[cfg(test)]
mod tests;
