//! From the shards of all ranks to a checkpoint, and when old ones go.

use std::collections::HashSet;

use model::Config;
use units::Rank;

use super::load::{self, MANIFEST};
use super::manifest::{File, Manifest, Progress, file_name, part_name, seal, unseal};
use super::{Checksum, Shard};
use crate::Error;
use crate::store::Store;

/// The name of a checkpoint. Attempts to save the same step, by ranks started anew, differ in
/// `attempt` and never mix.
pub(super) fn folder_name(step: u64, attempt: u64) -> String {
    format!("step-{step:010}-{attempt:016x}")
}

/// The step of a checkpoint with this name; `None` if it is no such name.
pub(super) fn step_of(folder: &str) -> Option<u64> {
    let (step, attempt) = folder.strip_prefix("step-")?.split_once('-')?;
    let (step, attempt) = (step.parse().ok()?, u64::from_str_radix(attempt, 16).ok()?);
    (folder_name(step, attempt) == folder).then_some(step)
}

/// Writes what one rank saves, reads it again, and then says so beside it.
///
/// # Errors
/// [`Error::Store`] when the store refuses, [`Error::Damaged`] when it gives back something else.
pub fn write_shard(
    store: &dyn Store,
    step: u64,
    attempt: u64,
    rank: Rank,
    shard: &Shard,
) -> Result<(), Error> {
    let folder = folder_name(step, attempt);
    let name = format!("{folder}/{}", file_name(rank));
    let (header, data, file) = shard.encode();
    store.put(&name, &[&header, data]).map_err(Error::store("write", store, &name))?;
    load::verify_file(store, &name, &file)?;
    let part = format!("{folder}/{}", part_name(rank));
    store.put(&part, &[&seal(&file)]).map_err(Error::store("write", store, &part))
}

/// Makes a checkpoint of what `ranks` ranks have written, and removes their descriptions; `false`
/// if some have not yet.
///
/// # Errors
/// As [`write_shard`]; [`Error::Gap`] or [`Error::Overlap`] when the shards are not the model.
pub fn commit(
    store: &dyn Store,
    progress: Progress,
    attempt: u64,
    ranks: u32,
    config: &Config,
) -> Result<bool, Error> {
    let folder = folder_name(progress.step, attempt);
    if absent(store, &folder, ranks)?.is_some() {
        return Ok(false);
    }
    let files =
        (0..ranks).map(|rank| read_part(store, &folder, Rank(rank))).collect::<Result<_, _>>()?;
    let manifest = Manifest { progress, config: config.clone(), files };
    let name = format!("{folder}/{MANIFEST}");
    manifest.index(&store.place(&name), config)?;
    let text = seal(&manifest);
    store.put(&name, &[&text]).map_err(Error::store("write", store, &name))?;
    let again = load::read_whole(store, &name)?;
    if Checksum::of(&again) != Checksum::of(&text) {
        let problem = "it reads back otherwise than it was written".to_owned();
        return Err(Error::Damaged { place: store.place(&name), problem });
    }
    for rank in (0..ranks).map(Rank) {
        remove(store, &format!("{folder}/{}", part_name(rank)))?;
    }
    Ok(true)
}

/// The first rank that has written no part yet: one look at a folder, for it is asked again and again.
fn absent(store: &dyn Store, folder: &str, ranks: u32) -> Result<Option<Rank>, Error> {
    let names = store.list(folder).map_err(Error::store("list", store, folder))?;
    let names: HashSet<String> = names.into_iter().collect();
    Ok((0..ranks).map(Rank).find(|rank| !names.contains(&part_name(*rank))))
}

/// The first rank that has written no part of a checkpoint, as far as can be seen.
pub(super) fn missing(store: &dyn Store, step: u64, attempt: u64, ranks: u32) -> Option<Rank> {
    absent(store, &folder_name(step, attempt), ranks).ok().flatten()
}

fn read_part(store: &dyn Store, folder: &str, rank: Rank) -> Result<File, Error> {
    let name = format!("{folder}/{}", part_name(rank));
    let bytes = load::read_whole(store, &name)?;
    let damaged = |problem| Error::Damaged { place: store.place(&name), problem };
    unseal(&bytes).map_err(damaged)
}

/// Keeps the newest `keep` checkpoints that have a sound manifest and all their files; removes the
/// others up to step `saved`, the last that was saved: older ones, damaged ones, and what failed
/// saves left. The manifest goes first, so that half a checkpoint never looks whole.
///
/// # Errors
/// [`Error::Store`] when the store refuses.
pub fn retain(store: &dyn Store, keep: usize, saved: u64) -> Result<(), Error> {
    let folders = load::folders(store)?;
    let mut kept = Vec::new();
    for folder in &folders {
        if kept.len() < keep && load::looks_whole(store, folder) {
            kept.push(folder);
        }
    }
    if kept.is_empty() {
        return Ok(());
    }
    for folder in &folders {
        // Ranks that went back write steps anew of which there may be a whole checkpoint, while
        // this one has yet to finish an earlier step: what is later than that may be theirs.
        if !kept.contains(&folder) && step_of(folder).is_some_and(|step| step <= saved) {
            forget(store, folder)?;
        }
    }
    Ok(())
}

fn forget(store: &dyn Store, folder: &str) -> Result<(), Error> {
    remove(store, &format!("{folder}/{MANIFEST}"))?;
    for name in store.list(folder).map_err(Error::store("list", store, folder))? {
        remove(store, &format!("{folder}/{name}"))?;
    }
    store.remove_folder(folder).map_err(Error::store("remove", store, folder))
}

fn remove(store: &dyn Store, name: &str) -> Result<(), Error> {
    store.remove(name).map_err(Error::store("remove", store, name))
}
