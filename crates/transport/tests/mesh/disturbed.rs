//! A network that is late, in pieces, and gone when least expected: streams whose every call moves what
//! seeded chance lets it, and that end after so many bytes if they are told to; and a stream that is slow.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::io::IoSlice;
use std::time::{Duration, Instant};

use transport::{Error, Transport, Waker};
use units::Rank;

/// One rank's streams, disturbed.
pub struct Disturbed {
    /// `None` once it is cut: dropped as by a process that is killed.
    inner: Option<Box<dyn Transport>>,
    waker: Waker,
    rank: Rank,
    ranks: u32,
    state: u64,
    /// Something was withheld that is there.
    owes: bool,
    /// How many bytes move before the cut.
    left: u64,
}

impl Disturbed {
    /// Delays by the seed, and cuts all streams once so many bytes have moved.
    pub fn new(inner: Box<dyn Transport>, seed: u64, cut_after: u64) -> Self {
        let (rank, ranks, waker) = (inner.rank(), inner.ranks(), inner.waker());
        let state = seed ^ u64::from(rank.0 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Self { inner: Some(inner), waker, rank, ranks, state, owes: false, left: cut_after }
    }

    /// Pseudo-random below a bound (SplitMix64).
    fn below(&mut self, bound: usize) -> usize {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % bound.max(1) as u64) as usize
    }

    /// How much of so many bytes may move now.
    fn grant(&mut self, asked: usize) -> usize {
        let granted = match self.below(4) {
            0 => 0,
            1 => self.below(asked + 1),
            _ => asked,
        };
        self.owes |= granted < asked;
        granted.min(self.left as usize)
    }

    fn count(&mut self, moved: usize) -> usize {
        self.left -= moved as u64;
        if self.left == 0 {
            self.inner = None;
        }
        moved
    }

    fn inner(&mut self, peer: Rank) -> Result<&mut Box<dyn Transport>, Error> {
        let reason = "it was cut".into();
        self.inner.as_mut().ok_or(Error::StreamEnded { peer, reason })
    }
}

impl Transport for Disturbed {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn ranks(&self) -> u32 {
        self.ranks
    }

    fn checks(&self, _peer: Rank) -> bool {
        true
    }

    fn try_write(&mut self, peer: Rank, pieces: &[IoSlice<'_>]) -> Result<usize, Error> {
        let mut granted = self.grant(pieces.iter().map(|piece| piece.len()).sum());
        let cut = |piece: &IoSlice<'_>| {
            let length = piece.len().min(granted);
            granted -= length;
            length
        };
        let lengths: Vec<_> = pieces.iter().map(cut).collect();
        let pieces: Vec<_> = pieces
            .iter()
            .zip(lengths)
            .map(|(piece, length)| IoSlice::new(&piece[..length]))
            .collect();
        let written = self.inner(peer)?.try_write(peer, &pieces)?;
        Ok(self.count(written))
    }

    fn try_read(&mut self, peer: Rank, into: &mut [u8]) -> Result<usize, Error> {
        let granted = self.grant(into.len());
        let read = self.inner(peer)?.try_read(peer, &mut into[..granted])?;
        Ok(self.count(read))
    }

    fn wait(&mut self, timeout: Option<Duration>) -> Result<(), Error> {
        let timeout = if std::mem::take(&mut self.owes) { Some(Duration::ZERO) } else { timeout };
        match &mut self.inner {
            Some(inner) => inner.wait(timeout),
            None => Ok(()),
        }
    }

    fn waker(&self) -> Waker {
        self.waker.clone()
    }
}

/// A mesh of in-memory pipes that is late and in pieces.
pub fn disturbed(ranks: u32) -> Vec<Box<dyn Transport>> {
    let ends = super::in_process(ranks).into_iter();
    ends.map(|end| Box::new(Disturbed::new(end, 7, u64::MAX)) as Box<dyn Transport>).collect()
}

/// One rank's streams, of which the one to a peer is slow: it takes so many bytes a second.
pub struct Throttled {
    inner: Box<dyn Transport>,
    slow: Rank,
    bytes_per_s: f64,
    begin: Instant,
    sent: usize,
    owes: bool,
}

impl Throttled {
    pub fn new(inner: Box<dyn Transport>, slow: Rank, bytes_per_s: f64) -> Self {
        Self { inner, slow, bytes_per_s, begin: Instant::now(), sent: 0, owes: false }
    }
}

impl Transport for Throttled {
    fn rank(&self) -> Rank {
        self.inner.rank()
    }

    fn ranks(&self) -> u32 {
        self.inner.ranks()
    }

    fn try_write(&mut self, peer: Rank, pieces: &[IoSlice<'_>]) -> Result<usize, Error> {
        if peer != self.slow {
            return self.inner.try_write(peer, pieces);
        }
        let due = (self.bytes_per_s * self.begin.elapsed().as_secs_f64()) as usize;
        let mut left = due.saturating_sub(self.sent);
        let cut = |piece: &IoSlice<'_>| {
            let length = piece.len().min(left);
            left -= length;
            length
        };
        let lengths: Vec<_> = pieces.iter().map(cut).collect();
        self.owes = lengths.iter().sum::<usize>() < pieces.iter().map(|piece| piece.len()).sum();
        let pieces = pieces.iter().zip(lengths);
        let pieces: Vec<_> = pieces.map(|(piece, length)| IoSlice::new(&piece[..length])).collect();
        let written = self.inner.try_write(peer, &pieces)?;
        self.sent += written;
        Ok(written)
    }

    fn try_read(&mut self, peer: Rank, into: &mut [u8]) -> Result<usize, Error> {
        self.inner.try_read(peer, into)
    }

    fn wait(&mut self, timeout: Option<Duration>) -> Result<(), Error> {
        let soon = Some(Duration::from_millis(1));
        self.inner.wait(if std::mem::take(&mut self.owes) { soon } else { timeout })
    }

    fn waker(&self) -> Waker {
        self.inner.waker()
    }
}
