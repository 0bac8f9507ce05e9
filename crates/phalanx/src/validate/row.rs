//! A row of `measured/steps.csv`: a published step, its configuration and what was measured.

use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// The rows that come with the program.
const ROWS: &str = include_str!("../../../../measured/steps.csv");

/// Whether a row may be looked at when parameters are fitted. Declared in the file before the
/// first fit, by a hash of the configuration, so that repeats of one configuration stay together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Set {
    /// It may.
    Fit,
    /// It may not; it tests what was fitted.
    HeldOut,
}

/// How a source counts FLOPs in its model FLOPs utilization.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MfuCounting {
    /// Every pair of query and key.
    Full,
    /// Pairs with the key not after the query.
    Causal,
    /// Six for each parameter and token, and every pair of query and key.
    SixN,
}

/// A published step. Empty fields are what the source does not say.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    pub id: String,
    pub source: String,
    pub table: String,
    /// The generation of software that was measured, a key of the calibration.
    pub software: String,
    /// The catalogue's model that it is, but for the dimensions that follow.
    pub model: Option<String>,
    pub layers: Option<u32>,
    pub hidden: Option<u64>,
    pub heads: Option<u64>,
    pub kv_heads: Option<u64>,
    pub head_dim: Option<u64>,
    pub feed_forward: Option<u64>,
    pub vocabulary: Option<u64>,
    pub accelerator: String,
    pub accelerators: u32,
    pub fabric: String,
    pub link_gbps: Option<f64>,
    pub per_domain: Option<u32>,
    pub sequence: Option<u64>,
    pub global_batch: Option<u64>,
    pub micro_batch: Option<u64>,
    pub tensor: Option<u32>,
    pub context: Option<u32>,
    pub pipeline: Option<u32>,
    pub virtual_stages: Option<u32>,
    pub expert: Option<u32>,
    /// Says what follows from the rest; kept so that the file can be checked by eye.
    #[serde(rename = "data")]
    pub _data: Option<u32>,
    pub shard: Option<String>,
    pub recompute: Option<String>,
    pub precision: Option<String>,
    /// Words that set options of the layout, separated by `;`.
    pub options: String,
    pub step_time_s: Option<f64>,
    pub mfu_percent: Option<f64>,
    pub mfu_counting: Option<MfuCounting>,
    pub memory_gib: Option<f64>,
    pub set: Set,
    pub note: String,
}

impl Row {
    /// Tokens of a step.
    pub fn tokens(&self) -> Option<f64> {
        Some((self.sequence? * self.global_batch?) as f64)
    }

    /// Whether the row's options have `word`.
    pub fn has(&self, word: &str) -> bool {
        self.options.split(';').any(|option| option == word)
    }
}

/// The built-in rows, or those of a file of the same columns.
pub fn rows(file: Option<&Path>) -> Result<Vec<Row>> {
    let (text, name) = match file {
        None => (ROWS.to_owned(), "the built-in rows".to_owned()),
        Some(path) => {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("cannot read the rows {}", path.display()))?;
            (text, path.display().to_string())
        }
    };
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    reader.deserialize().collect::<Result<_, _>>().context(name)
}
