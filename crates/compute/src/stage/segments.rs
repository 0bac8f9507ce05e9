//! The segments of a model in terms of operators, forward and backward.
//!
//! Forward leaves in `values` what the next segment or the backward pass reads, and in `saved`
//! what only the segment's own backward needs. Backward takes the gradient of the segment's
//! output, leaves that of its input, and frees both passes' values behind it. The gradients of
//! weights are found from what is `owed`, at once or in a pass of their own.

use std::ops::Range;

use model::{Block, Parameter, Pass, Role, Segment};
use program::{Buffer, Piece, Value};

use super::exchanged::{Rows, Work};
use super::{BlockState, Stage};
use crate::operators::{
    ELSEWHERE, Operators, Pairing, ProductDims, Rotation, ScoreDims, Window, WindowMut,
};

/// What the gradients of a segment's weights are made of.
pub(super) struct Owed<T> {
    /// The gradient of its output.
    pub output: T,
    /// The gradient of what stands between its two products, if it has two.
    pub inner: Option<T>,
    /// Its input, if others need it too; else it stays among the values.
    pub input: Option<T>,
}

impl<O: Operators> Stage<O> {
    pub(super) fn compute(&mut self, work: Work, pass: Pass) {
        match pass {
            Pass::Forward => self.forward(work),
            Pass::Recompute if is_feed_forward(work.segment) => {
                // Nothing reads the delta a second time; the gate and up products are what is missed.
                let x = self.input(work);
                let gate_up = self.product(&x, work);
                self.save(work, gate_up);
            }
            Pass::Recompute => self.forward(work),
            Pass::BackwardInput => self.backward_input(work),
            Pass::BackwardWeight => self.backward_weight(work),
            Pass::Backward => {
                self.backward_input(work);
                self.backward_weight(work);
            }
        }
    }

    fn forward(&mut self, work: Work) {
        let Work { segment, layer, microbatch: mb, .. } = work;
        match segment {
            Segment::Embed => {
                let words = self.in_part(&self.microbatches[mb as usize].words);
                let table = self.window(Block::Embedding, Role::Embedding);
                let width = self.config.hidden as usize;
                let stream = self.operators.embedding(&words, table, width);
                self.leave(work, stream);
            }
            Segment::AttentionNorm | Segment::FeedForwardNorm | Segment::FinalNorm => {
                self.norm_forward(segment, layer, mb);
            }
            Segment::Qkv => {
                let x = self.input(work);
                let qkv = match self.config.latent_attention {
                    Some(latent) => self.expand(&x, work, latent),
                    None => self.product(&x, work),
                };
                self.leave(work, qkv);
                if work.is_last() {
                    let mut qkv = take(&mut self.values, work.of(Value::Qkv(layer)));
                    if self.config.query_key_norm {
                        self.norm_heads(&mut qkv, work);
                    }
                    self.rotate(&mut qkv, false);
                    self.values.insert(work.of(Value::Qkv(layer)), qkv);
                }
            }
            Segment::Attend | Segment::AttendWindow => self.attend(work),
            Segment::Project | Segment::Logits => {
                let x = self.input(work);
                let y = self.product(&x, work);
                self.leave(work, y);
            }
            Segment::AttentionAdd | Segment::FeedForwardAdd => {
                let (stream, delta, sum) = addition(segment, layer);
                let mut delta = take(&mut self.values, (mb, delta));
                self.operators.add(&mut delta, &self.values[&(mb, stream)]);
                self.values.insert((mb, sum), delta);
            }
            Segment::FeedForward | Segment::SharedExperts => self.feed_forward(work),
            Segment::Route | Segment::Dispatch | Segment::Experts | Segment::Combine => {
                self.experts_forward(work);
            }
            Segment::LogSums => {
                let targets = self.in_part(&self.microbatches[mb as usize].targets);
                let logits = &self.values[&(mb, Value::Logits(layer))];
                let sums = self.operators.log_sums(logits, &targets, self.scores());
                self.values.insert((mb, Value::LogSums(layer)), sums);
            }
            Segment::Loss => self.loss_forward(work),
            other => unreachable!("{other} is not carried out"),
        }
    }

    fn norm_forward(&mut self, segment: Segment, layer: u32, mb: u32) {
        let (input, output, block, role) = norm(segment, layer);
        let (y, inverse) = self.operators.rms_norm(
            &self.values[&(mb, input)],
            self.window(block, role),
            self.config.hidden as usize,
            self.config.norm_epsilon,
        );
        self.values.insert((mb, output), y);
        self.saved.insert((mb, output), inverse);
    }

    fn feed_forward(&mut self, work: Work) {
        let x = self.input(work);
        let gate_up = self.product(&x, work);
        let dims = self.down_dims(work);
        let inner = self.operators.swiglu(&gate_up, dims.k);
        self.save(work, gate_up);
        let w = self.window(Block::Layer(work.layer), down(work.segment));
        let delta = self.operators.product(&inner, w, dims);
        self.leave(work, delta);
    }

    /// Keeps a piece of what stands between a segment's two products.
    pub(super) fn save(&mut self, work: Work, piece: O::Tensor) {
        let key = work.of(work.output());
        let saved = self.saved.remove(&key);
        let saved = self.joined(saved, piece, Rows::Product, work.piece);
        self.saved.insert(key, saved);
    }

    /// The loss, and the gradient of the logits in their place. Where ranks split the vocabulary,
    /// all find the same loss and the first tells of it.
    fn loss_forward(&mut self, work: Work) {
        let Work { layer, microbatch, .. } = work;
        let mut logits = take(&mut self.values, work.of(Value::Logits(layer)));
        let weight = 1.0 / self.group_tokens;
        let targets = &self.microbatches[microbatch as usize].targets;
        let loss = if self.program.exchanges.before(Segment::Loss, layer).is_none() {
            let words = self.config.vocabulary as usize;
            self.operators.cross_entropy(&mut logits, targets, words, weight as f32)
        } else {
            let (targets, dims) = (self.in_part(targets), self.scores());
            let sums = Buffer::Activation { value: Value::LogSums(layer), microbatch };
            let sums = self.take_gathered(sums, work.piece);
            self.values.remove(&work.of(Value::LogSums(layer)));
            let weight = weight as f32;
            self.operators.cross_entropy_of_part(&mut logits, &targets, dims, &sums, weight)
        };
        if self.program.place.tensor == 0 {
            self.share[1] += loss * weight;
        }
        self.gradients.insert(work.of(Value::Logits(layer)), logits);
    }

    /// The gradients of a segment's inputs; of its weights too where these are the scale of a norm.
    fn backward_input(&mut self, work: Work) {
        let Work { segment, layer, microbatch: mb, .. } = work;
        match segment {
            Segment::Loss => {} // the forward pass left the gradient in place of the logits
            Segment::FinalNorm | Segment::FeedForwardNorm | Segment::AttentionNorm => {
                self.norm_backward(segment, layer, mb);
            }
            Segment::FeedForwardAdd | Segment::AttentionAdd => {
                let (stream, delta, sum) = addition(segment, layer);
                let gradient = take(&mut self.gradients, (mb, sum));
                self.values.remove(&(mb, sum));
                self.gradients.insert((mb, stream), gradient.clone());
                self.gradients.insert((mb, delta), gradient);
            }
            Segment::FeedForward | Segment::SharedExperts => self.feed_forward_backward(work),
            Segment::Route | Segment::Dispatch | Segment::Experts | Segment::Combine => {
                self.experts_backward(work);
            }
            Segment::Attend | Segment::AttendWindow => self.attend_backward(work),
            Segment::Qkv => self.qkv_backward(work),
            Segment::Project | Segment::Logits => self.product_backward(work),
            Segment::Embed => {} // words have no gradient
            other => unreachable!("{other} is not carried out"),
        }
    }

    fn norm_backward(&mut self, segment: Segment, layer: u32, mb: u32) {
        let width = self.config.hidden as usize;
        let (input, output, block, role) = norm(segment, layer);
        let dy = take(&mut self.gradients, (mb, output));
        let x = take(&mut self.values, (mb, input));
        let inverse = take(&mut self.saved, (mb, output));
        // The stream's gradient comes past the norm; at the head it starts here.
        let passing = self.gradients.remove(&(mb, input));
        let elements = self.operators.elements(&x);
        let mut dx = passing.unwrap_or_else(|| self.operators.zeros(elements));
        let scale_of = self.weights(block).clone();
        let (operators, dscale) = self.gradient(block, role);
        let scale = Window { flat: &scale_of, start: dscale.start };
        operators.rms_norm_backward(&dy, (&x, &inverse), scale, width, &mut dx, dscale);
        self.gradients.insert((mb, input), dx);
    }

    fn qkv_backward(&mut self, work: Work) {
        if work.is_first() {
            let key = work.of(Value::Qkv(work.layer));
            let mut dy = take(&mut self.gradients, key);
            self.join_keys(work, &mut dy);
            self.rotate(&mut dy, true);
            if self.config.query_key_norm {
                self.norm_heads_backward(&mut dy, work);
            }
            self.gradients.insert(key, dy);
        }
        match self.config.latent_attention {
            Some(latent) => self.expand_backward(work, latent),
            None => self.product_backward(work),
        }
    }

    /// Where the queries and the keys lie in a row of queries, keys and values, and whose norms they
    /// have.
    fn normed_heads(&self) -> [(Role, Range<usize>); 2] {
        let dims = &self.program.attention;
        let (queries, keys) = (dims.queries_width(), dims.kv_heads * dims.head_dim);
        [(Role::QueryNorm, 0..queries), (Role::KeyNorm, queries..queries + keys)]
    }

    /// Norms the queries and keys of every head, and keeps what they were.
    fn norm_heads(&mut self, qkv: &mut O::Tensor, work: Work) {
        let (dims, block) = (self.program.attention, Block::Layer(work.layer));
        let both = 0..dims.qkv_width() - dims.kv_heads * dims.value_dim;
        let before = self.operators.columns(qkv, dims.qkv_width(), both);
        self.saved.insert(work.of(work.output()), before);
        for (role, columns) in self.normed_heads() {
            let heads = self.operators.columns(qkv, dims.qkv_width(), columns.clone());
            let (scale, epsilon) = (self.window(block, role), self.config.norm_epsilon);
            let (normed, _) = self.operators.rms_norm(&heads, scale, dims.head_dim, epsilon);
            self.operators.set_columns(qkv, dims.qkv_width(), columns.start, &normed);
        }
    }

    fn norm_heads_backward(&mut self, dqkv: &mut O::Tensor, work: Work) {
        let (dims, block) = (self.program.attention, Block::Layer(work.layer));
        let (width, epsilon) = (dims.qkv_width(), self.config.norm_epsilon);
        let before = take(&mut self.saved, work.of(work.output()));
        let both = width - dims.kv_heads * dims.value_dim;
        for (role, columns) in self.normed_heads() {
            let heads = self.operators.columns(&before, both, columns.clone());
            let scale = self.window(block, role);
            let (_, inverse) = self.operators.rms_norm(&heads, scale, dims.head_dim, epsilon);
            let dnormed = self.operators.columns(dqkv, width, columns.clone());
            let dheads = self.norm_gradient(&dnormed, (&heads, &inverse), (block, role));
            self.operators.set_columns(dqkv, width, columns.start, &dheads);
        }
    }

    /// The gradient of a norm's input; adds to that of its scale.
    pub(super) fn norm_gradient(
        &mut self,
        dy: &O::Tensor,
        saved: (&O::Tensor, &O::Tensor),
        (block, role): (Block, Role),
    ) -> O::Tensor {
        let mut dx = self.operators.zeros(self.operators.elements(dy));
        let width = self.operators.elements(dy) / self.operators.elements(saved.1);
        let scale_of = self.weights(block).clone();
        let (operators, dscale) = self.gradient(block, role);
        let scale = Window { flat: &scale_of, start: dscale.start };
        operators.rms_norm_backward(dy, saved, scale, width, &mut dx, dscale);
        dx
    }

    /// The gradient of the input of a segment that is one product.
    fn product_backward(&mut self, work: Work) {
        let dy = self.output_gradient(work);
        let (block, role, dims) = self.linear(work);
        let w = self.window(block, role);
        let dx = self.operators.product_input_gradient(&dy, w, dims);
        self.owe(work, dy, None);
        self.leave_gradient(work, Value::of(work.segment, work.layer).0[0], dx);
    }

    fn feed_forward_backward(&mut self, work: Work) {
        let dy = self.output_gradient(work);
        let gate_up = self.piece(&self.saved[&work.of(work.output())], Rows::Product, work.piece);
        let dims = self.down_dims(work);
        let w = self.window(Block::Layer(work.layer), down(work.segment));
        let dinner = self.operators.product_input_gradient(&dy, w, dims);
        let dgate_up = self.operators.swiglu_backward(&dinner, &gate_up, dims.k);
        drop((gate_up, dinner));
        let (block, role, dims) = self.linear(work);
        let w = self.window(block, role);
        let dx = self.operators.product_input_gradient(&dgate_up, w, dims);
        self.owe(work, dy, Some(dgate_up));
        self.leave_gradient(work, Value::FeedForwardNormed(work.layer), dx);
    }

    /// Keeps what the gradients of weights are made of.
    pub(super) fn owe(&mut self, work: Work, output: O::Tensor, inner: Option<O::Tensor>) {
        let Work { segment, layer, microbatch, piece } = work;
        let key = (microbatch, segment, layer);
        let (earlier, earlier_inner) = match self.owed.remove(&key) {
            Some(owed) => (Some(owed.output), owed.inner),
            None => (None, None),
        };
        let output = self.joined(earlier, output, Rows::Product, piece);
        let inner = inner.map(|inner| self.joined(earlier_inner, inner, Rows::Product, piece));
        // Others read the input too, and free it: the backward pass of attention what it left, the
        // router what it chose experts for.
        let shared = matches!(segment, Segment::Project | Segment::SharedExperts);
        let gathered = self.program.exchanges.before(segment, layer).is_some();
        let value = Value::of(segment, layer).0[0];
        let input = (shared && !gathered).then(|| self.values[&work.of(value)].clone());
        self.owed.insert(key, Owed { output, inner, input });
    }

    /// The gradients of a segment's weights.
    fn backward_weight(&mut self, work: Work) {
        let Work { segment, layer, microbatch, .. } = work;
        if segment == Segment::Embed {
            return self.embedding_backward(work);
        }
        let Some(owed) = self.owed.remove(&(microbatch, segment, layer)) else {
            return; // without weights, or those of a norm
        };
        if segment == Segment::Experts {
            return self.experts_weights(work, owed);
        }
        if let (Segment::Qkv, Some(latent)) = (segment, self.config.latent_attention) {
            return self.expand_weights(work, latent, owed);
        }
        let Owed { mut output, inner, input } = owed;
        if let Some(dgate_up) = inner {
            let gate_up = take(&mut self.saved, work.of(work.output()));
            let dims = self.down_dims(work);
            let inner = self.operators.swiglu(&gate_up, dims.k);
            let (operators, dw) = self.gradient(Block::Layer(layer), down(segment));
            operators.product_weight_gradient(&output, &inner, dims, dw);
            output = dgate_up;
        }
        if segment == Segment::Route {
            self.routings.remove(&(microbatch, layer)); // the last that needs it
        }
        let x = self.take_input(work, input);
        let (block, role, dims) = self.linear(work);
        let (operators, dw) = self.gradient(block, role);
        operators.product_weight_gradient(&output, &x, dims, dw);
    }

    /// What a segment read, which nothing reads after the gradients of its weights.
    pub(super) fn take_input(&mut self, work: Work, kept: Option<O::Tensor>) -> O::Tensor {
        let value = Value::of(work.segment, work.layer).0[0];
        match self.program.exchanges.before(work.segment, work.layer) {
            Some(_) => {
                let gathered = self.input(work);
                if work.segment != Segment::SharedExperts {
                    self.values.remove(&work.of(value));
                }
                gathered
            }
            None => kept.unwrap_or_else(|| take(&mut self.values, work.of(value))),
        }
    }

    fn embedding_backward(&mut self, work: Work) {
        let dy = self.output_gradient(work);
        let words = std::mem::take(&mut self.microbatches[work.microbatch as usize].words);
        let (words, hidden) = (self.in_part(&words), self.config.hidden as usize);
        let (operators, window) = self.gradient(Block::Embedding, Role::Embedding);
        operators.embedding_backward(&dy, &words, hidden, window);
    }

    /// The product at the start of a segment, of `x` with the segment's weights.
    fn product(&self, x: &O::Tensor, work: Work) -> O::Tensor {
        let (block, role, dims) = self.linear(work);
        self.operators.product(x, self.window(block, role), dims)
    }

    // The size of this rank's part.

    /// Rows of a piece of what enters products.
    pub(super) fn rows(&self, piece: Piece) -> usize {
        self.program.shape.product_tokens() as usize / usize::from(piece.of)
    }

    fn down_dims(&self, work: Work) -> ProductDims {
        let (k, n) = (self.feed_forward_width(work.segment), self.config.hidden as usize);
        ProductDims { r: self.rows(work.piece), k, n }
    }

    fn feed_forward_width(&self, segment: Segment) -> usize {
        let width = match self.config.experts {
            Some(experts) if segment == Segment::SharedExperts => experts.shared_width,
            _ => self.config.feed_forward,
        };
        (width / self.program.shape.tensor) as usize
    }

    /// Words of the vocabulary in each rank's part.
    fn words(&self) -> usize {
        self.config.vocabulary.div_ceil(self.program.shape.tensor) as usize
    }

    /// The vocabulary may not divide: the last part may have rows that are no words.
    fn scores(&self) -> ScoreDims {
        let (width, all) = (self.words(), self.config.vocabulary as usize);
        let first = self.program.place.tensor as usize * width;
        ScoreDims { width, words: all.saturating_sub(first).min(width) }
    }

    /// Words as rows of this rank's part of the vocabulary.
    fn in_part(&self, words: &[u32]) -> Vec<u32> {
        let first = self.program.place.tensor as u32 * self.words() as u32;
        let part = first..first + self.words() as u32;
        let row = |word: &u32| if part.contains(word) { word - first } else { ELSEWHERE };
        words.iter().map(row).collect()
    }

    /// The weights of the product at the start of a segment: adjacent parameters count as one.
    pub(super) fn linear(&self, work: Work) -> (Block, Role, ProductDims) {
        let (hidden, dims) = (self.config.hidden as usize, &self.program.attention);
        let block = Block::Layer(work.layer);
        let (block, role, k, n) = match work.segment {
            Segment::Qkv => (block, Role::Query, hidden, dims.qkv_width()),
            Segment::Project => (block, Role::Output, dims.output_width(), hidden),
            Segment::FeedForward => {
                (block, Role::Gate, hidden, 2 * self.feed_forward_width(work.segment))
            }
            Segment::SharedExperts => {
                (block, Role::SharedUp, hidden, 2 * self.feed_forward_width(work.segment))
            }
            Segment::Route => return (block, Role::Router, self.router_dims()),
            Segment::Logits if self.config.tied_embeddings => {
                (Block::Embedding, Role::Embedding, hidden, self.words())
            }
            Segment::Logits => (Block::Head, Role::Head, hidden, self.words()),
            other => unreachable!("{other} starts with no product"),
        };
        (block, role, ProductDims { r: self.rows(work.piece), k, n })
    }

    fn rotate(&self, qkv: &mut O::Tensor, inverse: bool) {
        let [cos, sin] = &self.rotation;
        let pairing = match self.config.latent_attention {
            Some(_) => Pairing::Neighbours,
            None => Pairing::Halves,
        };
        let rotation = Rotation { cos, sin, pairing };
        self.operators.rotary(qkv, rotation, &self.program.attention, inverse);
    }

    pub(super) fn weights(&self, block: Block) -> &O::Tensor {
        let gathered = self.blocks.get(&block).and_then(|state| state.gathered.as_ref());
        gathered.expect("the program gathers a block before it is used")
    }

    pub(super) fn window(&self, block: Block, role: Role) -> Window<'_, O::Tensor> {
        let start = self.blocks[&block].offset(role);
        Window { flat: self.weights(block), start }
    }

    /// Where the gradient of a parameter is summed; fresh before the first microbatch.
    pub(super) fn gradient(&mut self, block: Block, role: Role) -> (O, WindowMut<'_, O::Tensor>) {
        let operators = self.operators.clone();
        let state: &mut BlockState<O::Tensor> = self.state(block);
        let start = state.offset(role);
        let elements = state.elements;
        let flat = state.gradients.get_or_insert_with(|| {
            state.written.clear();
            match block {
                Block::Embedding => operators.zeros(elements), // most of its rows stay so
                _ => operators.upload(operators.host_buffer(elements)),
            }
        });
        let fresh = state.written.insert(role) && block != Block::Embedding;
        (operators, WindowMut { flat, start, fresh })
    }

    /// Zeros in place of gradients that no microbatch has written since the last reduction: where
    /// the gradients of weights have a pass of their own, a norm's come earlier.
    pub(super) fn clear_unwritten(&mut self, block: Block) {
        let operators = self.operators.clone();
        let state = self.state(block);
        let unwritten = |p: &&Parameter| !state.written.contains(&written_as(p.role));
        let whole = block == Block::Embedding; // made of zeros
        let ranges: Vec<_> =
            state.parameters.iter().filter(unwritten).map(Parameter::range).collect();
        let Some(gradients) = state.gradients.as_mut().filter(|_| !whole) else { return };
        for range in ranges {
            let zeros = operators.zeros(range.len());
            operators.set_columns(gradients, state.elements, range.start, &zeros);
        }
    }
}

/// Adjacent parameters of one product are written as the first of them.
fn written_as(role: Role) -> Role {
    match role {
        Role::Key | Role::Value => Role::Query,
        Role::Up => Role::Gate,
        other => other,
    }
}

pub(super) fn take<K: Ord, T>(from: &mut std::collections::BTreeMap<K, T>, key: K) -> T {
    from.remove(&key).expect("the verifier has seen this value written")
}

fn is_feed_forward(segment: Segment) -> bool {
    matches!(segment, Segment::FeedForward | Segment::SharedExperts)
}

/// The second product of a feed-forward block.
fn down(segment: Segment) -> Role {
    if segment == Segment::SharedExperts { Role::SharedDown } else { Role::Down }
}

/// A norm's input, output and scale.
fn norm(segment: Segment, layer: u32) -> (Value, Value, Block, Role) {
    match segment {
        Segment::AttentionNorm => (
            Value::Stream(layer),
            Value::AttentionNormed(layer),
            Block::Layer(layer),
            Role::AttentionNorm,
        ),
        Segment::FeedForwardNorm => (
            Value::Middle(layer),
            Value::FeedForwardNormed(layer),
            Block::Layer(layer),
            Role::FeedForwardNorm,
        ),
        _ => (Value::Stream(layer), Value::FinalNormed(layer), Block::Head, Role::FinalNorm),
    }
}

/// A residual addition's two inputs and its sum.
fn addition(segment: Segment, layer: u32) -> (Value, Value, Value) {
    if segment == Segment::AttentionAdd {
        (Value::Stream(layer), Value::AttentionDelta(layer), Value::Middle(layer))
    } else {
        (Value::Middle(layer), Value::FeedForwardDelta(layer), Value::Stream(layer + 1))
    }
}
