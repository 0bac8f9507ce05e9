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
    /// `MixtralForCausalLM`: experts in every layer, chosen and weighted by softmax.
    Mixtral,
    /// `Glm4MoeForCausalLM`: a Llama's attention, and DeepSeek-V3's experts.
    Glm4Moe,
    /// `DeepseekV3ForCausalLM`: latent attention, and these experts in all layers but the first, or in
    /// none.
    DeepseekV3,
}

impl Architecture {
    /// Its class, and its name in `config.json`.
    pub(crate) fn names(self) -> [&'static str; 2] {
        match self {
            Self::Llama => ["LlamaForCausalLM", "llama"],
            Self::Mixtral => ["MixtralForCausalLM", "mixtral"],
            Self::Glm4Moe => ["Glm4MoeForCausalLM", "glm4_moe"],
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
            ("query_key_norm", self.query_key_norm),
            ("dropout", self.dropout),
            ("sliding_window", self.sliding_window.is_some()),
            ("prediction_layers", self.prediction_layers > 0),
        ];
        if let Some((key, _)) = differences.into_iter().find(|(_, differs)| *differs) {
            return Err(ConfigError::Unsupported(key));
        }
        let experts = self.experts.map(|experts| experts.architecture()).transpose()?;
        match (self.latent_attention, experts) {
            (None, experts) => Ok(experts.unwrap_or(Architecture::Llama)),
            (Some(_), None | Some(Architecture::Glm4Moe)) => Ok(Architecture::DeepseekV3),
            (Some(_), _) => Err(ConfigError::Unsupported("experts.scoring")),
        }
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

impl Experts {
    fn architecture(&self) -> Result<Architecture, ConfigError> {
        let refused = |key| Err(ConfigError::Unsupported(key));
        match self.scoring {
            _ if self.every != 1 => refused("experts.every"),
            Scoring::Softmax if self.shared_width > 0 => refused("experts.shared_width"),
            Scoring::Softmax if self.dense_layers > 0 => refused("experts.dense_layers"),
            Scoring::Softmax => Ok(Architecture::Mixtral),
            Scoring::Sigmoid
                if self.shared_width == 0 || !self.shared_width.is_multiple_of(self.width) =>
            {
                refused("experts.shared_width")
            }
            Scoring::Sigmoid => Ok(Architecture::Glm4Moe),
        }
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

    #[test]
    fn what_is_stored_is_the_block_once() {
        let sigmoid = Experts {
            scoring: Scoring::Sigmoid,
            shared_width: 8,
            dense_layers: 1,
            ..Experts::new(6, 2, 4)
        };
        for experts in [None, Some(Experts::new(3, 2, 5)), Some(sigmoid)] {
            let config = Config {
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
