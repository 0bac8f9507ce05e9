//! A scaling curve in a terminal, and as comma-separated values.

use std::fmt::Write;

use anyhow::Result;
use units::Seconds;

use super::Report;
use super::curve::{Curve, Point};
use super::goodput::{Improvement, RUNS};
use super::islands::Comparison;
use crate::job::Job;
use crate::output::{bar, columns, percent, thousands};

/// All of it as text.
pub fn text(job: &Job, report: &Report) -> String {
    let mut text = format!("{}\n", conditions(job, report));
    for (index, curve) in report.curves.iter().enumerate() {
        let _ = writeln!(text, "\n{}: {}\n", curve.alternative, curve.machine);
        if index > 0 && alike(curve, &report.curves[0]) {
            let _ = writeln!(text, "{ALIKE}");
            continue;
        }
        text += &columns(&rows(curve));
        text.push('\n');
        text += &plot(curve);
        text += &knees(curve);
        for one in &curve.impossible {
            let _ = writeln!(
                text,
                "{} accelerators: {}",
                thousands(one.accelerators.into()),
                one.reason
            );
        }
    }
    text += &goodput(job, report);
    text += &improvements(&report.improvements);
    if let Some(islands) = &report.islands {
        text += &protocols(islands);
    }
    text
}

/// What is compared, in a sentence.
pub fn conditions(job: &Job, report: &Report) -> String {
    let batch = job.training.global_batch;
    let sequence = thousands(job.training.sequence);
    let scaling = match report.batch {
        "grows" => format!(
            "weak scaling (the batch grows, {} sequences at {} accelerators)",
            thousands(batch),
            thousands(job.cluster.accelerators.into())
        ),
        "given" => "the batch is given for each size".to_owned(),
        _ => format!("strong scaling ({} sequences at every size)", thousands(batch)),
    };
    let over = report.baseline_accelerators.map_or(String::new(), |size| {
        format!(
            "; efficiency is throughput of an accelerator over that at {}",
            thousands(size.into())
        )
    });
    let mut text = format!("{scaling}, sequences of {sequence} tokens{over}");
    if let Some(tokens) = report.tokens_to_train {
        let _ = write!(text, "; {tokens:.3e} tokens to train");
        text += match job.scale.critical_batch_tokens {
            Some(_) => ", more where the batch is larger, as the critical batch says",
            None if report.batch != "fixed" => {
                ", as many at every batch: above its critical batch a model needs more, which is not in these figures"
            }
            None => "",
        };
    }
    text
}

/// A long time in the unit that suits it.
pub fn long(time: Seconds) -> String {
    let units = [(86_400.0, "d"), (3600.0, "h"), (60.0, "min")];
    let unit = units.into_iter().find(|(unit, _)| time.0 >= 2.0 * unit);
    unit.map_or_else(|| time.to_string(), |(unit, name)| format!("{:.1} {name}", time.0 / unit))
}

/// The head and a row for each point. Columns of which nothing is known are left out.
pub fn rows(curve: &Curve) -> Vec<Vec<String>> {
    type Cell = fn(&Point) -> Option<String>;
    let head: [(&str, Cell); 14] = [
        ("accelerators", |point| Some(thousands(point.accelerators.into()))),
        ("batch", |point| Some(thousands(point.global_batch))),
        ("step", |point| Some(point.step_time_s.to_string())),
        ("tokens/s each", |point| Some(format!("{:.1}", point.tokens_per_s_per_accelerator))),
        ("efficiency", |point| Some(percent(point.scaling_efficiency))),
        ("MFU", |point| point.model_flops_utilization.map(percent)),
        ("exposed", |point| Some(percent(point.exposed_share))),
        ("network", |point| Some(percent(point.network_share))),
        ("bound by", |point| Some(point.bound_in_words.clone())),
        ("memory", |point| Some(held(point))),
        ("facility", |point| point.power_w.map(|power| format!("{:.2} MW", power.0 / 1e6))),
        ("a token", |point| point.energy_j_per_token.map(|energy| format!("{energy:.3}"))),
        ("to train", |point| point.time_to_train_s.map(long)),
        ("cost", |point| point.usd_to_train.map(|usd| format!("{:.2} M$", usd / 1e6))),
    ];
    let known: Vec<&(&str, Cell)> = head
        .iter()
        .filter(|(_, cell)| curve.points.iter().any(|point| cell(point).is_some()))
        .collect();
    let mut rows = vec![known.iter().map(|(name, _)| (*name).to_owned()).collect::<Vec<_>>()];
    for point in &curve.points {
        rows.push(known.iter().map(|(_, cell)| cell(point).unwrap_or_default()).collect());
    }
    rows
}

fn held(point: &Point) -> String {
    let fits = if point.fits { "" } else { ", too much" };
    format!("{}{fits}", point.memory_bytes_peak)
}

/// Efficiency by size, as bars.
pub fn plot(curve: &Curve) -> String {
    let line = |point: &Point| {
        let (size, share) = (thousands(point.accelerators.into()), point.scaling_efficiency);
        format!("  {size:>9} {} {}\n", bar(share, "█"), percent(share))
    };
    curve.points.iter().map(line).collect()
}

/// Where efficiency passes its marks.
pub fn knees(curve: &Curve) -> String {
    let Some(last) = curve.points.last() else { return String::new() };
    let size = |size: f64| thousands(size.round() as u64);
    let passed = |(percent, at): (&u32, &Option<f64>)| {
        Some(format!("{percent} % at about {}", size((*at)?)))
    };
    let passed: Vec<String> = curve.knee_accelerators.iter().rev().filter_map(passed).collect();
    let stays = curve.knee_accelerators.iter().rev().find(|(_, at)| at.is_none());
    let stays = stays.map(|(percent, _)| {
        format!("stays above {percent} % up to {}", size(last.accelerators.into()))
    });
    match (passed.is_empty(), stays) {
        (true, stays) => format!("efficiency {}\n", stays.unwrap_or_default()),
        (false, stays) => {
            let stays = stays.map_or(String::new(), |stays| format!(", and {stays}"));
            format!("efficiency passes {} (interpolated between sizes){stays}\n", passed.join(", "))
        }
    }
}

/// Whether a curve's steps take as long as those of another, to a tenth of a percent.
pub fn alike(curve: &Curve, other: &Curve) -> bool {
    let pairs = curve.points.iter().zip(&other.points);
    curve.points.len() == other.points.len()
        && pairs.clone().count() > 0
        && pairs.into_iter().all(|(a, b)| (a.step_time_s / b.step_time_s - 1.0).abs() < 1e-3)
}

/// What is said of such a curve.
pub const ALIKE: &str =
    "no step differs from that of the job as described by more than a thousandth";

/// How much of the training is training.
fn goodput(job: &Job, report: &Report) -> String {
    let rows = goodput_rows(report);
    if rows.len() < 2 {
        return String::new();
    }
    format!("\ngoodput: {}\n\n{}", answers(job), columns(&rows))
}

/// The head and a row for each size of the job as described.
pub fn goodput_rows(report: &Report) -> Vec<Vec<String>> {
    let names = [
        "accelerators",
        "fails every",
        "failures",
        "checkpoint every",
        "training",
        "redone",
        "stalled",
        "down",
        "days to train",
    ];
    let mut rows = vec![names.map(str::to_owned).to_vec()];
    for point in report.curves.first().iter().flat_map(|curve| &curve.points) {
        let Some(goodput) = &point.goodput else { continue };
        let shares = &goodput.shares;
        let [worst, median, best] = goodput.effective_quantiles.map(|share| 100.0 * share);
        let [least, middle, most] = goodput.days_quantiles;
        rows.push(vec![
            thousands(point.accelerators.into()),
            long(goodput.seconds_between_failures),
            thousands(goodput.failures),
            long(goodput.checkpoint_every_s),
            format!("{median:.1} % ({worst:.1} to {best:.1})"),
            percent(shares.redone),
            percent(shares.stalled),
            percent(shares.detecting + shares.restarting + shares.waiting),
            format!("{middle:.1} ({least:.1} to {most:.1})"),
        ]);
    }
    rows
}

/// How failures are answered, in words.
pub fn answers(job: &Job) -> String {
    let section = &job.goodput;
    let rate = section.rate();
    let from = match section.failures_per_1000_node_days {
        Some(_) => "as given".to_owned(),
        None => format!("as counted by {}", section.failures),
    };
    let memory = section
        .memory_every_s
        .map_or(String::new(), |every| format!(", copies in memory every {every}"));
    let spares = section.spare_nodes.map_or(", a spare node always at hand".to_owned(), |nodes| {
        format!(", {nodes} spare nodes and {} for a repair", long(section.repair_s))
    });
    format!(
        "{rate} failures in 1,000 node-days ({from}), {} until noticed, {} and what reading the state takes until trained again, checkpoints that stall for {}{memory}{spares}; medians of {RUNS} played runs, with 5 and 95 % quantiles",
        long(section.detect_s),
        long(section.restart_s),
        section.checkpoint_stall_s
    )
}

/// What would help.
fn improvements(of: &[Improvement]) -> String {
    let rows = improvement_rows(of);
    if of.is_empty() {
        return String::new();
    }
    format!("\nwhat would help, at the largest size:\n\n{}", columns(&rows))
}

/// The head and a row for each improvement.
pub fn improvement_rows(of: &[Improvement]) -> Vec<Vec<String>> {
    let mut rows = vec![["change", "training", "days saved"].map(str::to_owned).to_vec()];
    rows.extend(of.iter().map(|one| {
        vec![
            one.change.to_owned(),
            percent(one.effective_expected),
            format!("{:.2}", one.days_saved),
        ]
    }));
    rows
}

fn protocols(of: &Comparison) -> String {
    format!("\n{}\n\n{}", of.describe(), columns(&of.rows()))
}

/// Every point of every curve, a row each.
pub fn csv(report: &Report) -> Result<Vec<u8>> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record([
        "alternative",
        "accelerators",
        "global_batch",
        "step_time_s",
        "tokens_per_s_per_accelerator",
        "scaling_efficiency",
        "model_flops_utilization",
        "exposed_share",
        "network_share",
        "latency_s",
        "bound",
        "memory_bytes_peak",
        "fits",
        "power_w",
        "energy_j_per_token",
        "time_to_train_s",
        "time_to_train_efficiency",
        "usd_to_train",
        "effective_share",
    ])?;
    let number = |value: Option<f64>| value.map_or(String::new(), |value| value.to_string());
    for curve in &report.curves {
        for point in &curve.points {
            writer.write_record([
                curve.alternative.clone(),
                point.accelerators.to_string(),
                point.global_batch.to_string(),
                point.step_time_s.0.to_string(),
                point.tokens_per_s_per_accelerator.to_string(),
                point.scaling_efficiency.to_string(),
                number(point.model_flops_utilization),
                point.exposed_share.to_string(),
                point.network_share.to_string(),
                point.latency_s.0.to_string(),
                point.bound.to_string(),
                point.memory_bytes_peak.0.to_string(),
                point.fits.to_string(),
                number(point.power_w.map(|power| power.0)),
                number(point.energy_j_per_token.map(|energy| energy.0)),
                number(point.time_to_train_s.map(|time| time.0)),
                number(point.time_to_train_efficiency),
                number(point.usd_to_train),
                number(point.goodput.as_ref().map(|goodput| goodput.effective_quantiles[1])),
            ])?;
        }
    }
    Ok(writer.into_inner()?)
}
