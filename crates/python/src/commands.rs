//! The commands, asked from Python.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pyo3::prelude::*;

use crate::error::Error;
use crate::patience::wait_for;

/// What `phalanx ARGUMENTS --json` prints. The job file's contents may be given as TOML, or as a
/// table in JSON.
#[pyfunction]
#[pyo3(signature = (arguments, toml=None, table=None))]
pub fn answer(
    py: Python<'_>,
    arguments: Vec<String>,
    toml: Option<String>,
    table: Option<&str>,
) -> PyResult<String> {
    let contents = table.map(written).transpose()?.or(toml);
    let stop = Arc::new(AtomicBool::new(false));
    let asked = Arc::clone(&stop);
    let answer = move || phalanx::answer(&arguments, contents, &asked);
    let answer = wait_for(py, answer, || stop.store(true, Ordering::Relaxed))?;
    answer.map(|answer| answer.to_string()).map_err(|refusal| Error::new_err(refusal.to_string()))
}

/// A table in JSON as a job file.
fn written(table: &str) -> PyResult<String> {
    let none = |error: String| Error::new_err(format!("the job has no TOML form: {error}"));
    let table: toml::Table =
        serde_json::from_str(table).map_err(|error| none(error.to_string()))?;
    toml::to_string(&table).map_err(|error| none(error.to_string()))
}
