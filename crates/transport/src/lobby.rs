//! Where a listening rank receives connections: each is heard out, however slowly it speaks, and
//! only whoever says a whole message of this protocol is let through.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use mio::{Events, Interest, Poll, Token};

use crate::message::{PREFIX_BYTES, read_prefix};

/// How many connections may be waiting with an incomplete message; beyond, the oldest is dropped.
const GUEST_LIMIT: usize = 16 << 10;

const LISTENER: Token = Token(usize::MAX);

/// A connection that has said a whole message.
pub(crate) struct Guest {
    /// The connection, blocking, with nothing read beyond the message.
    pub socket: TcpStream,
    pub version: u32,
    pub body: Vec<u8>,
}

/// A listener and the connections that have not said a whole message yet.
pub(crate) struct Lobby {
    poll: Poll,
    events: Events,
    listener: mio::net::TcpListener,
    guests: BTreeMap<usize, Speaking>,
    next_token: usize,
    /// Guests with bytes to read.
    ready: Vec<usize>,
}

/// A connection in the middle of its message.
struct Speaking {
    socket: mio::net::TcpStream,
    said: Vec<u8>,
}

impl Lobby {
    pub(crate) fn new(listener: TcpListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let mut listener = mio::net::TcpListener::from_std(listener);
        let poll = Poll::new()?;
        poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
        let (events, guests) = (Events::with_capacity(64), BTreeMap::new());
        Ok(Self { poll, events, listener, guests, next_token: 0, ready: Vec::new() })
    }

    /// The next connection that has said a whole message; `None` once the deadline has passed.
    pub(crate) fn next(&mut self, deadline: Instant) -> io::Result<Option<Guest>> {
        loop {
            while let Some(token) = self.ready.pop() {
                if let Some(guest) = self.hear(token)? {
                    return Ok(Some(guest));
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.wait(left)?;
        }
    }

    fn wait(&mut self, limit: Duration) -> io::Result<()> {
        match self.poll.poll(&mut self.events, Some(limit)) {
            Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(()),
            polled => polled?,
        }
        let tokens: Vec<_> = self.events.iter().map(|event| event.token()).collect();
        if tokens.contains(&LISTENER) {
            self.accept()?;
        }
        self.ready.extend(tokens.iter().filter(|token| **token != LISTENER).map(|token| token.0));
        Ok(())
    }

    fn accept(&mut self) -> io::Result<()> {
        loop {
            let mut socket = match self.listener.accept() {
                Ok((socket, _)) => socket,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                // The connection went away before it was accepted.
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => continue,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let token = self.next_token;
            self.next_token += 1;
            self.poll.registry().register(&mut socket, Token(token), Interest::READABLE)?;
            self.guests.insert(token, Speaking { socket, said: Vec::new() });
            if self.guests.len() > GUEST_LIMIT {
                self.guests.pop_first();
            }
        }
    }

    /// Hears a guest; whoever hangs up or says anything else is dropped.
    fn hear(&mut self, token: usize) -> io::Result<Option<Guest>> {
        let Some(speaking) = self.guests.get_mut(&token) else {
            return Ok(None);
        };
        let heard = speaking.hear();
        if matches!(heard, Ok(None)) {
            return Ok(None);
        }
        let Some(mut speaking) = self.guests.remove(&token) else {
            return Ok(None);
        };
        let Ok(Some(version)) = heard else {
            return Ok(None);
        };
        self.poll.registry().deregister(&mut speaking.socket)?;
        let socket = TcpStream::from(speaking.socket);
        socket.set_nonblocking(false)?;
        // A guest that has just gone is found out when it is spoken to.
        drop(socket.set_nodelay(true));
        Ok(Some(Guest { socket, version, body: speaking.said.split_off(PREFIX_BYTES) }))
    }
}

impl Speaking {
    /// Reads what there is, but nothing beyond the message; its version once it is whole.
    fn hear(&mut self) -> io::Result<Option<u32>> {
        loop {
            let (version, total) = match self.said.first_chunk() {
                None => (0, PREFIX_BYTES),
                Some(start) => {
                    let (version, length) = read_prefix(start).ok_or(ErrorKind::InvalidData)?;
                    (version, PREFIX_BYTES + length)
                }
            };
            let missing = total - self.said.len();
            if missing == 0 {
                return Ok(Some(version));
            }
            match (&mut self.socket).take(missing as u64).read_to_end(&mut self.said) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }
}
