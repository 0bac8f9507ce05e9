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
    /// Causal attention of every query on every key before it.
    Attention {
        /// Sequences in the microbatch.
        sequences: u64,
        /// Query heads.
        heads: u64,
        /// Key and value heads.
        kv_heads: u64,
        /// Width of a head.
        head_dim: u64,
        /// Queries, and keys, in a sequence.
        length: u64,
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
    /// Floating-point operations. Causal attention counts the pairs it computes, half of all.
    #[must_use]
    pub fn flops(&self) -> Flops {
        Flops(match *self {
            Self::Product { m, n, k } => 2 * m * n * k,
            Self::RmsNorm { rows, width } => 4 * rows * width,
            Self::Rotary { rows, width } => 3 * rows * width,
            Self::Attention { sequences, heads, head_dim, length, products, .. } => {
                // length (length + 1) / 2 pairs, 2 FLOPs a component.
                products * sequences * heads * head_dim * length * (length + 1)
            }
            Self::SwiGlu { rows, width } => 6 * rows * width,
            Self::Embedding { rows, width } => rows * width,
            Self::CrossEntropy { rows, width } => 6 * rows * width,
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
            Self::RmsNorm { rows, width } => 2 * rows * width + width,
            Self::Rotary { rows, width } => 2 * rows * width,
            Self::Attention { sequences, heads, kv_heads, head_dim, length, products } => {
                products * sequences * length * head_dim * (heads + kv_heads)
            }
            Self::SwiGlu { rows, width } => 3 * rows * width,
            Self::Embedding { rows, width } => 2 * rows * width,
            Self::CrossEntropy { rows, width } => 2 * rows * width,
            Self::Add { elements } => 3 * elements,
            Self::SquareSum { elements } => elements,
            // Reads parameter, gradient and two moments; writes all but the gradient.
            Self::AdamW { elements } => return Bytes(7 * 4 * elements),
        };
        element * elements
    }
}
