//! Results: the runs of one system on one benchmark, found in folders.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::Value;
use units::Seconds;

use super::run::{Run, Timing, median};
use crate::mllog;

/// The runs of one folder.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    pub folder: PathBuf,
    pub benchmark: String,
    /// Who ran it, and on what, as far as the folder and the log say.
    pub submitter: String,
    pub system: String,
    /// The name of the accelerator, where a description of the system lies beside the results.
    pub accelerator: Option<String>,
    pub accelerators: u32,
    pub global_batch: u64,
    pub sequence: u64,
    /// Median over the runs.
    pub step_time_s: Option<Seconds>,
    pub timing: Option<Timing>,
    pub tokens_per_s_per_accelerator: Option<f64>,
    /// Median over the runs that reached the target.
    pub time_to_train_s: Option<Seconds>,
    /// What MLPerf publishes: the mean without the fastest and the slowest run, times the factor
    /// of `scaling.json`, which evens out lucky convergence.
    pub official_time_to_train_s: Option<Seconds>,
    pub runs: Vec<Run>,
}

/// A file that was no log of a run, and why.
#[derive(Debug, Clone, Serialize)]
pub struct Refused {
    pub file: PathBuf,
    pub reason: String,
}

/// Everything that was found.
#[derive(Debug, Default)]
pub struct Found {
    pub outcomes: Vec<Outcome>,
    pub refused: Vec<Refused>,
}

/// Reads all logs at and below `paths`. Logs in one folder are runs of the same thing.
pub fn find(paths: &[PathBuf], accelerators: Option<u32>) -> Result<Found> {
    let mut files = Vec::new();
    for path in paths {
        logs(path, true, &mut files)?;
    }
    files.sort();
    files.dedup();
    let mut found = Found::default();
    let mut folders: BTreeMap<PathBuf, Vec<Run>> = BTreeMap::new();
    for file in files {
        let bytes = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
        match Run::read(&String::from_utf8_lossy(&bytes)) {
            Ok(run) => {
                let folder = file.parent().unwrap_or(Path::new("")).to_owned();
                folders.entry(folder).or_default().push(run);
            }
            Err(reason) => found.refused.push(Refused { file, reason: reason.to_string() }),
        }
    }
    for (folder, runs) in folders {
        match Outcome::new(&folder, runs, accelerators) {
            Ok(outcome) => found.outcomes.push(outcome),
            Err(error) => {
                found.refused.push(Refused { file: folder, reason: error.to_string() });
            }
        }
    }
    Ok(found)
}

/// Files that may be logs: those named by the user, `result_*.txt` and our own.
fn logs(path: &Path, named: bool, files: &mut Vec<PathBuf>) -> Result<()> {
    let kind = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
    if kind.is_dir() {
        let entries = fs::read_dir(path).with_context(|| format!("cannot read {}", path.display()));
        for entry in entries? {
            logs(&entry?.path(), false, files)?;
        }
        return Ok(());
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let usual = name == mllog::FILE || (name.starts_with("result_") && name.ends_with(".txt"));
    if named || usual {
        files.push(path.to_owned());
    }
    Ok(())
}

impl Outcome {
    fn new(folder: &Path, runs: Vec<Run>, accelerators: Option<u32>) -> Result<Self> {
        let place = Place::of(folder);
        let Run { benchmark, submitter, platform, global_batch, sequence, .. } = runs[0].clone();
        for run in &runs {
            ensure!(
                (&run.benchmark, run.global_batch) == (&benchmark, global_batch),
                "the folder's logs are of different jobs: {benchmark} on {global_batch} sequences a step, {} on {}",
                run.benchmark,
                run.global_batch
            );
        }
        let accelerators = accelerators.or(place.accelerators).or(runs[0].ranks).unwrap_or(1);
        let times = runs.iter().filter_map(|run| run.step_time_s).map(|time| time.0);
        let step_time_s = median(times.collect()).map(Seconds);
        let trained = runs.iter().filter(|run| run.success).filter_map(|run| run.time_to_train_s);
        let trained: Vec<f64> = trained.map(|time| time.0).collect();
        let official = official(&trained).zip(place.factor).map(|(mean, factor)| mean * factor);
        let tokens = (sequence * global_batch) as f64;
        Ok(Self {
            folder: folder.to_owned(),
            benchmark,
            submitter: place.submitter.or(submitter).unwrap_or_default(),
            system: place.system.or(platform).unwrap_or_default(),
            accelerator: place.accelerator,
            accelerators,
            global_batch,
            sequence,
            step_time_s,
            timing: runs.iter().filter_map(|run| run.timing).max(),
            tokens_per_s_per_accelerator: step_time_s
                .map(|time| tokens / time.0 / f64::from(accelerators)),
            time_to_train_s: median(trained).map(Seconds),
            official_time_to_train_s: official.map(Seconds),
            runs,
        })
    }
}

/// The mean without the fastest and the slowest (MLPerf's training rules, 2026).
fn official(times: &[f64]) -> Option<f64> {
    let mut times = times.to_vec();
    times.sort_by(f64::total_cmp);
    let kept = times.get(1..times.len().checked_sub(1)?)?;
    (!kept.is_empty()).then(|| kept.iter().sum::<f64>() / kept.len() as f64)
}

/// What the folders of a submission say: `ORG/results/SYSTEM/BENCHMARK` beside
/// `ORG/systems/SYSTEM.json`.
#[derive(Debug, Default)]
struct Place {
    submitter: Option<String>,
    system: Option<String>,
    accelerator: Option<String>,
    accelerators: Option<u32>,
    factor: Option<f64>,
}

impl Place {
    fn of(folder: &Path) -> Self {
        let factor = json(&folder.join("scaling.json"));
        let factor = factor.and_then(|scaling| scaling["scaling_factor"].as_f64());
        let name = |path: &Path| Some(path.file_name()?.to_string_lossy().into_owned());
        let Some(system) = folder.parent() else { return Self::default() };
        let Some(results) = system.parent().filter(|path| path.ends_with("results")) else {
            return Self::default();
        };
        let submitter = results.parent().unwrap_or(Path::new(""));
        let (submitter_name, system_name) = (name(submitter), name(system));
        let file = system_name.as_ref().map(|name| format!("systems/{name}.json"));
        let description = file.and_then(|file| json(&submitter.join(file))).unwrap_or_default();
        let count = |key: &str| leading_number(&description[key]);
        Self {
            submitter: submitter_name,
            system: system_name,
            accelerator: description["accelerator_model_name"].as_str().map(str::to_owned),
            accelerators: count("number_of_nodes")
                .zip(count("accelerators_per_node"))
                .map(|(nodes, each)| nodes * each)
                .filter(|accelerators| *accelerators > 0),
            factor,
        }
    }
}

fn json(path: &Path) -> Option<Value> {
    serde_json::from_str(&fs::read_to_string(path).ok()?).ok()
}

/// Descriptions have numbers, numbers as text, and numbers with words after them.
fn leading_number(value: &Value) -> Option<u32> {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let digits: String = text.trim().chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}
