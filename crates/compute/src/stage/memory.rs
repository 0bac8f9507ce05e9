//! Between a stage's tensors and the host buffers that transfers move.

use std::ops::Range;

use model::Block;
use program::{Action, Buffer, Transfer};

use super::{Reduced, Stage};
use crate::operators::Operators;

impl<O: Operators> Stage<O> {
    /// The host buffer a transfer starts with: what is sent or reduced, or room for what comes.
    pub fn take(&mut self, transfer: &Transfer) -> Vec<f32> {
        if let Action::Receive { .. } = transfer.action {
            return self.operators.host_buffer(transfer.elements as usize);
        }
        match transfer.buffer {
            Buffer::Parameters(block) => self.take_parameters(block),
            Buffer::Gradients(block) => {
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
            Buffer::Activation { value, microbatch } => {
                let value = self.values.remove(&(microbatch, value));
                self.operators.download(value.expect("the value is computed"))
            }
            Buffer::ActivationGradient { value, microbatch } => {
                let gradient = self.gradients.remove(&(microbatch, value));
                self.operators.download(gradient.expect("the gradient is computed"))
            }
            Buffer::ReplicatedGradients(_) => unreachable!("the layout refuses tensor parallelism"),
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
            Buffer::Activation { value, microbatch } => {
                let value_of = self.operators.upload(buffer);
                self.values.insert((microbatch, value), value_of);
            }
            Buffer::ActivationGradient { value, microbatch } => {
                let gradient = self.operators.upload(buffer);
                self.gradients.insert((microbatch, value), gradient);
            }
            Buffer::ReplicatedGradients(_) => unreachable!("the layout refuses tensor parallelism"),
            Buffer::Statistics => self.statistics = buffer,
        }
    }

    /// Fills `values` with this rank's fp32 parameters of `block`, and says which elements of
    /// the block they are.
    pub fn master(&mut self, block: Block) -> (Range<usize>, Vec<f32>) {
        let operators = self.operators.clone();
        let state = self.state(block);
        let copy = operators.slice(&state.master, 0..state.held.len());
        (state.held.clone(), operators.download(copy))
    }

    /// Room for all parameters, with the own chunk in its place.
    fn take_parameters(&mut self, block: Block) -> Vec<f32> {
        let operators = self.operators.clone();
        let state = self.state(block);
        let mut whole = operators.host_buffer(state.elements);
        operators.read(&operators.cast(&state.master), &mut whole[state.own.clone()]);
        whole
    }

    fn take_statistics(&mut self) -> Vec<f32> {
        let mut shares = vec![0.0; 2 * self.program.mesh.ranks() as usize];
        let own = 2 * self.program.rank.index();
        shares[own] = self.share[0] as f32;
        shares[own + 1] = self.share[1] as f32;
        shares
    }
}
