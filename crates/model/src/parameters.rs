//! The parameters of a model, in blocks that are gathered, reduced and updated together.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Activation, Config, Experts, LatentAttention, Norm, Place, Positions, Scoring, Shape};

/// Parameters that live in one flat buffer: the unit of sharding, gathering and reduction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Block {
    /// The word embedding; also the output head when the two are tied.
    Embedding,
    /// One transformer layer, but for its routed experts.
    Layer(u32),
    /// The routed experts of a layer. They are apart from the layer because other ranks share them.
    Experts(u32),
    /// A layer that predicts one token further, numbered from 0.
    Prediction(u32),
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
    /// Query, key and value projections; three parameters, adjacent, `[qkv_width, hidden]`. Of latent
    /// attention, those out of its narrow vectors; that of keys has the values' in it, head by head.
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
    /// See [`Role::Gate`]. Without a gate, the projection before the activation.
    Up,
    /// Down projection, `[hidden, feed_forward]`.
    Down,
    /// Scale of the norm before the head, `[hidden]`.
    FinalNorm,
    /// Output head, `[vocabulary, hidden]`; absent when tied to the embedding.
    Head,
    /// Position embedding, `[positions, hidden]`.
    Positions,
    /// Scale of the norm of each head's queries, `[head_dim]`.
    QueryNorm,
    /// Scale of the norm of each head's keys, `[head_dim]`.
    KeyNorm,
    /// Product into latent attention's narrow query vector, `[query_rank, hidden]`.
    QueryLatent,
    /// Scale of that vector's norm, `[query_rank]`.
    QueryLatentNorm,
    /// Product into latent attention's narrow key and value vector and the rotated part of keys,
    /// `[kv_rank + rope_dim, hidden]`.
    KeyLatent,
    /// Scale of the narrow key and value vector's norm, `[kv_rank]`.
    KeyLatentNorm,
    /// Scores of the experts, `[experts, hidden]`.
    Router,
    /// What is added to sigmoid scores before the choice, `[experts]`: no gradient moves it, but the
    /// loads of the experts do.
    RouterBias,
    /// Gate and up projections of the routed experts, `[experts, 2 width, hidden]`.
    ExpertsUp,
    /// Down projections of the routed experts, `[experts, hidden, width]`.
    ExpertsDown,
    /// Gate and up projections of the shared experts, `[2 shared_width, hidden]`.
    SharedUp,
    /// Down projection of the shared experts, `[hidden, shared_width]`.
    SharedDown,
    /// Norms of the stream and of the next word's embedding, and the projection of both,
    /// `[hidden, 2 hidden]`.
    Merge,
    /// The bias of a product or the shift of a layer norm.
    Bias,
}

/// Along what the ranks that share a block each hold a part of a parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Split {
    /// Every rank holds all of it.
    Whole,
    /// Tensor-parallel ranks split its first dimension: they split the product's outputs.
    Rows,
    /// As [`Split::Rows`], by key and value heads: where these are fewer than the ranks, several
    /// ranks hold the same head.
    KvHeads,
    /// Tensor-parallel ranks split its second dimension: they split the product's terms.
    Columns,
    /// Expert-parallel ranks split its first dimension, and the ranks that split each expert its
    /// second.
    ExpertRows,
    /// Expert-parallel ranks split its first dimension, and the ranks that split each expert its
    /// third.
    ExpertColumns,
}

/// One named parameter inside its block's flat buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// What it is for.
    pub role: Role,
    /// Its name in a Hugging Face checkpoint.
    pub name: String,
    /// Its shape there, row-major; where ranks split it, the shape of one rank's part.
    pub shape: Vec<u64>,
    /// Along what ranks split it.
    pub split: Split,
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

impl Split {
    /// The shape of one rank's part.
    fn part(self, config: &Config, shape: &Shape, mut dimensions: Vec<u64>) -> Vec<u64> {
        for cut in self.cuts(config, shape, Place::default()) {
            dimensions[cut.dimension] = dimensions[cut.dimension].div_ceil(cut.degree);
        }
        dimensions
    }
}

impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedding => write!(f, "embedding"),
            Self::Layer(layer) => write!(f, "layer{layer}"),
            Self::Experts(layer) => write!(f, "experts{layer}"),
            Self::Prediction(number) => write!(f, "prediction{number}"),
            Self::Head => write!(f, "head"),
        }
    }
}

/// A parameter before it has a place: role, name within its block, shape, split.
type Entry = (Role, String, Vec<u64>, Split);

/// A matrix, and its bias where products have one. A bias is as long as the matrix has rows.
fn matrix(role: Role, name: &str, shape: [u64; 2], split: Split, bias: bool) -> Vec<Entry> {
    let bias_split = if split == Split::Columns { Split::Whole } else { split };
    let mut entries = vec![(role, format!("{name}.weight"), shape.to_vec(), split)];
    entries.extend(bias.then(|| (Role::Bias, format!("{name}.bias"), vec![shape[0]], bias_split)));
    entries
}

impl Config {
    /// Every block, in the order the forward pass meets them.
    pub fn blocks(&self) -> impl Iterator<Item = Block> + use<> {
        let mut blocks = vec![Block::Embedding];
        for layer in 0..self.layers {
            blocks.push(Block::Layer(layer));
            blocks.extend(self.experts_of(layer).map(|_| Block::Experts(layer)));
        }
        blocks.push(Block::Head);
        for number in 0..self.prediction_layers {
            let layer = self.prediction_layer(number);
            blocks.push(Block::Prediction(number));
            blocks.extend(self.experts_of(layer).map(|_| Block::Experts(layer)));
        }
        blocks.into_iter()
    }

    /// The parameters of `block`, in the order of its flat buffer.
    #[must_use]
    pub fn parameters(&self, block: Block) -> Vec<Parameter> {
        self.rank_parameters(block, &Shape::whole(1, 1))
    }

    /// The parts of the parameters of `block` that one rank holds by the degrees of `shape`, in
    /// the order of its flat buffer.
    #[must_use]
    pub fn rank_parameters(&self, block: Block, shape: &Shape) -> Vec<Parameter> {
        let mut offset = 0;
        self.entries(block)
            .into_iter()
            .map(|(role, name, dimensions, split)| {
                let name = block.prefix() + &name;
                let shape = split.part(self, shape, dimensions);
                let parameter = Parameter { role, name, shape, split, offset };
                offset += parameter.elements();
                parameter
            })
            .collect()
    }

    /// Elements in the flat buffer of `block`.
    #[must_use]
    pub fn block_elements(&self, block: Block) -> u64 {
        self.rank_elements(block, &Shape::whole(1, 1))
    }

    /// Elements of `block` that one rank holds by the degrees of `shape`.
    #[must_use]
    pub fn rank_elements(&self, block: Block, shape: &Shape) -> u64 {
        self.rank_parameters(block, shape).iter().map(Parameter::elements).sum()
    }

    /// Parameters of the whole model.
    #[must_use]
    pub fn parameter_count(&self) -> u64 {
        self.blocks().map(|block| self.block_elements(block)).sum()
    }

    /// Parameters that a token meets: of the routed experts, only those it visits.
    #[must_use]
    pub fn active_parameter_count(&self) -> u64 {
        let active = |block| match (block, self.experts) {
            (Block::Experts(_), Some(Experts { count, per_token, .. })) => {
                self.block_elements(block) / count * per_token
            }
            _ => self.block_elements(block),
        };
        self.blocks().map(active).sum()
    }

    fn entries(&self, block: Block) -> Vec<Entry> {
        let (hidden, words) = (self.hidden, self.vocabulary);
        match block {
            Block::Embedding => {
                let word = [words, hidden];
                let mut entries = matrix(Role::Embedding, "embed_tokens", word, Split::Rows, false);
                if let Positions::Learned(length) = self.positions {
                    let table = [length, hidden];
                    let name = "embed_positions";
                    entries.extend(matrix(Role::Positions, name, table, Split::Whole, false));
                }
                entries
            }
            Block::Layer(layer) => self.layer_entries(layer),
            Block::Experts(_) => self.expert_entries(),
            Block::Prediction(number) => {
                let mut entries = self.norm_entries(Role::Merge, "hnorm", hidden);
                entries.extend(self.norm_entries(Role::Merge, "enorm", hidden));
                let both = [hidden, 2 * hidden];
                entries.extend(matrix(Role::Merge, "eh_proj", both, Split::Whole, false));
                entries.extend(self.layer_entries(self.prediction_layer(number)));
                entries.extend(self.norm_entries(Role::FinalNorm, "shared_head.norm", hidden));
                entries
            }
            Block::Head => {
                let mut entries = self.norm_entries(Role::FinalNorm, "model.norm", hidden);
                if !self.tied_embeddings {
                    let shape = [words, hidden];
                    entries.extend(matrix(Role::Head, "lm_head", shape, Split::Rows, false));
                }
                entries
            }
        }
    }

    fn norm_entries(&self, role: Role, name: &str, width: u64) -> Vec<Entry> {
        let mut entries = vec![(role, format!("{name}.weight"), vec![width], Split::Whole)];
        if self.norm == Norm::Layer {
            entries.push((Role::Bias, format!("{name}.bias"), vec![width], Split::Whole));
        }
        entries
    }

    fn layer_entries(&self, layer: u32) -> Vec<Entry> {
        let hidden = self.hidden;
        let mut entries = self.norm_entries(Role::AttentionNorm, "input_layernorm", hidden);
        entries.extend(match self.latent_attention {
            Some(latent) => self.latent_entries(latent),
            None => self.qkv_entries(),
        });
        let shape = [hidden, self.heads * self.head_dims().1];
        let output = "self_attn.o_proj";
        entries.extend(matrix(Role::Output, output, shape, Split::Columns, self.biases));
        let norm = "post_attention_layernorm";
        entries.extend(self.norm_entries(Role::FeedForwardNorm, norm, hidden));
        let Some(experts) = self.experts_of(layer) else {
            let roles = [Role::Gate, Role::Up, Role::Down];
            entries.extend(self.feed_forward_entries("mlp", roles, self.feed_forward));
            return entries;
        };
        let router = [experts.count, hidden];
        entries.extend(matrix(Role::Router, "mlp.gate", router, Split::Whole, false));
        if experts.scoring == Scoring::Sigmoid {
            let name = "mlp.gate.e_score_correction_bias".to_owned();
            entries.push((Role::RouterBias, name, vec![experts.count], Split::Whole));
        }
        if experts.shared_width > 0 {
            let roles = [Role::SharedUp, Role::SharedUp, Role::SharedDown];
            let name = "mlp.shared_experts";
            entries.extend(self.feed_forward_entries(name, roles, experts.shared_width));
        }
        entries
    }

    fn qkv_entries(&self) -> Vec<Entry> {
        let (hidden, biases) = (self.hidden, self.biases);
        let query = [self.heads * self.head_dim, hidden];
        let key = [self.kv_heads * self.head_dim, hidden];
        let mut entries = matrix(Role::Query, "self_attn.q_proj", query, Split::Rows, biases);
        entries.extend(matrix(Role::Key, "self_attn.k_proj", key, Split::KvHeads, biases));
        entries.extend(matrix(Role::Value, "self_attn.v_proj", key, Split::KvHeads, biases));
        if self.query_key_norm {
            for (role, name) in
                [(Role::QueryNorm, "self_attn.q_norm"), (Role::KeyNorm, "self_attn.k_norm")]
            {
                entries.extend(self.norm_entries(role, name, self.head_dim));
            }
        }
        entries
    }

    fn latent_entries(&self, latent: LatentAttention) -> Vec<Entry> {
        let LatentAttention { query_rank, kv_rank, nope_dim, rope_dim, value_dim } = latent;
        let (hidden, biases) = (self.hidden, self.biases);
        let query = self.heads * (nope_dim + rope_dim);
        let mut entries = match query_rank {
            None => matrix(Role::Query, "self_attn.q_proj", [query, hidden], Split::Rows, biases),
            Some(rank) => {
                let (down, up) = ("self_attn.q_a_proj", "self_attn.q_b_proj");
                let shape = [rank, hidden];
                let mut entries = matrix(Role::QueryLatent, down, shape, Split::Whole, biases);
                let norm = "self_attn.q_a_layernorm";
                entries.extend(self.norm_entries(Role::QueryLatentNorm, norm, rank));
                entries.extend(matrix(Role::Query, up, [query, rank], Split::Rows, biases));
                entries
            }
        };
        let (down, up) = ("self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj");
        let narrow = [kv_rank + rope_dim, hidden];
        let wide = [self.heads * (nope_dim + value_dim), kv_rank];
        entries.extend(matrix(Role::KeyLatent, down, narrow, Split::Whole, biases));
        let norm = "self_attn.kv_a_layernorm";
        entries.extend(self.norm_entries(Role::KeyLatentNorm, norm, kv_rank));
        entries.extend(matrix(Role::Key, up, wide, Split::Rows, biases));
        entries
    }

    /// Gate, up and down projections; no gate where the activation has none.
    fn feed_forward_entries(&self, name: &str, roles: [Role; 3], width: u64) -> Vec<Entry> {
        let (hidden, biases) = (self.hidden, self.biases);
        let product = |role, part: &str, shape, split| {
            matrix(role, &format!("{name}.{part}"), shape, split, biases)
        };
        let mut entries = Vec::new();
        if self.activation == Activation::SwiGlu {
            entries.extend(product(roles[0], "gate_proj", [width, hidden], Split::Rows));
        }
        entries.extend(product(roles[1], "up_proj", [width, hidden], Split::Rows));
        entries.extend(product(roles[2], "down_proj", [hidden, width], Split::Columns));
        entries
    }

    fn expert_entries(&self) -> Vec<Entry> {
        let Some(Experts { count, width, .. }) = self.experts else {
            return vec![];
        };
        let inner = self.activation.inputs() * width;
        let name = |part| format!("mlp.experts.{part}");
        let mut entries = vec![
            (
                Role::ExpertsUp,
                name("up.weight"),
                vec![count, inner, self.hidden],
                Split::ExpertRows,
            ),
            (
                Role::ExpertsDown,
                name("down.weight"),
                vec![count, self.hidden, width],
                Split::ExpertColumns,
            ),
        ];
        if self.biases {
            entries.push((Role::Bias, name("up.bias"), vec![count, inner], Split::ExpertRows));
            let one = vec![count, self.hidden, 1];
            entries.push((Role::Bias, name("down.bias"), one, Split::ExpertColumns));
        }
        entries
    }
}

impl Block {
    pub(crate) fn prefix(self) -> String {
        match self {
            Self::Embedding => "model.".to_owned(),
            Self::Layer(layer) | Self::Experts(layer) => format!("model.layers.{layer}."),
            Self::Prediction(number) => format!("model.predictions.{number}."),
            Self::Head => String::new(),
        }
    }
}
