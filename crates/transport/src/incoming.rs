//! The receiving direction of a stream: frames go straight to the chunk that waits for them, or are
//! kept until their operation is posted.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Instant;

use collective::{Action, Step};

use crate::frame::{HEADER_BYTES, Header, Key};
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
#[derive(Default)]
pub(crate) struct HeaderReader {
    pub bytes: [u8; HEADER_BYTES],
    pub filled: usize,
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
    /// A frame of which nothing but the header is read.
    pub(crate) fn new(header: Header, sink: Sink) -> Self {
        Self { header, sink, begun: Instant::now(), done: 0, carry: [0; 8] }
    }

    /// Whether the payload is complete.
    pub(crate) fn is_done(&self) -> bool {
        self.done as u64 == self.header.bytes
    }

    /// Reads the next piece of the payload to where it belongs; how many bytes.
    pub(crate) fn read_piece(
        &mut self,
        operations: &mut BTreeMap<u64, Active>,
        scratch: &mut [f32],
        mut read: impl FnMut(&mut [u8]) -> Result<usize, Error>,
    ) -> Result<usize, Error> {
        let length = (self.header.bytes as usize - self.done).min(PIECE_BYTES);
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

fn action_of(operation: &Active, step: usize) -> Action {
    match operation.step(step) {
        Step::Receive { action, .. } => action,
        Step::Send { .. } => unreachable!("frames are received by receives"),
    }
}
