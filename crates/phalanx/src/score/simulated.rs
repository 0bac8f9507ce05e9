//! What the simulator says that a scored step would have taken.

use std::fs;
use std::path::Path;

use serde::Serialize;
use serde_json::Value;
use sim::device::Calibration;
use units::Seconds;

use super::results::Outcome;
use crate::validate::{Row, predict};

/// A step in virtual time.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Simulated {
    pub step_time_s: Seconds,
    /// What was simulated: a row of published steps, or the run's own program.
    pub of: String,
}

/// The step of `outcome`, or what is missing to say it: logs tell neither layout nor precision, so
/// these come from the row of `rows` that was published of the same results.
pub fn simulate(
    outcome: &Outcome,
    rows: &[Row],
    calibrations: &[Calibration],
) -> Result<Simulated, String> {
    if let Some(summary) = own_summary(&outcome.folder) {
        let time = summary["predicted_step_time_s"].as_f64();
        let time = time.ok_or("this run did not measure its machine ([run] measure = false)")?;
        return Ok(Simulated {
            step_time_s: Seconds(time),
            of: "the run's own program".to_owned(),
        });
    }
    let row = published(outcome, rows).ok_or_else(|| {
        "a log says neither layout nor precision; describe the system in --rows, in the form of measured/steps.csv"
            .to_owned()
    })?;
    let files = [calibrations.to_vec()];
    let prediction = predict(row, &files).swap_remove(0).map_err(|reason| reason.0)?;
    Ok(Simulated { step_time_s: prediction.step_time, of: row.id.clone() })
}

/// The summary of a run of our own.
fn own_summary(folder: &Path) -> Option<Value> {
    serde_json::from_str(&fs::read_to_string(folder.join("summary.json")).ok()?).ok()
}

/// The row whose source names the end of the results' path, of the same size and batch; where
/// rounds share a path, the one whose round the path names.
fn published<'a>(outcome: &Outcome, rows: &'a [Row]) -> Option<&'a Row> {
    let path = outcome.folder.to_string_lossy().replace('\\', "/");
    let mut parts = path.rsplitn(5, '/');
    let mut last: Vec<&str> = parts.by_ref().take(4).collect();
    last.reverse();
    let place = last.join("/");
    let above = parts.next().unwrap_or_default();
    let same = |row: &&Row| {
        row.source.ends_with(&place)
            && row.accelerators == outcome.accelerators
            && row.global_batch.is_none_or(|batch| batch == outcome.global_batch)
    };
    let round = |row: &&Row| row.table.split(' ').next().is_some_and(|name| above.ends_with(name));
    let all: Vec<&Row> = rows.iter().filter(same).filter(|_| last.len() == 4).collect();
    all.iter().copied().find(|row| round(row)).or(all.first().copied())
}
