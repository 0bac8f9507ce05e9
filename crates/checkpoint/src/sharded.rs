//! The state of training on disk: one safetensors file per rank and one manifest.
//!
//! Writing: each rank fills a [`Shard`] and [`write_shard`]s it with a description beside it; one
//! rank [`commit`]s, which puts the manifest in place, and with it the checkpoint. [`Saver`] does
//! both on a thread of its own. Reading: [`Checkpoint::newest`] walks back to the newest whole one,
//! and [`Checkpoint::read`] takes any range of any block out of it, checked, whatever layout wrote
//! it. A checkpoint is whole once it has a manifest, and a manifest comes last.

mod checksum;
mod commit;
mod load;
mod manifest;
mod saver;
mod shard;

pub use checksum::Checksum;
pub use commit::{commit, retain, write_shard};
pub use load::{Checkpoint, Rejected};
pub use manifest::{File, Kind, Manifest, Piece, Progress, Rows};
pub use saver::{Saved, Saver, Setup};
pub use shard::{Run, Shard};

#[cfg(test)]
mod tests;
