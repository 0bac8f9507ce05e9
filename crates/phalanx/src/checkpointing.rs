//! Where the checkpoints of a run are, and how it goes on from those of another.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use checkpoint::sharded::{Checkpoint, Progress, Saver, Setup};
use checkpoint::store::{Folder, Store};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use train::Checkpoints;
use units::Rank;

use crate::STOPPED;
use crate::job::Job;

/// How long rank 0 waits for the other ranks to have written their parts of a checkpoint.
const PATIENCE: Duration = Duration::from_secs(1800);

/// Where the checkpoints of a run are.
pub fn store(job: &Job, run: &Path) -> Result<Arc<dyn Store>> {
    let name = run.file_name().context("a run is a folder with a name, as in runs/job-001")?;
    match &job.checkpoint.folder {
        Some(url) if url.contains("://") => objects(&format!("{url}/{}", name.to_string_lossy())),
        Some(folder) => in_folder(&Path::new(folder).join(name)),
        None => in_folder(&run.join("checkpoints")),
    }
}

fn in_folder(folder: &Path) -> Result<Arc<dyn Store>> {
    std::fs::create_dir_all(folder)
        .with_context(|| format!("[checkpoint] folder: cannot make {}", folder.display()))?;
    Ok(Arc::new(Folder::new(folder)))
}

#[cfg(feature = "object-store")]
fn objects(url: &str) -> Result<Arc<dyn Store>> {
    let variables = std::env::vars().map(|(name, value)| (name.to_lowercase(), value));
    let variables = variables.filter(|(name, _)| name.starts_with("aws_"));
    let objects = checkpoint::store::Objects::at(url, variables);
    Ok(Arc::new(objects.context("[checkpoint] folder")?))
}

#[cfg(not(feature = "object-store"))]
fn objects(url: &str) -> Result<Arc<dyn Store>> {
    bail!("[checkpoint] folder: {url} needs a build with `--features object-store`")
}

/// Makes sure that no other run, perhaps of another host, has its checkpoints where this one's will be.
pub fn claim(job: &Job, run: &Path) -> Result<()> {
    let (Some(place), Some(name)) = (&job.checkpoint.folder, run.file_name()) else {
        return Ok(());
    };
    let place = format!("{place}/{}", name.to_string_lossy());
    let taken = if place.contains("://") {
        !Checkpoint::names(&*store(job, run)?)?.is_empty()
    } else {
        let folder = Path::new(&place);
        let parent = folder.parent().unwrap_or(folder);
        let made = std::fs::create_dir_all(parent).and_then(|()| std::fs::create_dir(folder));
        match made {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => true,
            made => made
                .map(|()| false)
                .with_context(|| format!("[checkpoint] folder: cannot make {place}"))?,
        }
    };
    ensure!(
        !taken,
        "[checkpoint] folder: {place} holds the checkpoints of another run; name another folder, or the job otherwise"
    );
    Ok(())
}

/// Where the checkpoints of an earlier run are, which must be there.
pub fn store_of(job: &Job, run: &Path) -> Result<Arc<dyn Store>> {
    require_run(run)?;
    store(job, run)
}

/// Refuses the folder of an earlier run that is not there.
pub fn require_run(run: &Path) -> Result<()> {
    ensure!(run.is_dir(), "--resume {}: there is no such run folder", run.display());
    Ok(())
}

/// What saves the checkpoints of a run.
pub fn checkpoints(
    job: &Job,
    rank: Rank,
    run: &Path,
    attempt: u64,
    start: Progress,
    is_ours: Arc<dyn Fn() -> bool + Send + Sync>,
) -> Result<Checkpoints> {
    let setup = Setup {
        store: store(job, run)?,
        config: job.model.clone(),
        rank,
        ranks: job.cluster.accelerators,
        attempt,
        keep: job.checkpoint.keep,
        patience: PATIENCE,
        is_ours,
    };
    let every = job.checkpoint.every_steps.unwrap_or_default();
    Ok(Checkpoints::new(Saver::new(setup), every, job.checkpoint.asynchronous, start))
}

/// From now on the first SIGTERM or SIGINT sets the flag, and the second ends the process.
pub fn stop_on_signals(stop: &Arc<AtomicBool>) -> Result<()> {
    for signal in [SIGTERM, SIGINT] {
        // In this order: what is registered first sees the flag as it was before the signal.
        flag::register_conditional_shutdown(signal, STOPPED.into(), Arc::clone(stop))?;
        flag::register(signal, Arc::clone(stop))?;
    }
    Ok(())
}

/// Refuses a checkpoint of a run that would have gone on otherwise.
pub fn check(found: Progress, job: &Job, tokens: u64, run: &Path) -> Result<()> {
    let position = found.step * job.training.global_batch;
    let facts = [
        ("seed", found.seed, job.training.seed),
        ("tokens", found.tokens, tokens),
        ("global batch, so positions in the text,", found.position, position),
    ];
    for (what, theirs, ours) in facts {
        if theirs != ours {
            let place = run.display().to_string();
            bail!(train::Error::OtherRun { place, what, theirs, ours });
        }
    }
    let steps = job.training.steps;
    ensure!(
        found.step < steps,
        "{} is done: {} of [training] steps = {steps}; raise steps to train further",
        run.display(),
        found.step
    );
    Ok(())
}
