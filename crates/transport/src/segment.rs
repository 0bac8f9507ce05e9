//! Memory that two processes map: a page of control words, then a ring of bytes per direction.
//!
//! It has no name in any file system: the peer opens it through the creator's entry in `/proc`, and
//! the kernel frees it with the last of the two processes, however they end.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Release};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{FallocateFlags, MemfdFlags, OFlags, SealFlags};
use serde::{Deserialize, Serialize};

/// Where the rings begin.
const CONTROL_BYTES: usize = 4096;

/// How far apart words are that different processes write: two cache lines, since processors fetch
/// them in pairs.
const LINES_BYTES: usize = 128;

/// Nobody can take the memory away from under a mapping, which would kill the process.
pub(crate) const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

pub(crate) const NAME: &str = "phalanx";

/// Memory that two ranks share.
#[derive(Debug)]
pub(crate) struct Segment {
    memory: MmapRaw,
    capacity: usize,
}

/// Which of the two ways bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the lower rank to the higher.
    Up = 0,
    /// From the higher rank to the lower.
    Down = 1,
}

/// The control words of a direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Word {
    /// How many bytes were ever written. Belongs to the writer.
    Tail = 0,
    /// 1 while the writer sleeps. Belongs to the writer, but the reader clears it.
    WriterWaits = 8,
    /// How many bytes were ever read. Belongs to the reader.
    Head = LINES_BYTES as isize,
    /// 1 while the reader sleeps. Belongs to the reader, but the writer clears it.
    ReaderWaits = LINES_BYTES as isize + 8,
}

/// What its creator's memory is called, and where another process finds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Location {
    process: u32,
    descriptor: i32,
}

impl Segment {
    /// Makes memory with rings of `capacity` bytes, a power of two, marked with `mark`. It can be
    /// opened while the returned file is.
    pub(crate) fn create(mark: u64, capacity: usize) -> io::Result<(Self, File)> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create(NAME, flags)?);
        // Taken now, so that a lack of memory is an error here and not a signal later.
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, size(capacity) as u64)?;
        rustix::fs::fcntl_add_seals(&file, SEALS)?;
        let segment = Self::map(&file, capacity)?;
        segment.mark().store(mark, Release);
        Ok((segment, file))
    }

    /// Opens what another process has created with the same arguments.
    pub(crate) fn open(location: Location, mark: u64, capacity: usize) -> io::Result<Self> {
        let path = location.checked_path()?;
        let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32;
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?;
        let sealed = rustix::fs::fcntl_get_seals(&file)?.contains(SEALS);
        if !sealed || file.metadata()?.len() != size(capacity) as u64 {
            return Err(io::Error::new(ErrorKind::InvalidData, "it has another shape"));
        }
        let segment = Self::map(&file, capacity)?;
        if segment.mark().load(Acquire) != mark {
            return Err(io::Error::new(ErrorKind::InvalidData, "it is for another pair of ranks"));
        }
        Ok(segment)
    }

    fn map(file: &File, capacity: usize) -> io::Result<Self> {
        assert!(capacity.is_power_of_two(), "positions are cut to the size of the ring");
        let memory = MmapOptions::new().len(size(capacity)).populate().map_raw(file)?;
        Ok(Self { memory, capacity })
    }

    /// The size of each ring in bytes.
    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    pub(crate) fn word(&self, direction: Direction, word: Word) -> &AtomicU64 {
        self.control((1 + 2 * direction as usize) * LINES_BYTES + word as usize)
    }

    /// Copies bytes into a ring from a position on, and on from the ring's start.
    pub(crate) fn copy_in(&self, direction: Direction, position: u64, bytes: &[u8]) {
        let (at, before_end) = self.place(position, bytes.len());
        let (first, second) = bytes.split_at(before_end);
        self.write(direction, at, first);
        self.write(direction, 0, second);
    }

    /// Copies bytes out of a ring from a position on, and on from the ring's start.
    pub(crate) fn copy_out(&self, direction: Direction, position: u64, into: &mut [u8]) {
        let (at, before_end) = self.place(position, into.len());
        let (first, second) = into.split_at_mut(before_end);
        self.read(direction, at, first);
        self.read(direction, 0, second);
    }

    /// Where a position lies in its ring, and how many of the bytes from there come before the
    /// ring's end.
    fn place(&self, position: u64, length: usize) -> (usize, usize) {
        let at = (position % self.capacity as u64) as usize;
        (at, length.min(self.capacity - at))
    }

    fn mark(&self) -> &AtomicU64 {
        self.control(0)
    }

    #[expect(unsafe_code, reason = "control words are shared with another process")]
    fn control(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8) && at + 8 <= CONTROL_BYTES, "{at} is no control word");
        // SAFETY: the word is inside the mapping (which starts with the control page, aligned to a
        // page) and lives as long as it does; all access to it, here and in the peer, is atomic.
        unsafe { AtomicU64::from_ptr(self.memory.as_mut_ptr().add(at).cast()) }
    }

    #[expect(unsafe_code, reason = "ring bytes are shared with another process")]
    fn write(&self, direction: Direction, at: usize, bytes: &[u8]) {
        let start = self.start(direction, at, bytes.len());
        // SAFETY: `start` has checked that the range is inside the mapping. Nothing here holds a
        // reference into a ring, so that `bytes` lies elsewhere. The peer does not touch the range
        // before the tail is published; one that does gets wrong bytes, as all values are valid.
        unsafe {
            let to = self.memory.as_mut_ptr().add(start);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
    }

    #[expect(unsafe_code, reason = "ring bytes are shared with another process")]
    fn read(&self, direction: Direction, at: usize, into: &mut [u8]) {
        let start = self.start(direction, at, into.len());
        // SAFETY: as in `write`. The peer does not touch the range before the head is published;
        // from one that does we get wrong bytes, as all values are valid.
        unsafe {
            let from = self.memory.as_ptr().add(start);
            std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len());
        }
    }

    /// The offset in the mapping of a range of a ring.
    fn start(&self, direction: Direction, at: usize, length: usize) -> usize {
        assert!(at + length <= self.capacity, "{at} + {length} bytes leave the ring");
        CONTROL_BYTES + direction as usize * self.capacity + at
    }
}

impl Location {
    /// Where other processes find a file of this one.
    pub(crate) fn of(file: &File) -> Self {
        Self { process: std::process::id(), descriptor: file.as_raw_fd() }
    }

    /// The path of it, if it is memory of ours: the number may stand for anything in a process of
    /// which we do not know that it is.
    pub(crate) fn checked_path(self) -> io::Result<PathBuf> {
        let path = PathBuf::from(format!("/proc/{}/fd/{}", self.process, self.descriptor));
        if path.read_link()?.to_string_lossy().starts_with(&format!("/memfd:{NAME}")) {
            return Ok(path);
        }
        Err(io::Error::new(ErrorKind::InvalidData, "that is no shared memory of ours"))
    }
}

/// The size of the memory for two rings.
fn size(capacity: usize) -> usize {
    CONTROL_BYTES + 2 * capacity
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_process_puts_in_another_takes_out() {
        let (creator, file) = Segment::create(7, 64).unwrap();
        let opener = Segment::open(Location::of(&file), 7, 64).unwrap();
        drop(file);
        creator.copy_in(Direction::Up, 60, b"around the end");
        opener.copy_in(Direction::Down, 0, &[1; 64]);
        creator.word(Direction::Down, Word::Tail).store(64, Release);
        let mut bytes = [0; 14];
        opener.copy_out(Direction::Up, 60, &mut bytes);
        assert_eq!(&bytes, b"around the end");
        assert_eq!(opener.word(Direction::Down, Word::Tail).load(Acquire), 64);
        assert_eq!(opener.word(Direction::Up, Word::Tail).load(Acquire), 0);
    }

    #[test]
    fn only_the_expected_memory_is_opened() {
        let refused = |location, mark, capacity| Segment::open(location, mark, capacity).is_err();
        let (_segment, file) = Segment::create(7, 64).unwrap();
        let location = Location::of(&file);
        assert!(refused(location, 8, 64), "another pair");
        assert!(refused(location, 7, 128), "another size");
        let other = File::open("/proc/self/exe").unwrap();
        assert!(refused(Location::of(&other), 7, 64), "another file");
        drop(file);
        assert!(refused(location, 7, 64), "no longer there");
        let unsealed = rustix::fs::memfd_create(NAME, MemfdFlags::CLOEXEC).unwrap();
        let unsealed = File::from(unsealed);
        unsealed.set_len(size(64) as u64).unwrap();
        assert!(refused(Location::of(&unsealed), 0, 64), "memory that may shrink");
    }
}
