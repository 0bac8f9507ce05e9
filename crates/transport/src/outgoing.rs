//! The sending direction of a stream: whole frames, those first that are needed first, then those of earlier
//! operations.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::IoSlice;
use std::ops::Range;
use std::time::Instant;

use crate::frame::{CHECK_BYTES, HEADER_BYTES, Header, Kind, SPAN_BYTES, checksum};
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
    encoded: Option<Vec<f32>>,
    /// What goes before the span: the header, or a checksum.
    head: [u8; HEADER_BYTES],
    head_bytes: usize,
    /// What of the payload comes next.
    span: Range<usize>,
    /// Of the head and the span.
    sent: usize,
    /// The whole payload.
    bytes: usize,
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

    /// The frame to write now; a new one with checksums, if that is so.
    pub(crate) fn current(
        &mut self,
        operations: &BTreeMap<u64, Active>,
        checked: bool,
    ) -> Option<&mut Writing> {
        if self.broken {
            return None;
        }
        if self.current.is_none() {
            self.current = Some(match self.notices.pop_front() {
                Some(notice) => Writing::new(None, notice, &[], checked),
                None => {
                    let (_, source) = self.queue.pop_first()?;
                    let operation = &operations[&source.0];
                    let encoded = operation.encoded(source.1);
                    let chunk = || operation.chunk(source.1);
                    let payload = bytemuck::cast_slice(encoded.as_deref().unwrap_or_else(chunk));
                    let header = operation.header(source.1);
                    let writing = Writing::new(Some(source), header, payload, checked);
                    Writing { encoded, ..writing }
                }
            });
        }
        self.current.as_mut()
    }

    /// Takes away the current frame, which is written: how many bytes, and since when.
    pub(crate) fn finish(&mut self) -> Option<(u64, Instant)> {
        self.current.take().map(|writing| ((HEADER_BYTES + writing.bytes) as u64, writing.begun))
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
    pub(crate) fn new(
        source: Option<Source>,
        header: Header,
        payload: &[u8],
        checked: bool,
    ) -> Self {
        let bytes = payload.len();
        let span = 0..if checked { bytes.min(SPAN_BYTES) } else { bytes };
        let check = if checked { checksum(0, &payload[span.clone()]) } else { 0 };
        let (begun, head) = (Instant::now(), header.encode(check));
        Self { source, begun, encoded: None, head, head_bytes: HEADER_BYTES, span, sent: 0, bytes }
    }

    fn payload<'a>(&'a self, chunk: &'a [u8]) -> &'a [u8] {
        self.encoded.as_deref().map_or(chunk, bytemuck::cast_slice)
    }

    /// The next bytes of the frame, whose payload is that chunk, unless it was encoded.
    pub(crate) fn pieces<'a>(&'a self, chunk: &'a [u8]) -> [IoSlice<'a>; 2] {
        let head = &self.head[self.sent.min(self.head_bytes)..self.head_bytes];
        let span = &self.payload(chunk)[self.span.clone()];
        let rest = &span[self.sent.saturating_sub(self.head_bytes)..];
        [IoSlice::new(head), IoSlice::new(&rest[..rest.len().min(PIECE_BYTES)])]
    }

    /// Notes that bytes were written; true when they were the last.
    pub(crate) fn advance(&mut self, written: usize, chunk: &[u8]) -> bool {
        self.sent += written;
        if self.sent < self.head_bytes + self.span.len() {
            return false;
        }
        let next = self.span.end..self.bytes.min(self.span.end + SPAN_BYTES);
        if next.is_empty() {
            return true;
        }
        let check = checksum(0, &self.payload(chunk)[next.clone()]).to_le_bytes();
        self.head[..CHECK_BYTES].copy_from_slice(&check);
        (self.head_bytes, self.span, self.sent) = (CHECK_BYTES, next, 0);
        false
    }
}
