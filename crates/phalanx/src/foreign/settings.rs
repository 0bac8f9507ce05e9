//! A layout in the words of other trainers.
//!
//! Names are those of Megatron-LM (megatron/training/arguments.py, core 0.14), torchtitan
//! (torchtitan/config/job_config.py, 2025-10) and NVIDIA NeMo (Megatron Bridge 0.2, its
//! configuration's overrides); all as of 2025-11.

use plan::{Batch, ContextExchange, Layout, Recompute, Schedule, Shard, Timing};
use serde::Serialize;

/// Settings for a trainer, and what it has no word for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Launch {
    pub trainer: &'static str,
    pub settings: Vec<String>,
    /// Keys of the layout that it cannot be told.
    pub lacks: Vec<String>,
}

/// The settings for all trainers.
pub fn launches(layout: &Layout, batch: &Batch) -> Vec<Launch> {
    vec![megatron(layout, batch), torchtitan(layout, batch), nemo(layout, batch)]
}

/// Whether stages are those that an embedding and a head in the place of a layer leave.
fn places(layout: &Layout) -> [bool; 2] {
    let layers = &layout.stage_layers;
    let most = layers.iter().max().copied().unwrap_or_default();
    let short = |stage: usize| layers.get(stage).is_some_and(|layers| layers + 1 == most);
    let last = layers.len().saturating_sub(1);
    let ends = [short(0), short(last)];
    let short = layers.iter().filter(|layers| **layers < most).count();
    let as_layers = short == ends.into_iter().filter(|end| *end).count();
    if as_layers { ends } else { [false, false] }
}

/// What Megatron has no word for.
fn megatron_lacks(layout: &Layout) -> Vec<String> {
    let mut lacks = Vec::new();
    if matches!(layout.schedule, Schedule::ZeroBubble | Schedule::Gpipe | Schedule::Text(_)) {
        lacks.push("schedule".to_owned());
    }
    if !layout.stage_layers.is_empty() && places(layout) == [false, false] {
        lacks.push("stage_layers (see --pipeline-model-parallel-layout)".to_owned());
    }
    lacks
}

fn megatron(layout: &Layout, batch: &Batch) -> Launch {
    let mesh = &layout.mesh;
    let mut settings = vec![
        format!("--tensor-model-parallel-size {}", mesh.tensor),
        format!("--pipeline-model-parallel-size {}", mesh.pipeline),
        format!("--context-parallel-size {}", mesh.context),
        format!("--micro-batch-size {}", layout.micro_batch),
        format!("--global-batch-size {}", batch.global_batch),
        format!("--seq-length {}", batch.sequence),
    ];
    let mut when = |used: bool, setting: String| settings.extend(used.then_some(setting));
    let stages = layout.virtual_stages;
    when(stages > 1, format!("--num-virtual-stages-per-pipeline-rank {stages}"));
    let [embedding, head] = places(layout);
    when(embedding, "--account-for-embedding-in-pipeline-split".to_owned());
    when(head, "--account-for-loss-in-pipeline-split".to_owned());
    when(mesh.expert > 1, format!("--expert-model-parallel-size {}", mesh.expert));
    when(mesh.expert > 1, format!("--expert-tensor-parallel-size {}", mesh.expert_tensor));
    when(layout.sequence_parallel, "--sequence-parallel".to_owned());
    let exchange =
        if layout.context_exchange == ContextExchange::Ring { "p2p" } else { "all_gather" };
    when(mesh.context > 1, format!("--cp-comm-type {exchange}"));
    when(layout.shard == Shard::Optimizer, "--use-distributed-optimizer".to_owned());
    let strategy = match layout.shard {
        Shard::Gradients => Some("optim_grads"),
        Shard::Parameters => Some("optim_grads_params"),
        Shard::None | Shard::Optimizer => None,
    };
    if let Some(strategy) = strategy {
        let sharding = format!("--data-parallel-sharding-strategy {strategy}");
        when(true, format!("--use-megatron-fsdp {sharding}"));
    }
    when(layout.gradient_reduction == Timing::Overlapped, "--overlap-grad-reduce".to_owned());
    let gathers = layout.shard == Shard::Optimizer;
    let overlapped = gathers && layout.parameter_gathering == Timing::Overlapped;
    when(overlapped, "--overlap-param-gather".to_owned());
    when(mesh.tensor > 1 && layout.sequence_parallel, "--tp-comm-overlap".to_owned());
    match &layout.recompute {
        Recompute::None => {}
        Recompute::Selective | Recompute::Segments(_) => {
            when(true, "--recompute-granularity selective".to_owned());
        }
        Recompute::Full => when(
            true,
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
                .to_owned(),
        ),
        Recompute::Layers(layers) => when(
            true,
            format!(
                "--recompute-granularity full --recompute-method block --recompute-num-layers {layers}"
            ),
        ),
    }
    Launch { trainer: "megatron-lm", settings, lacks: megatron_lacks(layout) }
}

fn torchtitan(layout: &Layout, batch: &Batch) -> Launch {
    let mesh = &layout.mesh;
    let (schedule, mut lacks) = match (&layout.schedule, layout.virtual_stages) {
        (Schedule::Gpipe, 1) => ("GPipe", vec![]),
        (Schedule::ZeroBubble, 2..) => ("InterleavedZeroBubble", vec![]),
        (Schedule::OneForwardOneBackward, _) => ("1F1B", vec![]),
        (Schedule::Interleaved, _) => ("Interleaved1F1B", vec![]),
        (_, 1) => ("1F1B", vec!["schedule".to_owned()]),
        _ => ("Interleaved1F1B", vec!["schedule".to_owned()]),
    };
    let shard = mesh.data / mesh.replicas;
    if layout.shard < Shard::Parameters && mesh.data > 1 {
        lacks.push(
            "shard (it is always parameters, or none as data_parallel_replicate_degree)".to_owned(),
        );
    }
    let per_rank = batch.global_batch / u64::from(mesh.data);
    let mut settings = vec![
        format!("--parallelism.tensor_parallel_degree={}", mesh.tensor),
        format!("--parallelism.context_parallel_degree={}", mesh.context),
        format!("--parallelism.pipeline_parallel_degree={}", mesh.pipeline),
        format!("--parallelism.data_parallel_shard_degree={shard}"),
        format!("--parallelism.data_parallel_replicate_degree={}", mesh.replicas),
        format!(
            "--training.local_batch_size={}",
            if mesh.pipeline > 1 { per_rank } else { layout.micro_batch }
        ),
        format!("--training.global_batch_size={}", batch.global_batch),
        format!("--training.seq_len={}", batch.sequence),
    ];
    let mut when = |used: bool, setting: String| settings.extend(used.then_some(setting));
    when(mesh.pipeline > 1, format!("--parallelism.pipeline_parallel_schedule={schedule}"));
    when(
        mesh.pipeline > 1,
        format!("--parallelism.pipeline_parallel_microbatch_size={}", layout.micro_batch),
    );
    when(mesh.expert > 1, format!("--parallelism.expert_parallel_degree={}", mesh.expert));
    let mode = match layout.recompute {
        Recompute::None => "none",
        Recompute::Selective | Recompute::Segments(_) => "selective",
        Recompute::Full => "full",
        Recompute::Layers(_) => {
            lacks.push("recompute of some layers".to_owned());
            "full"
        }
    };
    settings.push(format!("--activation_checkpoint.mode={mode}"));
    Launch { trainer: "torchtitan", settings, lacks }
}

fn nemo(layout: &Layout, batch: &Batch) -> Launch {
    let mesh = &layout.mesh;
    let mut settings = vec![
        format!("model.tensor_model_parallel_size={}", mesh.tensor),
        format!("model.pipeline_model_parallel_size={}", mesh.pipeline),
        format!("model.context_parallel_size={}", mesh.context),
        format!("model.sequence_parallel={}", layout.sequence_parallel),
        format!("train.micro_batch_size={}", layout.micro_batch),
        format!("train.global_batch_size={}", batch.global_batch),
        format!("model.seq_length={}", batch.sequence),
        format!("ddp.use_distributed_optimizer={}", layout.shard >= Shard::Optimizer),
        format!("ddp.overlap_grad_reduce={}", layout.gradient_reduction == Timing::Overlapped),
        format!("ddp.overlap_param_gather={}", layout.parameter_gathering == Timing::Overlapped),
    ];
    let mut when = |used: bool, setting: String| settings.extend(used.then_some(setting));
    let stages = layout.virtual_stages;
    when(stages > 1, format!("model.virtual_pipeline_model_parallel_size={stages}"));
    let [embedding, head] = places(layout);
    when(embedding, "model.account_for_embedding_in_pipeline_split=true".to_owned());
    when(head, "model.account_for_loss_in_pipeline_split=true".to_owned());
    when(mesh.expert > 1, format!("model.expert_model_parallel_size={}", mesh.expert));
    when(mesh.expert > 1, format!("model.expert_tensor_parallel_size={}", mesh.expert_tensor));
    when(
        mesh.tensor > 1 && layout.sequence_parallel,
        "comm_overlap.tp_comm_overlap=true".to_owned(),
    );
    match &layout.recompute {
        Recompute::None => {}
        Recompute::Selective | Recompute::Segments(_) => {
            when(true, "model.recompute_granularity=selective".to_owned());
        }
        Recompute::Full => {
            when(true, "model.recompute_granularity=full".to_owned());
            when(true, "model.recompute_method=uniform model.recompute_num_layers=1".to_owned());
        }
        Recompute::Layers(layers) => {
            when(true, "model.recompute_granularity=full".to_owned());
            when(true, format!("model.recompute_method=block model.recompute_num_layers={layers}"));
        }
    }
    Launch { trainer: "nemo", settings, lacks: megatron_lacks(layout) }
}

#[cfg(test)]
mod tests {
    use program::Mesh;

    use super::*;

    #[test]
    fn a_layout_is_told_in_every_trainers_words() {
        let mesh = Mesh { tensor: 8, context: 2, pipeline: 8, data: 64, ..Mesh::ONE };
        let mut stage_layers = vec![2; 64];
        (stage_layers[0], stage_layers[63]) = (1, 1);
        let layout = Layout {
            virtual_stages: 8,
            stage_layers,
            schedule: Schedule::Interleaved,
            sequence_parallel: true,
            recompute: Recompute::Layers(1),
            ..Layout::new(mesh, 1, Shard::Optimizer)
        };
        let batch = Batch { sequence: 8192, global_batch: 1536 };
        let text: Vec<String> = launches(&layout, &batch)
            .into_iter()
            .map(|launch| {
                format!(
                    "{}: {}; lacks {:?}",
                    launch.trainer,
                    launch.settings.join(" "),
                    launch.lacks
                )
            })
            .collect();
        insta::assert_snapshot!(text.join("\n"), @r#"
        megatron-lm: --tensor-model-parallel-size 8 --pipeline-model-parallel-size 8 --context-parallel-size 2 --micro-batch-size 1 --global-batch-size 1536 --seq-length 8192 --num-virtual-stages-per-pipeline-rank 8 --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split --sequence-parallel --cp-comm-type all_gather --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --tp-comm-overlap --recompute-granularity full --recompute-method block --recompute-num-layers 1; lacks []
        torchtitan: --parallelism.tensor_parallel_degree=8 --parallelism.context_parallel_degree=2 --parallelism.pipeline_parallel_degree=8 --parallelism.data_parallel_shard_degree=64 --parallelism.data_parallel_replicate_degree=1 --training.local_batch_size=24 --training.global_batch_size=1536 --training.seq_len=8192 --parallelism.pipeline_parallel_schedule=Interleaved1F1B --parallelism.pipeline_parallel_microbatch_size=1 --activation_checkpoint.mode=full; lacks ["shard (it is always parameters, or none as data_parallel_replicate_degree)", "recompute of some layers"]
        nemo: model.tensor_model_parallel_size=8 model.pipeline_model_parallel_size=8 model.context_parallel_size=2 model.sequence_parallel=true train.micro_batch_size=1 train.global_batch_size=1536 model.seq_length=8192 ddp.use_distributed_optimizer=true ddp.overlap_grad_reduce=true ddp.overlap_param_gather=true model.virtual_pipeline_model_parallel_size=8 model.account_for_embedding_in_pipeline_split=true model.account_for_loss_in_pipeline_split=true comm_overlap.tp_comm_overlap=true model.recompute_granularity=full model.recompute_method=block model.recompute_num_layers=1; lacks []
        "#);
    }
}
