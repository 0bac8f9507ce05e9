//! What a folder needs of a file system, in as few calls as that: a seam for disks that fail.

use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// A file system, whose every call fails as [`std::fs`] does. What was written is safe from a crash
/// once the file is synced, and a name once its folder is.
#[allow(clippy::missing_errors_doc, reason = "said once, above")]
pub trait Disk: Send + Sync {
    /// Makes a folder in an existing one; nothing if it is there.
    fn create_folder(&self, path: &Path) -> io::Result<()>;

    /// Writes a file anew.
    fn write(&self, path: &Path, pieces: &[&[u8]]) -> io::Result<()>;

    /// Waits until a file's contents are safe.
    fn sync(&self, path: &Path) -> io::Result<()>;

    /// Waits until the names in a folder are safe.
    fn sync_folder(&self, path: &Path) -> io::Result<()>;

    /// Gives a file another name in its folder, in place of what has that name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Reads a part of a file.
    fn read(&self, path: &Path, range: Range<u64>) -> io::Result<Vec<u8>>;

    /// Bytes in a file.
    fn length(&self, path: &Path) -> io::Result<u64>;

    /// The names in a folder.
    fn names(&self, path: &Path) -> io::Result<Vec<String>>;

    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Removes an empty folder.
    fn remove_folder(&self, path: &Path) -> io::Result<()>;
}

/// The file system of this host.
#[derive(Debug, Clone, Copy)]
pub struct OperatingSystem;

impl Disk for OperatingSystem {
    fn create_folder(&self, path: &Path) -> io::Result<()> {
        match fs::create_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            made => made,
        }
    }

    fn write(&self, path: &Path, pieces: &[&[u8]]) -> io::Result<()> {
        let mut file = File::create(path)?;
        pieces.iter().try_for_each(|piece| file.write_all(piece))
    }

    fn sync(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn read(&self, path: &Path, range: Range<u64>) -> io::Result<Vec<u8>> {
        let file = File::open(path)?;
        if file.metadata()?.len() < range.end {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut bytes = vec![0; (range.end - range.start) as usize];
        file.read_exact_at(&mut bytes, range.start)?;
        Ok(bytes)
    }

    fn length(&self, path: &Path) -> io::Result<u64> {
        Ok(fs::metadata(path)?.len())
    }

    fn names(&self, path: &Path) -> io::Result<Vec<String>> {
        let name = |entry: io::Result<fs::DirEntry>| Ok(entry?.file_name().into_string().ok());
        fs::read_dir(path)?.filter_map(|entry| name(entry).transpose()).collect()
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn remove_folder(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)
    }
}
