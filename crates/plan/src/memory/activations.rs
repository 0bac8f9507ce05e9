//! What forward keeps for backward of each segment of a layer, and what backward needs beyond it.
//!
//! Every term is the bytes of one microbatch on one rank. With sequence parallelism the residual
//! stream is split as products are; `sbh` below are the elements of the whole stream.

use model::{Activation, AttentionKernel, Experts, LatentAttention, Positions, Segment};

use super::{Chunk, Place};
use crate::{ContextExchange, Recompute};

/// Bytes of a statistic in fp32: a row's of `FlashAttention`, a token's of a router.
const STATISTIC: u64 = 4;
/// Bytes of a dropout mask's element.
const MASK: u64 = 1;

pub(super) struct Activations<'a> {
    place: &'a Place<'a>,
    /// What one microbatch keeps of a dense layer.
    dense: u64,
    /// What one microbatch keeps of a layer with experts.
    sparse: u64,
}

/// What the head adds to the peak, if the peak is there.
pub(super) struct Head {
    pub(super) kept: u64,
    pub(super) logits: u64,
    pub(super) working: u64,
}

impl<'a> Activations<'a> {
    pub(super) fn new(place: &'a Place<'a>) -> Self {
        let mut activations = Self { place, dense: 0, sparse: 0 };
        let spared = |whole: u64| match &place.layout.recompute {
            _ if place.options.every_other_product => activations.every_other_product(),
            Recompute::None | Recompute::Layers(_) => whole,
            Recompute::Selective => whole - activations.inside_attention(),
            Recompute::Full => activations.stream(),
            Recompute::Segments(again) => {
                whole - again.iter().map(|segment| activations.spared(*segment)).sum::<u64>()
            }
        };
        let [dense, sparse] = [false, true].map(|experts| spared(activations.layer(experts)));
        (activations.dense, activations.sparse) = (dense, sparse);
        activations
    }

    /// What one microbatch keeps in a run of layers.
    pub(super) fn kept(&self, chunk: &Chunk) -> u64 {
        // The leading layers are the dense ones.
        let from_input = match &self.place.layout.recompute {
            Recompute::Layers(count) => (*count).min(chunk.layers()),
            _ => 0,
        };
        let few = chunk.dense.saturating_sub(from_input);
        let many = chunk.layers() - from_input - few;
        let [from_input, few, many] = [from_input, few, many].map(u64::from);
        let embedding = if chunk.embedding { self.segment(Segment::Embed) } else { 0 };
        embedding + from_input * self.stream() + few * self.dense + many * self.sparse
    }

    /// What is kept of a layer of which nothing is computed again.
    fn layer(&self, experts: bool) -> u64 {
        let block: &[Segment] = if experts {
            &[Segment::Route, Segment::SharedExperts, Segment::Experts]
        } else {
            &[Segment::FeedForward]
        };
        let both = [
            Segment::AttentionNorm,
            Segment::Qkv,
            Segment::Attend,
            Segment::Project,
            Segment::AttentionAdd,
            Segment::FeedForwardNorm,
            Segment::FeedForwardAdd,
        ];
        both.iter().chain(block).map(|segment| self.segment(*segment)).sum()
    }

    /// What is kept of a segment: the terms of Korthikanti et al. 2022 (arXiv:2205.05198), section
    /// 4.1, and their like for what came later.
    fn segment(&self, segment: Segment) -> u64 {
        let experts = self.config().experts;
        match segment {
            // Its input.
            Segment::AttentionNorm | Segment::FeedForwardNorm | Segment::FinalNorm => self.stream(),
            Segment::Qkv => self.column_input() + self.latent(),
            Segment::Attend | Segment::AttendWindow => {
                self.query_key_value() + self.inside_attention()
            }
            Segment::Project => self.attention_output(),
            Segment::Embed | Segment::AttentionAdd | Segment::FeedForwardAdd => self.mask(),
            Segment::FeedForward => {
                let width = self.config().feed_forward.div_ceil(self.place.shape.tensor);
                self.column_input() + self.feed_forward(self.tokens(), width)
            }
            // The norm's output, which shared experts and dispatch read as well, and the scores.
            Segment::Route => {
                let scores = experts.map_or(0, |experts| experts.count);
                self.column_input() + self.stream_tokens() * scores * STATISTIC
            }
            Segment::SharedExperts => {
                let width = experts.map_or(0, |experts| experts.shared_width);
                self.feed_forward(self.tokens(), width.div_ceil(self.place.shape.tensor))
            }
            Segment::Experts => experts.map_or(0, |experts| self.experts(experts)),
            Segment::Logits => self.column_input(),
            // A few bytes a token.
            Segment::LogSums => 0,
            // Where dispatched copies lie takes a few bytes a token. Combine keeps nothing where
            // the router's weights are applied before the down product.
            Segment::Dispatch | Segment::Combine => 0,
            // Both streams, before and after their norms.
            Segment::Merge => 4 * self.stream(),
            Segment::Loss => self.tokens() * self.place.words() * self.logit(),
        }
    }

    fn config(&self) -> &model::Config {
        self.place.footprint.config
    }

    fn tokens(&self) -> u64 {
        self.place.shape.product_tokens()
    }

    fn stream_tokens(&self) -> u64 {
        self.place.shape.stream_tokens()
    }

    /// Whether a rank holds only a part of the stream that its products read.
    fn splits_stream(&self) -> bool {
        self.stream_tokens() < self.tokens()
    }

    /// The residual stream, or a gradient of it.
    fn stream(&self) -> u64 {
        self.stream_tokens() * self.config().hidden * self.place.options.element()
    }

    /// The stream of all tokens that enter a product.
    fn gathered_stream(&self) -> u64 {
        self.tokens() * self.config().hidden * self.place.options.element()
    }

    /// The input of a product whose outputs are split: gathered before it, and again for backward
    /// unless the program keeps it so.
    fn column_input(&self) -> u64 {
        let gathered = self.place.options.software.gathered_inputs;
        let tokens = if gathered { self.tokens() } else { self.stream_tokens() };
        self.place.options.operands(tokens * self.config().hidden)
    }

    fn mask(&self) -> u64 {
        let masked = self.config().dropout;
        if masked { self.stream_tokens() * self.config().hidden * MASK } else { 0 }
    }

    /// Latent attention's narrow vectors, before and after their norms.
    fn latent(&self) -> u64 {
        let Some(LatentAttention { query_rank, kv_rank, rope_dim, .. }) =
            self.config().latent_attention
        else {
            return 0;
        };
        let width = 2 * query_rank.unwrap_or(0) + 3 * kv_rank + rope_dim;
        self.tokens() * width * self.place.options.element()
    }

    /// Queries, keys and values as attention reads them.
    fn query_key_value(&self) -> u64 {
        let (heads, kv_heads) = self.config().rank_heads(&self.place.shape);
        let (key, value) = self.config().head_dims();
        let rotary = self.config().positions == Positions::Rotary;
        let apart = rotary && !self.place.options.software.fused_rotary;
        let rotated = if apart { (heads + kv_heads) * key } else { 0 };
        let width = heads * key + kv_heads * (key + value) + rotated;
        self.tokens() * width * self.place.options.element()
    }

    fn output_elements(&self) -> u64 {
        let heads = self.config().rank_heads(&self.place.shape).0;
        self.tokens() * heads * self.config().head_dims().1
    }

    /// What attention keeps besides queries, keys and values.
    fn inside_attention(&self) -> u64 {
        let heads = self.config().rank_heads(&self.place.shape).0;
        match self.place.shape.attention {
            AttentionKernel::Flash => {
                // The output is what the next product keeps, unless that is another tensor.
                let shared = !self.exchanges_heads() && !self.place.options.rounds_operands();
                let element = self.place.options.element();
                let own = if shared { 0 } else { self.output_elements() * element };
                own + self.tokens() * heads * STATISTIC
            }
            AttentionKernel::Unfused => {
                // Softmax, its dropout's mask and what that leaves: 2 + 1 + 2 bytes a pair.
                let element = self.place.options.element();
                let dropout = if self.config().dropout { MASK + element } else { 0 };
                self.pairs() * (element + dropout)
            }
        }
    }

    /// Pairs of query and key over all heads of the rank.
    fn pairs(&self) -> u64 {
        let heads = self.config().rank_heads(&self.place.shape).0;
        heads * self.tokens() * self.place.shape.sequence
    }

    fn exchanges_heads(&self) -> bool {
        self.place.shape.context > 1 && self.place.options.exchanges_heads
    }

    /// What need not be kept where `segment` is computed again: what lies inside it, its input
    /// being an output of another.
    fn spared(&self, segment: Segment) -> u64 {
        let width = self.config().feed_forward.div_ceil(self.place.shape.tensor);
        match segment {
            Segment::Attend | Segment::AttendWindow => self.inside_attention(),
            Segment::FeedForward => self.feed_forward(self.tokens(), width),
            Segment::SharedExperts => self.segment(segment),
            _ => 0,
        }
    }

    fn attention_output(&self) -> u64 {
        self.place.options.operands(self.output_elements())
    }

    /// The inputs of activation and down product, for so many tokens.
    fn feed_forward(&self, tokens: u64, width: u64) -> u64 {
        let options = self.place.options;
        let activation = self.config().activation;
        let gate_alone = activation == Activation::SwiGlu && !options.software.fused_activation;
        // silu(gate), where gate and up are multiplied apart.
        let between = if gate_alone { options.element() } else { 0 };
        let inputs = activation.inputs() * options.element();
        tokens * width * (inputs + between) + options.operands(tokens * width)
    }

    fn expert_rows(&self, experts: Experts) -> u64 {
        self.place.shape.expert_rows(experts.per_token)
    }

    /// Copies of the tokens in the order of their experts, and what the experts make of them.
    fn experts(&self, experts: Experts) -> u64 {
        let rows = self.expert_rows(experts);
        let width = experts.width.div_ceil(self.place.shape.expert_tensor);
        self.place.options.operands(rows * self.config().hidden) + self.feed_forward(rows, width)
    }

    /// What torchtitan's option `op` keeps: the layer's input, attention's output and statistics,
    /// and of the seven products every other one's output: query, value, gate and down
    /// (torchtitan/parallelisms/parallelize_llama.py, 2024-12).
    fn every_other_product(&self) -> u64 {
        let config = self.config();
        let (heads, kv_heads) = config.rank_heads(&self.place.shape);
        let (key, value) = config.head_dims();
        let feed_forward = config.feed_forward.div_ceil(self.place.shape.tensor);
        let width = heads * (key + value) + kv_heads * value + feed_forward;
        let element = self.place.options.element();
        self.tokens() * (width * element + heads * STATISTIC) + 2 * self.stream()
    }

    /// Bytes of one logit at the worst moment of the loss.
    fn logit(&self) -> u64 {
        let options = self.place.options;
        if options.fused_loss { options.element() } else { options.software.logit }
    }

    /// What is alive when backward begins at the head: inputs of norm and product kept, logits, and
    /// the gradients of both inputs; with sequence parallelism the product's input and its gradient
    /// are whole for a moment.
    pub(super) fn head(&self) -> Head {
        let own = [Segment::FinalNorm, Segment::Logits].map(|segment| self.segment(segment));
        let regathered = self.splits_stream() && !self.place.options.software.gathered_inputs;
        let whole = self.gathered_stream() * if regathered { 2 } else { 1 };
        let predictions = u64::from(self.config().prediction_layers);
        let heads = 1 + predictions;
        Head {
            kept: heads * own.into_iter().sum::<u64>() + predictions * self.segment(Segment::Merge),
            logits: heads * self.segment(Segment::Loss),
            working: whole + self.stream(),
        }
    }

    /// What backward through the last layer needs beyond what was kept.
    pub(super) fn layer_working(&self, chunks: &[Chunk]) -> u64 {
        let sparse = chunks.iter().any(|chunk| chunk.sparse > 0);
        let block = match self.config().experts.filter(|_| sparse) {
            Some(experts) => self.experts_working(experts),
            None => self.feed_forward_working(),
        };
        let layer = match &self.place.layout.recompute {
            _ if self.place.options.every_other_product => {
                self.layer(sparse).saturating_sub(self.every_other_product())
            }
            Recompute::None => 0,
            Recompute::Selective => self.inside_attention(),
            Recompute::Full | Recompute::Layers(_) => self.layer(sparse) - self.stream(),
            Recompute::Segments(again) => again.iter().map(|segment| self.spared(*segment)).sum(),
        };
        layer + self.stream() + block.max(self.attention_working())
    }

    /// The gradient of the activation's inputs; with sequence parallelism the products' input and
    /// its gradient whole.
    fn feed_forward_working(&self) -> u64 {
        let width = self.config().feed_forward.div_ceil(self.place.shape.tensor);
        let element = self.place.options.element();
        let inputs = self.tokens() * self.config().activation.inputs() * width * element;
        inputs + if self.splits_stream() { 2 * self.gathered_stream() } else { 0 }
    }

    /// Gradients of the permuted tokens before and after a permutation, and of the activation,
    /// which is weighted by the router in fp32 and thus takes 14 bytes an element. Found on
    /// SimuMax's B200 rows of DeepSeek-V2 and V3 (v1.2, 2026-05-01).
    fn experts_working(&self, experts: Experts) -> u64 {
        let rows = self.expert_rows(experts);
        let width = experts.width.div_ceil(self.place.shape.expert_tensor);
        let permuted = self.config().hidden * self.place.options.element();
        rows * (2 * permuted + 14 * width)
    }

    /// Gradients of queries, keys, values and output; unfused the scores' as well, and gathered
    /// keys and values with their gradients.
    fn attention_working(&self) -> u64 {
        let element = self.place.options.element();
        let scores = match self.place.shape.attention {
            AttentionKernel::Flash => 0,
            AttentionKernel::Unfused => self.pairs() * element,
        };
        let (_, kv_heads) = self.config().rank_heads(&self.place.shape);
        let (key, value) = self.config().head_dims();
        let others = match self.place.layout.context_exchange {
            _ if self.place.options.exchanges_heads => 0,
            ContextExchange::AllGather => self.place.shape.context - 1,
            ContextExchange::Ring => (self.place.shape.context - 1).min(1),
        };
        let gathered = 2 * others * self.tokens() * kv_heads * (key + value) * element;
        self.query_key_value() + self.output_elements() * element + scores + gathered
    }
}
