//! Segments: the pieces of a layer that one instruction carries out.
//!
//! They are cut where an axis may need a collective between two of them: tensor parallelism
//! reduces after [`Segment::Project`] and [`Segment::FeedForward`], context parallelism exchanges
//! keys and values around [`Segment::Attend`], a vocabulary-parallel head combines partial
//! softmaxes between [`Segment::Logits`] and [`Segment::Loss`].

use std::fmt;

use serde::{Deserialize, Serialize};
use units::Flops;

use crate::{Block, Config, Operator};

/// A piece of the model small enough for a collective to stand on either side of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Segment {
    /// Words to residual stream.
    Embed,
    /// Norm before attention.
    AttentionNorm,
    /// Query, key and value products, and the rotary embedding.
    Qkv,
    /// Scores, softmax and weighted values.
    Attend,
    /// Attention output product.
    Project,
    /// Attention output onto the residual stream.
    AttentionAdd,
    /// Norm before the feed-forward block.
    FeedForwardNorm,
    /// Gate and up products, `SwiGLU`, down product.
    FeedForward,
    /// Feed-forward output onto the residual stream.
    FeedForwardAdd,
    /// Norm before the head.
    FinalNorm,
    /// Head product.
    Logits,
    /// Softmax cross-entropy and its gradient.
    Loss,
}

/// A direction through a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pass {
    /// Outputs from inputs.
    Forward,
    /// Gradients of inputs and of parameters from gradients of outputs.
    Backward,
    /// Gradients of inputs alone (zero-bubble schedules).
    BackwardInput,
    /// Gradients of parameters alone (zero-bubble schedules).
    BackwardWeight,
}

/// The size of the tensors one microbatch brings to a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Shape {
    /// Sequences in a microbatch.
    pub sequences: u64,
    /// Tokens in a sequence.
    pub sequence: u64,
}

impl Shape {
    /// Tokens in a microbatch.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.sequences * self.sequence
    }
}

impl Segment {
    /// The segments of a transformer layer, in forward order.
    pub const LAYER: [Self; 8] = [
        Self::AttentionNorm,
        Self::Qkv,
        Self::Attend,
        Self::Project,
        Self::AttentionAdd,
        Self::FeedForwardNorm,
        Self::FeedForward,
        Self::FeedForwardAdd,
    ];

    /// The segments after the last layer, in forward order.
    pub const HEAD: [Self; 3] = [Self::FinalNorm, Self::Logits, Self::Loss];

    /// The segments that `block` makes up, in forward order.
    #[must_use]
    pub fn of(block: Block) -> &'static [Self] {
        match block {
            Block::Embedding => &[Self::Embed],
            Block::Layer(_) => &Self::LAYER,
            Block::Head => &Self::HEAD,
        }
    }

    /// Its name in program text, reports and traces.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Embed => "embed",
            Self::AttentionNorm => "attention-norm",
            Self::Qkv => "qkv",
            Self::Attend => "attend",
            Self::Project => "project",
            Self::AttentionAdd => "attention-add",
            Self::FeedForwardNorm => "feed-forward-norm",
            Self::FeedForward => "feed-forward",
            Self::FeedForwardAdd => "feed-forward-add",
            Self::FinalNorm => "final-norm",
            Self::Logits => "logits",
            Self::Loss => "loss",
        }
    }
}

impl fmt::Display for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Pass {
    /// Its name in program text, reports and traces.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Backward => "backward",
            Self::BackwardInput => "backward-input",
            Self::BackwardWeight => "backward-weight",
        }
    }
}

impl fmt::Display for Pass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The products of a linear layer `[tokens, k] -> [tokens, n]` in one pass.
fn linear(pass: Pass, tokens: u64, n: u64, k: u64) -> Vec<Operator> {
    let forward = Operator::Product { m: tokens, n, k };
    let input = Operator::Product { m: tokens, n: k, k: n };
    let weight = Operator::Product { m: n, n: k, k: tokens };
    match pass {
        Pass::Forward => vec![forward],
        Pass::Backward => vec![input, weight],
        Pass::BackwardInput => vec![input],
        Pass::BackwardWeight => vec![weight],
    }
}

impl Config {
    /// The operators that `segment` carries out in `pass` on a microbatch of `shape`.
    #[must_use]
    pub fn operators(&self, segment: Segment, pass: Pass, shape: &Shape) -> Vec<Operator> {
        let rows = shape.tokens();
        let weight_only = pass == Pass::BackwardWeight;
        // What has no parameters has nothing to do in the weight half of a split backward.
        let unless_weight = |operator| if weight_only { vec![] } else { vec![operator] };
        match segment {
            Segment::Embed => vec![Operator::Embedding { rows, width: self.hidden }],
            Segment::AttentionNorm | Segment::FeedForwardNorm | Segment::FinalNorm => {
                unless_weight(Operator::RmsNorm { rows, width: self.hidden })
            }
            Segment::Qkv => {
                let mut operators = linear(pass, rows, self.qkv_width(), self.hidden);
                let width = self.query_width() + self.kv_width();
                operators.extend(unless_weight(Operator::Rotary { rows, width }));
                operators
            }
            Segment::Attend => unless_weight(Operator::Attention {
                sequences: shape.sequences,
                heads: self.heads,
                kv_heads: self.kv_heads,
                head_dim: self.head_dim,
                length: shape.sequence,
                products: if pass == Pass::Forward { 2 } else { 5 },
            }),
            Segment::Project => linear(pass, rows, self.hidden, self.query_width()),
            Segment::AttentionAdd | Segment::FeedForwardAdd => match pass {
                Pass::Forward => vec![Operator::Add { elements: rows * self.hidden }],
                _ => vec![], // the gradient of a sum is handed on as it is
            },
            Segment::FeedForward => {
                let mut operators = linear(pass, rows, 2 * self.feed_forward, self.hidden);
                operators
                    .extend(unless_weight(Operator::SwiGlu { rows, width: self.feed_forward }));
                operators.extend(linear(pass, rows, self.hidden, self.feed_forward));
                operators
            }
            Segment::Logits => linear(pass, rows, self.vocabulary, self.hidden),
            Segment::Loss => match pass {
                Pass::Forward => {
                    vec![Operator::CrossEntropy { rows, width: self.vocabulary }]
                }
                _ => vec![], // the forward pass leaves the gradient in place of the logits
            },
        }
    }

    /// FLOPs of the model for one token of a sequence of `sequence` tokens, forward and backward,
    /// nothing recomputed: three times the forward products and causal attention. The numerator
    /// of model FLOPs utilization.
    #[must_use]
    pub fn training_flops_per_token(&self, sequence: u64) -> Flops {
        let shape = Shape { sequences: 1, sequence };
        let forward: Flops = self
            .blocks()
            .flat_map(Segment::of)
            .flat_map(|segment| self.operators(*segment, Pass::Forward, &shape))
            .filter(|operator| {
                matches!(operator, Operator::Product { .. } | Operator::Attention { .. })
            })
            .map(|operator| operator.flops())
            .sum();
        Flops(3 * forward.0 / sequence)
    }
}
