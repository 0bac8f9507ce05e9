//! How accelerators are joined: scale-up domains, the fabric between them, and the cluster that
//! both make.
//!
//! Links say what the hardware does. What a communication library adds to it (protocols, steps,
//! launches) is the simulator's to model.

use serde::{Deserialize, Serialize};
use units::{BytesPerSecond, Rank, Seconds, Watts};

use crate::Accelerator;

/// A connection in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// From the first byte sent to the first byte received.
    #[serde(rename = "latency_s")]
    pub latency: Seconds,
    /// Most bytes a second that it carries in this direction, whatever it carries in the other.
    #[serde(rename = "bytes_per_s")]
    pub bandwidth: BytesPerSecond,
}

/// How the accelerators of a scale-up domain are joined.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shape {
    /// Every accelerator has one link to a switch that never is the bottleneck (NVSwitch).
    Switched(Link),
    /// Every accelerator has a link of its own to every other one (Infinity Fabric).
    Mesh(Link),
    /// Every accelerator has a link in both directions of each dimension (TPU).
    Torus {
        /// Accelerators along each dimension; ranks fill the last dimension first.
        dims: Vec<u32>,
        /// Whether the ends of a dimension are joined.
        wrap: bool,
        /// The link per dimension and direction.
        link: Link,
    },
}

impl Shape {
    /// One of its links.
    #[must_use]
    pub fn link(&self) -> Link {
        match self {
            Self::Switched(link) | Self::Mesh(link) | Self::Torus { link, .. } => *link,
        }
    }
}

/// Accelerators joined more closely than by the fabric: an NVLink domain, an ICI slice.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Domain {
    /// Accelerators that a job uses of it, such as 64 of the 72 of a rack.
    pub accelerators: u32,
    /// How they are joined.
    pub shape: Shape,
    /// The share of a link's bandwidth that a reduction in the switch reaches (NVLink SHARP);
    /// `None` when the switch cannot reduce.
    pub in_network_reduction: Option<f64>,
}

/// How packets are spread over parallel paths.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Routing {
    /// A hash of addresses and ports picks one path for each flow, so flows may collide.
    Ecmp {
        /// Flows that two accelerators spread their traffic over.
        flows_per_pair: u32,
    },
    /// Switches send each packet, or burst of packets, over the least loaded path.
    Adaptive,
    /// Senders spread the packets of every flow over all paths, and receivers put them in order.
    Spray,
}

/// Switches on one level of a fabric.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tier {
    /// Accelerators below one group of switches of this tier, which reach each other without
    /// going higher.
    pub reach: u32,
    /// Bandwidth into such a group from below over the bandwidth that joins groups of the tier
    /// below it: 1 is full bisection, 7 is 1:7.
    pub oversubscription: f64,
    /// What going up to this tier, instead of the one below, adds to the latency.
    #[serde(rename = "latency_s")]
    pub latency: Seconds,
}

/// The network that joins domains.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Fabric {
    /// Its catalogue name.
    pub name: String,
    /// An accelerator's share of its node's network interfaces, each direction; the latency is that
    /// of sender and receiver together, without switches.
    pub nic: Link,
    /// Accelerators that one interface serves. A lone message may use all of it.
    pub accelerators_per_nic: u32,
    /// Whether the accelerators of equal place in their nodes share a leaf (rail-optimized).
    pub rails: bool,
    /// Its levels, from the leaves up; the last reaches all.
    pub tiers: Vec<Tier>,
    /// How packets are spread over parallel paths.
    pub routing: Routing,
    /// Whether its switches can reduce (SHARP).
    pub in_network_reduction: bool,
    /// Where the numbers come from, and of when they are.
    pub source: String,
}

impl Fabric {
    /// The lowest tier whose groups hold both of two accelerators, by their numbers.
    #[must_use]
    pub fn tier_between(&self, a: Rank, b: Rank) -> usize {
        let joined = |tier: &Tier| a.0 / tier.reach == b.0 / tier.reach;
        self.tiers.iter().position(joined).unwrap_or(self.tiers.len().saturating_sub(1))
    }

    /// The hardware's latency of a message that goes up to a tier.
    #[must_use]
    pub fn latency(&self, tier: usize) -> Seconds {
        let switches = self.tiers.iter().take(tier + 1).map(|tier| tier.latency).sum();
        self.nic.latency + switches
    }
}

/// What a cluster draws beside its accelerators.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Power {
    /// What an accelerator's share of its host draws in training, as measured or by the node's
    /// rating; `None` where nobody says.
    pub host: Option<Watts>,
    /// Facility power over computing power (power usage effectiveness), at least 1.
    pub pue: f64,
}

/// A public list price.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Price {
    /// United States dollars for an accelerator and an hour.
    pub usd_per_accelerator_hour: f64,
    /// Who asks for it, for what.
    pub source: String,
    /// When.
    pub date: String,
}

/// Equal accelerators in equal nodes, joined by scale-up domains and a fabric between those.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cluster {
    /// Its catalogue name, the file it was read from, or what it is made of.
    pub name: String,
    /// What every rank computes on.
    pub accelerator: Accelerator,
    /// Accelerators in all.
    pub accelerators: u32,
    /// Accelerators that share a host, at least 1.
    pub per_node: u32,
    /// What joins neighbouring accelerators. A domain may hold several nodes.
    pub domain: Domain,
    /// What joins domains; `None` when there is only one.
    pub fabric: Option<Fabric>,
    /// What it draws beside its accelerators.
    pub power: Power,
    /// What it costs, where a public list price is known.
    pub price: Option<Price>,
    /// Where the numbers come from, and of when they are.
    pub source: String,
}

impl Cluster {
    /// Whether two ranks share a host. Ranks fill nodes in their order, one per accelerator.
    #[must_use]
    pub fn same_node(&self, a: Rank, b: Rank) -> bool {
        a.0 / self.per_node == b.0 / self.per_node
    }

    /// Whether two ranks are in one scale-up domain. Ranks fill domains in their order.
    #[must_use]
    pub fn same_domain(&self, a: Rank, b: Rank) -> bool {
        a.0 / self.domain.accelerators == b.0 / self.domain.accelerators
    }

    /// The link that a message from `a` to `b` takes, with the latency of all it passes.
    ///
    /// # Panics
    /// When they are in different domains and nothing joins those, which [`Cluster::check`] refuses.
    #[must_use]
    pub fn link(&self, a: Rank, b: Rank) -> Link {
        if self.same_domain(a, b) {
            return self.domain.link(a, b);
        }
        let fabric = self.fabric.as_ref().expect("a cluster of several domains has a fabric");
        let latency = fabric.latency(fabric.tier_between(a, b));
        Link { latency, bandwidth: fabric.nic.bandwidth }
    }
}

impl Domain {
    /// The link between two accelerators of it; over a torus, with the latency of all hops.
    fn link(&self, a: Rank, b: Rank) -> Link {
        let link = self.shape.link();
        let hops = self.hops(a.0 % self.accelerators, b.0 % self.accelerators);
        Link { latency: link.latency * f64::from(hops.max(1)), ..link }
    }

    /// Links of the shortest way between two places of the domain.
    #[must_use]
    pub fn hops(&self, a: u32, b: u32) -> u32 {
        let Shape::Torus { dims, wrap, .. } = &self.shape else { return u32::from(a != b) };
        let (mut a, mut b, mut hops) = (a, b, 0);
        for dim in dims.iter().rev() {
            let apart = (a % dim).abs_diff(b % dim);
            hops += if *wrap { apart.min(dim - apart) } else { apart };
            (a, b) = (a / dim, b / dim);
        }
        hops
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue;

    fn torus(dims: &[u32], wrap: bool) -> Domain {
        let link = Link { latency: Seconds(1e-6), bandwidth: BytesPerSecond(1e9) };
        Domain {
            accelerators: dims.iter().product(),
            shape: Shape::Torus { dims: dims.to_vec(), wrap, link },
            in_network_reduction: None,
        }
    }

    /// From all sizes up to 4 x 4 x 4, against a walk over the links.
    #[test]
    fn hops_are_the_shortest_way_over_the_links() {
        for dims in (0..64).map(|code| [code / 16 + 1, code / 4 % 4 + 1, code % 4 + 1]) {
            for wrap in [false, true] {
                let domain = torus(&dims, wrap);
                let walked = walk(&dims, wrap);
                let counted: Vec<u32> =
                    (0..domain.accelerators).map(|to| domain.hops(0, to)).collect();
                assert_eq!(counted, walked, "{dims:?}, wrap {wrap}");
            }
        }
    }

    /// Hops from the first accelerator to every other one, a step at a time.
    fn walk(dims: &[u32; 3], wrap: bool) -> Vec<u32> {
        let mut hops = vec![u32::MAX; dims.iter().product::<u32>() as usize];
        let (mut reached, mut distance) = (vec![0], 0);
        while !reached.is_empty() {
            for place in &reached {
                hops[*place as usize] = distance;
            }
            distance += 1;
            let next = reached.iter().flat_map(|place| neighbours(*place, dims, wrap));
            reached = next.filter(|place| hops[*place as usize] == u32::MAX).collect();
            reached.sort_unstable();
            reached.dedup();
        }
        hops
    }

    fn neighbours(place: u32, dims: &[u32; 3], wrap: bool) -> Vec<u32> {
        let strides = [dims[1] * dims[2], dims[2], 1];
        let along = |dim: usize| {
            let (size, stride) = (dims[dim], strides[dim]);
            let at = place / stride % size;
            let base = place - at * stride;
            let up = (at + 1 < size || wrap).then(|| base + (at + 1) % size * stride);
            let down = (at > 0 || wrap).then(|| base + (at + size - 1) % size * stride);
            [up, down].into_iter().flatten()
        };
        (0..3).flat_map(along).collect()
    }

    #[test]
    fn a_message_goes_up_to_the_lowest_tier_that_joins_both() {
        let meta = catalogue::fabric("roce-meta-400g").unwrap();
        let tier = |a, b| meta.tier_between(Rank(a), Rank(b));
        assert_eq!([tier(0, 15), tier(0, 16), tier(15, 3071), tier(0, 3072)], [0, 1, 1, 2]);
        let latencies: Vec<f64> = (0..3).map(|tier| meta.latency(tier).0).collect();
        assert!(latencies.is_sorted(), "{latencies:?}");
    }
}
