//! What a step draws from the wall, and what it costs.

use units::{Joules, Seconds, Watts};

use crate::{Accelerator, Cluster};

/// Idle power over rated power of an accelerator whose idle power nobody states: what those of the
/// catalogue draw that somebody does (0.10 to 0.14 for GPUs), 2026-11.
const IDLE_SHARE: f64 = 0.1;

/// What a node's host draws in training over what the maker's rating leaves for it, where it was
/// not measured: 2.8 of 4.6 kW for H100 nodes, by Latif et al. 2024 (arXiv:2412.08602).
pub(crate) const LOADED_SHARE: f64 = 0.61;

/// The energy of a step, by where it goes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Energy {
    /// In the accelerators.
    pub accelerators: Joules,
    /// In their hosts; nothing where nobody says what those draw.
    pub hosts: Joules,
    /// At the wall: both, with cooling and conversion.
    pub facility: Joules,
}

impl Accelerator {
    /// What it draws on average when it computes for this share of the time: its rated power while
    /// it does, its idle power while it waits. `None` where its maker publishes no rating.
    ///
    /// A first-order model, and one from above: what is bound by memory draws less than the rating.
    #[must_use]
    pub fn power(&self, busy: f64) -> Option<Watts> {
        let tdp = self.tdp?;
        let idle = self.idle.unwrap_or(tdp * IDLE_SHARE);
        Some(idle + (tdp - idle) * busy)
    }
}

impl Cluster {
    /// The energy that `ranks` accelerators take in `time` when each computes for the share `busy`
    /// of it. `None` where the maker of the accelerator publishes no rating.
    #[must_use]
    pub fn energy(&self, ranks: u32, time: Seconds, busy: f64) -> Option<Energy> {
        let of_all = |power: Watts| power * f64::from(ranks) * time;
        let accelerators = of_all(self.accelerator.power(busy)?);
        let hosts = of_all(self.power.host.unwrap_or_default());
        Some(Energy { accelerators, hosts, facility: (accelerators + hosts) * self.power.pue })
    }

    /// The list price of `ranks` accelerators for `time` in United States dollars, where one is
    /// known.
    #[must_use]
    pub fn usd(&self, ranks: u32, time: Seconds) -> Option<f64> {
        let price = self.price.as_ref()?.usd_per_accelerator_hour;
        Some(price * f64::from(ranks) * time.0 / 3600.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue;

    const HOUR: Seconds = Seconds(3600.0);

    /// Newkirk et al. 2025 (arXiv:2506.14551): intensive training runs a node at 76 % of 10.2 kW.
    #[test]
    fn an_h100_node_draws_what_was_measured() {
        let cluster = catalogue::find("dgx-h100-quantum2").unwrap();
        let energy = cluster.energy(8, HOUR, 0.9).unwrap();
        let kilowatts = (energy.accelerators + energy.hosts).0 / 3.6e6;
        assert!((kilowatts / 7.75 - 1.0).abs() < 0.03, "{kilowatts} kW");
    }

    /// Luccioni et al. 2022 (arXiv:2211.02001): 433 MWh in the GPUs, at their rating, and 257 MWh
    /// around them, in 1,082,990 GPU hours: no less than that, and not twice as much.
    #[test]
    fn the_training_of_bloom_takes_about_what_was_measured() {
        let cluster = catalogue::find("jean-zay-a100").unwrap();
        let energy = cluster.energy(384, HOUR * (1_082_990.0 / 384.0), 1.0).unwrap();
        let megawatt_hours = |energy: Joules| energy.0 / 3.6e9;
        assert!((megawatt_hours(energy.accelerators) / 433.196 - 1.0).abs() < 1e-3);
        let off = megawatt_hours(energy.facility) / (433.196 + 256.646) - 1.0;
        assert!((0.0..0.25).contains(&off), "{off}");
    }

    #[test]
    fn an_unrated_accelerator_has_no_energy_and_an_unpriced_cluster_no_price() {
        let cluster = catalogue::find("tpu-v5p-6144").unwrap();
        assert_eq!((cluster.energy(8, HOUR, 1.0), cluster.usd(8, HOUR)), (None, None));
        let priced = catalogue::find("h100-roce").unwrap();
        assert_eq!(priced.usd(1000, HOUR), Some(1000.0 * 3.78));
    }
}
