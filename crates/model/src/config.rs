//! The dimensions of a model, and the checks that make them consistent.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{
    Activation, Experts, LatentAttention, Norm, Positions, Rotary, Scoring, SlidingWindow,
};

/// The dimensions of a Llama-class model, in the words of the job file.
///
/// What follows `context` is what other models do differently; each key's default is Llama's way,
/// so the description of a Llama names none of them. [`Config::default`] is a Llama whose
/// dimensions are still zero.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Transformer layers.
    pub layers: u32,
    /// Width of the residual stream.
    pub hidden: u64,
    /// Query heads.
    pub heads: u64,
    /// Key and value heads; fewer than `heads` is grouped-query attention.
    pub kv_heads: u64,
    /// Width of one head.
    pub head_dim: u64,
    /// Inner width of the feed-forward block.
    pub feed_forward: u64,
    /// Words in the vocabulary.
    pub vocabulary: u64,
    /// Whether the output head is the transposed embedding.
    pub tied_embeddings: bool,
    /// Added to the mean square under the root of every RMSNorm.
    pub norm_epsilon: f32,
    /// Rotary position embedding.
    #[serde(default)]
    pub rotary: Rotary,
    /// Longest sequence the model is meant for (`max_position_embeddings`); informative.
    pub context: u64,
    /// What stands between the products of the feed-forward block.
    #[serde(default, skip_serializing_if = "is_default")]
    pub activation: Activation,
    /// The norm before attention, feed-forward block and head.
    #[serde(default, skip_serializing_if = "is_default")]
    pub norm: Norm,
    /// How a layer knows where a token stands.
    #[serde(default, skip_serializing_if = "is_default")]
    pub positions: Positions,
    /// Whether every product of a layer adds a bias.
    #[serde(default, skip_serializing_if = "is_default")]
    pub biases: bool,
    /// Whether the queries and keys of each head are normed.
    #[serde(default, skip_serializing_if = "is_default")]
    pub query_key_norm: bool,
    /// Whether attention weights and the output of each block are dropped out in training.
    #[serde(default, skip_serializing_if = "is_default")]
    pub dropout: bool,
    /// Attention that sees only the last tokens.
    #[serde(default, skip_serializing_if = "is_default")]
    pub sliding_window: Option<SlidingWindow>,
    /// Multi-head latent attention; `head_dim` and `kv_heads` are then unused.
    #[serde(default, skip_serializing_if = "is_default")]
    pub latent_attention: Option<LatentAttention>,
    /// A mixture of experts in place of the feed-forward block.
    #[serde(default, skip_serializing_if = "is_default")]
    pub experts: Option<Experts>,
    /// Layers after the last that predict one token further each (DeepSeek-V3's multi-token
    /// prediction).
    #[serde(default, skip_serializing_if = "is_default")]
    pub prediction_layers: u32,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Default for Config {
    fn default() -> Self {
        Self {
            layers: 0,
            hidden: 0,
            heads: 0,
            kv_heads: 0,
            head_dim: 0,
            feed_forward: 0,
            vocabulary: 0,
            tied_embeddings: false,
            norm_epsilon: 1e-5,
            rotary: Rotary::default(),
            context: 0,
            activation: Activation::default(),
            norm: Norm::default(),
            positions: Positions::default(),
            biases: false,
            query_key_norm: false,
            dropout: false,
            sliding_window: None,
            latent_attention: None,
            experts: None,
            prediction_layers: 0,
        }
    }
}

/// A configuration that no Llama can have.
#[derive(Debug, Error, PartialEq)]
pub enum ConfigError {
    /// A dimension is zero.
    #[error("`{0}` is 0; every dimension of a model must be positive")]
    Zero(&'static str),
    /// Query heads do not divide into groups.
    #[error(
        "`heads` = {heads} is not a multiple of `kv_heads` = {kv_heads}; each key/value head serves a whole group of query heads"
    )]
    HeadGroups {
        /// Query heads.
        heads: u64,
        /// Key and value heads.
        kv_heads: u64,
    },
    /// More experts visited than there are.
    #[error(
        "`experts.per_token` = {per_token} is more than `experts.count` = {count}; a token visits each expert once"
    )]
    ExpertsPerToken {
        /// Experts a token visits.
        per_token: u64,
        /// Experts there are.
        count: u64,
    },
    /// Groups that experts do not divide into, or more of them chosen than there are.
    #[error(
        "`experts.groups` = {groups} with `experts.groups_per_token` = {per_token}: groups must divide `experts.count`, hold two experts at least and together as many as a token visits, and need scoring = \"sigmoid\" or \"softmax-of-all\""
    )]
    ExpertGroups {
        /// Groups there are.
        groups: u64,
        /// Groups that a token's experts are chosen from.
        per_token: u64,
    },
    /// Something that is not carried out yet.
    #[error("`{0}`: such a model is planned and simulated, but cannot be trained or stored yet")]
    Unsupported(&'static str),
    /// Rotary embedding turns pairs.
    #[error(
        "`head_dim` (`latent_attention.rope_dim`) = {0} is odd; rotary embedding turns pairs of components"
    )]
    OddHead(u64),
}

impl Config {
    /// Refuses dimensions that contradict each other.
    ///
    /// # Errors
    /// The first contradiction found.
    pub fn check(&self) -> Result<(), ConfigError> {
        if let Some((name, _)) = self.dimensions().into_iter().find(|(_, value)| *value == 0) {
            return Err(ConfigError::Zero(name));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(ConfigError::HeadGroups { heads: self.heads, kv_heads: self.kv_heads });
        }
        if self.positions == Positions::Rotary && !self.rotary_dim().is_multiple_of(2) {
            return Err(ConfigError::OddHead(self.rotary_dim()));
        }
        self.experts.map_or(Ok(()), |experts| experts.check())
    }

    /// What must not be zero, by the key that gives it.
    fn dimensions(&self) -> Vec<(&'static str, u64)> {
        let mut dimensions = vec![
            ("layers", u64::from(self.layers)),
            ("hidden", self.hidden),
            ("heads", self.heads),
            ("kv_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("feed_forward", self.feed_forward),
            ("vocabulary", self.vocabulary),
        ];
        if let Positions::Learned(length) = self.positions {
            dimensions.push(("positions.learned", length));
        }
        if let Some(window) = self.sliding_window {
            dimensions.push(("sliding_window.length", window.length));
            let every = u64::from(window.full_every.unwrap_or(1));
            dimensions.push(("sliding_window.full_every", every));
        }
        if let Some(latent) = self.latent_attention {
            dimensions.extend([
                ("latent_attention.query_rank", latent.query_rank.unwrap_or(1)),
                ("latent_attention.kv_rank", latent.kv_rank),
                ("latent_attention.nope_dim", latent.nope_dim),
                ("latent_attention.rope_dim", latent.rope_dim),
                ("latent_attention.value_dim", latent.value_dim),
            ]);
        }
        if let Some(experts) = self.experts {
            dimensions.extend([
                ("experts.count", experts.count),
                ("experts.per_token", experts.per_token),
                ("experts.width", experts.width),
                ("experts.every", u64::from(experts.every)),
                ("experts.groups", experts.groups),
                ("experts.groups_per_token", experts.groups_per_token),
            ]);
        }
        dimensions
    }

    /// The experts of `layer`; `None` where its feed-forward block is dense. The prediction layers
    /// are numbered after the others.
    #[must_use]
    pub fn experts_of(&self, layer: u32) -> Option<Experts> {
        self.experts.filter(|experts| {
            let after = layer.checked_sub(experts.dense_layers);
            after.is_some_and(|after| (after + 1).is_multiple_of(experts.every))
        })
    }

    /// Whether attention of `layer` sees only the last tokens.
    #[must_use]
    pub fn is_windowed(&self, layer: u32) -> bool {
        let sees_all = |every: u32| (layer + 1).is_multiple_of(every);
        self.sliding_window.is_some_and(|window| !window.full_every.is_some_and(sees_all))
    }

    /// Width of a head's queries and keys, and of its values.
    #[must_use]
    pub fn head_dims(&self) -> (u64, u64) {
        match self.latent_attention {
            Some(latent) => (latent.nope_dim + latent.rope_dim, latent.value_dim),
            None => (self.head_dim, self.head_dim),
        }
    }

    /// Components of a head's queries and keys that are rotated, its last.
    #[must_use]
    pub fn rotary_dim(&self) -> u64 {
        self.latent_attention.map_or(self.head_dim, |latent| latent.rope_dim)
    }

    /// Width of all query heads together.
    #[must_use]
    pub fn query_width(&self) -> u64 {
        self.heads * self.head_dims().0
    }

    /// Width of all key heads (or all value heads) together.
    #[must_use]
    pub fn kv_width(&self) -> u64 {
        self.kv_heads * self.head_dim
    }

    /// Width of the fused query, key and value product.
    #[must_use]
    pub fn qkv_width(&self) -> u64 {
        self.query_width() + 2 * self.kv_width()
    }
}

impl Experts {
    fn check(&self) -> Result<(), ConfigError> {
        let Self { count, per_token, groups, groups_per_token, scoring, .. } = *self;
        if per_token > count {
            return Err(ConfigError::ExpertsPerToken { per_token, count });
        }
        let each = count / groups;
        let fits = count.is_multiple_of(groups)
            && groups_per_token <= groups
            && per_token <= groups_per_token * each
            && each >= 2
            && scoring != Scoring::Softmax;
        if groups > 1 && !fits {
            return Err(ConfigError::ExpertGroups { groups, per_token: groups_per_token });
        }
        Ok(())
    }
}
