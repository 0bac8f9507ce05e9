//! What a rank did last, written into the run's folder when communication fails.

use std::path::Path;

use anyhow::{Context, Result};
use transport::Communicator;

/// Writes `flight/GENERATION-rank-N.json`, each rank its own.
pub fn write(communicator: &Communicator, run: &Path, generation: u64) -> Result<()> {
    let Some(flight) = communicator.flight() else { return Ok(()) };
    let folder = run.join("flight");
    let path = folder.join(format!("{generation}-rank-{}.json", flight.rank.0));
    std::fs::create_dir_all(&folder)
        .and_then(|()| std::fs::write(&path, serde_json::to_string_pretty(&flight)? + "\n"))
        .with_context(|| format!("cannot write {}", path.display()))
}
