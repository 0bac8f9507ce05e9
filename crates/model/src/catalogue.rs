//! Models by name, from `catalogue/models.toml`.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

use crate::{Config, Error};

/// A model as it is written down.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Where the dimensions were published.
    pub source: String,
    /// When they were published.
    pub date: String,
    /// Parameters in all, to the digits that were published.
    pub parameters: u64,
    /// The dimensions.
    pub config: Config,
}

static ENTRIES: LazyLock<BTreeMap<String, Entry>> = LazyLock::new(|| {
    toml::from_str(include_str!("../../../catalogue/models.toml"))
        .unwrap_or_else(|error| panic!("catalogue/models.toml, which is built in: {error}"))
});

/// The model called `name`.
///
/// # Errors
/// [`Error::UnknownModel`], which names the nearest entry.
pub fn find(name: &str) -> Result<&'static Config, Error> {
    entry(name).map(|entry| &entry.config)
}

/// The entry called `name`.
///
/// # Errors
/// As [`find`].
pub fn entry(name: &str) -> Result<&'static Entry, Error> {
    match ENTRIES.get(name) {
        Some(entry) => Ok(entry),
        None => Err(Error::UnknownModel { name: name.to_owned(), nearest: nearest(name) }),
    }
}

/// Every name in the catalogue, sorted.
pub fn names() -> impl Iterator<Item = &'static str> {
    ENTRIES.keys().map(String::as_str)
}

fn nearest(name: &str) -> &'static str {
    names()
        .min_by_key(|entry| strsim::damerau_levenshtein(&name.to_lowercase(), entry))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameter_counts_are_the_published_ones() {
        let published = [
            ("llama-3-8b", 8_030_261_248),
            ("llama-3-70b", 70_553_706_496),
            ("llama-3.1-8b", 8_030_261_248),
            ("llama-3.1-70b", 70_553_706_496),
            ("llama-3.1-405b", 405_853_388_800),
            // Llama 2's model cards, by the shapes of their checkpoints.
            ("llama-2-7b", 6_738_415_616),
            ("llama-2-70b", 68_976_648_192),
            // Mosaic llm-foundry, scripts/train/benchmarking/README.md.
            ("mpt-7b", 6_658_859_008),
            ("mpt-70b", 64_862_437_376),
            // Checkpoints of mistralai, Qwen and deepseek-ai (DeepSeek-V3's without prediction
            // layers has 671,026,419,200).
            ("mixtral-8x7b", 46_702_792_704),
            ("mixtral-8x22b", 140_630_071_296),
            ("qwen3-30b-a3b", 30_532_122_624),
            ("qwen3-235b-a22b", 235_093_634_560),
        ];
        for (name, count) in published {
            assert_eq!(find(name).unwrap().parameter_count(), count, "{name}");
        }
    }

    #[test]
    fn rounded_parameter_counts_are_the_published_ones() {
        // Total and active, in billions, as the papers round them.
        let published = [
            ("gpt-3-175b", 175.0, 175.0, 0.01),
            ("megatron-1008b", 1008.0, 1008.0, 0.001),
            ("bloom-176b", 176.2, 176.2, 0.001),
            ("nemotron-4-340b", 341.0, 341.0, 0.002),
            ("palm-540b", 540.35, 540.35, 0.001),
            ("deepseek-v2", 236.0, 21.0, 0.02),
            ("gpt-oss-120b", 116.83, 5.7, 0.01),
            ("kimi-k2", 1040.0, 32.0, 0.03),
            ("grok-1", 314.0, 86.0, 0.03),
        ];
        for (name, total, active, tolerance) in published {
            let config = find(name).unwrap();
            let close = |count: u64, billions: f64| {
                let ratio = count as f64 / 1e9 / billions;
                assert!((ratio - 1.0).abs() <= tolerance, "{name}: {count}, {billions} B");
            };
            close(config.parameter_count(), total);
            close(config.active_parameter_count(), active);
        }
    }

    #[test]
    fn deepseek_v3_is_counted_with_and_without_its_prediction_layer() {
        let config = find("deepseek-v3").unwrap();
        let without = Config { prediction_layers: 0, ..config.clone() };
        // The checkpoint's own index.
        assert_eq!(without.parameter_count(), 671_026_419_200);
        assert!(config.parameter_count() > 682_000_000_000);
    }

    /// Within 1 %, or half of the last digit that was published.
    #[test]
    fn every_model_has_the_parameters_that_were_published() {
        for (name, Entry { parameters, config, .. }) in &*ENTRIES {
            let count = config.parameter_count();
            let last_digit = 10_u64.pow(trailing_zeros(*parameters));
            let allowed = (parameters / 100).max(last_digit / 2);
            assert!(count.abs_diff(*parameters) <= allowed, "{name}: {count}, not {parameters}");
        }
    }

    fn trailing_zeros(number: u64) -> u32 {
        (1..).find(|zeros| !number.is_multiple_of(10_u64.pow(*zeros))).unwrap_or(1) - 1
    }

    #[test]
    fn the_small_models_are_as_small_as_their_sources_say() {
        assert_eq!(find("tiny").unwrap().parameter_count(), 1_311_872);
        assert_eq!(find("small").unwrap().parameter_count(), 29_368_832);
    }

    #[test]
    fn every_entry_is_consistent_and_has_a_source_and_a_date() {
        for (name, entry) in &*ENTRIES {
            assert_eq!(entry.config.check(), Ok(()), "{name}");
            assert!(!entry.source.is_empty(), "{name}");
            let date: Vec<_> = entry.date.split('-').map(str::len).collect();
            assert_eq!(date, [4, 2, 2], "{name}: {}", entry.date);
        }
    }

    #[test]
    fn the_rotary_frequencies_are_those_of_transformers() {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../../../golden/rotary.json")).unwrap();
        let config = find("llama-3.1-8b").unwrap();
        let frequencies = config.rotary.frequencies(config.head_dim);
        let expected = golden["inv_freq"].as_array().unwrap();
        assert_eq!(frequencies.len(), expected.len());
        for (ours, theirs) in frequencies.iter().zip(expected) {
            let theirs = theirs.as_f64().unwrap();
            assert!((f64::from(*ours) - theirs).abs() <= 4e-7 * theirs, "{ours} {theirs}");
        }
    }

    #[test]
    fn a_miss_names_the_nearest_entry() {
        let message = |name| find(name).unwrap_err().to_string();
        assert_eq!(
            message("Llama-3.1-405B-base"),
            "the catalogue has no model `Llama-3.1-405B-base`; the nearest is `llama-3.1-405b`"
        );
        assert!(message("tny").ends_with("`tiny`"));
    }
}
