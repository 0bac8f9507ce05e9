//! Memory that all ranks of a host map: what they tell each other, then a region for each rank's buffers.
//!
//! A rank writes to the lines that belong to it, to buffers in its own region, and to what the owner of a
//! buffer has granted it; it reads anything. Like a [`crate::segment::Segment`] the memory has no name, and
//! the kernel frees it with the last process. Only what is used of it takes up memory.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::ops::{Deref, DerefMut, Range};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard};

use memmap2::{Advice, MmapOptions, MmapRaw};
use rustix::fs::{FallocateFlags, MemfdFlags, OFlags};
use units::Rank;

use crate::segment::{Location, NAME, SEALS};

/// How far apart words are that different processes write: processors fetch cache lines in pairs.
const LINES_BYTES: usize = 128;

/// How many messages from one rank to another may be there at once.
pub(crate) const SLOTS: u64 = 4;

/// The most bytes of data that travel inside a message.
pub(crate) const INLINE_BYTES: usize = 8 << 10;

/// The words of a message, before its data.
const HEADER_BYTES: usize = 64;

const SLOT_BYTES: usize = HEADER_BYTES + INLINE_BYTES;

/// All that belongs to one rank's messages to one other.
const WAY_BYTES: usize = LINES_BYTES + SLOTS as usize * SLOT_BYTES;

/// What buffers are rounded up to; larger ones begin at a multiple of [`LARGE_BYTES`].
const PAGE_BYTES: usize = 4 << 10;

const LARGE_BYTES: usize = 2 << 20;

/// The word that says whether ranks share cores, behind the mark.
const SHARES_CORES: usize = 8;

/// The addresses, not the memory, that each rank's buffers may take up.
const REGION_BYTES: usize = 64 << 30;

/// The most ranks that share an arena: what they tell each other takes up 32 MiB then.
pub(crate) const MOST_RANKS: usize = 32;

/// Memory shared by all ranks of a host.
#[derive(Debug)]
pub struct Arena {
    memory: MmapRaw,
    file: File,
    /// Whose regions they are, in rank order.
    ranks: Vec<Rank>,
    own: usize,
    /// What is free of the own region, in order, as offsets in the arena.
    free: Mutex<Vec<Range<usize>>>,
}

/// A word of a rank's own line.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Own {
    /// 1 while the rank sleeps. Whoever wakes it clears it.
    Sleeps = 8,
    /// The group of the operation that failed last on the rank.
    FailedGroup = 16,
    /// Its number in the group, plus one.
    FailedNumber = 24,
    /// What is thrown back and forth to see how long that takes.
    Ball = 32,
}

impl Arena {
    /// Makes memory for `ranks`, to be opened by all of them but the `own`-th.
    pub(crate) fn create(mark: u64, ranks: Vec<Rank>, own: usize) -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create(NAME, flags)?);
        file.set_len(size(ranks.len()) as u64)?;
        // Taken now, so that a lack of memory is an error here and not a signal later.
        let control = control_bytes(ranks.len()) as u64;
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, control)?;
        rustix::fs::fcntl_add_seals(&file, SEALS)?;
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let shares_cores = ranks.len() > cores;
        let arena = Self::map(file, ranks, own)?;
        arena.word(SHARES_CORES).store(shares_cores.into(), Release);
        arena.word(0).store(mark, Release);
        Ok(arena)
    }

    /// Whether there were more ranks than cores for the one that made it: all ranks have the same answer.
    pub(crate) fn shares_cores(&self) -> bool {
        self.word(SHARES_CORES).load(Acquire) != 0
    }

    /// Where other processes find it.
    pub(crate) fn location(&self) -> Location {
        Location::of(&self.file)
    }

    /// Opens what another process has created with the same arguments.
    pub(crate) fn open(
        location: Location,
        mark: u64,
        ranks: Vec<Rank>,
        own: usize,
    ) -> io::Result<Self> {
        let path = location.checked_path()?;
        let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32;
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?;
        let sealed = rustix::fs::fcntl_get_seals(&file)?.contains(SEALS);
        if !sealed || file.metadata()?.len() != size(ranks.len()) as u64 {
            return Err(io::Error::new(ErrorKind::InvalidData, "it has another shape"));
        }
        let arena = Self::map(file, ranks, own)?;
        if arena.word(0).load(Acquire) != mark {
            return Err(io::Error::new(ErrorKind::InvalidData, "it is of other ranks"));
        }
        Ok(arena)
    }

    fn map(file: File, ranks: Vec<Rank>, own: usize) -> io::Result<Self> {
        assert!(own < ranks.len() && ranks.len() <= MOST_RANKS, "{own} of {ranks:?}");
        let memory = MmapOptions::new().len(size(ranks.len())).map_raw(&file)?;
        memory.advise(Advice::DontDump)?;
        let free = Mutex::new(Vec::from([region(ranks.len(), own)]));
        Ok(Self { memory, file, ranks, own, free })
    }

    /// Which of the ranks that share it this one is.
    pub(crate) fn own(&self) -> usize {
        self.own
    }

    /// The ranks that share it.
    pub(crate) fn ranks(&self) -> &[Rank] {
        &self.ranks
    }

    /// Which of the ranks that share it a rank is.
    pub(crate) fn place(&self, rank: Rank) -> Option<usize> {
        self.ranks.binary_search(&rank).ok()
    }

    /// What a rank sleeps on.
    #[expect(unsafe_code, reason = "the word is shared with other processes")]
    pub(crate) fn bell(&self, rank: usize) -> &AtomicU32 {
        let at = self.line(rank);
        // SAFETY: as in `word`; a bell is only ever used as such.
        unsafe { AtomicU32::from_ptr(self.memory.as_mut_ptr().add(at).cast()) }
    }

    /// A word of a rank's line.
    pub(crate) fn of(&self, rank: usize, word: Own) -> &AtomicU64 {
        self.word(self.line(rank) + word as usize)
    }

    /// How many messages from one rank the other is done with.
    pub(crate) fn acknowledged(&self, from: usize, to: usize) -> &AtomicU64 {
        self.word(self.way(from, to))
    }

    /// A word of the message with this number.
    pub(crate) fn header(&self, from: usize, to: usize, number: u64, word: usize) -> &AtomicU64 {
        assert!(word < HEADER_BYTES / 8, "a header has no word {word}");
        self.word(self.slot(from, to, number) + 8 * word)
    }

    /// Where the data inside the message with this number are.
    pub(crate) fn inline(&self, from: usize, to: usize, number: u64) -> usize {
        self.slot(from, to, number) + HEADER_BYTES
    }

    /// Has the processor bring the lines of a message with so many bytes inside here.
    pub(crate) fn expect_to_write(&self, from: usize, to: usize, number: u64, bytes: usize) {
        #[cfg(target_arch = "x86_64")]
        for line in (0..HEADER_BYTES + bytes.min(INLINE_BYTES)).step_by(64) {
            let at = self.memory.as_ptr().wrapping_add(self.slot(from, to, number) + line);
            #[expect(unsafe_code, reason = "it is an instruction of the processor")]
            // SAFETY: it changes nothing but what is in the cache, whatever the address.
            unsafe {
                std::arch::asm!("prefetchw [{}]", in(reg) at, options(nostack, preserves_flags));
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (from, to, number, bytes);
    }

    /// Where some elements of this process's are in the arena, if they are in its region.
    pub(crate) fn offset(&self, elements: &[f32]) -> Option<usize> {
        let start = self.memory.as_ptr().addr();
        let offset = elements.as_ptr().addr().checked_sub(start)?;
        (offset >= control_bytes(self.ranks.len()) && offset < self.memory.len()).then_some(offset)
    }

    /// The elements at an offset that a rank has named; `None` when they are not all in its own region, so that
    /// whatever it names is not in another's buffer.
    ///
    /// Nothing is promised about what other processes do to them: see [`crate::reduction`].
    pub(crate) fn elements_of(
        &self,
        rank: usize,
        offset: usize,
        elements: usize,
    ) -> Option<*mut f32> {
        let region = region(self.ranks.len(), rank);
        let end = elements.checked_mul(4)?.checked_add(offset)?;
        (region.start <= offset && end <= region.end)
            .then(|| self.elements(offset, elements))
            .flatten()
    }

    /// The elements at an offset; `None` when they are not all inside.
    pub(crate) fn elements(&self, offset: usize, elements: usize) -> Option<*mut f32> {
        let end = elements.checked_mul(4)?.checked_add(offset)?;
        (offset.is_multiple_of(4) && end <= self.memory.len())
            .then(|| self.memory.as_mut_ptr().wrapping_add(offset).cast())
    }

    fn line(&self, rank: usize) -> usize {
        assert!(rank < self.ranks.len(), "there is no rank {rank}");
        (1 + rank) * LINES_BYTES
    }

    fn way(&self, from: usize, to: usize) -> usize {
        assert!(from.max(to) < self.ranks.len(), "there is no way from {from} to {to}");
        ways_start(self.ranks.len()) + (from * self.ranks.len() + to) * WAY_BYTES
    }

    fn slot(&self, from: usize, to: usize, number: u64) -> usize {
        self.way(from, to) + LINES_BYTES + (number % SLOTS) as usize * SLOT_BYTES
    }

    #[expect(unsafe_code, reason = "control words are shared with other processes")]
    fn word(&self, at: usize) -> &AtomicU64 {
        debug_assert!(at.is_multiple_of(8) && at + 8 <= control_bytes(self.ranks.len()));
        // SAFETY: all callers compute `at` from the layout, so that the word is aligned, inside the
        // mapping, and only ever used as a word; all access to it, here and in peers, is atomic.
        unsafe { AtomicU64::from_ptr(self.memory.as_mut_ptr().add(at).cast()) }
    }

    /// Takes memory for a buffer.
    pub(crate) fn lease(self: &Arc<Self>, elements: usize) -> io::Result<Lease> {
        let bytes = elements.max(1).checked_mul(4).ok_or(ErrorKind::OutOfMemory)?;
        let unit = if bytes < LARGE_BYTES { PAGE_BYTES } else { LARGE_BYTES };
        let range = self.take(bytes.next_multiple_of(unit), unit).ok_or(ErrorKind::OutOfMemory)?;
        let lease = Lease { arena: Arc::clone(self), range: range.clone(), elements };
        let (start, length) = (range.start as u64, range.len() as u64);
        rustix::fs::fallocate(&self.file, FallocateFlags::empty(), start, length)?;
        Ok(lease)
    }

    /// The first free range that is large enough.
    fn take(&self, bytes: usize, unit: usize) -> Option<Range<usize>> {
        let mut free = self.free();
        for index in 0..free.len() {
            let Range { start, end } = free[index].clone();
            let aligned = start.next_multiple_of(unit);
            if aligned + bytes <= end {
                let rest = [start..aligned, aligned + bytes..end];
                free.splice(index..=index, rest.into_iter().filter(|rest| !rest.is_empty()));
                return Some(aligned..aligned + bytes);
            }
        }
        None
    }

    fn give_back(&self, range: Range<usize>) {
        let mut free = self.free();
        let index = free.partition_point(|other| other.start < range.start);
        free.insert(index, range);
        free.dedup_by(|next, range| {
            let adjoins = range.end == next.start;
            if adjoins {
                range.end = next.end;
            }
            adjoins
        });
    }

    fn free(&self) -> MutexGuard<'_, Vec<Range<usize>>> {
        self.free.lock().expect("nothing panics while it holds the free ranges")
    }
}

/// A buffer's place in the own region, given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    arena: Arc<Arena>,
    range: Range<usize>,
    elements: usize,
}

impl Lease {
    /// Never gives the place back: peers may still read or write there.
    pub(crate) fn abandon(mut self) {
        self.range = 0..0;
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !self.range.is_empty() {
            self.arena.give_back(self.range.clone());
        }
    }
}

impl Deref for Lease {
    type Target = [f32];

    #[expect(unsafe_code, reason = "the buffer lies in shared memory")]
    fn deref(&self) -> &[f32] {
        let start = self.arena.memory.as_ptr().wrapping_add(self.range.start).cast();
        // SAFETY: the range is inside the mapping, which lives as long as the arena, and leased to
        // nobody else. Peers write there only during an operation, which owns the lease.
        unsafe { std::slice::from_raw_parts(start, self.elements) }
    }
}

impl DerefMut for Lease {
    #[expect(unsafe_code, reason = "the buffer lies in shared memory")]
    fn deref_mut(&mut self) -> &mut [f32] {
        let start = self.arena.memory.as_mut_ptr().wrapping_add(self.range.start).cast();
        // SAFETY: as in `deref`; all bits are numbers.
        unsafe { std::slice::from_raw_parts_mut(start, self.elements) }
    }
}

fn ways_start(ranks: usize) -> usize {
    ((1 + ranks) * LINES_BYTES).next_multiple_of(PAGE_BYTES)
}

/// Where the regions begin.
fn control_bytes(ranks: usize) -> usize {
    (ways_start(ranks) + ranks * ranks * WAY_BYTES).next_multiple_of(LARGE_BYTES)
}

/// Where a rank's buffers are.
fn region(ranks: usize, rank: usize) -> Range<usize> {
    let start = control_bytes(ranks) + rank * REGION_BYTES;
    start..start + REGION_BYTES
}

fn size(ranks: usize) -> usize {
    control_bytes(ranks) + ranks * REGION_BYTES
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn arena() -> Arc<Arena> {
        Arc::new(Arena::create(1, vec![Rank(2), Rank(5)], 1).unwrap())
    }

    #[test]
    fn what_one_maps_others_see() {
        let creator = arena();
        let ranks = vec![Rank(2), Rank(5)];
        let opener = Arena::open(creator.location(), 1, ranks.clone(), 0).unwrap();
        let mut lease = creator.lease(1000).unwrap();
        lease[999] = 7.0;
        let offset = creator.offset(&lease[999..]).unwrap();
        let seen = opener.elements(offset, 1).unwrap();
        #[expect(unsafe_code, reason = "the memory is shared")]
        // SAFETY: it is inside the mapping, and nobody writes to it.
        let seen = unsafe { seen.read() };
        assert_eq!(seen, 7.0);
        assert!(opener.elements(usize::MAX - 3, 1).is_none() && opener.elements(2, 1).is_none());
        assert_eq!(opener.elements_of(1, offset, 1), opener.elements(offset, 1));
        assert!(opener.elements_of(0, offset, 1).is_none(), "of another rank");
        assert!(opener.elements_of(1, offset, REGION_BYTES / 4).is_none(), "beyond its region");
        assert!(Arena::open(creator.location(), 2, ranks, 0).is_err(), "other ranks");
        assert_eq!((creator.place(Rank(5)), creator.place(Rank(4))), (Some(1), None));
        assert!(creator.offset(&[0.0]).is_none(), "ordinary memory");
    }

    proptest! {
        #[test]
        fn leases_do_not_overlap_and_come_back(sizes in prop::collection::vec(0_usize..2_000_000, 1..12)) {
            let arena = arena();
            for keep in [2, 3] {
                let mut leases: Vec<_> = sizes.iter().map(|size| arena.lease(*size).unwrap()).collect();
                for (value, lease) in leases.iter_mut().enumerate() {
                    lease.first_mut().into_iter().for_each(|element| *element = value as f32);
                    lease.last_mut().into_iter().for_each(|element| *element = value as f32);
                }
                for (value, lease) in leases.iter().enumerate() {
                    prop_assert!(lease.first().is_none_or(|element| *element == value as f32));
                }
                let mut index = 0;
                leases.retain(|_| { index += 1; index % keep == 0 });
            }
            prop_assert_eq!(arena.free().len(), 1);
        }
    }
}
