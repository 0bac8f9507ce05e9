//! Errors: of one row, and of many by what they have in common.

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::Result;
use serde::Serialize;

use super::choice::{self, Choice};
use super::predict::{Inexpressible, Prediction};
use super::row::{Row, Set};

/// The errors that were recorded last.
const RECORDED: &str = include_str!("../../../../measured/accuracy.json");
/// How far a recorded error may be off for being written with few digits, in percent.
const ROUNDING: f64 = 0.01;

/// An error has grown.
#[derive(Debug, thiserror::Error)]
#[error("an error has grown: {}", .0.join("; "))]
pub struct Grown(Vec<String>);

/// A measured quantity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Quantity {
    /// Seconds of a step.
    StepTime,
    /// Model FLOPs utilization, percent; stands in where a source prints no time.
    Mfu,
}

/// A row and what became of it.
#[derive(Debug, Clone, Serialize)]
pub struct Answer {
    pub id: String,
    pub source: String,
    pub software: String,
    pub accelerator: String,
    pub accelerators: u32,
    pub set: Set,
    /// What the rows of one scaling curve have in common; rows of MLPerf alone are on one.
    pub series: Option<String>,
    /// What rows have in common that differ in their layout alone, and that layout.
    #[serde(skip)]
    pub job: String,
    #[serde(skip)]
    pub layout: String,
    /// Tokens of a step.
    pub tokens: Option<f64>,
    pub quantity: Option<Quantity>,
    pub measured: Option<f64>,
    pub predicted: Option<f64>,
    pub measured_memory_gib: Option<f64>,
    pub predicted_memory_gib: Option<f64>,
    /// Why there is no prediction.
    pub inexpressible: Option<Inexpressible>,
}

impl Answer {
    /// Compares the step time, or the MFU where there is none.
    pub fn new(row: &Row, prediction: &Result<Prediction, Inexpressible>) -> Self {
        let (job, layout) = choice::place(row);
        let mut answer = Self {
            id: row.id.clone(),
            source: source(&row.source),
            software: row.software.clone(),
            accelerator: row.accelerator.clone(),
            accelerators: row.accelerators,
            set: row.set,
            series: series(row),
            job,
            layout,
            tokens: row.tokens(),
            quantity: None,
            measured: None,
            predicted: None,
            measured_memory_gib: row.memory_gib,
            predicted_memory_gib: None,
            inexpressible: None,
        };
        match prediction {
            Err(reason) => answer.inexpressible = Some(reason.clone()),
            Ok(prediction) => answer.compare(row, prediction),
        }
        answer
    }

    fn compare(&mut self, row: &Row, prediction: &Prediction) {
        self.predicted_memory_gib = prediction.memory_gib.filter(|_| row.memory_gib.is_some());
        let compared = match (row.step_time_s, row.mfu_percent, prediction.mfu_percent) {
            (Some(time), _, _) => Some((Quantity::StepTime, time, prediction.step_time.0)),
            (None, Some(mfu), Some(predicted)) => Some((Quantity::Mfu, mfu, predicted)),
            _ => None,
        };
        match compared {
            None => self.inexpressible = Some(Inexpressible("nothing to compare with".to_owned())),
            Some((quantity, measured, predicted)) => {
                self.quantity = Some(quantity);
                self.measured = Some(measured);
                self.predicted = Some(predicted);
            }
        }
    }

    /// Tokens a second and accelerator, measured and predicted.
    fn rates(&self) -> Option<(f64, f64)> {
        let tokens = self.tokens? / f64::from(self.accelerators);
        let times =
            (self.quantity? == Quantity::StepTime).then_some((self.measured?, self.predicted?));
        times.map(|(measured, predicted)| (tokens / measured, tokens / predicted))
    }

    /// The same of memory.
    fn memory_error_percent(&self) -> Option<f64> {
        Some(100.0 * (self.predicted_memory_gib? / self.measured_memory_gib? - 1.0))
    }

    /// Predicted over measured, less one, in percent.
    pub fn error_percent(&self) -> Option<f64> {
        Some(100.0 * (self.predicted? / self.measured? - 1.0))
    }
}

/// A source without the path inside it.
fn source(text: &str) -> String {
    text.split(':').next().unwrap_or(text).to_owned()
}

/// What one submitter measured in one round of one model, on one kind of accelerator in one
/// precision, differs in size alone.
fn series(row: &Row) -> Option<String> {
    let (_, path) = row.source.rsplit_once(": ").filter(|_| row.software.starts_with("mlperf"))?;
    let submitter = path.split('/').next().unwrap_or_default();
    let name = |of: &Option<String>| of.clone().unwrap_or_default();
    let (model, precision) = (name(&row.model), name(&row.precision));
    Some(format!("{} {submitter} {model} {} {precision}", row.software, row.accelerator))
}

/// Scaling efficiency at one size: throughput per accelerator over that of the smallest size.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Scaling {
    pub series: String,
    pub baseline_accelerators: u32,
    pub accelerators: u32,
    pub measured_percent: f64,
    /// The same of the run that was slowest at this size and the one fastest at the smallest, and
    /// the other way round: what cannot be told from one run.
    pub measured_range_percent: (f64, f64),
    pub predicted_percent: f64,
}

/// The scaling curves that the rows lie on.
fn scaling(rows: &[Answer]) -> Vec<Scaling> {
    let mut curves: BTreeMap<&str, BTreeMap<u32, Vec<&Answer>>> = BTreeMap::new();
    for row in rows.iter().filter(|row| row.rates().is_some()) {
        if let Some(series) = &row.series {
            curves.entry(series).or_default().entry(row.accelerators).or_default().push(row);
        }
    }
    curves.into_iter().flat_map(|(series, sizes)| curve(series, &sizes)).collect()
}

fn curve(series: &str, sizes: &BTreeMap<u32, Vec<&Answer>>) -> Vec<Scaling> {
    let rates = |rows: &Vec<&Answer>| Rates::of(rows.iter().filter_map(|row| row.rates()));
    let Some((&smallest, first)) = sizes.first_key_value() else { return vec![] };
    let baseline = rates(first);
    let at = |(size, rows): (&u32, &Vec<&Answer>)| {
        let here = rates(rows);
        let share = |rate: f64, of: f64| 100.0 * rate / of;
        Scaling {
            series: series.to_owned(),
            baseline_accelerators: smallest,
            accelerators: *size,
            measured_percent: share(here.measured, baseline.measured),
            measured_range_percent: (
                share(here.slowest, baseline.fastest),
                share(here.fastest, baseline.slowest),
            ),
            predicted_percent: share(here.predicted, baseline.predicted),
        }
    };
    sizes.iter().skip(1).map(at).collect()
}

/// Tokens a second and accelerator of one size, over its runs.
struct Rates {
    /// The mean.
    measured: f64,
    slowest: f64,
    fastest: f64,
    /// The mean.
    predicted: f64,
}

impl Rates {
    /// Of runs' rates, measured and predicted.
    fn of(runs: impl Iterator<Item = (f64, f64)>) -> Self {
        let (measured, predicted): (Vec<f64>, Vec<f64>) = runs.unzip();
        Self {
            measured: mean(&measured),
            slowest: measured.iter().copied().fold(f64::INFINITY, f64::min),
            fastest: measured.iter().copied().fold(0.0, f64::max),
            predicted: mean(&predicted),
        }
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The spread of absolute errors, in percent.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    pub rows: usize,
    pub median: f64,
    pub mean: f64,
    pub ninetieth: f64,
    pub worst: f64,
    /// The mean with its sign: above 0 where predictions are too high.
    pub bias: f64,
}

impl Spread {
    fn of(errors: &[f64]) -> Self {
        let mut sizes: Vec<f64> = errors.iter().map(|error| error.abs()).collect();
        sizes.sort_by(f64::total_cmp);
        let at = |share: f64| sizes[((sizes.len() - 1) as f64 * share).round() as usize];
        Self {
            rows: sizes.len(),
            median: at(0.5),
            mean: mean(&sizes),
            ninetieth: at(0.9),
            worst: at(1.0),
            bias: mean(errors),
        }
    }
}

/// All answers and what they add up to.
#[derive(Debug, Serialize)]
pub struct Report {
    pub all: BTreeMap<String, Spread>,
    pub sources: BTreeMap<String, Spread>,
    pub software: BTreeMap<String, Spread>,
    /// Errors of memory by source.
    pub memory: BTreeMap<String, Spread>,
    /// Scaling efficiency along every curve of MLPerf.
    pub scaling: Vec<Scaling>,
    /// Layouts picked among those that were measured.
    pub choices: Vec<Choice>,
    /// How many rows cannot be predicted, by reason.
    pub inexpressible: BTreeMap<Inexpressible, usize>,
    pub rows: Vec<Answer>,
}

impl Report {
    pub fn new(rows: Vec<Answer>) -> Self {
        let mut inexpressible = BTreeMap::new();
        for reason in rows.iter().filter_map(|row| row.inexpressible.clone()) {
            *inexpressible.entry(reason).or_default() += 1;
        }
        let set = |row: &Answer| match row.set {
            Set::Fit => "fitted on".to_owned(),
            Set::HeldOut => "held out".to_owned(),
        };
        let time = Answer::error_percent;
        let mut all = spreads(&rows, time, set);
        all.extend(spreads(&rows, time, |_| "all".to_owned()));
        Self {
            all,
            sources: spreads(&rows, time, |row| row.source.clone()),
            software: spreads(&rows, time, |row| {
                format!("{} on {}", row.software, row.accelerator)
            }),
            memory: spreads(&rows, Answer::memory_error_percent, |row| row.source.clone()),
            scaling: scaling(&rows),
            choices: choice::choices(&rows),
            inexpressible,
            rows,
        }
    }

    /// The mean error of every source, as recorded.
    fn means(&self) -> BTreeMap<String, f64> {
        let of = |what: &str, spreads: &BTreeMap<String, Spread>| -> Vec<(String, f64)> {
            spreads.iter().map(|(key, of)| (format!("{what}, {key}"), of.mean)).collect()
        };
        let step_time =
            of("step time", &self.sources).into_iter().chain(of("step time", &self.all));
        let others = of("memory", &self.memory).into_iter().chain(choice::means(&self.choices));
        step_time.chain(others).collect()
    }

    /// The errors in the form they are recorded in.
    pub fn accuracy(&self) -> Result<String> {
        let rounded = |mean: f64| (mean * 1000.0).round() / 1000.0;
        let means: BTreeMap<_, _> =
            self.means().into_iter().map(|(key, mean)| (key, rounded(mean))).collect();
        Ok(serde_json::to_string_pretty(&means)? + "\n")
    }

    /// Refuses an error that has grown since it was recorded.
    pub fn hold(&self) -> Result<()> {
        let recorded: BTreeMap<String, f64> = serde_json::from_str(RECORDED)?;
        let grown: Vec<String> = self
            .means()
            .into_iter()
            .filter_map(|(key, mean)| {
                let before = recorded.get(&key).copied().unwrap_or(0.0);
                let line = format!("{key}: {before:.2} % before, {mean:.2} % now");
                (mean > before + ROUNDING).then_some(line)
            })
            .collect();
        if grown.is_empty() { Ok(()) } else { Err(Grown(grown).into()) }
    }

    /// Tables for a terminal.
    pub fn text(&self, each: bool) -> String {
        let mut text = String::new();
        if each {
            self.each(&mut text);
            text += &choice::each(&self.choices);
        }
        for (title, spreads) in [
            ("step time by source", &self.sources),
            ("by software", &self.software),
            ("of all rows", &self.all),
            ("peak memory by source", &self.memory),
        ] {
            table(&mut text, title, spreads);
        }
        self.curves(&mut text);
        text += &choice::text(&self.choices);
        if !self.inexpressible.is_empty() {
            text += "cannot be expressed\n";
        }
        for (reason, rows) in &self.inexpressible {
            writeln!(text, "{rows:>5}  {}", reason.0).expect("a string takes text");
        }
        text
    }

    fn curves(&self, text: &mut String) {
        if self.scaling.is_empty() {
            return;
        }
        let title = "scaling efficiency (throughput per accelerator)";
        let [from, to, measured, predicted] = ["from", "to", "measured", "predicted"];
        writeln!(text, "{title:<60}{from:>9}{to:>9}{measured:>9}{predicted:>10}   from run to run")
            .expect("a string takes text");
        for of in &self.scaling {
            let Scaling { series, baseline_accelerators, accelerators, .. } = of;
            let (lowest, highest) = of.measured_range_percent;
            let runs = if lowest < highest {
                format!("   {lowest:.1} to {highest:.1}")
            } else {
                String::new()
            };
            writeln!(
                text,
                "{series:<60}{baseline_accelerators:>9}{accelerators:>9}{:>8.1}%{:>8.1}%{:>+8.1}{runs}",
                of.measured_percent,
                of.predicted_percent,
                of.predicted_percent - of.measured_percent
            )
            .expect("a string takes text");
        }
        text.push('\n');
    }

    fn each(&self, text: &mut String) {
        for row in &self.rows {
            let (Some(error), Some(measured)) = (row.error_percent(), row.measured) else {
                continue;
            };
            writeln!(text, "{:<72}{measured:>10.3}{error:>+8.1} %", row.id)
                .expect("a string takes text");
        }
        text.push('\n');
    }
}

fn spreads(
    rows: &[Answer],
    error: impl Fn(&Answer) -> Option<f64>,
    key: impl Fn(&Answer) -> String,
) -> BTreeMap<String, Spread> {
    let mut errors: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for row in rows {
        if let Some(error) = error(row) {
            errors.entry(key(row)).or_default().push(error);
        }
    }
    errors.into_iter().map(|(key, errors)| (key, Spread::of(&errors))).collect()
}

fn table(text: &mut String, title: &str, spreads: &BTreeMap<String, Spread>) {
    let columns = ["rows", "median", "mean", "90th", "worst", "bias"];
    let head: String = columns.iter().map(|column| format!("{column:>9}")).collect();
    writeln!(text, "{title:<52}{head}").expect("a string takes text");
    for (key, of) in spreads {
        let Spread { rows, median, mean, ninetieth, worst, bias } = of;
        writeln!(
            text,
            "{key:<52}{rows:>9}{median:>8.2}%{mean:>8.2}%{ninetieth:>8.2}%{worst:>8.1}%{bias:>+8.2}%"
        )
        .expect("a string takes text");
    }
    text.push('\n');
}
