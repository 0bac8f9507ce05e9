//! A training step as data: what each rank does, in order, as lists of instructions.
//!
//! This is the narrow waist of Phalanx. `plan` writes a [`Program`]; the verifier, the printer,
//! the simulator and the real runtime read the same lists, the latter two through the same
//! [`Executor`]. Nothing here knows where or how fast a program runs.

mod breakdown;
mod choice;
mod exchange;
mod executor;
mod instruction;
mod meetings;
mod mesh;
mod text;
mod trace;
mod verify;

use std::collections::BTreeMap;
use std::ops::Range;

use model::{Block, Operator, Pass, Segment, Shape};
use units::{Bytes, Flops, Rank};

pub use breakdown::{Breakdown, Work};
pub use choice::{Choice, Choices, Occasion};
pub use exchange::{Due, Dues, Exchanges};
pub use executor::{Executor, Next};
pub use instruction::{Action, Buffer, Instruction, Piece, Ticket, Transfer, Value, Values};
pub use meetings::{Meetings, Party};
pub use mesh::{Axis, Mesh, Placement};
pub use trace::{Lane, Span, Trace};
pub use verify::VerifyError;

/// One optimizer step (or one evaluation) of every rank.
///
/// Ranks that do the same share one list: the ranks of a pipeline stage form a class.
#[derive(Debug, Clone)]
pub struct Program {
    /// How ranks are arranged along the axes.
    pub mesh: Mesh,
    /// Microbatches per data-parallel rank.
    pub microbatches: u32,
    /// The size of one microbatch.
    pub shape: Shape,
    /// Most transfers a rank may have posted and not completed; a post beyond it blocks.
    pub in_flight: usize,
    /// Whether a rank holds only its chunk of each block at the start of the step.
    pub parameters_sharded: bool,
    /// Whether a rank updates only its chunk of each block.
    pub optimizer_sharded: bool,
    /// Steps that the replicas take apart, as groups of their own, before their parameters meet;
    /// 0 where their gradients do in every step.
    pub local_steps: u32,
    /// Whether the head's product uses the embedding block.
    pub tied_embeddings: bool,
    /// The instructions of each class, by pipeline coordinate.
    pub classes: Vec<Vec<Instruction>>,
    /// Layers of the model; the number that instructions of the head carry.
    pub layers: u32,
    /// The operators of one microbatch through each segment, by the number of pieces that it is
    /// cut into; those of one piece.
    pub segments: BTreeMap<(Segment, Pass, u8), Vec<Operator>>,
    /// Elements of each block that one rank of its group holds when it is whole.
    pub blocks: BTreeMap<Block, u64>,
    /// Of these, elements that several tensor-parallel ranks hold and of whose gradient each has a
    /// part; 0 where there are none.
    pub replicated: BTreeMap<Block, u64>,
}

impl Program {
    /// What `rank` does.
    #[must_use]
    pub fn instructions(&self, rank: Rank) -> &[Instruction] {
        &self.classes[self.mesh.coordinate(rank, Axis::Pipeline) as usize]
    }

    /// The block whose parameters `segment` of `layer` uses.
    #[must_use]
    pub fn block_used(&self, segment: Segment, layer: u32) -> Block {
        // A prediction layer has every other number after the head's, its own head the next.
        let prediction = layer.checked_sub(self.layers + 1).map(|after| after / 2);
        match (segment, prediction) {
            (Segment::Embed, _) => Block::Embedding,
            (Segment::Logits, _) if self.tied_embeddings => Block::Embedding,
            (Segment::Logits | Segment::LogSums | Segment::Loss, _)
            | (Segment::FinalNorm, None) => Block::Head,
            (Segment::Experts, _) => Block::Experts(layer),
            (_, Some(number)) => Block::Prediction(number),
            (_, None) => Block::Layer(layer),
        }
    }

    /// What is due on values wherever ranks split layers.
    #[must_use]
    pub fn exchanges(&self) -> Exchanges {
        Exchanges { mesh: self.mesh, sequence_parallel: self.shape.sequence_parallel }
    }

    /// The axis along which ranks hold the same part of a block, reduce its gradients and share
    /// out its state.
    #[must_use]
    pub fn data_axis(block: Block) -> Axis {
        match block {
            Block::Experts(_) => Axis::ExpertData,
            _ => Axis::Data,
        }
    }

    /// Elements of `block` that one rank updates.
    #[must_use]
    pub fn updated_elements(&self, block: Block) -> u64 {
        let ranks = self.mesh.degree(Self::data_axis(block));
        let degree = if self.optimizer_sharded { ranks } else { 1 };
        self.blocks[&block].div_ceil(u64::from(degree))
    }

    /// The operators an instruction carries out; empty for one that only moves or waits.
    #[must_use]
    pub fn operators(&self, instruction: &Instruction) -> Vec<Operator> {
        match *instruction {
            Instruction::Compute { segment, pass, piece, .. } => {
                self.segments[&(segment, pass, piece.of)].clone()
            }
            Instruction::Accumulate { block } => {
                vec![Operator::Add { elements: self.updated_elements(block) }]
            }
            Instruction::SquareSum { block } => {
                let degree = u64::from(self.mesh.degree(Self::data_axis(block)));
                vec![Operator::SquareSum { elements: self.blocks[&block].div_ceil(degree) }]
            }
            Instruction::Update { block } => {
                vec![Operator::AdamW { elements: self.updated_elements(block) }]
            }
            // The mean change to the momentum, and both to the anchor.
            Instruction::OuterUpdate { block } => {
                vec![Operator::Add { elements: self.updated_elements(block) }; 3]
            }
            Instruction::Discard { .. }
            | Instruction::Release { .. }
            | Instruction::Post { .. }
            | Instruction::Wait { .. } => {
                vec![]
            }
        }
    }

    /// Groups of ranks that train apart between outer updates: 1, or as many as there are replicas.
    #[must_use]
    pub fn groups(&self) -> u32 {
        if self.local_steps > 0 { self.mesh.replicas } else { 1 }
    }

    /// Sequences in a step, over all ranks.
    #[must_use]
    pub fn global_batch(&self) -> u64 {
        u64::from(self.mesh.data) * u64::from(self.microbatches) * self.shape.sequences
    }

    /// Tokens in a step, over all ranks.
    #[must_use]
    pub fn global_tokens(&self) -> u64 {
        self.global_batch() * self.shape.sequence
    }

    /// The positions within a step's batch that a microbatch of `rank` takes. Together the ranks
    /// of a data axis and their microbatches cover `0..global_batch` once, in an order that does
    /// not depend on the layout.
    #[must_use]
    pub fn positions(&self, rank: Rank, microbatch: u32) -> Range<u64> {
        let data = u64::from(self.mesh.batch_coordinate(rank));
        let index = data * u64::from(self.microbatches) + u64::from(microbatch);
        index * self.shape.sequences..(index + 1) * self.shape.sequences
    }

    /// The blocks that `rank` updates: those it holds.
    #[must_use]
    pub fn held_blocks(&self, rank: Rank) -> Vec<Block> {
        let updated = |instruction: &Instruction| match instruction {
            Instruction::Update { block } => Some(*block),
            _ => None,
        };
        self.instructions(rank).iter().filter_map(updated).collect()
    }

    /// FLOPs of one class in one step.
    #[must_use]
    pub fn flops(&self, class: usize) -> Flops {
        self.classes[class].iter().flat_map(|i| self.operators(i)).map(|o| o.flops()).sum()
    }

    /// Bytes a rank of one class hands to transfers in one step.
    #[must_use]
    pub fn transferred(&self, class: usize) -> Bytes {
        self.classes[class]
            .iter()
            .filter_map(|instruction| match instruction {
                Instruction::Post { transfer, .. } => Some(transfer.bytes()),
                _ => None,
            })
            .sum()
    }

    /// The transfer that `ticket` names in the list of `rank`.
    #[must_use]
    pub fn transfer(&self, rank: Rank, ticket: Ticket) -> Option<&Transfer> {
        self.instructions(rank).iter().find_map(|instruction| match instruction {
            Instruction::Post { ticket: posted, transfer } if *posted == ticket => Some(transfer),
            _ => None,
        })
    }
}
