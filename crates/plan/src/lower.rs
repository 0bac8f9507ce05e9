//! Lowering: from a layout to the instruction list of every pipeline rank.
//!
//! A rank's list is built from its turns (a microbatch through one of its stages in one direction),
//! each turn from its visits to blocks, each visit from segments. What layouts add stands around
//! these: `pipeline` hands values from stage to stage around a turn, `data` gathers parameters
//! before a visit and reduces gradients after it, `segments` gathers and reduces values around a
//! segment. All transfers are posted as soon as what they move is there, and waited for where the
//! result is used.

mod data;
mod pipeline;
mod segments;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use model::{Block, Config, Operator, Pass, Segment, Shape};
use program::{
    Action, Axis, Buffer, Exchanges, Instruction, Piece, Program, Ticket, Transfer, Value,
};
use rayon::prelude::*;
use smallvec::SmallVec;

use crate::schedule::{Turn, forward_only, turns};
use crate::{Batch, ContextExchange, Layout, LayoutError, Shard, TensorOverlap};
use data::Uses;

/// Most transfers a rank keeps in flight.
const IN_FLIGHT: usize = 32;

/// The program of one optimizer step.
///
/// # Errors
/// A layout that does not fit the model or the batch.
pub fn lower(config: &Config, layout: &Layout, batch: &Batch) -> Result<Program, LayoutError> {
    layout.check(config, batch)?;
    let common = Common::new(config, layout, batch);
    let turns = |rank| turns(layout, rank, common.microbatches).map_err(LayoutError::Schedule);
    let turns = (0..layout.mesh.pipeline).map(turns).collect::<Result<Vec<_>, _>>()?;
    let class = |(rank, turns): (usize, &Vec<Turn>)| {
        let mut lowering = Lowering::new(&common, rank as u32, turns);
        lowering.gather_first();
        lowering.turns(turns);
        lowering.update();
        lowering.list
    };
    let classes = turns.par_iter().enumerate().map(class).collect();
    Ok(common.program(classes))
}

/// The program of one evaluation: forward passes over `batch`, the loss shared by all ranks.
///
/// # Errors
/// A layout that does not fit the model or the batch.
pub fn lower_evaluation(
    config: &Config,
    layout: &Layout,
    batch: &Batch,
) -> Result<Program, LayoutError> {
    layout.check(config, batch)?;
    let common = Common::new(config, layout, batch);
    let turns = forward_only(layout, common.microbatches);
    let class = |rank| {
        let mut lowering = Lowering::new(&common, rank, &turns);
        lowering.gather_first();
        lowering.turns(&turns);
        lowering.drain_sends(0);
        lowering.share_statistics();
        lowering.list
    };
    let classes = (0..layout.mesh.pipeline).map(class).collect();
    Ok(common.program(classes))
}

/// The program of an outer update, which follows every `local_steps`-th step: the groups' mean change
/// of each block is the gradient of an outer optimizer (Douillard et al. 2023, `DiLoCo`, algorithm 1).
/// `None` where gradients meet in every step.
///
/// # Errors
/// A layout that does not fit the model or the batch.
pub fn lower_outer(
    config: &Config,
    layout: &Layout,
    batch: &Batch,
) -> Result<Option<Program>, LayoutError> {
    layout.check(config, batch)?;
    if layout.local_steps == 0 {
        return Ok(None);
    }
    let common = Common::new(config, layout, batch);
    let class = |rank| {
        let mut lowering = Lowering::new(&common, rank, &[]);
        lowering.outer_update();
        lowering.list
    };
    let classes = (0..layout.mesh.pipeline).map(class).collect();
    Ok(Some(common.program(classes)))
}

/// What all ranks have in common.
struct Common<'a> {
    config: &'a Config,
    layout: &'a Layout,
    microbatches: u32,
    shape: Shape,
    exchanges: Exchanges,
    /// Elements of a rank's part of each block, and of those that tensor-parallel ranks repeat.
    blocks: BTreeMap<Block, u64>,
    replicated: BTreeMap<Block, u64>,
    segments: BTreeMap<(Segment, Pass, u8), Vec<Operator>>,
    /// The blocks that a turn of each stage visits, in forward order.
    visits: Vec<Vec<Block>>,
}

impl<'a> Common<'a> {
    fn new(config: &'a Config, layout: &'a Layout, batch: &Batch) -> Self {
        let shape = layout.shape(batch);
        let blocks = || config.blocks();
        let replicated = |block| config.replicated_elements(block, &shape);
        Self {
            config,
            layout,
            microbatches: layout.microbatches(batch),
            shape,
            exchanges: Exchanges { mesh: layout.mesh, sequence_parallel: layout.sequence_parallel },
            blocks: blocks().map(|block| (block, config.rank_elements(block, &shape))).collect(),
            replicated: blocks().map(|block| (block, replicated(block))).collect(),
            segments: operators(config, layout, &shape),
            visits: (0..layout.stages())
                .map(|stage| {
                    let mut blocks = layout.stage_blocks(config, stage);
                    // Experts are visited with their layer.
                    blocks.retain(|block| !matches!(block, Block::Experts(_)));
                    blocks
                })
                .collect(),
        }
    }

    fn program(self, classes: Vec<Vec<Instruction>>) -> Program {
        let Self { config, layout, microbatches, shape, blocks, replicated, segments, .. } = self;
        Program {
            mesh: layout.mesh,
            microbatches,
            shape,
            in_flight: IN_FLIGHT,
            parameters_sharded: shards(layout, Shard::Optimizer),
            optimizer_sharded: shards(layout, Shard::Optimizer),
            local_steps: layout.local_steps,
            tied_embeddings: config.tied_embeddings,
            classes,
            layers: config.layers,
            segments,
            blocks,
            replicated,
        }
    }
}

/// The operators of every segment in every pass, whole and in pieces.
fn operators(
    config: &Config,
    layout: &Layout,
    shape: &Shape,
) -> BTreeMap<(Segment, Pass, u8), Vec<Operator>> {
    let mut segments: BTreeSet<Segment> =
        config.blocks().flat_map(|block| config.segments(block)).collect();
    segments.extend((layout.mesh.tensor > 1).then_some(Segment::LogSums));
    let passes =
        [Pass::Forward, Pass::Backward, Pass::BackwardInput, Pass::BackwardWeight, Pass::Recompute];
    let mut operators = BTreeMap::new();
    for segment in segments {
        for pieces in BTreeSet::from([1, pieces(layout, segment)]) {
            let shape = Shape { pieces: u64::from(pieces), ..*shape };
            for pass in passes {
                let work = config.operators(segment, pass, &shape);
                operators.insert((segment, pass, pieces), work);
            }
        }
    }
    operators
}

/// Into how many pieces a segment is cut.
fn pieces(layout: &Layout, segment: Segment) -> u8 {
    let context = layout.mesh.context;
    match (segment, layout.tensor_overlap) {
        (Segment::Attend | Segment::AttendWindow, _) => match layout.context_exchange {
            ContextExchange::Ring if context > 1 => context as u8,
            _ => 1,
        },
        (
            Segment::Qkv | Segment::Project | Segment::FeedForward | Segment::SharedExperts,
            TensorOverlap::Pieces(pieces),
        ) if layout.mesh.tensor > 1 => pieces,
        _ => 1,
    }
}

/// Whether the layout splits `what` over more than one rank.
fn shards(layout: &Layout, what: Shard) -> bool {
    layout.mesh.data * layout.mesh.context > 1 && layout.shard >= what
}

/// One pass of one microbatch over one block.
#[derive(Debug, Clone, Copy)]
struct Visit {
    pass: Pass,
    microbatch: u32,
    block: Block,
    /// Which layer of its stage it is, counted from 0.
    index: u32,
}

/// The list of one pipeline rank as it grows.
struct Lowering<'a> {
    common: &'a Common<'a>,
    config: &'a Config,
    layout: &'a Layout,
    rank: u32,
    list: Vec<Instruction>,
    tickets: u32,
    visits: VecDeque<Visit>,
    /// Transfers of values that have been posted and not yet waited for, by what they move.
    moving: BTreeMap<Buffer, SmallVec<[Ticket; 4]>>,
    resident: BTreeSet<Block>,
    /// Blocks that will be gathered in this order, ahead of their first use.
    ahead: VecDeque<Block>,
    gathering: BTreeMap<Block, Ticket>,
    receiving: VecDeque<(Turn, Ticket)>,
    sending: VecDeque<Ticket>,
    reducing: VecDeque<(Block, Ticket)>,
    /// Sums of the replicas' gradients under way.
    joining: Vec<Ticket>,
    uses: Uses,
}

impl<'a> Lowering<'a> {
    fn new(common: &'a Common<'a>, rank: u32, turns: &[Turn]) -> Self {
        let mut lowering = Self {
            common,
            config: common.config,
            layout: common.layout,
            rank,
            list: Vec::new(),
            tickets: 0,
            visits: VecDeque::new(),
            moving: BTreeMap::new(),
            resident: BTreeSet::new(),
            ahead: VecDeque::new(),
            gathering: BTreeMap::new(),
            receiving: VecDeque::new(),
            sending: VecDeque::new(),
            reducing: VecDeque::new(),
            joining: Vec::new(),
            uses: Uses::default(),
        };
        lowering.visits = turns.iter().flat_map(|turn| lowering.visits_of(turn)).collect();
        lowering.uses = Uses::of(&lowering, lowering.visits.iter());
        lowering
    }

    /// The visits of a turn, in order.
    fn visits_of(&self, turn: &Turn) -> Vec<Visit> {
        let stage = turn.chunk * self.layout.mesh.pipeline + self.rank;
        let Turn { pass, microbatch, .. } = *turn;
        let mut layers = 0;
        let mut visits = Vec::new();
        for block in &self.common.visits[stage as usize] {
            visits.push(Visit { pass, microbatch, block: *block, index: layers });
            layers += u32::from(matches!(block, Block::Layer(_)));
        }
        if pass != Pass::Forward {
            visits.reverse();
        }
        visits
    }

    fn post(&mut self, action: Action, axis: Axis, buffer: Buffer, elements: u64) -> Ticket {
        self.post_piece(action, axis, (buffer, Piece::WHOLE), elements)
    }

    fn post_piece(
        &mut self,
        action: Action,
        axis: Axis,
        (buffer, piece): (Buffer, Piece),
        elements: u64,
    ) -> Ticket {
        let ticket = Ticket(self.tickets);
        self.tickets += 1;
        let element_bytes = match buffer {
            Buffer::Parameters(_) => self.layout.parameter_bytes,
            Buffer::Gradients(_)
            | Buffer::ReplicatedGradients(_)
            | Buffer::ReducedGradients(_)
            | Buffer::Change(_) => self.layout.gradient_bytes,
            Buffer::Activation { value: Value::LogSums(_) | Value::Routes(_), .. }
            | Buffer::Statistics => 4,
            Buffer::Activation { .. } | Buffer::ActivationGradient { .. } => {
                self.layout.activation_bytes
            }
        };
        let transfer = Transfer { action, axis, buffer, elements, element_bytes, piece };
        self.list.push(Instruction::Post { ticket, transfer });
        ticket
    }

    fn wait(&mut self, ticket: Ticket) {
        self.list.push(Instruction::Wait { ticket });
    }
}
