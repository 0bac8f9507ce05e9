//! Where a job runs: `[cluster]` of the job file.

use anyhow::{Context, Result, bail, ensure};
use cluster::{Cluster, Composition, Fragment, PerDomain, catalogue};
use serde::{Deserialize, Serialize};

use crate::choices::Collectives;
use crate::device::DeviceName;

/// The name of the machine at hand.
pub const LOCAL: &str = "local";

/// Where it runs: on this machine, or on a described cluster. That is one of the catalogue, one in
/// a file, or one made of parts; parts beside a name replace those of the named cluster.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClusterSection {
    /// `local`, a catalogue name, or the path of a cluster file.
    pub name: String,
    /// Ranks.
    pub accelerators: u32,
    /// Threads that each local rank computes with.
    pub threads_per_rank: u32,
    /// What local ranks compute on.
    pub device: DeviceName,
    /// By which algorithms local ranks communicate: `rings`, which add in the same order in every run, or
    /// `measured`: which are fastest is found out at the start, in a second, once per host and arrangement of ranks.
    #[serde(skip_serializing_if = "is_default")]
    pub collectives: Collectives,
    /// What described ranks compute on, by its catalogue name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accelerator: Option<String>,
    /// The node and its scale-up domain, unless it is the accelerator's usual one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// The network between scale-up domains.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fabric: Option<String>,
    /// Accelerators that share a host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per_node: Option<u32>,
    /// Accelerators of a scale-up domain, a number; or the dimensions of a torus, a list.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per_domain: Option<PerDomain>,
    /// Gbit/s that the fabric gives to an accelerator in each direction.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link_gbps_per_accelerator: Option<f64>,
    /// Nodes that are not to be had, counted from 0.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub drained: Vec<u32>,
    /// Nodes that are kept beside the job's, to take the place of lost ones.
    #[serde(skip_serializing_if = "is_zero")]
    pub spare_nodes: u32,
    /// The software whose fitted parameters are used; the accelerator's usual one unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub software: Option<String>,
    /// Facility power over computing power.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pue: Option<f64>,
    /// What an accelerator costs; the cluster's list price, if it has one, unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usd_per_accelerator_hour: Option<f64>,
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

fn is_default(collectives: &Collectives) -> bool {
    *collectives == Collectives::default()
}

impl Default for ClusterSection {
    fn default() -> Self {
        Self {
            name: LOCAL.to_owned(),
            accelerators: 1,
            threads_per_rank: 1,
            device: DeviceName::default(),
            collectives: Collectives::default(),
            accelerator: None,
            node: None,
            fabric: None,
            per_node: None,
            per_domain: None,
            link_gbps_per_accelerator: None,
            drained: Vec::new(),
            spare_nodes: 0,
            software: None,
            pue: None,
            usd_per_accelerator_hour: None,
        }
    }
}

impl ClusterSection {
    /// Refuses what cannot be: no ranks, an unknown cluster, more ranks than it has.
    pub fn check(&self) -> Result<()> {
        if self.accelerators == 0 || self.threads_per_rank == 0 {
            bail!("[cluster] accelerators and threads_per_rank must be at least 1");
        }
        if self.is_local() {
            return self.check_local();
        }
        ensure!(
            self.collectives == Collectives::default(),
            "[cluster] collectives = \"measured\" is for this machine; on a described cluster they are what NCCL would choose"
        );
        let Cluster { accelerators, name, .. } = self.described()?;
        if self.accelerators > accelerators {
            bail!(
                "[cluster] accelerators = {}, but {name} has {accelerators}; lower it, or choose a larger cluster",
                self.accelerators
            );
        }
        Ok(())
    }

    /// Whether it is the machine at hand.
    pub fn is_local(&self) -> bool {
        self.name == LOCAL && self.accelerator.is_none()
    }

    /// Refuses what can only be simulated.
    pub fn require_local(&self) -> Result<()> {
        let (key, value) = match &self.accelerator {
            Some(accelerator) if self.name == LOCAL => ("accelerator", accelerator),
            _ => ("name", &self.name),
        };
        ensure!(
            self.is_local(),
            "[cluster] {key} = \"{value}\" is described, not here: `simulate` it, or train with name = \"local\""
        );
        Ok(())
    }

    /// Refuses this machine, which has no other size.
    pub fn require_described(&self) -> Result<()> {
        ensure!(
            !self.is_local(),
            "[cluster] is this machine; give the `name` of a described cluster, or an `accelerator`: `phalanx catalogue` lists them"
        );
        Ok(())
    }

    /// The described cluster as the job sees it.
    pub fn described(&self) -> Result<Cluster> {
        Ok(match self.fragment()? {
            Some(fragment) => fragment.cluster,
            None => self.whole()?,
        })
    }

    /// The nodes that the job is put on, where not all are to be had.
    pub fn fragment(&self) -> Result<Option<Fragment>> {
        if self.drained.is_empty() && self.spare_nodes == 0 {
            return Ok(None);
        }
        let whole = self.whole()?;
        let wanted = self.accelerators + self.spare_nodes * whole.per_node;
        // The spares must be there, but the job is not spread over them.
        whole.without(&self.drained, wanted).context("[cluster] drained, spare_nodes")?;
        Ok(Some(whole.without(&self.drained, self.accelerators).context("[cluster] drained")?))
    }

    fn whole(&self) -> Result<Cluster> {
        let part = |name: &Option<String>| name.clone().map(toml::Value::String);
        let parts = Composition {
            accelerator: part(&self.accelerator),
            node: part(&self.node),
            fabric: part(&self.fabric),
            per_node: self.per_node,
            per_domain: self.per_domain.clone(),
            link_gbps_per_accelerator: self.link_gbps_per_accelerator,
            pue: self.pue,
            ..Composition::default()
        };
        if self.name != LOCAL {
            let named = catalogue::composition(&self.name).context("[cluster] name")?;
            return Ok(parts.over(named).build(&self.name)?);
        }
        let name = [&self.accelerator, &self.node, &self.fabric].map(Option::as_deref);
        let name: Vec<&str> = name.into_iter().flatten().collect();
        let parts = Composition { accelerators: Some(self.accelerators), ..parts };
        parts.build(&name.join(" + ")).context("[cluster]")
    }

    /// This machine is measured, so nothing can be said about its parts.
    fn check_local(&self) -> Result<()> {
        let given = [
            ("node", self.node.is_some()),
            ("fabric", self.fabric.is_some()),
            ("per_node", self.per_node.is_some()),
            ("per_domain", self.per_domain.is_some()),
            ("link_gbps_per_accelerator", self.link_gbps_per_accelerator.is_some()),
            ("drained", !self.drained.is_empty()),
            ("spare_nodes", self.spare_nodes > 0),
            ("software", self.software.is_some()),
            ("pue", self.pue.is_some()),
            ("usd_per_accelerator_hour", self.usd_per_accelerator_hour.is_some()),
        ];
        if let Some((key, _)) = given.into_iter().find(|(_, given)| *given) {
            bail!("[cluster] {key} needs an `accelerator`, or the `name` of a described cluster");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use units::BytesPerSecond;

    fn section(text: &str) -> ClusterSection {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn a_cluster_is_made_of_parts() {
        let parts = "accelerator = 'gb200'\naccelerators = 8192\nfabric = 'quantum2-ndr'\n";
        let cluster = section(parts).described().unwrap();
        assert_eq!(cluster.name, "gb200 + quantum2-ndr");
        assert_eq!((cluster.accelerators, cluster.domain.accelerators), (8192, 64));
    }

    #[test]
    fn parts_replace_those_of_a_named_cluster() {
        let faster = "name = 'dgx-h100-quantum2'\nlink_gbps_per_accelerator = 800\n";
        let cluster = section(faster).described().unwrap();
        assert_eq!(cluster.fabric.unwrap().nic.bandwidth, BytesPerSecond(100e9));
    }

    #[test]
    fn described_accelerators_are_not_here() {
        let refused = section("accelerator = 'gb200'").require_local().unwrap_err();
        insta::assert_snapshot!(refused, @r#"[cluster] accelerator = "gb200" is described, not here: `simulate` it, or train with name = "local""#);
    }

    #[test]
    fn what_does_not_fit_names_the_key() {
        let error = |text: &str| format!("{:#}", section(text).check().unwrap_err());
        insta::assert_snapshot!(error("fabric = 'quantum2-ndr'"), @"[cluster] fabric needs an `accelerator`, or the `name` of a described cluster");
        insta::assert_snapshot!(error("accelerator = 'h100'"), @"[cluster]: the catalogue has no accelerator `h100`; did you mean `h100-sxm`? `phalanx catalogue` lists all");
        insta::assert_snapshot!(error("accelerator = 'h100-sxm'\naccelerators = 16"), @r#"[cluster]: cluster h100-sxm: 16 accelerators in domains of 8 need a fabric; name one, such as fabric = "quantum2-ndr""#);
    }
}
