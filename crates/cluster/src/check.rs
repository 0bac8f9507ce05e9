//! Whether a described cluster can be: what is written in a file is not yet a machine.

use crate::{Accelerator, Cluster, Domain, Error, Fabric, Link, Routing, Shape, Tier};

impl Cluster {
    /// Refuses what cannot be: no accelerators, domains that nothing joins, rates of nothing.
    ///
    /// # Errors
    /// [`Error::Unfit`], which says what to change.
    pub fn check(&self) -> Result<(), Error> {
        let unfit = self
            .sizes()
            .or_else(|| self.accelerator.unfit())
            .or_else(|| self.domain.unfit())
            .or_else(|| self.fabric.as_ref()?.unfit())
            .or_else(|| self.draw());
        match unfit {
            Some(reason) => Err(Error::Unfit { cluster: self.name.clone(), reason }),
            None => Ok(()),
        }
    }

    /// What is wrong with the numbers of accelerators.
    fn sizes(&self) -> Option<String> {
        let Self { accelerators, per_node, domain, .. } = self;
        let per_domain = domain.accelerators;
        let reach = self.fabric.as_ref().and_then(|fabric| Some(fabric.tiers.last()?.reach));
        if [*accelerators, *per_node, per_domain].contains(&0) {
            return Some("accelerators, per_node and per_domain must be at least 1".into());
        }
        if !per_domain.is_multiple_of(*per_node) {
            return Some(format!(
                "per_domain = {per_domain} is not a multiple of per_node = {per_node}"
            ));
        }
        match reach {
            None if *accelerators > per_domain && self.fabric.is_none() => Some(format!(
                "{accelerators} accelerators in domains of {per_domain} need a fabric; name one, such as fabric = \"quantum2-ndr\""
            )),
            Some(reach) if reach < *accelerators => {
                Some(format!("{accelerators} accelerators, but its fabric reaches {reach}"))
            }
            _ => None,
        }
    }

    /// What is wrong with what it draws and costs.
    fn draw(&self) -> Option<String> {
        let pue = self.power.pue;
        if !(pue >= 1.0 && pue.is_finite()) {
            return Some(format!("pue = {pue} is below 1"));
        }
        let host = self.power.host.filter(|host| !(host.0 >= 0.0 && host.0.is_finite()));
        host.map(|host| format!("the node draws less than its accelerators: {host} for its host"))
    }
}

impl Accelerator {
    fn unfit(&self) -> Option<String> {
        let rates = [
            ("multiprocessors", f64::from(self.multiprocessors)),
            ("boost_clock_hz", self.boost_clock.0),
            ("memory_bytes", self.memory.as_f64()),
            ("memory_bytes_per_s", self.memory_bandwidth.0),
            ("tdp_w", self.tdp.map_or(1.0, |power| power.0)),
        ];
        let peaks = self.peak.values().map(|peak| ("peak_flops", peak.0));
        let bad = rates.into_iter().chain(peaks).find(|(_, value)| !positive(*value));
        let none = || self.peak.is_empty().then(|| "its accelerator has no peak rate".to_owned());
        bad.map(|(key, value)| format!("`{key}` = {value} must be positive")).or_else(none)
    }
}

impl Domain {
    fn unfit(&self) -> Option<String> {
        if let Shape::Torus { dims, .. } = &self.shape {
            let size = dims.iter().try_fold(1_u32, |size, dim| size.checked_mul(*dim));
            if size != Some(self.accelerators) {
                return Some(format!("a torus of {dims:?} does not have {}", self.accelerators));
            }
        }
        let share = self.in_network_reduction.filter(|share| !(0.0..=1.0).contains(share));
        let share = share.map(|share| format!("in_network_reduction = {share} is no share"));
        share.or_else(|| self.shape.link().unfit())
    }
}

impl Fabric {
    fn unfit(&self) -> Option<String> {
        let name = &self.name;
        if self.tiers.is_empty() || self.accelerators_per_nic == 0 {
            return Some(format!("{name} needs a tier, and accelerators_per_nic of at least 1"));
        }
        if self.routing == (Routing::Ecmp { flows_per_pair: 0 }) {
            return Some(format!("{name} spreads traffic over flows_per_pair = 0"));
        }
        if !self.tiers.is_sorted_by(|below, above| below.reach < above.reach) {
            return Some(format!("the tiers of {name} must reach ever further"));
        }
        let tier = self.tiers.iter().find(|tier| !tier.possible());
        let tier = tier.map(|tier| format!("{name} has an impossible tier: {tier:?}"));
        tier.or_else(|| self.nic.unfit())
    }
}

impl Tier {
    fn possible(&self) -> bool {
        let taper = self.oversubscription;
        self.reach > 0 && taper >= 1.0 && taper.is_finite() && duration(self.latency.0)
    }
}

impl Link {
    fn unfit(&self) -> Option<String> {
        let (rate, latency) = (self.bandwidth.0, self.latency.0);
        let good = positive(rate) && duration(latency);
        (!good).then(|| {
            format!("a link of {rate} bytes/s and {latency} s; rates must be positive, times not negative")
        })
    }
}

fn positive(value: f64) -> bool {
    value > 0.0 && value.is_finite()
}

fn duration(seconds: f64) -> bool {
    seconds >= 0.0 && seconds.is_finite()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Composition, catalogue};
    use proptest::prelude::*;
    use units::{BytesPerSecond, Rank};

    #[test]
    fn what_cannot_be_is_refused_with_its_reason() {
        type Change = dyn Fn(&mut Cluster);
        let error = |change: &Change| {
            let mut cluster = catalogue::find("tpu-v5p-multislice").unwrap();
            change(&mut cluster);
            cluster.check().unwrap_err().to_string()
        };
        let cases: [(&Change, &str); 10] = [
            (&|cluster| cluster.per_node = 0, "at least 1"),
            (&|cluster| cluster.per_node = 5, "not a multiple of per_node"),
            (&|cluster| cluster.fabric = None, "need a fabric"),
            (&|cluster| cluster.accelerators = 70_000, "its fabric reaches 65536"),
            (&|cluster| cluster.domain.accelerators = 6140, "does not have 6140"),
            (&|cluster| cluster.domain.in_network_reduction = Some(2.0), "is no share"),
            (&|cluster| cluster.power.pue = 0.9, "is below 1"),
            (&|cluster| cluster.accelerator.memory_bandwidth.0 = f64::NAN, "`memory_bytes_per_s`"),
            (&|cluster| cluster.accelerator.peak.clear(), "no peak rate"),
            (
                &|cluster| cluster.fabric.as_mut().unwrap().nic.bandwidth = BytesPerSecond(0.0),
                "rates must be positive",
            ),
        ];
        for (change, reason) in cases {
            let error = error(change);
            assert!(error.contains(reason), "{error} is not about {reason}");
        }
    }

    /// Counts and rates that a file may have, sane and not.
    fn count() -> impl Strategy<Value = u32> {
        prop::sample::select(vec![0, 1, 3, 4, 8, 64, 72, 4096, u32::MAX])
    }

    fn rate() -> impl Strategy<Value = String> {
        let texts = ["-1.0", "0.0", "1e-30", "1.0", "50e9", "1e30", "inf", "nan"];
        prop::sample::select(texts.map(str::to_owned).to_vec())
    }

    proptest! {
        /// Whatever numbers a file has, it makes a cluster that answers, or an error.
        #[test]
        fn a_file_makes_a_cluster_or_an_error(
            sizes in prop::array::uniform5(count()),
            dims in prop::collection::vec(count(), 0..4),
            rates in prop::array::uniform4(rate()),
            torus in any::<bool>(),
        ) {
            let [accelerators, per_node, per_domain, reach, flows] = sizes;
            let [bandwidth, latency, taper, draw] = rates;
            let link = format!("{{ latency_s = {latency}, bytes_per_s = {bandwidth} }}");
            let shape = if torus {
                format!("{{ torus = {{ dims = {dims:?}, wrap = true, link = {link} }} }}")
            } else {
                format!("{{ switched = {link} }}")
            };
            let text = format!(
                "accelerator = 'h100-sxm'\naccelerators = {accelerators}\n\
                 per_domain = {}\n\
                 [node]\nsource = 's'\ndate = 'd'\nper_node = {per_node}\nper_domain = {per_domain}\n\
                 shape = {shape}\nmax_power_w = {draw}\n\
                 [fabric]\nsource = 's'\ndate = 'd'\nnic = {link}\nrails = true\n\
                 tiers = [{{ reach = {reach}, oversubscription = {taper}, latency_s = {latency} }}]\n\
                 routing = {{ ecmp = {{ flows_per_pair = {flows} }} }}\nin_network_reduction = false\n",
                if torus { format!("{dims:?}") } else { per_domain.to_string() },
            );
            let composition: Composition = toml::from_str(&text).unwrap();
            if let Ok(cluster) = composition.build("own") {
                let last = Rank(cluster.accelerators - 1);
                let link = cluster.link(Rank(0), last);
                prop_assert!(positive(link.bandwidth.0) && duration(link.latency.0));
            }
        }
    }
}
