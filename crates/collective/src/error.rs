//! What can be wrong with a collective.

use crate::{Chunks, Kind};

/// Why there is no such schedule, or why it is wrong. Members, steps and chunks are numbered from 0.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The algorithm does not carry out this kind.
    #[error("{algorithm} does not do {kind}; ring and direct do")]
    NoSuch {
        /// The algorithm.
        algorithm: String,
        /// The kind.
        kind: Kind,
    },
    /// The algorithm is for another number of ranks.
    #[error("{algorithm} has {members} members, the group {ranks}")]
    OtherSize {
        /// The algorithm.
        algorithm: String,
        /// How many it is for.
        members: u64,
        /// How many there are.
        ranks: u32,
    },
    /// The algorithm cannot be a level of a hierarchy.
    #[error("{algorithm} cannot be a level of a hierarchy; list its own levels, or take direct")]
    UnfitLevel {
        /// The algorithm.
        algorithm: String,
    },
    /// The buffer of this kind is not cut into so many pieces.
    #[error("{kind} cannot be pipelined in {pieces} pieces; all-reduce, broadcast and reduce can")]
    Pieces {
        /// The kind.
        kind: Kind,
        /// How many pieces.
        pieces: u32,
    },
    /// The data would be cut into more chunks than can be numbered.
    #[error("{algorithm} needs {chunks} chunks for {kind} among {ranks} ranks, more than 2^32 - 1")]
    TooLarge {
        /// The algorithm.
        algorithm: String,
        /// The kind.
        kind: Kind,
        /// How many ranks there are.
        ranks: u32,
        /// How many chunks it would take.
        chunks: u64,
    },
    /// A text is no schedule.
    #[error("line {line}: {reason}")]
    Syntax {
        /// The line, counted from 1.
        line: usize,
        /// What is wrong there, and what was expected.
        reason: String,
    },
    /// A schedule has at least one rank and lets at least one send be in flight.
    #[error("a schedule needs at least one rank, and limits to what is in flight of at least 1")]
    Empty,
    /// There is no list for every rank, or the blocks that the kind speaks of are not made of chunks.
    #[error(
        "{kind} over {ranks} ranks and {switches} switches needs as many lists of steps, not \
         {lists}, and a multiple of {blocks} chunks, not {chunks}"
    )]
    Shape {
        /// The kind.
        kind: Kind,
        /// The size of the group.
        ranks: u32,
        /// How many switches take part.
        switches: u32,
        /// How many blocks the kind speaks of.
        blocks: u32,
        /// How many lists there are.
        lists: usize,
        /// How many chunks there are.
        chunks: u32,
    },
    /// Who holds what would not fit into a sensible memory.
    #[error(
        "{members} members with {chunks} chunks each are too many to verify at once; verify the same \
         schedule for fewer"
    )]
    Unverifiable {
        /// How many members there are.
        members: usize,
        /// How many chunks there are.
        chunks: u32,
    },
    /// A step names a member or a chunk that does not exist, or the member itself.
    #[error(
        "member {member}, step {step}: no peer {peer} or no {range} among {lists} members and \
         {chunks} chunks"
    )]
    OutOfRange {
        /// Whose step.
        member: u32,
        /// Index in the member's list.
        step: usize,
        /// The peer it names.
        peer: u32,
        /// The chunks it names.
        range: Chunks,
        /// How many members there are.
        lists: usize,
        /// How many chunks there are.
        chunks: u32,
    },
    /// A receive meets a send of other chunks.
    #[error("member {member}, step {step}: expects {expected}, but member {from} sends {sent}")]
    WrongChunk {
        /// The receiving member.
        member: u32,
        /// Index in the receiving member's list.
        step: usize,
        /// What the receive expects.
        expected: Chunks,
        /// The sending member.
        from: u32,
        /// What comes.
        sent: Chunks,
    },
    /// A contribution would be summed twice.
    #[error(
        "member {member}, step {step}: chunk {chunk} already holds member {contributor}'s part"
    )]
    DoubleReduction {
        /// The receiving member.
        member: u32,
        /// Index in the receiving member's list.
        step: usize,
        /// The chunk.
        chunk: u32,
        /// Whose contribution is in both.
        contributor: u32,
    },
    /// A chunk is sent, or reduced into, before anything meaningful is in it.
    #[error("member {member}, step {step}: chunk {chunk} has nothing in it yet")]
    Unfilled {
        /// The receiving member.
        member: u32,
        /// Index in the receiving member's list.
        step: usize,
        /// The chunk.
        chunk: u32,
    },
    /// A step never gets a partner: the schedule hangs.
    #[error(
        "member {member}, step {step}: {chunks} waits for member {peer} for ever (deadlock with \
         {in_flight} in flight)"
    )]
    Deadlock {
        /// The waiting member.
        member: u32,
        /// Index in its list.
        step: usize,
        /// The chunks.
        chunks: Chunks,
        /// The member that never answers.
        peer: u32,
        /// The limit under which it hangs.
        in_flight: u32,
    },
    /// Everything ran, but a chunk does not hold what the kind of collective promises.
    #[error("member {member} ends with chunk {chunk} made of {held:?}, expected {expected:?}")]
    WrongResult {
        /// The member.
        member: u32,
        /// The chunk.
        chunk: u32,
        /// The contributors that the chunk holds.
        held: Vec<u32>,
        /// The contributors that it should hold.
        expected: Vec<u32>,
    },
}
