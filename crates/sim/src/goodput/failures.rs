//! How often nodes fail: the published records.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use serde::Deserialize;
use units::Seconds;

/// The accelerators of the nodes that rates are counted for.
pub const NODE: u32 = 8;

const DAY: f64 = 86_400.0;

/// A published rate of failures.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Failures {
    /// Who counted what.
    pub source: String,
    /// When.
    pub date: String,
    /// Failures in 1,000 days of a node of 8 accelerators.
    pub per_1000_node_days: f64,
    /// How many had which cause, where that is said.
    #[serde(default)]
    pub causes: BTreeMap<String, u32>,
    /// The causes that may take several nodes at once.
    #[serde(default)]
    correlated: Vec<String>,
}

impl Failures {
    /// The records that come with the program, by name.
    #[must_use]
    pub fn published() -> &'static BTreeMap<String, Self> {
        static RECORDS: LazyLock<BTreeMap<String, Failures>> = LazyLock::new(|| {
            let text = include_str!("../../../../measured/failures.toml");
            toml::from_str(text).unwrap_or_else(|error| panic!("the built-in failures: {error}"))
        });
        &RECORDS
    }

    /// The mean time between failures of a job on so many accelerators.
    #[must_use]
    pub fn between(per_1000_node_days: f64, accelerators: u32) -> Seconds {
        let nodes = f64::from(accelerators) / f64::from(NODE);
        Seconds(1000.0 * DAY / (per_1000_node_days * nodes))
    }

    /// The share of failures that take one node only, so that a copy of its state in another's
    /// memory is left.
    #[must_use]
    pub fn single(&self) -> f64 {
        let all: u32 = self.causes.values().sum();
        let several = |name| self.causes.get(name).copied().unwrap_or_default();
        let several: u32 = self.correlated.iter().map(several).sum();
        if all == 0 { 1.0 } else { 1.0 - f64::from(several) / f64::from(all) }
    }
}
