//! The page of a job that is simulated on the cluster it describes.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use model::Counting;
use program::Program;
use report::Summary;
use report::page::{self, Fact, Origin, Page, ScalingCurve, Section};
use units::{Bytes, Seconds};

use super::{links, planned_memory};
use crate::described::{Costing, Described};
use crate::job::{Draft, Job};
use crate::output::{percent, thousands};
use crate::plan_command::{describe_layout, lowered};

/// The page of the job in `path`.
pub fn page(
    path: &Path,
    set: &[String],
    costing: &Costing,
    curves: Vec<ScalingCurve>,
) -> Result<Page> {
    let draft = Draft::read(path, set)?;
    ensure!(
        !draft.job().cluster.is_local(),
        "{} runs on this machine: `phalanx train` it, and report on its run",
        path.display()
    );
    let job = Job::of(draft, costing).with_context(|| path.display().to_string())?;
    let program = lowered(&job)?;
    let described = Described::new(&job.cluster, job.training.precision, costing)?;
    let cluster = &described.roofline.cluster;
    let times = described.times(&program)?;
    let trace = described.step(&program)?.trace()?;
    let summary = Summary::of(times.step_time, times.classes);
    let step = summary.step_time;
    let scaling = match curves.is_empty() {
        true => Section::absent(
            "Scaling",
            "`phalanx scale JOB --json` simulates the job at many sizes; `--scale` puts its curves here.",
        ),
        false => page::scaling(&curves, &["Every point is simulated.".to_owned()]),
    };
    let sections = vec![
        page::time(&[(Origin::Predicted, &summary)]),
        page::timeline(&program, &[(Origin::Predicted, &trace)]),
        page::memory(
            "The peak of one rank of each stage, predicted by a closed form.",
            &planned_memory(&job),
            Some(cluster.accelerator.memory),
        ),
        page::topology(&links::of_cluster(&program, cluster)?, step, Origin::Predicted),
        scaling,
        energy(&program, &described, &summary),
    ];
    let about = vec![
        format!(
            "{} parameters on {} accelerators: {}.",
            thousands(job.model.parameter_count()),
            thousands(job.cluster.accelerators.into()),
            describe_layout(&job, &program),
        ),
        format!("Simulated: {}.", described.source()),
    ];
    let facts = facts(&job, &program, &described, step);
    Ok(Page { title: job.name.clone(), about, facts, sections, refresh_s: None })
}

fn facts(job: &Job, program: &Program, described: &Described, step: Seconds) -> Vec<Fact> {
    let cluster = &described.roofline.cluster;
    let ranks = f64::from(program.mesh.ranks());
    let tokens_per_s = program.global_tokens() as f64 / step.0;
    let memory: Option<Bytes> = planned_memory(job)
        .iter()
        .map(|stage| stage.items.iter().map(|(_, bytes)| *bytes).sum())
        .max();
    let fact = |name, value: String, note: &str| Fact { name, value, note: note.to_owned() };
    let mut facts = vec![
        fact("step time", step.to_string(), "predicted"),
        fact("tokens a second", thousands(tokens_per_s as u64), "predicted"),
        fact("tokens a second, each", thousands((tokens_per_s / ranks) as u64), "predicted"),
    ];
    // Eight-bit block formats and the like have no peak of their own.
    if let Some(peak) = cluster.accelerator.peak.get(&job.training.precision) {
        let per_token =
            job.model.training_flops_per_token(job.training.sequence, Counting::Causal).as_f64();
        let utilization = per_token * tokens_per_s / (ranks * peak.0);
        facts.push(fact(
            "model FLOPs utilization",
            percent(utilization),
            "predicted, causal attention",
        ));
    }
    if let Some(memory) = memory {
        let note = format!("predicted, of {}", cluster.accelerator.memory);
        facts.push(fact("memory, fullest stage", memory.to_string(), &note));
    }
    facts
}

fn energy(program: &Program, described: &Described, summary: &Summary) -> Section {
    let (cluster, ranks) = (&described.roofline.cluster, program.mesh.ranks());
    let busy = summary.mean.compute / summary.step_time;
    let Some(energy) = cluster.energy(ranks, summary.step_time, busy) else {
        return Section::absent(
            "Energy",
            "The maker of the accelerator publishes no power rating.",
        );
    };
    let tokens = program.global_tokens() as f64;
    let mut said = vec![format!(
        "Predicted: {} a step at the wall, {:.3} a token. {} of it in the accelerators, which compute for {} of the step; hosts, cooling and conversion are the rest.",
        energy.facility,
        energy.facility * (1.0 / tokens),
        energy.accelerators,
        percent(busy),
    )];
    if let Some(usd) = cluster.usd(ranks, summary.step_time) {
        said.push(format!("At the public list price a step costs {usd:.2} US dollars."));
    }
    Section::said("Energy", &said)
}
