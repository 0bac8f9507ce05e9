//! The receiving direction of a stream: frames go straight to the chunk that waits for them, or are
//! kept until their operation is posted.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Instant;

use collective::{Action, Step};

use crate::frame::{CHECK_BYTES, HEADER_BYTES, Header, Key, SPAN_BYTES, checksum};
use crate::operation::Active;
use crate::outgoing::Source;
use crate::{Error, Reduction};

/// The most that one call reads: small enough to be still in cache when it is added.
pub(crate) const PIECE_BYTES: usize = 256 << 10;

/// What comes from a peer.
#[derive(Default)]
pub(crate) struct Incoming {
    pub header: HeaderReader,
    pub reading: Option<Reading>,
    /// Started receives by operation, in order.
    expected: BTreeMap<u64, VecDeque<usize>>,
    /// Whole frames that came before their receive was started.
    early: BTreeMap<Key, VecDeque<Early>>,
    early_bytes: u64,
    /// Collectives that failed on the peer before they were posted here.
    aborted: BTreeSet<Key>,
}

/// The header of the next frame, as far as it is here.
pub(crate) struct HeaderReader {
    pub bytes: [u8; HEADER_BYTES],
    pub filled: usize,
}

impl Default for HeaderReader {
    fn default() -> Self {
        Self { bytes: [0; HEADER_BYTES], filled: 0 }
    }
}

/// A frame that came before its receive was started.
pub(crate) struct Early {
    pub header: Header,
    pub payload: Vec<f32>,
}

/// A frame whose payload is being read.
pub(crate) struct Reading {
    pub header: Header,
    pub sink: Sink,
    /// When its header was here.
    pub begun: Instant,
    /// Payload bytes read so far.
    pub done: usize,
    /// The first bytes of an element that is to be combined, as many as are here.
    carry: [u8; 8],
    /// What tells whether the payload is as it was sent, if something does.
    check: Option<Check>,
}

/// Compares a payload with its checksums, span by span.
struct Check {
    /// Of the span, as it was sent.
    sent: u32,
    /// Of what has come of it.
    come: u32,
    /// Where the span ends.
    end: usize,
    /// The checksum of the next span, as much of it as is here.
    next: [u8; CHECK_BYTES],
    filled: usize,
}

/// Where a payload goes.
pub(crate) enum Sink {
    /// Into the chunk of a started receive.
    Chunk(Source),
    /// Into memory of its own, until it is whole: it is compressed, or its receive has not started.
    Whole(Vec<f32>, Option<Source>),
    /// Nowhere: its operation has failed.
    Discard,
}

impl Incoming {
    /// Notes a started receive for which no frame is here yet.
    pub(crate) fn expect(&mut self, (ticket, step): Source) {
        self.expected.entry(ticket).or_default().push_back(step);
    }

    /// The receive that the operation's next frame is for.
    pub(crate) fn take_expected(&mut self, ticket: u64) -> Option<usize> {
        let queue = self.expected.get_mut(&ticket)?;
        let step = queue.pop_front();
        if queue.is_empty() {
            self.expected.remove(&ticket);
        }
        step
    }

    /// Whether the operation has started receives that no frame was for.
    pub(crate) fn expects(&self, ticket: u64) -> bool {
        self.expected.contains_key(&ticket)
    }

    /// Whether the next frame is left unread, since too much that is not asked for is here already.
    pub(crate) fn is_held(&self) -> bool {
        self.reading.is_none() && self.header.filled == HEADER_BYTES
    }

    /// Keeps a frame for later.
    pub(crate) fn keep(&mut self, frame: Early) {
        self.early_bytes += frame.header.bytes;
        self.early.entry(frame.header.key).or_default().push_back(frame);
    }

    /// The oldest kept frame of an operation.
    pub(crate) fn take_early(&mut self, key: Key) -> Option<Early> {
        let queue = self.early.get_mut(&key)?;
        let frame = queue.pop_front();
        if queue.is_empty() {
            self.early.remove(&key);
        }
        self.early_bytes -= frame.as_ref().map_or(0, |frame| frame.header.bytes);
        frame
    }

    /// How many frames of an operation are kept.
    pub(crate) fn early_frames(&self, key: Key) -> usize {
        self.early.get(&key).map_or(0, VecDeque::len)
    }

    /// The bytes of all that is kept for operations not posted yet.
    pub(crate) fn early_bytes(&self) -> u64 {
        self.early_bytes + (HEADER_BYTES * self.aborted.len()) as u64
    }

    /// Keeps in mind that a collective not posted here has failed on the peer.
    pub(crate) fn keep_abort(&mut self, key: Key) {
        self.aborted.insert(key);
    }

    /// Whether a collective that is being posted has failed on the peer.
    pub(crate) fn take_abort(&mut self, key: Key) -> bool {
        self.aborted.remove(&key)
    }

    /// Drops what an operation that failed was waiting for.
    pub(crate) fn forget(&mut self, ticket: u64, key: Key) {
        self.expected.remove(&ticket);
        while self.take_early(key).is_some() {}
        if let Some(reading) = &mut self.reading {
            let is_of_it = match reading.sink {
                Sink::Chunk(source) | Sink::Whole(_, Some(source)) => source.0 == ticket,
                Sink::Whole(_, None) => reading.header.key == key,
                Sink::Discard => false,
            };
            if is_of_it {
                reading.sink = Sink::Discard;
            }
        }
    }
}

impl Reading {
    /// A frame of which nothing but the header is read, with the checksum of its first span, if spans have one.
    pub(crate) fn new(header: Header, sink: Sink, check: Option<u32>) -> Self {
        let check = check.map(|sent| Check::new(sent, header.bytes, 0));
        Self { header, sink, begun: Instant::now(), done: 0, carry: [0; 8], check }
    }

    /// Whether the span that is complete now is not as it was sent.
    pub(crate) fn is_altered(&self) -> bool {
        self.check.as_ref().is_some_and(|check| self.done == check.end && check.come != check.sent)
    }

    /// Whether the payload is complete.
    pub(crate) fn is_done(&self) -> bool {
        self.done as u64 == self.header.bytes
    }

    /// Reads the next piece of the payload to where it belongs, or of a checksum; how many bytes.
    pub(crate) fn read_piece(
        &mut self,
        operations: &mut BTreeMap<u64, Active>,
        scratch: &mut [f32],
        mut read: impl FnMut(&mut [u8]) -> Result<usize, Error>,
    ) -> Result<usize, Error> {
        let Some(mut check) = self.check.take() else {
            return self.read_payload(self.header.bytes as usize, operations, scratch, read);
        };
        let moved = if self.done == check.end && !self.is_done() {
            check.read_next(self.header.bytes, read)
        } else {
            let counted = |into: &mut [u8]| {
                let moved = read(into)?;
                check.come = checksum(check.come, &into[..moved]);
                Ok(moved)
            };
            self.read_payload(check.end, operations, scratch, counted)
        };
        self.check = Some(check);
        moved
    }

    fn read_payload(
        &mut self,
        end: usize,
        operations: &mut BTreeMap<u64, Active>,
        scratch: &mut [f32],
        mut read: impl FnMut(&mut [u8]) -> Result<usize, Error>,
    ) -> Result<usize, Error> {
        let length = (end - self.done).min(PIECE_BYTES);
        let span = self.done..self.done + length;
        let moved = match &mut self.sink {
            Sink::Discard => read(&mut bytemuck::cast_slice_mut(scratch)[..length])?,
            Sink::Whole(payload, _) => read(&mut bytemuck::cast_slice_mut(payload)[span])?,
            Sink::Chunk((ticket, step)) => {
                let operation = operations.get_mut(ticket).expect("a sink's operation is active");
                match action_of(operation, *step) {
                    Action::Copy => {
                        read(&mut bytemuck::cast_slice_mut(operation.chunk_mut(*step))[span])?
                    }
                    Action::Reduce => {
                        let reduction = operation.reduction;
                        let chunk = operation.chunk_mut(*step);
                        return self.reduce_piece(reduction, chunk, scratch, length, read);
                    }
                }
            }
        };
        self.done += moved;
        Ok(moved)
    }

    /// Reads a piece behind the carried bytes, combines the whole elements and carries the rest.
    fn reduce_piece(
        &mut self,
        reduction: Reduction,
        chunk: &mut [f32],
        scratch: &mut [f32],
        length: usize,
        mut read: impl FnMut(&mut [u8]) -> Result<usize, Error>,
    ) -> Result<usize, Error> {
        let unit = reduction.element.unit();
        let carried = self.done % unit;
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(scratch);
        bytes[..carried].copy_from_slice(&self.carry[..carried]);
        let room = length.min(bytes.len() - carried);
        let moved = read(&mut bytes[carried..][..room])?;
        let rest = (carried + moved) % unit;
        let whole = carried + moved - rest;
        self.carry[..rest].copy_from_slice(&bytes[whole..][..rest]);
        let start = (self.done - carried) / 4;
        reduction.apply(&mut chunk[start..][..whole / 4], &scratch[..whole / 4]);
        self.done += moved;
        Ok(moved)
    }

    /// Whether it is a frame of an operation that came before its receive was started.
    pub(crate) fn is_early(&self, key: Key) -> bool {
        matches!(self.sink, Sink::Whole(_, None)) && self.header.key == key
    }

    /// Turns an early frame, of which a part is read, over to the receive that has now started.
    pub(crate) fn redirect(&mut self, operation: &mut Active, source: Source) {
        if operation.compression(source.1).is_some() {
            if let Sink::Whole(_, owner) = &mut self.sink {
                *owner = Some(source);
            }
            return;
        }
        let sink = std::mem::replace(&mut self.sink, Sink::Chunk(source));
        let Sink::Whole(payload, _) = sink else { panic!("only an early frame is redirected") };
        let reduction = operation.reduction;
        let carried = self.done % reduction.element.unit();
        let whole = (self.done - carried) / 4;
        let bytes: &[u8] = bytemuck::cast_slice(&payload);
        match action_of(operation, source.1) {
            Action::Copy => {
                let chunk: &mut [u8] = bytemuck::cast_slice_mut(operation.chunk_mut(source.1));
                chunk[..self.done].copy_from_slice(&bytes[..self.done]);
            }
            Action::Reduce => {
                reduction.apply(&mut operation.chunk_mut(source.1)[..whole], &payload[..whole]);
                self.carry[..carried].copy_from_slice(&bytes[4 * whole..][..carried]);
            }
        }
    }
}

impl Check {
    /// Of the span from `begin` on of so many bytes.
    fn new(sent: u32, bytes: u64, begin: usize) -> Self {
        let end = (bytes as usize).min(begin + SPAN_BYTES);
        Self { sent, come: 0, end, next: [0; CHECK_BYTES], filled: 0 }
    }

    /// Reads the checksum of the next span.
    fn read_next(
        &mut self,
        bytes: u64,
        mut read: impl FnMut(&mut [u8]) -> Result<usize, Error>,
    ) -> Result<usize, Error> {
        let moved = read(&mut self.next[self.filled..])?;
        self.filled += moved;
        if self.filled == CHECK_BYTES {
            *self = Self::new(u32::from_le_bytes(self.next), bytes, self.end);
        }
        Ok(moved)
    }
}

fn action_of(operation: &Active, step: usize) -> Action {
    match operation.step(step) {
        Step::Receive { action, .. } => action,
        Step::Send { .. } => unreachable!("frames are received by receives"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::frame::Kind;
    use crate::outgoing::Writing;

    fn header(payload: &[f32]) -> Header {
        let key = Key { kind: Kind::Collective, group: 1, sequence: 2 };
        Header { key, chunk: 3, bytes: 4 * payload.len() as u64 }
    }

    /// A frame with checksums, as it travels, written so many bytes at a time.
    fn sent(payload: &[f32], step: usize) -> Vec<u8> {
        let payload_bytes = bytemuck::cast_slice(payload);
        let mut writing = Writing::new(None, header(payload), payload_bytes, true);
        let mut wire = Vec::new();
        loop {
            let pieces = writing.pieces(payload_bytes);
            let before = wire.len();
            wire.extend(pieces.iter().flat_map(|piece| &piece[..]).take(step));
            if writing.advance(wire.len() - before, payload_bytes) {
                return wire;
            }
        }
    }

    /// What comes of it when it is read so many bytes at a time; none if it was altered.
    fn received(wire: &[u8], step: usize) -> Option<Vec<f32>> {
        let (start, mut rest) = wire.split_first_chunk::<HEADER_BYTES>()?;
        let header = Header::decode(start, u64::MAX).ok()?;
        let sink = Sink::Whole(vec![0.0; header.bytes as usize / 4], None);
        let mut reading = Reading::new(header, sink, Some(Header::payload_check(start)));
        while !reading.is_done() {
            let read = |into: &mut [u8]| {
                let length = into.len().min(step);
                into[..length].copy_from_slice(&rest[..length]);
                rest = &rest[length..];
                Ok(length)
            };
            reading.read_piece(&mut BTreeMap::new(), &mut [], read).unwrap();
            if reading.is_altered() {
                return None;
            }
        }
        assert!(rest.is_empty(), "{} bytes more than the frame has", rest.len());
        let Sink::Whole(payload, None) = reading.sink else {
            unreachable!("that is where it went")
        };
        Some(payload)
    }

    const STEPS: [usize; 5] = [1 << 20, 100_000, 4099, 39, 7];

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn what_changes_on_the_way_is_noticed(
            length in prop_oneof![1_usize..20, SPAN_BYTES / 4 - 2..SPAN_BYTES / 4 + 2, 1..3 * SPAN_BYTES / 4],
            steps in prop::array::uniform2(prop::sample::select(&STEPS[..])),
            bits in prop::collection::vec(any::<prop::sample::Index>(), 8),
        ) {
            let payload: Vec<f32> = (0..length).map(|index| index as f32).collect();
            let wire = sent(&payload, steps[0]);
            prop_assert_eq!(received(&wire, steps[1]), Some(payload));
            for bit in bits {
                let mut altered = wire.clone();
                let bit = bit.index(8 * altered.len());
                altered[bit / 8] ^= 1 << (bit % 8);
                prop_assert_eq!(received(&altered, steps[1]), None, "bit {}", bit);
            }
        }
    }
}
