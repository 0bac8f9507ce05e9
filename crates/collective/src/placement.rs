//! Where a member of an all-to-all keeps what it sends, receives and passes on.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::{Chunks, Kind, Part, Step, chunk_range};

/// The place of every chunk in the buffer of one member of an all-to-all, whose blocks may all have
/// different sizes: first what it has for others, in their order, then what it receives, message by
/// message, for itself or to be passed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    member: u32,
    ranks: u32,
    pieces: u32,
    chunks: BTreeMap<u32, Range<usize>>,
    elements: usize,
}

impl Placement {
    /// The places of a member that has `elements(from, to)` elements to go from one rank to another;
    /// every member says the same of every pair.
    ///
    /// # Panics
    /// When the part is not one of an all-to-all.
    #[must_use]
    pub fn new(part: &Part, elements: impl Fn(u32, u32) -> usize) -> Self {
        assert!(part.contract.kind == Kind::AllToAll, "only an all-to-all has places of its own");
        let (ranks, pieces) = (part.contract.ranks, part.contract.pieces());
        let chunks = BTreeMap::new();
        let mut placement = Self { member: part.member, ranks, pieces, chunks, elements: 0 };
        let own = part.member * ranks * pieces;
        placement.add(Chunks { first: own, count: ranks * pieces }, &elements);
        for step in &part.steps {
            if let Step::Receive { chunks, .. } = step {
                placement.add(*chunks, &elements);
            }
        }
        placement
    }

    fn add(&mut self, chunks: Chunks, elements: &impl Fn(u32, u32) -> usize) {
        for chunk in chunks.range() {
            let block = chunk / self.pieces;
            let whole = elements(block / self.ranks, block % self.ranks);
            let length = chunk_range(whole, self.pieces, chunk % self.pieces).len();
            self.chunks.insert(chunk, self.elements..self.elements + length);
            self.elements += length;
        }
    }

    /// How long the buffer is.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.elements
    }

    /// Where the chunks of a step are.
    ///
    /// # Panics
    /// When the member has nothing to do with them.
    #[must_use]
    pub fn range(&self, chunks: Chunks) -> Range<usize> {
        let last = chunks.first + chunks.count - 1;
        self.chunks[&chunks.first].start..self.chunks[&last].end
    }

    /// Where the member has what is for a rank.
    ///
    /// # Panics
    /// When there is no such rank.
    #[must_use]
    pub fn outgoing(&self, to: u32) -> Range<usize> {
        assert!(to < self.ranks, "rank {to} of {}", self.ranks);
        self.range(Chunks { first: self.block(self.member, to), count: self.pieces })
    }

    /// Where what a rank had for the member is at the end: in one range, or one for each piece.
    ///
    /// # Panics
    /// When there is no such rank.
    pub fn incoming(&self, from: u32) -> impl Iterator<Item = Range<usize>> {
        assert!(from < self.ranks, "rank {from} of {}", self.ranks);
        let first = self.block(from, self.member);
        (first..first + self.pieces).map(|chunk| self.chunks[&chunk].clone())
    }

    fn block(&self, from: u32, to: u32) -> u32 {
        (from * self.ranks + to) * self.pieces
    }
}
