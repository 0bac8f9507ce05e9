//! What a layout must divide, and the errors that say what to change.

use model::{Config, Segment};
use program::{Mesh, Placement};
use thiserror::Error;

use crate::partial::divisors;
use crate::{Batch, ContextExchange, Layout, Recompute, Schedule, Shard, TensorOverlap};

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
        /// Pipeline ranks.
        pipeline: u32,
        /// Ranks of the job.
        ranks: u32,
    },
    /// Layers left over.
    #[error(
        "layout: pipeline {pipeline}{} does not divide the model's {layers} layers; choose one of {choices:?}, or set embedding_is_layer, head_is_layer, first_layers, last_layers or stage_layers", times(*.virtual_stages)
    )]
    Layers {
        /// Pipeline ranks.
        pipeline: u32,
        /// Stages of each.
        virtual_stages: u32,
        /// Layers of the model.
        layers: u32,
        /// Numbers of stages that would do.
        choices: Vec<u64>,
    },
    /// Uneven stages that do not add up.
    #[error(
        "layout: {layers} layers, {given} of them on the first and last rank as given, and {places} places for embedding and head do not spread evenly over {stages} stages; change first_layers or last_layers, or give stage_layers"
    )]
    Stages {
        /// Layers of the model.
        layers: u32,
        /// Stages of all ranks.
        stages: u32,
        /// Layers that the first and last rank were given.
        given: u32,
        /// Places of layers that embedding and head take.
        places: u32,
    },
    /// Stages listed one by one that do not add up.
    #[error(
        "layout: stage_layers lists {listed} stages with {sum} layers; pipeline x virtual_stages is {stages}, and the model has {layers} layers"
    )]
    StageLayers {
        /// Stages listed.
        listed: usize,
        /// Their layers.
        sum: u64,
        /// Stages of all ranks.
        stages: u32,
        /// Layers of the model.
        layers: u32,
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
    /// A degree that something cannot be split by.
    #[error("layout: {degree} {value} does not divide {quantity} {of}; {hint}")]
    Divide {
        /// The key.
        degree: &'static str,
        /// Its value.
        value: u64,
        /// What it must divide.
        quantity: &'static str,
        /// How much there is of it.
        of: u64,
        /// What would do.
        hint: String,
    },
    /// Choices that do not go together.
    #[error("layout: {0}")]
    Together(&'static str),
    /// A schedule given as text that does not fit.
    #[error("layout: schedule: {0}")]
    Schedule(String),
    /// What is planned and simulated, but cannot be carried out yet.
    #[error("layout: `{0}` is planned and simulated, but cannot be trained with yet; leave it out")]
    Unsupported(&'static str),
    /// A degree or size of zero.
    #[error("`{0}` is 0; it must be at least 1")]
    Zero(&'static str),
}

fn times(virtual_stages: u32) -> String {
    if virtual_stages > 1 { format!(" x virtual_stages {virtual_stages}") } else { String::new() }
}

impl LayoutError {
    pub(crate) fn divide(
        degree: &'static str,
        value: u64,
        quantity: &'static str,
        of: u64,
    ) -> Self {
        let choices = (1..=of.min(1 << 20)).filter(|choice| of.is_multiple_of(*choice)).take(12);
        let choices: Vec<String> = choices.map(|choice| choice.to_string()).collect();
        let hint = format!("choose one of {}", choices.join(", "));
        Self::Divide { degree, value, quantity, of, hint }
    }
}

/// Refuses what cannot be divided.
pub(crate) fn check(layout: &Layout, config: &Config, batch: &Batch) -> Result<(), LayoutError> {
    check_sizes(layout, batch)?;
    check_stages(layout, config)?;
    check_schedule(layout, batch)?;
    check_products(layout, config)?;
    check_sequence(layout, batch)?;
    check_experts(layout, config)?;
    check_shards(layout)
}

fn check_sizes(layout: &Layout, batch: &Batch) -> Result<(), LayoutError> {
    let sizes = [
        ("micro_batch", layout.micro_batch),
        ("global_batch", batch.global_batch),
        ("sequence", batch.sequence),
        ("virtual_stages", u64::from(layout.virtual_stages)),
    ];
    if let Some((name, _)) = sizes.into_iter().find(|(_, size)| *size == 0) {
        return Err(LayoutError::Zero(name));
    }
    let (data, micro_batch) = (layout.mesh.data, layout.micro_batch);
    let together = u64::from(data).saturating_mul(micro_batch);
    let global_batch = batch.global_batch;
    if !global_batch.is_multiple_of(together) || global_batch / together > u64::from(u32::MAX) {
        return Err(LayoutError::Batch { data, micro_batch, global_batch });
    }
    Ok(())
}

fn check_stages(layout: &Layout, config: &Config) -> Result<(), LayoutError> {
    let (pipeline, virtual_stages) = (layout.mesh.pipeline, layout.virtual_stages);
    let (layers, listed) = (config.layers, &layout.stage_layers);
    let stages = pipeline.saturating_mul(virtual_stages);
    let sum = listed.iter().map(|layers| u64::from(*layers)).sum();
    if !listed.is_empty() && (listed.len() != stages as usize || sum != u64::from(layers)) {
        return Err(LayoutError::StageLayers { listed: listed.len(), sum, stages, layers });
    }
    if listed.is_empty() && !layers.is_multiple_of(stages) {
        let choices = divisors(u64::from(layers)).collect();
        return Err(LayoutError::Layers { pipeline, virtual_stages, layers, choices });
    }
    Ok(())
}

fn check_schedule(layout: &Layout, batch: &Batch) -> Result<(), LayoutError> {
    let (microbatches, pipeline) = (layout.microbatches(batch), layout.mesh.pipeline);
    if layout.virtual_stages > 1 {
        if layout.schedule == Schedule::OneForwardOneBackward {
            return Err(LayoutError::Together(
                "schedule 1f1b has one stage a rank; with virtual_stages choose interleaved",
            ));
        }
        if !microbatches.is_multiple_of(pipeline) {
            let (quantity, of) = ("the microbatches of a rank,", u64::from(microbatches));
            return Err(LayoutError::divide("pipeline", u64::from(pipeline), quantity, of));
        }
    }
    let written = matches!(layout.schedule, Schedule::Text(_));
    for rank in (0..pipeline).filter(|_| written) {
        crate::schedule::turns(layout, rank, microbatches).map_err(LayoutError::Schedule)?;
    }
    Ok(())
}

fn check_products(layout: &Layout, config: &Config) -> Result<(), LayoutError> {
    let tensor = u64::from(layout.mesh.tensor);
    let widths = [("heads", config.heads), ("feed_forward", config.feed_forward)];
    for (quantity, of) in widths {
        if !of.is_multiple_of(tensor) {
            return Err(LayoutError::divide("tensor", tensor, quantity, of));
        }
    }
    let heads = config.kv_heads;
    let latent = config.latent_attention.is_some();
    if !latent && !heads.is_multiple_of(tensor) && !tensor.is_multiple_of(heads) {
        return Err(LayoutError::divide("tensor", tensor, "kv_heads", heads));
    }
    if tensor == 1 && layout.sequence_parallel {
        return Err(LayoutError::Together(
            "sequence_parallel splits what tensor splits; give tensor too, or leave it out",
        ));
    }
    Ok(())
}

fn check_sequence(layout: &Layout, batch: &Batch) -> Result<(), LayoutError> {
    let Mesh { tensor, context, .. } = layout.mesh;
    let of = batch.sequence;
    // Each rank has an early and a late part of the sequence, so that all have the same work.
    let parts = if context > 1 { 2 * u64::from(context) } else { 1 };
    if !of.is_multiple_of(parts) {
        return Err(LayoutError::divide("2 x context", parts, "sequence", of));
    }
    let pieces = match layout.tensor_overlap {
        TensorOverlap::Pieces(0) => return Err(LayoutError::Zero("tensor_overlap.pieces")),
        TensorOverlap::Pieces(pieces) if tensor > 1 => u64::from(pieces),
        _ => 1,
    };
    let split = if layout.sequence_parallel { u64::from(tensor) } else { 1 };
    let tokens = of / u64::from(context) * layout.micro_batch;
    if !tokens.is_multiple_of(split * pieces) {
        let quantity = "the tokens of a context-parallel rank,";
        return Err(LayoutError::divide("tensor x pieces", split * pieces, quantity, tokens));
    }
    if context > u32::from(u8::MAX) && layout.context_exchange == ContextExchange::Ring {
        return Err(LayoutError::Together("context_exchange ring goes around at most 255 ranks"));
    }
    Ok(())
}

fn check_experts(layout: &Layout, config: &Config) -> Result<(), LayoutError> {
    let Mesh { tensor, expert, expert_tensor, replicas, .. } = layout.mesh;
    let Some(experts) = config.experts else {
        return match expert {
            1 => Ok(()),
            _ => Err(LayoutError::Together("expert is for models with experts; leave it out")),
        };
    };
    if expert_tensor != 1 && expert_tensor != tensor {
        return Err(LayoutError::Together("expert_tensor is 1 or the same as tensor"));
    }
    let (degree, ranks) = (u64::from(expert), u64::from(layout.mesh.stage_ranks()));
    if !experts.count.is_multiple_of(degree) {
        return Err(LayoutError::divide("expert", degree, "experts.count", experts.count));
    }
    if !ranks.is_multiple_of(degree * u64::from(expert_tensor)) {
        let quantity = "the ranks of a stage,";
        return Err(LayoutError::divide("expert x expert_tensor", degree, quantity, ranks));
    }
    if !experts.width.is_multiple_of(u64::from(expert_tensor)) {
        let degree = u64::from(expert_tensor);
        return Err(LayoutError::divide("expert_tensor", degree, "experts.width", experts.width));
    }
    if tensor > 1 && !layout.sequence_parallel {
        return Err(LayoutError::Together(
            "with experts, tensor needs sequence_parallel = true: each rank routes its own tokens",
        ));
    }
    if expert > 1 && layout.mesh.placement != Placement::default() {
        return Err(LayoutError::Together(
            "with expert, placement is tensor-data-pipeline: experts lie across tensor and data",
        ));
    }
    if replicas > 1 {
        return Err(LayoutError::Together(
            "shard_ranks is for models without experts, whose state lies across other ranks",
        ));
    }
    Ok(())
}

fn check_shards(layout: &Layout) -> Result<(), LayoutError> {
    let alone = layout.mesh.degree(program::Axis::Data) == 1;
    if layout.local_steps > 0 && layout.mesh.replicas == 1 {
        return Err(LayoutError::Together(
            "local_steps is for groups that train apart; give local_groups of at least 2, or leave it out",
        ));
    }
    if layout.local_steps > 0 && !layout.mesh.data.is_multiple_of(layout.mesh.replicas) {
        return Err(LayoutError::Together("each of local_groups takes sequences of its own"));
    }
    let apart = layout.local_steps > 0;
    if !apart && layout.mesh.replicas > 1 && (layout.shard == Shard::None || alone) {
        return Err(LayoutError::Together(
            "shard_ranks says among how many ranks state is shared out; give at least 2 and a shard other than none, or leave it out",
        ));
    }
    if let Recompute::Segments(segments) = &layout.recompute
        && let Some(_) = segments.iter().find(|s| !s.is_layer() || **s == Segment::Merge)
    {
        return Err(LayoutError::Together("recompute.segments are segments of a layer"));
    }
    Ok(())
}
