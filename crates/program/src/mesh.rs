//! The arrangement of ranks along parallel axes.

use std::fmt;

use serde::{Deserialize, Serialize};
use units::Rank;

/// A parallel direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Axis {
    /// Ranks that split each product.
    Tensor,
    /// Ranks that split each sequence.
    Context,
    /// Ranks that split the batch.
    Data,
    /// Ranks that split the layers.
    Pipeline,
    /// The first and the last stage, which both hold a tied embedding.
    Tied,
    /// Every rank of the job.
    World,
}

impl fmt::Display for Axis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tensor => "tensor",
            Self::Context => "context",
            Self::Data => "data",
            Self::Pipeline => "pipeline",
            Self::Tied => "tied",
            Self::World => "world",
        })
    }
}

/// The degree of every axis. Ranks are numbered with tensor fastest, then context, data and
/// pipeline, so that the axes that talk most have neighbouring ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mesh {
    /// Tensor-parallel degree.
    pub tensor: u32,
    /// Context-parallel degree.
    pub context: u32,
    /// Data-parallel degree.
    pub data: u32,
    /// Pipeline stages.
    pub pipeline: u32,
}

impl Mesh {
    /// A single rank.
    pub const ONE: Self = Self { tensor: 1, context: 1, data: 1, pipeline: 1 };

    /// Ranks in all.
    #[must_use]
    pub fn ranks(&self) -> u32 {
        self.tensor * self.context * self.data * self.pipeline
    }

    /// Ranks in a group along `axis`.
    #[must_use]
    pub fn degree(&self, axis: Axis) -> u32 {
        match axis {
            Axis::Tensor => self.tensor,
            Axis::Context => self.context,
            Axis::Data => self.data,
            Axis::Pipeline => self.pipeline,
            Axis::Tied => self.pipeline.min(2),
            Axis::World => self.ranks(),
        }
    }

    /// How far apart neighbours along `axis` are numbered.
    fn stride(&self, axis: Axis) -> u32 {
        match axis {
            Axis::Tensor | Axis::World => 1,
            Axis::Context => self.tensor,
            Axis::Data => self.tensor * self.context,
            Axis::Pipeline => self.tensor * self.context * self.data,
            Axis::Tied => self.stride(Axis::Pipeline) * self.pipeline.saturating_sub(1).max(1),
        }
    }

    /// The place of `rank` in its group along `axis`.
    #[must_use]
    pub fn coordinate(&self, rank: Rank, axis: Axis) -> u32 {
        rank.0 / self.stride(axis) % self.degree(axis)
    }

    /// The first rank of the group of `rank` along `axis`.
    #[must_use]
    pub fn leader(&self, rank: Rank, axis: Axis) -> Rank {
        Rank(match axis {
            Axis::Tied => rank.0 % self.stride(Axis::Pipeline),
            _ => rank.0 - self.coordinate(rank, axis) * self.stride(axis),
        })
    }

    /// The ranks of the group of `rank` along `axis`, in the order of their coordinates.
    #[must_use]
    pub fn group(&self, rank: Rank, axis: Axis) -> Vec<Rank> {
        (0..self.degree(axis)).map(|place| self.peer(rank, axis, place)).collect()
    }

    /// The rank at `coordinate` along `axis` in the group of `rank`.
    #[must_use]
    pub fn peer(&self, rank: Rank, axis: Axis, coordinate: u32) -> Rank {
        Rank(self.leader(rank, axis).0 + coordinate * self.stride(axis))
    }
}

impl fmt::Display for Mesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let axes = [Axis::Data, Axis::Pipeline, Axis::Context, Axis::Tensor];
        let parts: Vec<String> = axes
            .into_iter()
            .filter(|axis| self.degree(*axis) > 1)
            .map(|axis| format!("{axis} {}", self.degree(axis)))
            .collect();
        if parts.is_empty() { f.write_str("1 rank") } else { f.write_str(&parts.join(" x ")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_is_where_its_group_says() {
        let mesh = Mesh { tensor: 2, context: 3, data: 2, pipeline: 4 };
        let axes = [Axis::Tensor, Axis::Context, Axis::Data, Axis::Pipeline, Axis::World];
        for rank in (0..mesh.ranks()).map(Rank) {
            for axis in axes {
                let group = mesh.group(rank, axis);
                assert_eq!(group.len() as u32, mesh.degree(axis));
                assert_eq!(group[mesh.coordinate(rank, axis) as usize], rank);
            }
        }
    }

    #[test]
    fn the_tied_group_is_the_first_and_the_last_stage() {
        let mesh = Mesh { tensor: 1, context: 1, data: 2, pipeline: 4 };
        assert_eq!(mesh.group(Rank(1), Axis::Tied), [Rank(1), Rank(7)]);
        assert_eq!(mesh.group(Rank(7), Axis::Tied), [Rank(1), Rank(7)]);
        assert_eq!(mesh.coordinate(Rank(7), Axis::Tied), 1);
    }
}
