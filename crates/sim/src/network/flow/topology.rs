//! Links, and which of them a message takes.

use cluster::{Cluster, Domain, Fabric, Link, Routing, Shape};
use units::{Rank, Seconds};

/// The links of a cluster, each one direction of a wire or of a bundle of wires.
#[derive(Debug, Clone)]
pub struct Topology {
    /// Bytes a second that each link carries.
    bandwidth: Vec<f64>,
    ranks: u32,
    domain: Domain,
    /// The first link of each part; see [`Parts`].
    parts: Parts,
    fabric: Option<Fabric>,
}

/// Where the links of each part begin.
#[derive(Debug, Clone, Default)]
struct Parts {
    /// Two for each rank: out and in.
    ports: u32,
    /// For each tier that can be the bottleneck: who shares its links, and where they begin.
    uplinks: Vec<Uplinks>,
}

/// Links between groups of a tier and what joins them.
#[derive(Debug, Clone)]
struct Uplinks {
    /// The tier that is reached over them.
    tier: usize,
    /// Accelerators below each group.
    below: u32,
    /// Links of a group in each direction, of which a message takes one by a hash.
    each: u32,
    first: u32,
}

/// The links that a message takes, and how long its last byte is under way when it has left.
#[derive(Debug, Clone, PartialEq)]
pub struct Way {
    /// By number.
    pub links: Vec<u32>,
    /// Of all hops.
    pub latency: Seconds,
}

impl Topology {
    /// The links among the first `ranks` accelerators of a cluster: one port to a switch or a link
    /// to each neighbour inside a domain, a port to the fabric, and between groups of each tier the
    /// uplinks that may be too few: one bundle where packets are spread over them, else one of them
    /// for each pair of ranks, by a hash.
    #[must_use]
    pub fn new(cluster: &Cluster, ranks: u32) -> Self {
        let domain = cluster.domain.clone();
        let link = domain.shape.link().bandwidth.0;
        let mut bandwidth = vec![link; (ranks * per_rank(&domain)) as usize];
        let mut parts = Parts::default();
        let fabric = cluster.fabric.clone().filter(|_| ranks > domain.accelerators);
        if let Some(fabric) = &fabric {
            parts.ports = bandwidth.len() as u32;
            bandwidth.resize(bandwidth.len() + 2 * ranks as usize, fabric.nic.bandwidth.0);
            parts.uplinks = uplinks(fabric, ranks, domain.accelerators, &mut bandwidth);
        }
        Self { bandwidth, ranks, domain, parts, fabric }
    }

    /// How many links there are.
    #[must_use]
    pub fn links(&self) -> usize {
        self.bandwidth.len()
    }

    /// Bytes a second that a link carries.
    #[must_use]
    pub fn bandwidth(&self, link: u32) -> f64 {
        self.bandwidth[link as usize]
    }

    /// The link of rank 0 that is like this one; `None` where there is none, because of a hash or
    /// because one of the two is faster.
    pub(super) fn fold(&self, link: u32) -> Option<u32> {
        let per_rank = per_rank(&self.domain);
        let of_group = self.parts.uplinks.iter().rev().find(|up| up.first <= link);
        let like = match of_group {
            Some(up) if up.each > 1 => return None,
            Some(up) => up.first + (link - up.first) % 2,
            None if self.fabric.is_some() && link >= self.parts.ports => {
                self.parts.ports + (link - self.parts.ports) % 2
            }
            None => link % per_rank,
        };
        (self.bandwidth(like) == self.bandwidth(link)).then_some(like)
    }

    /// Bytes a second that each of a link's ranks has when all use it.
    pub(super) fn share(&self, link: u32) -> f64 {
        let of_group = self.parts.uplinks.iter().rev().find(|up| up.first <= link);
        let ranks = of_group.map_or(1, |up| up.below.min(self.ranks));
        self.bandwidth(link) / f64::from(ranks)
    }

    /// Makes a link slower, or faster: a degraded cable, a port at half its speed.
    ///
    /// # Panics
    /// When nothing would be left, or there is no such link.
    pub fn scale(&mut self, link: u32, factor: f64) {
        assert!(factor > 0.0 && factor.is_finite(), "a link at {factor} of its bandwidth");
        self.bandwidth[link as usize] *= factor;
    }

    /// The way of a message.
    ///
    /// # Panics
    /// When a rank is not in the topology.
    #[must_use]
    pub fn way(&self, from: Rank, to: Rank) -> Way {
        assert!(from.0 < self.ranks && to.0 < self.ranks, "{from} to {to} of {}", self.ranks);
        let size = self.domain.accelerators;
        let inside = from.0 / size == to.0 / size;
        match &self.fabric {
            Some(fabric) if !inside => self.way_outside(fabric, from, to),
            _ => self.way_inside(from, to),
        }
    }

    fn way_inside(&self, from: Rank, to: Rank) -> Way {
        let Link { latency, .. } = self.domain.shape.link();
        match &self.domain.shape {
            Shape::Switched(_) => Way { links: vec![2 * from.0, 2 * to.0 + 1], latency },
            Shape::Mesh(_) => {
                let size = self.domain.accelerators;
                Way { links: vec![from.0 * size + to.0 % size], latency }
            }
            Shape::Torus { dims, wrap, .. } => {
                let links = torus_way(dims, *wrap, from.0, to.0);
                let latency = latency * links.len() as f64;
                Way { links, latency }
            }
        }
    }

    fn way_outside(&self, fabric: &Fabric, from: Rank, to: Rank) -> Way {
        let tier = fabric.tier_between(from, to);
        let mut links = vec![self.parts.ports + 2 * from.0];
        for up in self.parts.uplinks.iter().filter(|up| up.tier <= tier) {
            let (source, target) = (from.0 / up.below, to.0 / up.below);
            if source != target {
                let taken = hash(from, to) % up.each;
                links.push(up.first + (2 * source) * up.each + taken);
                links.push(up.first + (2 * target + 1) * up.each + taken);
            }
        }
        links.push(self.parts.ports + 2 * to.0 + 1);
        Way { links, latency: fabric.latency(tier) }
    }
}

/// Links inside the domain that belong to a rank.
fn per_rank(domain: &Domain) -> u32 {
    match &domain.shape {
        Shape::Switched(_) => 2,
        Shape::Mesh(_) => domain.accelerators,
        Shape::Torus { dims, .. } => 2 * dims.len() as u32,
    }
}

/// The uplinks of every tier where they have less bandwidth than the ports below, or where a hash
/// may put several flows on one.
fn uplinks(fabric: &Fabric, ranks: u32, domain: u32, bandwidth: &mut Vec<f64>) -> Vec<Uplinks> {
    let hashed = matches!(fabric.routing, Routing::Ecmp { .. });
    let (mut below, mut over, mut all) = (domain, 1.0, Vec::new());
    for (tier, level) in fabric.tiers.iter().enumerate() {
        over *= level.oversubscription;
        let reach = std::mem::replace(&mut below, level.reach);
        if ranks <= reach || (over == 1.0 && !(hashed && tier > 0)) {
            continue;
        }
        let ports = f64::from(reach.min(ranks)) / over;
        let each = if hashed { (ports.round() as u32).max(1) } else { 1 };
        let first = bandwidth.len() as u32;
        let groups = ranks.div_ceil(reach);
        let link = fabric.nic.bandwidth.0 * ports / f64::from(each);
        bandwidth.resize(bandwidth.len() + (2 * groups * each) as usize, link);
        all.push(Uplinks { tier, below: reach, each, first });
    }
    all
}

/// Links dim by dim, the last first, each the shorter way around. A rank's links are numbered by dim
/// and direction, and belong to the rank that they leave.
fn torus_way(dims: &[u32], wrap: bool, from: u32, to: u32) -> Vec<u32> {
    let (mut at, mut weight, mut links) = (from, 1, Vec::new());
    for (dim, &size) in dims.iter().enumerate().rev() {
        let (here, there) = (at / weight % size, to / weight % size);
        let ahead = (there + size - here) % size;
        let forward = if wrap { 2 * ahead <= size } else { there > here };
        let hops = if forward { ahead } else { size - ahead } % size;
        for _ in 0..hops {
            links.push(at * 2 * dims.len() as u32 + 2 * dim as u32 + u32::from(!forward));
            let place = at / weight % size;
            let next = (place + if forward { 1 } else { size - 1 }) % size;
            at = at - place * weight + next * weight;
        }
        weight *= size;
    }
    links
}

/// What a switch makes of a pair of addresses (splitmix64).
fn hash(from: Rank, to: Rank) -> u32 {
    let mut mixed = (u64::from(from.0) << 32 | u64::from(to.0)).wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (mixed ^ (mixed >> 31)) as u32 >> 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torus_is_crossed_dim_by_dim_the_shorter_way() {
        // Ranks of a 4 x 4 torus have links 4 r + (2 for the last dim) + (1 for backward).
        assert_eq!(torus_way(&[4, 4], true, 0, 1), [2]);
        assert_eq!(torus_way(&[4, 4], true, 0, 3), [3]);
        assert_eq!(torus_way(&[4, 4], true, 0, 5), [2, 4]);
        assert_eq!(torus_way(&[4, 4], true, 0, 2), [2, 6]);
        assert_eq!(torus_way(&[4, 4], false, 0, 3), [2, 6, 10]);
        assert_eq!(torus_way(&[4, 4], true, 12, 0), [48]);
    }
}
