//! A job at several sizes and under several conditions, simulated point by point.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Result, ensure};
use cluster::{PerDomain, Precision};
use model::Counting;
use plan::memory::{Footprint, Options};
use plan::{Batch, Layout, lower};
use program::Program;
use serde::Serialize;
use sim::goodput::Reliability;
use units::{Bytes, Joules, Seconds, Watts};

use super::goodput::{self, Goodput};
use super::machine::{Cause, Machine, Timing};
use super::section::{BatchRule, Growth, Switch};
use crate::cluster_section::ClusterSection;
use crate::job::{Draft, Job};
use crate::plan_command::prove;

/// A job under conditions of its own.
#[derive(Debug)]
pub struct Alternative {
    /// What is different.
    pub name: String,
    pub machine: Machine,
}

/// A job at one size.
#[derive(Debug, Clone, Serialize)]
pub struct Point {
    pub accelerators: u32,
    /// Sequences of a step.
    pub global_batch: u64,
    /// The degrees of the axes.
    pub layout: String,
    /// Microbatches of a rank.
    pub microbatches: u32,
    /// Pipeline ranks.
    pub stages: u32,
    pub step_time_s: Seconds,
    pub tokens_per_s: f64,
    pub tokens_per_s_per_accelerator: f64,
    /// Throughput of an accelerator over that of the baseline.
    pub scaling_efficiency: f64,
    pub model_flops_utilization: Option<f64>,
    /// Whether it fits into memory.
    pub fits: bool,
    pub memory_bytes_peak: Bytes,
    /// The step by what it was spent on.
    pub by_cause_s: BTreeMap<Cause, Seconds>,
    /// How much shorter the step would be if no transfer had a latency.
    pub latency_s: Seconds,
    /// Share of the step in which communication holds a rank up.
    pub exposed_share: f64,
    /// Share of the step in which transfers are under way; axes count each, so it may exceed 1.
    pub network_share: f64,
    /// What costs most of what is lost against the baseline.
    pub bound: Cause,
    /// The same with what is behind it.
    pub bound_in_words: String,
    /// Of the facility, cooling included.
    pub power_w: Option<Watts>,
    pub energy_j_per_token: Option<Joules>,
    pub usd_per_million_tokens: Option<f64>,
    /// The whole training, if nothing went wrong.
    pub time_to_train_s: Option<Seconds>,
    /// Accelerator time of the whole training at the baseline over that here.
    pub time_to_train_efficiency: Option<f64>,
    pub energy_to_train_j: Option<Joules>,
    pub usd_to_train: Option<f64>,
    /// The whole training, with what goes wrong.
    pub goodput: Option<Goodput>,
    #[serde(skip)]
    pub reliability: Reliability,
}

/// A size that cannot be.
#[derive(Debug, Clone, Serialize)]
pub struct Impossible {
    pub accelerators: u32,
    pub reason: String,
}

/// A job under one condition, at all sizes.
#[derive(Debug, Clone, Serialize)]
pub struct Curve {
    /// What is different from the job as described.
    pub alternative: String,
    pub machine: String,
    pub points: Vec<Point>,
    pub impossible: Vec<Impossible>,
    /// Where efficiency passes 90, 80 and 50 %, interpolated between simulated sizes along the
    /// logarithm of their number; nothing where it stays above.
    pub knee_accelerators: BTreeMap<u32, Option<f64>>,
}

/// Efficiency above which nothing is said to be lost.
const LOSSLESS: f64 = 0.995;

/// Percentages at which a knee is told.
pub const KNEES: [u32; 3] = [90, 80, 50];

/// The job's own conditions, and each change to them that is asked for.
pub fn alternatives(draft: &Draft) -> Result<Vec<Alternative>> {
    let job = draft.job();
    let (own, scale) = (&job.cluster, &job.scale);
    let mut changes = vec![("as described".to_owned(), own.clone(), false)];
    for fabric in &scale.fabric {
        let fabric = Some(fabric.clone());
        let name = format!("fabric {}", fabric.as_deref().unwrap_or_default());
        changes.push((name, ClusterSection { fabric, ..own.clone() }, false));
    }
    for accelerator in &scale.accelerator {
        let section = ClusterSection {
            accelerator: Some(accelerator.clone()),
            software: None,
            ..own.clone()
        };
        changes.push((format!("accelerator {accelerator}"), section, false));
    }
    if scale.sharp.contains(&Switch::On) {
        changes.push(("SHARP on".to_owned(), own.clone(), true));
    }
    for size in &scale.per_domain {
        let per_domain = Some(PerDomain::Accelerators(*size));
        changes.push((
            format!("domains of {size}"),
            ClusterSection { per_domain, ..own.clone() },
            false,
        ));
    }
    let precision = job.training.precision;
    let build = |(name, section, sharp): (String, ClusterSection, bool)| {
        Ok(Alternative { name, machine: Machine::new(&section, precision, sharp)? })
    };
    changes.into_iter().map(build).collect()
}

/// The sizes with their batches.
pub fn sizes(draft: &Draft) -> Result<Vec<(u32, u64)>> {
    let job = draft.job();
    let given = &job.scale.accelerators;
    ensure!(!given.contains(&0), "[scale] accelerators: 0 is no size");
    let mut sizes = if given.is_empty() { powers_of_two(draft) } else { given.clone() };
    if !matches!(job.scale.batch, BatchRule::Given(_)) {
        sizes.sort_unstable();
        sizes.dedup();
    }
    let own = u64::from(job.cluster.accelerators);
    let batch = job.training.global_batch;
    Ok(match &job.scale.batch {
        BatchRule::Kept(Growth::Fixed) | BatchRule::Unsaid => {
            sizes.into_iter().map(|size| (size, batch)).collect()
        }
        BatchRule::Kept(Growth::Grows) => {
            sizes.into_iter().map(|size| (size, (batch * u64::from(size) / own).max(1))).collect()
        }
        BatchRule::Given(batches) => {
            ensure!(
                batches.len() == sizes.len(),
                "[scale] batch has {} entries for {} sizes; give one for each of `accelerators`",
                batches.len(),
                sizes.len()
            );
            sizes.into_iter().zip(batches.iter().copied()).collect()
        }
    })
}

/// Powers of two times the ranks of one copy of the model, up to the job's own size.
fn powers_of_two(draft: &Draft) -> Vec<u32> {
    let given = |degree: Option<u32>| degree.unwrap_or(1);
    let partial = &draft.given;
    let copy = given(partial.tensor) * given(partial.context) * given(partial.pipeline);
    let own = draft.job().cluster.accelerators;
    let doubled = std::iter::successors(Some(copy.max(1)), |size| size.checked_mul(2));
    let mut sizes: Vec<u32> = doubled.take_while(|size| *size < own).collect();
    sizes.push(own);
    sizes
}

/// Every alternative at every size. Points are shared out among `threads`; what comes out does not
/// depend on how many. Once `stop` is set no further point is begun.
pub fn curves(
    draft: &Draft,
    alternatives: &[Alternative],
    sizes: &[(u32, u64)],
    threads: usize,
    stop: &AtomicBool,
    progress: &(impl Fn(usize) + Sync),
) -> Vec<Curve> {
    let count = alternatives.len() * sizes.len();
    let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let found = Mutex::new(vec![None; count]);
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count || stop.load(Ordering::Relaxed) {
                return;
            }
            let alternative = &alternatives[index % alternatives.len()];
            let (accelerators, batch) = sizes[index / alternatives.len()];
            let point = point(draft, &alternative.machine, accelerators, batch)
                .map_err(|reason| Impossible { accelerators, reason: format!("{reason:#}") });
            found.lock().expect("no holder panics")[index] = Some(point);
            progress(done.fetch_add(1, Ordering::Relaxed) + 1);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(work);
        }
        work();
    });
    let found = found.into_inner().expect("no holder panics");
    let of = |index: usize| found.iter().skip(index).step_by(alternatives.len()).flatten().cloned();
    alternatives.iter().enumerate().map(|(index, one)| Curve::new(draft, one, of(index))).collect()
}

/// The job on `accelerators` with this batch.
fn point(draft: &Draft, machine: &Machine, accelerators: u32, global_batch: u64) -> Result<Point> {
    let job = draft.job();
    let batch = Batch { global_batch, ..job.batch() };
    let machine = machine.sized(accelerators)?;
    let layout = draft.layout_on(&machine.section, accelerators, &batch)?;
    let program = lower(&job.model, &layout, &batch)?;
    prove(&program);
    let timing = machine.time(&program)?;
    Ok(Point::new(job, &machine, &layout, &batch, &program, &timing))
}

impl Job {
    /// Tokens until the job is trained with this batch: those that it gives, more where the batch
    /// is larger than its own and a critical batch is given. To reach the same loss takes
    /// E = E_min (1 + B / B_crit) tokens (McCandlish et al. 2018, arXiv:1812.06162, equation 2.11).
    pub fn tokens_to_train(&self, batch: &Batch) -> Option<f64> {
        let tokens = self.training.tokens?;
        let Some(critical) = self.scale.critical_batch_tokens else { return Some(tokens) };
        let needs = |sequences: u64| 1.0 + (sequences * batch.sequence) as f64 / critical;
        Some(tokens * needs(batch.global_batch) / needs(self.training.global_batch))
    }
}

impl Point {
    fn new(
        job: &Job,
        machine: &Machine,
        layout: &Layout,
        batch: &Batch,
        program: &Program,
        timing: &Timing,
    ) -> Self {
        let accelerators = layout.mesh.ranks();
        let step = timing.step_time;
        let tokens = program.global_tokens() as f64;
        let each = tokens / step.0 / f64::from(accelerators);
        let mean = &timing.mean;
        let cluster = machine.cluster();
        let energy = cluster.energy(accelerators, step, mean.compute / step);
        let energy = energy.map(|energy| energy.facility);
        let price = job.cluster.usd_per_accelerator_hour;
        let price = price.or(cluster.price.as_ref().map(|price| price.usd_per_accelerator_hour));
        let usd = price.map(|price| price * f64::from(accelerators) * step.0 / 3600.0);
        let steps = job.tokens_to_train(batch).map(|all| all / tokens);
        let options = Options::new(job.training.precision, layout);
        let memory = Footprint::new(&job.model).peak(layout, batch, &options);
        let (held, reliability) =
            (memory.total(), job.goodput.reliability(accelerators, memory.state()));
        let moving = mean.exposed_communication() + mean.hidden_communication();
        let work = steps.map(|steps| step * steps);
        Self {
            accelerators,
            global_batch: batch.global_batch,
            layout: layout.mesh.to_string(),
            microbatches: program.microbatches,
            stages: layout.mesh.pipeline,
            step_time_s: step,
            tokens_per_s: tokens / step.0,
            tokens_per_s_per_accelerator: each,
            scaling_efficiency: 1.0,
            model_flops_utilization: utilization(job, machine, each),
            fits: held <= cluster.accelerator.memory,
            memory_bytes_peak: held,
            by_cause_s: timing.by_cause(),
            latency_s: timing.latency,
            exposed_share: mean.exposed_communication() / step,
            network_share: moving / step,
            bound: Cause::Compute,
            bound_in_words: String::new(),
            power_w: energy.map(|energy| Watts(energy.0 / step.0)),
            energy_j_per_token: energy.map(|energy| energy * (1.0 / tokens)),
            usd_per_million_tokens: usd.map(|usd| usd / tokens * 1e6),
            time_to_train_s: work,
            time_to_train_efficiency: work.map(|_| 1.0),
            energy_to_train_j: energy.zip(steps).map(|(energy, steps)| energy * steps),
            usd_to_train: usd.zip(steps).map(|(usd, steps)| usd * steps),
            goodput: work.map(|work| goodput::goodput(&reliability, accelerators, step, work)),
            reliability,
        }
    }

    /// Seconds of an accelerator for a token, by what they were spent on.
    fn for_a_token(&self, cause: Cause) -> f64 {
        let time = self.by_cause_s.get(&cause).copied().unwrap_or_default();
        time / self.step_time_s / self.tokens_per_s_per_accelerator
    }

    /// What costs most of what is lost against `base`; where next to nothing is, what costs most
    /// beside computing.
    fn bounded_by(&self, base: &Self) -> Cause {
        let lossless = self.scaling_efficiency > LOSSLESS;
        let before = |cause| if lossless { 0.0 } else { base.for_a_token(cause) };
        let grown = |cause: Cause| self.for_a_token(cause) - before(cause);
        let causes = self.by_cause_s.keys().copied();
        let lost = causes.filter(|cause| !lossless || *cause != Cause::Compute);
        lost.max_by(|a, b| grown(*a).total_cmp(&grown(*b))).unwrap_or(Cause::Compute)
    }

    fn explained(&self) -> String {
        let transfers = matches!(
            self.bound,
            Cause::Data | Cause::Tensor | Cause::Context | Cause::Expert | Cause::Pipeline
        );
        let held = self.step_time_s * self.exposed_share;
        match self.bound {
            Cause::Bubble if self.stages > 1 => {
                let Self { microbatches, stages, .. } = self;
                format!("bubble: batch of {microbatches} microbatches for {stages} stages")
            }
            cause if transfers && self.latency_s.0 > 0.5 * held.0 => format!("{cause}, by latency"),
            cause => cause.to_string(),
        }
    }
}

/// Model FLOPs utilization with causal attention, over the dense peak of the precision.
fn utilization(job: &Job, machine: &Machine, tokens_per_s: f64) -> Option<f64> {
    let peak = machine.cluster().accelerator.peak.get(&peak_precision(machine.precision()))?;
    let per_token = job.model.training_flops_per_token(job.training.sequence, Counting::Causal);
    Some(per_token.as_f64() * tokens_per_s / peak.0)
}

/// Block formats of eight bits have the peak of eight bits.
fn peak_precision(precision: Precision) -> Precision {
    if precision == Precision::Mxfp8 { Precision::Fp8 } else { precision }
}

impl Curve {
    fn new(
        draft: &Draft,
        of: &Alternative,
        found: impl Iterator<Item = std::result::Result<Point, Impossible>>,
    ) -> Self {
        let (mut points, mut impossible) = (Vec::new(), Vec::new());
        for one in found {
            match one {
                Ok(point) => points.push(point),
                Err(reason) => impossible.push(reason),
            }
        }
        // Without sizes of its own, a job is told of from where it fits.
        if draft.job().scale.accelerators.is_empty() {
            let first = points.iter().position(|point: &Point| point.fits).unwrap_or(0);
            points.drain(..first);
        }
        compare(&mut points);
        let knees = KNEES.into_iter().map(|percent| (percent, knee(&points, percent)));
        Self {
            alternative: of.name.clone(),
            machine: of.machine.describe(),
            knee_accelerators: knees.collect(),
            points,
            impossible,
        }
    }
}

/// Fills in what is relative to the first point.
fn compare(points: &mut [Point]) {
    let Some(base) = points.first().cloned() else { return };
    for point in points {
        let each = point.tokens_per_s_per_accelerator;
        point.scaling_efficiency = each / base.tokens_per_s_per_accelerator;
        let all = |of: &Point| Some(of.time_to_train_s?.0 * f64::from(of.accelerators));
        point.time_to_train_efficiency =
            all(&base).zip(all(point)).map(|(before, now)| before / now);
        point.bound = point.bounded_by(&base);
        point.bound_in_words = point.explained();
    }
}

/// Where efficiency first passes `percent`, between two points along the logarithm of their size.
fn knee(points: &[Point], percent: u32) -> Option<f64> {
    let mark = f64::from(percent) / 100.0;
    points.windows(2).find_map(|pair| {
        let [before, after] = [&pair[0], &pair[1]];
        let (high, low) = (before.scaling_efficiency, after.scaling_efficiency);
        if high < mark || low >= mark {
            return None;
        }
        let share = (high - mark) / (high - low);
        let (from, to) = (f64::from(before.accelerators).ln(), f64::from(after.accelerators).ln());
        Some((from + share * (to - from)).exp())
    })
}
