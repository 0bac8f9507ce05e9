//! What models other than Llama do differently, each as one key of [`Config`](crate::Config) whose
//! default is Llama's way.

use serde::{Deserialize, Serialize};

/// What stands between the products of the feed-forward block.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activation {
    /// `silu(gate) * up`, with a gate and an up product.
    #[default]
    #[serde(rename = "swiglu")]
    SwiGlu,
    /// GELU of one product.
    Gelu,
    /// `max(0, x)^2` of one product (Nemotron).
    SquaredRelu,
}

impl Activation {
    /// Products before the activation: two with a gate.
    #[must_use]
    pub fn inputs(self) -> u64 {
        match self {
            Self::SwiGlu => 2,
            Self::Gelu | Self::SquaredRelu => 1,
        }
    }
}

/// The norm before attention, feed-forward block and head.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Norm {
    /// Root mean square, with a scale.
    #[default]
    Rms,
    /// Mean and variance, with a scale and a shift.
    Layer,
}

/// How a layer knows where a token stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Positions {
    /// Queries and keys are rotated.
    #[default]
    Rotary,
    /// A table of this many positions is added to the word embedding.
    Learned(u64),
    /// A bias on the scores, linear in the distance.
    Alibi,
    /// Not at all.
    None,
}

/// How the scores of the experts become choices and weights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scoring {
    /// The highest scores are chosen, and weighted by their softmax (Mixtral: Jiang et al. 2024,
    /// arXiv:2401.04088, section 2.1).
    #[default]
    Softmax,
    /// As softmax, but among all experts, so that the weights of a token add up to less than one
    /// (DeepSeek-V2: arXiv:2405.04434, section 2.2.1).
    SoftmaxOfAll,
    /// The highest sigmoids are chosen, each after a bias that keeps the loads of the experts even,
    /// and weighted by their share of the sum without it (DeepSeek-V3: arXiv:2412.19437, section
    /// 2.1.2).
    Sigmoid,
}

/// A mixture of experts in place of the feed-forward block.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experts {
    /// Routed experts in a layer.
    pub count: u64,
    /// Routed experts that each token visits.
    pub per_token: u64,
    /// Inner width of one routed expert.
    pub width: u64,
    /// Inner width of all shared experts together, which every token visits; 0 without any.
    #[serde(default)]
    pub shared_width: u64,
    /// Leading layers that keep a dense feed-forward block.
    #[serde(default)]
    pub dense_layers: u32,
    /// Of the layers after those, every how many-th has experts; 1 is all.
    #[serde(default = "one")]
    pub every: u32,
    /// How scores become choices and weights.
    #[serde(default, skip_serializing_if = "is_default")]
    pub scoring: Scoring,
    /// The groups that experts are chosen from; softmax among the chosen has one.
    #[serde(default = "one_wide", skip_serializing_if = "is_one")]
    pub groups: u64,
    /// How many of the groups a token's experts are chosen from: with sigmoids those with the highest
    /// sums of two scores (DeepSeek-V3's node-limited routing), else those with the highest score
    /// (DeepSeek-V2's device-limited routing).
    #[serde(default = "one_wide", skip_serializing_if = "is_one")]
    pub groups_per_token: u64,
    /// What weights are multiplied by; nothing with softmax among the chosen.
    #[serde(default = "unscaled", skip_serializing_if = "is_unscaled")]
    pub scale: f32,
    /// With sigmoids: how far a bias moves in a step, down when its expert's load is above the mean
    /// and up when it is below.
    #[serde(default = "balance_rate", skip_serializing_if = "is_balance_rate")]
    pub balance_rate: f32,
}

impl Experts {
    /// So many experts of a width, of which a token visits some: Mixtral's way, in every layer.
    #[must_use]
    pub fn new(count: u64, per_token: u64, width: u64) -> Self {
        Self {
            count,
            per_token,
            width,
            shared_width: 0,
            dense_layers: 0,
            every: 1,
            scoring: Scoring::default(),
            groups: 1,
            groups_per_token: 1,
            scale: unscaled(),
            balance_rate: balance_rate(),
        }
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn one() -> u32 {
    1
}

fn one_wide() -> u64 {
    1
}

fn is_one(groups: &u64) -> bool {
    *groups == one_wide()
}

fn unscaled() -> f32 {
    1.0
}

fn is_unscaled(scale: &f32) -> bool {
    *scale == unscaled()
}

/// DeepSeek-V3 (arXiv:2412.19437), section 4.2.
fn balance_rate() -> f32 {
    1e-3
}

fn is_balance_rate(rate: &f32) -> bool {
    *rate == balance_rate()
}

/// Multi-head latent attention: keys and values are expanded from one narrow vector a token.
///
/// Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LatentAttention {
    /// Width of the narrow query vector; `None` where queries are projected at once.
    pub query_rank: Option<u64>,
    /// Width of the narrow key and value vector.
    pub kv_rank: u64,
    /// Components of a head's query and key without position.
    pub nope_dim: u64,
    /// Components of a head's query and key that are rotated; the key's are shared by all heads.
    pub rope_dim: u64,
    /// Width of a head's value.
    pub value_dim: u64,
}

impl LatentAttention {
    /// Added to the mean square under the root of the narrow vectors' norms, whatever the other norms
    /// have: the default of `DeepseekV3RMSNorm` (transformers 5.23, `modeling_deepseek_v3.py`) and of
    /// `RMSNorm` in DeepSeek-V3's own `model.py` (2024-12).
    pub const NORM_EPSILON: f32 = 1e-6;
}

/// Attention that sees only the last tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlidingWindow {
    /// Tokens that a query sees, itself included.
    pub length: u64,
    /// Every how many-th layer sees all tokens nevertheless; `None` if no layer does.
    pub full_every: Option<u32>,
}
