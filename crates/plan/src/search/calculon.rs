//! The candidates that Calculon enumerates (Isaev et al. 2023; its command `llm-all-executions`, at
//! caa4b11 of 2024-02-22), judged by this planner's memory and closed form: the same space, to
//! compare like with like.
//!
//! Of its choices, attention is unfused; `ring` and `pipe` overlap are products cut into 4 and 2
//! pieces; `p2p_rs_ag` hands each tensor-parallel rank's share from stage to stage; gathering the
//! sequence anew backward is a habit of the program; and each of the three axes may be put on the
//! links of the scale-up domain or on the fabric, whether that is wise or not. Its second memory
//! tier is left out. What divides there and not here (microbatches over pipeline ranks, with
//! several stages each) is judged as not fitting.

use model::{AttentionKernel, Config};
use program::Mesh;
use units::Bytes;

use crate::estimate::{Choice, Estimate, Moves, Sample, Stages, Turns, Unit, handed_on};
use crate::memory::{self, Footprint};
use crate::partial::divisors;
use crate::price::{Passage, Pricing, Unpriced};
use crate::{Batch, Layout, Recompute, Schedule, Shard, TensorOverlap, Timing};

/// What became of all candidates.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Tally {
    /// Candidates judged.
    pub judged: u64,
    /// Of them, those that fit into memory.
    pub fitting: u64,
    /// The fastest of those.
    pub best: Option<(Layout, Estimate)>,
}

/// How tensor-parallel ranks exchange sums: `ar`, `p2p_rs_ag`, and `rs_ag` with or without gathering
/// anew in the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Exchange {
    Sum,
    SumInShares,
    Scatter { regathers: bool },
}

/// The space: a model on so many ranks.
#[derive(Debug, Clone, Copy)]
pub struct Space<'a> {
    /// The model.
    pub config: &'a Config,
    /// Ranks.
    pub ranks: u32,
    /// Tokens of a sequence, and most sequences in a step.
    pub batch: Batch,
    /// Memory of an accelerator.
    pub capacity: Bytes,
    /// What memory depends on besides.
    pub memory: memory::Options,
}

/// The times of one microbatch with tensor parallelism on either network.
struct Microbatch {
    samples: [Sample; 2],
    units: [Unit; 2],
}

struct Walk<'a, P: ?Sized> {
    space: &'a Space<'a>,
    footprint: Footprint<'a>,
    /// With scale-up domains, and with the fabric alone.
    networks: [&'a P; 2],
    tally: Tally,
}

/// Judges every candidate. The first of `networks` prices transfers as the cluster has them, the
/// second as if there were no scale-up domains.
///
/// # Errors
/// An instruction without a price.
pub fn judge_all<P: Pricing + ?Sized>(
    space: &Space<'_>,
    networks: [&P; 2],
) -> Result<Tally, Unpriced> {
    let footprint = Footprint::new(space.config);
    let mut walk = Walk { space, footprint, networks, tally: Tally::default() };
    for tensor in space.tensors() {
        for recompute in [Recompute::Full, Recompute::Selective, Recompute::None] {
            for exchange in exchanges(&recompute) {
                for overlap in overlaps(tensor) {
                    walk.way(tensor, &recompute, exchange, overlap)?;
                }
            }
        }
    }
    Ok(walk.tally)
}

fn exchanges(recompute: &Recompute) -> Vec<Exchange> {
    let regathers: &[bool] = if *recompute == Recompute::Full { &[false] } else { &[true, false] };
    let scatters = regathers.iter().map(|regathers| Exchange::Scatter { regathers: *regathers });
    [Exchange::Sum, Exchange::SumInShares].into_iter().chain(scatters).collect()
}

fn overlaps(tensor: u32) -> &'static [TensorOverlap] {
    let all = &[TensorOverlap::None, TensorOverlap::Pieces(4), TensorOverlap::Pieces(2)];
    if tensor > 1 { all } else { &all[..1] }
}

/// On how many networks an axis may be put.
fn networks(degree: u32) -> usize {
    if degree > 1 { 2 } else { 1 }
}

impl Space<'_> {
    fn tensors(&self) -> Vec<u32> {
        let Config { hidden, heads, .. } = *self.config;
        let splits = |tensor: &u64| hidden.is_multiple_of(*tensor) && heads.is_multiple_of(*tensor);
        divisors(u64::from(self.ranks)).filter(splits).map(|tensor| tensor as u32).collect()
    }

    fn pipelines(&self, tensor: u32) -> Vec<u32> {
        let (left, layers) = (self.ranks / tensor, self.config.layers);
        let splits =
            |pipeline: &u32| left.is_multiple_of(*pipeline) && layers.is_multiple_of(*pipeline);
        let most = u64::from(left.min(layers));
        divisors(most).map(|pipeline| pipeline as u32).filter(splits).collect()
    }

    fn virtual_stages(&self, pipeline: u32) -> Vec<u32> {
        let most = if pipeline == 1 { 1 } else { self.config.layers / pipeline };
        divisors(u64::from(most)).map(|stages| stages as u32).collect()
    }

    /// The sequences of a step that so many ranks can share out, as near to the most as can be.
    fn global_batch(&self, data: u32) -> u64 {
        self.batch.global_batch / u64::from(data) * u64::from(data)
    }
}

impl<P: Pricing + ?Sized> Walk<'_, P> {
    /// All candidates that compute a microbatch in one way.
    fn way(
        &mut self,
        tensor: u32,
        recompute: &Recompute,
        exchange: Exchange,
        overlap: &TensorOverlap,
    ) -> Result<(), Unpriced> {
        let sequence = self.space.batch.sequence;
        let splits = |size: &u64| (size * sequence).is_multiple_of(u64::from(tensor));
        for micro_batch in (1..=self.space.batch.global_batch).filter(splits) {
            let takes = |pipeline: &u32| {
                let data = self.space.ranks / tensor / pipeline;
                let share = self.space.batch.global_batch / u64::from(data);
                share > 0 && share.is_multiple_of(micro_batch)
            };
            let pipelines: Vec<u32> =
                self.space.pipelines(tensor).into_iter().filter(takes).collect();
            if pipelines.is_empty() {
                continue;
            }
            let mesh = Mesh { tensor, ..Mesh::ONE };
            let layout = Layout {
                recompute: recompute.clone(),
                sequence_parallel: tensor > 1 && matches!(exchange, Exchange::Scatter { .. }),
                attention: AttentionKernel::Unfused,
                tensor_overlap: *overlap,
                parameter_bytes: 2,
                gradient_bytes: 2,
                activation_bytes: 2,
                ..Layout::new(mesh, micro_batch, Shard::None)
            };
            let microbatch = self.microbatch(&layout)?;
            for pipeline in pipelines {
                self.mesh(&layout, pipeline, exchange, microbatch.as_ref())?;
            }
        }
        Ok(())
    }

    fn microbatch(&self, layout: &Layout) -> Result<Option<Microbatch>, Unpriced> {
        let Space { config, batch, ranks, .. } = self.space;
        let sample = || Sample::new(config, layout, batch.sequence, *ranks);
        let (Ok(near), Ok(far)) = (sample(), sample()) else { return Ok(None) };
        let units = [near.run(self.networks[0])?, far.run(self.networks[1])?];
        Ok(Some(Microbatch { samples: [near, far], units }))
    }

    fn mesh(
        &mut self,
        layout: &Layout,
        pipeline: u32,
        exchange: Exchange,
        microbatch: Option<&Microbatch>,
    ) -> Result<(), Unpriced> {
        let tensor = layout.mesh.tensor;
        let data = self.space.ranks / tensor / pipeline;
        let mut layout = layout.clone();
        layout.mesh = Mesh { pipeline, data, ..layout.mesh };
        let shards: &[Shard] =
            if data > 1 { &[Shard::Optimizer, Shard::None] } else { &[Shard::None] };
        let reductions: &[Timing] =
            if data > 1 { &[Timing::Overlapped, Timing::Exposed] } else { &[Timing::Overlapped] };
        let places = networks(tensor) * networks(pipeline) * networks(data);
        let Some(microbatch) = microbatch else {
            let stages = self.space.virtual_stages(pipeline).len();
            self.tally.judged += (stages * shards.len() * reductions.len() * places) as u64;
            return Ok(());
        };
        let priced = Priced::new(self, &layout, exchange, microbatch)?;
        for shard in shards {
            layout.shard = *shard;
            let turns = priced.turns(self.space.config, *shard);
            for virtual_stages in self.space.virtual_stages(pipeline) {
                layout.virtual_stages = virtual_stages;
                self.tally.judged += (reductions.len() * places) as u64;
                self.candidates(&mut layout, exchange, &turns, &priced.handed, reductions);
            }
        }
        Ok(())
    }

    /// Candidates that differ in the networks of their axes and in overlap alone.
    fn candidates(
        &mut self,
        layout: &mut Layout,
        exchange: Exchange,
        turns: &[Vec<Turns>],
        handed: &[Passage],
        reductions: &[Timing],
    ) {
        let Mesh { pipeline, data, .. } = layout.mesh;
        let several = layout.virtual_stages > 1;
        layout.schedule = if several { Schedule::Interleaved } else { Schedule::default() };
        let batch = Batch { global_batch: self.space.global_batch(data), ..self.space.batch };
        if several && !layout.microbatches(&batch).is_multiple_of(pipeline) {
            return;
        }
        let stages = Stages::new(self.space.config, layout);
        if !self.fits(layout, &batch, exchange, &stages) {
            return;
        }
        let mut choice = Choice::of(layout, &batch);
        for turns in turns.iter().flatten() {
            for handed in handed {
                for reduction in reductions {
                    choice.reduction = *reduction;
                    let estimate = turns.step(&stages, handed, &choice);
                    self.tally.fitting += 1;
                    // More sequences may take longer and still be faster.
                    let best = self.tally.best.as_ref().map(|(best, estimate)| {
                        estimate.step_time.0 / self.space.global_batch(best.mesh.data) as f64
                    });
                    let each = estimate.step_time.0 / batch.global_batch as f64;
                    if best.is_none_or(|best| each < best) {
                        layout.gradient_reduction = *reduction;
                        self.tally.best = Some((layout.clone(), estimate));
                    }
                }
            }
        }
    }

    fn fits(&self, layout: &Layout, batch: &Batch, exchange: Exchange, stages: &Stages) -> bool {
        let mut options = self.space.memory;
        options.software.gathered_inputs = exchange == Exchange::Scatter { regathers: false };
        let capacity = self.space.capacity;
        self.footprint.fullest(layout, batch, &options, (stages, capacity)).total() <= capacity
    }
}

/// The prices of a mesh and a microbatch, on either network.
struct Priced<'m> {
    microbatch: &'m Microbatch,
    handed: Vec<Passage>,
    /// With and without sharing out the optimizer.
    moves: Vec<Moves>,
    tensors: usize,
}

impl<'m> Priced<'m> {
    fn new<P: Pricing + ?Sized>(
        walk: &Walk<'_, P>,
        layout: &Layout,
        exchange: Exchange,
        microbatch: &'m Microbatch,
    ) -> Result<Self, Unpriced> {
        let Mesh { tensor, pipeline, data, .. } = layout.mesh;
        let share = if exchange == Exchange::SumInShares { 1.0 / f64::from(tensor) } else { 1.0 };
        let each =
            |degree: u32| walk.networks.iter().zip(&microbatch.samples).take(networks(degree));
        let handed = |(network, sample): (&&P, &Sample)| {
            let whole = handed_on(sample, layout, *network)?;
            Ok(Passage { wire: whole.wire.map(|wire| wire * share), ..whole })
        };
        let moves = |(network, sample): (&&P, &Sample)| {
            Moves::new(sample, layout, walk.space.config.prediction_layers, *network)
        };
        Ok(Self {
            microbatch,
            handed: each(pipeline).map(handed).collect::<Result<_, Unpriced>>()?,
            moves: each(data).map(moves).collect::<Result<_, Unpriced>>()?,
            tensors: networks(tensor),
        })
    }

    /// By the network of tensor parallelism, then by that of the data axis.
    fn turns(&self, config: &Config, shard: Shard) -> Vec<Vec<Turns>> {
        let shared = Layout::ends_share_embedding(config);
        let of = |unit: &Unit| {
            let turns = |moves: &Moves| Turns::new(unit, unit, moves, shard, shared);
            self.moves.iter().map(turns).collect()
        };
        self.microbatch.units.iter().take(self.tensors).map(of).collect()
    }
}
