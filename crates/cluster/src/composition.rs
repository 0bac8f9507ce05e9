//! A cluster as it is written down: parts by name or in full, and what is to be different.

use serde::{Deserialize, Serialize};
use units::BytesPerSecond;

use crate::catalogue::{self, NodeEntry};
use crate::{Cluster, Domain, Error, Power, Price, Shape};

/// How much of a scale-up domain is used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PerDomain {
    /// So many accelerators; of a torus, the most cubic one of that size.
    Accelerators(u32),
    /// A torus of these dimensions.
    Torus(Vec<u32>),
}

/// A cluster by its parts. What is left out comes from the accelerator's usual node, which has no
/// fabric: one domain needs none.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Composition {
    /// A catalogue name, or the accelerator in full.
    pub accelerator: Option<toml::Value>,
    /// Accelerators in all.
    pub accelerators: Option<u32>,
    /// A catalogue name, or the node and its scale-up domain in full.
    pub node: Option<toml::Value>,
    /// A catalogue name, or the fabric in full.
    pub fabric: Option<toml::Value>,
    /// Accelerators that share a host.
    pub per_node: Option<u32>,
    /// Accelerators of a scale-up domain.
    pub per_domain: Option<PerDomain>,
    /// Gbit/s that the fabric gives to an accelerator in each direction.
    pub link_gbps_per_accelerator: Option<f64>,
    /// Facility power over computing power.
    pub pue: Option<f64>,
    /// A public list price.
    pub price: Option<Price>,
    /// Where the numbers come from.
    pub source: Option<String>,
    /// Of when they are.
    pub date: Option<String>,
}

/// Facility power over computing power where an operator publishes none: the highest that an
/// operator of those in `catalogue/clusters.toml` publishes (1.08 to 1.2). Large data centres of
/// all kinds average 1.57 (Uptime Institute survey 2021, by cnbc.com 2022-04).
const USUAL_PUE: f64 = 1.2;

impl Composition {
    /// These parts, and those of `base` where they are left out.
    #[must_use]
    pub fn over(self, base: Self) -> Self {
        Self {
            accelerator: self.accelerator.or(base.accelerator),
            accelerators: self.accelerators.or(base.accelerators),
            node: self.node.or(base.node),
            fabric: self.fabric.or(base.fabric),
            per_node: self.per_node.or(base.per_node),
            per_domain: self.per_domain.or(base.per_domain),
            link_gbps_per_accelerator: self
                .link_gbps_per_accelerator
                .or(base.link_gbps_per_accelerator),
            pue: self.pue.or(base.pue),
            price: self.price.or(base.price),
            source: self.source.or(base.source),
            date: self.date.or(base.date),
        }
    }

    /// The cluster that the parts make.
    ///
    /// # Errors
    /// When a part is unknown, missing or malformed, and when they do not fit together.
    pub fn build(&self, name: &str) -> Result<Cluster, Error> {
        let missing = |key: &str| Error::Unfit {
            cluster: name.to_owned(),
            reason: format!("`{key}` is missing"),
        };
        let accelerator = self.accelerator.as_ref().ok_or_else(|| missing("accelerator"))?;
        let accelerator = catalogue::accelerator_of(accelerator)?;
        let usual = accelerator.node.clone().map(toml::Value::String);
        let node = self.node.clone().or(usual).ok_or_else(|| missing("node"))?;
        let node = catalogue::node_of(&node)?;
        let domain = self.domain(name, &node)?;
        let cluster = Cluster {
            name: name.to_owned(),
            accelerators: self.accelerators.ok_or_else(|| missing("accelerators"))?,
            per_node: self.per_node.unwrap_or(node.per_node.min(domain.accelerators)),
            domain,
            fabric: self.fabric(name)?,
            power: Power {
                host: node.host_power(&accelerator),
                pue: self.pue.unwrap_or(USUAL_PUE),
            },
            price: self.price.clone(),
            source: self.source(&node),
            accelerator,
        };
        cluster.check()?;
        Ok(cluster)
    }

    fn source(&self, node: &NodeEntry) -> String {
        let of = |source: &str, date: &str| format!("{source} ({date})");
        match (&self.source, &self.date) {
            (Some(source), Some(date)) => of(source, date),
            _ => of(&node.source, &node.date),
        }
    }

    fn fabric(&self, name: &str) -> Result<Option<crate::Fabric>, Error> {
        let mut fabric = self.fabric.as_ref().map(catalogue::fabric_of).transpose()?;
        let Some(gbps) = self.link_gbps_per_accelerator else { return Ok(fabric) };
        let Some(fabric) = &mut fabric else {
            let reason = "link_gbps_per_accelerator needs a fabric".to_owned();
            return Err(Error::Unfit { cluster: name.to_owned(), reason });
        };
        fabric.nic.bandwidth = BytesPerSecond(gbps * 1e9 / 8.0);
        Ok(Some(fabric.clone()))
    }

    fn domain(&self, name: &str, node: &NodeEntry) -> Result<Domain, Error> {
        let mut domain = Domain {
            accelerators: node.per_domain,
            shape: node.shape.clone(),
            in_network_reduction: node.in_network_reduction,
        };
        match &self.per_domain {
            None => {}
            Some(PerDomain::Accelerators(accelerators)) => {
                domain.accelerators = *accelerators;
                if let Shape::Torus { dims, .. } = &mut domain.shape {
                    *dims = most_cubic(*accelerators, dims.len());
                }
            }
            Some(PerDomain::Torus(chosen)) => {
                let Shape::Torus { dims, .. } = &mut domain.shape else {
                    let reason = format!("per_domain = {chosen:?}, but the domain is no torus");
                    return Err(Error::Unfit { cluster: name.to_owned(), reason });
                };
                dims.clone_from(chosen);
                let size = dims.iter().try_fold(1_u32, |size, dim| size.checked_mul(*dim));
                domain.accelerators = size.ok_or_else(|| Error::Unfit {
                    cluster: name.to_owned(),
                    reason: format!("per_domain = {chosen:?} is too large"),
                })?;
            }
        }
        if let Shape::Torus { wrap, .. } = &mut domain.shape {
            *wrap &= domain.accelerators >= node.wraps_from;
        }
        Ok(domain)
    }
}

/// The dimensions of a torus of `size` whose longest is shortest, in ascending order.
fn most_cubic(size: u32, dimensions: usize) -> Vec<u32> {
    if dimensions <= 1 {
        return vec![size];
    }
    let root = f64::from(size).powf(1.0 / dimensions as f64).round() as u32;
    let divides = |dim: &u32| size.is_multiple_of(*dim);
    let first = (1..=root.max(1)).rev().find(divides).unwrap_or(1);
    let mut dims = vec![first];
    dims.extend(most_cubic(size / first, dimensions - 1));
    dims.sort_unstable();
    dims
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compose(text: &str) -> Result<Cluster, Error> {
        toml::from_str::<Composition>(text).unwrap().build("test")
    }

    #[test]
    fn a_torus_is_as_cubic_as_its_size_allows() {
        assert_eq!(most_cubic(4096, 3), [16, 16, 16]);
        assert_eq!(most_cubic(256, 2), [16, 16]);
        assert_eq!(most_cubic(128, 2), [8, 16]);
    }

    #[test]
    fn what_is_given_replaces_what_the_parts_have() {
        let cluster = compose(
            "accelerator = 'h100-sxm'\naccelerators = 64\nfabric = 'quantum2-ndr'\nlink_gbps_per_accelerator = 200\nper_domain = 16",
        )
        .unwrap();
        assert_eq!((cluster.per_node, cluster.domain.accelerators), (8, 16));
        assert_eq!(cluster.fabric.unwrap().nic.bandwidth, BytesPerSecond(25e9));
        let half = compose("accelerator = 'h100-sxm'\naccelerators = 4\nper_domain = 4").unwrap();
        assert_eq!(half.per_node, 4);
    }

    #[test]
    fn what_does_not_fit_says_what_to_change() {
        let error = |text| compose(text).unwrap_err().to_string();
        let alone = error("accelerator = 'h100-sxm'\naccelerators = 64");
        assert!(alone.contains("name one, such as fabric"), "{alone}");
        let odd = error("accelerator = 'h100-sxm'\naccelerators = 8\nper_node = 3");
        assert!(odd.contains("not a multiple"), "{odd}");
        let linked =
            error("accelerator = 'h100-sxm'\naccelerators = 8\nlink_gbps_per_accelerator = 4");
        assert!(linked.contains("needs a fabric"), "{linked}");
        let huge = error("accelerator = 'tpu-v4'\naccelerators = 8\nper_domain = [65536, 65536]");
        assert!(huge.contains("is too large"), "{huge}");
        assert_eq!(error("accelerators = 8"), "cluster test: `accelerator` is missing");
    }
}
