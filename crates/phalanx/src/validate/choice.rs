//! Choosing a layout by prediction: how far what is picked lies behind the best that was measured.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Serialize;

use super::row::Row;
use super::score::{Answer, Quantity};

/// Layouts of the same model, size, batch and software, all measured: fewer are no choice.
const FEWEST: usize = 2;
/// From this many on it is a sweep.
const SWEEP: usize = 4;

/// A pick among measured layouts.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Choice {
    pub source: String,
    /// What the layouts have in common.
    pub job: String,
    pub layouts: usize,
    /// The layout that is predicted to be the fastest, and the one that was measured to be.
    pub picked: String,
    pub fastest: String,
    /// How much longer the pick took than the fastest, as measured.
    pub behind_percent: f64,
}

/// What the rows of one choice have in common, and what sets each apart.
pub fn place(row: &Row) -> (String, String) {
    let job = format!(
        "{} {:?} {:?}x{:?} {} x {} {} {:?} x {:?} {:?}",
        row.software,
        row.model,
        row.layers,
        row.hidden,
        row.accelerator,
        row.accelerators,
        row.fabric,
        row.global_batch,
        row.sequence,
        row.precision
    );
    let number = |degree: Option<u32>| degree.unwrap_or(1);
    let layout = format!(
        "tensor {} context {} pipeline {} stages {} expert {} micro_batch {} shard {} recompute {} {}",
        number(row.tensor),
        number(row.context),
        number(row.pipeline),
        number(row.virtual_stages),
        number(row.expert),
        row.micro_batch.unwrap_or(1),
        row.shard.as_deref().unwrap_or_default(),
        row.recompute.as_deref().unwrap_or_default(),
        row.options
    );
    let word = |text: String| text.replace("Some(", "").replace([')', '"'], "");
    (word(job), word(layout).trim_end().to_owned())
}

/// Times of each layout of a job, measured and predicted.
type Layouts<'a> = BTreeMap<&'a str, Vec<(f64, f64)>>;

/// The picks among all rows with a prediction.
pub fn choices(rows: &[Answer]) -> Vec<Choice> {
    let mut jobs: BTreeMap<(&str, &str), Layouts<'_>> = BTreeMap::new();
    for row in rows {
        let (Some(measured), Some(predicted), Some(quantity)) =
            (row.measured, row.predicted, row.quantity)
        else {
            continue;
        };
        // As times: utilization is the other way round.
        let time = |value: f64| if quantity == Quantity::Mfu { 1.0 / value } else { value };
        let job = jobs.entry((&row.source, &row.job)).or_default();
        job.entry(&row.layout).or_default().push((time(measured), time(predicted)));
    }
    let several = jobs.into_iter().filter(|(_, layouts)| layouts.len() >= FEWEST);
    several.map(|((source, job), layouts)| choice(source, job, &layouts)).collect()
}

/// Repeats of a layout count as their mean.
fn choice(source: &str, job: &str, layouts: &Layouts<'_>) -> Choice {
    let mean = |of: fn(&(f64, f64)) -> f64, times: &[(f64, f64)]| {
        times.iter().map(of).sum::<f64>() / times.len() as f64
    };
    let means = layouts
        .iter()
        .map(|(layout, times)| (*layout, mean(|time| time.0, times), mean(|time| time.1, times)));
    let means: Vec<(&str, f64, f64)> = means.collect();
    let least = |of: fn(&(&str, f64, f64)) -> f64| {
        means.iter().min_by(|a, b| of(a).total_cmp(&of(b))).expect("there are several layouts")
    };
    let (fastest, picked) = (least(|mean| mean.1), least(|mean| mean.2));
    Choice {
        source: source.to_owned(),
        job: job.to_owned(),
        layouts: layouts.len(),
        picked: picked.0.to_owned(),
        fastest: fastest.0.to_owned(),
        behind_percent: 100.0 * (picked.1 / fastest.1 - 1.0),
    }
}

/// By source, how far picks lie behind; and of all sweeps, which have four layouts and more.
fn by_source(choices: &[Choice]) -> BTreeMap<String, Vec<&Choice>> {
    let mut sources: BTreeMap<String, Vec<&Choice>> = BTreeMap::new();
    for choice in choices {
        sources.entry(choice.source.clone()).or_default().push(choice);
        if choice.layouts >= SWEEP {
            sources.entry(format!("all of {SWEEP} layouts or more")).or_default().push(choice);
        }
    }
    sources
}

/// The mean by source, as recorded.
pub fn means(choices: &[Choice]) -> impl Iterator<Item = (String, f64)> {
    let mean = |(source, of): (String, Vec<&Choice>)| {
        let sum: f64 = of.iter().map(|choice| choice.behind_percent).sum();
        (format!("choice, {source}"), sum / of.len() as f64)
    };
    by_source(choices).into_iter().map(mean)
}

/// A table for a terminal, and the picks that were not the fastest.
pub fn text(choices: &[Choice]) -> String {
    if choices.is_empty() {
        return String::new();
    }
    let title = "time of the layout picked, over the best measured";
    let mut text =
        format!("{title:<52}{:>9}{:>9}{:>9}{:>9}\n", "choices", "layouts", "mean", "worst");
    for (source, of) in by_source(choices) {
        let behind = || of.iter().map(|choice| choice.behind_percent);
        let mean = behind().sum::<f64>() / of.len() as f64;
        let worst = behind().fold(0.0, f64::max);
        let layouts: usize = of.iter().map(|choice| choice.layouts).sum();
        writeln!(text, "{source:<52}{:>9}{layouts:>9}{mean:>+8.2}%{worst:>+8.1}%", of.len())
            .expect("a string takes text");
    }
    text.push('\n');
    text
}

/// Every pick that was not the fastest.
pub fn each(choices: &[Choice]) -> String {
    let missed = choices.iter().filter(|choice| choice.behind_percent > 0.0);
    let line = |Choice { job, layouts, picked, fastest, behind_percent, .. }: &Choice| {
        format!(
            "{behind_percent:+.1} % of {layouts}: {job}\n  picked   {picked}\n  fastest  {fastest}\n"
        )
    };
    missed.map(line).collect()
}
