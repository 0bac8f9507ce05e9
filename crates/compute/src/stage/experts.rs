//! A mixture of experts in terms of operators: tokens are routed, copied in the order of their
//! experts, worked on by each expert, weighted and added up. No token is dropped: an expert gets as
//! many rows as chose it.

use model::{Block, Experts, Role, Scoring, Segment};
use program::Value;

use super::Stage;
use super::routing::Routing;
use super::segments::take;
use crate::operators::{Operators, ProductDims, Window, WindowMut};

impl<O: Operators> Stage<O> {
    pub(super) fn experts_forward(&mut self, segment: Segment, layer: u32, mb: u32) {
        match segment {
            Segment::Route => self.route(layer, mb),
            Segment::Dispatch => self.dispatch(layer, mb),
            Segment::Experts => self.work_of_experts(layer, mb),
            Segment::Combine => self.combine(layer, mb),
            other => unreachable!("{other} is no segment of a mixture of experts"),
        }
    }

    pub(super) fn experts_backward(&mut self, segment: Segment, layer: u32, mb: u32) {
        match segment {
            Segment::Route => self.route_backward(layer, mb),
            Segment::Dispatch => self.dispatch_backward(layer, mb),
            Segment::Experts => self.experts_gradients(layer, mb),
            Segment::Combine => self.combine_backward(layer, mb),
            other => unreachable!("{other} is no segment of a mixture of experts"),
        }
    }

    fn experts(&self) -> Experts {
        self.config.experts.expect("only a mixture of experts has these segments")
    }

    fn router_dims(&self) -> ProductDims {
        let (k, n) = (self.config.hidden as usize, self.experts().count as usize);
        ProductDims { r: self.program.tokens(), k, n }
    }

    // Forward.

    fn route(&mut self, layer: u32, mb: u32) {
        let (experts, block) = (self.experts(), Block::Layer(layer));
        let x = &self.values[&(mb, Value::FeedForwardNormed(layer))];
        let w = self.window(block, Role::Router);
        let scores = self.operators.product(x, w, self.router_dims());
        let biases = match experts.scoring {
            Scoring::Softmax => vec![],
            Scoring::Sigmoid => {
                let Window { flat, start } = self.window(block, Role::RouterBias);
                let biases = self.operators.slice(flat, start..start + experts.count as usize);
                self.operators.download(biases)
            }
        };
        let routing = Routing::new(&experts, &self.operators.download(scores), &biases);
        let weights = self.operators.upload(routing.weights(&experts));
        self.values.insert((mb, Value::Routes(layer)), weights);
        self.routings.insert((mb, layer), routing);
    }

    fn tokens_of_copies(&self, layer: u32, mb: u32) -> Vec<u32> {
        self.routings[&(mb, layer)].tokens(self.experts().per_token)
    }

    fn dispatch(&mut self, layer: u32, mb: u32) {
        let tokens = self.tokens_of_copies(layer, mb);
        let x = Window { flat: &self.values[&(mb, Value::FeedForwardNormed(layer))], start: 0 };
        let copies = self.operators.embedding(&tokens, x, self.config.hidden as usize);
        self.values.insert((mb, Value::Dispatched(layer)), copies);
    }

    /// The rows of each expert, and the sizes of its products: up with the gate, and down.
    fn expert_dims(&self, layer: u32, mb: u32) -> (Vec<usize>, [ProductDims; 2]) {
        let loads = &self.routings[&(mb, layer)].loads;
        let rows: Vec<usize> = loads.iter().map(|load| *load as usize).collect();
        let (r, hidden) = (rows.iter().sum(), self.config.hidden as usize);
        let width = self.experts().width as usize;
        let (up, down) =
            (ProductDims { r, k: hidden, n: 2 * width }, ProductDims { r, k: width, n: hidden });
        (rows, [up, down])
    }

    fn work_of_experts(&mut self, layer: u32, mb: u32) {
        let (rows, [up, down]) = self.expert_dims(layer, mb);
        let block = Block::Experts(layer);
        let x = &self.values[&(mb, Value::Dispatched(layer))];
        let w = self.window(block, Role::ExpertsUp);
        let gate_up = self.operators.grouped_product(x, w, up, &rows);
        let inner = self.operators.swiglu(&gate_up, down.k);
        let w = self.window(block, Role::ExpertsDown);
        let expertise = self.operators.grouped_product(&inner, w, down, &rows);
        self.values.insert((mb, Value::Expertise(layer)), expertise);
        self.saved.insert((mb, Value::Expertise(layer)), gate_up);
    }

    fn combine(&mut self, layer: u32, mb: u32) {
        let (tokens, width) = (self.tokens_of_copies(layer, mb), self.config.hidden as usize);
        let expertise = &self.values[&(mb, Value::Expertise(layer))];
        let weights = &self.values[&(mb, Value::Routes(layer))];
        let weighted = self.operators.scale_rows(expertise, weights, width);
        let shared = self.values.remove(&(mb, Value::SharedDelta(layer)));
        let sum = self.added_up(&weighted, &tokens, shared);
        self.values.insert((mb, Value::FeedForwardDelta(layer)), sum);
    }

    /// The rows of copies, each added to that of its token.
    fn added_up(&self, copies: &O::Tensor, tokens: &[u32], into: Option<O::Tensor>) -> O::Tensor {
        let width = self.config.hidden as usize;
        let elements = self.program.tokens() * width;
        let mut sum = into.unwrap_or_else(|| self.operators.zeros(elements));
        let window = WindowMut { flat: &mut sum, start: 0, fresh: false };
        self.operators.embedding_backward(copies, tokens, width, window);
        self.operators.cast(&sum)
    }

    // Backward.

    fn combine_backward(&mut self, layer: u32, mb: u32) {
        let (tokens, width) = (self.tokens_of_copies(layer, mb), self.config.hidden as usize);
        let dy = take(&mut self.gradients, (mb, Value::FeedForwardDelta(layer)));
        let copies = self.operators.embedding(&tokens, Window { flat: &dy, start: 0 }, width);
        let expertise = take(&mut self.values, (mb, Value::Expertise(layer)));
        let dweights = self.operators.row_dots(&copies, &expertise, width);
        self.gradients.insert((mb, Value::Routes(layer)), dweights);
        let weights = &self.values[&(mb, Value::Routes(layer))];
        let dexpertise = self.operators.scale_rows(&copies, weights, width);
        self.gradients.insert((mb, Value::Expertise(layer)), dexpertise);
        if self.experts().shared_width > 0 {
            self.gradients.insert((mb, Value::SharedDelta(layer)), dy);
        }
    }

    fn experts_gradients(&mut self, layer: u32, mb: u32) {
        let (rows, [up, down]) = self.expert_dims(layer, mb);
        let block = Block::Experts(layer);
        let dy = take(&mut self.gradients, (mb, Value::Expertise(layer)));
        let gate_up = take(&mut self.saved, (mb, Value::Expertise(layer)));
        let w = self.window(block, Role::ExpertsDown);
        let dinner = self.operators.grouped_product_input_gradient(&dy, w, down, &rows);
        let inner = self.operators.swiglu(&gate_up, down.k);
        let (operators, dw) = self.gradient(block, Role::ExpertsDown);
        operators.grouped_product_weight_gradient(&dy, &inner, down, &rows, dw);
        let dgate_up = self.operators.swiglu_backward(&dinner, &gate_up, down.k);
        let w = self.window(block, Role::ExpertsUp);
        let dx = self.operators.grouped_product_input_gradient(&dgate_up, w, up, &rows);
        let x = take(&mut self.values, (mb, Value::Dispatched(layer)));
        let (operators, dw) = self.gradient(block, Role::ExpertsUp);
        operators.grouped_product_weight_gradient(&dgate_up, &x, up, &rows, dw);
        self.gradients.insert((mb, Value::Dispatched(layer)), dx);
    }

    fn dispatch_backward(&mut self, layer: u32, mb: u32) {
        let tokens = self.tokens_of_copies(layer, mb);
        let copies = take(&mut self.gradients, (mb, Value::Dispatched(layer)));
        // The shared experts have left the gradient of their input already.
        let input = (mb, Value::FeedForwardNormed(layer));
        let before = self.gradients.remove(&input);
        let dx = self.added_up(&copies, &tokens, before);
        self.gradients.insert(input, dx);
    }

    fn route_backward(&mut self, layer: u32, mb: u32) {
        let (experts, block, dims) = (self.experts(), Block::Layer(layer), self.router_dims());
        let weights = take(&mut self.gradients, (mb, Value::Routes(layer)));
        self.values.remove(&(mb, Value::Routes(layer)));
        let routing = take(&mut self.routings, (mb, layer));
        let scores = routing.scores_gradient(&experts, &self.operators.download(weights));
        let dy = self.operators.upload(scores);
        let w = self.window(block, Role::Router);
        let dx = self.operators.product_input_gradient(&dy, w, dims);
        let input = (mb, Value::FeedForwardNormed(layer));
        let before = self.gradients.get_mut(&input);
        let before = before.expect("the verifier has seen the copies' gradients written");
        self.operators.add(before, &dx);
        let x = take(&mut self.values, input);
        let (operators, dw) = self.gradient(block, Role::Router);
        operators.product_weight_gradient(&dy, &x, dims, dw);
        if experts.scoring == Scoring::Sigmoid {
            self.count_loads(layer, &routing);
        }
    }

    /// What stands in the place of the biases' gradient is what moves them: the loads of the experts,
    /// added up over tokens, microbatches and ranks as every gradient is.
    fn count_loads(&mut self, layer: u32, routing: &Routing) {
        let loads: Vec<f32> = routing.loads.iter().map(|load| *load as f32).collect();
        let dims = ProductDims { r: 1, k: 1, n: loads.len() };
        let (operators, window) = self.gradient(Block::Layer(layer), Role::RouterBias);
        let (loads, once) = (operators.upload(loads), operators.upload(vec![1.0]));
        operators.product_weight_gradient(&loads, &once, dims, window);
    }
}
