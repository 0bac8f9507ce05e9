//! Streams between processes: shared memory with the ranks of the same host, TCP with the others,
//! waited for together. Most are made when they are first written to.

use std::io::{ErrorKind, IoSlice};
use std::sync::Arc;
use std::time::Duration;

use mio::event::Event;
use mio::{Events, Poll, Token};
use units::Rank;

use crate::door::{Door, Link};
use crate::shared_memory::SharedMemory;
use crate::socket::Socket;
use crate::{Arena, Error, Transport, Waker};

/// The token of the waker; peers have their rank as token, and the door those above.
pub(crate) const WAKER: Token = Token(usize::MAX);

/// How many readiness events are taken at a time; more stay queued in the kernel.
const EVENTS: usize = 256;

/// One rank's streams to its peers in other processes. [`crate::Rendezvous`] makes one.
#[derive(Debug)]
pub struct Interprocess {
    rank: Rank,
    /// Of every rank.
    hosts: Vec<Host>,
    /// By rank; none with this rank itself, and those that are still to be made.
    streams: Vec<Option<Stream>>,
    door: Door,
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
    /// Takes over the connections that there are, and the door by which more come; `hosts` has every rank's,
    /// `arena` is the memory that all ranks of this host share. The waker is that of the poll.
    pub(crate) fn new(
        poll: Poll,
        waker: Arc<mio::Waker>,
        hosts: Vec<Host>,
        door: Door,
        links: Vec<(Rank, Link)>,
        arena: Option<Arena>,
    ) -> Result<Self, Error> {
        let (rank, streams) = (door.directory().rank, hosts.iter().map(|_| None).collect());
        let (events, arena) = (Events::with_capacity(EVENTS), arena.map(Arc::new));
        let mut made = Self { rank, hosts, streams, door, poll, events, waker, arena };
        for (peer, link) in links {
            made.open(peer, link)?;
        }
        Ok(made)
    }

    fn open(&mut self, peer: Rank, (socket, segment): Link) -> Result<(), Error> {
        let socket = Socket::register(socket, &self.poll, Token(peer.index()));
        let socket = socket.map_err(Error::system("watch a socket"))?;
        self.streams[peer.index()] = Some(match segment {
            None => Stream::Tcp(socket),
            Some(segment) => Stream::Shared(SharedMemory::new(socket, segment, self.rank < peer)),
        });
        self.door.opened(peer);
        Ok(())
    }

    /// Whether the bytes to and from a peer go through memory rather than TCP; before there is a stream, whether
    /// they are meant to.
    #[must_use]
    pub fn shares_memory_with(&self, peer: Rank) -> bool {
        match &self.streams[peer.index()] {
            Some(stream) => matches!(stream, Stream::Shared(_)),
            None => self.door.directory().neighbours.ring(self.rank, peer).is_some(),
        }
    }

    /// The stream with a peer, if it is there by now.
    ///
    /// # Errors
    /// When there will never be one.
    fn stream(&mut self, peer: Rank) -> Result<Option<&mut Stream>, Error> {
        match &mut self.streams[peer.index()] {
            Some(stream) => Ok(Some(stream)),
            None => match self.door.failure(peer) {
                Some(reason) => Err(Error::ended(peer, reason)),
                None => Ok(None),
            },
        }
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

    fn is_connected(&self, peer: Rank) -> bool {
        self.streams[peer.index()].is_some()
    }

    fn checks(&self, peer: Rank) -> bool {
        matches!(self.streams[peer.index()], Some(Stream::Tcp(_)))
    }

    fn try_write(&mut self, peer: Rank, pieces: &[IoSlice<'_>]) -> Result<usize, Error> {
        let written = match self.stream(peer)? {
            Some(Stream::Tcp(socket)) => socket.write(pieces),
            Some(Stream::Shared(shared)) => shared.write(pieces),
            None => {
                self.door.dial(peer);
                Ok(0)
            }
        };
        written.map_err(|error| Error::ended(peer, error))
    }

    fn try_read(&mut self, peer: Rank, into: &mut [u8]) -> Result<usize, Error> {
        let read = match self.stream(peer)? {
            Some(Stream::Tcp(socket)) => socket.read(into),
            Some(Stream::Shared(shared)) => shared.read(into),
            None => Ok(0),
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
            match self.streams.get_mut(event.token().0) {
                Some(Some(stream)) => stream.note(event),
                Some(None) => {}
                None => self.door.note(event),
            }
        }
        while let Some((peer, link)) = self.door.next() {
            self.open(peer, link)?;
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
