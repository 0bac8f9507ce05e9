//! The sending direction of a stream: whole frames, those first that are needed first, then those of earlier
//! operations.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::IoSlice;
use std::time::Instant;

use crate::frame::{HEADER_BYTES, Header, Kind};
use crate::operation::Active;

/// The most that one call writes, small enough to leave room for reading in between.
const PIECE_BYTES: usize = 256 << 10;

/// A step of an operation, by ticket.
pub(crate) type Source = (u64, usize);

/// What is to be written to a peer.
#[derive(Default)]
pub(crate) struct Outgoing {
    /// By when their operation is needed.
    queue: BTreeSet<(u32, Source)>,
    /// Frames without payload, which go before those of operations.
    notices: VecDeque<Header>,
    current: Option<Writing>,
    /// The peer no longer receives. Reading tells why.
    pub broken: bool,
}

/// A frame that is being written.
pub(crate) struct Writing {
    /// Where the payload is; a notice has none.
    pub source: Option<Source>,
    /// When its first byte could move.
    pub begun: Instant,
    /// The payload, if it is not as it lies in the operation's buffer.
    pub encoded: Option<Vec<f32>>,
    header: [u8; HEADER_BYTES],
    sent: usize,
    total: usize,
}

impl Outgoing {
    /// Queues a step's frame, before those of operations that are needed later.
    pub(crate) fn push(&mut self, needed: u32, source: Source) {
        self.queue.insert((needed, source));
    }

    /// Queues a frame without payload.
    pub(crate) fn push_notice(&mut self, notice: Header) {
        self.notices.push_back(notice);
    }

    /// Queues a heartbeat, in the place of one that is still to be written.
    pub(crate) fn push_heartbeat(&mut self, heartbeat: Header) {
        self.notices.retain(|notice| notice.key.kind != Kind::Heartbeat);
        self.notices.push_back(heartbeat);
    }

    /// Whether there is nothing to write, or nobody to write it to.
    pub(crate) fn is_idle(&self) -> bool {
        let empty = self.queue.is_empty() && self.notices.is_empty();
        self.broken || (self.current.is_none() && empty)
    }

    /// The frame to write now.
    pub(crate) fn current(&mut self, operations: &BTreeMap<u64, Active>) -> Option<&mut Writing> {
        if self.broken {
            return None;
        }
        if self.current.is_none() {
            self.current = Some(match self.notices.pop_front() {
                Some(notice) => Writing::new(None, notice, None),
                None => {
                    let (_, source) = self.queue.pop_first()?;
                    let operation = &operations[&source.0];
                    let (header, encoded) =
                        (operation.header(source.1), operation.encoded(source.1));
                    Writing::new(Some(source), header, encoded)
                }
            });
        }
        self.current.as_mut()
    }

    /// Takes away the current frame, which is written: how many bytes, and since when.
    pub(crate) fn finish(&mut self) -> Option<(u64, Instant)> {
        self.current.take().map(|writing| (writing.total as u64, writing.begun))
    }

    /// Drops an operation's frames that are not begun.
    pub(crate) fn forget(&mut self, ticket: u64) {
        self.queue.retain(|(_, source)| source.0 != ticket);
    }

    /// Whether a frame of the operation is being written.
    pub(crate) fn is_writing(&self, ticket: u64) -> bool {
        let source = self.current.as_ref().and_then(|writing| writing.source);
        !self.broken && source.is_some_and(|source| source.0 == ticket)
    }
}

impl Writing {
    fn new(source: Option<Source>, header: Header, encoded: Option<Vec<f32>>) -> Self {
        let total = HEADER_BYTES + header.bytes as usize;
        Self { source, begun: Instant::now(), encoded, header: header.encode(), sent: 0, total }
    }

    /// The next bytes of the frame.
    pub(crate) fn pieces<'a>(&'a self, payload: &'a [u8]) -> [IoSlice<'a>; 2] {
        let header = &self.header[self.sent.min(HEADER_BYTES)..];
        let payload = &payload[self.sent.saturating_sub(HEADER_BYTES)..];
        [IoSlice::new(header), IoSlice::new(&payload[..payload.len().min(PIECE_BYTES)])]
    }

    /// Notes that bytes were written; true when they were the last.
    pub(crate) fn advance(&mut self, written: usize) -> bool {
        self.sent += written;
        self.sent == self.total
    }
}
