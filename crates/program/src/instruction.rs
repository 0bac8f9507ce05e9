//! The instruction set: compute a segment, update parameters, post a transfer, wait for it.

use std::fmt;

use model::{Block, Pass, Segment};
use serde::{Deserialize, Serialize};
use smallvec::{SmallVec, smallvec};
use units::Bytes;

use crate::Axis;

/// A tensor that one microbatch leaves behind on its way through the model. The number is a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Value {
    /// The residual stream entering a layer; entering the head when the number is the layer count.
    Stream(u32),
    /// The embedding of the next words, with which a prediction layer begins.
    Embedded(u32),
    /// The normed input of attention.
    AttentionNormed(u32),
    /// Queries, keys and values, rotated.
    Qkv(u32),
    /// The keys and values among them, which context-parallel ranks exchange.
    KeyValues(u32),
    /// Weighted values of all heads.
    Attended(u32),
    /// What attention adds to the stream.
    AttentionDelta(u32),
    /// The residual stream between attention and feed-forward.
    Middle(u32),
    /// The normed input of the feed-forward block.
    FeedForwardNormed(u32),
    /// What the feed-forward block adds to the stream.
    FeedForwardDelta(u32),
    /// The experts chosen for each token, and their weights.
    Routes(u32),
    /// Copies of tokens on their way to experts.
    Dispatched(u32),
    /// What the experts made of them.
    Expertise(u32),
    /// What the shared experts add to the stream.
    SharedDelta(u32),
    /// The normed input of the head.
    FinalNormed(u32),
    /// Scores over the vocabulary.
    Logits(u32),
    /// Of each word: the maximum, the sum of exponentials and the target's score.
    LogSums(u32),
    /// The loss.
    Loss(u32),
}

/// What a segment reads; few, and looked up for every instruction.
pub type Values = SmallVec<[Value; 3]>;

impl Value {
    /// What `segment` of `layer` reads and what it writes, in the forward direction. Where nothing
    /// writes a value that is read here (a model without shared experts), it is not needed.
    #[must_use]
    pub fn of(segment: Segment, layer: u32) -> (Values, Self) {
        match segment {
            Segment::Embed if layer > 0 => (smallvec![], Self::Embedded(layer)),
            Segment::Embed => (smallvec![], Self::Stream(0)),
            Segment::AttentionNorm => {
                (smallvec![Self::Stream(layer)], Self::AttentionNormed(layer))
            }
            Segment::Qkv => (smallvec![Self::AttentionNormed(layer)], Self::Qkv(layer)),
            Segment::Attend | Segment::AttendWindow => {
                (smallvec![Self::Qkv(layer)], Self::Attended(layer))
            }
            Segment::Project => (smallvec![Self::Attended(layer)], Self::AttentionDelta(layer)),
            Segment::AttentionAdd => {
                (smallvec![Self::Stream(layer), Self::AttentionDelta(layer)], Self::Middle(layer))
            }
            Segment::FeedForwardNorm => {
                (smallvec![Self::Middle(layer)], Self::FeedForwardNormed(layer))
            }
            Segment::FeedForward => {
                (smallvec![Self::FeedForwardNormed(layer)], Self::FeedForwardDelta(layer))
            }
            Segment::Route => (smallvec![Self::FeedForwardNormed(layer)], Self::Routes(layer)),
            Segment::Dispatch => (
                smallvec![Self::FeedForwardNormed(layer), Self::Routes(layer)],
                Self::Dispatched(layer),
            ),
            Segment::Experts => (smallvec![Self::Dispatched(layer)], Self::Expertise(layer)),
            Segment::SharedExperts => {
                (smallvec![Self::FeedForwardNormed(layer)], Self::SharedDelta(layer))
            }
            Segment::Combine => {
                let inputs = smallvec![
                    Self::Expertise(layer),
                    Self::Routes(layer),
                    Self::SharedDelta(layer)
                ];
                (inputs, Self::FeedForwardDelta(layer))
            }
            Segment::FeedForwardAdd => (
                smallvec![Self::Middle(layer), Self::FeedForwardDelta(layer)],
                Self::Stream(layer + 1),
            ),
            // What a prediction layer begins with is the stream that the layer before it left.
            Segment::Merge => {
                (smallvec![Self::Stream(layer - 1), Self::Embedded(layer)], Self::Stream(layer))
            }
            Segment::FinalNorm => (smallvec![Self::Stream(layer)], Self::FinalNormed(layer)),
            Segment::Logits => (smallvec![Self::FinalNormed(layer)], Self::Logits(layer)),
            Segment::LogSums => (smallvec![Self::Logits(layer)], Self::LogSums(layer)),
            Segment::Loss => {
                (smallvec![Self::Logits(layer), Self::LogSums(layer)], Self::Loss(layer))
            }
        }
    }
}

/// What a transfer moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Buffer {
    /// A block's parameters.
    Parameters(Block),
    /// A block's gradients.
    Gradients(Block),
    /// Of a block's gradients, those of parameters that every tensor-parallel rank holds whole (or
    /// several hold, as with key and value heads) and has only its own part of the sum for.
    ReplicatedGradients(Block),
    /// What the reduction of a block's gradients left here: the own chunk, or all of it.
    ReducedGradients(Block),
    /// How far a block's parameters have come from their anchor, where they were after the last
    /// outer update.
    Change(Block),
    /// A value of a microbatch.
    Activation {
        /// Which value.
        value: Value,
        /// Of which microbatch.
        microbatch: u32,
    },
    /// The gradient of a value of a microbatch.
    ActivationGradient {
        /// Which value.
        value: Value,
        /// Of which microbatch.
        microbatch: u32,
    },
    /// Each rank's share of the squared gradient norm and of the loss.
    Statistics,
}

/// How a transfer moves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Action {
    /// Together with the group along the axis.
    Collective(collective::Kind),
    /// To the rank at this coordinate along the axis.
    Send {
        /// Coordinate of the receiver.
        to: u32,
    },
    /// From the rank at this coordinate along the axis.
    Receive {
        /// Coordinate of the sender.
        from: u32,
    },
    /// To the next rank along the axis and from the one before it, around the ring, all at once.
    Shift,
}

/// Which of the pieces along the sequence that a segment or a transfer is cut into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Piece {
    /// Counted from 0.
    pub index: u8,
    /// How many there are.
    pub of: u8,
}

impl Piece {
    /// All of it.
    pub const WHOLE: Self = Self { index: 0, of: 1 };

    /// Whether none comes after it.
    #[must_use]
    pub fn is_last(self) -> bool {
        self.index + 1 == self.of
    }

    /// The piece before it; `None` for the first.
    #[must_use]
    pub fn before(self) -> Option<Self> {
        Some(Self { index: self.index.checked_sub(1)?, ..self })
    }

    /// Whether it is all there is.
    #[must_use]
    pub fn is_whole(self) -> bool {
        self.of == 1
    }
}

/// A movement of one buffer along one axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Transfer {
    /// How.
    pub action: Action,
    /// Along which axis.
    pub axis: Axis,
    /// What.
    pub buffer: Buffer,
    /// Elements of the whole buffer: what an all-gather leaves, what a reduction or an all-to-all
    /// starts from, on each rank.
    pub elements: u64,
    /// Bytes of an element on its way.
    pub element_bytes: u8,
    /// Which piece of the buffer, if the segment beside it is cut.
    pub piece: Piece,
}

impl Transfer {
    /// Size of the whole buffer.
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        Bytes(u64::from(self.element_bytes) * self.elements)
    }
}

/// Names a posted transfer until it is waited for; unique within a rank's list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Ticket(pub u32);

/// One entry of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Instruction {
    /// Carry out a segment for a microbatch.
    Compute {
        /// Which segment.
        segment: Segment,
        /// In which direction.
        pass: Pass,
        /// Of which layer; for the head the layer count, for the embedding 0.
        layer: u32,
        /// For which microbatch.
        microbatch: u32,
        /// Which piece of it.
        piece: Piece,
    },
    /// Forget a value and what its segment saved beside it for the backward pass, which will have
    /// them computed again.
    Discard {
        /// Which value.
        value: Value,
        /// Of which microbatch.
        microbatch: u32,
    },
    /// Add the reduced gradient of a microbatch to the sum over the microbatches.
    Accumulate {
        /// Of which block.
        block: Block,
    },
    /// Add this rank's share of the squared gradient norm. A parameter that several
    /// tensor-parallel ranks hold is counted by the first of them, a share that several replicas
    /// hold by the first replica.
    SquareSum {
        /// Of which block.
        block: Block,
    },
    /// Clip by the global norm and apply the optimizer.
    Update {
        /// To which block.
        block: Block,
    },
    /// Apply the outer optimizer to the mean change of all groups, and go on from there.
    OuterUpdate {
        /// To which block.
        block: Block,
    },
    /// Forget gathered parameters and keep the own chunk.
    Release {
        /// Of which block.
        block: Block,
    },
    /// Start a transfer and go on.
    Post {
        /// Names it for the wait.
        ticket: Ticket,
        /// What to move.
        transfer: Transfer,
    },
    /// Go on only when the transfer is complete.
    Wait {
        /// As posted.
        ticket: Ticket,
    },
}

impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}
