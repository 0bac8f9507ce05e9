//! Lowering: from a layout to the instruction list of every pipeline stage.
//!
//! A stage's list is built from its turns (a microbatch in one direction) and each turn from its
//! visits to blocks. Around every visit stand the transfers that data parallelism needs: gathers
//! of the next visit's parameters are posted before a visit computes, reductions of its gradients
//! after it, and both are waited for only where their result is used.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use collective::Kind;
use model::{Block, Config, Pass, Segment};
use program::{Action, Axis, Buffer, Instruction, Piece, Program, Ticket, Transfer, Value};

use crate::schedule::{Turn, forward_only, one_forward_one_backward};
use crate::{Batch, Layout, LayoutError, Shard};

/// Most transfers a rank keeps in flight.
const IN_FLIGHT: usize = 16;
/// Reductions of a microbatch's gradients that may be pending before the oldest is waited for:
/// with sharded gradients this bounds how many whole gradient buffers exist.
const PENDING_REDUCTIONS: usize = 2;
/// Sends to a neighbouring stage that may be pending.
const PENDING_SENDS: usize = 4;

/// The program of one optimizer step.
///
/// # Errors
/// A layout that does not fit the model or the batch.
pub fn lower(config: &Config, layout: &Layout, batch: &Batch) -> Result<Program, LayoutError> {
    layout.check(config, batch)?;
    let (stages, microbatches) = (layout.mesh.pipeline, layout.microbatches(batch));
    let classes = (0..stages)
        .map(|stage| {
            let turns = one_forward_one_backward(stage, stages, microbatches);
            let mut lowering = Lowering::new(config, layout, batch, stage, &turns);
            lowering.turns(&turns);
            lowering.update();
            lowering.list
        })
        .collect();
    Ok(assemble(config, layout, batch, microbatches, classes))
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
    let microbatches = layout.microbatches(batch);
    let classes = (0..layout.mesh.pipeline)
        .map(|stage| {
            let turns = forward_only(microbatches);
            let mut lowering = Lowering::new(config, layout, batch, stage, &turns);
            lowering.turns(&turns);
            lowering.drain_sends(0);
            lowering.share_statistics();
            lowering.list
        })
        .collect();
    Ok(assemble(config, layout, batch, microbatches, classes))
}

fn assemble(
    config: &Config,
    layout: &Layout,
    batch: &Batch,
    microbatches: u32,
    classes: Vec<Vec<Instruction>>,
) -> Program {
    let shape = layout.shape(batch);
    let segments = config
        .blocks()
        .flat_map(|block| config.segments(block))
        .flat_map(|segment| [(segment, Pass::Forward), (segment, Pass::Backward)])
        .map(|(segment, pass)| ((segment, pass), config.operators(segment, pass, &shape)))
        .collect();
    Program {
        mesh: layout.mesh,
        microbatches,
        shape,
        in_flight: IN_FLIGHT,
        parameters_sharded: shards(layout, Shard::Optimizer),
        optimizer_sharded: shards(layout, Shard::Optimizer),
        tied_embeddings: config.tied_embeddings,
        classes,
        segments,
        blocks: config.blocks().map(|block| (block, config.block_elements(block))).collect(),
    }
}

/// Whether the layout splits `what` over more than one rank.
fn shards(layout: &Layout, what: Shard) -> bool {
    layout.mesh.data > 1 && layout.shard >= what
}

/// One pass of one microbatch over one block.
#[derive(Debug, Clone, Copy)]
struct Visit {
    pass: Pass,
    microbatch: u32,
    block: Block,
}

/// The list of one stage as it grows.
struct Lowering<'a> {
    config: &'a Config,
    layout: &'a Layout,
    stage: u32,
    microbatches: u32,
    stream_elements: u64,
    list: Vec<Instruction>,
    tickets: u32,
    visits: VecDeque<Visit>,
    resident: BTreeSet<Block>,
    gathering: BTreeMap<Block, Ticket>,
    receiving: VecDeque<(Turn, Ticket)>,
    sending: VecDeque<Ticket>,
    reducing: VecDeque<(Block, Ticket)>,
}

impl<'a> Lowering<'a> {
    fn new(
        config: &'a Config,
        layout: &'a Layout,
        batch: &Batch,
        stage: u32,
        turns: &[Turn],
    ) -> Self {
        let mut lowering = Self {
            config,
            layout,
            stage,
            microbatches: layout.microbatches(batch),
            stream_elements: layout.shape(batch).tokens() * config.hidden,
            list: Vec::new(),
            tickets: 0,
            visits: VecDeque::new(),
            resident: BTreeSet::new(),
            gathering: BTreeMap::new(),
            receiving: VecDeque::new(),
            sending: VecDeque::new(),
            reducing: VecDeque::new(),
        };
        lowering.visits = turns.iter().flat_map(|turn| lowering.visits_of(*turn)).collect();
        lowering
    }

    /// The blocks a turn passes through; a tied embedding on the last stage is part of the head.
    fn visits_of(&self, (pass, microbatch): Turn) -> Vec<Visit> {
        let mut blocks = self.layout.blocks(self.config, self.stage);
        if self.stage > 0 {
            blocks.retain(|block| *block != Block::Embedding);
        }
        if pass != Pass::Forward {
            blocks.reverse();
        }
        blocks.into_iter().map(|block| Visit { pass, microbatch, block }).collect()
    }

    fn last_stage(&self) -> bool {
        self.stage + 1 == self.layout.mesh.pipeline
    }

    fn turns(&mut self, turns: &[Turn]) {
        for (index, turn) in turns.iter().enumerate() {
            // The next turn's input is asked for before this turn computes.
            for turn in &turns[index..turns.len().min(index + 2)] {
                self.post_receive(*turn);
            }
            self.wait_receive(*turn);
            for _ in self.visits_of(*turn) {
                self.visit();
            }
            self.send(*turn);
        }
    }

    fn post(&mut self, action: Action, axis: Axis, buffer: Buffer, elements: u64) -> Ticket {
        let ticket = Ticket(self.tickets);
        self.tickets += 1;
        let (element_bytes, piece) = (4, Piece::WHOLE);
        let transfer = Transfer { action, axis, buffer, elements, element_bytes, piece };
        self.list.push(Instruction::Post { ticket, transfer });
        ticket
    }

    fn wait(&mut self, ticket: Ticket) {
        self.list.push(Instruction::Wait { ticket });
    }

    // Pipeline: what enters and leaves a stage.

    /// The buffer a turn needs from another stage, and that stage.
    fn input(&self, (pass, microbatch): Turn) -> Option<(u32, Buffer)> {
        let layers = self.layout.layers(self.config, self.stage);
        match pass {
            Pass::Forward if self.stage > 0 => {
                let value = Value::Stream(layers.start);
                Some((self.stage - 1, Buffer::Activation { value, microbatch }))
            }
            Pass::Backward if !self.last_stage() => {
                let value = Value::Stream(layers.end);
                Some((self.stage + 1, Buffer::ActivationGradient { value, microbatch }))
            }
            _ => None,
        }
    }

    /// The buffer a turn leaves for another stage, and that stage.
    fn output(&self, (pass, microbatch): Turn) -> Option<(u32, Buffer)> {
        let layers = self.layout.layers(self.config, self.stage);
        match pass {
            Pass::Forward if !self.last_stage() => {
                let value = Value::Stream(layers.end);
                Some((self.stage + 1, Buffer::Activation { value, microbatch }))
            }
            Pass::Backward if self.stage > 0 => {
                let value = Value::Stream(layers.start);
                Some((self.stage - 1, Buffer::ActivationGradient { value, microbatch }))
            }
            _ => None,
        }
    }

    fn post_receive(&mut self, turn: Turn) {
        let Some((from, buffer)) = self.input(turn) else {
            return;
        };
        if self.receiving.iter().any(|(posted, _)| *posted == turn) {
            return;
        }
        let action = Action::Receive { from };
        let ticket = self.post(action, Axis::Pipeline, buffer, self.stream_elements);
        self.receiving.push_back((turn, ticket));
    }

    fn wait_receive(&mut self, turn: Turn) {
        if self.receiving.front().is_some_and(|(posted, _)| *posted == turn)
            && let Some((_, ticket)) = self.receiving.pop_front()
        {
            self.wait(ticket);
        }
    }

    fn send(&mut self, turn: Turn) {
        let Some((to, buffer)) = self.output(turn) else {
            return;
        };
        self.drain_sends(PENDING_SENDS - 1);
        let ticket = self.post(Action::Send { to }, Axis::Pipeline, buffer, self.stream_elements);
        self.sending.push_back(ticket);
    }

    fn drain_sends(&mut self, pending: usize) {
        while self.sending.len() > pending
            && let Some(ticket) = self.sending.pop_front()
        {
            self.wait(ticket);
        }
    }

    // Data parallelism: gathers before a visit, reductions after it.

    fn visit(&mut self) {
        let Some(visit) = self.visits.pop_front() else {
            return;
        };
        let next = self.visits.front().copied();
        let needs = self.needs(visit);
        self.gather(&needs);
        let next_needs = next.map(|next| self.needs(next)).unwrap_or_default();
        self.gather(&next_needs);
        for block in &needs {
            if let Some(ticket) = self.gathering.remove(block) {
                self.wait(ticket);
                self.resident.insert(*block);
            }
        }
        self.compute(visit);
        self.release(&needs, &next_needs);
        if visit.pass == Pass::Backward {
            self.reduce_after(visit);
        }
    }

    /// The blocks whose parameters a visit uses.
    fn needs(&self, visit: Visit) -> Vec<Block> {
        match visit.block {
            Block::Head if self.config.tied_embeddings => vec![Block::Head, Block::Embedding],
            block => vec![block],
        }
    }

    fn gather(&mut self, blocks: &[Block]) {
        if !shards(self.layout, Shard::Optimizer) {
            return;
        }
        for block in blocks {
            if self.resident.contains(block) || self.gathering.contains_key(block) {
                continue;
            }
            let elements = self.config.block_elements(*block);
            let action = Action::Collective(Kind::AllGather);
            let ticket = self.post(action, Axis::Data, Buffer::Parameters(*block), elements);
            self.gathering.insert(*block, ticket);
        }
    }

    fn compute(&mut self, Visit { pass, microbatch, block }: Visit) {
        let layer = match block {
            Block::Embedding => 0,
            Block::Layer(layer) => layer,
            Block::Head => self.config.layers,
            Block::Experts(_) | Block::Prediction(_) => {
                unreachable!("the layout refuses models that have these")
            }
        };
        let piece = Piece::WHOLE;
        let instruction = |segment: &Segment| {
            let segment = *segment;
            Instruction::Compute { segment, pass, layer, microbatch, piece }
        };
        let segments = self.config.segments(block);
        match pass {
            Pass::Forward => self.list.extend(segments.iter().map(instruction)),
            _ => self.list.extend(segments.iter().rev().map(instruction)),
        }
    }

    /// Parameters gathered for a visit are given up unless the next visit needs them too, or only
    /// the optimizer or gradients are sharded.
    fn release(&mut self, needs: &[Block], next_needs: &[Block]) {
        if !shards(self.layout, Shard::Parameters) {
            return;
        }
        for block in needs.iter().filter(|block| !next_needs.contains(block)) {
            self.list.push(Instruction::Release { block: *block });
            self.resident.remove(block);
        }
    }

    /// Posts the reduction of the gradients that this backward visit completes.
    fn reduce_after(&mut self, visit: Visit) {
        if self.layout.mesh.data == 1 {
            return;
        }
        let every_microbatch = shards(self.layout, Shard::Gradients);
        if visit.microbatch + 1 < self.microbatches && !every_microbatch {
            return;
        }
        for block in self.completed_by(visit) {
            if every_microbatch {
                self.drain_reductions(PENDING_REDUCTIONS - 1);
            }
            let sharded = shards(self.layout, Shard::Optimizer);
            let kind = if sharded { Kind::ReduceScatter } else { Kind::AllReduce };
            let elements = self.config.block_elements(block);
            let action = Action::Collective(kind);
            let ticket = self.post(action, Axis::Data, Buffer::Gradients(block), elements);
            self.reducing.push_back((block, ticket));
        }
    }

    /// The blocks that get no more gradient from this microbatch: a tied embedding on a single
    /// stage is complete only after the embedding's own backward.
    fn completed_by(&self, visit: Visit) -> Vec<Block> {
        let mut blocks = self.needs(visit);
        if self.stage == 0 && visit.block == Block::Head {
            blocks.retain(|block| *block != Block::Embedding);
        }
        blocks
    }

    fn drain_reductions(&mut self, pending: usize) {
        while self.reducing.len() > pending
            && let Some((block, ticket)) = self.reducing.pop_front()
        {
            self.wait(ticket);
            if shards(self.layout, Shard::Gradients) {
                self.list.push(Instruction::Accumulate { block });
            }
        }
    }

    // The end of the step.

    fn update(&mut self) {
        self.drain_sends(0);
        let blocks = self.layout.blocks(self.config, self.stage);
        self.drain_reductions(0);
        self.sum_tied();
        // Both stages hold a tied embedding; the norm counts it once.
        let counted = |block: &&Block| **block != Block::Embedding || self.stage == 0;
        let sums: Vec<Block> = blocks.iter().filter(counted).copied().collect();
        self.list.extend(sums.into_iter().map(|block| Instruction::SquareSum { block }));
        self.share_statistics();
        self.list.extend(blocks.into_iter().map(|block| Instruction::Update { block }));
    }

    /// A tied embedding on two stages gets gradients from both.
    fn sum_tied(&mut self) {
        let ends = self.stage == 0 || self.last_stage();
        if !self.config.tied_embeddings || self.layout.mesh.pipeline == 1 || !ends {
            return;
        }
        let degree = if shards(self.layout, Shard::Optimizer) { self.layout.mesh.data } else { 1 };
        let elements = self.config.block_elements(Block::Embedding).div_ceil(u64::from(degree));
        let action = Action::Collective(Kind::AllReduce);
        let buffer = Buffer::ReducedGradients(Block::Embedding);
        let ticket = self.post(action, Axis::Tied, buffer, elements);
        self.wait(ticket);
    }

    fn share_statistics(&mut self) {
        let ranks = self.layout.mesh.ranks();
        if ranks > 1 {
            let action = Action::Collective(Kind::AllGather);
            let elements = 2 * u64::from(ranks);
            let ticket = self.post(action, Axis::World, Buffer::Statistics, elements);
            self.wait(ticket);
        }
    }
}
