//! Rotary position embedding and its frequencies.

use serde::{Deserialize, Serialize};

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

impl Default for Rotary {
    /// As Su et al. 2021 and Llama 1 and 2 have it.
    fn default() -> Self {
        Self { theta: 10_000.0, scaling: None }
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
