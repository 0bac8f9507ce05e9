//! What a rank asks for, and the state it has while it is under way.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use collective::{Chunks, Executor, Part, Placement, Step};
use units::{Bytes, Rank};

use crate::frame::{Header, Key, Kind};
use crate::passes::overlap;
use crate::{Compression, Error, Reduction};

/// Ranks that operate together. Every one of them uses the same number and the same order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// The group's number, different from that of every other group in the job.
    pub id: u64,
    /// Its ranks; member `i` of a collective is `ranks[i]`.
    pub ranks: Arc<[Rank]>,
}

impl Group {
    /// Which member of the group's collectives a rank is.
    #[must_use]
    pub fn member(&self, rank: Rank) -> Option<u32> {
        self.ranks.iter().position(|member| *member == rank).map(|member| member as u32)
    }

    /// Every rank of a job, before the job has numbered groups of its own from 1.
    #[must_use]
    pub fn world(ranks: u32) -> Self {
        Self { id: 0, ranks: (0..ranks).map(Rank).collect() }
    }
}

/// What an operation does with its buffer.
#[derive(Debug, Clone)]
pub enum Action {
    /// Carry out the rank's part of a collective.
    Collective(Arc<Part>),
    /// Carry out the rank's part of an all-to-all, whose blocks may have different sizes.
    AllToAll {
        /// The rank's part.
        part: Arc<Part>,
        /// Where in the buffer the blocks are that go out, come in and pass through.
        placement: Arc<Placement>,
    },
    /// Carry out the rank's part of a collective that reduces otherwise than to sums of fp32. The
    /// buffer has the same words in every chunk, or elements no longer than a word.
    Reduce {
        /// The rank's part.
        part: Arc<Part>,
        /// What the words of the buffer are, and how they are combined.
        reduction: Reduction,
    },
    /// Carry out the rank's part of a collective that sums, with what goes from one host to another compressed.
    Compressed {
        /// The rank's part.
        part: Arc<Part>,
        /// How.
        compression: Compression,
    },
    /// Send the whole buffer to a rank of the group, which receives it.
    Send {
        /// The receiving rank.
        to: Rank,
    },
    /// Send elements that stay where they are to a rank of the group, which receives them. The buffer
    /// has no part in it.
    Lend {
        /// The receiving rank.
        to: Rank,
        /// What is sent.
        elements: Arc<Vec<f32>>,
    },
    /// Fill the whole buffer with what a rank of the group sends.
    Receive {
        /// The sending rank.
        from: Rank,
    },
}

/// A communication to be carried out.
///
/// The ranks of a group post the same collectives in the same order, and a pair of ranks its sends
/// and receives. They may wait for them in any order.
#[derive(Debug, Clone)]
pub struct Operation {
    /// The ranks that take part.
    pub group: Group,
    /// What to do.
    pub action: Action,
    /// The elements to work on, in place; the length is the same on every rank. It comes back with
    /// [`crate::Completed`].
    pub buffer: Vec<f32>,
    /// What the operation is called in error messages.
    pub label: Arc<str>,
}

impl Operation {
    /// Refuses, on the caller's thread, what only a bug can ask for.
    pub(crate) fn check(&self, own: Rank) {
        let Self { group, action, buffer, label } = self;
        let (ranks, member) = (&group.ranks, group.member(own));
        assert!(member.is_some(), "`{label}`: {own} is not in the group");
        match action {
            Action::Collective(part)
            | Action::AllToAll { part, .. }
            | Action::Compressed { part, .. }
            | Action::Reduce { part, .. } => {
                let members = part.contract.members() as usize;
                assert_eq!(members, ranks.len(), "`{label}`: members and ranks");
                assert_eq!(Some(part.member), member, "`{label}`: the part of {own}");
                if let Action::AllToAll { placement, .. } = action {
                    assert_eq!(buffer.len(), placement.elements(), "`{label}`: buffer");
                }
                if let Action::Reduce { part, reduction } = action {
                    let chunks = part.contract.chunks as usize * reduction.element.unit() / 4;
                    let whole =
                        reduction.element.unit() == 4 || buffer.len().is_multiple_of(chunks);
                    assert!(reduction.exists() && whole, "`{label}`: {reduction:?} of {chunks}");
                }
            }
            Action::Send { to: peer }
            | Action::Lend { to: peer, .. }
            | Action::Receive { from: peer } => {
                assert!(*peer != own && ranks.contains(peer), "`{label}`: {peer} is no peer");
            }
        }
    }
}

/// An operation under way.
pub(crate) struct Active {
    pub label: Arc<str>,
    pub key: Key,
    pub executor: Executor,
    pub buffer: Vec<f32>,
    pub posted: Instant,
    /// At which point of the rank's work it is needed.
    pub needed: u32,
    pub started: Option<Instant>,
    /// The failure was reported; what remains is a frame of it that is being written.
    pub failed: bool,
    pub reduction: Reduction,
    compressed: Option<Compressed>,
    work: Work,
}

/// What of an operation is compressed.
struct Compressed {
    how: Compression,
    /// By member: whether it is on another host.
    far: Vec<bool>,
}

/// Where an operation's steps come from.
enum Work {
    Collective { ranks: Arc<[Rank]>, part: Arc<Part>, placement: Option<Arc<Placement>> },
    PointToPoint { peer: Rank, step: Step, lent: Option<Arc<Vec<f32>>> },
}

impl Active {
    /// Starts a checked operation of a rank that is told which others are on other hosts.
    pub(crate) fn new(
        operation: Operation,
        sequence: u64,
        (posted, needed): (Instant, u32),
        is_far: impl Fn(Rank) -> bool,
    ) -> Self {
        let Operation { group, action, buffer, label } = operation;
        let kind = kind_of(&action);
        let key = Key { kind, group: group.id, sequence };
        let reduction = match action {
            Action::Reduce { reduction, .. } => reduction,
            _ => Reduction::SUM,
        };
        let compressed = match action {
            Action::Compressed { compression: how, .. } => {
                let far: Vec<_> = group.ranks.iter().map(|rank| is_far(*rank)).collect();
                far.contains(&true).then_some(Compressed { how, far })
            }
            _ => None,
        };
        let work = Work::new(group, action);
        let executor = match &work {
            Work::Collective { part, .. } => part.executor(),
            Work::PointToPoint { step, .. } => Executor::new(&[*step], 1),
        };
        Self {
            label,
            key,
            executor,
            buffer,
            posted,
            needed,
            started: None,
            failed: false,
            reduction,
            compressed,
            work,
        }
    }

    pub(crate) fn step(&self, index: usize) -> Step {
        match &self.work {
            Work::Collective { part, .. } => part.steps[index],
            Work::PointToPoint { step, .. } => *step,
        }
    }

    /// The rank at the other end of a step.
    pub(crate) fn peer(&self, index: usize) -> Rank {
        match &self.work {
            Work::Collective { ranks, .. } => ranks[self.step(index).peer() as usize],
            Work::PointToPoint { peer, .. } => *peer,
        }
    }

    /// Whether the operation cannot have its result without this rank ever having taken part.
    pub(crate) fn involves(&self, rank: Rank) -> bool {
        match &self.work {
            Work::Collective { ranks, .. } => ranks.contains(&rank),
            Work::PointToPoint { peer, .. } => *peer == rank,
        }
    }

    /// Under which frames find the operation, with the sender where it matters; none for a send.
    pub(crate) fn receiver(&self) -> Option<(Key, Option<Rank>)> {
        match self.work {
            Work::Collective { .. } => Some((self.key, None)),
            Work::PointToPoint { step: Step::Send { .. }, .. } => None,
            Work::PointToPoint { peer, .. } => Some((self.key, Some(peer))),
        }
    }

    /// The peer of every pending receive.
    pub(crate) fn pending_senders(&self) -> Vec<Rank> {
        let receives = self.executor.pending().filter(|step| !self.step(*step).is_send());
        receives.map(|step| self.peer(step)).collect()
    }

    /// The ranks of a collective.
    pub(crate) fn members(&self) -> &[Rank] {
        match &self.work {
            Work::Collective { ranks, .. } => ranks,
            Work::PointToPoint { .. } => &[],
        }
    }

    /// The pending steps with a peer, as (sends, receives).
    pub(crate) fn pending_with(&self, peer: Rank) -> (usize, usize) {
        let with_peer = self.executor.pending().filter(|step| self.peer(*step) == peer);
        let (sends, receives): (Vec<_>, Vec<_>) = with_peer.partition(|s| self.step(*s).is_send());
        (sends.len(), receives.len())
    }

    /// The peers with which a step is pending.
    pub(crate) fn waiting_for(&self) -> Vec<Rank> {
        let mut peers: Vec<_> = self.executor.pending().map(|step| self.peer(step)).collect();
        peers.sort_unstable();
        peers.dedup();
        peers
    }

    /// The frame header of a step.
    pub(crate) fn header(&self, index: usize) -> Header {
        let words = match self.compression(index) {
            None => self.chunk(index).len(),
            Some(how) => self.chunk_ranges(index).map(|range| how.words(range.len())).sum(),
        };
        let bytes = 4 * words as u64;
        Header { key: self.key, chunk: self.step(index).chunks().first, bytes }
    }

    /// The size of what it works on.
    pub(crate) fn bytes(&self) -> Bytes {
        Bytes(4 * self.lent().unwrap_or(&self.buffer).len() as u64)
    }

    fn lent(&self) -> Option<&Vec<f32>> {
        match &self.work {
            Work::PointToPoint { lent, .. } => lent.as_deref(),
            Work::Collective { .. } => None,
        }
    }

    /// The elements of a step's chunks.
    pub(crate) fn chunk(&self, index: usize) -> &[f32] {
        match self.lent() {
            Some(elements) => elements,
            None => &self.buffer[self.range(index)],
        }
    }

    /// The elements of a step's chunks, to be written.
    pub(crate) fn chunk_mut(&mut self, index: usize) -> &mut [f32] {
        let range = self.range(index);
        &mut self.buffer[range]
    }

    /// How a step's chunks travel, unless as they are.
    pub(crate) fn compression(&self, index: usize) -> Option<Compression> {
        let Compressed { how, far } = self.compressed.as_ref()?;
        far[self.step(index).peer() as usize].then_some(*how)
    }

    /// A step's chunks as they travel, if they are compressed.
    pub(crate) fn encoded(&self, index: usize) -> Option<Vec<f32>> {
        let how = self.compression(index)?;
        let mut words = Vec::new();
        self.chunk_ranges(index).for_each(|range| how.encode(&self.buffer[range], &mut words));
        Some(words)
    }

    /// Takes in what came for a step, as it travelled.
    pub(crate) fn take_in(&mut self, index: usize, payload: &[f32]) {
        let Step::Receive { action, .. } = self.step(index) else {
            unreachable!("frames are received by receives")
        };
        match (self.compression(index), action) {
            (None, collective::Action::Copy) => self.chunk_mut(index).copy_from_slice(payload),
            (None, collective::Action::Reduce) => {
                let reduction = self.reduction;
                reduction.apply(self.chunk_mut(index), payload);
            }
            (Some(how), action) => {
                let (ranges, mut left): (Vec<_>, _) = (self.chunk_ranges(index).collect(), payload);
                for range in ranges {
                    let (words, rest) = left.split_at(how.words(range.len()));
                    how.decode(words, &mut self.buffer[range], action);
                    left = rest;
                }
            }
        }
    }

    /// Notes that a step is done. The last partial sum of an all-reduce is rounded as the others will get it.
    pub(crate) fn complete(&mut self, index: usize) {
        if let (Work::Collective { part, .. }, Some(Compressed { how, .. })) =
            (&self.work, &self.compressed)
            && part.contract.kind == collective::Kind::AllReduce
            && is_last_sum(&part.steps, index)
        {
            let (how, ranges) = (*how, self.chunk_ranges(index).collect::<Vec<_>>());
            ranges.into_iter().for_each(|range| how.round(&mut self.buffer[range]));
        }
        self.executor.complete(index);
    }

    /// Compares a frame from `peer` with the step it is to serve.
    pub(crate) fn check(&self, peer: Rank, index: usize, frame: Header) -> Result<(), Error> {
        let expected = self.header(index);
        if (frame.chunk, frame.bytes) == (expected.chunk, expected.bytes) {
            return Ok(());
        }
        Err(Error::Mismatch {
            peer,
            operation: Arc::clone(&self.label),
            sequence: self.key.sequence,
            chunk: expected.chunk,
            expected: Bytes(expected.bytes),
            sent_chunk: frame.chunk,
            sent: Bytes(frame.bytes),
        })
    }

    /// Each of a step's chunks by itself.
    fn chunk_ranges(&self, index: usize) -> impl Iterator<Item = Range<usize>> {
        let Work::Collective { part, .. } = &self.work else {
            unreachable!("only collectives are compressed")
        };
        let chunks = self.step(index).chunks().range().map(Chunks::one);
        chunks.map(|chunk| part.contract.range(self.buffer.len(), chunk))
    }

    fn range(&self, index: usize) -> Range<usize> {
        match &self.work {
            Work::Collective { part, placement: None, .. } => {
                part.contract.range(self.buffer.len(), part.steps[index].chunks())
            }
            Work::Collective { part, placement: Some(placement), .. } => {
                placement.range(part.steps[index].chunks())
            }
            Work::PointToPoint { .. } => 0..self.buffer.len(),
        }
    }
}

impl Work {
    fn new(group: Group, action: Action) -> Self {
        let (chunks, copy) = (Chunks::one(0), collective::Action::Copy);
        match action {
            Action::Collective(part)
            | Action::Compressed { part, .. }
            | Action::Reduce { part, .. } => {
                Self::Collective { ranks: group.ranks, part, placement: None }
            }
            Action::AllToAll { part, placement } => {
                Self::Collective { ranks: group.ranks, part, placement: Some(placement) }
            }
            Action::Send { to: peer } => {
                Self::PointToPoint { peer, step: Step::Send { to: 0, chunks }, lent: None }
            }
            Action::Lend { to: peer, elements } => {
                let lent = Some(elements);
                Self::PointToPoint { peer, step: Step::Send { to: 0, chunks }, lent }
            }
            Action::Receive { from: peer } => {
                let step = Step::Receive { from: 0, chunks, action: copy };
                Self::PointToPoint { peer, step, lent: None }
            }
        }
    }
}

/// The kind of frame that an action uses.
fn kind_of(action: &Action) -> Kind {
    match action {
        Action::Collective(_)
        | Action::AllToAll { .. }
        | Action::Compressed { .. }
        | Action::Reduce { .. } => Kind::Collective,
        Action::Send { .. } | Action::Lend { .. } | Action::Receive { .. } => Kind::PointToPoint,
    }
}

/// Whether a step adds to chunks that nothing is received for afterwards.
fn is_last_sum(steps: &[Step], index: usize) -> bool {
    let Step::Receive { chunks, action: collective::Action::Reduce, .. } = steps[index] else {
        return false;
    };
    let receives_more = |step: &Step| !step.is_send() && overlap(step.chunks(), chunks);
    !steps[index + 1..].iter().any(receives_more)
}
