//! What ranks say to each other before their streams carry frames: a prefix, then JSON.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// The version of everything that travels between ranks.
pub(crate) const VERSION: u32 = 4;

/// What a message starts with: magic, and the length of the body.
pub(crate) const PREFIX_BYTES: usize = 8;

/// The longest message that is accepted.
const MESSAGE_LIMIT: usize = 16 << 20;

/// What everything that one rank says to another before their streams carry frames starts with.
pub(crate) const MAGIC: [u8; 4] = *b"PHLX";

/// The length of the body from the start of a message; `None` if it is not one.
pub(crate) fn read_prefix(start: &[u8; PREFIX_BYTES]) -> Option<usize> {
    let [m0, m1, m2, m3, l0, l1, l2, l3] = *start;
    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    ([m0, m1, m2, m3] == MAGIC && length <= MESSAGE_LIMIT).then_some(length)
}

/// The start of a message with a body of `length` bytes.
fn prefix(length: usize) -> [u8; PREFIX_BYTES] {
    let mut start = [0; PREFIX_BYTES];
    start[..4].copy_from_slice(&MAGIC);
    start[4..].copy_from_slice(&(length as u32).to_le_bytes());
    start
}

/// Sends a message on a blocking socket.
pub(crate) fn send(
    socket: &TcpStream,
    message: &impl Serialize,
    deadline: Instant,
) -> io::Result<()> {
    send_encoded(socket, &encode(message)?, deadline)
}

/// A message as it is sent.
pub(crate) fn encode(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let body = serde_json::to_vec(message)?;
    Ok([&prefix(body.len())[..], &body].concat())
}

/// Sends what several are sent.
pub(crate) fn send_encoded(
    mut socket: &TcpStream,
    message: &[u8],
    deadline: Instant,
) -> io::Result<()> {
    #[cfg(test)]
    SENT.set(SENT.get() + 1);
    socket.set_write_timeout(Some(time_left(deadline)?))?;
    socket.write_all(message)
}

#[cfg(test)]
thread_local! {
    /// How many messages this thread has sent.
    pub(crate) static SENT: std::cell::Cell<u32> = const { std::cell::Cell::new(0) };
}

/// Receives a message on a blocking socket, and nothing beyond it.
pub(crate) fn receive<T: DeserializeOwned>(
    mut socket: &TcpStream,
    deadline: Instant,
) -> io::Result<T> {
    socket.set_read_timeout(Some(time_left(deadline)?))?;
    let mut start = [0; PREFIX_BYTES];
    socket.read_exact(&mut start)?;
    let length = read_prefix(&start).ok_or(ErrorKind::InvalidData)?;
    let mut body = vec![0; length];
    socket.read_exact(&mut body)?;
    Ok(serde_json::from_slice(&body)?)
}

/// How long it is until a deadline, or that it has passed.
pub(crate) fn time_left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(ErrorKind::TimedOut.into()) } else { Ok(left) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn random_bytes_are_no_message_or_a_bounded_one(random: [u8; PREFIX_BYTES], ours: bool) {
            let mut start = random;
            if ours {
                start[..4].copy_from_slice(&MAGIC);
            }
            if let Some(length) = read_prefix(&start) {
                prop_assert!(ours && length <= MESSAGE_LIMIT);
            }
        }

        #[test]
        fn a_length_survives_the_wire(length in 0..=MESSAGE_LIMIT) {
            prop_assert_eq!(read_prefix(&prefix(length)), Some(length));
        }
    }
}
