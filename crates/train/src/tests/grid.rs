//! The grid: products of tensor, context, pipeline and data up to eight ranks, at every level of
//! sharding, with the other choices taken in turn so that each meets each.

use model::SlidingWindow;
use plan::{ContextExchange, Recompute, TensorOverlap};

use super::axes::{hold, job};
use super::*;

/// Takes choices in turn.
struct Turns(usize);

impl Turns {
    fn next<T: Clone>(&mut self, choices: &[T]) -> T {
        self.0 += 1;
        choices[self.0 % choices.len()].clone()
    }
}

/// Every mesh with this pipeline and data degree, at every level of sharding.
fn cells(pipeline: u32, data: u32) -> Vec<Layout> {
    let (mut schedules, mut others) = (Turns(data as usize), Turns(pipeline as usize));
    let mut cells = Vec::new();
    for (tensor, context) in [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4)] {
        let mesh = Mesh { tensor, context, data, pipeline, ..Mesh::ONE };
        if !(2..=8).contains(&mesh.ranks()) {
            continue;
        }
        let levels = if data * context > 1 { &SHARDS[..] } else { &SHARDS[..1] };
        for shard in levels {
            let (schedule, virtual_stages) = match pipeline {
                1 => (Schedule::OneForwardOneBackward, 1),
                _ => schedules.next(&[
                    (Schedule::OneForwardOneBackward, 1),
                    (Schedule::Interleaved, 2),
                    (Schedule::ZeroBubble, 1),
                    (Schedule::Gpipe, 2),
                    (Schedule::ZeroBubble, 2),
                ]),
            };
            let apart = data * context >= 4 && *shard > Shard::None;
            let replicas = if apart { others.next(&[1, 2]) } else { 1 };
            let mesh = Mesh { replicas, ..mesh };
            cells.push(Layout {
                recompute: others.next(&[
                    Recompute::None,
                    Recompute::Full,
                    Recompute::None,
                    Recompute::Selective,
                    Recompute::Layers(1),
                ]),
                schedule,
                virtual_stages,
                sequence_parallel: tensor > 1 && others.next(&[true, true, false]),
                tensor_overlap: others.next(&[
                    TensorOverlap::WeightGradients,
                    TensorOverlap::Pieces(2),
                    TensorOverlap::None,
                ]),
                context_exchange: others.next(&[ContextExchange::Ring, ContextExchange::AllGather]),
                ..Layout::new(mesh, others.next(&[1, 2]), *shard)
            });
        }
    }
    cells
}

#[test]
fn without_pipeline_and_data() {
    hold(&job(false), cells(1, 1));
}

#[test]
fn with_data() {
    hold(&job(false), cells(1, 2));
}

#[test]
fn with_pipeline() {
    hold(&job(true), cells(2, 1));
}

#[test]
fn with_pipeline_and_data() {
    hold(&job(false), cells(2, 2));
}

/// Documents that do not see each other, in every cell of half the grid.
#[test]
fn with_latent_attention() {
    let job = Job { config: latent_config(), ..job(true) };
    for (pipeline, data) in [(1, 1), (2, 1), (2, 2)] {
        hold(&job, cells(pipeline, data));
    }
}

#[test]
fn with_latent_attention_and_queries_projected_at_once() {
    let mut config = latent_config();
    config.latent_attention =
        config.latent_attention.map(|latent| LatentAttention { query_rank: None, ..latent });
    hold(&Job { config, ..job(true) }, cells(1, 2));
}

#[test]
fn with_normed_heads_and_windows() {
    let window = SlidingWindow { length: 7, full_every: Some(2) };
    let config = Config { query_key_norm: true, sliding_window: Some(window), ..config(false) };
    let job = Job { config, ..job(true) };
    for (pipeline, data) in [(1, 1), (2, 1)] {
        hold(&job, cells(pipeline, data));
    }
}

#[test]
fn the_grid_is_of_several_dozen_cells() {
    let count: usize =
        [(1, 1), (1, 2), (2, 1), (2, 2)].map(|(p, d)| cells(p, d).len()).iter().sum();
    assert!(count >= 48, "{count}");
}
