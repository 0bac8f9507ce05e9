//! Meshes of every transport, for tests that are the same on all.
#![allow(dead_code, reason = "each test file uses its own part")]

mod disturbed;

use std::net::{Ipv4Addr, TcpListener};
use std::thread;
use std::time::Duration;

use transport::{
    Communicator, Error, InProcess, Interprocess, Limits, Rendezvous, Secret, Transport,
};
use units::Rank;

#[allow(unused_imports, reason = "each test file uses its own part")]
pub use disturbed::{Disturbed, Throttled, disturbed};

/// Makes the ends of a mesh of so many ranks, in rank order.
pub type MakeMesh = fn(u32) -> Vec<Box<dyn Transport>>;

/// A mesh whose pipes hold less than most frames, so that reads and writes are partial.
pub fn in_process(ranks: u32) -> Vec<Box<dyn Transport>> {
    let mesh = InProcess::mesh_with_capacity(ranks, 1_001);
    mesh.into_iter().map(|end| Box::new(end) as Box<dyn Transport>).collect()
}

/// A mesh of loopback sockets.
pub fn tcp(ranks: u32) -> Vec<Box<dyn Transport>> {
    interprocess(ranks, |_| false)
}

/// A mesh of shared memory.
pub fn shared_memory(ranks: u32) -> Vec<Box<dyn Transport>> {
    interprocess(ranks, |_| true)
}

/// A mesh in which one rank has loopback sockets to the others, which share memory.
pub fn mixed(ranks: u32) -> Vec<Box<dyn Transport>> {
    interprocess(ranks, |rank| rank != Rank(1))
}

/// A mesh in which every two ranks share memory that both do; asserts that it is so.
fn interprocess(ranks: u32, shares: fn(Rank) -> bool) -> Vec<Box<dyn Transport>> {
    let ends = meet(vec![String::from("job"); ranks as usize], shares);
    let ends: Vec<_> = ends.into_iter().map(|end| end.unwrap()).collect();
    for end in &ends {
        for peer in (0..ranks).map(Rank).filter(|peer| *peer != end.rank()) {
            assert_eq!(end.shares_memory_with(peer), shares(peer) && shares(end.rank()));
        }
    }
    ends.into_iter().map(|end| Box::new(end) as Box<dyn Transport>).collect()
}

/// What the ranks of a test know.
pub fn secret() -> Secret {
    Secret::new("the secret of a test").unwrap()
}

/// Lets one rank per identity meet on a port that the system chooses.
pub fn meet(identities: Vec<String>, shares: fn(Rank) -> bool) -> Vec<Result<Interprocess, Error>> {
    let ranks = identities.len() as u32;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let timeout = Duration::from_secs(60);
    let mut listener = Some(listener);
    let join = |(rank, identity)| {
        let (rank, shared_memory) = (Rank(rank), shares(Rank(rank)));
        let secret = secret();
        let rendezvous = Rendezvous {
            rank,
            ranks,
            address,
            identity,
            secret,
            timeout,
            shared_memory,
            interface: None,
        };
        let listener = listener.take();
        thread::spawn(move || rendezvous.meet(listener))
    };
    let threads: Vec<_> = (0..).zip(identities).map(join).collect();
    threads.into_iter().map(|thread| thread.join().unwrap()).collect()
}

/// Runs `body` as every rank of a mesh at once; what each returns, in rank order.
#[allow(dead_code, reason = "not every test file that includes this module runs ranks")]
pub fn run<T: Send>(
    mesh: Vec<Box<dyn Transport>>,
    limits: Limits,
    body: impl Fn(Communicator) -> T + Sync,
) -> Vec<T> {
    thread::scope(|scope| {
        let rank = |end| {
            let body = &body;
            scope.spawn(move || body(Communicator::new(end, limits).unwrap()))
        };
        let threads: Vec<_> = mesh.into_iter().map(rank).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// A mesh of messages by MPI.
#[cfg(feature = "mpi")]
pub fn mpi(ranks: u32) -> Vec<Box<dyn Transport>> {
    let mesh = transport::Mpi::mesh(ranks).unwrap();
    mesh.into_iter().map(|end| Box::new(end) as Box<dyn Transport>).collect()
}
