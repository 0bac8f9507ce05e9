//! Clusters of which some nodes are taken, drained or kept as spares.

use std::collections::{BTreeMap, BTreeSet};

use crate::Error;
use crate::topology::{Cluster, Shape};

/// What a job gets of a cluster that is not all there.
#[derive(Debug, Clone, PartialEq)]
pub struct Fragment {
    /// The nodes as a job sees them: scale-up domains and groups of the fabric are as large as the
    /// smallest of those it fills.
    pub cluster: Cluster,
    /// The nodes it is put on, in the order of its ranks.
    pub nodes: Vec<u32>,
    /// Nodes that are left.
    pub spare: Vec<u32>,
}

impl Cluster {
    /// The nodes for so many accelerators when `drained` are not to be had: the fullest groups of
    /// the fabric first, so that the job crosses as few of them as can be.
    ///
    /// What is left of a group decides for all: a job lies on its cluster in equal parts.
    ///
    /// # Errors
    /// Nodes that the cluster does not have, too few that are left, and a torus, whose shape does
    /// not survive.
    pub fn without(&self, drained: &[u32], accelerators: u32) -> Result<Fragment, Error> {
        let unfit = |reason: String| Error::Unfit { cluster: self.name.clone(), reason };
        let nodes = self.accelerators / self.per_node;
        if let Some(node) = drained.iter().find(|node| **node >= nodes) {
            return Err(unfit(format!(
                "there is no node {node}; they are numbered 0 to {}",
                nodes - 1
            )));
        }
        if matches!(self.domain.shape, Shape::Torus { .. }) {
            let reason = "a torus with drained nodes has no shape; give the dims of what is whole as per_domain";
            return Err(unfit(reason.to_owned()));
        }
        let drained: BTreeSet<u32> = drained.iter().copied().collect();
        let free: Vec<u32> = (0..nodes).filter(|node| !drained.contains(node)).collect();
        let reaches = self.reaches();
        let ordered = self.fullest_first(&free, &reaches);
        let (used, domain) = self.take(&ordered, accelerators).ok_or_else(|| {
            let left = free.len();
            let wanted = accelerators.div_ceil(self.per_node);
            unfit(format!(
                "{left} of {nodes} nodes are left, and the job takes {wanted}; lower accelerators"
            ))
        })?;
        let mut cluster = self.clone();
        cluster.domain.accelerators = domain;
        if let Some(fabric) = &mut cluster.fabric {
            let last = fabric.tiers.len() - 1;
            for tier in &mut fabric.tiers[..last] {
                tier.reach = self.smallest(&used, tier.reach).max(domain);
            }
        }
        let taken: BTreeSet<u32> = used.iter().copied().collect();
        let spare = free.into_iter().filter(|node| !taken.contains(node)).collect();
        Ok(Fragment { cluster, nodes: used, spare })
    }

    /// How many accelerators the groups of nodes hold, from the largest: tiers, then domains.
    fn reaches(&self) -> Vec<u32> {
        let tiers = self.fabric.iter().flat_map(|fabric| &fabric.tiers);
        let mut reaches: Vec<u32> = tiers.map(|tier| tier.reach).collect();
        reaches.push(self.domain.accelerators);
        reaches.sort_unstable_by(|a, b| b.cmp(a));
        reaches
    }

    fn group(&self, node: u32, reach: u32) -> u32 {
        (u64::from(node) * u64::from(self.per_node) / u64::from(reach)) as u32
    }

    /// Nodes by group, the fullest groups first on every level.
    fn fullest_first(&self, free: &[u32], reaches: &[u32]) -> Vec<u32> {
        let counts: Vec<BTreeMap<u32, u32>> = reaches
            .iter()
            .map(|reach| {
                let mut counts = BTreeMap::new();
                free.iter()
                    .for_each(|node| *counts.entry(self.group(*node, *reach)).or_default() += 1);
                counts
            })
            .collect();
        let key = |node: &u32| -> Vec<(u32, u32)> {
            let level = |(reach, counts): (&u32, &BTreeMap<u32, u32>)| {
                let group = self.group(*node, *reach);
                (u32::MAX - counts[&group], group)
            };
            reaches.iter().zip(&counts).map(level).collect()
        };
        let mut ordered = free.to_vec();
        ordered.sort_by_cached_key(|node| (key(node), *node));
        ordered
    }

    /// The first nodes that have enough, and what each domain gives: of domains of several nodes as
    /// many as make equal parts.
    fn take(&self, ordered: &[u32], accelerators: u32) -> Option<(Vec<u32>, u32)> {
        let whole = self.domain.accelerators;
        let mut domains: Vec<Vec<u32>> = Vec::new();
        for node in ordered {
            match domains.last_mut() {
                Some(last) if self.group(last[0], whole) == self.group(*node, whole) => {
                    last.push(*node);
                }
                _ => domains.push(vec![*node]),
            }
        }
        if whole <= self.per_node {
            let wanted = accelerators.div_ceil(self.per_node) as usize;
            return (ordered.len() >= wanted).then(|| (ordered[..wanted].to_vec(), whole));
        }
        let most = whole / self.per_node;
        (1..=most).rev().find_map(|part| {
            let each = part * self.per_node;
            let wanted = accelerators.div_ceil(each) as usize;
            let enough = domains.iter().filter(|nodes| nodes.len() as u32 >= part);
            let taken: Vec<u32> =
                enough.take(wanted).flat_map(|nodes| &nodes[..part as usize]).copied().collect();
            (taken.len() == wanted * part as usize).then_some((taken, each))
        })
    }

    /// The accelerators in the smallest group of this reach that the nodes fill up before they go
    /// on to another.
    fn smallest(&self, nodes: &[u32], reach: u32) -> u32 {
        let mut counts: Vec<(u32, u32)> = Vec::new();
        for node in nodes {
            let group = self.group(*node, reach);
            match counts.last_mut().filter(|(last, _)| *last == group) {
                Some((_, count)) => *count += 1,
                None => counts.push((group, 1)),
            }
        }
        let filled = counts.len().saturating_sub(1);
        let least = counts[..filled].iter().map(|(_, count)| count * self.per_node).min();
        least.unwrap_or(reach).min(reach)
    }
}

#[cfg(test)]
mod tests {
    use crate::catalogue;

    #[test]
    fn a_job_goes_where_most_is_left() {
        let cluster = catalogue::find("dgx-h100-quantum2").unwrap();
        let reach = cluster.fabric.as_ref().unwrap().tiers[0].reach;
        let leaf = reach / cluster.per_node;
        // One node of the first leaf group is gone: a job of a whole group goes to another.
        let fragment = cluster.without(&[0], reach).unwrap();
        let first = fragment.nodes[0];
        assert!(first >= leaf && first.is_multiple_of(leaf), "{:?}", fragment.nodes);
        assert_eq!(fragment.nodes, (first..first + leaf).collect::<Vec<_>>());
        assert_eq!(fragment.cluster.fabric.unwrap().tiers[0].reach, reach);
        assert!(fragment.spare.contains(&1) && !fragment.spare.contains(&0));
        // One of every group is gone: groups are smaller for all.
        let nodes = cluster.accelerators / cluster.per_node;
        let first: Vec<u32> = (0..nodes).step_by(leaf as usize).collect();
        let fragment = cluster.without(&first, 4 * reach).unwrap();
        assert_eq!(fragment.cluster.fabric.unwrap().tiers[0].reach, reach - cluster.per_node);
    }

    #[test]
    fn a_rack_that_lacks_a_node_gives_less_everywhere_or_is_left_out() {
        let cluster = catalogue::find("gb200-nvl72-quantum2").unwrap();
        let whole = cluster.without(&[0], cluster.domain.accelerators).unwrap();
        assert_eq!(whole.cluster.domain, cluster.domain);
        assert!(!whole.nodes.contains(&1), "another rack is whole");
    }

    #[test]
    fn what_cannot_be_is_told() {
        let cluster = catalogue::find("dgx-h100-quantum2").unwrap();
        let error = |drained: &[u32], accelerators| {
            cluster.without(drained, accelerators).unwrap_err().to_string()
        };
        let nodes = cluster.accelerators / cluster.per_node;
        assert!(error(&[nodes], 8).contains("there is no node"));
        assert!(error(&[0], cluster.accelerators).contains("nodes are left"));
        let torus = catalogue::find("tpu-v5p-6144").unwrap();
        assert!(torus.without(&[0], 8).unwrap_err().to_string().contains("torus"));
    }
}
