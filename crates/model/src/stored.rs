//! How models are stored: which of the architectures of Hugging Face transformers a model is, and
//! what its parameters are called there.

use crate::{
    Activation, Block, Config, ConfigError, Experts, Norm, Parameter, Positions, Role, Scoring,
    Split,
};

/// An architecture of Hugging Face transformers that is read, trained and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// `LlamaForCausalLM`.
    Llama,
    /// `MistralForCausalLM`: attention sees a window.
    Mistral,
    /// `Qwen3ForCausalLM`: queries and keys are normed; attention of some layers may see a window.
    Qwen3,
    /// `MixtralForCausalLM`: experts in every layer, chosen and weighted by softmax.
    Mixtral,
    /// `Qwen3MoeForCausalLM`: queries and keys are normed; such experts in some layers.
    Qwen3Moe,
    /// `Glm4MoeForCausalLM`: a Llama's attention, with or without these norms, and DeepSeek-V3's
    /// experts.
    Glm4Moe,
    /// `DeepseekV2ForCausalLM`: latent attention, and experts weighted by softmax among all.
    DeepseekV2,
    /// `DeepseekV3ForCausalLM`: latent attention, and experts weighted by sigmoids, in all layers but
    /// the first or in none.
    DeepseekV3,
}

impl Architecture {
    /// Every architecture.
    pub(crate) const ALL: [Self; 8] = [
        Self::Llama,
        Self::Mistral,
        Self::Qwen3,
        Self::Mixtral,
        Self::Qwen3Moe,
        Self::Glm4Moe,
        Self::DeepseekV2,
        Self::DeepseekV3,
    ];

    /// Its class, and its name in `config.json`.
    pub(crate) fn names(self) -> [&'static str; 2] {
        match self {
            Self::Llama => ["LlamaForCausalLM", "llama"],
            Self::Mistral => ["MistralForCausalLM", "mistral"],
            Self::Qwen3 => ["Qwen3ForCausalLM", "qwen3"],
            Self::Mixtral => ["MixtralForCausalLM", "mixtral"],
            Self::Qwen3Moe => ["Qwen3MoeForCausalLM", "qwen3_moe"],
            Self::Glm4Moe => ["Glm4MoeForCausalLM", "glm4_moe"],
            Self::DeepseekV2 => ["DeepseekV2ForCausalLM", "deepseek_v2"],
            Self::DeepseekV3 => ["DeepseekV3ForCausalLM", "deepseek_v3"],
        }
    }
}

impl Config {
    /// What the model is stored as.
    ///
    /// # Errors
    /// [`ConfigError::Unsupported`] with the key that none of the architectures has; such a model
    /// is not trained either.
    pub fn architecture(&self) -> Result<Architecture, ConfigError> {
        let differences = [
            ("activation", self.activation != Activation::SwiGlu),
            ("norm", self.norm != Norm::Rms),
            ("positions", self.positions != Positions::Rotary),
            ("biases", self.biases),
            ("dropout", self.dropout),
            ("prediction_layers", self.prediction_layers > 0),
        ];
        if let Some((key, _)) = differences.into_iter().find(|(_, differs)| *differs) {
            return Err(ConfigError::Unsupported(key));
        }
        let architecture = match (self.latent_attention, self.experts) {
            (None, None) if self.query_key_norm => Architecture::Qwen3,
            (None, None) if self.sliding_window.is_some() => Architecture::Mistral,
            (None, None) => Architecture::Llama,
            (Some(_), None) => Architecture::DeepseekV3,
            (latent, Some(experts)) => match (latent, experts.scoring) {
                (None, Scoring::Softmax) if self.query_key_norm => Architecture::Qwen3Moe,
                (None, Scoring::Softmax) => Architecture::Mixtral,
                (None, Scoring::Sigmoid) => Architecture::Glm4Moe,
                (Some(_), Scoring::SoftmaxOfAll) => Architecture::DeepseekV2,
                (Some(_), Scoring::Sigmoid) => Architecture::DeepseekV3,
                _ => return Err(ConfigError::Unsupported("experts.scoring")),
            },
        };
        let refused = architecture.lacks(self);
        refused.map_or(Ok(architecture), |key| Err(ConfigError::Unsupported(key)))
    }

    /// The parameters of `block` as they are stored: those that lie in one buffer here and are
    /// several there are listed apart, each with its place in the block's flat buffer.
    #[must_use]
    pub fn stored_parameters(&self, block: Block) -> Vec<Parameter> {
        let mixtral = self.architecture() == Ok(Architecture::Mixtral);
        let mut stored = Vec::new();
        for parameter in self.parameters(block) {
            match parameter.role {
                Role::ExpertsUp | Role::ExpertsDown => {
                    stored.extend(experts_of(&parameter, block, mixtral));
                }
                Role::Router if mixtral => {
                    let name = format!("{}block_sparse_moe.gate.weight", block.prefix());
                    stored.push(Parameter { name, ..parameter });
                }
                _ => stored.push(parameter),
            }
        }
        stored
    }
}

impl Architecture {
    /// The key of a model that is something else than the architecture has.
    fn lacks(self, config: &Config) -> Option<&'static str> {
        use Architecture::{
            DeepseekV2, DeepseekV3, Glm4Moe, Llama, Mistral, Mixtral, Qwen3, Qwen3Moe,
        };
        let windows = [Mistral, Qwen3, Mixtral, Qwen3Moe].contains(&self);
        let alternates = config.sliding_window.is_some_and(|window| window.full_every.is_some());
        let normed = [Qwen3, Qwen3Moe, Glm4Moe].contains(&self);
        let of_experts =
            config.experts.map(|Experts { width, shared_width, every, dense_layers, .. }| {
                let shared = match self {
                    Glm4Moe | DeepseekV2 | DeepseekV3 => {
                        shared_width > 0 && shared_width.is_multiple_of(width)
                    }
                    Llama | Mistral | Qwen3 | Mixtral | Qwen3Moe => shared_width == 0,
                };
                // Those of every so many layers are counted from the first.
                let counted = self == Qwen3Moe && dense_layers.is_multiple_of(every);
                [
                    ("experts.shared_width", !shared),
                    ("experts.dense_layers", self == Mixtral && dense_layers > 0),
                    ("experts.every", every > 1 && !counted),
                ]
            });
        let of_attention = [
            ("sliding_window", config.sliding_window.is_some() && !windows),
            ("sliding_window.full_every", alternates && self != Qwen3),
            ("query_key_norm", config.query_key_norm && !normed),
        ];
        let mut keys = of_attention.into_iter().chain(of_experts.into_iter().flatten());
        keys.find(|(_, differs)| *differs).map(|(key, _)| key)
    }
}

/// The matrices of each expert in a parameter of all of them.
fn experts_of(all: &Parameter, block: Block, mixtral: bool) -> Vec<Parameter> {
    let (count, rows, columns) = (all.shape[0], all.shape[1], all.shape[2]);
    let parts: &[(Role, &str, &str)] = match all.role {
        Role::ExpertsUp => &[(Role::Gate, "w1", "gate_proj"), (Role::Up, "w3", "up_proj")],
        _ => &[(Role::Down, "w2", "down_proj")],
    };
    let rows = rows / parts.len() as u64;
    let of_expert = |expert: u64| {
        (0..).zip(parts).map(move |(index, (role, theirs, ours))| {
            let place = if mixtral { "block_sparse_moe" } else { "mlp" };
            let part = if mixtral { theirs } else { ours };
            Parameter {
                role: *role,
                name: format!("{}{place}.experts.{expert}.{part}.weight", block.prefix()),
                shape: vec![rows, columns],
                split: Split::Whole,
                offset: all.offset + (expert * parts.len() as u64 + index) * rows * columns,
            }
        })
    };
    (0..count).flat_map(of_expert).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{LatentAttention, SlidingWindow};

    #[test]
    fn the_key_that_no_architecture_has_is_named() {
        let refused = |config: Config| match config.architecture() {
            Err(ConfigError::Unsupported(key)) => key,
            other => panic!("{other:?}"),
        };
        let with = |experts| Config { experts: Some(experts), ..Config::default() };
        let mixtral = Experts::new(4, 2, 8);
        assert_eq!(refused(Config { dropout: true, ..Config::default() }), "dropout");
        assert_eq!(refused(with(Experts { shared_width: 8, ..mixtral })), "experts.shared_width");
        assert_eq!(refused(with(Experts { dense_layers: 1, ..mixtral })), "experts.dense_layers");
        assert_eq!(refused(with(Experts { every: 2, ..mixtral })), "experts.every");
        let scoring = Scoring::SoftmaxOfAll;
        assert_eq!(refused(with(Experts { scoring, ..mixtral })), "experts.scoring");
        let window = Some(SlidingWindow { length: 4, full_every: Some(2) });
        let config = Config { sliding_window: window, ..Config::default() };
        assert_eq!(refused(config.clone()), "sliding_window.full_every");
        let qwen = Config { query_key_norm: true, ..config };
        assert_eq!(qwen.architecture(), Ok(Architecture::Qwen3));
        let every = Experts { dense_layers: 2, every: 2, ..mixtral };
        let qwen = Config { query_key_norm: true, ..with(every) };
        assert_eq!(qwen.architecture(), Ok(Architecture::Qwen3Moe));
    }

    #[test]
    fn what_is_stored_is_the_block_once() {
        let sigmoid = Experts {
            scoring: Scoring::Sigmoid,
            shared_width: 8,
            dense_layers: 1,
            ..Experts::new(6, 2, 4)
        };
        let latent = LatentAttention {
            query_rank: Some(3),
            kv_rank: 5,
            nope_dim: 2,
            rope_dim: 2,
            value_dim: 6,
        };
        for (experts, latent_attention) in [
            (None, None),
            (None, Some(latent)),
            (Some(Experts::new(3, 2, 5)), None),
            (Some(sigmoid), None),
            (Some(sigmoid), Some(latent)),
        ] {
            let config = Config {
                latent_attention,
                layers: 2,
                hidden: 8,
                heads: 2,
                kv_heads: 1,
                head_dim: 4,
                feed_forward: 12,
                vocabulary: 16,
                experts,
                ..Config::default()
            };
            assert!(config.architecture().is_ok());
            for block in config.blocks() {
                let mut ranges: Vec<_> =
                    config.stored_parameters(block).iter().map(Parameter::range).collect();
                ranges.sort_by_key(|range| range.start);
                let ends = ranges.iter().scan(0, |next, range| {
                    let follows = range.start == *next;
                    *next = range.end;
                    Some((follows, range.end as u64))
                });
                let ends: Vec<_> = ends.collect();
                assert!(ends.iter().all(|(follows, _)| *follows), "{block} {ranges:?}");
                assert_eq!(ends.last().map(|(_, end)| *end), Some(config.block_elements(block)));
            }
        }
    }
}
