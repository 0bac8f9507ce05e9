//! An event file in the folder of a run.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use report::{tensorboard_head, tensorboard_scalars};
use serde_json::Value;

/// What keys of a step's record are called in `TensorBoard`, whose groups end with a slash.
const OF_A_STEP: [(&str, &str); 8] = [
    ("loss", "loss/training"),
    ("gradient_norm", "training/gradient norm"),
    ("learning_rate", "training/learning rate"),
    ("step_time_s", "speed/step time (s)"),
    ("tokens_per_s", "speed/tokens per s"),
    ("model_flops_utilization", "speed/model FLOPs utilization"),
    ("exposed_communication_s", "speed/exposed communication (s)"),
    ("pipeline_wait_s", "speed/pipeline wait (s)"),
];

/// A file that `TensorBoard` follows while it grows.
pub struct EventFile {
    file: File,
    path: PathBuf,
}

impl EventFile {
    /// A new file in `folder`; a process that takes over from another begins its own.
    pub fn create(folder: &Path) -> Result<Self> {
        let (now, process) = (now(), std::process::id());
        let path = folder.join(format!("events.out.tfevents.{:010}.phalanx.{process}", now as u64));
        let file = File::options().create(true).append(true).open(&path);
        let file = file.with_context(|| format!("cannot write {}", path.display()))?;
        let mut this = Self { file, path };
        this.write(&tensorboard_head(now))?;
        Ok(this)
    }

    /// Adds what a record says.
    pub fn see(&mut self, record: &Value) -> Result<()> {
        let scalars: Vec<(&str, f64)> = match record["event"].as_str().unwrap_or_default() {
            "step" => {
                let values = OF_A_STEP.iter();
                values.filter_map(|(key, tag)| Some((*tag, record[key].as_f64()?))).collect()
            }
            "evaluation" => {
                record["loss"].as_f64().map(|loss| ("loss/held out", loss)).into_iter().collect()
            }
            _ => Vec::new(),
        };
        match (record["step"].as_u64(), scalars.is_empty()) {
            (Some(step), false) => self.write(&tensorboard_scalars(now(), step, &scalars)),
            _ => Ok(()),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let written = self.file.write_all(bytes);
        written.with_context(|| format!("cannot write {}", self.path.display()))
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}
