//! A process that is killed or stopped in the middle of a transfer is a lost peer, whatever the
//! transport.
#![allow(clippy::unwrap_used, reason = "a test's helpers may panic as its tests do")]

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use transport::{
    Action, Communicator, Error, Group, Limits, Operation, Rendezvous, Secret, Ticket,
};
use units::{Bytes, Rank};

/// Names where rank 0 listens, to the process that is to be killed.
const ADDRESS: &str = "PHALANX_TEST_ADDRESS";

/// More than any buffer between two ranks holds, in elements.
const LENGTH: usize = 8 << 20;

/// How long a stopped process may be silent.
const SILENCE: Duration = Duration::from_secs(1);

#[test]
fn killed_over_shared_memory() {
    check("killed_over_shared_memory", true, Signal::KILL);
}

#[test]
fn killed_over_tcp() {
    check("killed_over_tcp", false, Signal::KILL);
}

#[test]
fn stopped_over_shared_memory() {
    check("stopped_over_shared_memory", true, Signal::STOP);
}

#[test]
fn stopped_over_tcp() {
    check("stopped_over_tcp", false, Signal::STOP);
}

/// Runs the test as rank 0, or as the other process, which gets the signal, when it is that.
fn check(test: &str, shared_memory: bool, signal: Signal) {
    if let Ok(address) = std::env::var(ADDRESS) {
        return send_until_killed(meet(Rank(1), address.parse().unwrap(), shared_memory, None));
    }
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test])
        .env(ADDRESS, address.to_string())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut communicator = meet(Rank(0), address, shared_memory, Some(listener));
    let receive = Action::Receive { from: Rank(1) };
    let first = post(&mut communicator, 0, receive.clone());
    assert!(communicator.wait(first).unwrap().buffer == vec![1.0; LENGTH]);
    // It posts no receive for these: one frame it keeps, the next one the kill finds under way.
    let kept = post(&mut communicator, 0, Action::Send { to: Rank(1) });
    let sent = post(&mut communicator, 0, Action::Send { to: Rank(1) });
    kill_process(Pid::from_child(&child), signal).unwrap();
    drop(communicator.wait(kept));
    match signal {
        Signal::KILL => lost(communicator.wait(sent)),
        // The kernel may have taken all of it for a process that is only stopped.
        _ => drop(communicator.wait(sent)),
    }
    // On a group on which nothing was sent.
    let later = post(&mut communicator, 2, receive);
    lost(communicator.wait(later));
    // A stopped one is still there.
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Sends some, then waits for what never comes.
fn send_until_killed(mut communicator: Communicator) {
    let sends = [(); 3].map(|()| post(&mut communicator, 0, Action::Send { to: Rank(0) }));
    sends.into_iter().for_each(|ticket| drop(communicator.wait(ticket)));
    let never = post(&mut communicator, 1, Action::Receive { from: Rank(0) });
    drop(communicator.wait(never));
}

fn meet(
    rank: Rank,
    address: SocketAddr,
    shared_memory: bool,
    listener: Option<TcpListener>,
) -> Communicator {
    let (identity, timeout) = ("job".into(), Duration::from_secs(60));
    let secret = Secret::new("the secret of a test").unwrap();
    let rendezvous = Rendezvous {
        rank,
        ranks: 2,
        address,
        identity,
        secret,
        timeout,
        shared_memory,
        interface: None,
    };
    let transport = rendezvous.meet(listener).unwrap();
    assert_eq!(transport.shares_memory_with(Rank(1 - rank.0)), shared_memory);
    let early = if rank == Rank(1) { Bytes(1) } else { Limits::default().early };
    let heartbeat = Duration::from_millis(50);
    let limits = Limits { early, heartbeat, silence: SILENCE, ..Limits::default() };
    Communicator::new(Box::new(transport), limits).unwrap()
}

fn post(communicator: &mut Communicator, group: u64, action: Action) -> Ticket {
    let group = Group { id: group, ranks: [Rank(0), Rank(1)].into() };
    let (buffer, label) = (vec![1.0; LENGTH], "transfer".into());
    communicator.post(Operation { group, action, buffer, label }).unwrap()
}

fn lost(outcome: Result<transport::Completed, Error>) {
    assert!(matches!(outcome, Err(Error::PeerLost { peer: Rank(1), .. })), "{outcome:?}");
}
