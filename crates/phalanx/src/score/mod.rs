//! `phalanx score`: reads logs of MLPerf Training, and of runs of our own, and says what they show.

mod page;
mod results;
mod run;
mod scaling;
mod simulated;

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use rayon::prelude::*;
use serde_json::json;
use sim::device::Calibration;

use crate::mllog;
use crate::output::print_text;
use crate::validate::rows;

/// What is scored, and how it is shown.
#[derive(Debug, Args)]
pub struct ScoreArgs {
    /// Logs, or folders of them: result_*.txt as MLPerf publishes them, mllog.txt of our own runs
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// How many accelerators there were, where neither a description beside the results nor the log says it
    #[arg(long, value_name = "N")]
    accelerators: Option<u32>,
    /// Describe the systems, in the form of measured/steps.csv, to simulate them; the built-in rows unless given
    #[arg(long, value_name = "FILE")]
    rows: Option<PathBuf>,
    /// Write the results as comma-separated values
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// Prints step time, throughput, time to train and scaling efficiency of all results.
pub fn score(args: &ScoreArgs) -> Result<()> {
    let found = results::find(&args.paths, args.accelerators)?;
    if found.outcomes.is_empty() {
        if let Some(refused) = found.refused.first() {
            bail!("{}: {}", refused.file.display(), refused.reason);
        }
        bail!(
            "there is no log of MLPerf Training (result_*.txt, {}) in {:?}",
            mllog::FILE,
            args.paths
        );
    }
    let (rows, calibrations) = (rows(args.rows.as_deref())?, Calibration::built_in());
    let simulate = |outcome: results::Outcome| {
        let simulated = simulated::simulate(&outcome, &rows, &calibrations);
        (outcome, simulated)
    };
    let series = scaling::series(found.outcomes.into_par_iter().map(simulate).collect());
    if let Some(file) = &args.csv {
        std::fs::write(file, page::csv(&series)?)
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    if args.json {
        let object = json!({"series": series, "left_out": found.refused});
        return print_text(&(serde_json::to_string_pretty(&object)? + "\n"));
    }
    print_text(&page::text(&series, &found.refused))
}
