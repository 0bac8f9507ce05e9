//! Processes that belong together find each other; others are refused, and every rank learns why.
#![allow(clippy::unwrap_used, reason = "a test's helpers may panic as its tests do")]

mod mesh;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use collective::{Collective, Kind};
use transport::{Error, Group, Interprocess, Limits, Rendezvous, Secret, Transport};
use units::Rank;

fn rendezvous(rank: u32, ranks: u32, address: SocketAddr) -> Rendezvous {
    let (identity, timeout) = ("job".into(), Duration::from_secs(60));
    let (rank, secret) = (Rank(rank), mesh::secret());
    Rendezvous {
        rank,
        ranks,
        address,
        identity,
        secret,
        timeout,
        shared_memory: true,
        interface: None,
    }
}

fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// Lets several processes join rank 0 at once; rank 0's outcome first.
fn meet(
    host: Rendezvous,
    listener: TcpListener,
    others: Vec<Rendezvous>,
) -> Vec<Result<Interprocess, Error>> {
    let join = |other: Rendezvous| thread::spawn(move || other.meet(None));
    let threads: Vec<_> = others.into_iter().map(join).collect();
    let first = host.meet(Some(listener));
    let others = threads.into_iter().map(|thread| thread.join().unwrap());
    std::iter::once(first).chain(others).collect()
}

/// Who was refused and why, of which every rank has the same account.
fn refusal(outcomes: Vec<Result<Interprocess, Error>>) -> (Rank, String) {
    let mut refusals = outcomes.into_iter().map(|outcome| match outcome {
        Err(Error::Refused { rank, reason }) => (rank, reason),
        other => panic!("expected a refusal, got {other:?}"),
    });
    let first = refusals.next().unwrap();
    assert!(refusals.all(|other| other == first));
    first
}

/// Rank 0 listens at an address of IPv6, so all others do too.
#[test]
fn ranks_reach_each_other_over_ipv6() {
    let listener = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let rank = |rank| Rendezvous { shared_memory: false, ..rendezvous(rank, 3, address) };
    let ends = meet(rank(0), listener, vec![rank(1), rank(2)]);
    let ends = ends.into_iter().map(|end| Box::new(end.unwrap()) as Box<dyn Transport>);
    mesh::run(ends.collect(), Limits::default(), |mut communicator| {
        let (all, ring) = (Group::world(3), Collective::ring(Kind::AllReduce, 3));
        let sum = communicator.run(&all, &ring, vec![1.0; 100_000].into(), "sum").unwrap();
        assert!(sum.iter().all(|element| *element == 3.0));
    });
}

#[test]
fn everyone_learns_which_lines_of_a_job_differ() {
    let job = "[training]\nsequence = 128\nglobal_batch = 8";
    let other = "[training]\nsequence = 256\nglobal_batch = 8";
    let outcomes = mesh::meet(vec![job.into(), job.into(), other.into(), job.into()], |_| true);
    let (rank, reason) = refusal(outcomes);
    assert_eq!(rank, Rank(2));
    let expected =
        "its job differs from rank 0's:\n  rank 0: sequence = 128\n  rank 2: sequence = 256";
    assert_eq!(reason, expected);
}

#[test]
fn two_processes_of_one_rank_are_refused() {
    let (listener, address) = listener();
    let others = vec![rendezvous(1, 3, address), rendezvous(1, 3, address)];
    let (rank, reason) = refusal(meet(rendezvous(0, 3, address), listener, others));
    assert_eq!((rank, &*reason), (Rank(1), "two processes were started with this rank"));
}

#[test]
fn another_world_size_is_refused() {
    let (listener, address) = listener();
    let others = vec![rendezvous(1, 5, address), rendezvous(2, 3, address)];
    let (rank, reason) = refusal(meet(rendezvous(0, 3, address), listener, others));
    assert_eq!((rank, &*reason), (Rank(1), "it was started for 5 ranks, rank 0 for 3"));
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    let (listener, address) = listener();
    let host = Rendezvous { timeout: Duration::from_millis(300), ..rendezvous(0, 3, address) };
    let (rank, reason) = refusal(meet(host, listener, vec![]));
    assert_eq!(rank, Rank(1));
    assert!(reason.contains("ranks missing: 1, 2"), "{reason}");
}

#[test]
fn nobody_listening_is_an_error_with_the_address() {
    let (listener, address) = listener();
    drop(listener);
    let alone = Rendezvous { timeout: Duration::from_millis(50), ..rendezvous(1, 2, address) };
    let Err(Error::Rendezvous { reason, .. }) = alone.meet(None) else {
        panic!("nobody was there")
    };
    assert!(reason.contains(&address.to_string()), "{reason}");
}

#[test]
fn strangers_do_no_harm() {
    let (listener, address) = listener();
    let messages: [&[u8]; 5] = [
        b"",
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        b"PHLX",
        b"PHLX\x02\0\0\0\xff\xff\xff\xff",
        // As long as an answer to the challenge.
        &[b'x'; 72],
    ];
    let strangers: Vec<_> = messages
        .iter()
        .map(|message| {
            let mut stranger = TcpStream::connect(address).unwrap();
            stranger.write_all(message).unwrap();
            stranger
        })
        .collect();
    let others = vec![rendezvous(1, 3, address), rendezvous(2, 3, address)];
    let outcomes = meet(rendezvous(0, 3, address), listener, others);
    assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
    drop(strangers);
}

#[test]
fn a_rank_with_another_secret_is_kept_out_and_both_sides_say_why() {
    let (listener, address) = listener();
    let host = Rendezvous { timeout: Duration::from_millis(500), ..rendezvous(0, 2, address) };
    let secret = Secret::new("the secret of another test").unwrap();
    let other = Rendezvous { secret, ..rendezvous(1, 2, address) };
    let mut outcomes = meet(host, listener, vec![other]).into_iter().map(Result::unwrap_err);
    let at_host = outcomes.next().unwrap().to_string();
    assert!(at_host.contains("connections that were given another secret: 1"), "{at_host}");
    let at_other = outcomes.next().unwrap().to_string();
    assert!(at_other.contains("it was given another secret than this rank"), "{at_other}");
}

#[test]
fn who_is_no_rank_is_told_nothing() {
    let (listener, address) = listener();
    let joining = thread::spawn(move || rendezvous(1, 2, address).meet(None).unwrap_err());
    let (mut joined, _) = listener.accept().unwrap();
    joined.write_all(&[b'x'; 40]).unwrap();
    let reason = joining.join().unwrap().to_string();
    assert!(reason.contains("what listens there is no rank"), "{reason}");
    let mut heard = Vec::new();
    joined.read_to_end(&mut heard).unwrap();
    assert!(heard.is_empty());
}

#[test]
fn a_taken_port_is_named() {
    let (_listener, address) = listener();
    let reason = rendezvous(0, 2, address).meet(None).unwrap_err().to_string();
    assert!(reason.contains(&address.to_string()) && reason.contains("cannot listen"), "{reason}");
}

#[test]
fn a_single_rank_needs_no_network() {
    let (listener, address) = listener();
    drop(listener);
    let alone = rendezvous(0, 1, address).meet(None).unwrap();
    assert_eq!((alone.rank(), alone.ranks()), (Rank(0), 1));
}

#[test]
fn all_interfaces_are_no_address() {
    let everywhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 4_000));
    assert!(matches!(rendezvous(0, 2, everywhere).meet(None), Err(Error::Rendezvous { .. })));
}
