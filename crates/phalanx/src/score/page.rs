//! Scores in a terminal, and as comma-separated values.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use anyhow::Result;
use units::Seconds;

use super::results::{Outcome, Refused};
use super::run::Timing;
use super::scaling::{Point, Scaling, Series};
use crate::mllog;
use crate::output::{BAR, bar, columns, percent, thousands};
use crate::scale::long;

/// Tables and plots of all series, and what could not be read.
pub fn text(series: &[Series], refused: &[Refused]) -> String {
    let mut text = String::new();
    for series in series {
        let _ = writeln!(text, "{}", series.name);
        text += &columns(&rows(series));
        text += &plot(series);
        text += &notes(series);
        text.push('\n');
    }
    let efficiency = "efficiency is against the smallest size of a series: tokens/s by tokens/s of an accelerator, \
                      to train by time to train times accelerators";
    if series.iter().any(|series| series.points.len() > 1) {
        let _ = writeln!(text, "{efficiency}");
    }
    text += &not_simulated(series);
    for Refused { file, reason } in refused {
        let _ = writeln!(text, "left out       {}: {reason}", file.display());
    }
    text
}

type Cell = fn(&Point) -> Option<String>;

/// The columns of a table; those of which nothing is known are left out.
const COLUMNS: [(&str, Cell); 12] = [
    ("system", |point| Some(system(&point.outcome))),
    ("accelerators", |point| Some(thousands(point.outcome.accelerators.into()))),
    ("batch", |point| Some(thousands(point.outcome.global_batch))),
    ("scaling", |point| Some(scaling(point.scaling).to_owned())),
    ("step", |point| point.outcome.step_time_s.map(|time| step(time, point.outcome.timing))),
    ("tokens/s each", |point| {
        point.outcome.tokens_per_s_per_accelerator.map(|rate| format!("{rate:.1}"))
    }),
    ("efficiency", |point| point.throughput_efficiency.map(percent)),
    ("to train", |point| point.outcome.time_to_train_s.map(long)),
    ("efficiency", |point| point.time_to_train_efficiency.map(percent)),
    ("simulated", |point| point.simulated.as_ref().map(|it| it.step_time_s.to_string())),
    ("error", |point| point.error().map(|error| format!("{:+.1} %", 100.0 * error))),
    ("efficiency", |point| point.simulated_efficiency.map(percent)),
];

fn rows(series: &Series) -> Vec<Vec<String>> {
    let known = |cell: &Cell| series.points.iter().any(|point| cell(point).is_some());
    let shown: Vec<_> = COLUMNS.iter().filter(|(_, cell)| known(cell)).collect();
    let head = shown.iter().map(|(name, _)| (*name).to_owned()).collect();
    let row = |point: &Point| -> Vec<String> {
        shown.iter().map(|(_, cell)| cell(point).unwrap_or_default()).collect()
    };
    std::iter::once(head).chain(series.points.iter().map(row)).collect()
}

/// The system of a submission, or the folder of a run of our own.
fn system(outcome: &Outcome) -> String {
    let folder = outcome.folder.file_name().unwrap_or_default().to_string_lossy();
    let own = Path::new(&outcome.folder).join(mllog::FILE).exists();
    if own || outcome.system.is_empty() { folder.into_owned() } else { outcome.system.clone() }
}

fn scaling(scaling: Scaling) -> &'static str {
    match scaling {
        Scaling::Baseline => "baseline",
        Scaling::Strong => "strong",
        Scaling::Weak => "weak",
        Scaling::Between => "between",
    }
}

fn step(time: Seconds, timing: Option<Timing>) -> String {
    if timing == Some(Timing::AtMost) { format!("< {time}") } else { time.to_string() }
}

/// Efficiency by size as bars, measured above simulated; of one size there is nothing to see.
fn plot(series: &Series) -> String {
    let line = |size: &str, share: f64, mark: &str, what: &str| {
        format!("  {size:>9} {:<BAR$} {:>7} {what}\n", bar(share, mark), percent(share))
    };
    let mut text = String::from("\n");
    for point in series.points.iter().filter(|_| series.points.len() > 1) {
        let size = thousands(point.outcome.accelerators.into());
        if let Some(share) = point.throughput_efficiency {
            text += &line(&size, share, "█", "measured");
        }
        if let Some(share) = point.simulated_efficiency {
            text += &line("", share, "░", "simulated");
        }
    }
    if text.len() > 1 { text } else { String::new() }
}

/// What the reader must know of the figures.
fn notes(series: &Series) -> String {
    let mut text = String::new();
    let outcomes = || series.points.iter().map(|point| &point.outcome);
    if outcomes().any(|outcome| outcome.timing == Some(Timing::AtMost)) {
        text += "  a step < : the log tells evaluations and training apart nowhere, so evaluations are in it\n";
    }
    for outcome in outcomes() {
        let failed = outcome.runs.iter().filter(|run| !run.success).count();
        if failed > 0 {
            let (system, runs) = (system(outcome), outcome.runs.len());
            let _ = writeln!(text, "  {system}: {failed} of {runs} run(s) did not reach a target");
        }
    }
    text
}

/// Systems that are named where they are not simulated; of more, only the number is told.
const NAMED: usize = 4;

/// Why some results have no simulated step beside them.
fn not_simulated(series: &[Series]) -> String {
    let mut missing: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for point in series.iter().flat_map(|series| &series.points) {
        if let Some(reason) = &point.missing {
            missing.entry(reason).or_default().push(system(&point.outcome));
        }
    }
    let line = |(reason, systems): (&str, Vec<String>)| match systems.len() {
        ..=NAMED => format!("not simulated  {}: {reason}\n", systems.join(", ")),
        many => format!("not simulated  {many} results: {reason}\n"),
    };
    missing.into_iter().map(line).collect()
}

/// One row for each result.
pub fn csv(series: &[Series]) -> Result<String> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record([
        "folder",
        "benchmark",
        "submitter",
        "system",
        "accelerator",
        "accelerators",
        "global_batch",
        "sequence",
        "step_time_s",
        "timing",
        "tokens_per_s_per_accelerator",
        "time_to_train_s",
        "official_time_to_train_s",
        "baseline_accelerators",
        "scaling",
        "throughput_efficiency",
        "time_to_train_efficiency",
        "simulated_step_time_s",
        "simulated_efficiency",
    ])?;
    for series in series {
        for point in &series.points {
            let number = |number: Option<f64>| number.map(|it| it.to_string()).unwrap_or_default();
            let seconds = |time: Option<Seconds>| number(time.map(|time| time.0));
            let of = &point.outcome;
            writer.write_record([
                of.folder.display().to_string(),
                of.benchmark.clone(),
                of.submitter.clone(),
                of.system.clone(),
                of.accelerator.clone().unwrap_or_default(),
                of.accelerators.to_string(),
                of.global_batch.to_string(),
                of.sequence.to_string(),
                seconds(of.step_time_s),
                of.timing.map(timing).unwrap_or_default().to_owned(),
                number(of.tokens_per_s_per_accelerator),
                seconds(of.time_to_train_s),
                seconds(of.official_time_to_train_s),
                series.baseline_accelerators.to_string(),
                scaling(point.scaling).to_owned(),
                number(point.throughput_efficiency),
                number(point.time_to_train_efficiency),
                seconds(point.simulated.as_ref().map(|it| it.step_time_s)),
                number(point.simulated_efficiency),
            ])?;
        }
    }
    Ok(String::from_utf8(writer.into_inner()?)?)
}

fn timing(timing: Timing) -> &'static str {
    match timing {
        Timing::Steps => "steps",
        Timing::Evaluations => "evaluations",
        Timing::AtMost => "at_most",
    }
}
