//! Products of every axis and option: lowered, and proved sound for every rank.

use model::{
    Activation, AttentionKernel, Block, Experts, Norm, Pass, Positions, Segment, catalogue,
};
use program::{Axis, Buffer, Instruction, Mesh, Program, Transfer, Value};

use super::config;
use crate::schedule::turns;
use crate::*;

/// Every combination of one choice from each list.
macro_rules! product {
    ($($name:ident in $values:expr),+ $(,)? => $body:block) => {
        product!(@ [$($name in $values),+] $body)
    };
    (@ [$name:ident in $values:expr $(, $rest:ident in $others:expr)*] $body:block) => {
        for $name in $values { product!(@ [$($rest in $others),*] $body) }
    };
    (@ [] $body:block) => { $body };
}

fn proved(config: &model::Config, layout: &Layout, batch: &Batch) -> Program {
    let program =
        lower(config, layout, batch).unwrap_or_else(|error| panic!("{layout:?}: {error}"));
    if let Err(error) = program.verify_every_rank() {
        panic!("{layout:?}: {error}\n{program}");
    }
    let evaluation = lower_evaluation(config, layout, batch).unwrap();
    assert_eq!(evaluation.verify_every_rank(), Ok(()), "{layout:?}: evaluation");
    program
}

/// A batch of `microbatches` microbatches of one sequence for every data-parallel rank.
fn batch(mesh: &Mesh, microbatches: u32) -> Batch {
    Batch { sequence: 16, global_batch: u64::from(mesh.data * microbatches) }
}

const SHARDS: [Shard; 4] = [Shard::None, Shard::Optimizer, Shard::Gradients, Shard::Parameters];

fn schedules(virtual_stages: u32) -> Vec<Schedule> {
    let alternating = match virtual_stages {
        1 => Schedule::OneForwardOneBackward,
        _ => Schedule::Interleaved,
    };
    vec![alternating, Schedule::Gpipe, Schedule::ZeroBubble]
}

#[test]
fn tensor_context_data_and_pipeline_in_any_product() {
    product!(tensor in [1, 2, 4], context in [1, 2], data in [1, 2], pipeline in [1, 2],
        sequence_parallel in [false, true], shard in SHARDS, tied in [false, true] => {
        let mesh = Mesh { tensor, context, data, pipeline, ..Mesh::ONE };
        if mesh.ranks() > 8 || (tensor == 1 && sequence_parallel) {
            continue;
        }
        let config = model::Config { heads: 4, ..config(4, tied) };
        let layout = Layout { sequence_parallel, ..Layout::new(mesh, 1, shard) };
        proved(&config, &layout, &batch(&mesh, 3));
    });
}

#[test]
fn every_schedule_over_every_number_of_stages() {
    product!(pipeline in [1, 2, 3, 4], virtual_stages in [1, 2, 3], rounds in [1, 2, 3],
        shard in SHARDS, data in [1, 2] => {
        for schedule in schedules(virtual_stages) {
            let mesh = Mesh { pipeline, data, ..Mesh::ONE };
            let layout = Layout { virtual_stages, schedule, ..Layout::new(mesh, 1, shard) };
            let config = config(pipeline * virtual_stages, rounds == 2);
            proved(&config, &layout, &batch(&mesh, rounds * pipeline));
        }
    });
}

#[test]
fn every_option_with_every_axis() {
    let recompute = [
        Recompute::Selective,
        Recompute::Full,
        Recompute::Layers(1),
        Recompute::Segments(vec![Segment::FeedForwardNorm, Segment::FeedForward]),
    ];
    let overlaps = [TensorOverlap::None, TensorOverlap::Pieces(2)];
    let exchanges = [ContextExchange::AllGather, ContextExchange::Ring];
    product!(recompute in &recompute, tensor_overlap in overlaps, context_exchange in exchanges,
        timing in [Timing::Overlapped, Timing::Exposed], sequence_parallel in [false, true],
        virtual_stages in [1, 2] => {
        for schedule in schedules(virtual_stages) {
            let mesh = Mesh { tensor: 2, context: 4, pipeline: 2, ..Mesh::ONE };
            let layout = Layout {
                virtual_stages,
                schedule,
                recompute: recompute.clone(),
                sequence_parallel,
                context_exchange,
                attention: AttentionKernel::Unfused,
                tensor_overlap,
                gradient_reduction: timing,
                parameter_gathering: timing,
                ..Layout::new(mesh, 1, Shard::Optimizer)
            };
            proved(&config(8, false), &layout, &batch(&mesh, 2));
        }
    });
}

#[test]
fn state_is_shared_out_within_replicas() {
    product!(data in [4, 8], replicas in [2, 4], shard in SHARDS, pipeline in [1, 2] => {
        let mesh = Mesh { data, replicas, pipeline, ..Mesh::ONE };
        let layout = Layout::new(mesh, 1, shard);
        if shard == Shard::None || data == replicas {
            assert!(matches!(
                lower(&config(4, false), &layout, &batch(&mesh, 2)),
                Err(LayoutError::Together(_))
            ));
            continue;
        }
        proved(&config(4, true), &layout, &batch(&mesh, 2));
        // A block's gradients of several microbatches are reduced one after the other.
        let (schedule, virtual_stages) = (Schedule::Interleaved, 2);
        let layout = Layout { schedule, virtual_stages, ..layout };
        proved(&config(4, true), &layout, &batch(&mesh, 4));
    });
}

#[test]
fn experts_go_where_their_tokens_are_sent() {
    let experts = |shared_width, dense_layers| Experts {
        shared_width,
        dense_layers,
        ..Experts::new(8, 2, 8)
    };
    product!(tensor in [1, 2], expert_tensor in [1, 2], context in [1, 2], data in [1, 2],
        expert in [1, 2, 4], shared_width in [0, 16], prediction_layers in [0, 2],
        shard in SHARDS, pipeline in [1, 2] => {
        let mesh =
            Mesh { tensor, context, data, pipeline, expert, expert_tensor, ..Mesh::ONE };
        let fits = mesh.stage_ranks().is_multiple_of(expert * expert_tensor);
        if mesh.ranks() > 8 || !fits || expert_tensor > tensor {
            continue;
        }
        for recompute in [Recompute::None, Recompute::Full] {
            let config = model::Config {
                experts: Some(experts(shared_width, 1)),
                prediction_layers,
                ..config(4, false)
            };
            let layout = Layout {
                recompute,
                sequence_parallel: tensor > 1,
                ..Layout::new(mesh, 1, shard)
            };
            proved(&config, &layout, &batch(&mesh, 2));
        }
    });
}

#[test]
fn ranks_that_split_an_expert_are_sent_a_part_each_and_gather_it() {
    let config = model::Config { experts: Some(Experts::new(8, 2, 8)), ..config(2, false) };
    let exchanged = |expert_tensor| {
        let mesh = Mesh { tensor: 2, data: 4, expert: 4, expert_tensor, ..Mesh::ONE };
        let layout = Layout { sequence_parallel: true, ..Layout::new(mesh, 1, Shard::None) };
        let program = proved(&config, &layout, &batch(&mesh, 1));
        let elements = |axis| {
            let posts = program.classes[0].iter().filter_map(|instruction| match instruction {
                Instruction::Post { transfer, .. } => Some(transfer),
                _ => None,
            });
            let of_experts = |transfer: &&Transfer| match transfer.buffer {
                Buffer::Activation { value, .. } => matches!(value, Value::Dispatched(_)),
                _ => false,
            };
            let mut posts = posts.filter(of_experts).filter(|transfer| transfer.axis == axis);
            posts.next().map(|transfer| transfer.elements)
        };
        (elements(Axis::Expert).unwrap(), elements(Axis::Tensor))
    };
    let (whole, none) = exchanged(1);
    assert_eq!(none, None);
    assert_eq!(exchanged(2), (whole, Some(2 * whole)));
}

#[test]
fn other_models_lower_too() {
    for name in ["gpt-3-175b", "bloom-176b", "nemotron-4-15b", "gpt-oss-120b", "deepseek-v3"] {
        let published = catalogue::find(name).unwrap();
        let config = model::Config { layers: 4, ..published.clone() };
        let mesh = Mesh { tensor: 2, context: 2, pipeline: 2, ..Mesh::ONE };
        let layout = Layout { sequence_parallel: true, ..Layout::new(mesh, 1, Shard::Optimizer) };
        let program = proved(&config, &layout, &Batch { sequence: 256, global_batch: 4 });
        assert!(program.flops(0).0 > 0 && program.flops(1).0 > 0);
    }
    let gpt = model::Config {
        activation: Activation::Gelu,
        norm: Norm::Layer,
        positions: Positions::Learned(16),
        biases: true,
        ..config(2, true)
    };
    proved(&gpt, &Layout::one_rank(2), &Batch { sequence: 16, global_batch: 4 });
}

/// The 8,192 ranks of MLPerf Training 5.0's largest Llama 3.1 405B run.
fn mlperf() -> (PartialLayout, Batch) {
    let layout = PartialLayout {
        tensor: Some(8),
        context: Some(2),
        pipeline: Some(8),
        virtual_stages: Some(8),
        micro_batch: Some(1),
        embedding_is_layer: Some(true),
        head_is_layer: Some(true),
        ..PartialLayout::default()
    };
    (layout, Batch { sequence: 8192, global_batch: 1536 })
}

#[test]
fn the_largest_published_run_lowers_and_verifies() {
    let config = catalogue::find("llama-3.1-405b").unwrap();
    let (partial, batch) = mlperf();
    let layout = partial.complete(config, &batch, 8192).unwrap();
    assert_eq!((layout.mesh.data, layout.microbatches(&batch)), (64, 24));
    assert_eq!(layout.stage_layers[..2], [1, 2]);
    assert_eq!(layout.stage_layers[63], 1);
    let program = lower(config, &layout, &batch).unwrap();
    assert_eq!(program.verify(), Ok(()));
    let instructions: usize = program.classes.iter().map(Vec::len).sum();
    assert!((50_000..300_000).contains(&instructions), "{instructions}");

    // All ranks together do the model's work, and no more than padding beside it.
    let together: u64 = (0..8)
        .map(|class| {
            let list = program.classes[class].iter();
            let compute = list.filter(|i| matches!(i, Instruction::Compute { .. }));
            let operators = compute.flat_map(|instruction| program.operators(instruction));
            let products = operators.filter(|o| {
                matches!(o, model::Operator::Product { .. } | model::Operator::Attention { .. })
            });
            products.map(|operator| operator.flops().0).sum::<u64>() / 1000
        })
        .sum::<u64>()
        * u64::from(layout.mesh.stage_ranks());
    let per_token = config.training_flops_per_token(8192, model::Counting::Causal).0;
    let model = per_token / 1000 * batch.global_batch * batch.sequence;
    // Flash attention computes the scores of the backward pass again: 5 products for 2, not 4.
    let ratio = together as f64 / model as f64;
    assert!((1.0..1.02).contains(&ratio), "{ratio}");
}

/// Elements that a rank of class 0 posts along an axis.
fn posted(program: &Program, axis: Axis) -> u64 {
    let transfers = program.classes[0].iter().filter_map(|instruction| match instruction {
        Instruction::Post { transfer, .. } if transfer.axis == axis => Some(transfer),
        _ => None,
    });
    transfers.map(|Transfer { elements, .. }| elements).sum()
}

#[test]
fn tensor_parallel_moves_what_theory_says() {
    let (layers, hidden, tokens) = (4, 16, 16);
    let stream = hidden * tokens;
    let mesh = Mesh { tensor: 2, ..Mesh::ONE };
    let program = |sequence_parallel| {
        let layout = Layout { sequence_parallel, ..Layout::new(mesh, 1, Shard::None) };
        let config = model::Config { kv_heads: 2, ..config(4, false) };
        proved(&config, &layout, &batch(&mesh, 1))
    };
    let head = 3 * 2 * tokens; // the log-sums of both ranks
    // Two all-reduces a layer and direction; one for the embedding, one for the logits' gradient.
    assert_eq!(posted(&program(false), Axis::Tensor), (4 * layers + 2) * stream + head);
    // Gather and scatter in place of each, and the inputs gathered once more for the gradients of
    // weights. The scales of all norms are summed.
    let again = (2 * layers + 1) * stream;
    let norms = (2 * layers + 1) * hidden;
    let expected = 2 * (4 * layers + 2) * stream + again + head + norms;
    assert_eq!(posted(&program(true), Axis::Tensor), expected);
}

#[test]
fn context_parallel_moves_keys_and_values() {
    let mesh = Mesh { context: 4, ..Mesh::ONE };
    let moved = |context_exchange, recompute| {
        let layout = Layout { context_exchange, recompute, ..Layout::new(mesh, 1, Shard::None) };
        posted(&proved(&config(4, false), &layout, &batch(&mesh, 1)), Axis::Context)
    };
    // One key and one value head of 8 for 16 tokens, in each of 4 layers: gathered twice, and
    // their gradients scattered.
    let keys = 4 * 16 * 2 * 8;
    assert_eq!(moved(ContextExchange::AllGather, Recompute::None), 3 * keys);
    // Three of four pieces go around forward, and again backward with the gradients, which go on
    // until they are home.
    let ring = (3 + 3 + 4) * keys / 4;
    assert_eq!(moved(ContextExchange::Ring, Recompute::None), ring);
    assert_eq!(moved(ContextExchange::Ring, Recompute::Full), ring + 3 * keys / 4);
}

#[test]
fn a_rank_alternates_and_never_holds_more_than_its_share() {
    let mesh = Mesh { pipeline: 4, ..Mesh::ONE };
    let most = |layout: &Layout, rank: u32| {
        let turns = turns(layout, rank, 8).unwrap();
        let live = turns.iter().scan(0i32, |live, turn| {
            *live += match turn.pass {
                Pass::Forward => 1,
                Pass::Backward | Pass::BackwardWeight => -1,
                _ => 0,
            };
            Some(*live)
        });
        live.max().unwrap()
    };
    let layout = |schedule, virtual_stages| Layout {
        virtual_stages,
        schedule,
        ..Layout::new(mesh, 1, Shard::None)
    };
    for rank in 0..4 {
        let after = 3 - rank as i32;
        assert_eq!(most(&layout(Schedule::OneForwardOneBackward, 1), rank), after + 1);
        assert_eq!(most(&layout(Schedule::Gpipe, 1), rank), 8);
        // Narayanan et al. 2021: a rank of v stages holds (v - 1) p + 2 (p - 1 - r) + 1 of them.
        assert_eq!(most(&layout(Schedule::Interleaved, 2), rank), 4 + 2 * after + 1);
        // Qi et al. 2023: ZB-H1 holds as much as 1F1B's first rank on every rank.
        assert!(most(&layout(Schedule::ZeroBubble, 1), rank) <= 4 + 1);
    }
}

#[test]
fn a_schedule_is_taken_from_text() {
    let mesh = Mesh { pipeline: 2, ..Mesh::ONE };
    let with = |text: &str, virtual_stages| {
        let schedule = Schedule::Text(text.to_owned());
        let layout = Layout { virtual_stages, schedule, ..Layout::new(mesh, 1, Shard::None) };
        lower(&config(4, false), &layout, &batch(&mesh, 2)).map(|program| program.verify())
    };
    let one = "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1I1,1W1\n";
    assert_eq!(with(one, 1), Ok(Ok(())));
    let two = "0F0,0F1,2F0,2F1,2B0,2B1,0B0,0B1\n1F0,1F1,3F0,3F1,3B0,3B1,1B0,1B1";
    assert_eq!(with(two, 2), Ok(Ok(())));
    let error = |text| with(text, 1).unwrap_err().to_string();
    insta::assert_snapshot!(error("0F0,0F1,0B0,0B1"), @"layout: schedule: it has 1 lines for 2 pipeline ranks");
    insta::assert_snapshot!(error("0F0,0B0,0F1\n1F0,1B0,1F1,1B1"), @"layout: schedule: line 1: stage 0 must take microbatch 1 forward once and backward once (B, or I and W)");
    insta::assert_snapshot!(error("0F0,1B0\n"), @"layout: schedule: it has 1 lines for 2 pipeline ranks");
    insta::assert_snapshot!(error("0F0,1F0\n1F0"), @"layout: schedule: line 1: `1F0`: stage 1 is not on this rank");
    insta::assert_snapshot!(error("0F0,zero\n1F0"), @"layout: schedule: line 1: `zero` is no turn; write it as 0F0: stage, F, B, I or W, microbatch");
    insta::assert_snapshot!(error("0F0,0F9\n1F0"), @"layout: schedule: line 1: `0F9`: there are only 2 microbatches");
    // What can be written and would never end is found by the verifier.
    let stuck = with("0B0,0F0,0F1,0B1\n1F0,1B0,1F1,1B1", 1).unwrap();
    assert!(stuck.unwrap_err().to_string().contains("no forward pass before it"));
    let stuck = with("0F0,0B0,0F1,0B1\n1F1,1F0,1B0,1B1", 1).unwrap();
    assert!(stuck.is_err());
}

#[test]
fn the_blocks_of_all_ranks_are_the_model() {
    let config = config(7, false);
    let mesh = Mesh { pipeline: 3, ..Mesh::ONE };
    let partial = PartialLayout {
        pipeline: Some(3),
        embedding_is_layer: Some(true),
        head_is_layer: Some(true),
        ..PartialLayout::default()
    };
    let layout = partial.complete(&config, &batch(&mesh, 3), 3).unwrap();
    assert_eq!(layout.stage_layers, [2, 3, 2]);
    let held: Vec<Block> = (0..3).flat_map(|rank| layout.blocks(&config, rank)).collect();
    assert_eq!(held, config.blocks().collect::<Vec<_>>());
    let ends = PartialLayout {
        pipeline: Some(3),
        virtual_stages: Some(2),
        first_layers: Some(1),
        last_layers: Some(2),
        ..PartialLayout::default()
    };
    let layout = ends.complete(&config, &batch(&mesh, 3), 3).unwrap();
    assert_eq!(layout.stage_layers, [1, 2, 1, 0, 2, 1]);
    proved(&config, &layout, &batch(&mesh, 3));
}

/// Bytes that a rank of each class hands to transfers between replicas.
fn between_replicas(program: &Program) -> u64 {
    let bytes = |instruction: &Instruction| match instruction {
        Instruction::Post { transfer, .. } if transfer.axis == Axis::Replica => transfer.bytes().0,
        _ => 0,
    };
    program.classes.iter().flatten().map(bytes).sum()
}

#[test]
fn groups_that_train_apart_meet_in_outer_updates_alone() {
    let config = config(4, true);
    product!(data in [2, 4], shard in SHARDS, pipeline in [1, 2], tensor in [1, 2] => {
        let mesh = Mesh { data, replicas: 2, pipeline, tensor, ..Mesh::ONE };
        let layout = Layout { local_steps: 8, ..Layout::new(mesh, 1, shard) };
        let step = proved(&config, &layout, &batch(&mesh, 2));
        assert_eq!(between_replicas(&step), 0, "{layout:?}");
        let outer = lower_outer(&config, &layout, &batch(&mesh, 2)).unwrap().unwrap();
        assert_eq!(outer.verify_every_rank(), Ok(()), "{layout:?}");
        // In eight steps they move what others move in every one.
        let together = Layout { local_steps: 0, ..layout.clone() };
        if shard != Shard::None && data > 2 {
            let step = proved(&config, &together, &batch(&mesh, 2));
            assert_eq!(between_replicas(&outer), between_replicas(&step), "{layout:?}");
        }
    });
}
