//! Operators: the words in which work is counted, costed, carried out and timed.

use units::{Bytes, Flops};

/// One operator with its dimensions. Backward work is written in the same words: the two gradients
/// of a product are products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operator {
    /// `[m, k] x [k, n]`, each output a sum of `k` terms.
    Product {
        /// Rows of the output.
        m: u64,
        /// Columns of the output.
        n: u64,
        /// Terms of each sum.
        k: u64,
    },
    /// As many products of this size as there are groups.
    GroupedProduct {
        /// Independent products.
        groups: u64,
        /// Rows of each output.
        m: u64,
        /// Columns of each output.
        n: u64,
        /// Terms of each sum.
        k: u64,
    },
    /// Root-mean-square norm over rows, or its gradient.
    RmsNorm {
        /// Rows.
        rows: u64,
        /// Width of a row.
        width: u64,
    },
    /// Rotary position embedding of queries and keys, or its inverse.
    Rotary {
        /// Tokens.
        rows: u64,
        /// Width of queries and keys together.
        width: u64,
    },
    /// Norm over rows by mean and variance, or its gradient.
    LayerNorm {
        /// Rows.
        rows: u64,
        /// Width of a row.
        width: u64,
    },
    /// Softmax over rows, or its gradient.
    Softmax {
        /// Rows.
        rows: u64,
        /// Width of a row.
        width: u64,
    },
    /// Attention in one pass over tiles, scores never in memory.
    Attention {
        /// Sequences in the microbatch.
        sequences: u64,
        /// Query heads.
        heads: u64,
        /// Key and value heads.
        kv_heads: u64,
        /// Width of a head's query and key.
        head_dim: u64,
        /// Width of a head's value.
        value_dim: u64,
        /// Queries in a sequence.
        queries: u64,
        /// Keys in a sequence.
        keys: u64,
        /// Pairs of query and key in a sequence that are computed.
        pairs: u64,
        /// Products per pair of query and key: 2 forward, 5 backward (scores are recomputed).
        products: u64,
    },
    /// `silu(gate) * up`, or its gradient.
    SwiGlu {
        /// Tokens.
        rows: u64,
        /// Inner width.
        width: u64,
    },
    /// GELU, or its gradient.
    Gelu {
        /// Tokens.
        rows: u64,
        /// Inner width.
        width: u64,
    },
    /// `max(0, x)^2`, or its gradient.
    SquaredRelu {
        /// Tokens.
        rows: u64,
        /// Inner width.
        width: u64,
    },
    /// The best experts of each token from its scores, or the gradient of the scores.
    Route {
        /// Tokens.
        rows: u64,
        /// Experts to choose from.
        experts: u64,
    },
    /// Rows copied into another order, or added up from it.
    Permute {
        /// Rows read or written, whichever are more.
        rows: u64,
        /// Width of a row.
        width: u64,
    },
    /// Row gather from a table, or the scatter-add of its gradient.
    Embedding {
        /// Tokens.
        rows: u64,
        /// Width of a row.
        width: u64,
    },
    /// Softmax cross-entropy over the vocabulary, with its gradient.
    CrossEntropy {
        /// Tokens.
        rows: u64,
        /// Words in the vocabulary.
        width: u64,
    },
    /// Maximum and sum of exponentials of each row, without a gradient.
    LogSum {
        /// Rows.
        rows: u64,
        /// Width of a row.
        width: u64,
    },
    /// Elementwise sum of two tensors.
    Add {
        /// Elements.
        elements: u64,
    },
    /// Sum of squares, for the gradient norm.
    SquareSum {
        /// Elements.
        elements: u64,
    },
    /// `AdamW` update of fp32 master parameters.
    AdamW {
        /// Elements.
        elements: u64,
    },
}

impl Operator {
    /// Floating-point operations. Attention counts the pairs it computes.
    #[must_use]
    pub fn flops(&self) -> Flops {
        Flops(match *self {
            Self::Product { m, n, k } => 2 * m * n * k,
            Self::GroupedProduct { groups, m, n, k } => 2 * groups * m * n * k,
            Self::RmsNorm { rows, width } => 4 * rows * width,
            Self::LayerNorm { rows, width } => 7 * rows * width,
            Self::Softmax { rows, width } => 4 * rows * width,
            Self::Rotary { rows, width } => 3 * rows * width,
            Self::Attention { sequences, heads, pairs, .. } => {
                2 * sequences * heads * pairs * self.components()
            }
            Self::SwiGlu { rows, width } => 6 * rows * width,
            Self::Gelu { rows, width } => 8 * rows * width,
            Self::SquaredRelu { rows, width } => 2 * rows * width,
            Self::Route { rows, experts } => 6 * rows * experts,
            Self::Permute { rows, width } => rows * width,
            Self::Embedding { rows, width } => rows * width,
            Self::CrossEntropy { rows, width } => 6 * rows * width,
            Self::LogSum { rows, width } => 3 * rows * width,
            Self::Add { elements } => elements,
            Self::SquareSum { elements } => 2 * elements,
            Self::AdamW { elements } => 14 * elements,
        })
    }

    /// Least bytes moved to and from memory, each tensor once, at `element` bytes an element
    /// (the optimizer's state is always fp32).
    #[must_use]
    pub fn bytes(&self, element: Bytes) -> Bytes {
        let elements = match *self {
            Self::Product { m, n, k } => m * k + k * n + m * n,
            Self::GroupedProduct { groups, m, n, k } => groups * (m * k + k * n + m * n),
            Self::RmsNorm { rows, width } => 2 * rows * width + width,
            Self::LayerNorm { rows, width } => 2 * (rows * width + width),
            Self::Softmax { rows, width } => 2 * rows * width,
            Self::Rotary { rows, width } => 2 * rows * width,
            Self::Attention { sequences, heads, kv_heads, queries, keys, .. } => {
                sequences * (queries * heads + keys * kv_heads) * self.components()
            }
            Self::SwiGlu { rows, width } => 3 * rows * width,
            Self::Gelu { rows, width } | Self::SquaredRelu { rows, width } => 2 * rows * width,
            Self::Route { rows, experts } => 2 * rows * experts,
            Self::Permute { rows, width } => 2 * rows * width,
            Self::Embedding { rows, width } => 2 * rows * width,
            Self::CrossEntropy { rows, width } => 2 * rows * width,
            Self::LogSum { rows, width } => rows * width,
            Self::Add { elements } => 3 * elements,
            Self::SquareSum { elements } => elements,
            // Reads parameter, gradient and two moments; writes all but the gradient.
            Self::AdamW { elements } => return Bytes(7 * 4 * elements),
        };
        element * elements
    }

    /// Components of attention that all its products of one pair multiply: half of the products
    /// (and the odd one) are as wide as a key, the others as a value.
    fn components(&self) -> u64 {
        match *self {
            Self::Attention { head_dim, value_dim, products, .. } => {
                products.div_ceil(2) * head_dim + products / 2 * value_dim
            }
            _ => 0,
        }
    }
}
