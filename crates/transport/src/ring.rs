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

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::mpsc::{self, Receiver, Sender};

    use proptest::prelude::*;

    use super::*;
    use crate::segment::Location;

    /// The ends of a ring, each with a mapping of its own, as two processes have them.
    fn ring(capacity: usize) -> (Writer, Reader) {
        let (creator, file) = Segment::create(0, capacity).unwrap();
        let opener = Segment::open(Location::of(&file), 0, capacity).unwrap();
        let writer = Writer::new(Arc::new(creator), Direction::Down);
        (writer, Reader::new(Arc::new(opener), Direction::Down))
    }

    /// Bytes that differ from their neighbours.
    fn bytes(length: usize) -> Vec<u8> {
        (0..length).map(|i| (i % 251) as u8).collect()
    }

    fn send(
        mut writer: Writer,
        lengths: &[usize],
        mut left: &[u8],
        peer: Sender<()>,
        bell: Receiver<()>,
    ) {
        for length in lengths.iter().cycle() {
            if left.is_empty() {
                return;
            }
            let piece = &left[..left.len().min(*length)];
            let moved = writer.write(&[IoSlice::new(piece)]).unwrap();
            left = &left[moved.bytes..];
            if moved.peer_waits {
                // A peer that is done needs no waking.
                let _ = peer.send(());
            }
            if moved.bytes < piece.len() && !writer.prepare_to_wait() {
                bell.recv().unwrap();
            }
        }
    }

    fn receive(
        mut reader: Reader,
        lengths: &[usize],
        total: usize,
        peer: Sender<()>,
        bell: Receiver<()>,
    ) -> Vec<u8> {
        let mut received = Vec::new();
        for length in lengths.iter().cycle() {
            if received.len() == total {
                break;
            }
            let mut piece = vec![0; *length];
            let moved = reader.read(&mut piece).unwrap();
            received.extend(&piece[..moved.bytes]);
            if moved.peer_waits {
                // A peer that is done needs no waking.
                let _ = peer.send(());
            }
            let is_short = moved.bytes < piece.len() && received.len() < total;
            if is_short && !reader.prepare_to_wait() {
                bell.recv().unwrap();
            }
        }
        received
    }

    proptest! {
        #[test]
        fn a_ring_is_a_bounded_queue(
            exponent in 0_u32..8,
            calls in prop::collection::vec((any::<bool>(), 0_usize..200, 0_usize..200), 1..200),
        ) {
            let capacity = 1 << exponent;
            let (mut writer, mut reader) = ring(capacity);
            let mut model = VecDeque::new();
            for (writes, length, split) in calls {
                if writes {
                    let bytes = bytes(length + model.len()).split_off(model.len());
                    let (first, second) = bytes.split_at(split.min(length));
                    let moved = writer.write(&[IoSlice::new(first), IoSlice::new(second)]).unwrap();
                    prop_assert_eq!(moved.bytes, length.min(capacity - model.len()));
                    model.extend(&bytes[..moved.bytes]);
                } else {
                    let mut bytes = vec![0; length];
                    let moved = reader.read(&mut bytes).unwrap();
                    let expected: Vec<u8> = model.drain(..length.min(model.len())).collect();
                    prop_assert_eq!(&bytes[..moved.bytes], &expected);
                }
            }
        }

        #[test]
        fn two_threads_that_sleep_lose_neither_bytes_nor_wake_ups(
            exponent in 0_u32..8,
            written in prop::collection::vec(1_usize..300, 1..20),
            read in prop::collection::vec(1_usize..300, 1..20),
        ) {
            let (writer, reader) = ring(1 << exponent);
            let sent = bytes(500);
            let (wake_reader, reader_bell) = mpsc::channel();
            let (wake_writer, writer_bell) = mpsc::channel();
            let received = std::thread::scope(|scope| {
                scope.spawn(|| send(writer, &written, &sent, wake_reader, writer_bell));
                receive(reader, &read, sent.len(), wake_writer, reader_bell)
            });
            prop_assert!(received == sent);
        }

        #[test]
        fn an_impossible_position_is_an_error(
            written in 0_usize..=64,
            position in prop_oneof![any::<u64>(), 0_u64..200],
        ) {
            let (mut writer, mut reader) = ring(64);
            writer.write(&[IoSlice::new(&bytes(written))]).unwrap();
            let word = |word| writer.segment.word(Direction::Down, word);
            word(Word::Tail).store(position, Relaxed);
            word(Word::Head).store(position, Relaxed);
            // The writer believes what was read, the reader what was written.
            prop_assert_eq!(reader.read(&mut [0; 100]).is_ok(), position <= 64);
            word(Word::Head).store(position, Relaxed);
            prop_assert_eq!(writer.write(&[IoSlice::new(&[0; 100])]).is_ok(), position <= written as u64);
        }
    }

    #[test]
    fn nobody_is_asked_to_wait_for_an_impossible_position() {
        let (mut writer, mut reader) = ring(64);
        assert_eq!(reader.read(&mut [0]).unwrap().bytes, 0);
        assert!(!reader.prepare_to_wait());
        assert_eq!(writer.write(&[IoSlice::new(&[0; 65])]).unwrap().bytes, 64);
        assert!(!writer.prepare_to_wait());
        writer.segment.word(Direction::Down, Word::Tail).store(65, Relaxed);
        writer.segment.word(Direction::Down, Word::Head).store(65, Relaxed);
        assert!(reader.prepare_to_wait() && writer.prepare_to_wait());
    }

    #[test]
    fn a_sleeping_writer_is_woken_when_half_the_ring_is_free() {
        let (mut writer, mut reader) = ring(64);
        writer.write(&[IoSlice::new(&[0; 65])]).unwrap();
        assert!(!writer.prepare_to_wait());
        assert!(!reader.read(&mut [0; 31]).unwrap().peer_waits);
        assert!(reader.read(&mut [0; 1]).unwrap().peer_waits);
        assert!(!reader.read(&mut [0; 1]).unwrap().peer_waits, "once is enough");
    }
}
