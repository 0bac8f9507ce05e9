//! Streams between processes: shared memory with the ranks of the same host, TCP with the others,
//! waited for together.

use std::io::{self, ErrorKind, IoSlice};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use mio::event::Event;
use mio::{Events, Poll, Token};
use units::Rank;

use crate::segment::Segment;
use crate::shared_memory::SharedMemory;
use crate::socket::Socket;
use crate::{Arena, Error, Transport, Waker};

/// The token of the waker; peers have their rank as token.
const WAKER: Token = Token(usize::MAX);

/// How many readiness events are taken at a time; more stay queued in the kernel.
const EVENTS: usize = 256;

/// One rank's streams to its peers in other processes. [`crate::Rendezvous`] makes one.
#[derive(Debug)]
pub struct Interprocess {
    rank: Rank,
    /// Of every rank.
    hosts: Vec<Host>,
    streams: Vec<Option<Stream>>,
    poll: Poll,
    events: Events,
    waker: Arc<mio::Waker>,
    arena: Option<Arc<Arena>>,
}

/// Where a rank is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Host {
    pub name: Arc<str>,
    /// The same for all ranks there.
    pub number: u32,
}

/// The way to a peer.
#[derive(Debug)]
enum Stream {
    Tcp(Socket),
    Shared(SharedMemory),
}

impl Interprocess {
    /// Takes over the connections to every rank but `rank`, which has `None` in its place, each
    /// with the memory that is shared with that peer, if any. `hosts` has every rank's; `arena` is the memory
    /// that all ranks of this host share.
    pub(crate) fn new(
        rank: Rank,
        hosts: Vec<Host>,
        links: Vec<Option<(TcpStream, Option<Segment>)>>,
        arena: Option<Arena>,
    ) -> Result<Self, Error> {
        let poll = Poll::new().map_err(Error::system("create a poll"))?;
        let waker =
            mio::Waker::new(poll.registry(), WAKER).map_err(Error::system("create a waker"))?;
        let stream = |(peer, link): (usize, Option<(TcpStream, Option<Segment>)>)| {
            let Some((socket, segment)) = link else {
                return Ok(None);
            };
            let socket = Socket::register(socket, &poll, Token(peer))?;
            Ok(Some(match segment {
                None => Stream::Tcp(socket),
                Some(segment) => {
                    Stream::Shared(SharedMemory::new(socket, segment, rank.index() < peer))
                }
            }))
        };
        let streams = links.into_iter().enumerate().map(stream).collect::<io::Result<_>>();
        let streams = streams.map_err(Error::system("watch a socket"))?;
        let events = Events::with_capacity(EVENTS);
        let arena = arena.map(Arc::new);
        Ok(Self { rank, hosts, streams, poll, events, waker: Arc::new(waker), arena })
    }

    /// Whether the bytes to and from a peer go through memory rather than TCP.
    #[must_use]
    pub fn shares_memory_with(&self, peer: Rank) -> bool {
        matches!(self.streams.get(peer.index()), Some(Some(Stream::Shared(_))))
    }

    fn stream(&mut self, peer: Rank) -> &mut Stream {
        self.streams[peer.index()].as_mut().expect("a rank has a stream to every rank but itself")
    }

    /// The streams that no event of the operating system tells about.
    fn shared(&mut self) -> impl Iterator<Item = &mut SharedMemory> {
        self.streams.iter_mut().filter_map(|stream| match stream {
            Some(Stream::Shared(shared)) => Some(shared),
            Some(Stream::Tcp(_)) | None => None,
        })
    }
}

impl Stream {
    fn note(&mut self, event: &Event) {
        match self {
            Self::Tcp(socket) => socket.note(event),
            Self::Shared(shared) => shared.note(event),
        }
    }
}

impl Transport for Interprocess {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn ranks(&self) -> u32 {
        self.streams.len() as u32
    }

    fn host_name(&self, rank: Rank) -> Option<Arc<str>> {
        self.hosts.get(rank.index()).map(|host| Arc::clone(&host.name))
    }

    fn host(&self, rank: Rank) -> u32 {
        self.hosts[rank.index()].number
    }

    fn try_write(&mut self, peer: Rank, pieces: &[IoSlice<'_>]) -> Result<usize, Error> {
        let written = match self.stream(peer) {
            Stream::Tcp(socket) => socket.write(pieces),
            Stream::Shared(shared) => shared.write(pieces),
        };
        written.map_err(|error| Error::ended(peer, error))
    }

    fn try_read(&mut self, peer: Rank, into: &mut [u8]) -> Result<usize, Error> {
        let read = match self.stream(peer) {
            Stream::Tcp(socket) => socket.read(into),
            Stream::Shared(shared) => shared.read(into),
        };
        read.map_err(|error| Error::ended(peer, error))
    }

    fn wait(&mut self, timeout: Option<Duration>) -> Result<(), Error> {
        let ready = self.shared().any(|shared| shared.prepare_to_wait());
        let timeout = if ready { Some(Duration::ZERO) } else { timeout };
        let polled = self.poll.poll(&mut self.events, timeout);
        self.shared().for_each(|shared| shared.stop_waiting());
        match polled {
            Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(()),
            polled => polled.map_err(Error::system("wait for the sockets"))?,
        }
        for event in &self.events {
            if let Some(Some(stream)) = self.streams.get_mut(event.token().0) {
                stream.note(event);
            }
        }
        Ok(())
    }

    fn arena(&self) -> Option<Arc<Arena>> {
        self.arena.clone()
    }

    fn waker(&self) -> Waker {
        let waker = Arc::clone(&self.waker);
        // Waking fails only when the poll is gone, and then nobody waits.
        Waker::new(move || drop(waker.wake()))
    }
}
