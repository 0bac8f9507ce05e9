//! Where checkpoints are kept: a [`Store`] of named files that are whole or not there.

mod disk;
mod folder;
#[cfg(feature = "object-store")]
mod object;
pub mod simulated;

use std::io;
use std::ops::Range;

pub use disk::{Disk, OperatingSystem};
pub use folder::Folder;
#[cfg(feature = "object-store")]
pub use object::Objects;

/// Files by name, in folders one deep (`folder/file`).
pub trait Store: Send + Sync {
    /// Keeps the pieces, one after the other, under a name. When it returns they outlive a crash of
    /// the host; a crash before leaves nothing under the name, or what was there.
    ///
    /// # Errors
    /// When the store refuses, as when it is full.
    fn put(&self, name: &str, pieces: &[&[u8]]) -> io::Result<()>;

    /// The bytes of a file, in a range.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] without such a file, [`io::ErrorKind::UnexpectedEof`] when it is
    /// shorter than the range.
    fn get(&self, name: &str, range: Range<u64>) -> io::Result<Vec<u8>>;

    /// Bytes in a file.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] without such a file.
    fn length(&self, name: &str) -> io::Result<u64>;

    /// The names in a folder, without it; "" is the store itself. Empty when there is no such folder.
    ///
    /// # Errors
    /// When the store refuses.
    fn list(&self, folder: &str) -> io::Result<Vec<String>>;

    /// Forgets a file, if it is there.
    ///
    /// # Errors
    /// When the store refuses.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Forgets a folder that has no files any more, if it is there.
    ///
    /// # Errors
    /// When the store refuses.
    fn remove_folder(&self, folder: &str) -> io::Result<()>;

    /// What a file is called in messages.
    fn place(&self, name: &str) -> String;
}
