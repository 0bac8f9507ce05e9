//! A ring of bytes from one process to another: positions only grow, and each side keeps its own
//! and publishes it for the other.
//!
//! A side that is about to sleep first says so and then looks again; the other first publishes and
//! then looks whether someone sleeps. With a full fence between the two, at least one sees the
//! other, so no wake-up is lost.

use std::io::{self, ErrorKind, IoSlice};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{Ordering, fence};

use crate::segment::{Direction, Segment, Word};

/// What a read or write did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Moved {
    pub bytes: usize,
    /// The peer sleeps until what has just happened, and is to be woken.
    pub peer_waits: bool,
}

/// The end that puts bytes in.
#[derive(Debug)]
pub(crate) struct Writer {
    segment: Arc<Segment>,
    direction: Direction,
    tail: u64,
    /// The last write found less room than it asked for.
    is_short: bool,
}

/// The end that takes bytes out.
#[derive(Debug)]
pub(crate) struct Reader {
    segment: Arc<Segment>,
    direction: Direction,
    head: u64,
    /// The last read found less than it asked for.
    is_short: bool,
}

impl Writer {
    pub(crate) fn new(segment: Arc<Segment>, direction: Direction) -> Self {
        Self { segment, direction, tail: 0, is_short: false }
    }

    /// Writes as much of `pieces` as there is room for.
    ///
    /// # Errors
    /// When the peer published a position that cannot be.
    pub(crate) fn write(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<Moved> {
        let mut room = self.room()?;
        let start = self.tail;
        for piece in pieces {
            let length = piece.len().min(room);
            self.segment.copy_in(self.direction, self.tail, &piece[..length]);
            self.tail = self.tail.wrapping_add(length as u64);
            room -= length;
        }
        self.segment.word(self.direction, Word::Tail).store(self.tail, Release);
        let bytes = self.tail.wrapping_sub(start) as usize;
        self.is_short = bytes < pieces.iter().map(|piece| piece.len()).sum();
        Ok(Moved { bytes, peer_waits: bytes > 0 && self.reader_waits() })
    }

    /// See [`crate::shared_memory::SharedMemory::prepare_to_wait`].
    pub(crate) fn prepare_to_wait(&self) -> bool {
        if !self.is_short {
            return false;
        }
        self.segment.word(self.direction, Word::WriterWaits).store(1, Release);
        fence(Ordering::SeqCst);
        // An impossible position is reported by the next write.
        self.room().map_or(true, |room| room >= self.segment.capacity() / 2)
    }

    pub(crate) fn stop_waiting(&self) {
        if self.is_short {
            self.segment.word(self.direction, Word::WriterWaits).store(0, Relaxed);
        }
    }

    fn room(&self) -> io::Result<usize> {
        let head = self.segment.word(self.direction, Word::Head).load(Acquire);
        Ok(self.segment.capacity() - filled(head, self.tail, self.segment.capacity())?)
    }

    fn reader_waits(&self) -> bool {
        fence(Ordering::SeqCst);
        let waits = self.segment.word(self.direction, Word::ReaderWaits);
        waits.load(Relaxed) != 0 && waits.swap(0, Relaxed) != 0
    }
}

impl Reader {
    pub(crate) fn new(segment: Arc<Segment>, direction: Direction) -> Self {
        Self { segment, direction, head: 0, is_short: false }
    }

    /// Reads what there is, at most `into`.
    ///
    /// # Errors
    /// When the peer published a position that cannot be.
    pub(crate) fn read(&mut self, into: &mut [u8]) -> io::Result<Moved> {
        let bytes = self.filled()?.min(into.len());
        self.segment.copy_out(self.direction, self.head, &mut into[..bytes]);
        self.head = self.head.wrapping_add(bytes as u64);
        self.segment.word(self.direction, Word::Head).store(self.head, Release);
        self.is_short = bytes < into.len();
        Ok(Moved { bytes, peer_waits: bytes > 0 && self.writer_waits() })
    }

    /// See [`crate::shared_memory::SharedMemory::prepare_to_wait`].
    pub(crate) fn prepare_to_wait(&self) -> bool {
        if !self.is_short {
            return false;
        }
        self.segment.word(self.direction, Word::ReaderWaits).store(1, Release);
        fence(Ordering::SeqCst);
        // An impossible position is reported by the next read.
        self.filled().map_or(true, |filled| filled > 0)
    }

    pub(crate) fn stop_waiting(&self) {
        if self.is_short {
            self.segment.word(self.direction, Word::ReaderWaits).store(0, Relaxed);
        }
    }

    fn filled(&self) -> io::Result<usize> {
        let tail = self.segment.word(self.direction, Word::Tail).load(Acquire);
        filled(self.head, tail, self.segment.capacity())
    }

    /// A writer that sleeps is woken when half the ring is free: once per half rather than for
    /// every piece that is read.
    fn writer_waits(&self) -> bool {
        fence(Ordering::SeqCst);
        let waits = self.segment.word(self.direction, Word::WriterWaits);
        let is_half_free = || !matches!(self.filled(), Ok(f) if f > self.segment.capacity() / 2);
        waits.load(Acquire) != 0 && is_half_free() && waits.swap(0, Relaxed) != 0
    }
}

/// How many bytes lie between two positions, one of which is the peer's word.
fn filled(head: u64, tail: u64, capacity: usize) -> io::Result<usize> {
    let filled = tail.wrapping_sub(head);
    if filled <= capacity as u64 {
        return Ok(filled as usize);
    }
    let reason = format!(
        "its end of the shared memory is broken: written up to {tail}, read up to {head}, in a \
         ring of {capacity} bytes"
    );
    Err(io::Error::new(ErrorKind::InvalidData, reason))
}
