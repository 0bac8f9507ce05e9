//! What segments read that other ranks have a part of, and what they leave that others must add to
//! or have a part of: `program::Exchanges` says which.
//!
//! A segment may be carried out in pieces along the sequence. Where tensor-parallel ranks split the
//! sequence between products, a piece is made of one part of every rank's rows, so that gathering
//! or scattering the piece moves one part of each rank's stream.

use model::Segment;
use program::{Buffer, Piece, Value};

use super::Stage;
use crate::operators::Operators;

/// A segment of a layer for a microbatch, or a piece of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Work {
    pub segment: Segment,
    pub layer: u32,
    pub microbatch: u32,
    pub piece: Piece,
}

/// Whose rows a tensor holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rows {
    /// This rank's of the residual stream.
    Stream,
    /// All that enter its products.
    Product,
}

impl Work {
    pub fn output(self) -> Value {
        Value::of(self.segment, self.layer).1
    }

    /// The key of a value of its microbatch.
    pub fn of(self, value: Value) -> (u32, Value) {
        (self.microbatch, value)
    }

    fn activation(self, value: Value) -> Buffer {
        Buffer::Activation { value, microbatch: self.microbatch }
    }

    fn gradient(self, value: Value) -> Buffer {
        Buffer::ActivationGradient { value, microbatch: self.microbatch }
    }

    pub fn is_first(self) -> bool {
        self.piece.index == 0
    }

    pub fn is_last(self) -> bool {
        self.piece.is_last()
    }
}

impl<O: Operators> Stage<O> {
    // What a segment reads.

    /// The piece of its input that a segment works on, gathered where others have parts of it.
    pub(super) fn input(&mut self, work: Work) -> O::Tensor {
        match self.program.exchanges.before(work.segment, work.layer) {
            Some((value, _)) => self.take_gathered(work.activation(value), work.piece),
            None => {
                let value = Value::of(work.segment, work.layer).0[0];
                self.piece(&self.values[&work.of(value)], Rows::Product, work.piece)
            }
        }
    }

    /// The gradient of the piece of its output that a segment works on.
    pub(super) fn output_gradient(&mut self, work: Work) -> O::Tensor {
        let output = work.output();
        if self.program.exchanges.before_backward(work.segment).is_some() {
            if work.is_last() {
                self.gradients.remove(&work.of(output));
            }
            return self.take_gathered(work.gradient(output), work.piece);
        }
        let whole = self.gradients.remove(&work.of(output));
        let whole = whole.expect("the verifier has seen this gradient written");
        let piece = self.piece(&whole, Rows::Product, work.piece);
        if !work.is_last() {
            self.gradients.insert(work.of(output), whole);
        }
        piece
    }

    pub(super) fn take_gathered(&mut self, buffer: Buffer, piece: Piece) -> O::Tensor {
        let gathered = self.gathered.remove(&(buffer, piece));
        gathered.expect("the program gathers what other ranks have a part of")
    }

    // What it leaves.

    /// Leaves a piece of a segment's output, for an exchange or for the next segment.
    pub(super) fn leave(&mut self, work: Work, piece: O::Tensor) {
        let output = work.output();
        if self.program.exchanges.after(work.segment).next().is_some() {
            self.parts.insert((work.activation(output), work.piece), piece);
        } else {
            let whole = self.values.remove(&work.of(output));
            let whole = self.joined(whole, piece, Rows::Product, work.piece);
            self.values.insert(work.of(output), whole);
        }
    }

    /// Leaves a piece of the gradient of a segment's input.
    pub(super) fn leave_gradient(&mut self, work: Work, value: Value, piece: O::Tensor) {
        if self.program.exchanges.after_backward(work.segment, value).next().is_some() {
            self.parts.insert((work.gradient(value), work.piece), piece);
        } else {
            let whole = self.gradients.remove(&work.of(value));
            let whole = self.joined(whole, piece, Rows::Product, work.piece);
            self.gradients.insert(work.of(value), whole);
        }
    }

    // Pieces.

    /// Runs of rows that a piece has a part of.
    fn runs(&self, rows: Rows) -> usize {
        let split = self.program.exchanges.sequence_parallel && rows == Rows::Product;
        if split { self.program.exchanges.mesh.tensor as usize } else { 1 }
    }

    /// A piece of a tensor.
    pub(super) fn piece(&self, whole: &O::Tensor, rows: Rows, piece: Piece) -> O::Tensor {
        if piece.is_whole() {
            return whole.clone();
        }
        let width = self.operators.elements(whole) / self.runs(rows);
        let (index, part) = (usize::from(piece.index), width / usize::from(piece.of));
        self.operators.columns(whole, width, index * part..(index + 1) * part)
    }

    /// A tensor that some pieces have been put into, with one more.
    pub(super) fn joined(
        &self,
        whole: Option<O::Tensor>,
        part: O::Tensor,
        rows: Rows,
        piece: Piece,
    ) -> O::Tensor {
        if piece.is_whole() {
            return part;
        }
        let elements = self.operators.elements(&part);
        let mut whole =
            whole.unwrap_or_else(|| self.operators.zeros(elements * usize::from(piece.of)));
        let (runs, index) = (self.runs(rows), usize::from(piece.index));
        let width = elements * usize::from(piece.of) / runs;
        self.operators.set_columns(&mut whole, width, index * (elements / runs), &part);
        whole
    }
}
