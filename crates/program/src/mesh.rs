//! The arrangement of ranks along parallel axes.

use std::fmt;

use model::Place;
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
    /// Ranks that hold the same parameters, reduce their gradients and share out their state: those
    /// that split the batch, or a sequence, or both. With replicas, those of one replica.
    Data,
    /// Ranks that hold the same share of the same parameters, one in each replica.
    Replica,
    /// Ranks that split the experts of a layer.
    Expert,
    /// Ranks that hold the same experts, reduce their gradients and share out their state.
    ExpertData,
    /// Ranks that split the layers.
    Pipeline,
    /// As pipeline, for gradients on their way back where they would meet activations: with two
    /// ranks that each hold several stages.
    PipelineBack,
    /// The first and the last stage, which both hold a tied embedding.
    Tied,
    /// Every rank of the job.
    World,
}

impl Axis {
    /// Every axis, in the order of their discriminants.
    pub const ALL: [Self; 10] = [
        Self::Tensor,
        Self::Context,
        Self::Data,
        Self::Replica,
        Self::Expert,
        Self::ExpertData,
        Self::Pipeline,
        Self::PipelineBack,
        Self::Tied,
        Self::World,
    ];

    /// Whether it leads from stage to stage.
    #[must_use]
    pub fn is_pipeline(self) -> bool {
        matches!(self, Self::Pipeline | Self::PipelineBack)
    }
}

impl fmt::Display for Axis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tensor => "tensor",
            Self::Context => "context",
            Self::Data => "data",
            Self::Replica => "replica",
            Self::Expert => "expert",
            Self::ExpertData => "expert-data",
            Self::Pipeline => "pipeline",
            Self::PipelineBack => "pipeline-back",
            Self::Tied => "tied",
            Self::World => "world",
        })
    }
}

/// In which order a mesh's axes lie on accelerators, from neighbours to those furthest apart. The
/// ranks that split batch and sequences stay together, as `data`.
///
/// Ranks are numbered the same whatever the order; it says which accelerator each is put on.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Placement {
    /// As ranks are numbered.
    #[default]
    TensorDataPipeline,
    /// The stages of a pipeline closer together than the ranks that reduce gradients.
    TensorPipelineData,
    /// The ranks that reduce gradients, or share out parameters, closest together.
    DataTensorPipeline,
    /// The stages of a pipeline closest together.
    PipelineTensorData,
}

impl Placement {
    /// Every order.
    pub const ALL: [Self; 4] = [
        Self::TensorDataPipeline,
        Self::TensorPipelineData,
        Self::DataTensorPipeline,
        Self::PipelineTensorData,
    ];

    /// Its name in job files and reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::TensorDataPipeline => "tensor-data-pipeline",
            Self::TensorPipelineData => "tensor-pipeline-data",
            Self::DataTensorPipeline => "data-tensor-pipeline",
            Self::PipelineTensorData => "pipeline-tensor-data",
        }
    }
}

/// The degree of every axis. Ranks are numbered with tensor fastest, then context, data and
/// pipeline, so that the axes that talk most have neighbouring ranks.
///
/// The ranks of a stage are the product of tensor, context and data. Experts lie across the same
/// ranks in a second arrangement: the ranks that split an expert's products fastest, then those
/// that split the experts, then those that hold the same ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mesh {
    /// Tensor-parallel degree.
    pub tensor: u32,
    /// Context-parallel degree.
    pub context: u32,
    /// Data-parallel degree: ranks that split the batch.
    pub data: u32,
    /// Pipeline stages.
    pub pipeline: u32,
    /// Expert-parallel degree.
    pub expert: u32,
    /// Ranks that split each expert's products: 1, or the tensor-parallel degree.
    pub expert_tensor: u32,
    /// Copies of the sharded parameters: above 1, state is shared out within each of as many parts
    /// of the data axis and repeated in the others (hybrid sharding).
    pub replicas: u32,
    /// Which accelerators the ranks are put on.
    #[serde(default)]
    pub placement: Placement,
}

impl Mesh {
    /// A single rank.
    pub const ONE: Self = Self {
        tensor: 1,
        context: 1,
        data: 1,
        pipeline: 1,
        expert: 1,
        expert_tensor: 1,
        replicas: 1,
        placement: Placement::TensorDataPipeline,
    };

    /// The accelerator that `rank` is put on, among those of the job.
    #[must_use]
    pub fn accelerator(&self, rank: Rank) -> Rank {
        let (tensors, shares) = (self.tensor, self.context * self.data);
        let tensor = rank.0 % tensors;
        let share = rank.0 / tensors % shares;
        let stage = rank.0 / (tensors * shares);
        let (pipeline, all) = (self.pipeline, tensors * shares);
        Rank(match self.placement {
            Placement::TensorDataPipeline => rank.0,
            Placement::TensorPipelineData => tensor + tensors * (stage + pipeline * share),
            Placement::DataTensorPipeline => share + shares * tensor + all * stage,
            Placement::PipelineTensorData => stage + pipeline * (tensor + tensors * share),
        })
    }

    /// Ranks in all.
    #[must_use]
    pub fn ranks(&self) -> u32 {
        self.tensor * self.context * self.data * self.pipeline
    }

    /// Ranks of a pipeline stage.
    #[must_use]
    pub fn stage_ranks(&self) -> u32 {
        self.tensor * self.context * self.data
    }

    /// The place of `rank` among those that split the batch.
    #[must_use]
    pub fn batch_coordinate(&self, rank: Rank) -> u32 {
        rank.0 / (self.tensor * self.context) % self.data
    }

    /// The place of `rank` among those that split parameters.
    #[must_use]
    pub fn place(&self, rank: Rank) -> Place {
        let coordinate = |axis| u64::from(self.coordinate(rank, axis));
        let tensor = coordinate(Axis::Tensor);
        Place {
            tensor,
            expert: coordinate(Axis::Expert),
            expert_tensor: tensor % u64::from(self.expert_tensor),
        }
    }

    /// Ranks in a group along `axis`.
    #[must_use]
    pub fn degree(&self, axis: Axis) -> u32 {
        match axis {
            Axis::Tensor => self.tensor,
            Axis::Context => self.context,
            Axis::Data => self.context * self.data / self.replicas,
            Axis::Replica => self.replicas,
            Axis::Expert => self.expert,
            Axis::ExpertData => self.stage_ranks() / (self.expert * self.expert_tensor),
            Axis::Pipeline | Axis::PipelineBack => self.pipeline,
            Axis::Tied => self.pipeline.min(2),
            Axis::World => self.ranks(),
        }
    }

    /// How far apart neighbours along `axis` are numbered.
    fn stride(&self, axis: Axis) -> u32 {
        match axis {
            Axis::Tensor | Axis::World => 1,
            Axis::Context | Axis::Data => self.tensor,
            Axis::Replica => self.tensor * self.degree(Axis::Data),
            Axis::Expert => self.expert_tensor,
            Axis::ExpertData => self.expert_tensor * self.expert,
            Axis::Pipeline | Axis::PipelineBack => self.stage_ranks(),
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
        let axes = [
            ("data", self.data),
            ("pipeline", self.pipeline),
            ("context", self.context),
            ("tensor", self.tensor),
            ("expert", self.expert),
        ];
        let parts: Vec<String> = axes
            .into_iter()
            .filter(|(_, degree)| *degree > 1)
            .map(|(axis, degree)| format!("{axis} {degree}"))
            .collect();
        if parts.is_empty() { f.write_str("1 rank") } else { f.write_str(&parts.join(" x ")) }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_rank_is_where_its_group_says() {
        let mesh = Mesh { tensor: 2, context: 3, data: 2, pipeline: 4, expert: 3, ..Mesh::ONE };
        let axes = [
            Axis::Tensor,
            Axis::Context,
            Axis::Data,
            Axis::Replica,
            Axis::Expert,
            Axis::ExpertData,
            Axis::Pipeline,
            Axis::World,
        ];
        for rank in (0..mesh.ranks()).map(Rank) {
            for axis in axes {
                let group = mesh.group(rank, axis);
                assert_eq!(group.len() as u32, mesh.degree(axis));
                assert_eq!(group[mesh.coordinate(rank, axis) as usize], rank);
            }
        }
    }

    #[test]
    fn every_axis_is_listed_where_its_number_says() {
        let numbers: Vec<usize> = Axis::ALL.into_iter().map(|axis| axis as usize).collect();
        assert_eq!(numbers, (0..Axis::ALL.len()).collect::<Vec<_>>());
        assert_eq!(Axis::ALL.last(), Some(&Axis::World), "the last that is declared");
    }

    #[test]
    fn the_ranks_that_share_parameters_are_those_that_split_the_tokens() {
        let mesh = Mesh { tensor: 2, context: 2, data: 4, replicas: 2, ..Mesh::ONE };
        let ranks = |numbers: &[u32]| numbers.iter().copied().map(Rank).collect::<Vec<_>>();
        assert_eq!(mesh.group(Rank(1), Axis::Data), ranks(&[1, 3, 5, 7]));
        assert_eq!(mesh.group(Rank(1), Axis::Replica), ranks(&[1, 9]));
        let experts = Mesh { expert: 4, ..mesh };
        assert_eq!(experts.group(Rank(1), Axis::Expert), ranks(&[0, 1, 2, 3]));
        assert_eq!(experts.group(Rank(1), Axis::ExpertData), ranks(&[1, 5, 9, 13]));
        assert_eq!(mesh.batch_coordinate(Rank(5)), 1);
    }

    #[test]
    fn the_tied_group_is_the_first_and_the_last_stage() {
        let mesh = Mesh { data: 2, pipeline: 4, ..Mesh::ONE };
        assert_eq!(mesh.group(Rank(1), Axis::Tied), [Rank(1), Rank(7)]);
        assert_eq!(mesh.group(Rank(7), Axis::Tied), [Rank(1), Rank(7)]);
        assert_eq!(mesh.coordinate(Rank(7), Axis::Tied), 1);
    }

    #[test]
    fn every_placement_puts_every_rank_on_an_accelerator_of_its_own() {
        for placement in Placement::ALL {
            let mesh = Mesh { tensor: 2, context: 3, data: 2, pipeline: 4, placement, ..Mesh::ONE };
            let mut put: Vec<u32> =
                (0..mesh.ranks()).map(|rank| mesh.accelerator(Rank(rank)).0).collect();
            // Neighbours along an axis are evenly spaced, whatever the order.
            for axis in [Axis::Tensor, Axis::Context, Axis::Data, Axis::Pipeline] {
                for rank in (0..mesh.ranks()).map(Rank) {
                    let group = mesh.group(rank, axis);
                    let places = group.iter().map(|rank| mesh.accelerator(*rank).0);
                    let places: Vec<u32> = places.collect();
                    let steps: BTreeSet<u32> =
                        places.windows(2).map(|two| two[1] - two[0]).collect();
                    assert!(steps.len() <= 1, "{placement:?} {axis} {places:?}");
                }
            }
            put.sort_unstable();
            assert_eq!(put, (0..mesh.ranks()).collect::<Vec<_>>(), "{placement:?}");
        }
    }
}
