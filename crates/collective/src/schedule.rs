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

/// What a member does with a chunk that it receives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// The chunk replaces what the member held.
    Copy,
    /// The chunk is added to what the member holds.
    Reduce,
}

/// One transfer as seen by one member.
///
/// Two members' steps meet by order: the n-th send from a to b is the n-th receive of b from a.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Send the member's chunk as it stands after every earlier step on that chunk.
    Send {
        /// The receiving member.
        to: u32,
        /// Which chunk of the buffer.
        chunk: u32,
    },
    /// Receive a chunk and copy or reduce it into the member's own.
    Receive {
        /// The sending member.
        from: u32,
        /// Which chunk of the buffer.
        chunk: u32,
        /// What happens to it on arrival.
        action: Action,
    },
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

impl Step {
    /// The chunk that the step reads or writes.
    #[must_use]
    pub fn chunk(self) -> u32 {
        match self {
            Self::Send { chunk, .. } | Self::Receive { chunk, .. } => chunk,
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

/// A collective over a group: one list of steps per member, over as many chunks as members.
///
/// A list fixes the order of reductions, so the floating-point result has the same bits whatever
/// the timing. It does not fix when a step runs: see [`crate::Executor`] for what waits for what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Schedule {
    /// What the schedule leaves on every member.
    pub kind: Kind,
    /// How many sends to one peer may be posted and not yet completed, at least 1. It is part of
    /// the contract: a schedule that is free of deadlock under one limit may hang under a smaller
    /// one.
    pub in_flight: u32,
    /// The steps of every member.
    pub steps: Vec<Vec<Step>>,
}

impl Schedule {
    /// The number of members, which is also the number of chunks.
    #[must_use]
    pub fn ranks(&self) -> u32 {
        self.steps.len() as u32
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
