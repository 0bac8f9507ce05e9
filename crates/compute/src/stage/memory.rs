//! Between a stage's tensors and the host buffers that transfers move.

use std::ops::Range;

use collective::Kind;
use model::Block;
use program::{Action, Buffer, Piece, Transfer, Value};

use super::exchanged::Rows;
use super::{Reduced, Stage};
use crate::operators::{Live, Operators};

impl<O: Operators> Stage<O> {
    /// The host buffer a transfer starts with: what is sent or reduced, or room for what comes.
    pub fn take(&mut self, transfer: &Transfer) -> Vec<f32> {
        if let Action::Receive { .. } = transfer.action {
            return self.operators.host_buffer(transfer.elements as usize);
        }
        match transfer.buffer {
            Buffer::Parameters(block) => self.take_parameters(block),
            Buffer::Gradients(block) => {
                self.clear_unwritten(block);
                let gradients = self.state(block).gradients.take();
                self.operators.download(gradients.expect("a backward pass came before"))
            }
            Buffer::ReducedGradients(block) => {
                let state = self.state(block);
                state.settle();
                let Reduced { tensor, start } =
                    state.reduced.take().expect("gradients are reduced");
                let held = start..start + state.held.len();
                self.operators.download(self.operators.slice(&tensor, held))
            }
            Buffer::Change(block) => {
                let operators = self.operators.clone();
                let state = self.state(block);
                let [anchor, _] = state.outer.as_ref().expect("groups train apart");
                let mut change = anchor.clone();
                operators.blend(&mut change, 1.0, &state.master, -1.0);
                operators.download(change)
            }
            Buffer::Activation { .. } | Buffer::ActivationGradient { .. } => {
                self.take_value(transfer)
            }
            Buffer::ReplicatedGradients(block) => self.take_replicated(block, transfer.elements),
            Buffer::Statistics => self.take_statistics(),
        }
    }

    /// Takes back the host buffer of a completed transfer.
    pub fn put(&mut self, transfer: &Transfer, buffer: Vec<f32>) {
        if let Action::Send { .. } = transfer.action {
            return self.operators.recycle(buffer);
        }
        match transfer.buffer {
            Buffer::Parameters(block) => {
                let gathered = self.operators.upload(buffer);
                self.state(block).gathered = Some(gathered);
            }
            Buffer::Change(block) => {
                let tensor = self.operators.upload(buffer);
                self.state(block).arrived = Some(Reduced { tensor, start: 0 });
            }
            Buffer::Gradients(block) => {
                let tensor = self.operators.upload(buffer);
                let state = self.state(block);
                let start = state.held.start;
                state.arrived = Some(Reduced { tensor, start });
            }
            Buffer::ReducedGradients(block) => {
                let tensor = self.operators.upload(buffer);
                self.state(block).reduced = Some(Reduced { tensor, start: 0 });
            }
            Buffer::Activation { .. } | Buffer::ActivationGradient { .. } => {
                self.put_value(transfer, buffer);
            }
            Buffer::ReplicatedGradients(block) => self.put_replicated(block, buffer),
            Buffer::Statistics => self.statistics = buffer,
        }
    }

    /// Tells a device that counts how many elements of host buffers are with transfers now.
    pub fn set_under_way(&self, elements: usize) {
        self.operators.set_under_way(elements);
    }

    /// What this rank holds, on devices that count.
    #[must_use]
    pub fn live(&self) -> Option<Live> {
        self.operators.live()
    }

    /// Fills `values` with this rank's fp32 parameters of `block`, and says which elements of
    /// the rank's part of the block they are.
    pub fn master(&mut self, block: Block) -> (Range<usize>, Vec<f32>) {
        let operators = self.operators.clone();
        let state = self.state(block);
        let copy = operators.slice(&state.master, 0..state.held.len());
        (state.held.clone(), operators.download(copy))
    }

    // Values.

    /// What is computed and waits for this transfer; else what is there for all to read.
    fn take_value(&mut self, transfer: &Transfer) -> Vec<f32> {
        let Transfer { action, buffer, piece, .. } = *transfer;
        if let Some(mut part) = self.parts.remove(&(buffer, piece)) {
            // What came around the ring goes on with this rank's share.
            if let (Action::Shift, Some(before)) = (action, piece.before()) {
                let arrived = self.take_gathered(buffer, before);
                self.operators.add(&mut part, &arrived);
            }
            let part = self.operators.download(part);
            if action == Action::Collective(Kind::AllToAll) {
                return self.outgoing(transfer, part);
            }
            return if is_keys(buffer) && piece.is_whole() {
                self.in_order(transfer, part, false)
            } else {
                part
            };
        }
        if action == Action::Collective(Kind::AllGather) {
            let own = self.piece(&self.source(buffer), Rows::Stream, piece);
            return self.own_chunk(&own, transfer);
        }
        if let (Action::Shift, Some(before)) = (action, piece.before()) {
            let held = match before.index {
                0 => self.source(buffer),
                _ => self.gathered[&(buffer, before)].clone(),
            };
            return self.operators.download(held);
        }
        let value = match buffer {
            Buffer::Activation { value, microbatch } => self.values.remove(&(microbatch, value)),
            Buffer::ActivationGradient { value, microbatch } => {
                self.gradients.remove(&(microbatch, value))
            }
            _ => None,
        };
        self.operators.download(value.expect("the verifier has seen this value written"))
    }

    /// What stays here when others get a copy of it.
    fn source(&self, buffer: Buffer) -> O::Tensor {
        let value = match buffer {
            Buffer::Activation { value: Value::KeyValues(layer), microbatch } => {
                return self.own_keys(microbatch, layer);
            }
            Buffer::Activation { value: Value::Routes(layer), microbatch } => {
                return self.own_loads(layer, microbatch);
            }
            Buffer::Activation { value, microbatch } => self.values.get(&(microbatch, value)),
            Buffer::ActivationGradient { value, microbatch } => {
                self.gradients.get(&(microbatch, value))
            }
            _ => None,
        };
        value.expect("the verifier has seen this value written").clone()
    }

    /// Room for the parts of all ranks of the transfer's group, with the own in its place.
    fn own_chunk(&self, own: &O::Tensor, transfer: &Transfer) -> Vec<f32> {
        let mut whole = self.operators.host_buffer(transfer.elements as usize);
        let range = self.program.chunk(transfer.axis, whole.len());
        self.operators.read(own, &mut whole[range]);
        whole
    }

    /// Puts a copy of all ranks' parts aside for its reader; of a sum, this rank's part among what
    /// the next segments read.
    fn put_value(&mut self, transfer: &Transfer, buffer: Vec<f32>) {
        let Transfer { action, piece, .. } = *transfer;
        if let Buffer::Activation { value: Value::Routes(layer), microbatch } = transfer.buffer {
            self.put_loads(layer, microbatch, &buffer);
            return self.operators.recycle(buffer);
        }
        let arrived = match action {
            Action::Collective(Kind::AllToAll) => {
                let rows = self.incoming(transfer, buffer);
                self.operators.upload(rows)
            }
            Action::Collective(Kind::AllGather) => {
                let keys = is_keys(transfer.buffer);
                let buffer = if keys { self.in_order(transfer, buffer, true) } else { buffer };
                let gathered = self.operators.upload(buffer);
                self.gathered.insert((transfer.buffer, piece), gathered);
                return;
            }
            Action::Collective(Kind::ReduceScatter) => {
                let range = self.program.chunk(transfer.axis, buffer.len());
                let mut own = self.operators.host_buffer(range.len());
                own.copy_from_slice(&buffer[range]);
                self.operators.recycle(buffer);
                self.operators.upload(own)
            }
            // Keys and values go on around the ring; their gradients end where they came from.
            Action::Shift if !(is_gradient(transfer.buffer) && piece.is_last()) => {
                let arrived = self.operators.upload(buffer);
                self.gathered.insert((transfer.buffer, piece), arrived);
                return;
            }
            _ => self.operators.upload(buffer),
        };
        let piece = if action == Action::Shift { Piece::WHOLE } else { piece };
        match transfer.buffer {
            Buffer::Activation { value, microbatch } => {
                let whole = self.values.remove(&(microbatch, value));
                let whole = self.joined(whole, arrived, Rows::Stream, piece);
                self.values.insert((microbatch, value), whole);
            }
            // Other readers may have left their gradients of what the shared experts read.
            Buffer::ActivationGradient {
                value: value @ Value::FeedForwardNormed(_),
                microbatch,
            } => {
                let more = self.joined(None, arrived, Rows::Stream, piece);
                self.add_gradient((microbatch, value), more);
            }
            Buffer::ActivationGradient { value, microbatch } => {
                let whole = self.gradients.remove(&(microbatch, value));
                let whole = self.joined(whole, arrived, Rows::Stream, piece);
                self.gradients.insert((microbatch, value), whole);
            }
            _ => unreachable!("{} is no value of a microbatch", transfer.buffer),
        }
    }

    // Blocks.

    /// Room for all parameters, with the own chunk in its place.
    fn take_parameters(&mut self, block: Block) -> Vec<f32> {
        let operators = self.operators.clone();
        let state = self.state(block);
        let mut whole = operators.host_buffer(state.elements);
        operators.read(&operators.cast(&state.master), &mut whole[state.own.clone()]);
        whole
    }

    /// This rank's part of the gradients of parameters that others hold too, where they are summed.
    fn take_replicated(&mut self, block: Block, elements: u64) -> Vec<f32> {
        self.clear_unwritten(block);
        let operators = self.operators.clone();
        let runs = self.config.replicated_runs(block, &self.program.shape, self.program.place);
        let gradients = self.state(block).gradients.as_ref();
        let gradients = gradients.expect("a backward pass came before");
        let mut sums = operators.host_buffer(elements as usize);
        sums.fill(0.0);
        for run in runs {
            let part = run.part as usize..(run.part + run.elements) as usize;
            let whole = run.whole as usize..(run.whole + run.elements) as usize;
            operators.read(&operators.slice(gradients, part), &mut sums[whole]);
        }
        sums
    }

    fn put_replicated(&mut self, block: Block, buffer: Vec<f32>) {
        let operators = self.operators.clone();
        let runs = self.config.replicated_runs(block, &self.program.shape, self.program.place);
        let sums = operators.upload(buffer);
        let gradients = self.state(block).gradients.as_mut();
        let gradients = gradients.expect("they stay where they are while a part is summed");
        let width = operators.elements(gradients);
        for run in runs {
            let whole = run.whole as usize..(run.whole + run.elements) as usize;
            let sum = operators.slice(&sums, whole);
            operators.set_columns(gradients, width, run.part as usize, &sum);
        }
    }

    fn take_statistics(&mut self) -> Vec<f32> {
        let mut shares = vec![0.0; 2 * self.program.ranks() as usize];
        let own = 2 * self.program.rank.index();
        shares[own] = self.share[0] as f32;
        shares[own + 1] = self.share[1] as f32;
        shares
    }
}

/// Keys and values, or their gradient.
fn is_keys(buffer: Buffer) -> bool {
    use Buffer::{Activation, ActivationGradient};
    let keys = |value| matches!(value, Value::KeyValues(_));
    matches!(buffer, Activation { value, .. } | ActivationGradient { value, .. } if keys(value))
}

fn is_gradient(buffer: Buffer) -> bool {
    matches!(buffer, Buffer::ActivationGradient { .. })
}
