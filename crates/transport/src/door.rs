//! How two ranks come to be connected after the rendezvous: when one has something for the other, it connects
//! to where the other listens, and both prove to know the secret as ever.
//!
//! Connecting takes a few messages back and forth, for which a thread of its own waits; being connected to
//! takes part in the rank's other events, so that nobody waits for somebody who waits. If two connect to each
//! other at once, the connection that the lower rank made holds.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use mio::event::Event;
use serde::{Deserialize, Serialize};
use socket2::{Domain, Socket, Type};
use units::Rank;

use crate::handshake::{self, Secret};
use crate::lobby::{Guest, Lobby};
use crate::message::{VERSION, receive, send, time_left};
use crate::segment::{Location, Segment};
use crate::sharing::Neighbours;

/// How long a peer that listens may take to let this rank in.
const DIAL_LIMIT: Duration = Duration::from_secs(30);

/// The kind of error of a network interface that cannot be used: trying again is of no use.
pub(crate) const INTERFACE: io::ErrorKind = io::ErrorKind::InvalidInput;

/// A connection, blocking, and the memory that the two ranks share beside it.
pub(crate) type Link = (TcpStream, Option<Segment>);

/// What a rank knows of the others.
#[derive(Debug, Clone)]
pub(crate) struct Directory {
    pub rank: Rank,
    /// A number that other jobs do not have.
    pub job: u64,
    pub secret: Secret,
    /// By rank: where it listens.
    pub addresses: Vec<SocketAddr>,
    pub neighbours: Neighbours,
    /// The network interface to use, unless the kernel is to choose.
    pub interface: Option<Arc<str>>,
}

/// What a rank says to a peer that it connects to.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Greeting {
    job: u64,
    pub rank: Rank,
    /// Memory to use in place of the connection.
    memory: Option<Location>,
}

/// What it is answered.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    /// Come in, with the memory or without.
    Welcome { memory: bool },
    /// A connection from here to there is being made, which holds.
    Crossed,
}

/// Where the connection to a peer stands.
#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Closed,
    Dialed,
    Open,
    Failed(String),
}

/// Makes a rank's connections, and lets its peers make theirs.
#[derive(Debug)]
pub(crate) struct Door {
    directory: Arc<Directory>,
    /// None where everyone is connected from the beginning.
    lobby: Option<Lobby>,
    /// By rank.
    states: Vec<State>,
    wanted: Option<Sender<Rank>>,
    dialed: (Sender<Dialed>, Receiver<Dialed>),
    waker: Arc<mio::Waker>,
}

/// What became of an attempt; nothing if the peer's own holds.
type Dialed = (Rank, io::Result<Option<Link>>);

impl Directory {
    /// Connects to a peer; `None` if the peer's own attempt holds.
    fn dial(&self, peer: Rank) -> io::Result<Option<Link>> {
        let deadline = Instant::now() + DIAL_LIMIT;
        let address = self.addresses[peer.index()];
        let socket = connect(address, self.interface.as_deref(), deadline)?;
        handshake::connect(&socket, &self.secret, deadline)?;
        self.greet(socket, peer, deadline)
    }

    /// Introduces this rank on a new connection.
    pub(crate) fn greet(
        &self,
        socket: TcpStream,
        peer: Rank,
        deadline: Instant,
    ) -> io::Result<Option<Link>> {
        let ring = self.neighbours.ring(self.rank, peer);
        // Without the memory there is still the connection.
        let made = ring.and_then(|bytes| Segment::create(self.mark(peer), bytes).ok());
        let memory = made.as_ref().map(|(_, file)| Location::of(file));
        send(&socket, &Greeting { job: self.job, rank: self.rank, memory }, deadline)?;
        Ok(match receive(&socket, deadline)? {
            Answer::Crossed => None,
            Answer::Welcome { memory } => {
                Some((socket, made.map(|(segment, _)| segment).filter(|_| memory)))
            }
        })
    }

    /// Takes a greeting on a connection that is wanted.
    pub(crate) fn welcome(
        &self,
        socket: TcpStream,
        greeting: &Greeting,
        deadline: Instant,
    ) -> io::Result<Link> {
        let ring = self.neighbours.ring(self.rank, greeting.rank);
        let segment = ring.zip(greeting.memory).and_then(|(bytes, location)| {
            Segment::open(location, self.mark(greeting.rank), bytes).ok()
        });
        send(&socket, &Answer::Welcome { memory: segment.is_some() }, deadline)?;
        Ok((socket, segment))
    }

    /// What a guest says, if it is a peer of this job.
    pub(crate) fn greeting(&self, guest: &Guest) -> Option<Greeting> {
        let greeting: Greeting = serde_json::from_slice(&guest.body).ok()?;
        let Greeting { job, rank, .. } = greeting;
        let is_peer = rank != self.rank && rank.index() < self.addresses.len();
        (guest.version == VERSION && job == self.job && is_peer).then_some(greeting)
    }

    /// The same for both ranks of a pair, and for no other pair.
    fn mark(&self, peer: Rank) -> u64 {
        let (lower, higher) = (self.rank.min(peer), self.rank.max(peer));
        self.job ^ (u64::from(lower.0) << 32 | u64::from(higher.0))
    }
}

impl Door {
    pub(crate) fn new(directory: Directory, lobby: Option<Lobby>, waker: Arc<mio::Waker>) -> Self {
        let states = vec![State::Closed; directory.addresses.len()];
        let directory = Arc::new(directory);
        Self { directory, lobby, states, wanted: None, dialed: mpsc::channel(), waker }
    }

    pub(crate) fn directory(&self) -> &Directory {
        &self.directory
    }

    /// Notes that a peer is connected by other means.
    pub(crate) fn opened(&mut self, peer: Rank) {
        self.states[peer.index()] = State::Open;
    }

    /// Why a peer cannot be reached, if it was tried.
    pub(crate) fn failure(&self, peer: Rank) -> Option<&str> {
        match &self.states[peer.index()] {
            State::Failed(reason) => Some(reason),
            State::Closed | State::Dialed | State::Open => None,
        }
    }

    /// Sees to it that a peer is connected, some time.
    pub(crate) fn dial(&mut self, peer: Rank) {
        if self.states[peer.index()] != State::Closed {
            return;
        }
        let asked = self.wanted().and_then(|wanted| {
            wanted.send(peer).map_err(|_| io::Error::other("nobody connects any more"))
        });
        self.states[peer.index()] =
            asked.map_or_else(|error| State::Failed(error.to_string()), |()| State::Dialed);
    }

    /// The way to the thread that connects, which is started with the first peer.
    fn wanted(&mut self) -> io::Result<&Sender<Rank>> {
        if self.wanted.is_none() {
            let (wanted, peers) = mpsc::channel::<Rank>();
            let (directory, waker) = (Arc::clone(&self.directory), Arc::clone(&self.waker));
            let dialed = self.dialed.0.clone();
            let connect = move || {
                for peer in peers {
                    if dialed.send((peer, directory.dial(peer))).is_err() {
                        return;
                    }
                    // Waking fails only when the poll is gone, and then nobody waits.
                    drop(waker.wake());
                }
            };
            thread::Builder::new()
                .name(format!("connections of {}", self.directory.rank))
                .spawn(connect)?;
            self.wanted = Some(wanted);
        }
        self.wanted.as_ref().ok_or_else(|| io::Error::other("nobody connects"))
    }

    /// Takes note of an event of those who come.
    pub(crate) fn note(&mut self, event: &Event) {
        if let Some(lobby) = &mut self.lobby {
            lobby.note(event);
        }
    }

    /// A connection that was made since, if any; never blocks.
    pub(crate) fn next(&mut self) -> Option<(Rank, Link)> {
        while let Ok((peer, outcome)) = self.dialed.1.try_recv() {
            let state = &mut self.states[peer.index()];
            match outcome {
                Ok(Some(link)) => {
                    *state = State::Open;
                    return Some((peer, link));
                }
                // The peer's own attempt arrives some time.
                Ok(None) => {}
                Err(_) if *state == State::Open => {}
                Err(error) => {
                    let address = self.directory.addresses[peer.index()];
                    *state = State::Failed(format!("cannot connect to it at {address}: {error}"));
                }
            }
        }
        // Without a descriptor left nobody can be let in now; whoever comes next may be.
        while let Some(guest) = self.lobby.as_mut().and_then(|lobby| lobby.next().ok().flatten()) {
            if let Some(made) = self.let_in(guest) {
                return Some(made);
            }
        }
        None
    }

    /// Hears a guest out; who is not expected is left standing.
    fn let_in(&mut self, guest: Guest) -> Option<(Rank, Link)> {
        let greeting = self.directory.greeting(&guest)?;
        let (peer, deadline) = (greeting.rank, Instant::now() + DIAL_LIMIT);
        let state = &mut self.states[peer.index()];
        match state {
            State::Open | State::Failed(_) => None,
            State::Dialed if self.directory.rank < peer => {
                drop(send(&guest.socket, &Answer::Crossed, deadline));
                None
            }
            State::Closed | State::Dialed => {
                let link = self.directory.welcome(guest.socket, &greeting, deadline).ok()?;
                *state = State::Open;
                Some((peer, link))
            }
        }
    }
}

/// Connects a socket, by an interface if one is named. The sizes of its buffers are left to the kernel, which
/// adapts them to several MB; setting them would cap them at a limit that is often smaller.
pub(crate) fn connect(
    address: SocketAddr,
    interface: Option<&str>,
    deadline: Instant,
) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    if let Some(interface) = interface {
        let named = |error: io::Error| {
            io::Error::new(INTERFACE, format!("network interface `{interface}`: {error}"))
        };
        socket.bind_device(Some(interface.as_bytes())).map_err(named)?;
    }
    socket.connect_timeout(&address.into(), time_left(deadline)?)?;
    socket.set_tcp_nodelay(true)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use proptest::prelude::*;

    use super::*;

    fn directory() -> Directory {
        Directory {
            rank: Rank(1),
            job: 7,
            secret: Secret::new("the secret of a test").unwrap(),
            addresses: vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 1)); 4],
            neighbours: Neighbours(vec![Some(0); 4]),
            interface: None,
        }
    }

    fn said(body: Vec<u8>) -> Guest {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        Guest { socket, version: VERSION, body }
    }

    #[test]
    fn only_peers_of_the_job_are_let_in() {
        let greeting = |job, rank| serde_json::to_vec(&Greeting { job, rank, memory: None });
        let let_in =
            |job, rank| directory().greeting(&said(greeting(job, Rank(rank)).unwrap())).is_some();
        assert!(let_in(7, 0) && let_in(7, 3));
        assert!(!let_in(8, 0), "another job");
        assert!(!let_in(7, 1) && !let_in(7, 4), "this rank, and none");
        let old = Guest { version: VERSION - 1, ..said(greeting(7, Rank(0)).unwrap()) };
        assert!(directory().greeting(&old).is_none());
    }

    #[test]
    fn an_interface_that_is_not_there_is_named() {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
        let error = connect(address, Some("none0"), Instant::now() + DIAL_LIMIT).unwrap_err();
        assert_eq!(error.kind(), INTERFACE);
        assert!(error.to_string().contains("`none0`"), "{error}");
    }

    proptest! {
        #[test]
        fn whatever_a_guest_says_is_a_greeting_of_a_peer_or_none(
            random in prop::collection::vec(any::<u8>(), 0..200),
            at in any::<prop::sample::Index>(),
            byte: u8,
            ours: bool,
        ) {
            let memory = "{\"process\":1,\"descriptor\":2}";
            let mut body = format!("{{\"job\":7,\"rank\":3,\"memory\":{memory}}}").into_bytes();
            if ours {
                let at = at.index(body.len());
                body[at] = byte;
            } else {
                body = random;
            }
            if let Some(greeting) = directory().greeting(&said(body)) {
                prop_assert!(greeting.job == 7 && greeting.rank != Rank(1) && greeting.rank.0 < 4);
            }
        }
    }
}
