//! The hardware that comes with Phalanx, and files of the same form. Every entry names its source
//! and the source's date.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::LazyLock;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use units::{Bytes, BytesPerSecond, FlopsPerSecond, Hertz, Watts};

use crate::energy::LOADED_SHARE;
use crate::{
    Accelerator, Cluster, Composition, Error, Fabric, Generation, Link, Precision, Routing, Shape,
    Tier,
};

/// What the catalogue has entries of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "as their names say")]
pub enum Kind {
    Accelerator,
    Node,
    Fabric,
    Cluster,
}

impl Kind {
    /// All of them, parts before wholes.
    pub const ALL: [Self; 4] = [Self::Accelerator, Self::Node, Self::Fabric, Self::Cluster];

    /// Its entries as they are written down, by name. Keys say their unit.
    #[must_use]
    pub fn entries(self) -> &'static toml::Table {
        static ENTRIES: LazyLock<[toml::Table; 4]> = LazyLock::new(|| {
            [
                include_str!("../../../catalogue/accelerators.toml"),
                include_str!("../../../catalogue/nodes.toml"),
                include_str!("../../../catalogue/fabrics.toml"),
                include_str!("../../../catalogue/clusters.toml"),
            ]
            .map(read)
        });
        &ENTRIES[self as usize]
    }

    /// The names of its entries.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        self.entries().keys().map(String::as_str)
    }
}

/// The catalogue is part of the program, so one that cannot be read is a bug.
fn read(text: &str) -> toml::Table {
    text.parse().unwrap_or_else(|error| panic!("the built-in catalogue: {error}"))
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Accelerator => "accelerator",
            Self::Node => "node",
            Self::Fabric => "fabric",
            Self::Cluster => "cluster",
        })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AcceleratorEntry {
    source: String,
    date: String,
    generation: Generation,
    multiprocessors: u32,
    boost_clock_hz: Hertz,
    memory_bytes: Bytes,
    memory_bytes_per_s: BytesPerSecond,
    l2_bytes: Bytes,
    peak_flops: BTreeMap<Precision, FlopsPerSecond>,
    tdp_w: Option<Watts>,
    idle_w: Option<Watts>,
    node: Option<String>,
}

/// A node, and the scale-up domain that it is or is part of.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NodeEntry {
    pub(crate) source: String,
    pub(crate) date: String,
    /// Accelerators that share a host.
    pub(crate) per_node: u32,
    /// Accelerators that a job uses of a domain.
    pub(crate) per_domain: u32,
    pub(crate) shape: Shape,
    pub(crate) in_network_reduction: Option<f64>,
    /// The size from which the ends of a torus are joined.
    #[serde(default)]
    pub(crate) wraps_from: u32,
    /// Most that the node draws, its accelerators included.
    pub(crate) max_power_w: Option<Watts>,
    /// What the node was measured to draw in training, beside its accelerators.
    pub(crate) host_power_w: Option<Watts>,
}

impl NodeEntry {
    /// What an accelerator's share of the host draws.
    pub(crate) fn host_power(&self, accelerator: &Accelerator) -> Option<Watts> {
        let share = 1.0 / f64::from(self.per_node);
        let measured = self.host_power_w.map(|host| host * share);
        let rated = || Some(self.max_power_w? * share - accelerator.tdp?);
        measured.or_else(|| Some(rated()? * LOADED_SHARE))
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FabricEntry {
    source: String,
    date: String,
    nic: Link,
    #[serde(default = "one")]
    accelerators_per_nic: u32,
    rails: bool,
    tiers: Vec<Tier>,
    routing: Routing,
    in_network_reduction: bool,
}

fn one() -> u32 {
    1
}

/// The cluster called `name`: of the catalogue, or in a file whose name ends in `.toml`.
///
/// # Errors
/// When the catalogue has no such cluster, and when the file cannot be read or is no cluster.
pub fn find(name: &str) -> Result<Cluster, Error> {
    composition(name)?.build(name)
}

/// The parts of the cluster called `name`, as they are written down.
///
/// # Errors
/// As [`find`].
pub fn composition(name: &str) -> Result<Composition, Error> {
    if Path::new(name).extension().is_none_or(|extension| extension != "toml") {
        return entry(Kind::Cluster, name);
    }
    let unreadable = |error: std::io::Error| Error::Unreadable {
        path: name.to_owned(),
        reason: error.to_string(),
    };
    let text = std::fs::read_to_string(name).map_err(unreadable)?;
    toml::from_str(&text).map_err(|error| malformed(name, &error))
}

/// The accelerator called `name`.
///
/// # Errors
/// [`Error::Unknown`] with the nearest name when the catalogue has no such accelerator.
pub fn accelerator(name: &str) -> Result<Accelerator, Error> {
    accelerator_of(&toml::Value::String(name.to_owned()))
}

/// The fabric called `name`.
///
/// # Errors
/// [`Error::Unknown`] with the nearest name when the catalogue has no such fabric.
pub fn fabric(name: &str) -> Result<Fabric, Error> {
    fabric_of(&toml::Value::String(name.to_owned()))
}

/// An accelerator by name or in full.
pub(crate) fn accelerator_of(value: &toml::Value) -> Result<Accelerator, Error> {
    let (name, entry): (_, AcceleratorEntry) = part(Kind::Accelerator, value)?;
    Ok(Accelerator {
        name,
        generation: entry.generation,
        multiprocessors: entry.multiprocessors,
        boost_clock: entry.boost_clock_hz,
        memory: entry.memory_bytes,
        memory_bandwidth: entry.memory_bytes_per_s,
        l2: entry.l2_bytes,
        peak: entry.peak_flops,
        tdp: entry.tdp_w,
        idle: entry.idle_w,
        node: entry.node,
        source: format!("{} ({})", entry.source, entry.date),
    })
}

/// A node by name or in full.
pub(crate) fn node_of(value: &toml::Value) -> Result<NodeEntry, Error> {
    Ok(part(Kind::Node, value)?.1)
}

/// A fabric by name or in full.
pub(crate) fn fabric_of(value: &toml::Value) -> Result<Fabric, Error> {
    let (name, entry): (_, FabricEntry) = part(Kind::Fabric, value)?;
    Ok(Fabric {
        name,
        nic: entry.nic,
        accelerators_per_nic: entry.accelerators_per_nic,
        rails: entry.rails,
        tiers: entry.tiers,
        routing: entry.routing,
        in_network_reduction: entry.in_network_reduction,
        source: format!("{} ({})", entry.source, entry.date),
    })
}

/// A part of a cluster: an entry of the catalogue by its name, or a table of the same form.
fn part<Entry: DeserializeOwned>(
    kind: Kind,
    value: &toml::Value,
) -> Result<(String, Entry), Error> {
    if let Some(name) = value.as_str() {
        return Ok((name.to_owned(), entry(kind, name)?));
    }
    let entry = value.clone().try_into().map_err(|error| malformed(&kind.to_string(), &error))?;
    Ok((format!("this {kind}"), entry))
}

fn entry<Entry: DeserializeOwned>(kind: Kind, name: &str) -> Result<Entry, Error> {
    let Some(entry) = kind.entries().get(name) else {
        return Err(Error::Unknown { kind, name: name.to_owned(), nearest: nearest(name, kind) });
    };
    entry.clone().try_into().map_err(|error| malformed(name, &error))
}

/// The entry spelled most like `name`. A common beginning counts most, since names grow at the end.
fn nearest(name: &str, kind: Kind) -> String {
    let name = name.to_lowercase();
    let alike = |known: &&str| strsim::jaro_winkler(&name, known);
    kind.names().max_by(|a, b| alike(a).total_cmp(&alike(b))).unwrap_or_default().to_owned()
}

fn malformed(place: &str, error: &toml::de::Error) -> Error {
    Error::Malformed { place: place.to_owned(), reason: error.to_string().trim_end().to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use units::Rank;

    #[test]
    fn every_cluster_can_be_built() {
        for name in Kind::Cluster.names() {
            let cluster = find(name).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(cluster.accelerators % cluster.per_node, 0, "{name}");
        }
    }

    #[test]
    fn every_part_can_be_read() {
        for name in Kind::Accelerator.names() {
            let found = accelerator(name).unwrap_or_else(|error| panic!("{error}"));
            let floats = found.peak.iter().filter(|(precision, _)| **precision != Precision::Int8);
            let peaks: Vec<_> = floats.map(|(_, peak)| peak).collect();
            assert!(peaks.is_sorted(), "{name}: fewer bits are never slower");
            assert!(found.idle.is_none_or(|idle| Some(idle) < found.tdp), "{name}");
            let node = found.node.expect("every accelerator comes in a node");
            node_of(&toml::Value::String(node)).unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        for name in Kind::Fabric.names() {
            fabric(name).unwrap_or_else(|error| panic!("{error}"));
        }
        for name in Kind::Node.names() {
            node_of(&toml::Value::String(name.to_owned()))
                .unwrap_or_else(|error| panic!("{error}"));
        }
    }

    /// Each unit does a power of two of operations a cycle, so a wrong count, clock or peak shows.
    #[test]
    fn the_peak_of_products_follows_from_units_and_clock() {
        for name in Kind::Accelerator.names() {
            let found = accelerator(name).unwrap();
            let cycles = f64::from(found.multiprocessors) * found.boost_clock.0;
            let exponent = (found.peak[&Precision::Bf16].0 / cycles).log2();
            assert!((exponent - exponent.round()).abs() < 0.005, "{name}: 2^{exponent}");
        }
    }

    #[test]
    fn a_miss_names_the_nearest_entry() {
        let nearest = |error| match error {
            Error::Unknown { nearest, .. } => nearest,
            other => panic!("{other}"),
        };
        assert_eq!(nearest(find("dgx-h100-quantum").unwrap_err()), "dgx-h100-quantum2");
        assert_eq!(nearest(accelerator("H100").unwrap_err()), "h100-sxm");
        assert_eq!(nearest(fabric("quantum").unwrap_err()), "quantum-hdr");
    }

    #[test]
    fn numbers_keep_their_units() {
        let h100 = accelerator("h100-sxm").unwrap();
        assert_eq!(h100.peak[&Precision::Bf16].to_string(), "989.40 TFLOP/s");
        assert_eq!(h100.memory_bandwidth.to_string(), "3.35 TB/s");
        assert_eq!(h100.tdp, Some(Watts(700.0)));
    }

    #[test]
    fn ranks_of_one_domain_talk_over_its_link() {
        let cluster = find("dgx-h100-quantum2").unwrap();
        let fabric = cluster.fabric.as_ref().unwrap();
        assert_eq!(cluster.link(Rank(8), Rank(15)).bandwidth, BytesPerSecond(450e9));
        assert_eq!(cluster.link(Rank(7), Rank(8)).bandwidth, fabric.nic.bandwidth);
        assert!(
            cluster.link(Rank(0), Rank(4095)).latency >= cluster.link(Rank(7), Rank(8)).latency
        );
    }

    #[test]
    fn a_precision_is_written_as_in_a_job_file() {
        #[derive(Deserialize)]
        struct Training {
            precision: Precision,
        }
        for precision in Precision::ALL {
            let text = format!("precision = \"{precision}\"");
            let training: Training = toml::from_str(&text).unwrap();
            assert_eq!(training.precision, precision);
        }
    }
}
