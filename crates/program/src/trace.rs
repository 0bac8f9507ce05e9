//! What happened when: the one record that simulator and runtime both make of a step.

use serde::{Deserialize, Serialize};
use units::{Rank, Seconds};

/// Which of a rank's activities a span belongs to; those of one lane never overlap in time, but
/// for transfers, of which several may be under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Lane {
    /// The rank computes.
    Compute,
    /// The rank waits for a transfer: exposed communication, or a pipeline bubble.
    Wait,
    /// A transfer is under way.
    Transfer,
}

/// One instruction's time on one rank.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Span {
    /// Whose.
    pub rank: Rank,
    /// Index into the rank's list. For [`Lane::Transfer`], of the post.
    pub instruction: u32,
    /// Which activity.
    pub lane: Lane,
    /// When it began, from the start of the step.
    pub start: Seconds,
    /// When it ended.
    pub end: Seconds,
}

/// One step of every rank.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Trace {
    /// In no particular order between ranks; by start within a rank and lane.
    pub spans: Vec<Span>,
}

impl Trace {
    /// When the last span ended.
    #[must_use]
    pub fn duration(&self) -> Seconds {
        self.spans.iter().map(|span| span.end).fold(Seconds::ZERO, Seconds::max)
    }
}
