//! Where it is written, outside of a run's processes, who coordinates it.

use std::fs::{self, File};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::etcd::Etcd;

/// Who coordinates a run in one term.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its term; each is one higher than the last.
    pub term: u64,
    /// Where it listens; `None` once the run is over.
    pub address: Option<SocketAddr>,
    /// What the processes of the run know, and nobody else.
    pub secret: String,
}

/// Records of terms, of which each is written once. Who writes that of the next term coordinates,
/// and all who read learn of it; so there is never a doubt who is newest.
#[derive(Debug, Clone)]
pub enum Register {
    /// A file for each term in a folder, which may be shared by hosts.
    Folder(PathBuf),
    /// A key for each term in etcd.
    Etcd(Etcd),
}

impl Register {
    /// At a place as jobs name it: `etcd://HOST:PORT/NAME`, or a folder.
    ///
    /// # Errors
    /// When an address of etcd cannot be read.
    pub fn at(place: &str) -> io::Result<Self> {
        let etcd = place.strip_prefix("etcd://").map(Etcd::at).transpose()?;
        Ok(etcd.map_or_else(|| Self::Folder(PathBuf::from(place)), Self::Etcd))
    }

    /// The record of the newest term, if there is any.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn newest(&self) -> io::Result<Option<Record>> {
        let text = match self {
            Self::Folder(folder) => newest_file(folder)?.map(fs::read).transpose()?,
            Self::Etcd(etcd) => etcd.last()?,
        };
        text.map(|text| Ok(serde_json::from_slice(&text)?)).transpose()
    }

    /// Writes the record of a term; `false` when somebody else has done so.
    ///
    /// # Errors
    /// When it cannot be written; then it may have been.
    pub fn take(&self, record: &Record) -> io::Result<bool> {
        let text = serde_json::to_vec(record)?;
        match self {
            Self::Folder(folder) => put_file(folder, &name(record.term), &text),
            Self::Etcd(etcd) => etcd.put_once(&name(record.term), &text),
        }
    }
}

/// Names are in the order of terms.
fn name(term: u64) -> String {
    format!("term-{term:010}")
}

fn newest_file(folder: &Path) -> io::Result<Option<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        entries => entries?,
    };
    let paths: io::Result<Vec<PathBuf>> = entries.map(|entry| Ok(entry?.path())).collect();
    let is_term = |path: &PathBuf| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("term-"))
    };
    Ok(paths?.into_iter().filter(is_term).max())
}

/// A number that no other draft has.
fn draft_number() -> u64 {
    std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), std::process::id())
}

/// A file that is there whole or not at all, and that nobody writes twice.
fn put_file(folder: &Path, name: &str, text: &[u8]) -> io::Result<bool> {
    fs::create_dir_all(folder)?;
    let draft = folder.join(format!("draft-{}-{name}", draft_number()));
    let mut file =
        File::options().write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
    file.write_all(text)?;
    file.sync_all()?;
    // A link is not made over a file that is there.
    let linked = fs::hard_link(&draft, folder.join(name));
    fs::remove_file(&draft)?;
    match linked {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        linked => linked.map(|()| true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(term: u64, port: u16) -> Record {
        Record { term, address: Some(([127, 0, 0, 1], port).into()), secret: "7".to_owned() }
    }

    #[test]
    fn a_term_is_taken_once() {
        let folder = tempfile::tempdir().unwrap();
        let register = Register::at(folder.path().join("run").to_str().unwrap()).unwrap();
        assert_eq!(register.newest().unwrap(), None);
        assert!(register.take(&record(0, 1)).unwrap());
        assert!(!register.take(&record(0, 2)).unwrap());
        assert_eq!(register.newest().unwrap(), Some(record(0, 1)));
        // Of many who want the next term one gets it.
        let take = |taker| register.take(&record(1, taker)).unwrap();
        let taken = std::thread::scope(|scope| {
            let takers: Vec<_> = (0..8).map(|taker| scope.spawn(move || take(taker))).collect();
            takers.into_iter().filter_map(|taker| taker.join().unwrap().then_some(())).count()
        });
        assert_eq!(taken, 1);
        assert_eq!(register.newest().unwrap().unwrap().term, 1);
    }
}
