//! Every lowering is verified; one is shown whole.
use super::*;
use model::{Config, Rotary};
use program::Mesh;
use units::Rank;

mod axes;

fn config(layers: u32, tied_embeddings: bool) -> Config {
    Config {
        layers,
        hidden: 16,
        heads: 2,
        kv_heads: 1,
        head_dim: 8,
        feed_forward: 24,
        vocabulary: 32,
        tied_embeddings,
        norm_epsilon: 1e-5,
        rotary: Rotary { theta: 500_000.0, scaling: None },
        context: 64,
        ..Config::default()
    }
}

const SHARDS: [Shard; 4] = [Shard::None, Shard::Optimizer, Shard::Gradients, Shard::Parameters];

fn layout(data: u32, pipeline: u32, shard: Shard) -> Layout {
    Layout::new(Mesh { data, pipeline, ..Mesh::ONE }, 1, shard)
}

#[test]
fn every_layout_lowers_to_a_program_that_verifies() {
    for tied in [false, true] {
        let config = config(8, tied);
        for (data, pipeline) in [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (1, 8), (2, 2), (3, 4)] {
            for shard in SHARDS {
                for microbatches in [1, 2, 3, 8] {
                    let batch = Batch { sequence: 4, global_batch: u64::from(data) * microbatches };
                    let layout = layout(data, pipeline, shard);
                    for program in [
                        lower(&config, &layout, &batch).unwrap(),
                        lower_evaluation(&config, &layout, &batch).unwrap(),
                    ] {
                        if let Err(error) = program.verify() {
                            panic!(
                                "tied {tied}, {layout:?}, {microbatches} mb: {error}\n{program}"
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn every_sequence_of_a_step_is_taken_once() {
    let batch = Batch { sequence: 4, global_batch: 24 };
    for (data, micro_batch) in [(1, 1), (2, 3), (4, 2), (3, 8)] {
        let layout = Layout { micro_batch, ..layout(data, 2, Shard::None) };
        let program = lower(&config(2, false), &layout, &batch).unwrap();
        for first in [0, data] {
            let taken: Vec<u64> = (first..first + data)
                .flat_map(|rank| (0..program.microbatches).map(move |mb| (Rank(rank), mb)))
                .flat_map(|(rank, mb)| program.positions(rank, mb))
                .collect();
            assert_eq!(taken, (0..24).collect::<Vec<u64>>());
        }
    }
}

#[test]
fn data_parallel_moves_what_theory_says() {
    // Ring bounds are the transport's business; here: each block once per reduction and gather.
    let (config, batch) = (config(4, false), Batch { sequence: 4, global_batch: 4 });
    let whole = 4 * config.parameter_count();
    let moved = |shard| {
        let program = lower(&config, &layout(2, 1, shard), &batch).unwrap();
        program.transferred(0).0 - 16 // the statistics: 2 ranks x 2 elements
    };
    assert_eq!(moved(Shard::None), whole, "one all-reduce");
    assert_eq!(moved(Shard::Optimizer), 2 * whole, "one reduce-scatter, one all-gather");
    assert_eq!(moved(Shard::Gradients), 3 * whole, "a reduce-scatter for each of 2 microbatches");
    // Forward and backward gathers of 2 microbatches; the head is used twice running, and so is
    // the embedding between the first backward and the second forward.
    let kept = 2 * 4 * config.block_elements(model::Block::Head)
        + 4 * config.block_elements(model::Block::Embedding);
    assert_eq!(moved(Shard::Parameters), (4 + 2) * whole - kept);
}

#[test]
fn what_does_not_divide_is_refused_with_a_way_out() {
    let (config, batch) = (config(6, false), Batch { sequence: 4, global_batch: 6 });
    let complete = |partial: PartialLayout, ranks| {
        partial.complete(&config, &batch, ranks).map_err(|error| error.to_string())
    };
    let pipeline = |degree| PartialLayout { pipeline: Some(degree), ..PartialLayout::default() };
    insta::assert_snapshot!(complete(pipeline(4), 4).unwrap_err(), @"layout: pipeline 4 does not divide the model's 6 layers; choose one of [1, 2, 3, 6], or set embedding_is_layer, head_is_layer, first_layers, last_layers or stage_layers");
    insta::assert_snapshot!(complete(pipeline(3), 4).unwrap_err(), @"layout: tensor 1 x context 1 x pipeline 3 does not divide 4 ranks; choose degrees whose product does, or change [cluster] accelerators");
    insta::assert_snapshot!(complete(pipeline(1), 4).unwrap_err(), @"layout: data 4 x micro_batch 1 does not divide global_batch 6; each data-parallel rank needs a whole number of microbatches");
    assert_eq!(complete(pipeline(2), 4).unwrap().mesh.data, 2);
}

#[test]
fn a_program_reads_like_a_list() {
    let batch = Batch { sequence: 4, global_batch: 4 };
    let program = lower(&config(2, false), &layout(2, 2, Shard::Parameters), &batch).unwrap();
    insta::assert_snapshot!(program);
}
