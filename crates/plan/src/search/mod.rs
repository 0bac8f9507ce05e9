//! The best layouts of a model on so many ranks: all of them judged, by memory and the closed form.
//!
//! A search goes through every combination of what `space` offers. Layouts that do not fit into
//! memory are left out first; of the rest the closed form says what a step takes. Layouts that
//! differ in how, not in how much is split are one [`Family`]: the fastest of each is kept.
//!
//! Pieces of the search are shared out among threads; what is found does not depend on how.

pub mod calculon;
mod piece;
mod space;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use model::Config;
use units::Bytes;

use crate::estimate::Estimate;
use crate::memory::{self, StageMemory};
use crate::price::{Pricing, Unpriced};
use crate::{Batch, Layout, PartialLayout, Recompute, Shard, TensorOverlap};
use piece::Judge;

/// What is searched for: the best layouts of a model, on this many ranks, in so much memory.
#[derive(Debug, Clone, Copy)]
pub struct Problem<'a> {
    /// The model.
    pub config: &'a Config,
    /// A step.
    pub batch: Batch,
    /// Ranks.
    pub ranks: u32,
    /// What is given; all else is searched.
    pub given: &'a PartialLayout,
    /// Memory of an accelerator.
    pub capacity: Bytes,
    /// What memory depends on besides.
    pub memory: memory::Options,
    /// Ranks of a scale-up domain: state may be shared out within one.
    pub domain: u32,
    /// What may hide the transfers of tensor parallelism.
    pub overlaps: &'a [TensorOverlap],
}

/// Layouts that split as much in the same places.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Family {
    /// Tensor, context, expert and pipeline degrees.
    pub degrees: [u32; 4],
    /// Stages of a pipeline rank.
    pub virtual_stages: u32,
    /// Sequences in a microbatch.
    pub micro_batch: u64,
    /// What the data axis shares out, and its replicas.
    pub shard: (Shard, u32),
    /// How much is computed again: nothing, scores, some layers, all.
    pub recompute: u8,
}

impl Family {
    /// The family of a layout.
    #[must_use]
    pub fn of(layout: &Layout) -> Self {
        let mesh = &layout.mesh;
        Self {
            degrees: [mesh.tensor, mesh.context, mesh.expert, mesh.pipeline],
            virtual_stages: layout.virtual_stages,
            micro_batch: layout.micro_batch,
            shard: (layout.shard, mesh.replicas),
            recompute: match layout.recompute {
                Recompute::None => 0,
                Recompute::Selective | Recompute::Segments(_) => 1,
                Recompute::Layers(_) => 2,
                Recompute::Full => 3,
            },
        }
    }
}

/// A layout that fits, and what it is estimated to take.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// The layout.
    pub layout: Layout,
    /// By the closed form.
    pub estimate: Estimate,
    /// Its fullest stage.
    pub memory: StageMemory,
}

/// What a search found.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Outcome {
    /// The fastest of each family, the fastest first.
    pub families: Vec<Found>,
    /// Layouts judged.
    pub judged: u64,
    /// Of them, those that fit.
    pub fitting: u64,
    /// The layout that needs least memory, where none fits.
    pub least: Option<(Layout, StageMemory)>,
    /// Whether it was stopped before all were judged.
    pub stopped: bool,
}

/// How far a search is: pieces done of all, and layouts judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Pieces done.
    pub done: usize,
    /// Pieces in all.
    pub of: usize,
    /// Layouts judged.
    pub judged: u64,
}

/// Judges all layouts of `problem` on `threads` threads. `watch` is told how far it is, and says
/// whether to go on.
///
/// # Errors
/// An instruction without a price.
pub fn search(
    problem: &Problem<'_>,
    pricing: &(impl Pricing + ?Sized),
    threads: usize,
    watch: &(dyn Fn(Progress) -> bool + Sync),
) -> Result<Outcome, Unpriced> {
    let judge = Judge::new(problem);
    let pieces = problem.pieces();
    let (next, stopped, judged) = (AtomicUsize::new(0), AtomicBool::new(false), AtomicU64::new(0));
    let work = || {
        let mut found = Vec::new();
        while !stopped.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(piece) = pieces.get(index) else { break };
            let mut outcome = judge.piece(piece, pricing)?;
            outcome.forget_slow();
            let judged = judged.fetch_add(outcome.judged, Ordering::Relaxed) + outcome.judged;
            found.push((index, outcome));
            if !watch(Progress { done: index + 1, of: pieces.len(), judged }) {
                stopped.store(true, Ordering::Relaxed);
            }
        }
        Ok::<_, Unpriced>(found)
    };
    let shares: Result<Vec<_>, Unpriced> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(work)).collect();
        workers.into_iter().map(|worker| worker.join().expect("no piece panics")).collect()
    });
    let mut parts: Vec<(usize, Part)> = shares?.into_iter().flatten().collect();
    parts.sort_by_key(|(index, _)| *index);
    let mut whole = Part::default();
    parts.into_iter().for_each(|(_, part)| whole.add(part));
    Ok(whole.outcome(stopped.into_inner()))
}

/// How much longer than the fastest a family may take that is kept.
const SLOWEST: f64 = 2.0;

/// What a part of a search found.
#[derive(Debug, Default)]
struct Part {
    families: BTreeMap<Family, Found>,
    judged: u64,
    fitting: u64,
    least: Option<(Layout, StageMemory)>,
}

impl Part {
    /// Forgets families that take more than twice as long as the fastest: of millions of layouts
    /// most are of no interest to anybody.
    fn forget_slow(&mut self) {
        let times = self.families.values().map(|found| found.estimate.step_time.0);
        let slowest = SLOWEST * times.fold(f64::INFINITY, f64::min);
        self.families.retain(|_, found| found.estimate.step_time.0 <= slowest);
    }

    /// Whether one of its family is as fast.
    fn is_beaten(&self, layout: &Layout, estimate: &Estimate) -> bool {
        let best = self.families.get(&Family::of(layout));
        best.is_some_and(|best| best.estimate.step_time <= estimate.step_time)
    }

    /// Keeps a layout if it is the fastest of its family so far.
    fn keep(&mut self, found: Found) {
        let best = self.families.entry(Family::of(&found.layout));
        best.and_modify(|best| {
            if found.estimate.step_time < best.estimate.step_time {
                *best = found.clone();
            }
        })
        .or_insert(found);
    }

    /// Keeps what needs least memory.
    fn keep_least(&mut self, layout: &Layout, memory: StageMemory) {
        if self.least.as_ref().is_none_or(|(_, least)| memory.total() < least.total()) {
            self.least = Some((layout.clone(), memory));
        }
    }

    fn add(&mut self, other: Self) {
        self.judged += other.judged;
        self.fitting += other.fitting;
        other.families.into_values().for_each(|found| self.keep(found));
        if let Some((layout, memory)) = other.least {
            self.keep_least(&layout, memory);
        }
    }

    fn outcome(mut self, stopped: bool) -> Outcome {
        self.forget_slow();
        let Self { families, judged, fitting, least } = self;
        let mut families: Vec<Found> = families.into_values().collect();
        families.sort_by(|a, b| a.estimate.step_time.0.total_cmp(&b.estimate.step_time.0));
        let least = least.filter(|_| families.is_empty());
        Outcome { families, judged, fitting, least, stopped }
    }
}
