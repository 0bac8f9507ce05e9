//! Accelerators, nodes and links as described hardware: what a cluster is made of, how fast its
//! parts are said to be, and which link joins two ranks.
//!
//! Nothing here knows a model or the passing of time. Described hardware comes from the
//! [`catalogue`]; what was measured on a machine at hand is the simulator's `Profile`.

pub mod catalogue;

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use units::{Bytes, BytesPerSecond, FlopsPerSecond, Rank, Seconds};

/// The number format that products are computed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// IEEE single precision.
    Fp32,
    /// Brain floating point: the range of fp32 in two bytes.
    Bf16,
    /// Eight-bit floating point.
    Fp8,
}

impl Precision {
    /// Bytes of one element.
    #[must_use]
    pub fn element(self) -> Bytes {
        match self {
            Self::Fp32 => Bytes(4),
            Self::Bf16 => Bytes(2),
            Self::Fp8 => Bytes(1),
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fp32 => "fp32",
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
        })
    }
}

/// A processor that does a rank's work, as its maker describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct Accelerator {
    /// Its catalogue name.
    pub name: String,
    /// Memory capacity.
    pub memory: Bytes,
    /// Memory bandwidth.
    pub memory_bandwidth: BytesPerSecond,
    /// Dense peak rate in each precision it has.
    pub peak: BTreeMap<Precision, FlopsPerSecond>,
    /// Where the numbers come from, and of when they are.
    pub source: String,
}

/// A connection as one rank sees it, in one direction.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Link {
    /// From the first byte sent to the first byte received.
    pub latency: Seconds,
    /// Most bytes a second that the rank can send, and at the same time receive, over it.
    pub bandwidth: BytesPerSecond,
}

/// Nodes of equal accelerators, joined by one kind of link inside a node and one between nodes.
#[derive(Debug, Clone, PartialEq)]
pub struct Cluster {
    /// Its catalogue name.
    pub name: String,
    /// What every rank computes on.
    pub accelerator: Accelerator,
    /// Accelerators in all.
    pub accelerators: u32,
    /// Accelerators in a node, at least 1.
    pub per_node: u32,
    /// The link between accelerators of one node.
    pub inside: Link,
    /// The link between accelerators of different nodes.
    pub between: Link,
    /// Where the numbers come from, and of when they are.
    pub source: String,
}

impl Cluster {
    /// Whether two ranks are in one node. Ranks fill nodes in their order, one per accelerator.
    #[must_use]
    pub fn same_node(&self, a: Rank, b: Rank) -> bool {
        a.0 / self.per_node == b.0 / self.per_node
    }

    /// The link that a message from `a` to `b` takes.
    #[must_use]
    pub fn link(&self, a: Rank, b: Rank) -> Link {
        if self.same_node(a, b) { self.inside } else { self.between }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_of_one_node_talk_over_its_inside_link() {
        let cluster = catalogue::find("dgx-h100-quantum2").unwrap();
        assert_eq!(cluster.link(Rank(8), Rank(15)), cluster.inside);
        assert_eq!(cluster.link(Rank(7), Rank(8)), cluster.between);
    }

    #[test]
    fn a_precision_is_written_as_in_a_job_file() {
        #[derive(Deserialize)]
        struct Training {
            precision: Precision,
        }
        for precision in [Precision::Fp32, Precision::Bf16, Precision::Fp8] {
            let text = format!("precision = \"{precision}\"");
            let training: Training = toml::from_str(&text).unwrap();
            assert_eq!(training.precision, precision);
        }
    }
}
