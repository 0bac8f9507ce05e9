//! The layout that a row describes, with what its software does where the row says nothing.

use model::{AttentionKernel, Config, Segment};
use plan::{
    Batch, ContextExchange, Layout, PartialLayout, Recompute, Shard, TensorOverlap, Timing,
};
use program::Placement;

use super::predict::{Answer, because, stated};
use super::row::Row;

/// Software that kept attention's scores in memory: before `FlashAttention` (Dao et al. 2022).
const UNFUSED: [&str; 4] =
    ["megatron-2021", "megatron-2022", "megatron-deepspeed-2022", "deepspeed-zero3-2021"];
/// Software that moves gradients and parameters after the passes, not beside them.
const EXPOSED: [&str; 3] = ["megatron-2021", "megatron-2022", "megatron-deepspeed-2022"];
/// Software that reduces gradients in fp32; the rest does in 16 bits.
const FP32_GRADIENTS: [&str; 4] =
    ["llm-foundry-2023", "torchtitan", "nanotron-2025", "megatron-core-0.14"];

/// The layout of `row`.
pub fn layout(row: &Row, config: &Config, batch: &Batch) -> Answer<Layout> {
    if row.has("offload") {
        return because("activations are offloaded to the host");
    }
    if row.has("regression") {
        return because(
            "the source calls it a regression of a library, mended in the next release",
        );
    }
    let is = |names: &[&str]| names.iter().any(|name| row.software.starts_with(name));
    let exposed = is(&EXPOSED) || row.has("no-overlap");
    let timing = if exposed { Timing::Exposed } else { Timing::Overlapped };
    let (shard, shard_ranks) = shard(row)?;
    let ring = !row.has("no-overlap");
    let partial = PartialLayout {
        tensor: row.tensor,
        context: row.context,
        pipeline: row.pipeline,
        virtual_stages: row.virtual_stages,
        expert: row.expert.filter(|_| config.experts.is_some()),
        // The first recipes of Grok-1 split experts like everything else; later ones leave them
        // whole (NVIDIA dgxc-benchmarking v25.02 and v25.05, grok1).
        expert_tensor: row.tensor.filter(|_| {
            row.model.as_deref() == Some("grok-1") && row.software.starts_with("nemo-24")
        }),
        shard_ranks,
        placement: row.has("data-outermost").then_some(Placement::TensorPipelineData),
        micro_batch: Some(stated(row.micro_batch, "microbatch")?),
        shard: Some(shard),
        stage_layers: stage_layers(row, config),
        recompute: Some(recompute(row, config)?),
        sequence_parallel: Some(!row.has("no-sequence-parallel") && row.tensor > Some(1)),
        context_exchange: Some(if ring {
            ContextExchange::Ring
        } else {
            ContextExchange::AllGather
        }),
        attention: is(&UNFUSED).then_some(AttentionKernel::Unfused),
        tensor_overlap: Some(if row.has("no-overlap") {
            TensorOverlap::None
        } else {
            TensorOverlap::WeightGradients
        }),
        gradient_reduction: Some(timing),
        parameter_gathering: Some(timing),
        parameter_bytes: Some(parameter_bytes(row)),
        gradient_bytes: Some(if is(&FP32_GRADIENTS) || row.has("fp32-gradients") { 4 } else { 2 }),
        activation_bytes: Some(2),
        ..PartialLayout::default()
    };
    partial.complete(config, batch, row.accelerators).or_else(because)
}

/// The shard level, and among how many ranks when not all.
fn shard(row: &Row) -> Answer<(Shard, Option<u32>)> {
    Ok(match stated(row.shard.as_deref(), "shard level")? {
        "none" => (Shard::None, None),
        "optimizer" => (Shard::Optimizer, None),
        "gradients" => (Shard::Gradients, None),
        // Between the slices of TPUs there is plain data parallelism.
        "parameters" => (
            Shard::Parameters,
            row.per_domain
                .filter(|size| *size < row.accelerators)
                .map(|size| size / row.tensor.unwrap_or(1)),
        ),
        "hybrid" => (Shard::Parameters, Some(8)),
        other => return because(format!("shard level {other}")),
    })
}

/// Megatron since core 0.4 keeps parameters in fp8 where products take them so; torchtitan gathers
/// them in fp8 where a tensor has one scale (its docs/float8.md).
fn parameter_bytes(row: &Row) -> u8 {
    let gathers_fp8 = ["nemo", "mlperf-v4", "mlperf-v5", "mlperf-v6", "megatron-bridge"];
    let fp8 = row.precision.as_deref().is_some_and(|precision| precision == "fp8");
    let software = |name: &&str| row.software.starts_with(*name);
    let gathers = gathers_fp8.iter().any(software) || row.software == "torchtitan";
    if fp8 && gathers { 1 } else { 2 }
}

/// Where layers do not divide: the embedding and the head in the place of a layer each, if that
/// does; else stages as equal as can be, the last ones shorter.
fn stage_layers(row: &Row, config: &Config) -> Option<Vec<u32>> {
    let stages = row.pipeline? * row.virtual_stages.unwrap_or(1);
    let layers = config.layers;
    let both = (layers + 2).is_multiple_of(stages) && stages > 1;
    if row.has("embedding-as-layer") || (!layers.is_multiple_of(stages) && both) {
        let each = (layers + 2) / stages;
        let ends = |stage| u32::from(stage == 0) + u32::from(stage + 1 == stages);
        return Some((0..stages).map(|stage| each - ends(stage)).collect());
    }
    if layers.is_multiple_of(stages) {
        return None;
    }
    // Recipes of DeepSeek-V3 and its kin: the head, and the prediction layer with its own head, in
    // the place of three layers (Megatron-Bridge, recipes/deepseek/deepseek_v3.py, 2026-06).
    let each = (layers + 3) / stages;
    let ends = config.latent_attention.is_some() && (layers + 3).is_multiple_of(stages);
    if ends && each > 3 {
        let last = |stage| if stage + 1 == stages { each - 3 } else { each };
        return Some((0..stages).map(last).collect());
    }
    let (each, more) = (layers / stages, layers % stages);
    Some((0..stages).map(|stage| each + u32::from(stage < more)).collect())
}

fn recompute(row: &Row, config: &Config) -> Answer<Recompute> {
    let mode = stated(row.recompute.as_deref(), "recompute mode")?;
    // Megatron Core's module `mlp` is that of layers without experts.
    if mode == "none" && row.has("recompute-mlp") {
        return Ok(Recompute::Segments(vec![Segment::FeedForward]));
    }
    Ok(match mode {
        "none" => Recompute::None,
        "full" => Recompute::Full,
        "selective" if row.note.contains("selective layer") => Recompute::Layers(config.layers / 2),
        // torchtitan keeps every other product; these come nearest.
        "selective" if row.software.starts_with("torchtitan") => Recompute::Segments(vec![
            Segment::AttentionNorm,
            Segment::Qkv,
            Segment::Project,
            Segment::FeedForwardNorm,
        ]),
        "selective" if row.software == "fms-fsdp" => {
            return because("the source does not state which layers are recomputed");
        }
        // Up-projections, as the recipe of DeepSeek-V3 does.
        "selective" if config.latent_attention.is_some() => Recompute::Segments(vec![Segment::Qkv]),
        // One-pass attention recomputes its scores anyway.
        "selective" if !UNFUSED.contains(&row.software.as_str()) => Recompute::None,
        "selective" => Recompute::Selective,
        other => return because(format!("recompute mode {other}")),
    })
}
