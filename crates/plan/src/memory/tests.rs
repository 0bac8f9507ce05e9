//! Against published formulas and brute force; `measured` is against what was measured.

use std::collections::BTreeMap;

use cluster::Precision;
use model::{AttentionKernel, Config, Pass, catalogue};
use program::Mesh;
use proptest::prelude::*;
use units::Bytes;

use super::*;
use crate::schedule::turns;
use crate::{Batch, Layout, Shard};

mod measured;

const GIB: f64 = (1_u64 << 30) as f64;

fn find(name: &str) -> Config {
    catalogue::find(name).unwrap().clone()
}

fn layout(mesh: [u32; 4], micro_batch: u64, shard: Shard) -> Layout {
    let [tensor, context, data, pipeline] = mesh;
    let mesh = Mesh { tensor, context, data, pipeline, ..Mesh::ONE };
    Layout::new(mesh, micro_batch, shard)
}

/// Figure 1 of Korthikanti et al. 2022 (arXiv:2205.05198): GiB of activations on the first stage,
/// with nothing recomputed on tensor-parallel ranks, and with sequence parallelism and selective
/// recomputation. The layouts are those of its table 3, 8 tensor-parallel ranks each. The figure leaves
/// out the mask of the dropout behind the embedding, which is counted here.
#[test]
fn activations_are_those_of_korthikanti() {
    let figure = [
        ("megatron-22b", 1, 1, 4, 59.25, 9.56),
        ("gpt-3-175b", 8, 3, 1, 66.84, 12.35),
        ("megatron-529.6b", 35, 3, 1, 114.02, 23.08),
        ("megatron-1008b", 64, 1, 1, 131.25, 26.56),
    ];
    for (name, pipeline, virtual_stages, micro_batch, none, both) in figure {
        let mut config = find(name);
        config.dropout = true;
        let batch = Batch { sequence: 2048, global_batch: 512 * micro_batch };
        let layout = layout([8, 1, 1, pipeline], micro_batch, Shard::None);
        let footprint = Footprint::new(&config);
        let activations = |recompute, sequence_parallel| {
            let options = Options {
                virtual_stages,
                recompute,
                sequence_parallel,
                attention: AttentionKernel::Unfused,
                software: Software::MEGATRON_2022,
                ..Options::default()
            };
            footprint.stage(&layout, &batch, &options, 0).item(Item::Activations).as_f64() / GIB
        };
        let predicted = activations(Recompute::None, false);
        assert!((predicted / none - 1.0).abs() < 0.025, "{name}: {predicted} of {none}");
        let predicted = activations(Recompute::Attention, true);
        assert!((predicted / both - 1.0).abs() < 0.04, "{name}: {predicted} of {both}");
    }
}

/// ZeRO (arXiv:1910.02054), figure 1, with gradients in fp32: 18 bytes a parameter, of which each
/// level shards more.
#[test]
fn states_are_those_of_zero() {
    let config = find("llama-3-8b");
    let footprint = Footprint::new(&config);
    let batch = Batch { sequence: 8192, global_batch: 64 };
    let parameters = config.parameter_count() as f64;
    let software = Software { vocabulary_multiple: 1, ..Software::MEGATRON_CORE };
    let options = Options { software, ..Options::default() };
    let levels = [
        (Shard::None, 18.0),
        (Shard::Optimizer, 6.0 + 12.0 / 64.0),
        (Shard::Gradients, 2.0 + 16.0 / 64.0),
        (Shard::Parameters, 16.0 / 64.0),
    ];
    for (shard, bytes) in levels {
        let stage = footprint.peak(&layout([1, 1, 64, 1], 1, shard), &batch, &options);
        let states = [Item::Parameters, Item::Gradients, Item::Optimizer];
        let states: Bytes = states.map(|item| stage.item(item)).into_iter().sum();
        assert!((states.as_f64() / parameters - bytes).abs() < 1e-3, "{shard:?}: {states}");
    }
}

/// The microbatches alive at once when a stage takes its turns in the order that is lowered.
fn most_alive(stage: u32, stages: u32, microbatches: u32) -> u32 {
    let layout = layout([1, 1, 1, stages], 1, Shard::None);
    let turns = turns(&layout, stage, microbatches).unwrap();
    let alive = turns.iter().scan(0, |alive, turn| {
        *alive = if turn.pass == Pass::Forward { *alive + 1 } else { *alive - 1 };
        Some(*alive)
    });
    alive.max().unwrap()
}

fn chunks(layers: u32, layout: &Layout, batch: &Batch, options: &Options) -> Vec<Vec<Chunk>> {
    let config = Config { layers, ..find("llama-3-8b") };
    let footprint = Footprint::new(&config);
    let microbatches = layout.microbatches(batch);
    let shape = options.shape(layout, batch);
    let chunks = |stage| {
        Place { footprint: &footprint, layout, options, shape, stage, microbatches }.chunks()
    };
    (0..layout.mesh.pipeline).map(chunks).collect()
}

proptest! {
    #[test]
    fn as_many_are_alive_as_the_lowered_order_keeps(stages in 1_u32..9, microbatches in 1_u64..20) {
        let layout = layout([1, 1, 1, stages], 1, Shard::None);
        let batch = Batch { sequence: 8, global_batch: microbatches };
        let all = chunks(32, &layout, &batch, &Options::default());
        for (stage, chunks) in (0..).zip(&all) {
            prop_assert_eq!(chunks[0].alive, most_alive(stage, stages, microbatches as u32));
        }
    }

    /// In the interleaved order the k-th forward pass is that of virtual stage `k / stages`, round
    /// by round.
    #[test]
    fn virtual_stages_take_turns(stages in 1_u32..9, virtual_stages in 2_u32..5, rounds in 1_u32..4) {
        let microbatches = stages * rounds;
        let layout = layout([1, 1, 1, stages], 1, Shard::None);
        let batch = Batch { sequence: 8, global_batch: u64::from(microbatches) };
        let options = Options { virtual_stages, ..Options::default() };
        for (stage, chunks) in (0..).zip(chunks(64, &layout, &batch, &options)) {
            let warm_up = 2 * (stages - 1 - stage) + (virtual_stages - 1) * stages + 1;
            let mut alive = vec![0; virtual_stages as usize];
            for pass in 0..warm_up.min(microbatches * virtual_stages) {
                alive[(pass / stages % virtual_stages) as usize] += 1;
            }
            prop_assert_eq!(chunks.iter().map(|chunk| chunk.alive).collect::<Vec<_>>(), alive);
        }
    }

    #[test]
    fn every_layer_is_dealt_once(
        layers in 1_u32..130,
        stages in 1_u32..17,
        virtual_stages in 1_u32..5,
        weight in 0_u32..3,
    ) {
        let layout = layout([1, 1, 1, stages], 1, Shard::None);
        let batch = Batch { sequence: 8, global_batch: 8 };
        let weight = f64::from(weight);
        let ends = Ends { embedding: weight, head: weight };
        let options = Options { virtual_stages, ends, ..Options::default() };
        let all = chunks(layers, &layout, &batch, &options);
        let dealt: Vec<&Chunk> = all.iter().flatten().collect();
        prop_assert_eq!(dealt.iter().map(|chunk| chunk.layers()).sum::<u32>(), layers);
        prop_assert_eq!(dealt.iter().filter(|chunk| chunk.embedding).count(), 1);
        prop_assert_eq!(dealt.iter().filter(|chunk| chunk.head).count(), 1);
        let most = dealt.iter().map(|chunk| chunk.layers()).max().unwrap();
        let units = f64::from(layers) + 2.0 * weight;
        prop_assert!(f64::from(most) <= (units / f64::from(stages * virtual_stages)).ceil());
    }

    /// Whatever the model: stages together hold its parameters, sharding or recomputing more never
    /// takes more of what it is for, and all forward passes first never keep less.
    #[test]
    fn less_is_less(
        name in proptest::sample::select(catalogue::names().collect::<Vec<_>>()),
        pipeline in 1_u32..9,
        micro_batch in 1_u64..5,
        context in 1_u32..3,
    ) {
        let config = find(name);
        let footprint = Footprint::new(&config);
        let batch = Batch { sequence: 4096, global_batch: 64 * micro_batch };
        let software = Software { vocabulary_multiple: 1, ..Software::MEGATRON_CORE };
        let options = Options { software, ..Options::default() };
        let stages = |shard, options: &Options| {
            footprint.stages(&layout([1, context, 8, pipeline], micro_batch, shard), &batch, options)
        };
        let sum = |stages: &[StageMemory], item: Item| {
            stages.iter().map(|stage| stage.item(item)).sum::<Bytes>()
        };
        let plain = stages(Shard::None, &options);
        let copies = if config.tied_embeddings && pipeline > 1 { 1 } else { 0 };
        let parameters = config.parameter_count() + copies * config.vocabulary * config.hidden;
        prop_assert_eq!(sum(&plain, Item::Parameters), Bytes(2 * parameters));
        let states = [Item::Parameters, Item::Gradients, Item::Optimizer];
        for shard in [Shard::Optimizer, Shard::Gradients] {
            let sharded = stages(shard, &options);
            for item in states {
                prop_assert!(sum(&sharded, item) <= sum(&plain, item));
            }
        }
        for recompute in [Recompute::Attention, Recompute::Layers(2), Recompute::Full] {
            let less = stages(Shard::None, &Options { recompute, ..options });
            prop_assert!(sum(&less, Item::Activations) <= sum(&plain, Item::Activations));
        }
        let gpipe = stages(Shard::None, &Options { order: Order::Gpipe, ..options });
        prop_assert!(sum(&gpipe, Item::Activations) >= sum(&plain, Item::Activations));
    }
}

#[test]
fn what_does_not_fit_says_why_and_what_to_change() {
    let config = find("llama-3-70b");
    let footprint = Footprint::new(&config);
    let batch = Batch { sequence: 8192, global_batch: 128 };
    let capacity = Bytes(80 << 30);
    let options = Options::default();
    let fit = |layout: &Layout| footprint.fit(layout, &batch, &options, capacity);
    let message = |layout: &Layout| fit(layout).unwrap_err().to_string();

    let whole = message(&layout([4, 1, 2, 4], 1, Shard::None));
    assert_eq!(
        whole,
        "layout does not fit: stage 0: 124.57 GiB of 80.00 GiB; optimizer state 50.76 GiB; try tensor = 8 (63.45 GiB)"
    );
    let deep = message(&layout([4, 1, 2, 8], 4, Shard::Optimizer));
    assert_eq!(
        deep,
        r#"layout does not fit: stage 0: 204.86 GiB of 80.00 GiB; activations 167.66 GiB of 8 microbatches; try recompute = "full" (44.50 GiB)"#
    );
    let one = message(&layout([1, 1, 1, 1], 1, Shard::None));
    assert_eq!(
        one,
        "layout does not fit: stage 0: 1.37 TiB of 80.00 GiB; optimizer state 788.50 GiB; no single change is enough; tensor = 2 and twice the accelerators helps most (700.81 GiB), together with others"
    );
    let good = fit(&layout([8, 1, 2, 4], 1, Shard::Optimizer)).unwrap();
    assert_eq!(
        good.describe(capacity),
        "stage 0: 50.37 GiB of 80.00 GiB; activations 20.96 GiB of 4 microbatches"
    );
}

/// Layouts that were run and published on H100 and GB200: NVIDIA's dgxc-benchmarking recipes (24.12
/// and 25.04) and `MLPerf` Training v4.1, v5.0 and v6.0.
#[test]
fn what_was_run_fits() {
    let (h100, gb200) = ("h100-sxm", "gb200");
    let runs = [
        // Model, accelerator, mesh and experts, virtual stages, sequence, global and micro batch.
        ("llama-3-8b", h100, [1, 2, 4, 1, 1], 1, 8192, 128, 1, Precision::Fp8),
        ("llama-3-70b", h100, [4, 2, 64, 4, 1], 5, 8192, 4096, 1, Precision::Bf16),
        ("llama-3.1-405b", h100, [8, 2, 4, 9, 1], 7, 8192, 252, 1, Precision::Bf16),
        ("llama-3.1-405b", h100, [8, 2, 4, 8, 1], 8, 8192, 256, 1, Precision::Fp8),
        ("llama-3.1-405b", h100, [8, 2, 64, 8, 1], 8, 8192, 1536, 1, Precision::Fp8),
        ("gpt-3-175b", h100, [4, 1, 48, 8, 1], 4, 2048, 3072, 2, Precision::Fp8),
        ("deepseek-v3", gb200, [2, 1, 1024, 4, 32], 4, 4096, 16384, 1, Precision::Mxfp8),
    ];
    for (name, accelerator, mesh, virtual_stages, sequence, global_batch, micro_batch, precision) in
        runs
    {
        let config = find(name);
        let capacity = cluster::catalogue::accelerator(accelerator).unwrap().memory;
        let [tensor, context, data, pipeline, expert] = mesh;
        let mut layout = layout([tensor, context, data, pipeline], micro_batch, Shard::Optimizer);
        layout.mesh.expert = expert;
        let batch = Batch { sequence, global_batch };
        let options =
            Options { virtual_stages, precision, software: Software::NEMO, ..Options::default() };
        let fit = Footprint::new(&config).fit(&layout, &batch, &options, capacity);
        let peak = fit.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(peak.total() / capacity > 0.4, "{name}: {}", peak.describe(capacity));
    }
}
