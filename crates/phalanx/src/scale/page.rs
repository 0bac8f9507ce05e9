//! A scenario's page: what is claimed, what is on record, and what is predicted, in Markdown.

use std::fmt::Write;

use anyhow::{Context, Result, bail};

use super::Report;
use super::curve::{Curve, Point};
use super::section::{Figure, Predicted, Quantity, Scenario};
use super::table;
use crate::job::Job;
use crate::output::percent;
use crate::validate::measured_step;

/// The page of a job that is a scenario.
pub fn page(job: &Job, report: &Report) -> Result<String> {
    let Some(scenario) = &job.scenario else {
        bail!("{}: a page needs a [scenario] with title, claim and verdict", job.name)
    };
    let mut page = head(job, scenario);
    if !scenario.figure.is_empty() {
        page += "## Claimed, recorded, predicted\n\n";
        page += &figures(scenario, report)?;
    }
    if !scenario.measured.is_empty() {
        page += "## Measured steps\n\n";
        page += &measured(scenario, report)?;
    }
    let _ = write!(page, "## Prediction\n\n{}.\n\n", capital(&table::conditions(job, report)));
    for (index, curve) in report.curves.iter().enumerate() {
        page += &section(curve, index > 0 && table::alike(curve, &report.curves[0]));
    }
    if scenario.goodput {
        let _ = write!(page, "## A whole training\n\n{}.\n\n", capital(&table::answers(job)));
        page += &markdown(&table::goodput_rows(report));
        page += "What would help, at the largest size, by the closed form:\n\n";
        page += &markdown(&table::improvement_rows(&report.improvements));
    }
    if let Some(islands) = &report.islands {
        let _ = write!(page, "## Synchronization\n\n{}.\n\n", capital(&islands.describe()));
        page += &markdown(&islands.rows());
    }
    if !scenario.notes.is_empty() {
        page += "## Notes\n\n";
        scenario.notes.iter().for_each(|note| {
            let _ = writeln!(page, "- {note}");
        });
    }
    Ok(format!("{}\n", page.trim_end()))
}

fn head(job: &Job, scenario: &Scenario) -> String {
    let Scenario { title, claim, verdict, .. } = scenario;
    let name = &job.name;
    format!(
        "# {title}\n\n**Claim.** {claim}\n\n**Verdict.** {verdict}\n\n\
         This page is made by `phalanx scale {name}.toml --page`; {name}.toml is the job.\n\n"
    )
}

/// Columns: what, claimed, recorded, predicted, the differences, the record's source.
fn figures(scenario: &Scenario, report: &Report) -> Result<String> {
    let names = ["figure", "claimed", "recorded", "predicted", "in short", "record"];
    let mut rows = vec![names.map(str::to_owned).to_vec()];
    for figure in &scenario.figure {
        let predicted = figure.predicted.as_ref().map(|wanted| find(wanted, report)).transpose();
        let predicted = predicted.with_context(|| format!("[scenario] figure {}", figure.what))?;
        let shown = |value: Option<f64>| value.map_or("-".to_owned(), round);
        rows.push(vec![
            figure.what.clone(),
            shown(figure.claimed),
            shown(figure.recorded),
            shown(predicted),
            in_short(figure, predicted),
            figure.source.clone(),
        ]);
    }
    Ok(markdown(&rows))
}

/// Three digits, more where there are more before the point.
fn round(value: f64) -> String {
    match value.abs() {
        size if size >= 1000.0 => crate::output::thousands(value.round() as u64),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// How far apart they are.
fn in_short(figure: &Figure, predicted: Option<f64>) -> String {
    let off = |value: f64, from: f64| format!("{:+.1} %", 100.0 * (value / from - 1.0));
    let mut words = Vec::new();
    match (figure.claimed, figure.recorded) {
        (Some(claimed), Some(recorded)) => {
            words.push(format!("record {} of claim", off(recorded, claimed)));
        }
        (Some(_), None) => words.push("no record".to_owned()),
        _ => {}
    }
    match (predicted, figure.recorded, figure.claimed) {
        (Some(predicted), Some(recorded), _) => {
            words.push(format!("prediction {} of record", off(predicted, recorded)));
        }
        (Some(predicted), None, Some(claimed)) => {
            words.push(format!("prediction {} of claim", off(predicted, claimed)));
        }
        _ => {}
    }
    words.join(", ")
}

/// A figure of the results.
fn find(wanted: &Predicted, report: &Report) -> Result<f64> {
    let curve = match &wanted.alternative {
        None => report.curves.first(),
        Some(name) => report.curves.iter().find(|curve| curve.alternative == *name),
    };
    let curve =
        curve.with_context(|| format!("there is no alternative {:?}", wanted.alternative))?;
    let known = |percent: u32| curve.knee_accelerators.get(&percent).copied().flatten();
    match wanted.figure {
        Quantity::Knee90 => return known(90).context("efficiency does not pass 90 %"),
        Quantity::Knee80 => return known(80).context("efficiency does not pass 80 %"),
        _ => {}
    }
    let at = |size: Option<u32>| {
        let is = |point: &&Point| size.is_none_or(|size| point.accelerators == size);
        curve.points.iter().rev().find(is).with_context(|| {
            let why = curve.impossible.first().map_or("", |one| &one.reason);
            format!("{size:?} accelerators are not among the points; {why}")
        })
    };
    let point = at(wanted.accelerators)?;
    let base = wanted.over.map(|size| at(Some(size))).transpose()?;
    let value = match wanted.figure {
        Quantity::Efficiency => {
            let base = base.map_or(1.0, |base| base.scaling_efficiency);
            Some(100.0 * point.scaling_efficiency / base)
        }
        Quantity::TimeToTrainEfficiency => {
            point.time_to_train_efficiency.map(|share| 100.0 * share)
        }
        Quantity::StepTime => Some(point.step_time_s.0),
        Quantity::ExposedShare => Some(100.0 * point.exposed_share),
        Quantity::NetworkShare => Some(100.0 * point.network_share),
        Quantity::Mfu => point.model_flops_utilization.map(|share| 100.0 * share),
        Quantity::EffectiveTime => {
            point.goodput.as_ref().map(|goodput| 100.0 * goodput.effective_quantiles[1])
        }
        Quantity::HoursBetweenFailures => {
            point.goodput.as_ref().map(|goodput| goodput.seconds_between_failures.0 / 3600.0)
        }
        Quantity::Megawatts => point.power_w.map(|power| power.0 / 1e6),
        Quantity::Knee90 | Quantity::Knee80 => None,
    };
    value.context(
        "the job does not give what it takes: [training] tokens, or an accelerator's power",
    )
}

/// Published steps beside predicted ones of the same size.
fn measured(scenario: &Scenario, report: &Report) -> Result<String> {
    let names = [
        "accelerators",
        "measured",
        "predicted",
        "error",
        "efficiency measured",
        "predicted",
        "source",
    ];
    let mut rows = vec![names.map(str::to_owned).to_vec()];
    let points = report.curves.first().map(|curve| &curve.points[..]).unwrap_or_default();
    let mut base = None;
    for id in &scenario.measured {
        let row = measured_step(id)?;
        let Some(point) = points.iter().find(|point| {
            point.accelerators == row.accelerators && Some(point.global_batch) == row.global_batch
        }) else {
            bail!("[scenario] measured: {id} has no point of its size and batch");
        };
        let seconds = row.step_time_s.with_context(|| format!("{id} has no step time"))?;
        let each = point.global_batch as f64 / seconds / f64::from(point.accelerators);
        let (own, predicted) = *base.get_or_insert((each, point.scaling_efficiency));
        rows.push(vec![
            crate::output::thousands(row.accelerators.into()),
            format!("{seconds:.3} s"),
            format!("{:.3} s", point.step_time_s.0),
            format!("{:+.1} %", 100.0 * (point.step_time_s.0 / seconds - 1.0)),
            percent(each / own),
            percent(point.scaling_efficiency / predicted),
            format!("{}, {}", row.source, row.table),
        ]);
    }
    Ok(markdown(&rows))
}

fn section(curve: &Curve, alike: bool) -> String {
    let mut text = format!("### {}\n\n{}.\n\n", capital(&curve.alternative), curve.machine);
    if alike {
        return format!("{text}{}.\n\n", capital(table::ALIKE));
    }
    if !curve.points.is_empty() {
        text += &markdown(&table::rows(curve));
        let _ = write!(
            text,
            "```text\n{}```\n\n{}\n",
            table::plot(curve),
            capital(&table::knees(curve))
        );
    }
    for one in &curve.impossible {
        let _ = writeln!(text, "- {} accelerators: {}", one.accelerators, one.reason);
    }
    if !curve.impossible.is_empty() {
        text.push('\n');
    }
    text
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or(String::new(), |first| first.to_uppercase().chain(letters).collect())
}

/// Rows of cells, the first of which is the head.
fn markdown(rows: &[Vec<String>]) -> String {
    let line = |row: &Vec<String>| format!("| {} |\n", row.join(" | "));
    let Some((head, rest)) = rows.split_first() else { return String::new() };
    let rule = format!("|{}\n", " --- |".repeat(head.len()));
    let rest: String = rest.iter().map(line).collect();
    format!("{}{rule}{rest}\n", line(head))
}
