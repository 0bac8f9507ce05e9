//! Tensor, context and expert parallelism: what is gathered before a segment and reduced or
//! exchanged after it, and what is computed again.

use model::{Block, Pass, Segment};
use program::{Action, Axis, Buffer, Due, Dues, Instruction, Piece, Ticket, Value};
use smallvec::{SmallVec, smallvec};

use super::{Lowering, Visit, pieces};
use crate::{Recompute, TensorOverlap};

/// Which segment of which microbatch is being lowered.
#[derive(Debug, Clone, Copy)]
struct Work {
    segment: Segment,
    layer: u32,
    microbatch: u32,
}

impl Work {
    fn value(self, value: Value) -> Buffer {
        Buffer::Activation { value, microbatch: self.microbatch }
    }

    fn gradient(self, value: Value) -> Buffer {
        Buffer::ActivationGradient { value, microbatch: self.microbatch }
    }

    fn output(self) -> Value {
        Value::of(self.segment, self.layer).1
    }

    fn attends(self) -> bool {
        matches!(self.segment, Segment::Attend | Segment::AttendWindow)
    }
}

/// The gather of each piece of what a segment reads; `None` where it has the whole.
type Gathers = SmallVec<[Option<Ticket>; 4]>;

fn all_pieces(of: u8) -> impl Iterator<Item = Piece> {
    (0..of).map(move |index| Piece { index, of })
}

impl Lowering<'_> {
    pub(super) fn compute(&mut self, visit: Visit) {
        let works = self.works(visit);
        match visit.pass {
            Pass::Forward => {
                works.iter().for_each(|work| self.forward(*work, Pass::Forward));
                if self.uses.trains() {
                    self.discard(visit, &works);
                } else {
                    self.forget(&works);
                }
            }
            Pass::BackwardWeight => works.iter().rev().for_each(|work| self.weights(*work)),
            pass => {
                self.gather_keys(visit, &works);
                self.recompute(visit, &works);
                works.iter().rev().for_each(|work| self.backward(*work, pass));
            }
        }
    }

    /// The segments of a visit, in forward order.
    fn works(&self, visit: Visit) -> Vec<Work> {
        let layer = match visit.block {
            Block::Embedding => 0,
            Block::Layer(layer) | Block::Experts(layer) => layer,
            Block::Prediction(number) => self.config.prediction_layer(number),
            Block::Head => self.config.layers,
        };
        let microbatch = visit.microbatch;
        let mut works = Vec::new();
        for segment in self.config.segments(visit.block) {
            // The head of a prediction layer stands after the stream that the layer leaves.
            let head = Segment::HEAD.contains(&segment) && visit.block != Block::Head;
            let layer = layer + u32::from(head);
            if segment == Segment::Loss && self.layout.mesh.tensor > 1 {
                works.push(Work { segment: Segment::LogSums, layer, microbatch });
            }
            works.push(Work { segment, layer, microbatch });
        }
        works
    }

    fn instruct(&mut self, work: Work, pass: Pass, piece: Piece) {
        let Work { segment, layer, microbatch } = work;
        self.list.push(Instruction::Compute { segment, pass, layer, microbatch, piece });
    }

    /// Waits for all transfers of a buffer that are under way.
    pub(super) fn settle(&mut self, buffer: Buffer) {
        if self.moving.is_empty() {
            return;
        }
        for ticket in self.moving.remove(&buffer).unwrap_or_default() {
            self.wait(ticket);
        }
    }

    /// Posts what is due on a piece of a buffer; the last of it is left under way.
    fn exchange(&mut self, buffer: Buffer, piece: Piece, dues: &[Due]) {
        for (index, (action, axis)) in dues.iter().enumerate() {
            if index > 0 {
                self.settle(buffer);
            }
            let elements = self.elements(buffer, *axis).div_ceil(u64::from(piece.of));
            let ticket = self.post_piece(*action, *axis, (buffer, piece), elements);
            self.moving.entry(buffer).or_default().push(ticket);
        }
    }

    /// Elements of the whole buffer, over the ranks of the group along this axis that exchanges it.
    fn elements(&self, buffer: Buffer, axis: Axis) -> u64 {
        let (shape, config) = (&self.common.shape, self.config);
        let (Buffer::Activation { value, .. } | Buffer::ActivationGradient { value, .. }) = buffer
        else {
            unreachable!("{buffer} is no value of a microbatch")
        };
        match value {
            Value::KeyValues(_) => {
                let (key, value) = config.head_dims();
                let heads = config.rank_heads(shape).1;
                shape.tokens() * heads * (key + value)
            }
            Value::LogSums(_) => 3 * shape.tensor * shape.product_tokens(),
            // The loads of all experts, of every rank.
            Value::Routes(_) => shape.expert * config.experts.map_or(0, |experts| experts.count),
            // Where loads are even; each rank finds out what it has to send and receive. Ranks that split each
            // expert gather what each of them was sent.
            Value::Dispatched(_) | Value::Expertise(_) => {
                let per_token = config.experts.map_or(0, |experts| experts.per_token);
                let parts = if axis == Axis::Expert { shape.expert_tensor } else { 1 };
                shape.expert_rows(per_token) / parts * config.hidden
            }
            _ => shape.product_tokens() * config.hidden,
        }
    }

    pub(super) fn stream_elements(&self) -> u64 {
        self.common.shape.stream_tokens() * self.config.hidden
    }

    // Forward.

    fn forward(&mut self, work: Work, pass: Pass) {
        for value in Value::of(work.segment, work.layer).0 {
            self.settle(work.value(value));
        }
        let of = pieces(self.layout, work.segment);
        let gathered = self.common.exchanges.before(work.segment, work.layer);
        if work.attends() && of > 1 {
            self.ring(work, pass);
            return;
        }
        let tickets = self.gather_pieces(work, gathered, of);
        let dues: Dues = self.common.exchanges.after(work.segment).collect();
        for (piece, ticket) in all_pieces(of).zip(tickets) {
            if let Some(ticket) = ticket {
                self.wait(ticket);
            }
            self.instruct(work, pass, piece);
            if !(pass == Pass::Recompute && is_unread(work.segment)) {
                self.exchange(work.value(work.output()), piece, &dues);
            }
        }
    }

    /// Posts the gather of every piece of what a segment reads gathered.
    fn gather_pieces(&mut self, work: Work, gathered: Option<(Value, Due)>, of: u8) -> Gathers {
        let Some((value, (action, axis))) = gathered else {
            return smallvec![None; of.into()];
        };
        let buffer = work.value(value);
        let elements = self.elements(buffer, axis).div_ceil(u64::from(of));
        all_pieces(of)
            .map(|piece| Some(self.post_piece(action, axis, (buffer, piece), elements)))
            .collect()
    }

    /// Keys and values go around the ring; while a piece is on its way, attention works on the one
    /// before. Backward, the gradient of each piece follows it home.
    fn ring(&mut self, work: Work, pass: Pass) {
        let keys = Value::KeyValues(work.layer);
        let backward = !matches!(pass, Pass::Forward | Pass::Recompute);
        let of = pieces(self.layout, work.segment);
        let elements = self.elements(work.value(keys), Axis::Context) / u64::from(of);
        let mut coming = None;
        let mut homeward = None;
        for piece in all_pieces(of) {
            if let Some(ticket) = coming.take() {
                self.wait(ticket);
            }
            if piece.index + 1 < of {
                let next = Piece { index: piece.index + 1, of };
                let buffer = (work.value(keys), next);
                coming = Some(self.post_piece(Action::Shift, Axis::Context, buffer, elements));
            }
            self.instruct(work, pass, piece);
            if backward {
                if let Some(ticket) = homeward.take() {
                    self.wait(ticket);
                }
                let buffer = (work.gradient(keys), piece);
                homeward = Some(self.post_piece(Action::Shift, Axis::Context, buffer, elements));
            }
        }
        if let Some(ticket) = homeward {
            self.moving.entry(work.gradient(keys)).or_default().push(ticket);
        }
    }

    // Backward.

    /// With sequences split over ranks, attention needs all keys and values once more; they are
    /// gathered while the rest of the layer is on its way.
    fn gather_keys(&mut self, visit: Visit, works: &[Work]) {
        let again = |work: &Work| work.attends() || work.segment == Segment::Qkv;
        if self.again(visit, works).iter().any(again) {
            return;
        }
        let attends = works.iter().find(|work| work.attends());
        let Some(work) = attends.filter(|work| pieces(self.layout, work.segment) == 1) else {
            return;
        };
        if let Some((value, due)) = self.common.exchanges.before(work.segment, work.layer) {
            self.exchange(work.value(value), Piece::WHOLE, &[due]);
        }
    }

    fn backward(&mut self, work: Work, pass: Pass) {
        let Work { segment, layer, .. } = work;
        let later = segment == Segment::Embed && pass == Pass::BackwardInput;
        if later || segment == Segment::LogSums {
            return;
        }
        let output = work.gradient(work.output());
        self.settle(output);
        for value in Value::of(segment, layer).0 {
            self.settle(work.value(value));
        }
        if segment == Segment::Qkv {
            self.settle(work.gradient(Value::KeyValues(layer)));
        }
        if work.attends() {
            self.backward_attention(work, pass);
            return;
        }
        let exchanges = self.common.exchanges;
        let inputs = Value::of(segment, layer).0;
        let split = pieces(self.layout, segment) > 1
            || exchanges.before(segment, layer).is_some()
            || inputs.iter().any(|v| exchanges.after_backward(segment, *v).next().is_some());
        let halves = split && !self.has_no_weights(segment);
        let first = if pass == Pass::Backward && halves { Pass::BackwardInput } else { pass };
        let again = if pass == Pass::Backward && halves {
            self.gather_pieces(work, exchanges.before(segment, layer), 1)
        } else {
            Default::default()
        };
        self.backward_pieces(work, first);
        if first == pass {
            return;
        }
        if self.layout.tensor_overlap == TensorOverlap::None {
            inputs.iter().for_each(|value| self.settle(work.gradient(*value)));
        }
        again.into_iter().flatten().for_each(|ticket| self.wait(ticket));
        self.instruct(work, Pass::BackwardWeight, Piece::WHOLE);
    }

    /// Each piece needs its part of the gradient of the output, and leaves one of the input's.
    fn backward_pieces(&mut self, work: Work, pass: Pass) {
        let exchanges = self.common.exchanges;
        let inputs = Value::of(work.segment, work.layer).0;
        let whole = pass != Pass::BackwardInput;
        let of = if whole { 1 } else { pieces(self.layout, work.segment) };
        let output = work.gradient(work.output());
        let gathers: Gathers = match exchanges.before_backward(work.segment) {
            None => smallvec![None; of.into()],
            Some((action, axis)) => {
                let elements = self.elements(output, axis).div_ceil(u64::from(of));
                all_pieces(of)
                    .map(|piece| Some(self.post_piece(action, axis, (output, piece), elements)))
                    .collect()
            }
        };
        for (piece, ticket) in all_pieces(of).zip(gathers) {
            if let Some(ticket) = ticket {
                self.wait(ticket);
            }
            self.instruct(work, pass, piece);
            for value in &inputs {
                let dues: Dues = exchanges.after_backward(work.segment, *value).collect();
                self.exchange(work.gradient(*value), piece, &dues);
            }
        }
    }

    fn backward_attention(&mut self, work: Work, pass: Pass) {
        if pieces(self.layout, work.segment) > 1 {
            self.ring(work, pass);
            return;
        }
        let keys = Value::KeyValues(work.layer);
        let exchanges = self.common.exchanges;
        let gathered = exchanges.before(work.segment, work.layer);
        if gathered.is_some() && !self.moving.contains_key(&work.value(keys)) {
            let due = gathered.map(|(_, due)| due);
            self.exchange(work.value(keys), Piece::WHOLE, due.as_slice());
        }
        self.settle(work.value(keys));
        self.instruct(work, pass, Piece::WHOLE);
        let dues: Dues = exchanges.after_backward(work.segment, keys).collect();
        self.exchange(work.gradient(keys), Piece::WHOLE, &dues);
    }

    fn has_no_weights(&self, segment: Segment) -> bool {
        self.common.segments[&(segment, Pass::BackwardWeight, 1)].is_empty()
    }

    /// The gradients of weights alone, in a turn of their own.
    fn weights(&mut self, work: Work) {
        if self.has_no_weights(work.segment) {
            return;
        }
        let exchanges = self.common.exchanges;
        let gathered = exchanges.before(work.segment, work.layer);
        for ticket in self.gather_pieces(work, gathered, 1).into_iter().flatten() {
            self.wait(ticket);
        }
        if work.segment == Segment::Embed {
            let output = work.gradient(work.output());
            self.settle(output);
            if let Some(due) = exchanges.before_backward(work.segment) {
                self.exchange(output, Piece::WHOLE, &[due]);
                self.settle(output);
            }
        }
        self.instruct(work, Pass::BackwardWeight, Piece::WHOLE);
    }

    // Recomputation.

    /// The segments of a visit that are computed again.
    fn again(&self, visit: Visit, works: &[Work]) -> Vec<Work> {
        if visit.block == Block::Embedding || visit.block == Block::Head {
            return vec![];
        }
        let again = |work: &&Work| {
            let of_layer = work.segment.is_layer() && work.segment != Segment::Merge;
            of_layer
                && !is_last(work.segment)
                && self.layout.recompute.again(work.segment, visit.index)
        };
        works.iter().filter(again).copied().collect()
    }

    fn discard(&mut self, visit: Visit, works: &[Work]) {
        if self.layout.recompute == Recompute::None {
            return;
        }
        for work in self.again(visit, works) {
            let (value, microbatch) = (work.output(), work.microbatch);
            self.list.push(Instruction::Discard { value, microbatch });
        }
    }

    /// Without a backward pass, all that the next visit does not read; prediction layers read more.
    fn forget(&mut self, works: &[Work]) {
        let (Some(first), Some(last)) = (works.first(), works.last()) else { return };
        if self.config.prediction_layers > 0 {
            return;
        }
        let entered = Value::of(first.segment, first.layer).0;
        let outputs = works.iter().map(|work| work.output());
        let next = last.output();
        for value in entered.into_iter().chain(outputs) {
            if value != next || matches!(value, Value::Loss(_)) {
                self.list.push(Instruction::Discard { value, microbatch: last.microbatch });
            }
        }
    }

    fn recompute(&mut self, visit: Visit, works: &[Work]) {
        for work in self.again(visit, works) {
            self.forward(work, Pass::Recompute);
        }
    }
}

/// Whether nothing that is computed again, and no backward pass, reads its output.
fn is_unread(segment: Segment) -> bool {
    matches!(segment, Segment::FeedForward | Segment::SharedExperts)
}

/// Whether its output is all that the next layer needs: nothing of the own layer reads it.
fn is_last(segment: Segment) -> bool {
    matches!(segment, Segment::FeedForwardAdd | Segment::Combine)
}
