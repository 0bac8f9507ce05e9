//! How a model and a batch are spread over ranks.

use std::ops::Range;

use model::{AttentionKernel, Block, Config, Shape};
use program::Mesh;
use serde::{Deserialize, Serialize};

use crate::{ContextExchange, LayoutError, Recompute, Schedule, Shard, TensorOverlap, Timing};

/// What is trained on in one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch {
    /// Tokens in a sequence.
    pub sequence: u64,
    /// Sequences in a step, over all ranks.
    pub global_batch: u64,
}

/// A complete parallel layout.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// Degrees of the axes.
    pub mesh: Mesh,
    /// Stages that each pipeline rank holds; stage `s` is on pipeline rank `s % pipeline`.
    pub virtual_stages: u32,
    /// Layers of every stage; none if all have the same.
    pub stage_layers: Vec<u32>,
    /// Sequences in a microbatch.
    pub micro_batch: u64,
    /// What the data axis splits.
    pub shard: Shard,
    /// Steps that replicas take apart, as groups of their own, before their parameters meet in an
    /// outer update; 0 where their gradients do in every step.
    #[serde(default)]
    pub local_steps: u32,
    /// The order of a pipeline rank's turns.
    pub schedule: Schedule,
    /// What the forward pass does not keep.
    pub recompute: Recompute,
    /// Whether tensor-parallel ranks split the sequence between products.
    pub sequence_parallel: bool,
    /// How context-parallel ranks come to each other's keys and values.
    pub context_exchange: ContextExchange,
    /// How attention is carried out.
    pub attention: AttentionKernel,
    /// What hides the transfers of tensor parallelism.
    pub tensor_overlap: TensorOverlap,
    /// Whether gradients are reduced beside the backward pass.
    pub gradient_reduction: Timing,
    /// Whether parameters are gathered beside the first forward pass.
    pub parameter_gathering: Timing,
    /// Bytes of a parameter on its way.
    pub parameter_bytes: u8,
    /// Bytes of a parameter's gradient on its way.
    pub gradient_bytes: u8,
    /// Bytes of an activation, or its gradient, on its way.
    pub activation_bytes: u8,
}

impl Layout {
    /// A layout of these degrees in which every other choice is the simplest.
    #[must_use]
    pub fn new(mesh: Mesh, micro_batch: u64, shard: Shard) -> Self {
        Self {
            mesh,
            virtual_stages: 1,
            stage_layers: Vec::new(),
            micro_batch,
            shard,
            local_steps: 0,
            schedule: Schedule::default(),
            recompute: Recompute::default(),
            sequence_parallel: false,
            context_exchange: ContextExchange::default(),
            attention: AttentionKernel::default(),
            tensor_overlap: TensorOverlap::default(),
            gradient_reduction: Timing::default(),
            parameter_gathering: Timing::default(),
            parameter_bytes: 4,
            gradient_bytes: 4,
            activation_bytes: 4,
        }
    }

    /// One rank that does everything, in the same microbatches.
    #[must_use]
    pub fn one_rank(micro_batch: u64) -> Self {
        Self::new(Mesh::ONE, micro_batch, Shard::None)
    }

    /// Refuses what cannot be divided.
    ///
    /// # Errors
    /// See [`LayoutError`].
    pub fn check(&self, config: &Config, batch: &Batch) -> Result<(), LayoutError> {
        crate::check::check(self, config, batch)
    }

    /// Refuses what is planned and simulated, but cannot be carried out yet.
    ///
    /// # Errors
    /// [`LayoutError::Unsupported`], which names the key.
    pub fn require_runnable(&self) -> Result<(), LayoutError> {
        let keys = [
            ("expert_tensor", self.mesh.expert_tensor > 1),
            ("attention", self.attention != AttentionKernel::Flash),
        ];
        match keys.into_iter().find(|(_, used)| *used) {
            Some((key, _)) => Err(LayoutError::Unsupported(key)),
            None => Ok(()),
        }
    }

    /// Microbatches of each data-parallel rank.
    #[must_use]
    pub fn microbatches(&self, batch: &Batch) -> u32 {
        (batch.global_batch / (u64::from(self.mesh.data) * self.micro_batch)) as u32
    }

    /// The size of a microbatch, and of what a rank sees of it.
    #[must_use]
    pub fn shape(&self, batch: &Batch) -> Shape {
        let Mesh { tensor, context, expert, expert_tensor, .. } = self.mesh;
        Shape {
            tensor: u64::from(tensor),
            context: u64::from(context),
            expert: u64::from(expert),
            expert_tensor: u64::from(expert_tensor),
            sequence_parallel: self.sequence_parallel,
            attention: self.attention,
            ..Shape::whole(self.micro_batch, batch.sequence)
        }
    }

    /// Stages of all pipeline ranks together.
    #[must_use]
    pub fn stages(&self) -> u32 {
        self.mesh.pipeline * self.virtual_stages
    }

    /// The stages of a pipeline rank, in the order the forward pass meets them.
    pub fn stages_of(&self, rank: u32) -> impl Iterator<Item = u32> + use<> {
        (rank..self.stages()).step_by(self.mesh.pipeline as usize)
    }

    /// The layers of a stage.
    #[must_use]
    pub fn layers(&self, config: &Config, stage: u32) -> Range<u32> {
        if self.stage_layers.is_empty() {
            let each = config.layers / self.stages();
            return stage * each..(stage + 1) * each;
        }
        let sizes = &self.stage_layers[..=stage as usize];
        let end: u32 = sizes.iter().sum();
        end - self.stage_layers[stage as usize]..end
    }

    /// The blocks of a stage, in the order the forward pass meets them.
    #[must_use]
    pub fn stage_blocks(&self, config: &Config, stage: u32) -> Vec<Block> {
        let (first, last) = (stage == 0, stage + 1 == self.stages());
        let mut blocks = Vec::new();
        blocks.extend(first.then_some(Block::Embedding));
        for layer in self.layers(config, stage) {
            blocks.push(Block::Layer(layer));
            blocks.extend(config.experts_of(layer).map(|_| Block::Experts(layer)));
        }
        if last {
            blocks.push(Block::Head);
            for number in 0..config.prediction_layers {
                let layer = config.prediction_layer(number);
                blocks.push(Block::Prediction(number));
                blocks.extend(config.experts_of(layer).map(|_| Block::Experts(layer)));
            }
        }
        blocks
    }

    /// Whether the first and the last stage both use the word embedding.
    #[must_use]
    pub fn ends_share_embedding(config: &Config) -> bool {
        config.tied_embeddings || config.prediction_layers > 0
    }

    /// The blocks a pipeline rank holds, in the order the forward pass meets them. A shared
    /// embedding is held by the first and by the last stage.
    #[must_use]
    pub fn blocks(&self, config: &Config, rank: u32) -> Vec<Block> {
        let mut blocks: Vec<Block> =
            self.stages_of(rank).flat_map(|stage| self.stage_blocks(config, stage)).collect();
        let last = rank + 1 == self.mesh.pipeline;
        if last && Self::ends_share_embedding(config) && !blocks.contains(&Block::Embedding) {
            blocks.insert(0, Block::Embedding);
        }
        blocks
    }
}
