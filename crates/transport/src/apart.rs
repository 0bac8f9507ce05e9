//! Ranks of one host as if they were on several.

use std::io::IoSlice;
use std::sync::Arc;
use std::time::Duration;

use units::Rank;

use crate::{Error, Transport, Waker};

/// A transport on which each so many neighbouring ranks pass for a host, so that what is done between hosts can be
/// tried and measured on one. The ranks share no arena.
pub struct Apart {
    inner: Box<dyn Transport>,
    ranks_per_host: u32,
}

impl Apart {
    /// The same streams, with so many ranks to a host.
    ///
    /// # Panics
    /// When `ranks_per_host` is 0.
    #[must_use]
    pub fn new(inner: Box<dyn Transport>, ranks_per_host: u32) -> Self {
        assert!(ranks_per_host > 0, "a host has ranks");
        Self { inner, ranks_per_host }
    }
}

impl Transport for Apart {
    fn rank(&self) -> Rank {
        self.inner.rank()
    }

    fn ranks(&self) -> u32 {
        self.inner.ranks()
    }

    fn host_name(&self, rank: Rank) -> Option<Arc<str>> {
        self.inner.host_name(rank)
    }

    fn host(&self, rank: Rank) -> u32 {
        rank.0 / self.ranks_per_host
    }

    fn is_connected(&self, peer: Rank) -> bool {
        self.inner.is_connected(peer)
    }

    fn try_write(&mut self, peer: Rank, pieces: &[IoSlice<'_>]) -> Result<usize, Error> {
        self.inner.try_write(peer, pieces)
    }

    fn try_read(&mut self, peer: Rank, into: &mut [u8]) -> Result<usize, Error> {
        self.inner.try_read(peer, into)
    }

    fn wait(&mut self, timeout: Option<Duration>) -> Result<(), Error> {
        self.inner.wait(timeout)
    }

    fn waker(&self) -> Waker {
        self.inner.waker()
    }
}
