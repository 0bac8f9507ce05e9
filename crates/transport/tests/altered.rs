//! A byte that changes on the way between two hosts ends the operation, and is never added up.
#![allow(clippy::unwrap_used, reason = "a test's helpers may panic as its tests do")]

mod mesh;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use collective::{Collective, Kind};
use transport::{Action, Communicator, Error, Group, Limits, Operation, Rendezvous};
use units::Rank;

const ELEMENTS: usize = 1 << 20;
const NEVER: usize = usize::MAX;

/// Passes on what comes, and changes one bit of what follows the next `spoil` bytes.
fn relay(to: SocketAddr, spoil: Arc<AtomicUsize>) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        let (near, _) = listener.accept().unwrap();
        let far = TcpStream::connect(to).unwrap();
        let (back, home) = (far.try_clone().unwrap(), near.try_clone().unwrap());
        thread::spawn(move || pass_on(&back, &home, &AtomicUsize::new(NEVER)));
        pass_on(&near, &far, &spoil);
    });
    address
}

fn pass_on(mut from: &TcpStream, mut to: &TcpStream, spoil: &AtomicUsize) {
    let mut piece = vec![0; 1 << 16];
    while let Ok(length @ 1..) = from.read(&mut piece) {
        let clean = spoil.load(Ordering::Acquire);
        if clean < length {
            piece[clean] ^= 1 << 6;
            spoil.store(NEVER, Ordering::Release);
        } else if clean != NEVER {
            spoil.store(clean - length, Ordering::Release);
        }
        if to.write_all(&piece[..length]).is_err() {
            break;
        }
    }
    // Who ends the other side ends this one.
    drop(to.shutdown(Shutdown::Write));
}

fn meet(rank: u32, address: SocketAddr, listener: Option<TcpListener>) -> Communicator {
    let rendezvous = Rendezvous {
        rank: Rank(rank),
        ranks: 2,
        address,
        identity: "job".into(),
        secret: mesh::secret(),
        timeout: Duration::from_secs(60),
        shared_memory: false,
        interface: None,
    };
    let end = rendezvous.meet(listener).unwrap();
    Communicator::new(Box::new(end), Limits::default()).unwrap()
}

/// The sum of what both ranks have: each sends half of its buffer, and then a half of the sum.
fn all_reduce(communicator: &mut Communicator) -> Result<Vec<f32>, Error> {
    let rank = communicator.rank();
    let part = Collective::ring(Kind::AllReduce, 2).part(rank.0);
    let ticket = communicator
        .post(Operation {
            group: Group::world(2),
            action: Action::Collective(Arc::new(part)),
            buffer: vec![1.0 + rank.0 as f32; ELEMENTS],
            label: "gradients".into(),
        })
        .unwrap();
    Ok(communicator.wait(ticket)?.buffer)
}

#[test]
fn a_byte_that_changes_on_the_way_is_a_lost_peer_and_never_summed() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let spoil = Arc::new(AtomicUsize::new(NEVER));
    let way = relay(address, Arc::clone(&spoil));
    let (told, spoiling) = mpsc::channel();
    let other = thread::spawn(move || {
        let mut communicator = meet(1, way, None);
        for _ in 0..3 {
            assert!(all_reduce(&mut communicator).unwrap() == vec![3.0; ELEMENTS]);
        }
        spoiling.recv().unwrap();
        // It may have all that it needs before the other leaves, of which it then hears.
        let last = all_reduce(&mut communicator);
        assert!(last.is_err() || last == Ok(vec![3.0; ELEMENTS]));
        assert!(all_reduce(&mut communicator).is_err());
    });
    let mut communicator = meet(0, address, Some(listener));
    for _ in 0..3 {
        assert!(all_reduce(&mut communicator).unwrap() == vec![3.0; ELEMENTS]);
    }
    // In the second half, which cannot come before this rank has posted and sent: until then what comes
    // has no label.
    spoil.store(3 * ELEMENTS, Ordering::Release);
    told.send(()).unwrap();
    let error = all_reduce(&mut communicator).unwrap_err();
    let Error::PeerLost { peer: Rank(1), host: Some(_), sequence: 3, reason, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(
        reason,
        "what it sent for `gradients` (number 3 of its group) was altered on the way"
    );
    drop(communicator);
    other.join().unwrap();
}
