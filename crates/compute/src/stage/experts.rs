//! A mixture of experts in terms of operators: tokens are routed, copied in the order of their
//! experts, worked on by each expert, weighted and added up. No token is dropped: an expert gets as
//! many rows as chose it.
//!
//! Expert-parallel ranks hold some experts each. They first tell each other how many rows each
//! expert gets, then exchange rows all to all: copies of tokens to their experts and what these made
//! of them home again; backward, gradients the other way.

use model::{Block, Experts, Role, Scoring, Segment};
use program::{Buffer, Transfer, Value};

use super::Stage;
use super::exchanged::Work;
use super::routing::Routing;
use super::segments::{Owed, take};
use crate::operators::{Operators, ProductDims, Window, WindowMut};

impl<O: Operators> Stage<O> {
    pub(super) fn experts_forward(&mut self, work: Work) {
        match work.segment {
            Segment::Route => self.route(work),
            Segment::Dispatch => self.dispatch(work),
            Segment::Experts => self.work_of_experts(work),
            _ => self.combine(work),
        }
    }

    pub(super) fn experts_backward(&mut self, work: Work) {
        match work.segment {
            Segment::Route => self.route_backward(work),
            Segment::Dispatch => self.dispatch_backward(work),
            Segment::Experts => self.experts_gradient(work),
            _ => self.combine_backward(work),
        }
    }

    fn experts(&self) -> Experts {
        self.config.experts.expect("only a mixture of experts has these segments")
    }

    /// Each rank routes its own tokens of the residual stream.
    pub(super) fn router_dims(&self) -> ProductDims {
        let (k, n) = (self.config.hidden as usize, self.experts().count as usize);
        ProductDims { r: self.program.shape.stream_tokens() as usize, k, n }
    }

    fn routing(&self, work: Work) -> &Routing {
        &self.routings[&(work.microbatch, work.layer)]
    }

    fn tokens_of_copies(&self, work: Work) -> Vec<u32> {
        self.routing(work).tokens(self.experts().per_token)
    }

    // Forward.

    fn route(&mut self, work: Work) {
        let (experts, block) = (self.experts(), Block::Layer(work.layer));
        let x = &self.values[&work.of(Value::FeedForwardNormed(work.layer))];
        let w = self.window(block, Role::Router);
        let scores = self.operators.product(x, w, self.router_dims());
        let biases = match experts.scoring {
            Scoring::Softmax | Scoring::SoftmaxOfAll => vec![],
            Scoring::Sigmoid => {
                let Window { flat, start } = self.window(block, Role::RouterBias);
                let biases = self.operators.slice(flat, start..start + experts.count as usize);
                self.operators.download(biases)
            }
        };
        let scores = self.operators.download(scores);
        let routing = if self.operators.has_contents() {
            Routing::new(&experts, &scores, &biases)
        } else {
            let (tokens, ranks) = (self.router_dims().r, self.program.shape.expert as usize);
            Routing::even(&experts, tokens, ranks)
        };
        let weights = self.operators.upload(routing.weights(&experts));
        self.values.insert(work.of(Value::Routes(work.layer)), weights);
        self.routings.insert((work.microbatch, work.layer), routing);
    }

    fn dispatch(&mut self, work: Work) {
        let tokens = self.tokens_of_copies(work);
        let x = &self.values[&work.of(Value::FeedForwardNormed(work.layer))];
        let (x, width) = (Window { flat: x, start: 0 }, self.config.hidden as usize);
        let copies = self.operators.embedding(&tokens, x, width);
        self.leave(work, copies);
    }

    /// The rows of each expert of this rank, and the sizes of its products: up with the gate, and
    /// down.
    fn expert_dims(&self, work: Work) -> (Vec<usize>, [ProductDims; 2]) {
        let own = self.program.place.expert as usize;
        let routing = self.routing(work);
        let experts = routing.experts_of(own, self.program.shape.expert as usize);
        let rows: Vec<usize> = experts.map(|expert| routing.rows_of(expert)).collect();
        let (r, hidden) = (rows.iter().sum(), self.config.hidden as usize);
        let width = self.experts().width as usize;
        let up = ProductDims { r, k: hidden, n: 2 * width };
        (rows, [up, ProductDims { r, k: width, n: hidden }])
    }

    fn work_of_experts(&mut self, work: Work) {
        let (rows, [up, down]) = self.expert_dims(work);
        let block = Block::Experts(work.layer);
        let x = &self.values[&work.of(Value::Dispatched(work.layer))];
        let w = self.window(block, Role::ExpertsUp);
        let gate_up = self.operators.grouped_product(x, w, up, &rows);
        let inner = self.operators.swiglu(&gate_up, down.k);
        let w = self.window(block, Role::ExpertsDown);
        let expertise = self.operators.grouped_product(&inner, w, down, &rows);
        self.saved.insert(work.of(work.output()), gate_up);
        self.leave(work, expertise);
    }

    fn combine(&mut self, work: Work) {
        let (tokens, width) = (self.tokens_of_copies(work), self.config.hidden as usize);
        let expertise = &self.values[&work.of(Value::Expertise(work.layer))];
        let weights = &self.values[&work.of(Value::Routes(work.layer))];
        let weighted = self.operators.scale_rows(expertise, weights, width);
        let shared = self.values.remove(&work.of(Value::SharedDelta(work.layer)));
        let sum = self.added_up(&weighted, &tokens, shared);
        self.leave(work, sum);
    }

    /// The rows of copies, each added to that of its token.
    fn added_up(&self, copies: &O::Tensor, tokens: &[u32], into: Option<O::Tensor>) -> O::Tensor {
        let width = self.config.hidden as usize;
        let elements = self.program.shape.stream_tokens() as usize * width;
        let mut sum = into.unwrap_or_else(|| self.operators.zeros(elements));
        let window = WindowMut { flat: &mut sum, start: 0, fresh: false };
        self.operators.embedding_backward(copies, tokens, width, window);
        self.operators.cast(&sum)
    }

    // Backward.

    fn combine_backward(&mut self, work: Work) {
        let (tokens, width) = (self.tokens_of_copies(work), self.config.hidden as usize);
        let dy = self.output_gradient(work);
        let copies = self.operators.embedding(&tokens, Window { flat: &dy, start: 0 }, width);
        let expertise = take(&mut self.values, work.of(Value::Expertise(work.layer)));
        let dweights = self.operators.row_dots(&copies, &expertise, width);
        self.gradients.insert(work.of(Value::Routes(work.layer)), dweights);
        let weights = &self.values[&work.of(Value::Routes(work.layer))];
        let dexpertise = self.operators.scale_rows(&copies, weights, width);
        self.leave_gradient(work, Value::Expertise(work.layer), dexpertise);
        if self.experts().shared_width > 0 {
            self.gradients.insert(work.of(Value::SharedDelta(work.layer)), dy);
        }
    }

    fn experts_gradient(&mut self, work: Work) {
        let (rows, [up, down]) = self.expert_dims(work);
        let block = Block::Experts(work.layer);
        let dy = self.output_gradient(work);
        let gate_up = &self.saved[&work.of(work.output())];
        let w = self.window(block, Role::ExpertsDown);
        let dinner = self.operators.grouped_product_input_gradient(&dy, w, down, &rows);
        let dgate_up = self.operators.swiglu_backward(&dinner, gate_up, down.k);
        let w = self.window(block, Role::ExpertsUp);
        let dx = self.operators.grouped_product_input_gradient(&dgate_up, w, up, &rows);
        self.owe(work, dy, Some(dgate_up));
        self.leave_gradient(work, Value::Dispatched(work.layer), dx);
    }

    /// The gradients of the weights of this rank's experts.
    pub(super) fn experts_weights(&mut self, work: Work, owed: Owed<O::Tensor>) {
        let (rows, [up, down]) = self.expert_dims(work);
        let block = Block::Experts(work.layer);
        let gate_up = take(&mut self.saved, work.of(work.output()));
        let inner = self.operators.swiglu(&gate_up, down.k);
        let (operators, dw) = self.gradient(block, Role::ExpertsDown);
        operators.grouped_product_weight_gradient(&owed.output, &inner, down, &rows, dw);
        let dgate_up = owed.inner.expect("experts have two products");
        let x = take(&mut self.values, work.of(Value::Dispatched(work.layer)));
        let (operators, dw) = self.gradient(block, Role::ExpertsUp);
        operators.grouped_product_weight_gradient(&dgate_up, &x, up, &rows, dw);
    }

    fn dispatch_backward(&mut self, work: Work) {
        let tokens = self.tokens_of_copies(work);
        let copies = self.gradients.remove(&work.of(work.output()));
        let copies = copies.expect("the verifier has seen this gradient written");
        let dx = self.added_up(&copies, &tokens, None);
        self.add_gradient(work.of(Value::FeedForwardNormed(work.layer)), dx);
    }

    /// Also counts the loads: what stands in the place of the biases' gradient is what moves them,
    /// added up over tokens, microbatches and ranks as every gradient is.
    fn route_backward(&mut self, work: Work) {
        let experts = self.experts();
        let weights = take(&mut self.gradients, work.of(Value::Routes(work.layer)));
        self.values.remove(&work.of(Value::Routes(work.layer)));
        let weights = self.operators.download(weights);
        let routing = self.routing(work);
        let dy = self.operators.upload(routing.scores_gradient(&experts, &weights));
        let loads: Vec<f32> = routing.loads().iter().map(|load| *load as f32).collect();
        let (block, role, dims) = self.linear(work);
        let w = self.window(block, role);
        let dx = self.operators.product_input_gradient(&dy, w, dims);
        self.add_gradient(work.of(Value::FeedForwardNormed(work.layer)), dx);
        self.owe(work, dy, None);
        if experts.scoring == Scoring::Sigmoid {
            let dims = ProductDims { r: 1, k: 1, n: loads.len() };
            let (operators, window) = self.gradient(block, Role::RouterBias);
            let (loads, once) = (operators.upload(loads), operators.upload(vec![1.0]));
            operators.product_weight_gradient(&loads, &once, dims, window);
        }
    }

    /// Adds to the gradient of a value that several segments read.
    pub(super) fn add_gradient(&mut self, key: (u32, Value), more: O::Tensor) {
        match self.gradients.get_mut(&key) {
            Some(sum) => self.operators.add(sum, &more),
            None => {
                self.gradients.insert(key, more);
            }
        }
    }

    // Between ranks.

    /// This rank's loads, for the others to know.
    pub(super) fn own_loads(&self, layer: u32, microbatch: u32) -> O::Tensor {
        let loads = self.routings[&(microbatch, layer)].loads();
        self.operators.upload(loads.iter().map(|load| *load as f32).collect())
    }

    /// The loads of all ranks.
    pub(super) fn put_loads(&mut self, layer: u32, microbatch: u32, loads: &[f32]) {
        if !self.operators.has_contents() {
            return;
        }
        let routing = self.routings.get_mut(&(microbatch, layer));
        let routing = routing.expect("loads follow the routing");
        routing.of_ranks = loads.iter().map(|load| *load as u32).collect();
    }

    /// Elements that one rank has for another in an exchange all to all.
    ///
    /// # Panics
    /// When the transfer is none of rows of experts, or comes before the routing.
    #[must_use]
    pub fn exchanged(&self, transfer: &Transfer, from: u32, to: u32) -> usize {
        let (layer, microbatch, out) = exchange_of(transfer);
        let routing = &self.routings[&(microbatch, layer)];
        let ranks = self.program.shape.expert as usize;
        let (tokens_of, experts_of) = if out { (from, to) } else { (to, from) };
        let experts = routing.experts_of(experts_of as usize, ranks);
        let rows: usize = experts.map(|expert| routing.rows(tokens_of as usize, expert)).sum();
        rows * self.config.hidden as usize
    }

    /// Rows in the order in which they leave, rank by rank.
    pub(super) fn outgoing(&self, transfer: &Transfer, rows: Vec<f32>) -> Vec<f32> {
        let (layer, microbatch, out) = exchange_of(transfer);
        if out { rows } else { self.transposed(layer, microbatch, &rows, false) }
    }

    /// Rows as they have come, rank by rank, in the order in which they are worked on.
    pub(super) fn incoming(&self, transfer: &Transfer, rows: Vec<f32>) -> Vec<f32> {
        let (layer, microbatch, out) = exchange_of(transfer);
        if out { self.transposed(layer, microbatch, &rows, true) } else { rows }
    }

    /// From the rows of each rank by expert to those of each expert by rank, or back: those of this
    /// rank's experts.
    fn transposed(&self, layer: u32, microbatch: u32, rows: &[f32], by_rank: bool) -> Vec<f32> {
        let routing = &self.routings[&(microbatch, layer)];
        let (ranks, own) = (self.program.shape.expert as usize, self.program.place.expert as usize);
        let experts = || routing.experts_of(own, ranks);
        let by_ranks = (0..ranks).flat_map(|rank| experts().map(move |expert| (rank, expert)));
        let by_experts = experts().flat_map(|expert| (0..ranks).map(move |rank| (rank, expert)));
        let (given, wanted): (Vec<_>, Vec<_>) = (by_ranks.collect(), by_experts.collect());
        let (given, wanted) = if by_rank { (given, wanted) } else { (wanted, given) };
        let mut next = 0;
        let mut places = std::collections::BTreeMap::new();
        for (rank, expert) in given {
            let elements = routing.rows(rank, expert) * self.config.hidden as usize;
            places.insert((rank, expert), next..next + elements);
            next += elements;
        }
        wanted.into_iter().flat_map(|key| rows[places[&key].clone()].iter().copied()).collect()
    }
}

/// Which layer and microbatch the rows of an exchange are of, and whether they go from the ranks of
/// tokens to those of experts.
fn exchange_of(transfer: &Transfer) -> (u32, u32, bool) {
    match transfer.buffer {
        Buffer::Activation { value: Value::Dispatched(layer), microbatch }
        | Buffer::ActivationGradient { value: Value::Expertise(layer), microbatch } => {
            (layer, microbatch, true)
        }
        Buffer::Activation { value: Value::Expertise(layer), microbatch }
        | Buffer::ActivationGradient { value: Value::Dispatched(layer), microbatch } => {
            (layer, microbatch, false)
        }
        other => unreachable!("{other} is not exchanged all to all"),
    }
}
