//! What travels on a stream: a header of fixed size, then a chunk's bytes.
//!
//! Over a network they travel in spans, each with its checksum before it: that of the first is in the header,
//! which has one of its own.

use units::Rank;

/// The size of an encoded header.
pub(crate) const HEADER_BYTES: usize = 40;

/// The size of a checksum.
pub(crate) const CHECK_BYTES: usize = 4;

/// The most that one checksum is for, small enough to be still in cache when it is sent, or added.
pub(crate) const SPAN_BYTES: usize = 256 << 10;

/// Where the checksums are in a header: of the payload's first span, and of all before.
const PAYLOAD_CHECK: usize = 32;
const HEADER_CHECK: usize = 36;

/// The checksum of bytes that follow others of this checksum, which is 0 of none: CRC-32 of IEEE 802.3. It
/// differs after every change of one bit, and of any within 32 (Peterson and Brown 1961, Proc. IRE 49(1)).
pub(crate) fn checksum(before: u32, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(before);
    hasher.update(bytes);
    hasher.finalize()
}

/// What a frame carries. The numbers are unlikely in garbage, which is thereby noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// A chunk of a collective.
    Collective = 0x5048_4c01,
    /// A whole buffer from one rank to another.
    PointToPoint = 0x5048_4c02,
    /// Nothing, and nothing will follow: the peer is done. It says whom it lost, if it lost anyone.
    Goodbye = 0x5048_4c03,
    /// Nothing: the collective with this group and sequence has failed on the sender.
    Abort = 0x5048_4c04,
    /// Nothing: the sender lives, and says what it is doing.
    Heartbeat = 0x5048_4c05,
    /// Nothing: the sender has lost a rank, of which the receiver may see nothing itself.
    Loss = 0x5048_4c06,
}

/// Which operation of the job a frame belongs to, up to the rank that sends it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    pub kind: Kind,
    pub group: u64,
    /// The operation's number in posting order: per group for collectives, per group and ordered
    /// pair of ranks otherwise.
    pub sequence: u64,
}

/// The fixed part of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub key: Key,
    pub chunk: u32,
    /// The length of the payload, a multiple of 4.
    pub bytes: u64,
}

impl Header {
    /// Leave-taking of a rank that has lost this peer, or none.
    pub(crate) fn goodbye(lost: Option<Rank>) -> Self {
        let chunk = lost.map_or(0, |rank| rank.0 + 1);
        Self { chunk, ..Self::notice(Kind::Goodbye, 0, 0) }
    }

    /// Notice that this rank is lost.
    pub(crate) fn loss(lost: Rank) -> Self {
        Self { chunk: lost.0 + 1, ..Self::notice(Kind::Loss, 0, 0) }
    }

    /// Whom the sender of a goodbye or a notice has lost.
    pub(crate) fn lost(self) -> Option<Rank> {
        self.chunk.checked_sub(1).map(Rank)
    }

    /// A frame without payload.
    pub(crate) const fn notice(kind: Kind, group: u64, sequence: u64) -> Self {
        Self { key: Key { kind, group, sequence }, chunk: 0, bytes: 0 }
    }

    /// The header on the wire: little-endian kind, chunk, group, sequence, bytes, checksums.
    pub(crate) fn encode(self, payload_check: u32) -> [u8; HEADER_BYTES] {
        let mut wire = [0; HEADER_BYTES];
        wire[0..4].copy_from_slice(&(self.key.kind as u32).to_le_bytes());
        wire[4..8].copy_from_slice(&self.chunk.to_le_bytes());
        wire[8..16].copy_from_slice(&self.key.group.to_le_bytes());
        wire[16..24].copy_from_slice(&self.key.sequence.to_le_bytes());
        wire[24..32].copy_from_slice(&self.bytes.to_le_bytes());
        wire[PAYLOAD_CHECK..HEADER_CHECK].copy_from_slice(&payload_check.to_le_bytes());
        let check = checksum(0, &wire[..HEADER_CHECK]);
        wire[HEADER_CHECK..].copy_from_slice(&check.to_le_bytes());
        wire
    }

    /// Reads a header, or says what is wrong with it.
    pub(crate) fn decode(wire: &[u8; HEADER_BYTES], limit: u64) -> Result<Self, String> {
        let kind = match u32_at(wire, 0) {
            kind if kind == Kind::Collective as u32 => Kind::Collective,
            kind if kind == Kind::PointToPoint as u32 => Kind::PointToPoint,
            kind if kind == Kind::Goodbye as u32 => Kind::Goodbye,
            kind if kind == Kind::Abort as u32 => Kind::Abort,
            kind if kind == Kind::Heartbeat as u32 => Kind::Heartbeat,
            kind if kind == Kind::Loss as u32 => Kind::Loss,
            other => return Err(format!("it sent a frame of unknown kind {other:#x}")),
        };
        if u32_at(wire, HEADER_CHECK) != checksum(0, &wire[..HEADER_CHECK]) {
            return Err("the header of a frame was altered on the way".into());
        }
        let bytes = u64_at(wire, 24);
        let carries = matches!(kind, Kind::Collective | Kind::PointToPoint);
        let limit = if carries { limit } else { 0 };
        if bytes > limit || !bytes.is_multiple_of(4) {
            return Err(format!("it sent a {kind:?} frame of {bytes} bytes (limit {limit})"));
        }
        let key = Key { kind, group: u64_at(wire, 8), sequence: u64_at(wire, 16) };
        Ok(Self { key, chunk: u32_at(wire, 4), bytes })
    }

    /// The checksum of the payload's first span, from an encoded header.
    pub(crate) fn payload_check(wire: &[u8; HEADER_BYTES]) -> u32 {
        u32_at(wire, PAYLOAD_CHECK)
    }
}

fn u32_at(wire: &[u8; HEADER_BYTES], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&wire[at..at + 4]);
    u32::from_le_bytes(word)
}

fn u64_at(wire: &[u8; HEADER_BYTES], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&wire[at..at + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_header_survives_the_wire(
            group: u64, sequence: u64, chunk: u32, words in 0..1_u64 << 30, point: bool, check: u32,
        ) {
            let kind = if point { Kind::PointToPoint } else { Kind::Collective };
            let key = Key { kind, group, sequence };
            let header = Header { key, chunk, bytes: 4 * words };
            let wire = header.encode(check);
            prop_assert_eq!(Header::decode(&wire, u64::MAX), Ok(header));
            prop_assert_eq!(Header::payload_check(&wire), check);
            for bit in 0..8 * HEADER_BYTES {
                let mut altered = wire;
                altered[bit / 8] ^= 1 << (bit % 8);
                prop_assert!(Header::decode(&altered, u64::MAX).is_err(), "bit {bit}");
            }
        }

        #[test]
        fn random_bytes_are_an_error_or_a_bounded_header(wire: [u8; HEADER_BYTES], kind in 0..8_u32) {
            let mut wire = wire;
            wire[..4].copy_from_slice(&(0x5048_4c00 + kind).to_le_bytes());
            let check = checksum(0, &wire[..HEADER_CHECK]);
            wire[HEADER_CHECK..].copy_from_slice(&check.to_le_bytes());
            if let Ok(header) = Header::decode(&wire, 1 << 20) {
                prop_assert!(header.bytes <= 1 << 20);
                prop_assert_eq!(header.encode(Header::payload_check(&wire)), wire);
            }
        }
    }
}
