//! The data: what a collective does, step by step, and how a buffer is cut into chunks.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// What a collective leaves on every rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Every rank holds the sum of all ranks' buffers.
    AllReduce,
    /// Rank `i` holds chunk `i` of the sum.
    ReduceScatter,
    /// Every rank holds every rank's chunk; rank `i` brought chunk `i`.
    AllGather,
}

/// What a member does with chunks that it receives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// They replace what the member held.
    Copy,
    /// They are added to what the member holds.
    Reduce,
}

/// Neighbouring chunks that travel as one message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Chunks {
    /// The first of them.
    pub first: u32,
    /// How many, at least 1.
    pub count: u32,
}

/// One transfer as seen by one member.
///
/// Two members' steps meet by order: the n-th send from a to b is the n-th receive of b from a.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Send the member's chunks as they stand after every earlier step on them.
    Send {
        /// The receiving member.
        to: u32,
        /// Which chunks of the buffer.
        chunks: Chunks,
    },
    /// Receive chunks and copy or reduce them into the member's own.
    Receive {
        /// The sending member.
        from: u32,
        /// Which chunks of the buffer.
        chunks: Chunks,
        /// What happens to them on arrival.
        action: Action,
    },
}

/// What the members of a collective agree on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Contract {
    /// What is left on every member.
    pub kind: Kind,
    /// How many ranks take part.
    pub ranks: u32,
    /// How many chunks the buffer is cut into.
    pub chunks: u32,
    /// How many sends to one peer may be posted and not yet completed, at least 1. A schedule that
    /// is free of deadlock under one limit may hang under a smaller one.
    pub in_flight: u32,
}

/// One member's part of a collective: all that it needs in order to take part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// What the members agree on.
    pub contract: Contract,
    /// Whose part it is.
    pub member: u32,
    /// What the member does.
    pub steps: Vec<Step>,
}

/// A whole collective: every member's steps, for verification and for files.
///
/// A list fixes the order of reductions, so the floating-point result has the same bits whatever
/// the timing. It does not fix when a step runs: see [`crate::Executor`] for what waits for what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Schedule {
    /// What the members agree on.
    pub contract: Contract,
    /// The steps of every member.
    pub steps: Vec<Vec<Step>>,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::AllReduce => "all-reduce",
            Self::ReduceScatter => "reduce-scatter",
            Self::AllGather => "all-gather",
        })
    }
}

impl std::fmt::Display for Chunks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.count {
            1 => write!(f, "chunk {}", self.first),
            _ => write!(f, "chunks {}..{}", self.first, self.first.saturating_add(self.count)),
        }
    }
}

impl Chunks {
    /// A single chunk.
    #[must_use]
    pub const fn one(chunk: u32) -> Self {
        Self { first: chunk, count: 1 }
    }

    /// The numbers of the chunks.
    #[must_use]
    pub fn range(self) -> Range<u32> {
        self.first..self.first + self.count
    }
}

impl Step {
    /// The chunks that the step reads or writes.
    #[must_use]
    pub fn chunks(self) -> Chunks {
        match self {
            Self::Send { chunks, .. } | Self::Receive { chunks, .. } => chunks,
        }
    }

    /// The member at the other end.
    #[must_use]
    pub fn peer(self) -> u32 {
        match self {
            Self::Send { to: peer, .. } | Self::Receive { from: peer, .. } => peer,
        }
    }

    /// Whether the step sends.
    #[must_use]
    pub fn is_send(self) -> bool {
        matches!(self, Self::Send { .. })
    }
}

impl Contract {
    /// How many equal parts the kind of collective speaks of: with one, all that matters is the
    /// whole buffer.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        match self.kind {
            Kind::AllReduce => 1,
            Kind::ReduceScatter | Kind::AllGather => self.ranks,
        }
    }

    /// The block that a chunk is a piece of.
    #[must_use]
    pub fn block(&self, chunk: u32) -> u32 {
        chunk / (self.chunks / self.blocks())
    }

    /// Whether a member's chunk has data in it at the start: its own, for others to have or to add.
    pub(crate) fn starts_with(&self, member: u32, chunk: u32) -> bool {
        match self.kind {
            Kind::AllReduce | Kind::ReduceScatter => true,
            Kind::AllGather => self.block(chunk) == member,
        }
    }

    /// Whose data a member's chunk must be made of at the end; `None` where nothing is promised.
    pub(crate) fn promises(&self, member: u32, chunk: u32) -> Option<Range<u32>> {
        let block = self.block(chunk);
        match self.kind {
            Kind::AllReduce => Some(0..self.ranks),
            Kind::ReduceScatter => (block == member).then_some(0..self.ranks),
            Kind::AllGather => Some(block..block + 1),
        }
    }

    /// Where chunks lie in a buffer of `elements`.
    ///
    /// # Panics
    /// When there are no such chunks.
    #[must_use]
    pub fn range(&self, elements: usize, chunks: Chunks) -> Range<usize> {
        self.piece(elements, chunks.first).start
            ..self.piece(elements, chunks.first + chunks.count - 1).end
    }

    /// A chunk is a part of its block, which is a part of the buffer, so that blocks lie where they
    /// would lie without chunks.
    fn piece(&self, elements: usize, chunk: u32) -> Range<usize> {
        let pieces = self.chunks / self.blocks();
        let block = chunk_range(elements, self.blocks(), chunk / pieces);
        let piece = chunk_range(block.len(), pieces, chunk % pieces);
        block.start + piece.start..block.start + piece.end
    }
}

impl Schedule {
    /// One member's part of it.
    ///
    /// # Panics
    /// When there is no such member.
    #[must_use]
    pub fn part(&self, member: u32) -> Part {
        Part { contract: self.contract, member, steps: self.steps[member as usize].clone() }
    }
}

/// The elements of part `index` when `elements` are cut into `parts`, the longer parts first.
///
/// Lengths differ by at most one. This is the one partition in use: the chunks of a collective and
/// the shards of a parameter are the same ranges.
///
/// # Panics
/// When `index` is not below `parts`.
#[must_use]
pub fn chunk_range(elements: usize, parts: u32, index: u32) -> Range<usize> {
    assert!(index < parts, "part {index} of {parts}");
    let (parts, index) = (parts as usize, index as usize);
    let (length, longer) = (elements / parts, elements % parts);
    let start = index * length + index.min(longer);
    start..start + length + usize::from(index < longer)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn parts_tile_the_whole_and_differ_by_at_most_one(
            elements in 0_usize..10_000,
            parts in 1_u32..100,
        ) {
            let ranges: Vec<_> = (0..parts).map(|i| chunk_range(elements, parts, i)).collect();
            prop_assert_eq!(ranges[0].start, 0);
            prop_assert_eq!(ranges[ranges.len() - 1].end, elements);
            prop_assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start));
            let longest = ranges[0].len();
            prop_assert!(ranges.iter().all(|r| r.len() == longest || r.len() + 1 == longest));
        }
    }
}
