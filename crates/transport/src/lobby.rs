//! Where a listening rank receives connections: each is heard out, however slowly it speaks, and
//! only whoever proves to know the job's secret and then says a whole message is let through.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

use mio::event::Event;
use mio::{Events, Interest, Poll, Registry, Token};
use socket2::SockRef;

use crate::handshake::{self, ANSWER_BYTES, Challenge, Secret};
use crate::message::{PREFIX_BYTES, read_prefix};

/// How many connections may be waiting with an incomplete message beside those of all ranks; beyond, the oldest
/// is dropped.
const STRANGERS_LIMIT: usize = 256;

/// How many connections may wait to be accepted; the kernel may make it fewer.
const BACKLOG: i32 = 4096;

/// The token of the listener, beyond those of ranks; those of guests follow.
const LISTENER: usize = 1 << 32;

/// A connection that has said a whole message.
pub(crate) struct Guest {
    /// The connection, blocking, with nothing read beyond the message.
    pub socket: TcpStream,
    /// The version of the protocol that it speaks.
    pub version: u32,
    pub body: Vec<u8>,
}

/// A listener and the connections that have not said a whole message yet, watched by a poll.
#[derive(Debug)]
pub(crate) struct Lobby {
    registry: Registry,
    listener: mio::net::TcpListener,
    secret: Secret,
    guests: BTreeMap<usize, Speaking>,
    /// How many may be waiting.
    room: usize,
    next_token: usize,
    /// Somebody may be waiting to be accepted.
    knocked: bool,
    /// Guests with bytes to read.
    ready: Vec<usize>,
    /// How many have failed to prove that they know the secret.
    strangers: u64,
}

/// A connection in the middle of its message.
#[derive(Debug)]
struct Speaking {
    socket: mio::net::TcpStream,
    challenge: Challenge,
    /// The version that it speaks, once it has proven to know the secret.
    proven: Option<u32>,
    said: Vec<u8>,
}

impl Lobby {
    /// Where so many ranks may come.
    pub(crate) fn new(
        listener: TcpListener,
        secret: Secret,
        ranks: u32,
        poll: &Poll,
    ) -> io::Result<Self> {
        // More than the 128 that the standard library lets wait: those beyond would try again seconds later.
        SockRef::from(&listener).listen(BACKLOG)?;
        listener.set_nonblocking(true)?;
        let mut listener = mio::net::TcpListener::from_std(listener);
        let registry = poll.registry().try_clone()?;
        registry.register(&mut listener, Token(LISTENER), Interest::READABLE)?;
        let (guests, room) = (BTreeMap::new(), ranks as usize + STRANGERS_LIMIT);
        let (next_token, knocked, ready, strangers) = (LISTENER + 1, false, Vec::new(), 0);
        Ok(Self { registry, listener, secret, guests, room, next_token, knocked, ready, strangers })
    }

    /// How many have connected that do not know the secret.
    pub(crate) fn strangers(&self) -> u64 {
        self.strangers
    }

    /// The next connection that has said a whole message; `None` once the deadline has passed.
    pub(crate) fn await_next(
        &mut self,
        poll: &mut Poll,
        deadline: Instant,
    ) -> io::Result<Option<Guest>> {
        let mut events = Events::with_capacity(64);
        loop {
            if let Some(guest) = self.next()? {
                return Ok(Some(guest));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            match poll.poll(&mut events, Some(left)) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                polled => polled?,
            }
            events.iter().for_each(|event| self.note(event));
        }
    }

    /// Takes note of an event, if it is of this lobby.
    pub(crate) fn note(&mut self, event: &Event) {
        match event.token().0 {
            LISTENER => self.knocked = true,
            guest if guest > LISTENER => self.ready.push(guest),
            _ => {}
        }
    }

    /// The next connection that has said a whole message by now.
    pub(crate) fn next(&mut self) -> io::Result<Option<Guest>> {
        loop {
            while let Some(token) = self.ready.pop() {
                if let Some(guest) = self.hear(token)? {
                    return Ok(Some(guest));
                }
            }
            if !std::mem::take(&mut self.knocked) {
                return Ok(None);
            }
            self.accept()?;
        }
    }

    fn accept(&mut self) -> io::Result<()> {
        loop {
            let mut socket = match self.listener.accept() {
                Ok((socket, _)) => socket,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                // The connection went away before it was accepted.
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => continue,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                // No descriptor is left: who has waited longest makes room.
                Err(error) => match self.guests.pop_first() {
                    Some(_) => continue,
                    None => return Err(error),
                },
            };
            let challenge = handshake::challenge()?;
            // A connection so young takes that much at once, or is broken.
            if !matches!(socket.write(&challenge), Ok(written) if written == challenge.len()) {
                continue;
            }
            let token = self.next_token;
            self.next_token += 1;
            self.registry.register(&mut socket, Token(token), Interest::READABLE)?;
            self.guests
                .insert(token, Speaking { socket, challenge, proven: None, said: Vec::new() });
            if self.guests.len() > self.room {
                self.guests.pop_first();
            }
        }
    }

    /// Hears a guest; whoever hangs up or says anything else is dropped.
    fn hear(&mut self, token: usize) -> io::Result<Option<Guest>> {
        let Some(speaking) = self.guests.get_mut(&token) else {
            return Ok(None);
        };
        let heard = speaking.hear(&self.secret);
        if matches!(heard, Ok(None)) {
            return Ok(None);
        }
        let is_stranger = matches!(&heard, Err(e) if e.kind() == ErrorKind::PermissionDenied);
        self.strangers += u64::from(is_stranger);
        let Some(mut speaking) = self.guests.remove(&token) else {
            return Ok(None);
        };
        let Ok(Some(version)) = heard else {
            return Ok(None);
        };
        self.registry.deregister(&mut speaking.socket)?;
        let socket = TcpStream::from(speaking.socket);
        socket.set_nonblocking(false)?;
        // A guest that has just gone is found out when it is spoken to.
        drop(socket.set_nodelay(true));
        Ok(Some(Guest { socket, version, body: speaking.said.split_off(PREFIX_BYTES) }))
    }
}

impl Speaking {
    /// Reads what there is, but nothing beyond the message; its version once it is whole.
    fn hear(&mut self, secret: &Secret) -> io::Result<Option<u32>> {
        loop {
            let total = match (self.proven, self.said.first_chunk()) {
                (None, _) => ANSWER_BYTES,
                (Some(_), None) => PREFIX_BYTES,
                (Some(_), Some(start)) => {
                    PREFIX_BYTES + read_prefix(start).ok_or(ErrorKind::InvalidData)?
                }
            };
            let missing = total - self.said.len();
            if missing == 0 {
                match self.proven {
                    Some(version) => return Ok(Some(version)),
                    None => self.believe(secret)?,
                }
                continue;
            }
            match (&mut self.socket).take(missing as u64).read_to_end(&mut self.said) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    /// Checks the answer and replies.
    fn believe(&mut self, secret: &Secret) -> io::Result<()> {
        let answer = std::mem::take(&mut self.said).try_into();
        let answer = answer.map_err(|_| ErrorKind::InvalidData)?;
        let stranger = ErrorKind::PermissionDenied;
        let (proof, version) =
            handshake::reply(secret, &self.challenge, &answer).ok_or(stranger)?;
        self.proven = Some(version);
        self.socket.write_all(&proof)
    }
}
