//! What a rank did last, written into the run's folder when communication fails or a link was slow.

use std::path::Path;

use anyhow::{Context, Result};
use transport::Communicator;

/// Names this rank's slow links on standard error as they are found.
pub fn name_slow_links(communicator: &Communicator) {
    let rank = communicator.rank();
    communicator.watch_links(move |link| eprintln!("{}{rank}: {link}", crate::SPEAKER));
}

/// Writes `flight/GENERATION-rank-N.json`, each rank its own.
pub fn write(communicator: &Communicator, run: &Path, generation: u64, failed: bool) -> Result<()> {
    let Some(flight) = communicator.flight() else { return Ok(()) };
    if !failed && flight.slow_links.is_empty() {
        return Ok(());
    }
    let folder = run.join("flight");
    let path = folder.join(format!("{generation}-rank-{}.json", flight.rank.0));
    std::fs::create_dir_all(&folder)
        .and_then(|()| std::fs::write(&path, serde_json::to_string_pretty(&flight)? + "\n"))
        .with_context(|| format!("cannot write {}", path.display()))
}
