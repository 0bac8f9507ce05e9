//! The figures of a simulated step.

use std::collections::BTreeMap;

use anyhow::Result;
use model::Counting;
use plan::memory::{DoesNotFit, Footprint, Options, StageMemory};
use program::{Axis, Breakdown, Program, Work};
use report::{Summary, communication_table, summary_table, work_table};
use serde::Serialize;
use sim::World;
use units::{Bytes, FlopsPerSecond, Joules, Seconds};

use crate::job::Job;
use crate::output::thousands;

/// What is predicted of a step. Keys are stable.
#[derive(Debug, Serialize)]
pub struct Prediction {
    step_time_s: Seconds,
    /// What 5, 50 and 95 % of steps stay below.
    step_time_s_quantiles: Option<[Seconds; 3]>,
    /// What an outer update takes where groups train apart, and after how many steps there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    outer_update_s: Option<Seconds>,
    #[serde(skip_serializing_if = "Option::is_none")]
    outer_update_every_steps: Option<u32>,
    tokens_per_s: f64,
    tokens_per_s_per_accelerator: f64,
    model_flops_utilization: Option<f64>,
    model_flops_utilization_full_attention: Option<f64>,
    compute_s: Seconds,
    exposed_communication_s: Seconds,
    hidden_communication_s: Seconds,
    pipeline_bubble_s: Seconds,
    optimizer_s: Seconds,
    exposed_communication_by_axis_s: BTreeMap<Axis, Seconds>,
    hidden_communication_by_axis_s: BTreeMap<Axis, Seconds>,
    compute_by_segment_s: BTreeMap<Work, Seconds>,
    memory_bytes_peak: Option<Bytes>,
    memory_bytes_by_stage: Vec<Bytes>,
    stages: Vec<Breakdown>,
    energy_j: Option<Joules>,
    energy_j_per_token: Option<Joules>,
    usd: Option<f64>,
    machine: String,
    #[serde(skip)]
    memory: Option<Memory>,
    #[serde(skip)]
    summary: Summary,
    #[serde(skip)]
    peak: Option<String>,
}

impl Prediction {
    /// From the times of a step of `job` in `world`, which `machine` describes.
    pub fn new(
        job: &Job,
        program: &Program,
        world: &World,
        summary: Summary,
        quantiles: Option<[Seconds; 3]>,
        machine: String,
    ) -> Self {
        let ranks = program.mesh.ranks();
        let tokens_per_s = program.global_tokens() as f64 / summary.step_time.0;
        let peak = peak(world, job);
        let utilization = |counting| peak.map(|peak| mfu(job, counting, tokens_per_s, ranks, peak));
        let (energy, usd) = drawn(world, ranks, &summary);
        let memory = memory(world, job);
        let held = memory.as_ref().map(|memory| memory.stages.as_slice()).unwrap_or_default();
        let held: Vec<Bytes> = held.iter().map(StageMemory::total).collect();
        let mean = summary.mean.clone();
        Self {
            step_time_s: summary.step_time,
            step_time_s_quantiles: quantiles,
            outer_update_s: None,
            outer_update_every_steps: None,
            tokens_per_s,
            tokens_per_s_per_accelerator: tokens_per_s / f64::from(ranks),
            model_flops_utilization: utilization(Counting::Causal),
            model_flops_utilization_full_attention: utilization(Counting::Full),
            compute_s: mean.compute,
            exposed_communication_s: mean.exposed_communication(),
            hidden_communication_s: mean.hidden_communication(),
            pipeline_bubble_s: mean.bubble,
            optimizer_s: mean.optimizer(),
            exposed_communication_by_axis_s: mean.exposed,
            hidden_communication_by_axis_s: mean.hidden,
            compute_by_segment_s: mean.work,
            memory_bytes_peak: held.iter().copied().max(),
            memory_bytes_by_stage: held,
            memory,
            stages: stages(program, &summary),
            energy_j: energy,
            energy_j_per_token: energy.map(|all| all * (1.0 / program.global_tokens() as f64)),
            usd,
            machine,
            summary,
            peak: peak.map(|peak| format!("{peak} {}", job.training.precision)),
        }
    }

    /// What a step takes.
    pub fn step_time(&self) -> Seconds {
        self.step_time_s
    }

    /// With an outer update that takes so long after every so many steps.
    #[must_use]
    pub fn with_outer_update(self, time: Seconds, every_steps: u32) -> Self {
        let slower = self.step_time_s / (self.step_time_s + time * (1.0 / f64::from(every_steps)));
        let slowed = |figure: Option<f64>| figure.map(|figure| figure * slower);
        Self {
            outer_update_s: Some(time),
            outer_update_every_steps: Some(every_steps),
            tokens_per_s: self.tokens_per_s * slower,
            tokens_per_s_per_accelerator: self.tokens_per_s_per_accelerator * slower,
            model_flops_utilization: slowed(self.model_flops_utilization),
            model_flops_utilization_full_attention: slowed(
                self.model_flops_utilization_full_attention,
            ),
            ..self
        }
    }

    /// Whether the step fits into memory, where that is described.
    pub fn fits(self) -> Result<()> {
        if let Some(memory) = self.memory {
            memory.fit?;
        }
        Ok(())
    }
}

/// What a step holds in described accelerators.
#[derive(Debug)]
struct Memory {
    capacity: Bytes,
    stages: Vec<StageMemory>,
    fit: Result<StageMemory, DoesNotFit>,
}

fn memory(world: &World, job: &Job) -> Option<Memory> {
    let World::Roofline(roofline) = world else { return None };
    let capacity = roofline.cluster.accelerator.memory;
    let options = Options::new(job.training.precision, &job.layout);
    let (footprint, batch) = (Footprint::new(&job.model), job.batch());
    let stages = footprint.stages(&job.layout, &batch, &options);
    let fit = footprint.fit(&job.layout, &batch, &options, capacity);
    Some(Memory { capacity, stages, fit })
}

/// A stage's first rank stands for it.
fn stages(program: &Program, summary: &Summary) -> Vec<Breakdown> {
    let stages = program.classes.len();
    summary.ranks.chunks(summary.ranks.len() / stages).map(|stage| stage[0].clone()).collect()
}

/// The dense peak rate of one accelerator, where one is described.
fn peak(world: &World, job: &Job) -> Option<FlopsPerSecond> {
    let World::Roofline(roofline) = world else { return None };
    roofline.cluster.accelerator.peak.get(&job.training.precision).copied()
}

/// Model FLOPs utilization (Chowdhery et al. 2022, appendix B): the FLOPs that the model needs for
/// a token, forward and backward with nothing recomputed, times tokens a second, over the dense
/// peak of all accelerators.
fn mfu(job: &Job, counting: Counting, tokens_per_s: f64, ranks: u32, peak: FlopsPerSecond) -> f64 {
    let per_token = job.model.training_flops_per_token(job.training.sequence, counting);
    per_token.as_f64() * tokens_per_s / (f64::from(ranks) * peak.0)
}

/// What a step on described hardware draws at the wall, and what it costs; nothing for a measured
/// machine, and where the maker publishes no power rating.
fn drawn(world: &World, ranks: u32, summary: &Summary) -> (Option<Joules>, Option<f64>) {
    let World::Roofline(roofline) = world else { return (None, None) };
    let busy = summary.mean.compute / summary.step_time;
    let Some(energy) = roofline.cluster.energy(ranks, summary.step_time, busy) else {
        return (None, None);
    };
    (Some(energy.facility), roofline.cluster.usd(ranks, summary.step_time))
}

impl std::fmt::Display for Prediction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "machine        {}\n", self.machine)?;
        write!(f, "{}", summary_table(&[("predicted", &self.summary)]))?;
        let row = |label: &str, value: String| format!("{label:<32}{value:>12}\n");
        if let Some([short, _, long]) = self.step_time_s_quantiles {
            f.write_str(&row("nine steps in ten, from", short.to_string()))?;
            f.write_str(&row("to", long.to_string()))?;
        }
        f.write_str(&row("optimizer (part of compute)", self.optimizer_s.to_string()))?;
        if let (Some(time), Some(every)) = (self.outer_update_s, self.outer_update_every_steps) {
            f.write_str(&row(&format!("outer update, every {every} steps"), time.to_string()))?;
        }
        f.write_str(&row("tokens/s", thousands(self.tokens_per_s as u64)))?;
        let per_accelerator = thousands(self.tokens_per_s_per_accelerator as u64);
        f.write_str(&row("tokens/s an accelerator", per_accelerator))?;
        if let (Some(causal), Some(full), Some(peak)) =
            (self.model_flops_utilization, self.model_flops_utilization_full_attention, &self.peak)
        {
            let causal = format!("{:.1} %", 100.0 * causal);
            f.write_str(&row("MFU", causal))?;
            f.write_str(&row("MFU, attention counted in full", format!("{:.1} %", 100.0 * full)))?;
            writeln!(f, "  (model FLOPs a token x tokens/s / accelerators / {peak})")?;
        }
        if let (Some(energy), Some(per_token)) = (self.energy_j, self.energy_j_per_token) {
            f.write_str(&row("energy at the wall", energy.to_string()))?;
            f.write_str(&row("energy a token", format!("{per_token:.3}")))?;
        }
        if let Some(memory) = &self.memory {
            writeln!(f)?;
            for stage in &memory.stages {
                writeln!(f, "memory, {}", stage.describe(memory.capacity))?;
            }
        }
        write!(f, "\n{}", communication_table(&self.summary.mean))?;
        write!(f, "\n{}", work_table(&self.summary.mean))
    }
}
