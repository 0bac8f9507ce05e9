//! What a rank did last, written into the run's folder when communication fails or a link was slow.

use std::path::Path;

use anyhow::{Context, Result};
use transport::Communicator;

/// Writes `flight/GENERATION-rank-N.json`, each rank its own, and names its slow links.
pub fn write(communicator: &Communicator, run: &Path, generation: u64, failed: bool) -> Result<()> {
    let Some(flight) = communicator.flight() else { return Ok(()) };
    for link in &flight.slow_links {
        eprintln!("{}{}: {link}", crate::SPEAKER, flight.rank);
    }
    if !failed && flight.slow_links.is_empty() {
        return Ok(());
    }
    let folder = run.join("flight");
    let path = folder.join(format!("{generation}-rank-{}.json", flight.rank.0));
    std::fs::create_dir_all(&folder)
        .and_then(|()| std::fs::write(&path, serde_json::to_string_pretty(&flight)? + "\n"))
        .with_context(|| format!("cannot write {}", path.display()))
}
