//! Where the time of one rank's step went.

use std::collections::BTreeMap;
use std::fmt;

use model::{Pass, Segment};
use serde::{Serialize, Serializer};
use units::Seconds;

use crate::{Axis, Instruction};

/// What a rank computes, without for which layer or microbatch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Work {
    /// A segment in a direction.
    Segment(Segment, Pass),
    /// Adding reduced gradients to their sum.
    Accumulate,
    /// The gradient norm.
    SquareSum,
    /// The optimizer.
    Update,
    /// The outer optimizer.
    OuterUpdate,
}

impl Work {
    /// What `instruction` computes; `None` for one that moves, waits or forgets.
    #[must_use]
    pub fn of(instruction: &Instruction) -> Option<Self> {
        match *instruction {
            Instruction::Compute { segment, pass, .. } => Some(Self::Segment(segment, pass)),
            Instruction::Accumulate { .. } => Some(Self::Accumulate),
            Instruction::SquareSum { .. } => Some(Self::SquareSum),
            Instruction::Update { .. } => Some(Self::Update),
            Instruction::OuterUpdate { .. } => Some(Self::OuterUpdate),
            Instruction::Discard { .. }
            | Instruction::Release { .. }
            | Instruction::Post { .. }
            | Instruction::Wait { .. } => None,
        }
    }
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Segment(segment, pass) => write!(f, "{segment} {pass}"),
            Self::Accumulate => f.write_str("accumulate"),
            Self::SquareSum => f.write_str("square-sum"),
            Self::Update => f.write_str("update"),
            Self::OuterUpdate => f.write_str("outer-update"),
        }
    }
}

impl Serialize for Work {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The time of one rank's step, by what it was spent on.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Breakdown {
    /// Computing.
    #[serde(rename = "compute_s")]
    pub compute: Seconds,
    /// The same by what was computed.
    #[serde(rename = "work_s")]
    pub work: BTreeMap<Work, Seconds>,
    /// Held up by transfers that all their parties had posted, by axis.
    #[serde(rename = "exposed_communication_s")]
    pub exposed: BTreeMap<Axis, Seconds>,
    /// While such a transfer was under way that did not hold the rank up, by axis.
    #[serde(rename = "hidden_communication_s")]
    pub hidden: BTreeMap<Axis, Seconds>,
    /// Held up by other ranks that had not posted their part yet: the pipeline's bubble, and
    /// whatever else makes ranks differ.
    #[serde(rename = "bubble_s")]
    pub bubble: Seconds,
    /// The rest: posting transfers, and having nothing left to do.
    #[serde(rename = "other_s")]
    pub other: Seconds,
}

impl Breakdown {
    /// Exposed communication on all axes.
    #[must_use]
    pub fn exposed_communication(&self) -> Seconds {
        self.exposed.values().copied().sum()
    }

    /// Hidden communication on all axes; axes that are under way at once count each.
    #[must_use]
    pub fn hidden_communication(&self) -> Seconds {
        self.hidden.values().copied().sum()
    }

    /// The gradient norm and the optimizer.
    #[must_use]
    pub fn optimizer(&self) -> Seconds {
        let of = |work| self.work.get(&work).copied().unwrap_or_default();
        of(Work::SquareSum) + of(Work::Update) + of(Work::OuterUpdate)
    }

    /// What is left of a step of this length.
    #[must_use]
    pub fn rest_of(&self, step: Seconds) -> Seconds {
        (step - self.compute - self.exposed_communication() - self.bubble).max(Seconds::ZERO)
    }

    /// The mean of several; of none, nothing.
    #[must_use]
    pub fn mean(of: &[Self]) -> Self {
        let mut mean = Self::default();
        for breakdown in of {
            mean.add(breakdown, 1.0 / of.len() as f64);
        }
        mean
    }

    fn add(&mut self, other: &Self, weight: f64) {
        self.compute += other.compute * weight;
        self.bubble += other.bubble * weight;
        self.other += other.other * weight;
        add_each(&mut self.work, &other.work, weight);
        add_each(&mut self.exposed, &other.exposed, weight);
        add_each(&mut self.hidden, &other.hidden, weight);
    }
}

fn add_each<K: Ord + Copy>(
    to: &mut BTreeMap<K, Seconds>,
    other: &BTreeMap<K, Seconds>,
    weight: f64,
) {
    for (key, time) in other {
        *to.entry(*key).or_default() += *time * weight;
    }
}
