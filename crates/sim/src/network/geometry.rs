//! How a group of ranks lies on the cluster.

use cluster::Cluster;
use units::Rank;

use super::fabric;

/// A group whose members are evenly spaced, as the groups along every axis of a mesh are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Group {
    /// Its first member.
    pub first: Rank,
    /// How far apart neighbours are numbered.
    pub stride: u32,
    /// Its members.
    pub ranks: u32,
    /// Scale-up domains that have members.
    pub domains: u32,
    /// Members in a domain; the fewest on average where domains differ.
    pub per_domain: u32,
    /// The lowest tier of the fabric that joins them all; 0 also where one domain holds them.
    pub tier: usize,
    /// How many times longer bytes take on the fabric than over a port alone when all groups like
    /// this one are at it: in rings and trees, and from every member to every other.
    pub slowdown: Slowdown,
}

/// What the fabric makes of a group's traffic; see [`Group::slowdown`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Slowdown {
    /// In rings and trees.
    pub neighbours: f64,
    /// From every member to every other.
    pub everyone: f64,
}

impl Group {
    /// `ranks` members from `first` on, `stride` apart.
    ///
    /// # Panics
    /// When there are no members, or no stride between them.
    #[must_use]
    pub fn new(cluster: &Cluster, first: Rank, stride: u32, ranks: u32) -> Self {
        assert!(ranks > 0 && stride > 0, "a group of {ranks} ranks, {stride} apart");
        let slowdown = Slowdown { neighbours: 1.0, everyone: 1.0 };
        let mut group =
            Self { first, stride, ranks, domains: 1, per_domain: ranks, tier: 0, slowdown };
        group.domains = group.blocks(cluster.domain.accelerators);
        group.per_domain = (ranks / group.domains).max(1);
        let last = Rank(first.0 + stride * (ranks - 1));
        group.tier = cluster.fabric.as_ref().map_or(0, |fabric| fabric.tier_between(first, last));
        group.slowdown = fabric::slowdown(cluster, &group);
        group
    }

    /// Among how many runs of `reach` accelerators the members are spread.
    #[must_use]
    pub fn blocks(&self, reach: u32) -> u32 {
        let Self { first, stride, ranks, .. } = *self;
        if stride >= reach {
            return ranks;
        }
        let last = first.0 + stride * (ranks - 1);
        last / reach - first.0 / reach + 1
    }

    /// Members in a run of `reach` accelerators, on average over those that have any.
    #[must_use]
    pub fn members_within(&self, reach: u32) -> f64 {
        f64::from(self.ranks) / f64::from(self.blocks(reach))
    }

    /// Domains with members in a run of `reach` accelerators, on average.
    #[must_use]
    pub fn domains_within(&self, reach: u32) -> f64 {
        (f64::from(self.domains) / f64::from(self.blocks(reach))).max(1.0)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use cluster::catalogue;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn arithmetic_counts_what_enumeration_counts(
            first in 0_u32..64, stride in 1_u32..70, ranks in 1_u32..40, reach in 1_u32..64,
        ) {
            let cluster = catalogue::find("dgx-h100-quantum2").unwrap();
            let group = Group::new(&cluster, Rank(first), stride, ranks);
            let members = (0..ranks).map(|place| first + place * stride);
            let blocks: BTreeSet<u32> = members.clone().map(|rank| rank / reach).collect();
            prop_assert_eq!(group.blocks(reach), blocks.len() as u32);
            let domains: BTreeSet<u32> = members.map(|rank| rank / 8).collect();
            prop_assert_eq!(group.domains, domains.len() as u32);
            prop_assert!(group.per_domain * group.domains <= ranks);
        }
    }
}
