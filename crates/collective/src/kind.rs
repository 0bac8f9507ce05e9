//! The kinds of collective, and what each promises chunk by chunk.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::{Chunks, chunk_range};

/// What a collective leaves on every rank. The root of those that have one is member 0; who wants
/// another numbers the members from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Every rank holds the sum of all ranks' buffers.
    AllReduce,
    /// Rank `i` holds block `i` of the sum.
    ReduceScatter,
    /// Every rank holds every rank's block; rank `i` brought block `i`.
    AllGather,
    /// Every rank holds the root's buffer.
    Broadcast,
    /// The root holds the sum of all ranks' buffers.
    Reduce,
    /// Rank `j` holds the block that each rank `i` has for it, which is block `i * ranks + j`.
    AllToAll,
    /// The root holds every rank's block; rank `i` brought block `i`.
    Gather,
    /// Rank `i` holds the root's block `i`.
    Scatter,
    /// Every rank has heard of every other: an all-gather of nothing.
    Barrier,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 9] = [
        Self::AllReduce,
        Self::ReduceScatter,
        Self::AllGather,
        Self::Broadcast,
        Self::Reduce,
        Self::AllToAll,
        Self::Gather,
        Self::Scatter,
        Self::Barrier,
    ];

    /// The name in job files, schedules and tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all-reduce",
            Self::ReduceScatter => "reduce-scatter",
            Self::AllGather => "all-gather",
            Self::Broadcast => "broadcast",
            Self::Reduce => "reduce",
            Self::AllToAll => "all-to-all",
            Self::Gather => "gather",
            Self::Scatter => "scatter",
            Self::Barrier => "barrier",
        }
    }

    /// Whether one rank, the root, has another part than the others.
    #[must_use]
    pub const fn has_root(self) -> bool {
        matches!(self, Self::Broadcast | Self::Reduce | Self::Gather | Self::Scatter)
    }

    /// How many blocks the kind speaks of; with one, all that matters is the whole buffer.
    #[must_use]
    pub fn blocks(self, ranks: u32) -> u32 {
        match self {
            Self::AllReduce | Self::Broadcast | Self::Reduce => 1,
            Self::ReduceScatter | Self::AllGather => ranks,
            Self::Gather | Self::Scatter | Self::Barrier => ranks,
            Self::AllToAll => ranks.saturating_mul(ranks),
        }
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What the members of a collective agree on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Contract {
    /// What is left on every member.
    pub kind: Kind,
    /// How many ranks take part.
    pub ranks: u32,
    /// How many switches that can reduce take part; their members come after the ranks. They bring
    /// no data and are promised none.
    pub switches: u32,
    /// How many chunks the data are cut into: equally many in every block.
    pub chunks: u32,
    /// How many sends to one peer may be posted and not yet completed, at least 1.
    pub in_flight: u32,
    /// How many sends to all peers together, which then start in the order of the list; no such
    /// limit without it. A schedule that is free of deadlock under one limit may hang under a
    /// smaller one.
    pub window: Option<u32>,
}

impl Contract {
    /// A contract among ranks alone, without a limit to all sends together.
    #[must_use]
    pub fn new(kind: Kind, ranks: u32, chunks: u32, in_flight: u32) -> Self {
        Self { kind, ranks, switches: 0, chunks, in_flight, window: None }
    }

    /// How many members have steps.
    #[must_use]
    pub fn members(&self) -> u32 {
        self.ranks + self.switches
    }

    /// How many chunks a block is cut into.
    #[must_use]
    pub fn pieces(&self) -> u32 {
        self.chunks / self.kind.blocks(self.ranks)
    }

    /// Whether a rank's chunk has data in it at the start: its own, for others to have or to add.
    pub(crate) fn starts_with(&self, rank: u32, chunk: u32) -> bool {
        let block = chunk / self.pieces();
        match self.kind {
            Kind::AllReduce | Kind::ReduceScatter | Kind::Reduce => true,
            Kind::AllGather | Kind::Gather | Kind::Barrier => block == rank,
            Kind::Broadcast | Kind::Scatter => rank == 0,
            Kind::AllToAll => block / self.ranks == rank,
        }
    }

    /// Whose data a rank's chunk must be made of at the end; `None` where nothing is promised.
    pub(crate) fn promises(&self, rank: u32, chunk: u32) -> Option<Range<u32>> {
        let block = chunk / self.pieces();
        let (all, only) = (0..self.ranks, |rank| rank..rank + 1);
        match self.kind {
            Kind::AllReduce => Some(all),
            Kind::ReduceScatter => (block == rank).then_some(all),
            Kind::Reduce => (rank == 0).then_some(all),
            Kind::AllGather | Kind::Barrier => Some(only(block)),
            Kind::Gather => (rank == 0).then_some(only(block)),
            Kind::Broadcast => Some(only(0)),
            Kind::Scatter => (block == rank).then_some(only(0)),
            Kind::AllToAll => (block % self.ranks == rank).then_some(only(block / self.ranks)),
        }
    }

    /// Where chunks lie in a buffer of `elements`, the same for every member. A chunk is a part of
    /// its block, which is a part of the buffer, so that blocks lie where they would lie uncut.
    ///
    /// # Panics
    /// When there are no such chunks, and for an all-to-all, whose members do not lay out their
    /// buffers alike: see [`crate::Placement`].
    #[must_use]
    pub fn range(&self, elements: usize, chunks: Chunks) -> Range<usize> {
        assert!(self.kind != Kind::AllToAll, "each member of an all-to-all has its own layout");
        let (blocks, pieces) = (self.kind.blocks(self.ranks), self.pieces());
        let range = |chunk: u32| {
            let block = chunk_range(elements, blocks, chunk / pieces);
            let piece = chunk_range(block.len(), pieces, chunk % pieces);
            block.start + piece.start..block.start + piece.end
        };
        range(chunks.first).start..range(chunks.first + chunks.count - 1).end
    }
}
