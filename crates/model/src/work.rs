//! The work of a segment, as operators, and the FLOPs by which training is counted.

use serde::{Deserialize, Serialize};
use units::Flops;

use crate::{
    Activation, AttentionKernel, Config, Experts, LatentAttention, Norm, Operator, Pass, Positions,
    Segment, Shape,
};

/// Which pairs of query and key are counted as the model's work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Counting {
    /// Those that are needed: no key after its query, none before a sliding window.
    Causal,
    /// All, as Korthikanti et al. 2022 and `PaLM` count (model FLOPs of most published MFU).
    Full,
}

/// The products of a linear layer `[tokens, k] -> [tokens, n]` in one pass.
fn linear(pass: Pass, tokens: u64, n: u64, k: u64) -> Vec<Operator> {
    let forward = Operator::Product { m: tokens, n, k };
    let input = Operator::Product { m: tokens, n: k, k: n };
    let weight = Operator::Product { m: n, n: k, k: tokens };
    match pass {
        Pass::Forward | Pass::Recompute => vec![forward],
        Pass::Backward => vec![input, weight],
        Pass::BackwardInput => vec![input],
        Pass::BackwardWeight => vec![weight],
    }
}

/// As [`linear`], for as many layers as there are groups, `tokens` each.
fn grouped(pass: Pass, groups: u64, tokens: u64, n: u64, k: u64) -> Vec<Operator> {
    let group = |operator| match operator {
        Operator::Product { m, n, k } => Operator::GroupedProduct { groups, m, n, k },
        other => other,
    };
    linear(pass, tokens, n, k).into_iter().map(group).collect()
}

/// Whether the pass computes outputs from inputs.
fn outputs(pass: Pass) -> bool {
    matches!(pass, Pass::Forward | Pass::Recompute)
}

/// What has no parameters has nothing to do in the weight half of a split backward.
fn unless_weight(pass: Pass, operator: Operator) -> Vec<Operator> {
    if pass == Pass::BackwardWeight { vec![] } else { vec![operator] }
}

impl Config {
    /// The operators that `segment` carries out on one rank in `pass` on a microbatch of `shape`.
    #[must_use]
    pub fn operators(&self, segment: Segment, pass: Pass, shape: &Shape) -> Vec<Operator> {
        let (rows, stream) = (shape.product_tokens(), shape.stream_tokens());
        let (hidden, tensor) = (self.hidden, shape.tensor);
        match segment {
            Segment::Embed => self.embed(pass, rows),
            Segment::AttentionNorm | Segment::FeedForwardNorm | Segment::FinalNorm => {
                unless_weight(pass, self.norm_operator(stream, hidden))
            }
            Segment::Qkv => self.qkv(pass, shape),
            Segment::Attend => self.attention(pass, shape, None),
            Segment::AttendWindow => {
                self.attention(pass, shape, self.sliding_window.map(|window| window.length))
            }
            Segment::Project => {
                let width = self.rank_heads(shape).0 * self.head_dims().1;
                linear(pass, rows, hidden, width)
            }
            Segment::AttentionAdd | Segment::FeedForwardAdd if outputs(pass) => {
                vec![Operator::Add { elements: stream * hidden }]
            }
            // The gradient of a sum is handed on as it is.
            Segment::AttentionAdd | Segment::FeedForwardAdd => vec![],
            Segment::FeedForward => {
                self.feed_forward(pass, rows, self.feed_forward.div_ceil(tensor))
            }
            Segment::Route => self.route(pass, stream),
            Segment::Dispatch | Segment::Combine => self.permute(pass, stream),
            Segment::Experts => self.expert_products(pass, shape),
            Segment::SharedExperts => {
                let width = self.experts.map_or(0, |experts| experts.shared_width);
                self.feed_forward(pass, rows, width.div_ceil(tensor))
            }
            Segment::Merge => self.merge(pass, stream),
            Segment::Logits => linear(pass, rows, self.vocabulary.div_ceil(tensor), hidden),
            Segment::LogSums if outputs(pass) => {
                vec![Operator::LogSum { rows, width: self.vocabulary.div_ceil(tensor) }]
            }
            Segment::Loss if outputs(pass) => {
                vec![Operator::CrossEntropy { rows, width: self.vocabulary.div_ceil(tensor) }]
            }
            Segment::LogSums => vec![],
            Segment::Loss => vec![], // the forward pass leaves the gradient in place of the logits
        }
    }

    /// Query heads, and key and value heads, of one rank: where there are more ranks than key and
    /// value heads, several ranks hold the same one.
    #[must_use]
    pub fn rank_heads(&self, shape: &Shape) -> (u64, u64) {
        let kv_heads = if self.latent_attention.is_some() { self.heads } else { self.kv_heads };
        (self.heads.div_ceil(shape.tensor), kv_heads.div_ceil(shape.tensor))
    }

    fn norm_operator(&self, rows: u64, width: u64) -> Operator {
        match self.norm {
            Norm::Rms => Operator::RmsNorm { rows, width },
            Norm::Layer => Operator::LayerNorm { rows, width },
        }
    }

    /// Words, and positions where they have a table. Its gradient is one of parameters alone.
    fn embed(&self, pass: Pass, rows: u64) -> Vec<Operator> {
        let width = self.hidden;
        match (pass, self.positions) {
            (Pass::BackwardInput, _) => vec![],
            (_, Positions::Learned(_)) => {
                vec![Operator::Embedding { rows, width }, Operator::Embedding { rows, width }]
            }
            _ => vec![Operator::Embedding { rows, width }],
        }
    }

    fn qkv(&self, pass: Pass, shape: &Shape) -> Vec<Operator> {
        let rows = shape.product_tokens();
        let (heads, kv_heads) = self.rank_heads(shape);
        let mut operators = match self.latent_attention {
            Some(latent) => self.latent_products(pass, rows, heads, latent),
            None => linear(pass, rows, (heads + 2 * kv_heads) * self.head_dim, self.hidden),
        };
        if self.query_key_norm {
            let rows = rows * (heads + kv_heads);
            operators.extend(unless_weight(pass, self.norm_operator(rows, self.head_dim)));
        }
        if self.positions == Positions::Rotary {
            let width = match self.latent_attention {
                Some(latent) => (heads + 1) * latent.rope_dim,
                None => (heads + kv_heads) * self.head_dim,
            };
            operators.extend(unless_weight(pass, Operator::Rotary { rows, width }));
        }
        operators
    }

    /// Down to the narrow vectors, which every rank of a tensor group computes, and up to its
    /// heads.
    fn latent_products(
        &self,
        pass: Pass,
        rows: u64,
        heads: u64,
        latent: LatentAttention,
    ) -> Vec<Operator> {
        let LatentAttention { query_rank, kv_rank, nope_dim, rope_dim, value_dim } = latent;
        let query_width = heads * (nope_dim + rope_dim);
        let mut operators = match query_rank {
            Some(rank) => {
                let mut operators = linear(pass, rows, rank, self.hidden);
                operators.extend(unless_weight(pass, self.norm_operator(rows, rank)));
                operators.extend(linear(pass, rows, query_width, rank));
                operators
            }
            None => linear(pass, rows, query_width, self.hidden),
        };
        operators.extend(linear(pass, rows, kv_rank + rope_dim, self.hidden));
        operators.extend(unless_weight(pass, self.norm_operator(rows, kv_rank)));
        operators.extend(linear(pass, rows, heads * (nope_dim + value_dim), kv_rank));
        operators
    }

    fn attention(&self, pass: Pass, shape: &Shape, window: Option<u64>) -> Vec<Operator> {
        if pass == Pass::BackwardWeight {
            return vec![];
        }
        let (heads, kv_heads) = self.rank_heads(shape);
        let (head_dim, value_dim) = self.head_dims();
        let length = shape.sequence;
        let queries = length.div_ceil(shape.context);
        // In pieces, a rank meets the keys of one rank after the other.
        let keys = length.div_ceil(shape.pieces);
        if shape.attention == AttentionKernel::Unfused {
            let sizes = (shape.sequences * heads, queries, keys, head_dim, value_dim);
            return unfused_attention(pass, sizes);
        }
        vec![Operator::Attention {
            sequences: shape.sequences,
            heads,
            kv_heads,
            head_dim,
            value_dim,
            queries,
            keys,
            // Zigzag gives every rank, and every piece, the same share of the triangle.
            pairs: causal_pairs(length, window).div_ceil(shape.context * shape.pieces),
            products: if outputs(pass) { 2 } else { 5 },
        }]
    }

    fn feed_forward(&self, pass: Pass, rows: u64, width: u64) -> Vec<Operator> {
        let mut operators = linear(pass, rows, self.activation.inputs() * width, self.hidden);
        operators.extend(unless_weight(pass, self.activation.operator(rows, width)));
        operators.extend(linear(pass, rows, self.hidden, width));
        operators
    }

    fn route(&self, pass: Pass, rows: u64) -> Vec<Operator> {
        let experts = self.experts.map_or(0, |experts| experts.count);
        let mut operators = linear(pass, rows, experts, self.hidden);
        operators.extend(unless_weight(pass, Operator::Route { rows, experts }));
        operators
    }

    fn permute(&self, pass: Pass, rows: u64) -> Vec<Operator> {
        let per_token = self.experts.map_or(0, |experts| experts.per_token);
        unless_weight(pass, Operator::Permute { rows: rows * per_token, width: self.hidden })
    }

    /// The products of the experts that a rank holds, each on its equal share of the rows.
    fn expert_products(&self, pass: Pass, shape: &Shape) -> Vec<Operator> {
        let Some(Experts { count, per_token, width, .. }) = self.experts else {
            return vec![];
        };
        let groups = count.div_ceil(shape.expert);
        let rows = shape.expert_rows(per_token);
        let (each, width) = (rows.div_ceil(groups), width.div_ceil(shape.expert_tensor));
        let inputs = self.activation.inputs() * width;
        let mut operators = grouped(pass, groups, each, inputs, self.hidden);
        operators.extend(unless_weight(pass, self.activation.operator(rows, width)));
        operators.extend(grouped(pass, groups, each, self.hidden, width));
        operators
    }

    fn merge(&self, pass: Pass, rows: u64) -> Vec<Operator> {
        let width = self.hidden;
        let mut operators = unless_weight(pass, self.norm_operator(2 * rows, width));
        operators.extend(linear(pass, rows, width, 2 * width));
        operators
    }

    /// FLOPs of the model for one token of a sequence of `sequence` tokens, forward and backward,
    /// nothing recomputed: three times the forward products and attention. The numerator of model
    /// FLOPs utilization.
    #[must_use]
    pub fn training_flops_per_token(&self, sequence: u64, counting: Counting) -> Flops {
        let shape = Shape::whole(1, sequence);
        let forward: Flops = self
            .blocks()
            .flat_map(|block| self.segments(block))
            .flat_map(|segment| self.operators(segment, Pass::Forward, &shape))
            .map(|operator| operator.model_flops(counting))
            .sum();
        Flops(3 * forward.0 / sequence)
    }
}

impl Activation {
    fn operator(self, rows: u64, width: u64) -> Operator {
        match self {
            Self::SwiGlu => Operator::SwiGlu { rows, width },
            Self::Gelu => Operator::Gelu { rows, width },
            Self::SquaredRelu => Operator::SquaredRelu { rows, width },
        }
    }
}

impl Operator {
    /// FLOPs that count as the model's: those of products and attention.
    fn model_flops(&self, counting: Counting) -> Flops {
        match (*self, counting) {
            (Self::Product { .. } | Self::GroupedProduct { .. }, _) => self.flops(),
            (Self::Attention { .. }, Counting::Causal) => self.flops(),
            (Self::Attention { queries, keys, pairs, .. }, Counting::Full) => {
                Flops(self.flops().0 / pairs * queries * keys)
            }
            _ => Flops(0),
        }
    }
}

/// Pairs of a query and a key that it may see, itself included.
fn causal_pairs(length: u64, window: Option<u64>) -> u64 {
    let window = window.unwrap_or(length).min(length);
    window * (window + 1) / 2 + (length - window) * window
}

/// Scores, softmax and weighted values, one product after the other.
fn unfused_attention(
    pass: Pass,
    (groups, queries, keys, head_dim, value_dim): (u64, u64, u64, u64, u64),
) -> Vec<Operator> {
    let mut operators = grouped(pass, groups, queries, keys, head_dim);
    operators.push(Operator::Softmax { rows: groups * queries, width: keys });
    operators.extend(grouped(pass, groups, queries, value_dim, keys));
    operators
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue;
    use crate::{Block, SlidingWindow};

    /// Both sides of every identity below are sums over the segments of a layer and the head.
    fn forward_flops(config: &Config, shape: &Shape) -> u64 {
        let segments = config.blocks().flat_map(|block| config.segments(block));
        let operators = segments.flat_map(|s| config.operators(s, Pass::Forward, shape));
        operators.map(|operator| operator.model_flops(Counting::Causal).0).sum()
    }

    #[test]
    fn a_dense_model_costs_what_the_papers_say() {
        // Korthikanti et al. 2022, eq. 3 (without recomputation): 72 B L s h^2 (1 + s/6h + v/12hL).
        let gpt = catalogue::find("gpt-3-175b").unwrap();
        let (layers, hidden, words) =
            (f64::from(gpt.layers), gpt.hidden as f64, gpt.vocabulary as f64);
        let s = 2048.0;
        let expected = 72.0
            * layers
            * hidden
            * hidden
            * (1.0 + s / (6.0 * hidden) + words / (12.0 * hidden * layers));
        let counted = gpt.training_flops_per_token(2048, Counting::Full).as_f64();
        assert!((counted / expected - 1.0).abs() < 1e-12, "{counted} {expected}");
    }

    #[test]
    fn the_backward_halves_are_the_backward() {
        for name in ["tiny", "gpt-3-175b", "mixtral-8x7b", "deepseek-v3"] {
            let config = catalogue::find(name).unwrap();
            let shape = Shape { tensor: 2, sequence_parallel: true, ..Shape::whole(1, 64) };
            for segment in config.blocks().flat_map(|block| config.segments(block)) {
                let flops = |pass| -> u64 {
                    config.operators(segment, pass, &shape).iter().map(|o| o.flops().0).sum()
                };
                let halves = flops(Pass::BackwardInput) + flops(Pass::BackwardWeight);
                assert_eq!(flops(Pass::Backward), halves, "{name} {segment}");
                assert_eq!(flops(Pass::Forward), flops(Pass::Recompute), "{name} {segment}");
            }
        }
    }

    #[test]
    fn ranks_share_the_work_evenly() {
        for name in ["llama-3-8b", "mixtral-8x7b", "gpt-3-175b"] {
            let config = catalogue::find(name).unwrap();
            let whole = Shape::whole(1, 4096);
            for (tensor, context, expert) in [(2, 1, 1), (4, 2, 4), (8, 4, 8)] {
                let shape = Shape { tensor, context, expert, sequence_parallel: true, ..whole };
                let (one, all) = (forward_flops(config, &shape), forward_flops(config, &whole));
                let ratio = (one * tensor * context) as f64 / all as f64;
                // Causal pairs and the vocabulary do not divide exactly.
                assert!((1.0..1.0005).contains(&ratio), "{name} {shape:?}: {ratio}");
            }
        }
    }

    #[test]
    fn a_sliding_window_counts_the_pairs_it_sees() {
        for (length, window) in [(8, 3), (8, 8), (5, 1), (4, 9)] {
            let seen = |query: u64| (0..=query).filter(|key| query - key < window).count() as u64;
            assert_eq!(causal_pairs(length, Some(window)), (0..length).map(seen).sum::<u64>());
        }
        let window = SlidingWindow { length: 128, full_every: Some(2) };
        let config = Config {
            sliding_window: Some(window),
            ..catalogue::find("llama-3-8b").unwrap().clone()
        };
        let windowed =
            |layer| config.segments(Block::Layer(layer)).contains(&Segment::AttendWindow);
        assert_eq!([windowed(0), windowed(1)], [true, false]);
    }

    #[test]
    fn unfused_attention_computes_every_pair() {
        let config = catalogue::find("llama-3-8b").unwrap();
        let shape = Shape { attention: AttentionKernel::Unfused, ..Shape::whole(2, 64) };
        let flops = |pass| -> u64 {
            let operators = config.operators(Segment::Attend, pass, &shape);
            let products =
                operators.iter().filter(|o| matches!(o, Operator::GroupedProduct { .. }));
            products.map(|operator| operator.flops().0).sum()
        };
        assert_eq!(flops(Pass::Forward), 2 * 2 * 2 * 64 * 64 * config.hidden);
        assert_eq!(flops(Pass::Backward), 2 * flops(Pass::Forward));
    }
}
