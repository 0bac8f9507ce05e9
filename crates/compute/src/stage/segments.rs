//! The segments of a model in terms of operators, forward and backward.
//!
//! Forward leaves in `values` what the next segment or the backward pass reads, and in `saved`
//! what only the segment's own backward needs. Backward takes the gradient of the segment's
//! output, leaves that of its input, and frees both passes' values behind it.

use model::{Block, Pass, Role, Segment};
use program::Value;

use super::{BlockState, Stage};
use crate::operators::{Operators, ProductDims, Rotation, Window, WindowMut};

impl<O: Operators> Stage<O> {
    pub(super) fn compute(&mut self, segment: Segment, pass: Pass, layer: u32, microbatch: u32) {
        match pass {
            Pass::Forward => self.forward(segment, layer, microbatch),
            Pass::Recompute if is_feed_forward(segment) => {
                self.feed_forward_again(segment, layer, microbatch);
            }
            Pass::Recompute => self.forward(segment, layer, microbatch),
            Pass::Backward => self.backward(segment, layer, microbatch),
            Pass::BackwardInput | Pass::BackwardWeight => {
                unreachable!("the layout refuses split backward passes")
            }
        }
    }

    fn forward(&mut self, segment: Segment, layer: u32, mb: u32) {
        let hidden = self.config.hidden as usize;
        match segment {
            Segment::Embed => {
                let table = self.window(Block::Embedding, Role::Embedding);
                let words = &self.microbatches[mb as usize].words;
                let stream = self.operators.embedding(words, table, hidden);
                self.values.insert((mb, Value::Stream(0)), stream);
            }
            Segment::AttentionNorm | Segment::FeedForwardNorm | Segment::FinalNorm => {
                self.norm_forward(segment, layer, mb);
            }
            Segment::Qkv => {
                let mut qkv = self.product((mb, Value::AttentionNormed(layer)), segment, layer);
                self.rotate(&mut qkv, false);
                self.values.insert((mb, Value::Qkv(layer)), qkv);
            }
            Segment::Attend => {
                let qkv = &self.values[&(mb, Value::Qkv(layer))];
                let (y, log_sums) = self.operators.attention(qkv, &self.program.attention);
                self.values.insert((mb, Value::Attended(layer)), y);
                self.saved.insert((mb, Value::Attended(layer)), log_sums);
            }
            Segment::Project => {
                let delta = self.product((mb, Value::Attended(layer)), segment, layer);
                self.values.insert((mb, Value::AttentionDelta(layer)), delta);
            }
            Segment::AttentionAdd | Segment::FeedForwardAdd => {
                let (stream, delta, sum) = addition(segment, layer);
                let mut delta = take(&mut self.values, (mb, delta));
                self.operators.add(&mut delta, &self.values[&(mb, stream)]);
                self.values.insert((mb, sum), delta);
            }
            Segment::FeedForward | Segment::SharedExperts => {
                self.feed_forward(segment, layer, mb);
            }
            Segment::Route | Segment::Dispatch | Segment::Experts | Segment::Combine => {
                self.experts_forward(segment, layer, mb);
            }
            Segment::Logits => {
                let logits = self.product((mb, Value::FinalNormed(layer)), segment, layer);
                self.values.insert((mb, Value::Logits(layer)), logits);
            }
            Segment::Loss => self.loss_forward(layer, mb),
            other => unreachable!("{other} is no segment of a Llama"),
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

    fn feed_forward(&mut self, segment: Segment, layer: u32, mb: u32) {
        let input = (mb, Value::FeedForwardNormed(layer));
        let gate_up = self.product(input, segment, layer);
        let dims = self.down_dims(segment);
        let inner = self.operators.swiglu(&gate_up, dims.k);
        let w = self.window(Block::Layer(layer), down(segment));
        let delta = self.operators.product(&inner, w, dims);
        let output = (mb, Value::of(segment, layer).1);
        self.values.insert(output, delta);
        self.saved.insert(output, gate_up);
    }

    /// Nothing reads the delta a second time; the gate and up products are all that is missed.
    fn feed_forward_again(&mut self, segment: Segment, layer: u32, mb: u32) {
        let input = (mb, Value::FeedForwardNormed(layer));
        let gate_up = self.product(input, segment, layer);
        self.saved.insert((mb, Value::of(segment, layer).1), gate_up);
    }

    fn loss_forward(&mut self, layer: u32, mb: u32) {
        let mut logits = take(&mut self.values, (mb, Value::Logits(layer)));
        let targets = &self.microbatches[mb as usize].targets;
        let words = self.config.vocabulary as usize;
        let weight = 1.0 / self.global_tokens;
        let loss = self.operators.cross_entropy(&mut logits, targets, words, weight as f32);
        self.share[1] += loss * weight;
        self.gradients.insert((mb, Value::Logits(layer)), logits);
    }

    fn backward(&mut self, segment: Segment, layer: u32, mb: u32) {
        let hidden = self.config.hidden as usize;
        match segment {
            Segment::Loss => {} // the forward pass left the gradient in place of the logits
            Segment::Logits => {
                let dy = take(&mut self.gradients, (mb, Value::Logits(layer)));
                self.product_backward(&dy, (mb, Value::FinalNormed(layer)), segment, layer);
            }
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
            Segment::FeedForward | Segment::SharedExperts => {
                self.feed_forward_backward(segment, layer, mb);
            }
            Segment::Route | Segment::Dispatch | Segment::Experts | Segment::Combine => {
                self.experts_backward(segment, layer, mb);
            }
            Segment::Project => {
                let dy = take(&mut self.gradients, (mb, Value::AttentionDelta(layer)));
                // The weighted values stay: the attention's own backward needs them.
                let x = self.values[&(mb, Value::Attended(layer))].clone();
                self.product_backward(&dy, (mb, Value::Attended(layer)), segment, layer);
                self.values.insert((mb, Value::Attended(layer)), x);
            }
            Segment::Attend => {
                let dy = take(&mut self.gradients, (mb, Value::Attended(layer)));
                let y = take(&mut self.values, (mb, Value::Attended(layer)));
                let log_sums = take(&mut self.saved, (mb, Value::Attended(layer)));
                let qkv = take(&mut self.values, (mb, Value::Qkv(layer)));
                let dims = &self.program.attention;
                let dqkv = self.operators.attention_backward(&dy, &qkv, (&y, &log_sums), dims);
                self.gradients.insert((mb, Value::Qkv(layer)), dqkv);
            }
            Segment::Qkv => {
                let mut dy = take(&mut self.gradients, (mb, Value::Qkv(layer)));
                self.rotate(&mut dy, true);
                self.product_backward(&dy, (mb, Value::AttentionNormed(layer)), segment, layer);
            }
            Segment::Embed => {
                let dy = take(&mut self.gradients, (mb, Value::Stream(0)));
                let words = std::mem::take(&mut self.microbatches[mb as usize].words);
                let (operators, window) = self.gradient(Block::Embedding, Role::Embedding);
                operators.embedding_backward(&dy, &words, hidden, window);
            }
            other => unreachable!("{other} is no segment of a Llama"),
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
        let rows = self.program.tokens * width;
        let mut dx = passing.unwrap_or_else(|| self.operators.zeros(rows));
        let scale_of = self.weights(block).clone();
        let (operators, dscale) = self.gradient(block, role);
        let scale = Window { flat: &scale_of, start: dscale.start };
        operators.rms_norm_backward(&dy, (&x, &inverse), scale, width, &mut dx, dscale);
        self.gradients.insert((mb, input), dx);
    }

    fn feed_forward_backward(&mut self, segment: Segment, layer: u32, mb: u32) {
        let output = (mb, Value::of(segment, layer).1);
        let dy = take(&mut self.gradients, output);
        let gate_up = take(&mut self.saved, output);
        let dims = self.down_dims(segment);
        let w = self.window(Block::Layer(layer), down(segment));
        let dinner = self.operators.product_input_gradient(&dy, w, dims);
        let inner = self.operators.swiglu(&gate_up, dims.k);
        let (operators, dw) = self.gradient(Block::Layer(layer), down(segment));
        operators.product_weight_gradient(&dy, &inner, dims, dw);
        drop(inner);
        let dgate_up = self.operators.swiglu_backward(&dinner, &gate_up, dims.k);
        let input = (mb, Value::FeedForwardNormed(layer));
        // Routed experts read the same input, and come after.
        let x = (segment == Segment::SharedExperts).then(|| self.values[&input].clone());
        self.product_backward(&dgate_up, input, segment, layer);
        self.values.extend(x.map(|x| (input, x)));
    }

    /// The product at the start of `segment`: of the value at `input` with the segment's weights.
    fn product(&self, input: (u32, Value), segment: Segment, layer: u32) -> O::Tensor {
        let (block, role, dims) = self.linear(segment, layer);
        self.operators.product(&self.values[&input], self.window(block, role), dims)
    }

    /// Both gradients of [`Self::product`]; frees its input.
    fn product_backward(
        &mut self,
        dy: &O::Tensor,
        input: (u32, Value),
        segment: Segment,
        layer: u32,
    ) {
        let (block, role, dims) = self.linear(segment, layer);
        let w = self.window(block, role);
        let dx = self.operators.product_input_gradient(dy, w, dims);
        let x = take(&mut self.values, input);
        let (operators, dw) = self.gradient(block, role);
        operators.product_weight_gradient(dy, &x, dims, dw);
        self.gradients.insert(input, dx);
    }

    /// The weights of the product at the start of a segment: adjacent parameters count as one.
    fn linear(&self, segment: Segment, layer: u32) -> (Block, Role, ProductDims) {
        let (r, hidden) = (self.program.tokens, self.config.hidden as usize);
        let dims = |k, n: u64| ProductDims { r, k, n: n as usize };
        let block = Block::Layer(layer);
        match segment {
            Segment::Qkv => (block, Role::Query, dims(hidden, self.config.qkv_width())),
            Segment::Project => {
                (block, Role::Output, dims(self.config.query_width() as usize, self.config.hidden))
            }
            Segment::FeedForward => (block, Role::Gate, dims(hidden, 2 * self.config.feed_forward)),
            Segment::SharedExperts => {
                (block, Role::SharedUp, dims(hidden, 2 * self.feed_forward_width(segment)))
            }
            Segment::Logits if self.config.tied_embeddings => {
                (Block::Embedding, Role::Embedding, dims(hidden, self.config.vocabulary))
            }
            Segment::Logits => (Block::Head, Role::Head, dims(hidden, self.config.vocabulary)),
            _ => unreachable!("{segment} starts with no product"),
        }
    }

    fn down_dims(&self, segment: Segment) -> ProductDims {
        let (k, n) = (self.feed_forward_width(segment) as usize, self.config.hidden as usize);
        ProductDims { r: self.program.tokens, k, n }
    }

    fn feed_forward_width(&self, segment: Segment) -> u64 {
        match self.config.experts {
            Some(experts) if segment == Segment::SharedExperts => experts.shared_width,
            _ => self.config.feed_forward,
        }
    }

    fn rotate(&self, qkv: &mut O::Tensor, inverse: bool) {
        let [cos, sin] = &self.rotation;
        let rotation = Rotation { cos, sin };
        self.operators.rotary(qkv, rotation, &self.program.attention, inverse);
    }

    fn weights(&self, block: Block) -> &O::Tensor {
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
