//! Parameters, gradients and optimizer state of one rank.

use std::ops::Add;

use model::{Block, Config, Parameter, Role, Shape, Split};
use program::Axis;

use super::{Chunk, Footprint, Item, Place};
use crate::{Layout, Shard};

/// Bytes of a master parameter.
const FP32: u64 = 4;
/// Bytes of Adam's two moments.
const MOMENTS: u64 = 8;

/// Elements of some parameters, by what splits them.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Counts {
    whole: u64,
    /// Of `whole`, those of matrices.
    whole_matrices: u64,
    tensor: u64,
    kv_heads: u64,
    expert: u64,
}

impl Counts {
    fn of(parameters: &[Parameter], mut select: impl FnMut(Role) -> bool) -> Self {
        let selected = parameters.iter().filter(|parameter| select(parameter.role));
        selected.fold(Self::default(), |mut counts, parameter| {
            let elements = parameter.elements();
            match parameter.split {
                Split::Whole => {
                    counts.whole += elements;
                    // The router is a product of its own kind, in fp32 as a rule.
                    let matrix = parameter.decays() && parameter.role != Role::Router;
                    counts.whole_matrices += if matrix { elements } else { 0 };
                }
                Split::Rows | Split::Columns => counts.tensor += elements,
                Split::KvHeads => counts.kv_heads += elements,
                Split::ExpertRows | Split::ExpertColumns => counts.expert += elements,
            }
            counts
        })
    }

    /// Elements of all but the routed experts on one rank, those of matrices alone or all.
    fn dense(&self, config: &Config, shape: &Shape, matrices: bool) -> u64 {
        let whole = if matrices { self.whole_matrices } else { self.whole };
        whole + self.tensor / shape.tensor + self.kv_heads / shape.tensor.min(config.kv_heads)
    }

    fn experts(&self, shape: &Shape) -> u64 {
        self.expert / (shape.expert * shape.expert_tensor)
    }
}

impl Add for Counts {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self {
            whole: self.whole + other.whole,
            whole_matrices: self.whole_matrices + other.whole_matrices,
            tensor: self.tensor + other.tensor,
            kv_heads: self.kv_heads + other.kv_heads,
            expert: self.expert + other.expert,
        }
    }
}

impl<'a> Footprint<'a> {
    /// Counts the parameters of a model.
    #[must_use]
    pub fn new(config: &'a Config) -> Self {
        let layer = |layer: u32| config.parameters(Block::Layer(layer));
        let attention = |role: Role| {
            use Role::{
                AttentionNorm, FeedForwardNorm, Key, KeyLatent, KeyLatentNorm, KeyNorm, Output,
                Query, QueryLatent, QueryLatentNorm, QueryNorm, Value,
            };
            let norms = [AttentionNorm, FeedForwardNorm, KeyNorm, QueryNorm];
            let latent = [KeyLatent, KeyLatentNorm, QueryLatent, QueryLatentNorm];
            let products = [Key, Output, Query, Value];
            [&norms, &latent, &products].iter().any(|roles| roles.contains(&role))
        };
        let (sparse, dense): (Vec<u32>, Vec<u32>) =
            (0..config.layers).partition(|layer| config.experts_of(*layer).is_some());
        let block = |layers: &[u32]| {
            let parameters = layers.first().map(|first| layer(*first)).unwrap_or_default();
            Counts::of(&parameters, |role| !attention(role))
        };
        let experts = sparse.first().map(|first| config.parameters(Block::Experts(*first)));
        let experts = Counts::of(&experts.unwrap_or_default(), |_| true);
        let merges =
            (config.prediction_layers > 0).then(|| config.parameters(Block::Prediction(0)));
        let merge = |role| matches!(role, Role::Merge | Role::FinalNorm);
        let mut sparse_before = vec![0; config.layers as usize + 1];
        for layer in 0..config.layers {
            let one = u32::from(config.experts_of(layer).is_some());
            sparse_before[layer as usize + 1] = sparse_before[layer as usize] + one;
        }
        Self {
            config,
            attention: Counts::of(&layer(0), attention),
            dense: block(&dense),
            sparse: block(&sparse) + experts,
            merge: Counts::of(&merges.unwrap_or_default(), merge),
            positions: Counts::of(&config.parameters(Block::Embedding), |role| {
                role == Role::Positions
            }),
            final_norm: Counts::of(&config.parameters(Block::Head), |role| role != Role::Head),
            sparse_before,
        }
    }

    /// Prediction layers that have experts.
    pub(super) fn sparse_predictions(&self) -> u32 {
        let layer = |number| self.config.prediction_layer(number);
        let sparse = |number: &u32| self.config.experts_of(layer(*number)).is_some();
        (0..self.config.prediction_layers).filter(sparse).count() as u32
    }
}

/// Elements that one rank of a stage holds.
pub(super) struct Held {
    /// Of everything but routed experts.
    dense: u64,
    /// Of routed experts.
    experts: u64,
    /// Of the largest block that is gathered at once.
    block: u64,
    /// Of one matrix of each shape.
    pub(super) matrix_shapes: u64,
}

impl Place<'_> {
    /// Words of a vocabulary-parallel rank, padding included.
    pub(super) fn words(&self) -> u64 {
        let multiple = self.options.software.vocabulary_multiple * self.shape.tensor;
        self.footprint.config.vocabulary.next_multiple_of(multiple) / self.shape.tensor
    }

    pub(super) fn held(&self, chunks: &[Chunk]) -> Held {
        let (footprint, config) = (self.footprint, self.footprint.config);
        let count = |kind: fn(&Chunk) -> u32| u64::from(chunks.iter().map(kind).sum::<u32>());
        let (dense_layers, sparse_layers) = (count(|c| c.dense), count(|c| c.sparse));
        let part = |counts: &Counts| counts.dense(config, &self.shape, false);
        let matrices = |counts: &Counts| counts.dense(config, &self.shape, true);
        let embedding = chunks.iter().any(|chunk| chunk.embedding);
        let head = chunks.iter().any(|chunk| chunk.head);
        let words = self.words() * config.hidden;
        // A shared embedding is held by both ends.
        let table = embedding || head && Layout::ends_share_embedding(config);
        let tables = u64::from(table) + u64::from(head && !config.tied_embeddings);
        let when = |present: bool, elements: u64| if present { elements } else { 0 };
        let merge = when(head, part(&footprint.merge) * u64::from(config.prediction_layers));
        let experts = footprint.sparse.experts(&self.shape);
        let (attention, dense, sparse) =
            (&footprint.attention, &footprint.dense, &footprint.sparse);
        let per_expert = experts * self.shape.expert / config.experts.map_or(1, |e| e.count);
        Held {
            dense: (dense_layers + sparse_layers) * part(attention)
                + dense_layers * part(dense)
                + sparse_layers * part(sparse)
                + tables * words
                + when(embedding, part(&footprint.positions))
                + when(head, part(&footprint.final_norm))
                + merge,
            experts: sparse_layers * experts,
            block: [
                when(tables > 0, words),
                when(dense_layers > 0, part(attention) + part(dense)),
                when(sparse_layers > 0, part(attention) + part(sparse) + experts),
            ]
            .into_iter()
            .max()
            .unwrap_or_default(),
            matrix_shapes: matrices(attention)
                + when(dense_layers > 0, matrices(dense))
                + when(sparse_layers > 0, matrices(sparse) + per_expert)
                + when(head, words),
        }
    }

    /// Parameters, gradients and optimizer state, by what the data axis shards.
    ///
    /// Source: ZeRO (arXiv:1910.02054), section 3.1: 2 + 2 + 12 bytes a parameter; gradients are
    /// accumulated in fp32 here, hence 2 + 4 + 12.
    pub(super) fn states(&self, held: &Held, put: &mut impl FnMut(Item, u64)) {
        let mesh = &self.layout.mesh;
        let group = u64::from(mesh.degree(Axis::Data)).max(1);
        let same_experts = u64::from(mesh.degree(Axis::ExpertData)).clamp(1, group);
        self.states_of(held.dense, group, put);
        self.states_of(held.experts, same_experts, put);
        put(Item::Gathered, self.gathered(held));
    }

    fn states_of(&self, elements: u64, group: u64, put: &mut impl FnMut(Item, u64)) {
        let over = |level: Shard| if self.layout.shard >= level { group } else { 1 };
        let software = &self.options.software;
        let weight = self.options.element();
        // The sharded parameters of ZeRO 3 are the master parameters; products read gathered ones.
        let (parameter, master) = match (self.layout.shard, weight) {
            (Shard::Parameters, _) | (_, FP32) => (FP32, 0),
            _ if self.options.is_narrow() && software.narrow_parameters => (0, FP32),
            _ => (weight, FP32),
        };
        // Of gathered parameters, copies live as long as the block.
        let kept = self.options.is_narrow() && self.layout.shard != Shard::Parameters;
        let copies = if kept { software.narrow_copies } else { 0 };
        let narrow = self.options.narrow(elements * copies);
        put(Item::Parameters, elements * parameter / over(Shard::Parameters) + narrow);
        put(Item::Gradients, elements * self.options.software.gradient / over(Shard::Gradients));
        put(Item::Gradients, elements * software.second_gradient);
        put(Item::Optimizer, elements * (master + MOMENTS) / over(Shard::Optimizer));
    }

    /// Whether fully sharded parameters and gradients are whole over all microbatches.
    fn whole(&self) -> bool {
        self.layout.mesh.pipeline > 1 && self.options.software.whole_when_pipelined
    }

    /// What ZeRO 3 gathers: the block that is computed and the next, ahead of its use.
    fn gathered(&self, held: &Held) -> u64 {
        let weight = self.options.element();
        match self.layout.shard {
            Shard::Parameters if self.whole() => {
                (held.dense + held.experts) * (weight + self.options.software.gradient)
            }
            Shard::Parameters => held.block * 2 * weight,
            _ => 0,
        }
    }

    /// Gradients of a block in backward, as they are made and as they are reduced, where the rest
    /// is sharded.
    pub(super) fn reducing(&self, held: &Held) -> u64 {
        let sharded = self.layout.shard >= Shard::Gradients && !self.whole();
        let bytes = self.options.element() + self.options.software.gradient;
        if sharded { held.block * bytes } else { 0 }
    }
}
