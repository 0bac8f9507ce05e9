//! The parameters of a model, in blocks that are gathered, reduced and updated together.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::Config;

/// Parameters that live in one flat buffer: the unit of sharding, gathering and reduction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Block {
    /// The word embedding; also the output head when the two are tied.
    Embedding,
    /// One transformer layer.
    Layer(u32),
    /// The final norm and, when it is not tied, the output head.
    Head,
}

/// What a parameter is for, within its block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Word embedding, `[vocabulary, hidden]`.
    Embedding,
    /// Scale of the norm before attention, `[hidden]`.
    AttentionNorm,
    /// Query, key and value projections; three parameters, adjacent, `[qkv_width, hidden]`.
    Query,
    /// See [`Role::Query`].
    Key,
    /// See [`Role::Query`].
    Value,
    /// Attention output projection, `[hidden, query_width]`.
    Output,
    /// Scale of the norm before the feed-forward block, `[hidden]`.
    FeedForwardNorm,
    /// Gate and up projections; two parameters, adjacent, `[2 feed_forward, hidden]`.
    Gate,
    /// See [`Role::Gate`].
    Up,
    /// Down projection, `[hidden, feed_forward]`.
    Down,
    /// Scale of the norm before the head, `[hidden]`.
    FinalNorm,
    /// Output head, `[vocabulary, hidden]`; absent when tied to the embedding.
    Head,
}

/// One named parameter inside its block's flat buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// What it is for.
    pub role: Role,
    /// Its name in a Hugging Face checkpoint.
    pub name: String,
    /// Its shape there, row-major.
    pub shape: Vec<u64>,
    /// First element within the block's flat buffer.
    pub offset: u64,
}

impl Parameter {
    /// Number of elements.
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// The elements it occupies in the block's flat buffer.
    #[must_use]
    pub fn range(&self) -> std::ops::Range<usize> {
        self.offset as usize..(self.offset + self.elements()) as usize
    }

    /// Whether weight decay applies: to matrices, not to the scales of norms.
    #[must_use]
    pub fn decays(&self) -> bool {
        self.shape.len() > 1
    }
}

impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedding => write!(f, "embedding"),
            Self::Layer(layer) => write!(f, "layer{layer}"),
            Self::Head => write!(f, "head"),
        }
    }
}

impl Config {
    /// Every block, in the order the forward pass meets them.
    pub fn blocks(&self) -> impl Iterator<Item = Block> + use<> {
        std::iter::once(Block::Embedding)
            .chain((0..self.layers).map(Block::Layer))
            .chain(std::iter::once(Block::Head))
    }

    /// The parameters of `block`, in the order of its flat buffer.
    #[must_use]
    pub fn parameters(&self, block: Block) -> Vec<Parameter> {
        let mut offset = 0;
        self.roles(block)
            .into_iter()
            .map(|(role, name, shape)| {
                let parameter = Parameter { role, name: block.prefix() + name, shape, offset };
                offset += parameter.elements();
                parameter
            })
            .collect()
    }

    /// Elements in the flat buffer of `block`.
    #[must_use]
    pub fn block_elements(&self, block: Block) -> u64 {
        self.parameters(block).iter().map(Parameter::elements).sum()
    }

    /// Parameters of the whole model.
    #[must_use]
    pub fn parameter_count(&self) -> u64 {
        let layer = self.block_elements(Block::Layer(0));
        self.block_elements(Block::Embedding)
            + u64::from(self.layers) * layer
            + self.block_elements(Block::Head)
    }

    fn roles(&self, block: Block) -> Vec<(Role, &'static str, Vec<u64>)> {
        let (hidden, inner, words) = (self.hidden, self.feed_forward, self.vocabulary);
        match block {
            Block::Embedding => {
                vec![(Role::Embedding, "embed_tokens.weight", vec![words, hidden])]
            }
            Block::Layer(_) => vec![
                (Role::AttentionNorm, "input_layernorm.weight", vec![hidden]),
                (Role::Query, "self_attn.q_proj.weight", vec![self.query_width(), hidden]),
                (Role::Key, "self_attn.k_proj.weight", vec![self.kv_width(), hidden]),
                (Role::Value, "self_attn.v_proj.weight", vec![self.kv_width(), hidden]),
                (Role::Output, "self_attn.o_proj.weight", vec![hidden, self.query_width()]),
                (Role::FeedForwardNorm, "post_attention_layernorm.weight", vec![hidden]),
                (Role::Gate, "mlp.gate_proj.weight", vec![inner, hidden]),
                (Role::Up, "mlp.up_proj.weight", vec![inner, hidden]),
                (Role::Down, "mlp.down_proj.weight", vec![hidden, inner]),
            ],
            Block::Head if self.tied_embeddings => {
                vec![(Role::FinalNorm, "model.norm.weight", vec![hidden])]
            }
            Block::Head => vec![
                (Role::FinalNorm, "model.norm.weight", vec![hidden]),
                (Role::Head, "lm_head.weight", vec![words, hidden]),
            ],
        }
    }
}

impl Block {
    fn prefix(self) -> String {
        match self {
            Self::Embedding => "model.".to_owned(),
            Self::Layer(layer) => format!("model.layers.{layer}."),
            Self::Head => String::new(),
        }
    }
}
