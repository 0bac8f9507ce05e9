//! What a class holds as it goes through its list, and whether each instruction finds what it needs.

use model::{Block, Pass, Segment};
use rustc_hash::{FxHashMap, FxHashSet};
use smallvec::smallvec;

use super::VerifyError;
use crate::exchange::{Due, Dues, Exchanges};
use crate::{Action, Axis, Buffer, Instruction, Piece, Program, Ticket, Transfer, Value, Values};

/// A segment of a layer for a microbatch.
type Work = (Segment, u32, u32);

/// A value, or its gradient, of which other ranks hold a part.
struct Partial {
    piece: Piece,
    /// What is due before it may be read, in order; the rest when the first has been done.
    dues: Dues,
}

/// What a class holds as it goes through its list.
pub(super) struct Dataflow<'p> {
    program: &'p Program,
    exchanges: Exchanges,
    class: usize,
    trains: bool,
    /// Values and gradients of values that can be read.
    values: FxHashSet<Buffer>,
    /// Pieces that are there, of values of which others are not yet.
    pieces: FxHashMap<(Buffer, Option<Segment>), u8>,
    /// What has been computed and must be exchanged first.
    partial: FxHashMap<Buffer, Vec<Partial>>,
    /// Copies of other ranks' parts, for the next to read.
    gathered: FxHashSet<(Buffer, Piece)>,
    /// Forward passes whose backward has not come.
    open: FxHashSet<Work>,
    /// Backward passes of inputs whose weights' has not come.
    owed: FxHashSet<Work>,
    /// Values that must be computed again before they are read.
    discarded: FxHashSet<Buffer>,
    /// Gathered blocks, when parameters are sharded.
    resident: FxHashSet<Block>,
    /// Blocks whose gradients have been written since the last reduction, over the ranks that hold
    /// the same parameter and over those that hold the same block.
    unsummed: FxHashSet<Block>,
    unreduced: FxHashSet<Block>,
    /// Blocks whose reduced gradients the other replicas have not added theirs to.
    apart: FxHashSet<Block>,
    /// Blocks of whose changes the sum over the replicas has come.
    changes: FxHashSet<Block>,
    /// Blocks whose sums over the replicas are complete: nothing may be added to them.
    joined: FxHashSet<Block>,
    /// Reduced gradients that have arrived and are not yet accumulated.
    reduced: Vec<Block>,
    posted: FxHashMap<Ticket, Transfer>,
    updated: FxHashSet<Block>,
}

impl<'p> Dataflow<'p> {
    pub(super) fn check(program: &'p Program, class: usize) -> Result<(), VerifyError> {
        let list = &program.classes[class];
        let mut state = Self {
            program,
            exchanges: program.exchanges(),
            class,
            trains: list.iter().any(|i| matches!(i, Instruction::Update { .. })),
            values: FxHashSet::default(),
            pieces: FxHashMap::default(),
            partial: FxHashMap::default(),
            gathered: FxHashSet::default(),
            open: FxHashSet::default(),
            owed: FxHashSet::default(),
            discarded: FxHashSet::default(),
            resident: FxHashSet::default(),
            unsummed: FxHashSet::default(),
            unreduced: FxHashSet::default(),
            apart: FxHashSet::default(),
            changes: FxHashSet::default(),
            joined: FxHashSet::default(),
            reduced: Vec::new(),
            posted: FxHashMap::default(),
            updated: FxHashSet::default(),
        };
        for (index, instruction) in list.iter().enumerate() {
            state.step(instruction).map_err(|reason| VerifyError::Dataflow {
                class,
                index,
                instruction: instruction.to_string(),
                reason,
            })?;
        }
        state.finish()
    }

    fn step(&mut self, instruction: &Instruction) -> Result<(), String> {
        match *instruction {
            Instruction::Compute { segment, pass, layer, microbatch, piece } => {
                self.compute((segment, layer, microbatch), pass, piece)
            }
            Instruction::Discard { value, microbatch } => {
                let buffer = Buffer::Activation { value, microbatch };
                self.discarded.insert(buffer);
                let there = self.partial.remove(&buffer).is_some() | self.values.remove(&buffer);
                fresh(there, "the value is not there")
            }
            Instruction::Post { ticket, transfer } => self.post(ticket, &transfer),
            Instruction::Wait { ticket } => self.wait(ticket),
            Instruction::Accumulate { block } => {
                let waiting = self.reduced.iter().position(|reduced| *reduced == block);
                let index = waiting.ok_or("no reduced gradient has arrived")?;
                self.reduced.remove(index);
                Ok(())
            }
            Instruction::SquareSum { block } => self.need_reduced(block),
            Instruction::Update { block } => {
                self.need_reduced(block)?;
                self.resident.remove(&block);
                fresh(self.updated.insert(block), "the block is updated twice")
            }
            Instruction::OuterUpdate { block } => {
                self.resident.remove(&block);
                fresh(self.changes.remove(&block), "the sum of its changes has not come")
            }
            Instruction::Release { block } => {
                fresh(self.resident.remove(&block), "the block is not gathered")
            }
        }
    }

    fn finish(self) -> Result<(), VerifyError> {
        let unfinished = |reason| Err(VerifyError::Unfinished { class: self.class, reason });
        if let Some((ticket, Transfer { buffer, .. })) =
            self.posted.iter().min_by_key(|(ticket, _)| **ticket)
        {
            return unfinished(format!("the transfer {ticket} of {buffer} not waited for"));
        }
        if let Some((buffer, piece)) = self.gathered.iter().next() {
            return unfinished(format!("{buffer}{piece} gathered and not read"));
        }
        if let Some(block) = self.changes.iter().next() {
            return unfinished(format!("changes of {block} that no outer update has used"));
        }
        let left = self.open.iter().filter(|_| self.trains).min();
        if let Some((segment, layer, microbatch)) = left.or(self.owed.iter().min()) {
            return unfinished(format!("no backward for {segment} layer{layer} mb{microbatch}"));
        }
        Ok(())
    }

    // Computing.

    fn compute(&mut self, work: Work, pass: Pass, piece: Piece) -> Result<(), String> {
        let (segment, layer, _) = work;
        let block = self.program.block_used(segment, layer);
        if self.updated.contains(&block) {
            return Err(format!("{block} has been updated in this step"));
        }
        let reads = pass != Pass::BackwardWeight;
        let shared = self.program.mesh.degree(Program::data_axis(block)) > 1;
        let gathered = self.program.parameters_sharded && shared;
        if reads && gathered && !self.resident.contains(&block) {
            return Err(format!("the parameters of {block} are not gathered"));
        }
        match pass {
            Pass::Forward | Pass::Recompute => self.forward(work, pass, piece),
            Pass::Backward => {
                self.backward_input(work, piece)?;
                self.backward_weight(work, true)
            }
            Pass::BackwardInput => self.backward_input(work, piece),
            Pass::BackwardWeight => self.backward_weight(work, false),
        }
    }

    fn forward(&mut self, work: Work, pass: Pass, piece: Piece) -> Result<(), String> {
        let (segment, layer, microbatch) = work;
        let (inputs, output) = Value::of(segment, layer);
        for value in inputs.into_iter().filter(|value| self.is_written(*value)) {
            self.need(Buffer::Activation { value, microbatch })?;
        }
        self.take_gathered_input(work, piece)?;
        let written = Buffer::Activation { value: output, microbatch };
        if self.values.contains(&written) {
            return Err("the value is already there".to_owned());
        }
        let dues = self.exchanges.after(segment).collect();
        self.write(written, piece, dues, segment);
        let again = pass == Pass::Recompute;
        if again && piece.index == 0 && !self.discarded.remove(&written) {
            return Err("its value has not been discarded".to_owned());
        }
        // Forward finds the log-sums without a gradient.
        if piece.index == 0 && !again && segment != Segment::LogSums {
            self.open.insert(work);
        }
        Ok(())
    }

    /// Whether anything in this program writes the value.
    fn is_written(&self, value: Value) -> bool {
        let has = |segment| self.program.segments.contains_key(&(segment, Pass::Forward, 1));
        match value {
            Value::SharedDelta(_) => has(Segment::SharedExperts),
            Value::LogSums(_) => self.program.mesh.tensor > 1,
            _ => true,
        }
    }

    /// What a segment reads gathered must have been gathered for it. Around a ring of ranks, the
    /// first piece of keys and values is the own.
    fn take_gathered_input(&mut self, work: Work, piece: Piece) -> Result<(), String> {
        let (segment, layer, microbatch) = work;
        let Some((value, (_, axis))) = self.exchanges.before(segment, layer) else {
            return Ok(());
        };
        if axis == Axis::Context && !piece.is_whole() && piece.index == 0 {
            return Ok(());
        }
        self.take_gathered(Buffer::Activation { value, microbatch }, piece)
    }

    fn take_gathered(&mut self, buffer: Buffer, piece: Piece) -> Result<(), String> {
        if self.gathered.remove(&(buffer, piece)) {
            return Ok(());
        }
        Err(format!("{buffer}{piece} is not gathered"))
    }

    /// A segment has computed a piece of `buffer`.
    fn write(&mut self, buffer: Buffer, piece: Piece, dues: Dues, segment: Segment) {
        if dues.is_empty() {
            self.complete(buffer, piece, Some(segment));
        } else {
            self.partial.entry(buffer).or_default().push(Partial { piece, dues });
        }
    }

    /// A piece of `buffer` can be read; with the last one, all of it.
    fn complete(&mut self, buffer: Buffer, piece: Piece, segment: Option<Segment>) {
        let there = self.pieces.entry((buffer, segment)).or_default();
        *there += 1;
        if *there == piece.of {
            self.pieces.remove(&(buffer, segment));
            self.values.insert(buffer);
        }
    }

    fn backward_input(&mut self, work: Work, piece: Piece) -> Result<(), String> {
        let (segment, layer, microbatch) = work;
        let (inputs, output) = Value::of(segment, layer);
        let inputs: Values = inputs.into_iter().filter(|v| self.is_written(*v)).collect();
        let activation = |value| Buffer::Activation { value, microbatch };
        let gradient = |value| Buffer::ActivationGradient { value, microbatch };
        if !self.open.contains(&work) {
            return Err("there is no forward pass before it".to_owned());
        }
        if self.discarded.contains(&activation(output)) {
            return Err("what it left has been discarded and not computed again".to_owned());
        }
        for value in inputs.iter().filter(|value| is_kept(**value)) {
            self.need(activation(*value))?;
        }
        self.read_gradients(work, output, piece)?;
        for value in inputs.into_iter().filter(|value| !matches!(value, Value::LogSums(_))) {
            let dues = self.exchanges.after_backward(segment, value).collect();
            self.write(gradient(value), piece, dues, segment);
        }
        if self.exchanges.keys_apart(segment) && segment != Segment::Qkv {
            self.take_gathered_input(work, piece)?;
            let keys = Value::KeyValues(layer);
            let (_, axis) = self.exchanges.before(segment, layer).expect("keys are apart").1;
            let around = smallvec![(Action::Shift, axis)];
            let whole = self.exchanges.after_backward(segment, keys).collect();
            let dues = if piece.is_whole() { whole } else { around };
            self.write(gradient(keys), piece, dues, segment);
        }
        if piece.index + 1 == piece.of {
            self.partial.remove(&activation(output));
            self.values.remove(&activation(output));
            self.values.remove(&gradient(output));
            self.open.remove(&work);
            self.owed.insert(work);
            self.owe(work);
        }
        Ok(())
    }

    /// A segment without parameters owes no gradient of weights; one whose weights are a norm's
    /// finds it together with that of its input.
    fn owe(&mut self, work: Work) {
        let (segment, layer, _) = work;
        let weights = self.program.segments.get(&(segment, Pass::BackwardWeight, 1));
        if weights.is_none_or(Vec::is_empty) {
            self.owed.remove(&work);
            self.write_gradient(self.program.block_used(segment, layer));
        }
    }

    fn write_gradient(&mut self, block: Block) {
        self.unreduced.insert(block);
        if self.program.replicated.get(&block).is_some_and(|elements| *elements > 0) {
            self.unsummed.insert(block);
        }
    }

    /// The gradient of the output, gathered where it has to be; of the loss there is none.
    fn read_gradients(&mut self, work: Work, output: Value, piece: Piece) -> Result<(), String> {
        let (segment, layer, microbatch) = work;
        let gradient = |value| Buffer::ActivationGradient { value, microbatch };
        if self.exchanges.keys_apart(segment) && segment == Segment::Qkv && piece.index == 0 {
            let keys = gradient(Value::KeyValues(layer));
            self.need(keys)?;
            self.values.remove(&keys);
        }
        if matches!(output, Value::Loss(_) | Value::LogSums(_)) {
            return Ok(());
        }
        if self.exchanges.before_backward(segment).is_some() {
            return self.take_gathered(gradient(output), piece);
        }
        self.need(gradient(output))
    }

    /// `whole`: together with the gradients of its inputs.
    fn backward_weight(&mut self, work: Work, whole: bool) -> Result<(), String> {
        let (segment, layer, microbatch) = work;
        if segment == Segment::Embed && !whole {
            self.backward_input(work, Piece::WHOLE)?;
        }
        let owed = self.owed.remove(&work);
        if !owed && !whole {
            return Err("there is no backward pass of its input before it".to_owned());
        }
        let gathered = self.exchanges.before(segment, layer).filter(|_| owed);
        if let Some((value, _)) = gathered {
            self.take_gathered(Buffer::Activation { value, microbatch }, Piece::WHOLE)?;
        }
        self.write_gradient(self.program.block_used(segment, layer));
        Ok(())
    }

    fn need(&self, buffer: Buffer) -> Result<(), String> {
        if self.partial.contains_key(&buffer) {
            return Err(format!("{buffer} is this rank's part alone"));
        }
        if self.values.contains(&buffer) {
            return Ok(());
        }
        Err(format!("{buffer} is not there"))
    }

    // Transfers.

    fn post(&mut self, ticket: Ticket, transfer: &Transfer) -> Result<(), String> {
        let buffer = transfer.buffer;
        match buffer {
            Buffer::Activation { .. } | Buffer::ActivationGradient { .. } => {
                self.post_value(transfer)?;
            }
            Buffer::ReplicatedGradients(block) => {
                self.unsummed.remove(&block);
            }
            Buffer::Gradients(block) => {
                if self.joined.contains(&block) {
                    return Err(format!("{block} has been summed over the replicas"));
                }
                if self.unsummed.contains(&block) {
                    return Err(format!("parts of {block} are not summed over tensor"));
                }
                self.unreduced.remove(&block);
            }
            Buffer::Parameters(_)
            | Buffer::ReducedGradients(_)
            | Buffer::Change(_)
            | Buffer::Statistics => {}
        }
        fresh(self.posted.insert(ticket, *transfer).is_none(), "the ticket is in use")
    }

    fn post_value(&mut self, transfer: &Transfer) -> Result<(), String> {
        let Transfer { action, axis, buffer, piece, .. } = *transfer;
        match action {
            Action::Receive { .. } => Ok(()),
            Action::Send { .. } => {
                self.need(buffer)?;
                self.values.remove(&buffer);
                Ok(())
            }
            _ if is_due(&self.partial, buffer, piece, (action, axis)) => Ok(()),
            Action::Collective(collective::Kind::AllGather) if self.is_owed(buffer) => Ok(()),
            Action::Collective(collective::Kind::AllGather) => self.need(source(buffer)),
            Action::Shift if piece.index > 1 => {
                let last = Piece { index: piece.index - 1, ..piece };
                let there = self.gathered.contains(&(buffer, last));
                fresh(there, "what it hands on has not come")
            }
            Action::Shift => self.need(source(buffer)),
            Action::Collective(_) => Err("nothing of the kind is due".to_owned()),
        }
    }

    /// Whether gradients of weights are owed that read the value: it is kept for them.
    fn is_owed(&self, buffer: Buffer) -> bool {
        let reads = |(segment, layer, microbatch): &Work| {
            let before = self.exchanges.before(*segment, *layer);
            before.is_some_and(|(value, _)| {
                buffer == Buffer::Activation { value, microbatch: *microbatch }
            })
        };
        self.owed.iter().any(reads)
    }

    fn wait(&mut self, ticket: Ticket) -> Result<(), String> {
        let transfer = self.posted.remove(&ticket).ok_or("the ticket was not posted")?;
        match transfer.buffer {
            Buffer::Parameters(block) => {
                self.resident.insert(block);
            }
            Buffer::Activation { .. } | Buffer::ActivationGradient { .. } => {
                self.wait_value(&transfer);
            }
            Buffer::Gradients(block) => {
                self.reduced.push(block);
                if self.program.mesh.replicas > 1 && self.program.local_steps == 0 {
                    self.apart.insert(block);
                }
            }
            Buffer::ReducedGradients(block) if transfer.axis == Axis::Replica => {
                self.apart.remove(&block);
                self.joined.insert(block);
            }
            Buffer::Change(block) => {
                self.changes.insert(block);
            }
            Buffer::ReducedGradients(_) | Buffer::ReplicatedGradients(_) | Buffer::Statistics => {}
        }
        Ok(())
    }

    fn wait_value(&mut self, transfer: &Transfer) {
        let Transfer { action, axis, buffer, piece, .. } = *transfer;
        match action {
            Action::Send { .. } => {}
            Action::Receive { .. } => {
                self.values.insert(buffer);
            }
            _ if is_due(&self.partial, buffer, piece, (action, axis)) => {
                self.settle(buffer, piece);
            }
            Action::Collective(_) | Action::Shift => {
                self.gathered.insert((buffer, piece));
            }
        }
    }

    /// The first thing due on a piece has been done.
    fn settle(&mut self, buffer: Buffer, piece: Piece) {
        let Some(parts) = self.partial.get_mut(&buffer) else {
            return;
        };
        parts.iter_mut().filter(|part| part.piece == piece).for_each(|part| {
            part.dues.remove(0);
        });
        let before = parts.len();
        parts.retain(|part| !part.dues.is_empty());
        let done = parts.len() < before;
        if parts.is_empty() {
            self.partial.remove(&buffer);
        }
        if done {
            self.complete(buffer, piece, None);
        }
    }

    fn need_reduced(&self, block: Block) -> Result<(), String> {
        let moving = |transfer: &Transfer| {
            [Buffer::Gradients(block), Buffer::ReducedGradients(block)].contains(&transfer.buffer)
        };
        if self.posted.values().any(moving) {
            return Err(format!("the gradients of {block} are still being reduced"));
        }
        let shared = self.program.mesh.degree(Program::data_axis(block)) > 1;
        let unreduced = shared && self.unreduced.contains(&block);
        if unreduced || self.apart.contains(&block) || self.unsummed.contains(&block) {
            return Err(format!("the gradients of {block} are not reduced"));
        }
        Ok(())
    }
}

/// Whether a transfer is the next thing due on a piece of `buffer`.
fn is_due(
    partial: &FxHashMap<Buffer, Vec<Partial>>,
    buffer: Buffer,
    piece: Piece,
    due: Due,
) -> bool {
    let parts = partial.get(&buffer).map(Vec::as_slice).unwrap_or_default();
    parts.iter().any(|part| part.piece == piece && part.dues[0] == due)
}

/// Keys and values are part of what the product of queries, keys and values leaves.
fn source(buffer: Buffer) -> Buffer {
    match buffer {
        Buffer::Activation { value: Value::KeyValues(layer), microbatch } => {
            Buffer::Activation { value: Value::Qkv(layer), microbatch }
        }
        other => other,
    }
}

/// Whether the backward pass of the segments that read the value reads it again. What is added to
/// the stream is not.
fn is_kept(value: Value) -> bool {
    !matches!(
        value,
        Value::AttentionDelta(_)
            | Value::FeedForwardDelta(_)
            | Value::SharedDelta(_)
            | Value::Embedded(_)
            | Value::LogSums(_)
    )
}

fn fresh(is: bool, otherwise: &str) -> Result<(), String> {
    if is { Ok(()) } else { Err(otherwise.to_owned()) }
}
