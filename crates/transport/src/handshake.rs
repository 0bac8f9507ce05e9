//! How two processes show each other that they know the job's secret, before either believes a word.
//!
//! Who accepts a connection sends a challenge that nobody else was sent; who connects answers with a
//! challenge of its own and a proof, the HMAC-SHA256 (RFC 2104) of both under the secret; the last
//! word is the proof of who accepts. The lengths are fixed: a stranger makes nobody read, keep or
//! parse more. What follows is neither encrypted nor signed, so the secret keeps out who can connect
//! to a port, not who can change packets on the way.

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Instant;

use hmac::{Hmac, Mac};
use sha2::Sha256;

use crate::Error;
use crate::message::{MAGIC, VERSION, time_left};

/// The length of a challenge: magic, version, and bytes that never come again.
pub(crate) const CHALLENGE_BYTES: usize = 8 + NONCE_BYTES;
/// The length of a challenge with the proof behind it.
pub(crate) const ANSWER_BYTES: usize = CHALLENGE_BYTES + PROOF_BYTES;

const NONCE_BYTES: usize = 32;
const PROOF_BYTES: usize = 32;

/// The fewest bytes of a secret: what is shorter can be guessed.
const SHORTEST_SECRET: usize = 16;

pub(crate) type Challenge = [u8; CHALLENGE_BYTES];

/// What the processes of a job know, and nobody else.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Arc<str>);

impl Secret {
    /// A secret as it was handed over; `None` if it is shorter than 16 bytes, which can be guessed.
    #[must_use]
    pub fn new(text: &str) -> Option<Self> {
        (text.len() >= SHORTEST_SECRET).then(|| Self(text.into()))
    }

    /// A secret that nobody knows yet.
    ///
    /// # Errors
    /// [`Error::System`] when the system has no random bytes.
    pub fn random() -> Result<Self, Error> {
        let bytes = random().map_err(Error::system("draw random bytes"))?;
        Ok(Self(bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>().into()))
    }

    /// The secret, to be handed over where nobody else can read it.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }

    fn mac(&self, role: &Role, accepting: &Challenge, connecting: &Challenge) -> Hmac<Sha256> {
        let mac = Hmac::<Sha256>::new_from_slice(self.0.as_bytes());
        let role: &[u8] = match role {
            Role::Accepts => b"accepts",
            Role::Connects => b"connects",
        };
        mac.expect("a key may have any length")
            .chain_update(role)
            .chain_update(accepting)
            .chain_update(connecting)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// Whose proof it is: nobody can send back what it was sent.
enum Role {
    Accepts,
    Connects,
}

/// A challenge that nobody was sent before.
pub(crate) fn challenge() -> io::Result<Challenge> {
    let mut challenge = [0; CHALLENGE_BYTES];
    challenge[..4].copy_from_slice(&MAGIC);
    challenge[4..8].copy_from_slice(&VERSION.to_le_bytes());
    challenge[8..].copy_from_slice(&random()?);
    Ok(challenge)
}

/// What who accepts replies to an answer, and the version that who connects speaks; `None` when it
/// does not know the secret.
pub(crate) fn reply(
    secret: &Secret,
    challenge: &Challenge,
    answer: &[u8; ANSWER_BYTES],
) -> Option<([u8; PROOF_BYTES], u32)> {
    let (theirs, proof) = answer.split_first_chunk()?;
    let version = version(theirs)?;
    secret.mac(&Role::Connects, challenge, theirs).verify_slice(proof).ok()?;
    Some((secret.mac(&Role::Accepts, challenge, theirs).finalize().into_bytes().into(), version))
}

/// Carries out the part of who connects.
///
/// # Errors
/// When the other end is no rank, or does not know the same secret; the error says so.
pub fn connect(mut socket: &TcpStream, secret: &Secret, deadline: Instant) -> io::Result<()> {
    socket.set_read_timeout(Some(time_left(deadline)?))?;
    let mut theirs = [0; CHALLENGE_BYTES];
    socket.read_exact(&mut theirs)?;
    let stranger = || io::Error::new(ErrorKind::InvalidData, "what listens there is no rank");
    version(&theirs).ok_or_else(stranger)?;
    let ours = challenge()?;
    let proof = secret.mac(&Role::Connects, &theirs, &ours).finalize().into_bytes();
    socket.set_write_timeout(Some(time_left(deadline)?))?;
    socket.write_all(&[&ours[..], &proof].concat())?;
    let mut reply = [0; PROOF_BYTES];
    let refused = |error: io::Error| match error.kind() {
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset => other_secret(),
        _ => error,
    };
    socket.set_read_timeout(Some(time_left(deadline)?))?;
    socket.read_exact(&mut reply).map_err(refused)?;
    let mac = secret.mac(&Role::Accepts, &theirs, &ours);
    mac.verify_slice(&reply).map_err(|_| other_secret())
}

/// Carries out the part of who accepts. Neither end has a limit of time for what follows.
///
/// # Errors
/// When the other end does not know the same secret, or says so too late.
pub fn accept(mut socket: &TcpStream, secret: &Secret, deadline: Instant) -> io::Result<()> {
    let challenge = challenge()?;
    socket.set_write_timeout(Some(time_left(deadline)?))?;
    socket.write_all(&challenge)?;
    let mut answer = [0; ANSWER_BYTES];
    socket.set_read_timeout(Some(time_left(deadline)?))?;
    socket.read_exact(&mut answer)?;
    let (proof, _) = reply(secret, &challenge, &answer).ok_or_else(other_secret)?;
    socket.write_all(&proof)?;
    socket.set_read_timeout(None)?;
    socket.set_write_timeout(None)
}

fn other_secret() -> io::Error {
    io::Error::new(ErrorKind::PermissionDenied, "it was given another secret than this rank")
}

/// The version in a challenge; `None` if it is none.
fn version(challenge: &Challenge) -> Option<u32> {
    let [m0, m1, m2, m3, v0, v1, v2, v3, ..] = *challenge;
    ([m0, m1, m2, m3] == MAGIC).then(|| u32::from_le_bytes([v0, v1, v2, v3]))
}

fn random() -> io::Result<[u8; NONCE_BYTES]> {
    let mut bytes = [0; NONCE_BYTES];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn secret(text: &str) -> Secret {
        Secret::new(text).unwrap()
    }

    fn answer(secret: &Secret, theirs: &Challenge) -> [u8; ANSWER_BYTES] {
        let ours = challenge().unwrap();
        let proof = secret.mac(&Role::Connects, theirs, &ours).finalize().into_bytes();
        [&ours[..], &proof].concat().try_into().unwrap()
    }

    #[test]
    fn a_secret_is_random_long_and_not_printed() {
        let (one, other) = (Secret::random().unwrap(), Secret::random().unwrap());
        assert_ne!(one, other);
        assert_eq!(Secret::new(one.reveal()), Some(one.clone()));
        assert_eq!(Secret::new("guess me"), None);
        assert!(!format!("{one:?}").contains(one.reveal()));
    }

    #[test]
    fn a_proof_is_for_one_challenge_one_secret_and_one_role() {
        let (ours, same, other) =
            (secret("0123456789abcdef"), secret("0123456789abcdef"), secret("0123456789abcdeF"));
        let challenges = [challenge().unwrap(), challenge().unwrap()];
        assert_ne!(challenges[0], challenges[1]);
        let answer = answer(&ours, &challenges[0]);
        let (proof, version) = reply(&same, &challenges[0], &answer).unwrap();
        assert_eq!(version, VERSION);
        assert!(reply(&other, &challenges[0], &answer).is_none());
        assert!(reply(&same, &challenges[1], &answer).is_none(), "an answer heard before");
        let mut mirrored = answer;
        mirrored[CHALLENGE_BYTES..].copy_from_slice(&proof);
        assert!(reply(&same, &challenges[0], &mirrored).is_none(), "the proof of the other role");
    }

    proptest! {
        #[test]
        fn no_random_bytes_are_an_answer(
            start in any::<[u8; CHALLENGE_BYTES]>(),
            proof in any::<[u8; PROOF_BYTES]>(),
            ours: bool,
        ) {
            let mut answer: [u8; ANSWER_BYTES] = [&start[..], &proof].concat().try_into().unwrap();
            if ours {
                answer[..4].copy_from_slice(&MAGIC);
            }
            let challenge = challenge().unwrap();
            prop_assert!(reply(&secret("0123456789abcdef"), &challenge, &answer).is_none());
        }

        #[test]
        fn a_changed_bit_is_no_answer(byte in 0..ANSWER_BYTES, bit in 0..8_u32) {
            let (secret, challenge) = (secret("0123456789abcdef"), challenge().unwrap());
            let mut answer = answer(&secret, &challenge);
            answer[byte] ^= 1_u8 << bit;
            prop_assert!(reply(&secret, &challenge, &answer).is_none());
        }
    }
}
