//! What a search chooses from: for every key of a layout what the job gives, or all that divides.

use model::Config;
use program::Mesh;

use super::Problem;
use crate::partial::divisors;
use crate::{ContextExchange, Layout, Recompute, Schedule, Shard, TensorOverlap, Timing};

/// Fewest tokens of a sequence that a context-parallel rank is left with.
const LEAST_TOKENS: u64 = 256;
/// Most stages of a pipeline rank that may hold one layer less than the others.
const MOST_SHORT: u32 = 4;
/// Most sequences in a microbatch.
const MOST_SEQUENCES: u64 = 64;

/// How tensor and context parallelism are done: one piece of a search.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Piece {
    pub(super) tensor: u32,
    pub(super) context: u32,
    pub(super) expert: u32,
    pub(super) expert_tensor: u32,
    pub(super) sequence_parallel: bool,
    pub(super) exchange: ContextExchange,
    pub(super) overlap: TensorOverlap,
}

/// How layers are shared out: the stages of a rank and the layers of each; none if all have the
/// same.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Division {
    pub(super) virtual_stages: u32,
    pub(super) stage_layers: Vec<u32>,
}

fn given<T: Clone>(key: Option<&T>, otherwise: impl FnOnce() -> Vec<T>) -> Vec<T> {
    key.map_or_else(otherwise, |value| vec![value.clone()])
}

fn degrees(of: u64) -> Vec<u32> {
    divisors(of).map(|degree| degree as u32).collect()
}

impl Problem<'_> {
    /// The pieces of the search, in a fixed order.
    pub(super) fn pieces(&self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        for tensor in self.tensors() {
            for context in self.contexts(tensor) {
                for (expert, expert_tensor) in self.experts(tensor, context) {
                    self.transfers(Piece {
                        tensor,
                        context,
                        expert,
                        expert_tensor,
                        sequence_parallel: false,
                        exchange: ContextExchange::default(),
                        overlap: TensorOverlap::default(),
                    })
                    .for_each(|piece| pieces.push(piece));
                }
            }
        }
        pieces
    }

    fn tensors(&self) -> Vec<u32> {
        let Config { heads, feed_forward, kv_heads, .. } = *self.config;
        let latent = self.config.latent_attention.is_some();
        let splits = |tensor: &u32| {
            let tensor = u64::from(*tensor);
            let shares =
                latent || kv_heads.is_multiple_of(tensor) || tensor.is_multiple_of(kv_heads);
            heads.is_multiple_of(tensor) && feed_forward.is_multiple_of(tensor) && shares
        };
        given(self.given.tensor.as_ref(), || {
            degrees(u64::from(self.ranks)).into_iter().filter(splits).collect()
        })
    }

    fn contexts(&self, tensor: u32) -> Vec<u32> {
        let sequence = self.batch.sequence;
        let splits = |context: &u32| {
            let context = u64::from(*context);
            let parts = if context > 1 { 2 * context } else { 1 };
            sequence.is_multiple_of(parts) && (context == 1 || sequence / context >= LEAST_TOKENS)
        };
        given(self.given.context.as_ref(), || {
            degrees(u64::from(self.ranks / tensor)).into_iter().filter(splits).collect()
        })
    }

    /// Degrees of expert parallelism, and among how many ranks each expert's products are split.
    fn experts(&self, tensor: u32, context: u32) -> Vec<(u32, u32)> {
        let Some(experts) = self.config.experts else {
            return vec![(self.given.expert.unwrap_or(1), self.given.expert_tensor.unwrap_or(1))];
        };
        let within = u64::from(self.ranks / tensor / context * tensor * context);
        let all = given(self.given.expert.as_ref(), || {
            let splits = |degree: &u32| within.is_multiple_of(u64::from(*degree));
            degrees(experts.count).into_iter().filter(splits).collect()
        });
        let widths = given(self.given.expert_tensor.as_ref(), || match tensor {
            1 => vec![1],
            _ => vec![1, tensor],
        });
        all.iter().flat_map(|expert| widths.iter().map(move |width| (*expert, *width))).collect()
    }

    /// The ways in which a piece's transfers may be done.
    fn transfers(&self, piece: Piece) -> impl Iterator<Item = Piece> {
        let split = self.config.experts.is_some();
        let streams = match piece.tensor {
            1 => vec![false],
            _ => given(self.given.sequence_parallel.as_ref(), || {
                if split { vec![true] } else { vec![true, false] }
            }),
        };
        let exchanges = match piece.context {
            1 => vec![self.given.context_exchange.unwrap_or_default()],
            _ => given(self.given.context_exchange.as_ref(), || {
                vec![ContextExchange::AllGather, ContextExchange::Ring]
            }),
        };
        let overlaps = match piece.tensor {
            1 => vec![self.given.tensor_overlap.unwrap_or_default()],
            _ => given(self.given.tensor_overlap.as_ref(), || self.overlaps.to_vec()),
        };
        let mut ways = Vec::new();
        for sequence_parallel in streams {
            for exchange in &exchanges {
                let (exchange, overlaps) = (*exchange, overlaps.iter());
                ways.extend(overlaps.map(|overlap| Piece {
                    sequence_parallel,
                    exchange,
                    overlap: *overlap,
                    ..piece
                }));
            }
        }
        ways.into_iter()
    }

    /// Pipeline degrees on the ranks that a piece leaves.
    pub(super) fn pipelines(&self, piece: &Piece) -> Vec<u32> {
        let left = self.ranks / (piece.tensor * piece.context);
        if left * piece.tensor * piece.context != self.ranks {
            return vec![];
        }
        let fits =
            |pipeline: &u32| left.is_multiple_of(*pipeline) && *pipeline <= self.config.layers;
        let all = given(self.given.pipeline.as_ref(), || degrees(u64::from(left)));
        all.into_iter().filter(fits).collect()
    }

    /// Sequences in a microbatch, where so many ranks split the batch.
    pub(super) fn micro_batches(&self) -> Vec<u64> {
        given(self.given.micro_batch.as_ref(), || {
            divisors(self.batch.global_batch).filter(|size| *size <= MOST_SEQUENCES).collect()
        })
    }

    /// What the data axis may share out, with the replicas of it.
    pub(super) fn shards(&self, piece: &Piece, data: u32) -> Vec<(Shard, u32)> {
        let share = data * piece.context;
        let levels = match share {
            1 => vec![self.given.shard.unwrap_or(Shard::None)],
            _ => given(self.given.shard.as_ref(), || {
                vec![Shard::None, Shard::Optimizer, Shard::Gradients, Shard::Parameters]
            }),
        };
        let near = (self.domain / piece.tensor).max(1);
        let mut shards = Vec::new();
        for shard in levels {
            let hybrid = shard == Shard::Parameters && self.config.experts.is_none();
            let groups = match self.given.shard_ranks {
                Some(ranks) => vec![ranks],
                None if hybrid && near > 1 && near < share => vec![share, near],
                None => vec![share],
            };
            let whole =
                groups.into_iter().filter(|ranks| *ranks > 0 && share.is_multiple_of(*ranks));
            shards.extend(whole.map(|ranks| (shard, share / ranks)));
        }
        shards
    }

    /// Ways to share out layers among the ranks of a pipeline.
    pub(super) fn divisions(&self, pipeline: u32) -> Vec<Division> {
        let most = if pipeline == 1 { 1 } else { self.config.layers.div_ceil(pipeline) };
        let numbers = given(self.given.virtual_stages.as_ref(), || (1..=most).collect());
        let as_given = self.given.shares_out_layers();
        let mut divisions = Vec::new();
        for virtual_stages in numbers {
            if as_given {
                let layers = self.given.stage_layers(self.config, pipeline, virtual_stages);
                divisions.extend(
                    layers.ok().map(|stage_layers| Division { virtual_stages, stage_layers }),
                );
            } else {
                self.uneven(pipeline, virtual_stages, &mut divisions);
            }
        }
        divisions
    }

    /// Every stage the same, or some of the first and the last rank's one layer less.
    fn uneven(&self, pipeline: u32, virtual_stages: u32, divisions: &mut Vec<Division>) {
        let (layers, stages) = (self.config.layers, pipeline * virtual_stages);
        if layers.is_multiple_of(stages) {
            divisions.push(Division { virtual_stages, stage_layers: Vec::new() });
        }
        // Where all have the same, the ends may still have less than the rest.
        let each = layers / stages + 1;
        let short = stages * each - layers;
        if pipeline == 1 || short > 2 * MOST_SHORT.min(virtual_stages * each) || each < 2 {
            return;
        }
        for first in 0..=short {
            let last = short - first;
            if first.max(last) > MOST_SHORT.min(virtual_stages) {
                continue;
            }
            let mut stage_layers = vec![each; stages as usize];
            for chunk in 0..first {
                stage_layers[(chunk * pipeline) as usize] -= 1;
            }
            for chunk in 0..last {
                stage_layers[(stages - 1 - chunk * pipeline) as usize] -= 1;
            }
            divisions.push(Division { virtual_stages, stage_layers });
        }
    }

    /// Orders of turns.
    pub(super) fn schedules(&self, pipeline: u32, virtual_stages: u32) -> Vec<Schedule> {
        let alternating = match virtual_stages {
            1 => Schedule::OneForwardOneBackward,
            _ => Schedule::Interleaved,
        };
        match pipeline {
            1 => vec![self.given.schedule.clone().unwrap_or(alternating)],
            _ => given(self.given.schedule.as_ref(), || {
                vec![alternating, Schedule::ZeroBubble, Schedule::Gpipe]
            }),
        }
    }

    /// What is computed again in every layer.
    pub(super) fn recomputations(&self) -> Vec<Recompute> {
        given(self.given.recompute.as_ref(), || {
            vec![Recompute::None, Recompute::Selective, Recompute::Full]
        })
    }

    /// When gradients are reduced and parameters gathered.
    pub(super) fn timings(&self, mesh: &Mesh, shard: Shard) -> Vec<(Timing, Timing)> {
        let both = || vec![Timing::Overlapped, Timing::Exposed];
        let alone = mesh.data * mesh.context == 1;
        let one = |key: Option<Timing>| vec![key.unwrap_or_default()];
        let reductions = match alone || shard >= Shard::Gradients {
            true => one(self.given.gradient_reduction),
            false => given(self.given.gradient_reduction.as_ref(), both),
        };
        let gathers = match alone || shard != Shard::Optimizer && shard != Shard::Gradients {
            true => one(self.given.parameter_gathering),
            false => given(self.given.parameter_gathering.as_ref(), both),
        };
        let pair = |reduction: Timing| gathers.iter().map(move |gather| (reduction, *gather));
        reductions.into_iter().flat_map(pair).collect()
    }

    /// A layout with what a piece says, and of the rest what the job gives or the simplest.
    pub(super) fn draft(&self, piece: &Piece) -> Layout {
        let mesh = Mesh {
            tensor: piece.tensor,
            context: piece.context,
            expert: piece.expert,
            expert_tensor: piece.expert_tensor,
            placement: self.given.placement.unwrap_or_default(),
            ..Mesh::ONE
        };
        Layout {
            mesh,
            sequence_parallel: piece.sequence_parallel,
            context_exchange: piece.exchange,
            tensor_overlap: piece.overlap,
            ..self.given.simplest()
        }
    }
}
