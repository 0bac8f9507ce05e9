//! The folder of a run: never an existing one.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::Value;

use crate::ledger::Ledger;

/// Most runs of one name in one folder.
const RUNS_MAX: u32 = 99_999;

/// A new folder that one run writes to.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    metrics: File,
}

impl RunFolder {
    /// Makes the next numbered folder for `name` in `parent`.
    pub fn create(parent: &Path, name: &str) -> Result<Self> {
        fs::create_dir_all(parent)
            .with_context(|| format!("[run] folder: cannot make {}", parent.display()))?;
        for number in 1..=RUNS_MAX {
            let path = parent.join(format!("{name}-{number:03}"));
            match fs::create_dir(&path) {
                Ok(()) => {
                    let metrics = File::create(path.join("metrics.jsonl"))
                        .with_context(|| format!("cannot write in {}", path.display()))?;
                    return Ok(Self { path, metrics });
                }
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => {
                    return Err(error)
                        .with_context(|| format!("[run] folder: cannot make {}", path.display()));
                }
            }
        }
        bail!("[run] folder: {} holds {RUNS_MAX} runs of `{name}`; clear it out", parent.display())
    }

    /// The folder of a run that goes on there, after the process that wrote to it was lost.
    pub fn reopen(path: &Path) -> Result<Self> {
        let name = path.join("metrics.jsonl");
        let metrics = File::options().append(true).open(&name);
        let metrics = metrics.with_context(|| format!("cannot write {}", name.display()))?;
        Ok(Self { path: path.to_owned(), metrics })
    }

    /// What has been recorded so far.
    pub fn ledger(&self) -> Ledger {
        Ledger::read(&fs::read_to_string(self.path.join("metrics.jsonl")).unwrap_or_default())
    }

    /// The loss of the first step that was recorded; not a number when none was.
    pub fn first_loss(&self) -> f64 {
        let text = fs::read_to_string(self.path.join("metrics.jsonl")).unwrap_or_default();
        let records = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let mut steps = records.filter(|record| record["event"] == "step");
        steps.next().and_then(|record| record["loss"].as_f64()).unwrap_or(f64::NAN)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a whole file.
    pub fn write(&self, name: &str, contents: &str) -> Result<()> {
        let path = self.path.join(name);
        fs::write(&path, contents).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Writes a whole file of JSON.
    pub fn write_json(&self, name: &str, value: &impl Serialize) -> Result<()> {
        self.write(name, &(serde_json::to_string_pretty(value)? + "\n"))
    }

    /// Adds a line to `metrics.jsonl`.
    pub fn metric(&mut self, value: &impl Serialize) -> Result<()> {
        let line = serde_json::to_string(value)? + "\n";
        self.metrics
            .write_all(line.as_bytes())
            .with_context(|| format!("cannot write metrics in {}", self.path.display()))
    }
}
