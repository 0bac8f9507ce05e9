//! The dimensions of a model, and the checks that make them consistent.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The dimensions of a Llama-class model, in the words of the job file.
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
    pub rotary: Rotary,
    /// Longest sequence the model is meant for (`max_position_embeddings`); informative.
    pub context: u64,
}

/// Rotary position embedding.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rotary {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// The frequency scaling Llama 3.1 introduced; `None` for Llama 3 and before.
    pub scaling: Option<Llama3Scaling>,
}

/// Llama 3.1's frequency scaling: long wavelengths are stretched by `factor`, short ones kept, and
/// those between blended (Hugging Face `rope_type = "llama3"`).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Llama3Scaling {
    /// How much the longest wavelengths are stretched.
    pub factor: f64,
    /// Wavelengths above `original_context / low_frequency_factor` are stretched in full.
    pub low_frequency_factor: f64,
    /// Wavelengths below `original_context / high_frequency_factor` are kept.
    pub high_frequency_factor: f64,
    /// The context length the unscaled frequencies were trained for.
    pub original_context: u64,
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
    /// Rotary embedding turns pairs.
    #[error("`head_dim` = {0} is odd; rotary embedding turns pairs of components")]
    OddHead(u64),
}

impl Config {
    /// Refuses dimensions that contradict each other.
    ///
    /// # Errors
    /// The first contradiction found.
    pub fn check(&self) -> Result<(), ConfigError> {
        let dimensions = [
            ("layers", u64::from(self.layers)),
            ("hidden", self.hidden),
            ("heads", self.heads),
            ("kv_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("feed_forward", self.feed_forward),
            ("vocabulary", self.vocabulary),
        ];
        if let Some((name, _)) = dimensions.into_iter().find(|(_, value)| *value == 0) {
            return Err(ConfigError::Zero(name));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(ConfigError::HeadGroups { heads: self.heads, kv_heads: self.kv_heads });
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(ConfigError::OddHead(self.head_dim));
        }
        Ok(())
    }

    /// Width of all query heads together.
    #[must_use]
    pub fn query_width(&self) -> u64 {
        self.heads * self.head_dim
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

impl Rotary {
    /// The angle per position, in radians, of each of the `head_dim / 2` pairs.
    ///
    /// Source: Su et al. 2021, eq. 15, with the frequency scaling of Llama 3.1 as in Hugging Face
    /// `modeling_rope_utils.py` (`_compute_llama3_parameters`).
    #[must_use]
    pub fn frequencies(&self, head_dim: u64) -> Vec<f32> {
        (0..head_dim / 2)
            .map(|pair| {
                let exponent = (2 * pair) as f64 / head_dim as f64;
                // f32 as the reference computes it, so that long sequences agree in phase.
                let frequency = 1.0 / (self.theta as f32).powf(exponent as f32);
                self.scaling.map_or(frequency, |scaling| scaling.apply(frequency))
            })
            .collect()
    }
}

impl Llama3Scaling {
    fn apply(&self, frequency: f32) -> f32 {
        let original = self.original_context as f32;
        let (low, high) = (self.low_frequency_factor as f32, self.high_frequency_factor as f32);
        let wavelength = std::f32::consts::TAU / frequency;
        let stretched = frequency / self.factor as f32;
        if wavelength > original / low {
            stretched
        } else if wavelength < original / high {
            frequency
        } else {
            let smooth = (original / wavelength - low) / (high - low);
            (1.0 - smooth) * stretched + smooth * frequency
        }
    }
}
