//! A stream between two processes of one host: bytes go through rings in shared memory, the socket
//! between them carries wake-ups and tells when the peer is gone.

use std::io::{self, IoSlice};
use std::sync::Arc;

use mio::event::Event;

use crate::ring::{Reader, Writer};
use crate::segment::{Direction, Segment};
use crate::socket::Socket;

/// One end of the memory that two ranks share.
#[derive(Debug)]
pub(crate) struct SharedMemory {
    /// What bytes it carries means nothing, only that they come.
    socket: Socket,
    writer: Writer,
    reader: Reader,
}

impl SharedMemory {
    /// The end of the lower or the higher rank of the two.
    pub(crate) fn new(socket: Socket, segment: Segment, is_lower: bool) -> Self {
        let (to, from) = match is_lower {
            true => (Direction::Up, Direction::Down),
            false => (Direction::Down, Direction::Up),
        };
        let segment = Arc::new(segment);
        let writer = Writer::new(Arc::clone(&segment), to);
        Self { socket, writer, reader: Reader::new(segment, from) }
    }

    /// Takes note of an event of the socket.
    pub(crate) fn note(&mut self, event: &Event) {
        self.socket.note(event);
    }

    pub(crate) fn write(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        self.hear()?;
        let moved = self.writer.write(pieces)?;
        self.wake_if(moved.peer_waits);
        Ok(moved.bytes)
    }

    pub(crate) fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        // Looked at first: all that the peer wrote before its end is then in the ring.
        let end = self.hear().err();
        let moved = self.reader.read(into)?;
        self.wake_if(moved.peer_waits);
        match end {
            Some(end) if moved.bytes == 0 && !into.is_empty() => Err(end),
            _ => Ok(moved.bytes),
        }
    }

    /// Asks the peer for a wake-up when a ring becomes ready that was not; true if one already is.
    pub(crate) fn prepare_to_wait(&mut self) -> bool {
        self.reader.prepare_to_wait() || self.writer.prepare_to_wait()
    }

    /// Takes the request back.
    pub(crate) fn stop_waiting(&mut self) {
        self.reader.stop_waiting();
        self.writer.stop_waiting();
    }

    /// Takes in the wake-ups that have come; an error once the peer is gone.
    fn hear(&mut self) -> io::Result<()> {
        self.socket.read(&mut [0; 64]).map(drop)
    }

    /// A full socket holds wake-ups that the peer has yet to take, and a broken one fails the next
    /// [`SharedMemory::hear`], so that neither matters here.
    fn wake_if(&mut self, peer_waits: bool) {
        if peer_waits {
            drop(self.socket.write(&[IoSlice::new(&[0])]));
        }
    }
}
