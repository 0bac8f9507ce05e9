//! Streams between processes: non-blocking sockets, waited for together.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use mio::{Events, Interest, Poll, Token};
use units::Rank;

use crate::{Error, Transport, Waker};

/// The token of the waker; peers have their rank as token.
const WAKER: Token = Token(usize::MAX);

/// How many readiness events are taken at a time; more stay queued in the kernel.
const EVENTS: usize = 256;

/// One rank's sockets to its peers. [`crate::Rendezvous`] makes one.
#[derive(Debug)]
pub struct Tcp {
    rank: Rank,
    streams: Vec<Option<Stream>>,
    poll: Poll,
    events: Events,
    waker: Arc<mio::Waker>,
}

/// A socket with what the last calls and events said about its readiness.
#[derive(Debug)]
struct Stream {
    socket: mio::net::TcpStream,
    readable: bool,
    writable: bool,
    /// The peer will send no more: what is left must be read to the end without another event.
    ending: bool,
}

impl Tcp {
    /// Takes over the sockets to every rank but `rank`, which has `None` in its place.
    pub(crate) fn new(rank: Rank, sockets: Vec<Option<TcpStream>>) -> Result<Self, Error> {
        let poll = Poll::new().map_err(Error::system("create a poll"))?;
        let waker =
            mio::Waker::new(poll.registry(), WAKER).map_err(Error::system("create a waker"))?;
        let stream = |(peer, socket): (usize, Option<TcpStream>)| {
            socket.map(|socket| Stream::register(socket, &poll, Token(peer))).transpose()
        };
        let streams = sockets.into_iter().enumerate().map(stream).collect::<Result<_, _>>();
        let streams = streams.map_err(Error::system("watch a socket"))?;
        let events = Events::with_capacity(EVENTS);
        Ok(Self { rank, streams, poll, events, waker: Arc::new(waker) })
    }

    fn stream(&mut self, peer: Rank) -> &mut Stream {
        self.streams[peer.index()].as_mut().expect("a rank has a stream to every rank but itself")
    }
}

impl Stream {
    fn register(socket: TcpStream, poll: &Poll, token: Token) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let mut socket = mio::net::TcpStream::from_std(socket);
        poll.registry().register(&mut socket, token, Interest::READABLE | Interest::WRITABLE)?;
        Ok(Self { socket, readable: true, writable: true, ending: false })
    }

    /// Less than was asked for means full, which saves the call that would only say so.
    fn write(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        if !self.writable {
            return Ok(0);
        }
        let written = none_if_blocked(|| self.socket.write_vectored(pieces));
        // After an error, what the peer sent before it ended is still to be read.
        self.readable |= written.is_err();
        let asked = pieces.iter().map(|piece| piece.len()).sum::<usize>();
        self.writable = matches!(written, Ok(Some(written)) if written == asked);
        Ok(written?.unwrap_or(0))
    }

    /// Less than was asked for means empty, unless the stream is ending.
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if !self.readable {
            return Ok(0);
        }
        let asked = into.len();
        match none_if_blocked(|| self.socket.read(into))? {
            Some(0) if asked > 0 => Err(io::Error::new(ErrorKind::UnexpectedEof, "it hung up")),
            read => {
                let read = read.unwrap_or(0);
                self.readable = read == asked || self.ending;
                Ok(read)
            }
        }
    }
}

/// Repeats an interrupted call; `None` when the call would have blocked.
fn none_if_blocked(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<Option<usize>> {
    loop {
        match call() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            moved => return moved.map(Some),
        }
    }
}

impl Transport for Tcp {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn ranks(&self) -> u32 {
        self.streams.len() as u32
    }

    fn try_write(&mut self, peer: Rank, pieces: &[IoSlice<'_>]) -> Result<usize, Error> {
        self.stream(peer).write(pieces).map_err(|error| Error::ended(peer, error))
    }

    fn try_read(&mut self, peer: Rank, into: &mut [u8]) -> Result<usize, Error> {
        self.stream(peer).read(into).map_err(|error| Error::ended(peer, error))
    }

    fn wait(&mut self, timeout: Option<Duration>) -> Result<(), Error> {
        match self.poll.poll(&mut self.events, timeout) {
            Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(()),
            polled => polled.map_err(Error::system("wait for the sockets"))?,
        }
        for event in &self.events {
            let Some(Some(stream)) = self.streams.get_mut(event.token().0) else {
                continue;
            };
            stream.readable |= event.is_readable();
            stream.writable |= event.is_writable();
            stream.ending |= event.is_read_closed() || event.is_error();
        }
        Ok(())
    }

    fn waker(&self) -> Waker {
        let waker = Arc::clone(&self.waker);
        // Waking fails only when the poll is gone, and then nobody waits.
        Waker::new(move || drop(waker.wake()))
    }
}
