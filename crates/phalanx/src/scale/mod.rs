//! `phalanx scale`: a job at many sizes, beside alternatives, over a whole training.

mod curve;
pub mod goodput;
mod islands;
mod machine;
mod page;
pub mod section;
mod table;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde::Serialize;
use serde_json::Value;

use crate::JobArgs;
use crate::checkpointing::stop_on_signals;
use crate::job::{Draft, Job};
use crate::output::Progress;
use curve::Curve;
use goodput::Improvement;
use islands::Comparison;
use section::{BatchRule, Growth, Switch};
pub use table::long;

/// A signal asked to stop before all was done.
#[derive(Debug, thiserror::Error)]
#[error("stopped; what was done so far is shown")]
pub struct Stopped;

/// What is asked of a scaling curve; each option replaces a key of `[scale]` in the job file.
#[derive(Debug, Args)]
pub struct ScaleArgs {
    /// Sizes; powers of two up to the job's own unless given
    #[arg(long, value_name = "N,...", value_delimiter = ',')]
    accelerators: Vec<u32>,
    /// What becomes of the batch: fixed (strong scaling), grows (weak scaling), or sequences for each size
    #[arg(long, value_name = "fixed|grows|N,...", value_delimiter = ',')]
    batch: Vec<String>,
    /// The same on other fabrics
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    fabric: Vec<String>,
    /// The same on other accelerators
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    accelerator: Vec<String>,
    /// The same with reduction in the fabric's switches
    #[arg(long, value_name = "on,off", value_delimiter = ',')]
    sharp: Vec<Switch>,
    /// The same in scale-up domains of other sizes
    #[arg(long, value_name = "N,...", value_delimiter = ',')]
    per_domain: Vec<u32>,
    /// Write the points as comma-separated values
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Print Markdown: the page of a scenario
    #[arg(long, conflicts_with = "json")]
    page: bool,
}

/// All that is said of a job's future.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The job file's name without its ending.
    pub job: String,
    /// Tokens of the whole training, where the job gives them.
    pub tokens_to_train: Option<f64>,
    /// Whether the batch was "fixed", "grows" or is "given".
    pub batch: &'static str,
    /// Efficiencies are over this size.
    pub baseline_accelerators: Option<u32>,
    pub curves: Vec<Curve>,
    /// What the next improvement of how failures are answered would buy, at the largest size.
    pub improvements: Vec<Improvement>,
    pub islands: Option<Comparison>,
    /// Whether it was stopped before all was done.
    pub interrupted: bool,
}

/// Prints how a job scales.
pub fn scale(args: &JobArgs, options: &ScaleArgs) -> Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    let draft = draft(args, options)?;
    stop_on_signals(&stop)?;
    let report = Report::new(&draft, threads(), &stop, args.json || options.page)?;
    let job = draft.job();
    if let Some(path) = &options.csv {
        std::fs::write(path, table::csv(&report)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else if options.page {
        print!("{}", page::page(job, &report)?);
    } else {
        print!("{}", table::text(job, &report));
    }
    ensure!(!report.interrupted, Stopped);
    Ok(())
}

/// The object of `--json`.
pub fn answer(args: &JobArgs, options: &ScaleArgs, stop: &AtomicBool) -> Result<Value> {
    let report = Report::new(&draft(args, options)?, threads(), stop, true)?;
    ensure!(!report.interrupted, Stopped);
    Ok(serde_json::to_value(&report)?)
}

/// The job with what is asked of it.
fn draft(args: &JobArgs, options: &ScaleArgs) -> Result<Draft> {
    let mut draft = args.draft()?;
    options.apply(draft.job_mut())?;
    draft.job().cluster.require_described()?;
    Ok(draft)
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

impl ScaleArgs {
    fn apply(&self, job: &mut Job) -> Result<()> {
        let replace = |own: &mut Vec<String>, given: &[String]| {
            if !given.is_empty() {
                *own = given.to_vec();
            }
        };
        let numbers = |own: &mut Vec<u32>, given: &[u32]| {
            if !given.is_empty() {
                *own = given.to_vec();
            }
        };
        let scale = &mut job.scale;
        if !self.accelerators.is_empty() && matches!(scale.batch, BatchRule::Given(_)) {
            scale.batch = BatchRule::Unsaid;
        }
        numbers(&mut scale.accelerators, &self.accelerators);
        numbers(&mut scale.per_domain, &self.per_domain);
        replace(&mut scale.fabric, &self.fabric);
        replace(&mut scale.accelerator, &self.accelerator);
        if !self.sharp.is_empty() {
            scale.sharp.clone_from(&self.sharp);
        }
        let words: Vec<&str> = self.batch.iter().map(String::as_str).collect();
        scale.batch = match words[..] {
            [] => return Ok(()),
            ["fixed"] => BatchRule::Kept(Growth::Fixed),
            ["grows"] => BatchRule::Kept(Growth::Grows),
            _ => {
                let parsed = words.iter().map(|word| word.parse()).collect::<Result<_, _>>();
                BatchRule::Given(parsed.context("--batch takes fixed, grows, or whole numbers")?)
            }
        };
        Ok(())
    }
}

impl Report {
    /// Simulates all that the job asks for, until `stop`.
    fn new(draft: &Draft, threads: usize, stop: &AtomicBool, quiet: bool) -> Result<Self> {
        let job = draft.job();
        let (alternatives, sizes) = (curve::alternatives(draft)?, curve::sizes(draft)?);
        let count = alternatives.len() * sizes.len();
        let bar = Progress::when_watched("scale", count as u64, quiet);
        let done =
            |done: usize| bar.update(done as u64, &format!("{done} of {count} points"), None);
        let curves = curve::curves(draft, &alternatives, &sizes, threads, stop, &done);
        drop(bar);
        let interrupted = stop.load(Ordering::Relaxed);
        ensure!(
            interrupted || curves.iter().any(|curve| !curve.points.is_empty()),
            "no size can be: {}",
            curves
                .iter()
                .flat_map(|curve| &curve.impossible)
                .next()
                .map_or("none is asked for", |one| &one.reason)
        );
        let islands = job.islands.as_ref().filter(|_| !interrupted);
        let islands = islands.map(|section| islands::compare(draft, section)).transpose()?;
        let largest = curves.first().and_then(|curve| curve.points.last());
        let improvements = largest.and_then(|point| {
            Some(goodput::improvements(&job.goodput, point.reliability, point.time_to_train_s?))
        });
        Ok(Self {
            job: job.name.clone(),
            tokens_to_train: job.training.tokens,
            batch: match job.scale.batch {
                BatchRule::Kept(Growth::Grows) => "grows",
                BatchRule::Given(_) => "given",
                BatchRule::Kept(Growth::Fixed) | BatchRule::Unsaid => "fixed",
            },
            baseline_accelerators: largest
                .and_then(|_| curves[0].points.first())
                .map(|point| point.accelerators),
            curves,
            improvements: improvements.unwrap_or_default(),
            islands,
            interrupted,
        })
    }
}

#[cfg(test)]
mod tests;
