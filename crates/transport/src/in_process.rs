//! Streams between the threads of one process: bounded pipes in memory.

use std::collections::VecDeque;
use std::io::{IoSlice, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use units::Rank;

use crate::signal::Signal;
use crate::{Error, Transport, Waker};

/// How many bytes a pipe of [`InProcess::mesh`] holds.
const PIPE_BYTES: usize = 1 << 20;

/// One rank's end of a mesh of in-memory pipes. Dropping it ends its streams.
#[derive(Debug)]
pub struct InProcess {
    rank: Rank,
    /// By peer; a rank's pipe to itself stays empty.
    to: Vec<Arc<Pipe>>,
    from: Vec<Arc<Pipe>>,
    signals: Vec<Arc<Signal>>,
}

impl InProcess {
    /// The ends of a full mesh of `ranks` ranks, in rank order.
    #[must_use]
    pub fn mesh(ranks: u32) -> Vec<Self> {
        Self::mesh_with_capacity(ranks, PIPE_BYTES)
    }

    /// A mesh whose pipes hold `capacity` bytes each; small ones show what partial reads and writes
    /// do.
    ///
    /// # Panics
    /// When `capacity` is 0.
    #[must_use]
    pub fn mesh_with_capacity(ranks: u32, capacity: usize) -> Vec<Self> {
        assert!(capacity > 0, "a pipe of no capacity never moves a byte");
        let all = 0..ranks as usize;
        let signals: Vec<Arc<Signal>> = all.clone().map(|_| Arc::default()).collect();
        let row = || all.clone().map(|_| Arc::new(Pipe::new(capacity))).collect::<Vec<_>>();
        let pipes: Vec<_> = all.clone().map(|_| row()).collect();
        let end = |rank: usize| Self {
            rank: Rank(rank as u32),
            to: pipes[rank].clone(),
            from: pipes.iter().map(|row| Arc::clone(&row[rank])).collect(),
            signals: signals.clone(),
        };
        all.map(end).collect()
    }
}

impl Transport for InProcess {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn ranks(&self) -> u32 {
        self.to.len() as u32
    }

    fn try_write(&mut self, peer: Rank, pieces: &[IoSlice<'_>]) -> Result<usize, Error> {
        let mut pipe = self.to[peer.index()].lock();
        if pipe.closed {
            return Err(Error::ended(peer, "it closed the pipe"));
        }
        let was_empty = pipe.bytes.is_empty();
        let written = pieces.iter().map(|piece| pipe.push(piece)).sum();
        if was_empty && written > 0 {
            self.signals[peer.index()].raise();
        }
        Ok(written)
    }

    fn try_read(&mut self, peer: Rank, into: &mut [u8]) -> Result<usize, Error> {
        let mut pipe = self.from[peer.index()].lock();
        if pipe.closed && pipe.bytes.is_empty() {
            return Err(Error::ended(peer, "it closed the pipe"));
        }
        let was_full = pipe.bytes.len() == pipe.capacity;
        let read = pipe.pop(into);
        if was_full && read > 0 {
            self.signals[peer.index()].raise();
        }
        Ok(read)
    }

    fn wait(&mut self, timeout: Option<Duration>) -> Result<(), Error> {
        self.signals[self.rank.index()].wait(timeout);
        Ok(())
    }

    fn waker(&self) -> Waker {
        let signal = Arc::clone(&self.signals[self.rank.index()]);
        Waker::new(move || signal.raise())
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        self.to.iter().chain(&self.from).for_each(|pipe| pipe.lock().closed = true);
        self.signals.iter().for_each(|signal| signal.raise());
    }
}

/// Bytes on their way from one rank to another.
#[derive(Debug)]
struct Pipe(Mutex<Contents>);

#[derive(Debug)]
struct Contents {
    bytes: VecDeque<u8>,
    capacity: usize,
    closed: bool,
}

impl Pipe {
    fn new(capacity: usize) -> Self {
        Self(Mutex::new(Contents { bytes: VecDeque::new(), capacity, closed: false }))
    }

    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.0.lock().expect("nothing panics while it holds a pipe")
    }
}

impl Contents {
    fn push(&mut self, piece: &[u8]) -> usize {
        let room = self.capacity - self.bytes.len();
        self.bytes.write(&piece[..piece.len().min(room)]).expect("writing to memory succeeds")
    }

    /// The contents may wrap around in memory, hence two reads.
    fn pop(&mut self, into: &mut [u8]) -> usize {
        let first = self.bytes.read(into).expect("reading from memory succeeds");
        first + self.bytes.read(&mut into[first..]).expect("reading from memory succeeds")
    }
}
