//! How a model and a batch are spread over ranks.

use std::ops::Range;

use model::{Block, Config, Shape};
use program::Mesh;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// What the ranks of the data axis split among themselves instead of each holding it whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shard {
    /// Nothing: plain data parallelism.
    None,
    /// Optimizer state (`ZeRO` 1).
    Optimizer,
    /// Optimizer state and gradients (`ZeRO` 2).
    Gradients,
    /// Optimizer state, gradients and parameters (`ZeRO` 3, FSDP).
    Parameters,
}

/// What is trained on in one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch {
    /// Tokens in a sequence.
    pub sequence: u64,
    /// Sequences in a step, over all ranks.
    pub global_batch: u64,
}

/// A complete parallel layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// Degrees of the axes.
    pub mesh: Mesh,
    /// Sequences in a microbatch.
    pub micro_batch: u64,
    /// What the data axis splits.
    pub shard: Shard,
}

/// A layout as a job file gives it: what is left out is chosen by [`PartialLayout::complete`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartialLayout {
    /// Tensor-parallel degree.
    pub tensor: Option<u32>,
    /// Context-parallel degree.
    pub context: Option<u32>,
    /// Pipeline stages.
    pub pipeline: Option<u32>,
    /// Sequences in a microbatch.
    pub micro_batch: Option<u64>,
    /// What the data axis splits.
    pub shard: Option<Shard>,
}

/// A layout that does not fit the ranks, the layers or the batch.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum LayoutError {
    /// Ranks left over.
    #[error(
        "layout: tensor {tensor} x context {context} x pipeline {pipeline} does not divide {ranks} ranks; choose degrees whose product does, or change [cluster] accelerators"
    )]
    Ranks {
        /// Tensor-parallel degree.
        tensor: u32,
        /// Context-parallel degree.
        context: u32,
        /// Pipeline stages.
        pipeline: u32,
        /// Ranks of the job.
        ranks: u32,
    },
    /// Layers left over.
    #[error(
        "layout: pipeline {pipeline} does not divide the model's {layers} layers; choose one of {choices:?}"
    )]
    Layers {
        /// Pipeline stages.
        pipeline: u32,
        /// Layers of the model.
        layers: u32,
        /// Degrees that would do.
        choices: Vec<u32>,
    },
    /// Sequences left over.
    #[error(
        "layout: data {data} x micro_batch {micro_batch} does not divide global_batch {global_batch}; each data-parallel rank needs a whole number of microbatches"
    )]
    Batch {
        /// Data-parallel degree.
        data: u32,
        /// Sequences in a microbatch.
        micro_batch: u64,
        /// Sequences in a step.
        global_batch: u64,
    },
    /// An axis that cannot be run yet.
    #[error("layout: {axis} {degree} cannot be lowered yet; leave `{axis}` out or set it to 1")]
    Unsupported {
        /// Which axis.
        axis: &'static str,
        /// The degree asked for.
        degree: u32,
    },
    /// A kind of model that cannot be lowered yet.
    #[error("[model] {0}: such a model is counted, but cannot be lowered to a program yet")]
    Model(&'static str),
    /// A degree or size of zero.
    #[error("`{0}` is 0; it must be at least 1")]
    Zero(&'static str),
}

fn divisors(of: u64) -> impl Iterator<Item = u64> {
    (1..=of).filter(move |candidate| of.is_multiple_of(*candidate))
}

impl PartialLayout {
    /// Fills in what was left out, for `ranks` ranks.
    ///
    /// Pipeline 1 unless given; the optimizer sharded as soon as there is a data axis, since that
    /// moves no more bytes than an all-reduce; microbatches of at most 4 sequences, and enough of
    /// them (4 a stage) to keep a pipeline's bubble small.
    ///
    /// # Errors
    /// What the ranks, the layers or the batch cannot be divided into.
    pub fn complete(
        &self,
        config: &Config,
        batch: &Batch,
        ranks: u32,
    ) -> Result<Layout, LayoutError> {
        let (tensor, context) = (self.tensor.unwrap_or(1), self.context.unwrap_or(1));
        let pipeline = self.pipeline.unwrap_or(1);
        let named = [("tensor", tensor), ("context", context), ("pipeline", pipeline)];
        if let Some((name, _)) = named.into_iter().find(|(_, degree)| *degree == 0) {
            return Err(LayoutError::Zero(name));
        }
        let model_ranks = tensor.saturating_mul(context).saturating_mul(pipeline);
        if !ranks.is_multiple_of(model_ranks) {
            return Err(LayoutError::Ranks { tensor, context, pipeline, ranks });
        }
        let data = ranks / model_ranks;
        let mesh = Mesh { tensor, context, data, pipeline, ..Mesh::ONE };
        let micro_batch = self.micro_batch.unwrap_or_else(|| default_micro_batch(&mesh, batch));
        let default_shard = if mesh.data > 1 { Shard::Optimizer } else { Shard::None };
        let layout = Layout { mesh, micro_batch, shard: self.shard.unwrap_or(default_shard) };
        layout.check(config, batch)?;
        Ok(layout)
    }
}

fn default_micro_batch(mesh: &Mesh, batch: &Batch) -> u64 {
    let per_rank = batch.global_batch / u64::from(mesh.data);
    let wanted = if mesh.pipeline > 1 { 4 * u64::from(mesh.pipeline) } else { 1 };
    divisors(per_rank.max(1))
        .filter(|size| *size <= 4 && per_rank / size >= wanted.min(per_rank))
        .max()
        .unwrap_or(1)
}

impl Layout {
    /// One rank that does everything, in the same microbatches.
    #[must_use]
    pub fn one_rank(micro_batch: u64) -> Self {
        Self { mesh: Mesh::ONE, micro_batch, shard: Shard::None }
    }

    /// Refuses what cannot be divided.
    ///
    /// # Errors
    /// See [`LayoutError`].
    pub fn check(&self, config: &Config, batch: &Batch) -> Result<(), LayoutError> {
        let Mesh { tensor, context, data, pipeline, .. } = self.mesh;
        for (axis, degree) in [("tensor", tensor), ("context", context)] {
            if degree > 1 {
                return Err(LayoutError::Unsupported { axis, degree });
            }
        }
        let kinds = [
            ("experts", config.experts.is_some()),
            ("prediction_layers", config.prediction_layers > 0),
        ];
        if let Some((kind, _)) = kinds.into_iter().find(|(_, present)| *present) {
            return Err(LayoutError::Model(kind));
        }
        if !config.layers.is_multiple_of(pipeline) {
            let choices = divisors(u64::from(config.layers)).map(|d| d as u32).collect();
            return Err(LayoutError::Layers { pipeline, layers: config.layers, choices });
        }
        let sizes = [
            ("micro_batch", self.micro_batch),
            ("global_batch", batch.global_batch),
            ("sequence", batch.sequence),
        ];
        if let Some((name, _)) = sizes.into_iter().find(|(_, size)| *size == 0) {
            return Err(LayoutError::Zero(name));
        }
        let together = u64::from(data).saturating_mul(self.micro_batch);
        if !batch.global_batch.is_multiple_of(together) {
            return Err(LayoutError::Batch {
                data,
                micro_batch: self.micro_batch,
                global_batch: batch.global_batch,
            });
        }
        Ok(())
    }

    /// Microbatches of each data-parallel rank.
    #[must_use]
    pub fn microbatches(&self, batch: &Batch) -> u32 {
        (batch.global_batch / (u64::from(self.mesh.data) * self.micro_batch)) as u32
    }

    /// The size of a microbatch.
    #[must_use]
    pub fn shape(&self, batch: &Batch) -> Shape {
        Shape::whole(self.micro_batch, batch.sequence)
    }

    /// The layers of a stage.
    #[must_use]
    pub fn layers(&self, config: &Config, stage: u32) -> Range<u32> {
        let each = config.layers / self.mesh.pipeline;
        stage * each..(stage + 1) * each
    }

    /// The blocks a stage holds, in the order the forward pass meets them. A tied embedding is
    /// held by the first and by the last stage.
    #[must_use]
    pub fn blocks(&self, config: &Config, stage: u32) -> Vec<Block> {
        let (first, last) = (stage == 0, stage + 1 == self.mesh.pipeline);
        let embedding = first || (last && config.tied_embeddings);
        let mut blocks: Vec<Block> = self.layers(config, stage).map(Block::Layer).collect();
        if embedding {
            blocks.insert(0, Block::Embedding);
        }
        if last {
            blocks.push(Block::Head);
        }
        blocks
    }
}
