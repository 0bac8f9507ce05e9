//! What the machine itself can do, as a measure for what is made of it.

use std::hint::{black_box, spin_loop};
use std::sync::atomic::Ordering::{Acquire, Release};
use std::time::Instant;

use collective::{Collective, Kind};
use units::{Bytes, BytesPerSecond, Seconds};

use crate::arena::Own;
use crate::{Arena, Communicator, Error, Group, reduction};

/// How large each of the two arrays is that are added up: from what a core's own cache holds to what only
/// memory does.
const SIZES: [Bytes; 6] = [
    Bytes(32 << 10),
    Bytes(512 << 10),
    Bytes(2 << 20),
    Bytes(8 << 20),
    Bytes(32 << 20),
    Bytes(128 << 20),
];

/// How many times a cache line goes back and forth for one figure.
const ROUND_TRIPS: u64 = 2_000;

/// How many barriers are timed together.
const BARRIERS: u32 = 200;

/// How many figures the median is taken of.
const REPEATS: usize = 5;

/// The limits that a machine sets to collectives among ranks of one host.
#[derive(Debug, Clone, PartialEq)]
pub struct Probe {
    /// The time that a cache line takes from one rank to another and back.
    pub round_trip: Seconds,
    /// The time in which all ranks have heard of each other, so that some wait for a core if there are fewer.
    pub barrier: Seconds,
    /// By the size of each of two arrays: how fast one rank, and as many ranks as there are cores together,
    /// add one to the other, in bytes of one of them.
    pub reduce: Vec<(Bytes, BytesPerSecond, BytesPerSecond)>,
    /// The cores that a rank may run on.
    pub cores: u32,
}

impl Probe {
    /// How fast all cores together move bytes when all ranks have buffers of this size, of which each core works
    /// on its share, half read and half written: the sum reads two arrays and writes one.
    fn traffic(&self, ranks: u32, size: Bytes) -> BytesPerSecond {
        let share = f64::from(ranks) * size.as_f64() / f64::from(2 * ranks.min(self.cores));
        let distance = |size: Bytes| (size.as_f64() / share).ln().abs();
        let nearest = self.reduce.iter().min_by(|a, b| distance(a.0).total_cmp(&distance(b.0)));
        nearest.map_or(BytesPerSecond::ZERO, |(_, _, all)| BytesPerSecond(3.0 * all.0))
    }

    /// The least time that any algorithm takes for a collective on a buffer of this size: a cache line goes
    /// one way, and every byte is read and written once where it must be.
    ///
    /// # Panics
    /// For kinds that [`Probe::traffic_of`] does not know.
    #[must_use]
    pub fn limit(&self, kind: Kind, ranks: u32, size: Bytes) -> Seconds {
        let moved = Self::traffic_of(kind, ranks, size) / self.traffic(ranks, size);
        Seconds(self.round_trip.0 / 2.0).max(moved)
    }

    /// What an algorithm of so many rounds is expected to take that moves no byte more than it must.
    ///
    /// # Panics
    /// As [`Probe::limit`].
    #[must_use]
    pub fn predict(&self, kind: Kind, ranks: u32, size: Bytes, rounds: u32) -> Seconds {
        let moved = Self::traffic_of(kind, ranks, size) / self.traffic(ranks, size);
        self.barrier * f64::from(rounds) + moved
    }

    /// The bytes that are read and written at least, by all ranks together, in place. The size is that of the
    /// whole buffer on a rank.
    ///
    /// # Panics
    /// For other kinds than all-reduce, reduce-scatter and all-gather.
    #[must_use]
    pub fn traffic_of(kind: Kind, ranks: u32, size: Bytes) -> Bytes {
        let ranks = u64::from(ranks);
        match kind {
            // All buffers are read, and written.
            Kind::AllReduce => size * (2 * ranks),
            // All buffers are read, and a block written on every rank.
            Kind::ReduceScatter => size * (ranks + 1),
            // Every rank reads the blocks of the others and writes them.
            Kind::AllGather => size * (2 * (ranks - 1)),
            other => panic!("the least traffic of {other} is not known"),
        }
    }
}

impl Communicator {
    /// Measures the limits of this machine; `None` where the group's ranks do not share memory. All ranks of
    /// the group call it. It takes a fraction of a second.
    ///
    /// # Errors
    /// As [`Communicator::wait`].
    pub fn probe(&mut self, group: &Group) -> Result<Option<Probe>, Error> {
        let Some(arena) = self.arena_of(group) else {
            return Ok(None);
        };
        let member = group.member(self.rank()).expect("a rank probes with its own groups");
        let cores = self.cores();
        self.barrier_at_once(group)?;
        let mut round_trip = Seconds::ZERO;
        if member < 2 && group.ranks.len() > 1 {
            let peer = arena.place(group.ranks[1 - member as usize]);
            round_trip = ping_pong(&arena, peer.expect("the ranks share the arena"), member == 0);
        }
        let barrier = self.time_of_barriers(group)?;
        let mut reduce = Vec::new();
        for size in SIZES {
            let one = self.add_together(group, size, member < 1)?;
            let all = self.add_together(group, size, member < cores)?;
            reduce.push((size, one, all));
        }
        let mut shared = vec![round_trip.0 as f32, barrier.0 as f32];
        shared.extend(reduce.iter().flat_map(|(_, one, all)| [one.0 as f32, all.0 as f32]));
        let broadcast = Collective::direct(Kind::Broadcast, group.ranks.len() as u32);
        self.run_on(group, &broadcast, &mut shared, "limits of the machine")?;
        let rate = |index: usize| BytesPerSecond(f64::from(shared[index]));
        let reduce =
            (0..SIZES.len()).map(|i| (SIZES[i], rate(2 + 2 * i), rate(3 + 2 * i))).collect();
        let [round_trip, barrier] = [shared[0], shared[1]].map(|time| Seconds(f64::from(time)));
        Ok(Some(Probe { round_trip, barrier, reduce, cores }))
    }

    /// Returns once all ranks of a group have called it, by the fastest way there is.
    ///
    /// # Errors
    /// As [`Communicator::wait`].
    pub fn barrier_at_once(&mut self, group: &Group) -> Result<(), Error> {
        let barrier = Collective::direct(Kind::Barrier, group.ranks.len() as u32);
        self.run_on(group, &barrier, &mut [], "barrier")
    }

    fn time_of_barriers(&mut self, group: &Group) -> Result<Seconds, Error> {
        let mut times = Vec::new();
        for _ in 0..REPEATS {
            let start = Instant::now();
            for _ in 0..BARRIERS {
                self.barrier_at_once(group)?;
            }
            times.push(Seconds(start.elapsed().as_secs_f64() / f64::from(BARRIERS)));
        }
        Ok(Seconds::median(times))
    }

    /// How fast those ranks of a group that take part add arrays, together.
    fn add_together(
        &mut self,
        group: &Group,
        size: Bytes,
        takes_part: bool,
    ) -> Result<BytesPerSecond, Error> {
        let elements = if takes_part { size.0 as usize / 4 } else { 0 };
        let (mut sum, more) = (vec![1.0_f32; elements], vec![0.5_f32; elements]);
        let passes = ((8 << 20) / size.0).max(1);
        let mut times = Vec::new();
        for _ in 0..REPEATS {
            self.barrier_at_once(group)?;
            if takes_part {
                let start = Instant::now();
                for _ in 0..passes {
                    reduction::add(black_box(&mut sum), black_box(&more));
                }
                times.push(Seconds(start.elapsed().as_secs_f64() / passes as f64));
            }
        }
        let rate = if takes_part { size.as_f64() / Seconds::median(times).0 } else { 0.0 };
        let sum = self.all_reduce(group, vec![rate as f32].into(), "speed of addition")?;
        Ok(BytesPerSecond(f64::from(sum[0])))
    }
}

/// How long a cache line takes to a peer, which calls this too, and back.
fn ping_pong(arena: &Arena, peer: usize, serves: bool) -> Seconds {
    let (own, theirs) = (arena.of(arena.own(), Own::Ball), arena.of(peer, Own::Ball));
    let mut ball = own.load(Acquire);
    let mut times = Vec::new();
    for _ in 0..REPEATS {
        let start = Instant::now();
        for _ in 0..ROUND_TRIPS {
            ball += 1;
            if serves {
                own.store(ball, Release);
            }
            let mut spins = 0_u32;
            while theirs.load(Acquire) < ball {
                spins += 1;
                spin_loop();
                // The two may be on one core.
                if spins.is_multiple_of(4096) {
                    std::thread::yield_now();
                }
            }
            if !serves {
                own.store(ball, Release);
            }
        }
        times.push(Seconds(start.elapsed().as_secs_f64() / ROUND_TRIPS as f64));
    }
    Seconds::median(times)
}
