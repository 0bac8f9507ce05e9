//! Which ranks share memory, and how those of a host come to share some that all map: the lowest rank there
//! offers it, and all use it or nobody does.

use std::io;
use std::net::TcpStream;
use std::time::Instant;

use units::Rank;

use crate::Arena;
use crate::arena::MOST_RANKS;
use crate::message::{receive, send};
use crate::segment::Location;

/// The most memory that all ranks of a host share pair by pair, in bytes.
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

/// By rank: the number of its host, if it is willing to share memory there.
#[derive(Debug, Clone)]
pub(crate) struct Neighbours(pub Vec<Option<u32>>);

impl Neighbours {
    /// The size of each of the two rings that a pair is to share, the same for all pairs of a host.
    pub(crate) fn ring(&self, rank: Rank, peer: Rank) -> Option<usize> {
        let here = self.of(rank);
        here.contains(&peer).then(|| ring_capacity(here.len() as u64)).flatten()
    }

    /// The ranks, in order, that are to share an arena with a rank, itself among them; none if it is not
    /// worth while, or too many.
    pub(crate) fn arena(&self, rank: Rank) -> Option<Vec<Rank>> {
        Some(self.of(rank)).filter(|ranks| (2..=MOST_RANKS).contains(&ranks.len()))
    }

    /// The willing ranks of a rank's host, in order; none if it is not willing itself.
    fn of(&self, rank: Rank) -> Vec<Rank> {
        let own = self.0[rank.index()];
        let ranks = (0..).map(Rank).zip(&self.0);
        ranks.filter(|(_, host)| own.is_some() && **host == own).map(|(rank, _)| rank).collect()
    }
}

/// Makes the memory that all `ranks` of a host are to share and offers it to all others, the peers.
///
/// # Errors
/// When a peer does not answer: which, and what happened.
pub(crate) fn offer_arena(
    job: u64,
    ranks: Vec<Rank>,
    peers: &[(Rank, &TcpStream)],
    deadline: Instant,
) -> Result<Option<Arena>, (Rank, io::Error)> {
    let arena = Arena::create(job, ranks, 0).ok();
    let offer = arena.as_ref().map(Arena::location);
    let tell = |word: &dyn Fn(&TcpStream) -> io::Result<()>| {
        peers.iter().try_for_each(|(peer, socket)| word(socket).map_err(|error| (*peer, error)))
    };
    tell(&|socket| send(socket, &offer, deadline))?;
    let mut everyone = arena.is_some();
    for (peer, socket) in peers {
        everyone &= receive::<bool>(socket, deadline).map_err(|error| (*peer, error))?;
    }
    tell(&|socket| send(socket, &everyone, deadline))?;
    Ok(arena.filter(|_| everyone))
}

/// Takes up the offer of the lowest rank of the host.
///
/// # Errors
/// When it does not come.
pub(crate) fn join_arena(
    job: u64,
    ranks: Vec<Rank>,
    own: Rank,
    leader: &TcpStream,
    deadline: Instant,
) -> io::Result<Option<Arena>> {
    let own = ranks.partition_point(|rank| *rank < own);
    let offer: Option<Location> = receive(leader, deadline)?;
    let arena = offer.and_then(|at| Arena::open(at, job, ranks, own).ok());
    send(leader, &arena.is_some(), deadline)?;
    let everyone: bool = receive(leader, deadline)?;
    Ok(arena.filter(|_| everyone))
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

    #[test]
    fn willing_ranks_of_a_host_share_memory() {
        let neighbours = Neighbours(vec![Some(0), Some(1), None, Some(0), Some(1), Some(2)]);
        let arena = |rank| neighbours.arena(Rank(rank));
        assert_eq!(
            [arena(3), arena(1)],
            [Some(vec![Rank(0), Rank(3)]), Some(vec![Rank(1), Rank(4)])]
        );
        assert_eq!([arena(2), arena(5)], [None, None]);
        let ring = |rank, peer| neighbours.ring(Rank(rank), Rank(peer));
        assert!(ring(0, 3).is_some() && ring(0, 3) == ring(3, 0));
        assert_eq!([ring(0, 1), ring(2, 3), ring(3, 2), ring(2, 5)], [None; 4]);
    }
}
