//! How much of a microbatch one rank sees.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// How attention is carried out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AttentionKernel {
    /// In one pass over tiles, so that scores never reach memory (`FlashAttention`).
    #[default]
    Flash,
    /// Product, softmax, product, with all scores in memory and the causal half not spared.
    Unfused,
}

/// The size of one microbatch and the degrees of the axes that split it and the products it goes
/// through. With every degree 1 it is the work of one rank alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Shape {
    /// Sequences in a microbatch.
    pub sequences: u64,
    /// Tokens in a sequence.
    pub sequence: u64,
    /// Ranks that split each product.
    pub tensor: u64,
    /// Ranks that split each sequence.
    pub context: u64,
    /// Ranks that split the experts of a layer.
    pub expert: u64,
    /// Ranks that split each expert's products: 1, or as many as `tensor`.
    pub expert_tensor: u64,
    /// Whether the tensor-parallel ranks also split the sequence between products.
    pub sequence_parallel: bool,
    /// How attention is carried out.
    pub attention: AttentionKernel,
    /// Into how many pieces along the sequence a segment is cut, so that transfers of one piece
    /// hide behind the work on another; the work described is that of one piece.
    pub pieces: u64,
}

impl Shape {
    /// A microbatch on one rank alone.
    #[must_use]
    pub fn whole(sequences: u64, sequence: u64) -> Self {
        Self {
            sequences,
            sequence,
            tensor: 1,
            context: 1,
            expert: 1,
            expert_tensor: 1,
            sequence_parallel: false,
            attention: AttentionKernel::Flash,
            pieces: 1,
        }
    }

    /// Tokens in a microbatch, over all ranks that share it.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.sequences * self.sequence
    }

    /// Tokens that enter a rank's products.
    #[must_use]
    pub fn product_tokens(&self) -> u64 {
        (self.sequences * self.sequence.div_ceil(self.context)).div_ceil(self.pieces)
    }

    /// Tokens of the residual stream that a rank holds.
    #[must_use]
    pub fn stream_tokens(&self) -> u64 {
        if self.sequence_parallel {
            self.product_tokens().div_ceil(self.tensor)
        } else {
            self.product_tokens()
        }
    }

    /// The tokens of each sequence that the rank at `place` along the context axis works on, in its
    /// order: an early part and a late one, so that all ranks have the same share of the pairs of
    /// query and key.
    #[must_use]
    pub fn token_ranges(&self, place: u64) -> [Range<u64>; 2] {
        let parts = 2 * self.context;
        let border = |index: u64| index * self.sequence / parts;
        [place, parts - 1 - place].map(|index| border(index)..border(index + 1))
    }

    /// Rows that a rank's experts work on when the router is balanced: every copy of a token that
    /// its group sends, gathered from the ranks that split each expert.
    #[must_use]
    pub fn expert_rows(&self, per_token: u64) -> u64 {
        self.stream_tokens() * per_token * self.expert_tensor
    }
}
