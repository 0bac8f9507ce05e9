//! `phalanx validate`: recomputes published measurements and says how wrong it is.

mod choice;
mod layout;
mod memory;
mod predict;
mod row;
mod score;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use rayon::prelude::*;
use sim::device::Calibration;

pub use predict::predict;
use row::Set;
pub use row::{Row, rows};
pub use score::Grown;
use score::{Answer, Report};

/// What is validated, and how it is shown.
#[derive(Debug, Args)]
pub struct ValidateArgs {
    /// Rows of published steps, in the form of measured/steps.csv; the built-in ones unless given
    #[arg(long, value_name = "FILE")]
    rows: Option<PathBuf>,
    /// Calibrated parameters, in the form of measured/calibration.toml; of several files, each has
    /// its own report
    #[arg(long, value_name = "FILE")]
    calibration: Vec<PathBuf>,
    /// Only rows of this software; may be repeated
    #[arg(long)]
    software: Vec<String>,
    /// Only rows of this accelerator; may be repeated
    #[arg(long)]
    accelerator: Vec<String>,
    /// Only rows that were fitted on, or only those held out
    #[arg(long, value_name = "fit|held-out")]
    set: Option<String>,
    /// Write the errors to measured/accuracy.json: what they may not exceed from now on
    #[arg(long)]
    record: bool,
    /// Show every row
    #[arg(long)]
    each: bool,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// Prints the error by source, family and quantity; fails when an error has grown.
pub fn validate(args: &ValidateArgs) -> Result<()> {
    let files = args.calibrations()?;
    let rows = rows(args.rows.as_deref())?;
    let chosen: Vec<&Row> = rows.iter().filter(|row| args.chooses(row)).collect();
    let bar = ProgressBar::new(chosen.len() as u64).with_style(style()?);
    let predict = |row: &&Row| {
        let predictions = predict(row, &files);
        bar.inc(1);
        predictions.iter().map(|prediction| Answer::new(row, prediction)).collect()
    };
    let answers: Vec<Vec<Answer>> = chosen.par_iter().map(predict).collect();
    bar.finish_and_clear();
    let of_file = |file: usize| answers.iter().map(|each| each[file].clone()).collect();
    let reports: Vec<Report> = (0..files.len()).map(|file| Report::new(of_file(file))).collect();
    reports.iter().try_for_each(|report| args.show(report))
}

fn style() -> Result<ProgressStyle> {
    Ok(ProgressStyle::with_template("{bar:30} {pos}/{len} rows, {eta} left")?)
}

/// A built-in row, by its id.
pub fn measured_step(id: &str) -> Result<Row> {
    let rows = rows(None)?;
    let found = rows.into_iter().find(|row| row.id == id);
    found.with_context(|| format!("measured/steps.csv has no row {id}"))
}

/// Where errors are recorded, seen from the project's folder.
const ACCURACY: &str = "measured/accuracy.json";

impl ValidateArgs {
    /// The calibrations of each file, or the built-in ones.
    fn calibrations(&self) -> Result<Vec<Vec<Calibration>>> {
        let read = |path: &PathBuf| {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("cannot read {}", path.display()))?;
            Calibration::parse(&text).with_context(|| path.display().to_string())
        };
        if self.calibration.is_empty() {
            return Ok(vec![Calibration::built_in()]);
        }
        self.calibration.iter().map(read).collect()
    }

    fn show(&self, report: &Report) -> Result<()> {
        if self.record {
            std::fs::write(ACCURACY, report.accuracy()?)
                .with_context(|| format!("cannot write {ACCURACY}"))?;
        }
        if self.json {
            println!("{}", serde_json::to_string_pretty(report)?);
        } else {
            print!("{}", report.text(self.each));
        }
        if self.is_whole() && !self.record { report.hold() } else { Ok(()) }
    }

    /// Whether all built-in rows are predicted with the built-in parameters.
    fn is_whole(&self) -> bool {
        let chosen = self.rows.is_some() || !self.calibration.is_empty() || self.set.is_some();
        !chosen && self.software.is_empty() && self.accelerator.is_empty()
    }

    fn chooses(&self, row: &Row) -> bool {
        let any = |names: &[String], name: &String| names.is_empty() || names.contains(name);
        let set = match row.set {
            Set::Fit => "fit",
            Set::HeldOut => "held-out",
        };
        any(&self.software, &row.software)
            && any(&self.accelerator, &row.accelerator)
            && self.set.as_deref().is_none_or(|wanted| wanted == set)
    }
}
