//! The choices of a layout other than degrees.

use model::Segment;
use serde::{Deserialize, Serialize};

/// What the ranks of the data axis split among themselves instead of each holding it whole.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Shard {
    /// Nothing: plain data parallelism.
    #[default]
    None,
    /// Optimizer state (`ZeRO` 1).
    Optimizer,
    /// Optimizer state and gradients (`ZeRO` 2).
    Gradients,
    /// Optimizer state, gradients and parameters (`ZeRO` 3, FSDP).
    Parameters,
}

/// What the forward pass does not keep for the backward pass, which then computes it again.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Recompute {
    /// Everything is kept.
    #[default]
    None,
    /// Scores, softmax and weighted values (Korthikanti et al. 2022, section 5).
    Selective,
    /// All of every layer but its input.
    Full,
    /// All but the input of this many layers of each stage, the first ones.
    Layers(u32),
    /// What these segments of every layer leave.
    Segments(Vec<Segment>),
}

/// How context-parallel ranks come to each other's keys and values.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ContextExchange {
    /// All are gathered before attention (Llama Team 2024, section 3.3.2).
    #[default]
    AllGather,
    /// They go around the ring, a piece at a time, while attention works on the last (Liu et al.
    /// 2023), each rank with an early and a late part of the sequence.
    Ring,
}

/// What hides the transfers of tensor parallelism.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TensorOverlap {
    /// Nothing.
    None,
    /// Reductions of gradients stand beside the gradients of weights.
    #[default]
    WeightGradients,
    /// And products are cut into this many pieces along the sequence, each gathered and reduced
    /// while its neighbours are computed.
    Pieces(u8),
}

/// Whether transfers of parameters or gradients stand beside computation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Timing {
    /// Block by block, as early as possible.
    #[default]
    Overlapped,
    /// All before the first pass, or all after the last.
    Exposed,
}

impl Recompute {
    /// Whether `segment`, of the `index`-th layer of a stage, is computed again.
    #[must_use]
    pub fn again(&self, segment: Segment, index: u32) -> bool {
        match self {
            Self::None => false,
            Self::Selective => matches!(segment, Segment::Attend | Segment::AttendWindow),
            Self::Full => true,
            Self::Layers(layers) => index < *layers,
            Self::Segments(segments) => segments.contains(&segment),
        }
    }
}
