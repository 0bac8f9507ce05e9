//! A store in a folder of a file system.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::{Disk, OperatingSystem, Store};

/// A file is written under this ending and renamed when it is safe.
const PARTIAL: &str = ".partial";

/// A store in a folder, which all hosts of a job must share.
#[derive(Debug)]
pub struct Folder<D = OperatingSystem> {
    disk: D,
    root: PathBuf,
}

impl Folder {
    /// A store in an existing folder of this host.
    #[must_use]
    pub fn new(root: &Path) -> Self {
        Self::on(OperatingSystem, root)
    }
}

impl<D: Disk> Folder<D> {
    /// A store in an existing folder of a disk.
    #[must_use]
    pub fn on(disk: D, root: &Path) -> Self {
        Self { disk, root: root.to_owned() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// The folder of a path, made and its name safe.
    fn folder_of(&self, path: &Path) -> io::Result<PathBuf> {
        let folder = path.parent().unwrap_or(&self.root).to_owned();
        if folder != self.root {
            self.disk.create_folder(&folder)?;
            self.disk.sync_folder(&self.root)?;
        }
        Ok(folder)
    }
}

/// What is not there need not be removed.
fn unless_missing(outcome: io::Result<()>) -> io::Result<()> {
    match outcome {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

impl<D: Disk> Store for Folder<D> {
    fn put(&self, name: &str, pieces: &[&[u8]]) -> io::Result<()> {
        let path = self.path(name);
        let folder = self.folder_of(&path)?;
        let partial = self.path(&format!("{name}{PARTIAL}"));
        let written = self.disk.write(&partial, pieces).and_then(|()| self.disk.sync(&partial));
        if let Err(error) = written {
            // Where space ran out, half a file would keep others from being written.
            drop(self.disk.remove(&partial));
            return Err(error);
        }
        self.disk.rename(&partial, &path)?;
        self.disk.sync_folder(&folder)
    }

    fn get(&self, name: &str, range: Range<u64>) -> io::Result<Vec<u8>> {
        self.disk.read(&self.path(name), range)
    }

    fn length(&self, name: &str) -> io::Result<u64> {
        self.disk.length(&self.path(name))
    }

    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        match self.disk.names(&self.path(folder)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            names => names,
        }
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let path = self.path(name);
        unless_missing(self.disk.remove(&path))?;
        unless_missing(self.disk.sync_folder(path.parent().unwrap_or(&self.root)))
    }

    fn remove_folder(&self, folder: &str) -> io::Result<()> {
        unless_missing(self.disk.remove_folder(&self.path(folder)))
    }

    fn place(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }
}
