//! The hardware that comes with Phalanx. Every entry names its source and the source's date.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use thiserror::Error;
use units::{Bytes, BytesPerSecond, FlopsPerSecond, Seconds};

use crate::{Accelerator, Cluster, Link, Precision};

const ACCELERATORS: &str = include_str!("../../../catalogue/accelerators.toml");
const CLUSTERS: &str = include_str!("../../../catalogue/clusters.toml");

/// A name that the catalogue does not have.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("the catalogue has no {what} `{name}`; did you mean `{nearest}`? It has: {}", known.join(", "))]
pub struct Unknown {
    /// What was looked for.
    pub what: &'static str,
    /// The name that was given.
    pub name: String,
    /// The entry spelled most like it.
    pub nearest: String,
    /// All entries.
    pub known: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AcceleratorEntry {
    source: String,
    date: String,
    memory_bytes: f64,
    memory_bytes_per_s: BytesPerSecond,
    peak_flops: BTreeMap<Precision, FlopsPerSecond>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ClusterEntry {
    source: String,
    date: String,
    accelerator: String,
    accelerators: u32,
    per_node: u32,
    inside: LinkEntry,
    between: LinkEntry,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LinkEntry {
    latency_s: Seconds,
    bytes_per_s: BytesPerSecond,
}

impl From<LinkEntry> for Link {
    fn from(entry: LinkEntry) -> Self {
        Self { latency: entry.latency_s, bandwidth: entry.bytes_per_s }
    }
}

/// The cluster called `name`.
///
/// # Errors
/// [`Unknown`] with the nearest name when the catalogue has no such cluster.
pub fn find(name: &str) -> Result<Cluster, Unknown> {
    let entry: ClusterEntry = entry("cluster", CLUSTERS, name)?;
    Ok(Cluster {
        name: name.to_owned(),
        accelerator: accelerator(&entry.accelerator)?,
        accelerators: entry.accelerators,
        per_node: entry.per_node,
        inside: entry.inside.into(),
        between: entry.between.into(),
        source: format!("{} ({})", entry.source, entry.date),
    })
}

/// The accelerator called `name`.
///
/// # Errors
/// [`Unknown`] with the nearest name when the catalogue has no such accelerator.
pub fn accelerator(name: &str) -> Result<Accelerator, Unknown> {
    let entry: AcceleratorEntry = entry("accelerator", ACCELERATORS, name)?;
    Ok(Accelerator {
        name: name.to_owned(),
        memory: Bytes(entry.memory_bytes as u64),
        memory_bandwidth: entry.memory_bytes_per_s,
        peak: entry.peak_flops,
        source: format!("{} ({})", entry.source, entry.date),
    })
}

fn entry<Entry: DeserializeOwned>(
    what: &'static str,
    catalogue: &str,
    name: &str,
) -> Result<Entry, Unknown> {
    let mut entries = read(catalogue);
    entries.remove(name).ok_or_else(|| Unknown {
        what,
        name: name.to_owned(),
        nearest: nearest(name, &entries),
        known: entries.into_keys().collect(),
    })
}

/// The catalogue is part of the program, so an entry that cannot be read is a bug.
fn read<Entry: DeserializeOwned>(catalogue: &str) -> BTreeMap<String, Entry> {
    toml::from_str(catalogue).unwrap_or_else(|error| panic!("the built-in catalogue: {error}"))
}

fn nearest<Entry>(name: &str, entries: &BTreeMap<String, Entry>) -> String {
    let distance = |known: &&String| strsim::damerau_levenshtein(name, known);
    entries.keys().min_by_key(distance).cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cluster_has_an_accelerator_a_source_and_a_date() {
        for (name, entry) in read::<ClusterEntry>(CLUSTERS) {
            let cluster = find(&name).unwrap();
            assert_eq!(cluster.accelerators % cluster.per_node, 0, "{name}");
            assert!(cluster.inside.bandwidth > cluster.between.bandwidth, "{name}");
            assert!(!entry.source.is_empty() && !entry.date.is_empty(), "{name}");
        }
    }

    #[test]
    fn every_accelerator_is_faster_in_fewer_bits() {
        for (name, entry) in read::<AcceleratorEntry>(ACCELERATORS) {
            let peaks: Vec<_> = accelerator(&name).unwrap().peak.into_values().collect();
            assert!(peaks.is_sorted(), "{name}");
            assert!(!entry.source.is_empty() && !entry.date.is_empty(), "{name}");
        }
    }

    #[test]
    fn a_miss_names_the_nearest_entry() {
        let miss = find("dgx-h100-quantum").unwrap_err();
        assert_eq!(miss.nearest, "dgx-h100-quantum2");
        assert_eq!(accelerator("h100").unwrap_err().nearest, "h100-sxm");
    }

    #[test]
    fn numbers_keep_their_units() {
        let h100 = accelerator("h100-sxm").unwrap();
        assert_eq!(h100.peak[&Precision::Bf16].to_string(), "989.40 TFLOP/s");
        assert_eq!(h100.memory_bandwidth.to_string(), "3.35 TB/s");
    }
}
