//! Going on from the newest checkpoint that every rank can read.

use std::sync::Arc;

use checkpoint::sharded::{Checkpoint, Kind, Progress};
use checkpoint::store::Store;
use compute::Operators;
use model::Config;
use program::{Axis, Program};
use units::Rank;

use crate::state::restore;
use crate::{Error, Worker};

/// What training goes on from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resumed {
    /// How far it had come.
    pub progress: Progress,
    /// Newer checkpoints that were passed over: what is wrong with each.
    pub rejected: Vec<String>,
}

/// Fills every rank with its part of the newest whole checkpoint of `store`, whatever layout wrote
/// it. One that is damaged, on any rank, or of a step after `newest` is passed over by all.
///
/// # Errors
/// [`Error::NothingToResume`] when there is none; when communication fails.
pub fn resume<O: Operators>(
    worker: &mut Worker<O>,
    program: &Program,
    store: &Arc<dyn Store>,
    config: &Config,
    newest: u64,
) -> Result<Resumed, Error> {
    let names = Checkpoint::names(&**store);
    // What rank 0 finds counts: a folder may not look the same on every host at once.
    let names = first_of(worker, &names.map_err(|error| error.to_string()))?;
    let names = names.map_err(|reason| Error::NothingToResume {
        place: store.place(""),
        rejected: vec![reason],
    })?;
    let mut rejected = Vec::new();
    for name in names {
        let opened = Checkpoint::open(Arc::clone(store), &name, config);
        let read = opened.map_err(|error| error.to_string()).and_then(|checkpoint| {
            let progress = checkpoint.progress();
            let (saved, groups) = (checkpoint.groups(), u64::from(program.groups()));
            if saved > 1 && saved != groups {
                return Err(format!(
                    "{name} is of {saved} groups that train apart, not {groups}; set local_groups"
                ));
            }
            if progress.step > newest {
                return Err(format!("{name} is newer than what is known to be right"));
            }
            restore(worker, program, progress.step, |block, kind, start, values| {
                let (kind, start) = match kind {
                    _ if saved == groups => (kind, start),
                    // All groups begin with the same.
                    Kind::OuterMomentum => {
                        values.fill(0.0);
                        return Ok(());
                    }
                    Kind::Anchor => (Kind::Parameter, start),
                    kind => (kind, start % config.block_elements(block)),
                };
                checkpoint.read(block, kind, start, values).map_err(|error| error.to_string())
            })?;
            Ok(progress)
        });
        match all_well(worker, read)? {
            Ok(progress) => return Ok(Resumed { progress, rejected }),
            Err(reason) => rejected.push(reason),
        }
    }
    Err(Error::NothingToResume { place: store.place(""), rejected })
}

/// What rank 0 says.
fn first_of<O: Operators>(
    worker: &mut Worker<O>,
    own: &Result<Vec<String>, String>,
) -> Result<Result<Vec<String>, String>, Error> {
    let all = gather(worker, &serde_json::to_vec(own).expect("names have a JSON form"))?;
    Ok(serde_json::from_slice(&all[0]).unwrap_or_else(|error| Err(error.to_string())))
}

/// This rank's result, if no rank has an error; else the first rank's.
fn all_well<O: Operators, T>(
    worker: &mut Worker<O>,
    own: Result<T, String>,
) -> Result<Result<T, String>, Error> {
    let reason = own.as_ref().err().cloned().unwrap_or_default();
    let all = gather(worker, reason.as_bytes())?;
    let failed = all.iter().enumerate().find(|(_, reason)| !reason.is_empty());
    let failed = failed.map(|(rank, reason)| {
        format!("{}: {}", Rank(rank as u32), String::from_utf8_lossy(reason))
    });
    Ok(match failed {
        Some(reason) => Err(reason),
        None => own,
    })
}

fn gather<O: Operators>(worker: &mut Worker<O>, own: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
    let rank = worker.rank();
    let (communicator, world) = worker.communication(Axis::World);
    let all = communicator.all_gather_bytes(world, own);
    all.map_err(|source| Error::Communication { rank, source })
}
