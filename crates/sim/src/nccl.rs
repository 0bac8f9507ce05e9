//! NCCL's own estimate of what a collective takes, and so which algorithm and protocol it picks.
//!
//! For each communicator NCCL searches the node for a [`Graph`] per algorithm (how many channels, and
//! how fast each is), fills a table of latency and bandwidth from it once, and at every call takes
//! the entry with the least latency + bytes / bandwidth. A [`Communicator`] has both. All of it is as in
//! NCCL 2.30.7 (June 2026): `src/graph/search.cc`, `topo.h` and `tuning.cc`.
//!
//! What NCCL does not know (switch tiers, other groups on the same links, slow ranks) is not in
//! here either.

mod graph;
mod message;
mod tuner;
mod xml;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use graph::{Graph, Graphs, Interconnect, Node};
pub use message::{Message, POST, message};
pub use tuner::{Choice, Communicator};

/// Generations of GPUs that NCCL's constants tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Generation {
    /// Compute capability below 8.0.
    Volta,
    /// Compute capability 8.x.
    Ampere,
    /// Compute capability 9.x.
    Hopper,
    /// Compute capability 10.0 and above.
    Blackwell,
}

/// Makers of host processors that NCCL's constants tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cpu {
    /// Intel, and all that is not AMD.
    #[default]
    Intel,
    /// AMD.
    Amd,
}

/// What is asked for, in NCCL's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Function {
    /// One rank's buffer to all.
    Broadcast,
    /// The sum of all ranks' buffers to one.
    Reduce,
    /// Every rank's part to all.
    AllGather,
    /// A part of the sum to every rank.
    ReduceScatter,
    /// The sum to every rank.
    AllReduce,
}

/// NCCL's algorithms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Algorithm {
    /// A double binary tree over nodes, a chain inside each.
    Tree,
    /// A ring over all ranks.
    Ring,
    /// In-network reduction between nodes, every rank of a node to every head.
    CollnetDirect,
    /// In-network reduction between nodes, a chain inside each.
    CollnetChain,
    /// Reduction in the NVLink switch; in the network between nodes.
    Nvls,
    /// Reduction in the NVLink switch, a double binary tree between nodes.
    NvlsTree,
    /// Parallel aggregated trees: logarithmic gathers and scatters of one rank per node.
    Pat,
}

/// How NCCL's ranks tell each other that data is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// A flag with every 4 bytes: half the bandwidth, the least latency.
    Ll,
    /// A flag with every 120 bytes.
    Ll128,
    /// A flag with every chunk.
    Simple,
}

impl Function {
    /// All of them, in the order of NCCL's table.
    pub const ALL: [Self; 5] =
        [Self::Broadcast, Self::Reduce, Self::AllGather, Self::ReduceScatter, Self::AllReduce];

    /// Whether all ranks bring or receive a part, and no other.
    pub(crate) fn is_scattered(self) -> bool {
        matches!(self, Self::AllGather | Self::ReduceScatter)
    }
}

impl Function {
    /// The function for a kind; `None` for those that are messages between pairs to NCCL.
    #[must_use]
    pub fn of(kind: collective::Kind) -> Option<Self> {
        Some(match kind {
            // A barrier is an all-reduce of nothing.
            collective::Kind::AllReduce | collective::Kind::Barrier => Self::AllReduce,
            collective::Kind::ReduceScatter => Self::ReduceScatter,
            collective::Kind::AllGather => Self::AllGather,
            collective::Kind::Broadcast => Self::Broadcast,
            collective::Kind::Reduce => Self::Reduce,
            collective::Kind::AllToAll | collective::Kind::Gather | collective::Kind::Scatter => {
                return None;
            }
        })
    }
}

impl Algorithm {
    /// All of them, in the order of NCCL's table.
    pub const ALL: [Self; 7] = [
        Self::Tree,
        Self::Ring,
        Self::CollnetDirect,
        Self::CollnetChain,
        Self::Nvls,
        Self::NvlsTree,
        Self::Pat,
    ];
}

impl Protocol {
    /// All of them, in the order of NCCL's table.
    pub const ALL: [Self; 3] = [Self::Ll, Self::Ll128, Self::Simple];

    /// Bytes on the wire for each byte of data.
    #[must_use]
    pub fn overhead(self) -> f64 {
        match self {
            Self::Ll => 2.0,
            Self::Ll128 => 128.0 / 120.0,
            Self::Simple => 1.0,
        }
    }
}

impl fmt::Display for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Broadcast => "broadcast",
            Self::Reduce => "reduce",
            Self::AllGather => "all-gather",
            Self::ReduceScatter => "reduce-scatter",
            Self::AllReduce => "all-reduce",
        })
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Tree => "tree",
            Self::Ring => "ring",
            Self::CollnetDirect => "CollNet direct",
            Self::CollnetChain => "CollNet chain",
            Self::Nvls => "NVLS",
            Self::NvlsTree => "NVLSTree",
            Self::Pat => "PAT",
        })
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ll => "LL",
            Self::Ll128 => "LL128",
            Self::Simple => "Simple",
        })
    }
}
