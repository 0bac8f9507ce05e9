//! The data: what a collective does, step by step, and how a buffer is cut into chunks.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::{Contract, Executor};

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
/// the timing. It does not fix when a step runs: see [`Executor`] for what waits for what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Schedule {
    /// What the members agree on.
    pub contract: Contract,
    /// The steps of every member.
    pub steps: Vec<Vec<Step>>,
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

    /// The same step on chunks that lie further on.
    pub(crate) fn moved(self, by: u32) -> Self {
        let moved = |chunks: Chunks| Chunks { first: chunks.first + by, ..chunks };
        match self {
            Self::Send { to, chunks } => Self::Send { to, chunks: moved(chunks) },
            Self::Receive { from, chunks, action } => {
                Self::Receive { from, chunks: moved(chunks), action }
            }
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

impl Part {
    /// The part's state machine, at the start.
    ///
    /// # Panics
    /// When the contract lets nothing be in flight.
    #[must_use]
    pub fn executor(&self) -> Executor {
        Executor::new(&self.steps, self.contract.in_flight).with_window(self.contract.window)
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
