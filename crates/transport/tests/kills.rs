//! Peers that die in the middle of operations, hundreds of times: nobody hangs, nobody has a wrong sum, and
//! whoever cannot have his sum is told who died, or who knows. `KILLS=1000` does it as many times.
#![allow(clippy::unwrap_used, reason = "a test's helpers may panic as its tests do")]

mod mesh;

use std::sync::Arc;
use std::time::Duration;

use collective::{Algorithm, Collective, Kind};
use mesh::{Disturbed, MakeMesh};
use transport::{Action, Communicator, Error, Group, Limits, Operation, Transport};
use units::Rank;

/// All-reduces that follow each other in a job.
const OPERATIONS: usize = 6;

/// More than that is a hang.
const HANG: Duration = Duration::from_secs(100);

fn kills() -> u64 {
    std::env::var("KILLS").ok().map_or(200, |kills| kills.parse().unwrap())
}

#[test]
fn in_process() {
    kill_many(mesh::in_process, kills(), 1);
}

#[test]
fn tcp() {
    kill_many(mesh::tcp, kills() / 4, 2);
}

#[test]
fn shared_memory() {
    kill_many(mesh::shared_memory, kills() / 4, 3);
}

fn kill_many(make: MakeMesh, kills: u64, salt: u64) {
    let mut survived = [0; 2];
    for seed in 0..kills {
        let seed = (seed << 8 | salt).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for (sum, more) in survived.iter_mut().zip(kill_one(make, seed)) {
            *sum += more;
        }
    }
    let [sums, losses] = survived;
    assert!(
        sums > 0 && losses > 0,
        "{sums} sums and {losses} losses: the kills came too soon or late"
    );
}

/// Kills a rank after a number of bytes by chance; how many sums the others had, and how many losses.
fn kill_one(make: MakeMesh, seed: u64) -> [u64; 2] {
    let ranks = 2 + (seed >> 16) as u32 % 4;
    let victim = Rank((seed >> 24) as u32 % ranks);
    let length = 1 + (seed >> 32) as usize % 3_000;
    // Everything that a rank of a ring sends and receives, and then some.
    let all = (OPERATIONS * 4 * length * 5) as u64;
    let cut_after = 1 + (seed >> 40) % all;
    let ends = make(ranks).into_iter().map(|end| {
        let cut_after = if end.rank() == victim { cut_after } else { u64::MAX };
        Box::new(Disturbed::new(end, seed, cut_after)) as Box<dyn Transport>
    });
    let limits = Limits { wait: HANG, ..Limits::default() };
    let counts = mesh::run(ends.collect(), limits, |communicator| {
        let own = communicator.rank();
        let counts = reduce_until_lost(communicator, length, seed, victim);
        if own == victim { [0, 0] } else { counts }
    });
    counts.into_iter().fold([0, 0], |sum, more| [sum[0] + more[0], sum[1] + more[1]])
}

fn reduce_until_lost(
    mut communicator: Communicator,
    length: usize,
    seed: u64,
    victim: Rank,
) -> [u64; 2] {
    let (own, ranks) = (communicator.rank(), communicator.ranks());
    let world = Group { id: 1, ranks: (0..ranks).map(Rank).collect() };
    let algorithms = [Algorithm::Ring, Algorithm::Direct, Algorithm::HalvingDoubling];
    let post = |index: usize, communicator: &mut Communicator| {
        let algorithm = algorithms[(seed as usize + index) % algorithms.len()].clone();
        let collective = Collective::new(Kind::AllReduce, algorithm, ranks).unwrap();
        let action = Action::Collective(Arc::new(collective.part(own.0)));
        let buffer = (0..length).map(|i| (i % 97 + index + own.index()) as f32).collect();
        let (group, label) = (world.clone(), "sum".into());
        communicator.post(Operation { group, action, buffer, label }).unwrap()
    };
    let tickets: Vec<_> = (0..OPERATIONS).map(|index| post(index, &mut communicator)).collect();
    let mut counts = [0, 0];
    for (index, ticket) in tickets.into_iter().enumerate() {
        match communicator.wait(ticket) {
            Ok(completed) => {
                // Small whole numbers: exact in any order.
                let sum =
                    |i: usize| (0..ranks as usize).map(move |rank| (i % 97 + index + rank) as f32);
                let right = |(i, value): (usize, &f32)| *value == sum(i).sum::<f32>();
                assert!(completed.buffer.iter().enumerate().all(right), "{seed:x}: a wrong sum");
                counts[0] += 1;
            }
            Err(Error::PeerLost { .. }) if own == victim => {}
            Err(Error::PeerLost { peer, reason, .. }) => {
                // The victim may have taken leave of this rank before it was cut off from another.
                let told = reason == format!("it left the job after it had lost {victim}");
                assert!(peer == victim || told, "{seed:x}: blames {peer}, not {victim}: {reason}");
                counts[1] += 1;
            }
            // Of a rank that knows more.
            Err(Error::FailedElsewhere { .. }) => counts[1] += 1,
            Err(error) => panic!("{seed:x}: {error}"),
        }
    }
    counts
}
