//! A disk in memory that crashes, lies and fills up when told to, for tests of what must survive it.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use super::Disk;

/// A sequence of numbers that its seed decides (SplitMix64; Steele, Lea & Flood 2014).
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    /// The sequence of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.roll() % limit
    }

    /// True once in `times` on average.
    pub fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
}

/// What the disk does wrong.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    /// After so many changes it refuses all others, and the last is torn: the host has crashed.
    pub crash_after: Option<u64>,
    /// Bytes it has room for.
    pub capacity: Option<u64>,
    /// It says that it has synced and has not: what a program that forgets to sync looks like.
    pub lies: bool,
}

/// The disk; clones are the same one.
#[derive(Debug, Clone)]
pub struct SimulatedDisk(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    faults: Faults,
    changes: u64,
    root: String,
    files: Vec<File>,
    /// What has which name, as programs see it.
    names: Names,
    /// What the names that have changed since their folder was synced stood for before.
    unsynced: BTreeMap<String, Option<Entry>>,
}

/// By path, as text: that is compared faster.
type Names = BTreeMap<String, Entry>;

fn name(path: &Path) -> &str {
    let text = path.to_str().expect("tests name files in UTF-8");
    // The last `/` of a folder is no part of its name.
    if text == "/" { text } else { text.trim_end_matches('/') }
}

/// The folder of a path.
fn folder(name: &str) -> &str {
    name.rsplit_once('/').map_or("", |(folder, _)| if folder.is_empty() { "/" } else { folder })
}

/// What begins like the names in a folder.
fn prefix(folder: &str) -> String {
    if folder.ends_with('/') { folder.to_owned() } else { format!("{folder}/") }
}

/// The names in a folder, not those in folders below.
fn inside<'a>(names: &'a Names, within: &'a str) -> impl Iterator<Item = (&'a String, &'a Entry)> {
    let start = prefix(within);
    let below = names.range(start.clone()..).take_while(move |(name, _)| name.starts_with(&start));
    below.filter(move |(name, _)| *name != within && folder(name) == within)
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Entry {
    Folder,
    /// A file, by its index.
    File(usize),
}

#[derive(Debug, Clone, Default)]
struct File {
    live: Vec<u8>,
    /// What was synced; nothing as long as the file is new.
    durable: Vec<u8>,
}

impl SimulatedDisk {
    /// A disk with one empty folder.
    #[must_use]
    pub fn new(root: &Path) -> Self {
        let root = name(root).to_owned();
        let names = BTreeMap::from([(root.clone(), Entry::Folder)]);
        Self(Arc::new(Mutex::new(State {
            faults: Faults::default(),
            changes: 0,
            root,
            files: Vec::new(),
            names,
            unsynced: BTreeMap::new(),
        })))
    }

    /// What it does wrong from now on.
    pub fn fail(&self, faults: Faults) {
        let mut state = self.state();
        state.faults = faults;
        state.changes = 0;
    }

    /// Changes since [`SimulatedDisk::fail`].
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.state().changes
    }

    /// What a crash leaves: everything synced, and of the rest what the dice say. The disk works
    /// again then.
    pub fn reboot(&self, dice: &mut Dice) {
        let mut state = self.state();
        state.faults = Faults::default();
        state.forget_names(dice);
        state.files.iter_mut().for_each(|file| file.crash(dice));
    }

    /// Flips one bit of a file, for good.
    pub fn flip(&self, path: &Path, bit: u64) {
        self.spoil(path, |bytes| bytes[(bit / 8) as usize] ^= 1 << (bit % 8));
    }

    /// Cuts a file short, for good.
    pub fn truncate(&self, path: &Path, bytes: u64) {
        self.spoil(path, |contents| contents.truncate(bytes as usize));
    }

    fn spoil(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let mut state = self.state();
        let file = state.file(path).unwrap_or_else(|_| panic!("no file {}", path.display()));
        change(&mut file.live);
        file.durable.clone_from(&file.live);
    }

    /// Every file with its length in bytes.
    #[must_use]
    pub fn files(&self) -> Vec<(PathBuf, u64)> {
        let state = self.state();
        let length = |(path, entry): (&String, &Entry)| match entry {
            Entry::Folder => None,
            Entry::File(index) => Some((path.into(), state.files[*index].live.len() as u64)),
        };
        state.names.iter().filter_map(length).collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("nothing panics while it holds the disk")
    }
}

impl State {
    /// Each unsynced change of a name happened or did not; what a lost folder held is lost with it.
    fn forget_names(&mut self, dice: &mut Dice) {
        for (name, before) in std::mem::take(&mut self.unsynced) {
            if dice.one_in(2) {
                self.set(&name, before);
            }
        }
        self.unsynced.clear();
        let mut kept = Names::new();
        for (name, entry) in std::mem::take(&mut self.names) {
            if name == self.root || kept.contains_key(folder(&name)) {
                kept.insert(name, entry);
            }
        }
        self.names = kept;
    }

    /// Has a name stand for something else, or for nothing; what it stood for.
    fn set(&mut self, name: &str, entry: Option<Entry>) -> Option<Entry> {
        let before = match entry {
            Some(entry) => self.names.insert(name.to_owned(), entry),
            None => self.names.remove(name),
        };
        if before != entry && !self.unsynced.contains_key(name) {
            self.unsynced.insert(name.to_owned(), before);
        }
        before
    }

    /// Counts a change; an error once the host has crashed.
    fn change(&mut self) -> io::Result<()> {
        if self.faults.crash_after.is_some_and(|limit| self.changes >= limit) {
            return Err(io::Error::other("the host has crashed"));
        }
        self.changes += 1;
        Ok(())
    }

    fn file(&mut self, path: &Path) -> io::Result<&mut File> {
        match self.names.get(name(path)) {
            Some(Entry::File(index)) => Ok(&mut self.files[*index]),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// The file of that name, emptied; a new one if there is none.
    fn create(&mut self, path: &Path) -> io::Result<()> {
        if self.names.get(folder(name(path))) != Some(&Entry::Folder) {
            return Err(io::ErrorKind::NotFound.into());
        }
        if !self.names.contains_key(name(path)) {
            self.files.push(File::default());
            self.set(name(path), Some(Entry::File(self.files.len() - 1)));
        }
        self.file(path)?.live.clear();
        Ok(())
    }

    /// Bytes that still fit.
    fn room(&self) -> u64 {
        let length = |entry: &Entry| match entry {
            Entry::Folder => 0,
            Entry::File(index) => self.files[*index].live.len() as u64,
        };
        let used = || self.names.values().map(length).sum();
        self.faults.capacity.map_or(u64::MAX, |capacity| capacity.saturating_sub(used()))
    }
}

impl File {
    /// Unsynced contents are the old ones, the new ones, or a start of the new ones with nothing or
    /// garbage behind it.
    fn crash(&mut self, dice: &mut Dice) {
        if self.live != self.durable {
            let kept = dice.below(self.live.len() as u64 + 1) as usize;
            match dice.below(4) {
                0 => {}
                1 => self.durable.clone_from(&self.live),
                2 => self.durable = self.live[..kept].to_vec(),
                _ => {
                    self.durable = self.live[..kept].to_vec();
                    self.durable.resize(self.live.len(), dice.roll() as u8);
                }
            }
        }
        self.live.clone_from(&self.durable);
    }
}

impl Disk for SimulatedDisk {
    fn create_folder(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.change()?;
        state.set(name(path), Some(Entry::Folder));
        Ok(())
    }

    fn write(&self, path: &Path, pieces: &[&[u8]]) -> io::Result<()> {
        let mut state = self.state();
        state.change()?;
        state.create(path)?;
        let mut bytes = pieces.concat();
        let room = state.room();
        let fits = bytes.len() as u64 <= room;
        bytes.truncate(room.min(bytes.len() as u64) as usize);
        if state.faults.crash_after == Some(state.changes) {
            bytes.truncate(bytes.len() / 2);
        }
        state.file(path)?.live = bytes;
        if fits { Ok(()) } else { Err(io::ErrorKind::StorageFull.into()) }
    }

    fn sync(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.change()?;
        let lies = state.faults.lies;
        let file = state.file(path)?;
        if !lies {
            file.durable.clone_from(&file.live);
        }
        Ok(())
    }

    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.change()?;
        let path = name(path);
        if state.names.get(path) != Some(&Entry::Folder) {
            return Err(io::ErrorKind::NotFound.into());
        }
        if !state.faults.lies {
            state.unsynced.retain(|name, _| folder(name) != path);
        }
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.change()?;
        let entry = state.set(name(from), None).ok_or(io::ErrorKind::NotFound)?;
        state.set(name(to), Some(entry));
        Ok(())
    }

    fn read(&self, path: &Path, range: Range<u64>) -> io::Result<Vec<u8>> {
        let mut state = self.state();
        let bytes = state.file(path)?.live.get(range.start as usize..range.end as usize);
        Ok(bytes.ok_or(io::ErrorKind::UnexpectedEof)?.to_vec())
    }

    fn length(&self, path: &Path) -> io::Result<u64> {
        Ok(self.state().file(path)?.live.len() as u64)
    }

    fn names(&self, path: &Path) -> io::Result<Vec<String>> {
        let (state, path) = (self.state(), name(path));
        if state.names.get(path) != Some(&Entry::Folder) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let start = prefix(path).len();
        Ok(inside(&state.names, path).map(|(name, _)| name[start..].to_owned()).collect())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.change()?;
        state.set(name(path), None).map(drop).ok_or(io::ErrorKind::NotFound.into())
    }

    fn remove_folder(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.change()?;
        if inside(&state.names, name(path)).next().is_some() {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        state.set(name(path), None).map(drop).ok_or(io::ErrorKind::NotFound.into())
    }
}
