//! Data parallelism: gathers of parameters before a visit, reductions of gradients after it, and
//! the update at the end of the step.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use collective::Kind;
use model::{Block, Pass};
use program::{Action, Axis, Buffer, Instruction, Program};

use super::{Lowering, Visit, shards};
use crate::{Layout, Shard, Timing};

/// Reductions of a microbatch's gradients that may be pending before the oldest is waited for:
/// with sharded gradients this bounds how many whole gradient buffers exist.
const PENDING_REDUCTIONS: usize = 2;
/// The same where a reduction ends the gradient's way through the step.
const PENDING_LAST_REDUCTIONS: usize = 16;
/// Gathers that may be pending where parameters stay for the whole step: they need not wait for
/// their turn in a pipeline that is still filling.
const GATHERED_AHEAD: usize = 8;

/// How many visits will still write gradients to a block: in the whole step, and for each
/// microbatch.
#[derive(Debug, Default)]
pub(super) struct Uses {
    step: BTreeMap<Block, u32>,
    microbatch: BTreeMap<(Block, u32), u32>,
}

/// Whether the pass of a visit writes the last gradients of its parameters.
fn writes(pass: Pass) -> bool {
    matches!(pass, Pass::Backward | Pass::BackwardWeight)
}

impl Uses {
    pub(super) fn of<'v>(lowering: &Lowering<'_>, visits: impl Iterator<Item = &'v Visit>) -> Self {
        let mut uses = Self::default();
        for visit in visits.filter(|visit| writes(visit.pass)) {
            for block in lowering.blocks_of(*visit) {
                *uses.step.entry(block).or_default() += 1;
                *uses.microbatch.entry((block, visit.microbatch)).or_default() += 1;
            }
        }
        uses
    }

    /// Whether there is a backward pass at all.
    pub(super) fn trains(&self) -> bool {
        !self.step.is_empty()
    }

    /// Takes one use away; whether it was the microbatch's last, and the step's last.
    fn used(&mut self, block: Block, microbatch: u32) -> (bool, bool) {
        let last = |left: Option<&mut u32>| {
            left.is_some_and(|left| {
                *left -= 1;
                *left == 0
            })
        };
        let of_microbatch = last(self.microbatch.get_mut(&(block, microbatch)));
        (of_microbatch, last(self.step.get_mut(&block)))
    }
}

impl Lowering<'_> {
    pub(super) fn visit(&mut self) {
        let Some(visit) = self.visits.pop_front() else {
            return;
        };
        let next = self.visits.front().copied();
        let needs = self.needs(visit);
        self.gather(&needs);
        let next_needs = next.map(|next| self.needs(next)).unwrap_or_default();
        self.gather(&next_needs);
        self.gather_ahead();
        self.await_parameters(&needs);
        self.compute(visit);
        self.release(&needs, &next_needs);
        if writes(visit.pass) {
            self.reduce_after(visit);
        }
    }

    /// The blocks a visit works with.
    pub(super) fn blocks_of(&self, visit: Visit) -> Vec<Block> {
        let experts = |layer| self.config.experts_of(layer).map(|_| Block::Experts(layer));
        let mut blocks = vec![visit.block];
        match visit.block {
            Block::Layer(layer) => blocks.extend(experts(layer)),
            Block::Head => blocks.extend(self.config.tied_embeddings.then_some(Block::Embedding)),
            Block::Prediction(number) => {
                blocks.extend(experts(self.config.prediction_layer(number)));
                blocks.extend([Block::Embedding, Block::Head]);
            }
            Block::Embedding | Block::Experts(_) => {}
        }
        blocks
    }

    /// The blocks whose parameters a visit reads.
    fn needs(&self, visit: Visit) -> Vec<Block> {
        if visit.pass == Pass::BackwardWeight { vec![] } else { self.blocks_of(visit) }
    }

    /// Ranks that hold the same part of a block.
    fn sharers(&self, block: Block) -> u64 {
        u64::from(self.layout.mesh.degree(Program::data_axis(block)))
    }

    // Parameters.

    /// Starts gathering what stays for the whole step, and where nothing is to hide it waits for
    /// all of it.
    pub(super) fn gather_first(&mut self) {
        if shards(self.layout, Shard::Parameters) {
            return;
        }
        if self.layout.parameter_gathering == Timing::Exposed {
            let blocks = self.layout.blocks(self.config, self.rank);
            for block in blocks {
                self.gather(&[block]);
                self.await_parameters(&[block]);
            }
        } else {
            let mut seen = BTreeSet::new();
            let order: Vec<Visit> = self.visits.iter().copied().collect();
            let blocks = order.into_iter().flat_map(|visit| self.needs(visit));
            self.ahead = blocks.filter(|block| seen.insert(*block)).collect();
            self.gather_ahead();
        }
    }

    fn gather_ahead(&mut self) {
        while self.gathering.len() < GATHERED_AHEAD
            && let Some(block) = self.ahead.pop_front()
        {
            self.gather(&[block]);
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
            if self.sharers(*block) == 1 {
                self.resident.insert(*block);
                continue;
            }
            let elements = self.common.blocks[block];
            let action = Action::Collective(Kind::AllGather);
            let axis = Program::data_axis(*block);
            let ticket = self.post(action, axis, Buffer::Parameters(*block), elements);
            self.gathering.insert(*block, ticket);
        }
    }

    fn await_parameters(&mut self, blocks: &[Block]) {
        for block in blocks {
            if let Some(ticket) = self.gathering.remove(block) {
                self.wait(ticket);
                self.resident.insert(*block);
            }
        }
    }

    /// Parameters gathered for a visit are given up unless the next visit needs them too, or only
    /// the optimizer or gradients are sharded.
    fn release(&mut self, needs: &[Block], next_needs: &[Block]) {
        if !shards(self.layout, Shard::Parameters) {
            return;
        }
        for block in needs.iter().filter(|block| !next_needs.contains(block)) {
            self.resident.remove(block);
            if self.sharers(*block) > 1 {
                self.list.push(Instruction::Release { block: *block });
            }
        }
    }

    // Gradients.

    /// Posts the reductions of the gradients that this visit completes.
    fn reduce_after(&mut self, visit: Visit) {
        let every_microbatch = shards(self.layout, Shard::Gradients);
        for block in self.blocks_of(visit) {
            let (of_microbatch, of_step) = self.uses.used(block, visit.microbatch);
            let due = if every_microbatch { of_microbatch } else { of_step };
            if due && (every_microbatch || self.layout.gradient_reduction == Timing::Overlapped) {
                self.reduce(block);
            }
        }
    }

    fn reduce(&mut self, block: Block) {
        self.sum_replicated(block);
        if self.sharers(block) == 1 {
            return;
        }
        let every_microbatch = shards(self.layout, Shard::Gradients);
        let pending = if every_microbatch { PENDING_REDUCTIONS } else { PENDING_LAST_REDUCTIONS };
        self.drain_reductions(pending - 1, Some(block));
        let sharded = shards(self.layout, Shard::Optimizer);
        let kind = if sharded { Kind::ReduceScatter } else { Kind::AllReduce };
        let elements = self.common.blocks[&block];
        let (action, axis) = (Action::Collective(kind), Program::data_axis(block));
        let ticket = self.post(action, axis, Buffer::Gradients(block), elements);
        self.reducing.push_back((block, ticket));
    }

    /// Sums what tensor-parallel ranks each have a part of: gradients of parameters that all of
    /// them hold.
    fn sum_replicated(&mut self, block: Block) {
        let elements = self.common.replicated[&block];
        if elements > 0 {
            let action = Action::Collective(Kind::AllReduce);
            let buffer = Buffer::ReplicatedGradients(block);
            let ticket = self.post(action, Axis::Tensor, buffer, elements);
            self.wait(ticket);
        }
    }

    /// Waits for all but some reductions; one of `coming` will be posted next.
    fn drain_reductions(&mut self, pending: usize, coming: Option<Block>) {
        while self.reducing.len() > pending
            && let Some((block, ticket)) = self.reducing.pop_front()
        {
            self.wait(ticket);
            if shards(self.layout, Shard::Gradients) {
                self.list.push(Instruction::Accumulate { block });
            }
            let more =
                coming == Some(block) || self.reducing.iter().any(|(later, _)| *later == block);
            if self.uses.step.get(&block) == Some(&0) && !more {
                self.join(block);
            }
        }
    }

    /// Sums the reduced gradients of all replicas.
    fn join(&mut self, block: Block) {
        if self.layout.mesh.replicas > 1 && self.layout.local_steps == 0 {
            let elements = self.common.blocks[&block].div_ceil(self.sharers(block));
            let action = Action::Collective(Kind::AllReduce);
            let buffer = Buffer::ReducedGradients(block);
            let ticket = self.post(action, Axis::Replica, buffer, elements);
            self.joining.push(ticket);
        }
    }

    // The end of the step.

    pub(super) fn update(&mut self) {
        self.drain_sends(0);
        let blocks = self.layout.blocks(self.config, self.rank);
        let late = !shards(self.layout, Shard::Gradients)
            && self.layout.gradient_reduction == Timing::Exposed;
        for block in blocks.iter().filter(|_| late) {
            self.reduce(*block);
        }
        self.drain_reductions(0, None);
        while let Some(ticket) = self.joining.pop() {
            self.wait(ticket);
        }
        self.sum_shared_embedding();
        // Both ends hold a shared embedding; the norm counts it once.
        let counted = |block: &&Block| **block != Block::Embedding || self.rank == 0;
        let sums: Vec<Block> = blocks.iter().filter(counted).copied().collect();
        self.list.extend(sums.into_iter().map(|block| Instruction::SquareSum { block }));
        self.share_statistics();
        self.list.extend(blocks.into_iter().map(|block| Instruction::Update { block }));
    }

    /// Sums how far the groups have come, a block ahead of the update.
    pub(super) fn outer_update(&mut self) {
        let blocks = self.layout.blocks(self.config, self.rank);
        let mut moving = VecDeque::new();
        for block in blocks.into_iter().map(Some).chain([None]) {
            if let Some(block) = block {
                let shared = shards(self.layout, Shard::Optimizer);
                let degree = if shared { self.sharers(block) } else { 1 };
                let elements = self.common.blocks[&block].div_ceil(degree);
                let action = Action::Collective(Kind::AllReduce);
                let ticket = self.post(action, Axis::Replica, Buffer::Change(block), elements);
                moving.push_back((block, ticket));
            }
            if (moving.len() > 1 || block.is_none())
                && let Some((block, ticket)) = moving.pop_front()
            {
                self.wait(ticket);
                self.list.push(Instruction::OuterUpdate { block });
            }
        }
    }

    /// An embedding on two ranks gets gradients from both.
    fn sum_shared_embedding(&mut self) {
        let pipeline = self.layout.mesh.pipeline;
        let ends = self.rank == 0 || self.rank + 1 == pipeline;
        if !Layout::ends_share_embedding(self.config) || pipeline == 1 || !ends {
            return;
        }
        let sharded = shards(self.layout, Shard::Optimizer);
        let degree = if sharded { self.sharers(Block::Embedding) } else { 1 };
        let elements = self.common.blocks[&Block::Embedding].div_ceil(degree);
        let action = Action::Collective(Kind::AllReduce);
        let buffer = Buffer::ReducedGradients(Block::Embedding);
        let ticket = self.post(action, Axis::Tied, buffer, elements);
        self.wait(ticket);
    }

    pub(super) fn share_statistics(&mut self) {
        let ranks = self.layout.mesh.ranks();
        if ranks > 1 {
            let action = Action::Collective(Kind::AllGather);
            let elements = 2 * u64::from(ranks);
            let ticket = self.post(action, Axis::World, Buffer::Statistics, elements);
            self.wait(ticket);
        }
    }
}
