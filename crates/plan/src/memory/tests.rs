//! Against published formulas and brute force; `measured` is against what was measured.

use std::collections::BTreeMap;

use cluster::Precision;
use model::{AttentionKernel, Config, Pass, catalogue};
use program::Mesh;
use proptest::prelude::*;
use units::Bytes;

use super::*;
use crate::schedule::turns;
use crate::{Batch, Layout, Recompute, Schedule, Shard};

mod measured;

const GIB: f64 = (1_u64 << 30) as f64;

fn find(name: &str) -> Config {
    catalogue::find(name).unwrap().clone()
}

fn layout(mesh: [u32; 4], micro_batch: u64, shard: Shard) -> Layout {
    let [tensor, context, data, pipeline] = mesh;
    let mesh = Mesh { tensor, context, data, pipeline, ..Mesh::ONE };
    Layout { sequence_parallel: true, ..Layout::new(mesh, micro_batch, shard) }
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
        let footprint = Footprint::new(&config);
        let activations = |recompute, sequence_parallel| {
            let layout = Layout {
                virtual_stages,
                recompute,
                sequence_parallel,
                attention: AttentionKernel::Unfused,
                ..layout([8, 1, 1, pipeline], micro_batch, Shard::None)
            };
            let options = Options { software: Software::MEGATRON_2022, ..Options::default() };
            footprint.stage(&layout, &batch, &options, 0).item(Item::Activations).as_f64() / GIB
        };
        let predicted = activations(Recompute::None, false);
        assert!((predicted / none - 1.0).abs() < 0.025, "{name}: {predicted} of {none}");
        let predicted = activations(Recompute::Selective, true);
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

/// The forward passes through each virtual stage of a rank that are alive at once, at the most, when
/// it takes its turns in the order that is lowered.
fn most_alive(layout: &Layout, rank: u32, microbatches: u32) -> u32 {
    let turns = turns(layout, rank, microbatches).unwrap();
    let alive = turns.iter().scan(0, |alive, turn| {
        *alive = if turn.pass == Pass::Forward { *alive + 1 } else { *alive - 1 };
        Some(*alive)
    });
    alive.max().unwrap()
}

fn chunks(layers: u32, layout: &Layout, batch: &Batch) -> Vec<Vec<Chunk>> {
    let config = Config { layers, ..find("llama-3-8b") };
    let footprint = Footprint::new(&config);
    let (microbatches, shape) = (layout.microbatches(batch), layout.shape(batch));
    let options = &Options::default();
    let chunks = |stage| {
        Place { footprint: &footprint, layout, options, shape, stage, microbatches }.chunks()
    };
    (0..layout.mesh.pipeline).map(chunks).collect()
}

proptest! {
    #[test]
    fn as_many_are_alive_as_the_lowered_order_keeps(
        stages in 1_u32..9,
        virtual_stages in 1_u32..5,
        microbatches in 1_u32..20,
        gpipe in proptest::bool::ANY,
    ) {
        // The interleaved order is defined for whole rounds.
        let rounds = if virtual_stages > 1 { stages } else { 1 };
        let microbatches = microbatches.next_multiple_of(rounds);
        let layout = Layout {
            virtual_stages,
            schedule: if gpipe { Schedule::Gpipe } else { Schedule::default() },
            ..layout([1, 1, 1, stages], 1, Shard::None)
        };
        let batch = Batch { sequence: 8, global_batch: u64::from(microbatches) };
        for (rank, chunks) in (0..).zip(chunks(stages * virtual_stages, &layout, &batch)) {
            let alive: u32 = chunks.iter().map(|chunk| chunk.alive).sum();
            prop_assert_eq!(alive, most_alive(&layout, rank, microbatches));
        }
    }

    /// In the interleaved order the k-th forward pass is that of virtual stage `k / stages`, round
    /// by round.
    #[test]
    fn virtual_stages_take_turns(stages in 1_u32..9, virtual_stages in 2_u32..5, rounds in 1_u32..4) {
        let microbatches = stages * rounds;
        let layout = Layout { virtual_stages, ..layout([1, 1, 1, stages], 1, Shard::None) };
        let batch = Batch { sequence: 8, global_batch: u64::from(microbatches) };
        for (rank, chunks) in (0..).zip(chunks(stages * virtual_stages, &layout, &batch)) {
            let mut alive = vec![0; virtual_stages as usize];
            for pass in 0..most_alive(&layout, rank, microbatches) {
                alive[(pass / stages % virtual_stages) as usize] += 1;
            }
            prop_assert_eq!(chunks.iter().map(|chunk| chunk.alive).collect::<Vec<_>>(), alive);
        }
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
        let even = Layout {
            // Whatever divides: a stage more or less for as many as are left over.
            stage_layers: (0..pipeline)
                .map(|stage| (stage + 1) * config.layers / pipeline - stage * config.layers / pipeline)
                .collect(),
            ..layout([1, context, 8, pipeline], micro_batch, Shard::None)
        };
        let stages = |layout: Layout| footprint.stages(&layout, &batch, &options);
        let sum = |stages: &[StageMemory], item: Item| {
            stages.iter().map(|stage| stage.item(item)).sum::<Bytes>()
        };
        let plain = stages(even.clone());
        let shared = Layout::ends_share_embedding(&config) && pipeline > 1;
        let copies = u64::from(shared);
        let parameters = config.parameter_count() + copies * config.vocabulary * config.hidden;
        prop_assert_eq!(sum(&plain, Item::Parameters), Bytes(2 * parameters));
        let states = [Item::Parameters, Item::Gradients, Item::Optimizer];
        for shard in [Shard::Optimizer, Shard::Gradients] {
            let sharded = stages(Layout { shard, ..even.clone() });
            for item in states {
                prop_assert!(sum(&sharded, item) <= sum(&plain, item));
            }
        }
        for recompute in [Recompute::Selective, Recompute::Layers(2), Recompute::Full] {
            let less = stages(Layout { recompute, ..even.clone() });
            prop_assert!(sum(&less, Item::Activations) <= sum(&plain, Item::Activations));
        }
        let gpipe = stages(Layout { schedule: Schedule::Gpipe, ..even.clone() });
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
        layout.virtual_stages = virtual_stages;
        let (layers, runs) = (config.layers, layout.stages());
        let first = |run: u32| (run * layers).div_ceil(runs);
        layout.stage_layers = (0..runs).map(|run| first(run + 1) - first(run)).collect();
        let batch = Batch { sequence, global_batch };
        let options = Options { precision, software: Software::NEMO, ..Options::default() };
        let fit = Footprint::new(&config).fit(&layout, &batch, &options, capacity);
        let peak = fit.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(peak.total() / capacity > 0.4, "{name}: {}", peak.describe(capacity));
    }
}
