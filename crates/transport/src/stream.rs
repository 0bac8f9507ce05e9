//! The seam to the world: a rank's byte streams to its peers.

use std::fmt;
use std::io::IoSlice;
use std::sync::Arc;
use std::time::Duration;

use collective::Contract;
use units::Rank;

use crate::{Arena, Error, Group};

/// One rank's byte streams, one in each direction with every peer, driven by one thread.
///
/// Readiness is told by edges: once a call moved less than it was asked to, the stream is full
/// (empty), and [`Transport::wait`] returns when that has changed. So a caller tries until it gets
/// less than it asked for before it waits.
pub trait Transport: Send {
    /// The rank whose streams these are.
    fn rank(&self) -> Rank;

    /// The number of ranks in the job, this one included.
    fn ranks(&self) -> u32;

    /// What a rank's host is called, where that is known.
    fn host_name(&self, _rank: Rank) -> Option<Arc<str>> {
        None
    }

    /// A number for a rank's host, the same for all ranks there.
    fn host(&self, _rank: Rank) -> u32 {
        0
    }

    /// Whether there is a stream with a peer by now. If not, the first write has it made, which takes no byte
    /// before it is there, or the peer does so; [`Transport::wait`] returns then.
    fn is_connected(&self, _peer: Rank) -> bool {
        true
    }

    /// Whether what travels to and from a connected peer is to be compared with checksums: it goes through
    /// more hands than memory's. Both ends say the same.
    fn checks(&self, _peer: Rank) -> bool {
        false
    }

    /// Writes as much of `pieces`, one after the other, as the stream takes now; how many bytes.
    ///
    /// # Errors
    /// [`Error::StreamEnded`] once the peer can no longer receive. What it sent before may still be
    /// read.
    fn try_write(&mut self, peer: Rank, pieces: &[IoSlice<'_>]) -> Result<usize, Error>;

    /// Reads what there is, at most `into`; how many bytes.
    ///
    /// # Errors
    /// [`Error::StreamEnded`] once everything was read and nothing more will come.
    fn try_read(&mut self, peer: Rank, into: &mut [u8]) -> Result<usize, Error>;

    /// Blocks until a stream may have become ready, the waker was called, or `timeout` has passed.
    /// It may return early.
    ///
    /// # Errors
    /// [`Error::System`] when the operating system cannot wait, after which nothing works.
    fn wait(&mut self, timeout: Option<Duration>) -> Result<(), Error>;

    /// The memory that this rank shares with all other ranks of its host, if there is some.
    fn arena(&self) -> Option<Arc<Arena>> {
        None
    }

    /// Collectives of the engine that carries the streams, if it has some.
    fn native(&self) -> Option<Arc<dyn Native>> {
        None
    }

    /// A handle with which another thread ends a [`Transport::wait`], the current or else the next.
    fn waker(&self) -> Waker;
}

/// Collectives that another engine carries out by algorithms of its own, on the calling thread.
pub trait Native: fmt::Debug + Send + Sync {
    /// What it is called.
    fn name(&self) -> &'static str;

    /// Carries out a group's collective of this contract; whether it can. The order of additions is the
    /// engine's.
    ///
    /// All ranks of the group call this, with as many elements, in the same order.
    ///
    /// # Errors
    /// [`Error::System`] with what the engine says.
    fn run(
        &self,
        group: &Group,
        contract: &Contract,
        elements: &mut [f32],
        share: Share<'_>,
    ) -> Result<bool, Error>;
}

/// Hands all ranks of a group what the first of them says, by our own streams.
pub type Share<'a> = &'a mut dyn FnMut(&[u8]) -> Result<Vec<u8>, Error>;

/// Ends a [`Transport::wait`] from another thread.
#[derive(Clone)]
pub struct Waker(Arc<dyn Fn() + Send + Sync>);

impl Waker {
    /// A waker that calls `wake`.
    pub fn new(wake: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(wake))
    }

    /// Ends the wait.
    pub fn wake(&self) {
        (self.0)();
    }
}

impl fmt::Debug for Waker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Waker")
    }
}
