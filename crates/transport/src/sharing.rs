//! Which ranks share memory, and how they come to: once all are connected, the lower rank of each pair on
//! one host offers memory and the higher one says whether it could open it. If anything is in the way, the
//! two go on over TCP. Then the lowest rank of the host offers memory that all map, or nobody does.

use std::io;
use std::net::TcpStream;
use std::time::Instant;

use serde::Serialize;
use units::Rank;

use crate::Arena;
use crate::arena::MOST_RANKS;
use crate::message::{receive, send};
use crate::segment::{Location, Segment};

/// The most memory that all ranks of a host share with each other, in bytes.
const HOST_BYTES: u64 = 256 << 20;

/// The largest ring in bytes. From 256 KiB on, more is hardly faster while both ranks run, but lets
/// one go on for longer while the other does not.
const LARGEST_RING: u64 = 4 << 20;

/// The smallest ring in bytes that is worth more than TCP.
const SMALLEST_RING: u64 = 64 << 10;

/// What tells two hosts apart; two containers of one host differ too if neither sees the other's
/// processes. `None` where that cannot be found out.
pub(crate) fn host() -> Option<String> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let processes = std::fs::read_link("/proc/self/ns/pid").ok()?;
    Some(format!("{} {}", boot.trim(), processes.display()))
}

/// The pairs of one rank that are to share memory.
pub(crate) struct Pairs<'a> {
    pub rank: Rank,
    /// A number that other jobs do not have.
    pub job: u64,
    /// The host of each rank, if it is willing to share.
    pub hosts: &'a [Option<String>],
    /// The connections to the other ranks, blocking.
    pub sockets: &'a [Option<TcpStream>],
    pub deadline: Instant,
}

impl Pairs<'_> {
    /// Sets up what can be shared; the memory by peer.
    ///
    /// # Errors
    /// When a peer does not answer: who has it, the rank and what happened.
    pub(crate) fn share(&self) -> Result<Vec<Option<Segment>>, (Rank, io::Error)> {
        let mut segments: Vec<_> = self.sockets.iter().map(|_| None).collect();
        let Some(capacity) = self.capacity() else {
            return Ok(segments);
        };
        // All offer, then all answer: nobody waits for someone who waits.
        let mut offered = Vec::new();
        for (peer, socket) in self.neighbours().filter(|(peer, _)| *peer > self.rank) {
            let made = Segment::create(self.mark(peer), capacity).ok();
            let offer = made.as_ref().map(|(_, file)| Location::of(file));
            self.tell(peer, socket, &offer)?;
            offered.push((peer, socket, made));
        }
        for (peer, socket) in self.neighbours().filter(|(peer, _)| *peer < self.rank) {
            let offer: Option<Location> = self.hear(peer, socket)?;
            let open = |at| Segment::open(at, self.mark(peer), capacity).ok();
            segments[peer.index()] = offer.and_then(open);
            let answer = segments[peer.index()].is_some();
            self.tell(peer, socket, &answer)?;
        }
        for (peer, socket, made) in offered {
            let accepted: bool = self.hear(peer, socket)?;
            segments[peer.index()] = made.map(|(segment, _)| segment).filter(|_| accepted);
        }
        Ok(segments)
    }

    /// Sets up the memory that all willing ranks of this host share; none if it cannot be had by all.
    ///
    /// # Errors
    /// As [`Pairs::share`].
    pub(crate) fn share_arena(&self) -> Result<Option<Arena>, (Rank, io::Error)> {
        let peers: Vec<_> = self.neighbours().collect();
        let mut ranks: Vec<_> = peers.iter().map(|(peer, _)| *peer).chain([self.rank]).collect();
        ranks.sort_unstable();
        if !(2..=MOST_RANKS).contains(&ranks.len()) {
            return Ok(None);
        }
        let own = ranks.partition_point(|rank| *rank < self.rank);
        if own > 0 {
            let (leader, socket) = peers[0];
            let offer: Option<Location> = self.hear(leader, socket)?;
            let arena = offer.and_then(|at| Arena::open(at, self.job, ranks, own).ok());
            self.tell(leader, socket, &arena.is_some())?;
            let everyone: bool = self.hear(leader, socket)?;
            return Ok(arena.filter(|_| everyone));
        }
        let arena = Arena::create(self.job, ranks, own).ok();
        let offer = arena.as_ref().map(Arena::location);
        for (peer, socket) in &peers {
            self.tell(*peer, socket, &offer)?;
        }
        let mut everyone = arena.is_some();
        for (peer, socket) in &peers {
            everyone &= self.hear::<bool>(*peer, socket)?;
        }
        for (peer, socket) in &peers {
            self.tell(*peer, socket, &everyone)?;
        }
        Ok(arena.filter(|_| everyone))
    }

    fn tell(
        &self,
        peer: Rank,
        socket: &TcpStream,
        message: &impl Serialize,
    ) -> Result<(), (Rank, io::Error)> {
        send(socket, message, self.deadline).map_err(|error| (peer, error))
    }

    fn hear<T: serde::de::DeserializeOwned>(
        &self,
        peer: Rank,
        socket: &TcpStream,
    ) -> Result<T, (Rank, io::Error)> {
        receive(socket, self.deadline).map_err(|error| (peer, error))
    }

    /// The peers on this rank's host, if both are willing.
    fn neighbours(&self) -> impl Iterator<Item = (Rank, &TcpStream)> {
        let own = self.hosts[self.rank.index()].as_ref();
        let peers = (0..).map(Rank).zip(self.hosts).zip(self.sockets);
        peers.filter_map(move |((peer, host), socket)| {
            (host.is_some() && host.as_ref() == own).then_some((peer, socket.as_ref()?))
        })
    }

    fn capacity(&self) -> Option<usize> {
        ring_capacity(self.neighbours().count() as u64 + 1)
    }

    /// The same for both ranks of a pair, and for no other pair.
    fn mark(&self, peer: Rank) -> u64 {
        let (lower, higher) = (self.rank.min(peer), self.rank.max(peer));
        self.job ^ (u64::from(lower.0) << 32 | u64::from(higher.0))
    }
}

/// The size of each ring in bytes when every two of so many ranks share two; `None` when memory is
/// not worth it.
fn ring_capacity(ranks: u64) -> Option<usize> {
    let rings = (ranks * (ranks - 1)).max(1);
    let share = (HOST_BYTES / rings).clamp(1, LARGEST_RING);
    (share >= SMALLEST_RING).then_some(1 << share.ilog2())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_shrink_with_the_number_of_ranks_and_then_give_way_to_tcp() {
        let capacities = [1, 2, 8, 16, 32, 64, 65, 24_576].map(ring_capacity);
        let kib = [4096, 4096, 4096, 1024, 256, 64, 0, 0_usize];
        assert_eq!(capacities, kib.map(|kib| (kib > 0).then_some(kib << 10)));
        for ranks in 2..100 {
            let rings = ranks * (ranks - 1) * ring_capacity(ranks).unwrap_or(0) as u64;
            assert!(rings <= HOST_BYTES, "{ranks} ranks");
        }
    }
}
