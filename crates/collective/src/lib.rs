//! Collective algorithms as data: per-rank lists of sends and receives of chunks.

use serde::{Deserialize, Serialize};

/// What a collective leaves on every rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Every rank holds the sum of all ranks' buffers.
    AllReduce,
    /// Rank `i` holds chunk `i` of the sum.
    ReduceScatter,
    /// Every rank holds every rank's chunk; rank `i` brought chunk `i`.
    AllGather,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::AllReduce => "all-reduce",
            Self::ReduceScatter => "reduce-scatter",
            Self::AllGather => "all-gather",
        })
    }
}
