//! How long the ranks of a job take to meet: threads of one process, over loopback sockets.
#![allow(clippy::unwrap_used, reason = "a benchmark may panic")]

use std::net::{Ipv4Addr, TcpListener};
use std::thread;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use transport::{Interprocess, Rendezvous, Secret};
use units::Rank;

fn main() {
    // Each rank has a listener, a poll, a waker and both ends of a connection here.
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    divan::main();
}

#[divan::bench(args = [64, 256, 1024], sample_count = 5, sample_size = 1)]
fn meet(ranks: u32) -> Vec<Interprocess> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let secret = Secret::new("the secret of a benchmark").unwrap();
    let rendezvous = |rank| Rendezvous {
        rank: Rank(rank),
        ranks,
        address,
        identity: "job".into(),
        secret: secret.clone(),
        timeout: Duration::from_secs(60),
        shared_memory: false,
        interface: None,
    };
    let join = |rank| {
        let rendezvous = rendezvous(rank);
        let meet = move || rendezvous.meet(None).unwrap();
        thread::Builder::new().stack_size(256 << 10).spawn(meet).unwrap()
    };
    let others: Vec<_> = (1..ranks).map(join).collect();
    let host = rendezvous(0).meet(Some(listener)).unwrap();
    std::iter::once(host).chain(others.into_iter().map(|other| other.join().unwrap())).collect()
}
