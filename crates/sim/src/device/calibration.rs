//! How well generations of software use accelerators: the parameters that were fitted, and on
//! what.

use serde::Deserialize;
use units::Seconds;

use super::Kernels;
use crate::Error;

/// The calibrations that come with the program.
const BUILT_IN: &str = include_str!("../../../../measured/calibration.toml");

/// What is not arithmetic: how transfers and ranks behave at work.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Traffic {
    /// Share of what the communication library's own model promises inside a domain.
    pub domain: f64,
    /// The same between domains, of collectives.
    pub fabric: f64,
    /// The same of what one rank sends another.
    pub point_to_point: f64,
    /// Share of a tensor-parallel transfer that stays exposed where the software pipelines it
    /// with the product beside it.
    pub tensor_exposed: f64,
    /// Share of an exchange of tokens that stays exposed where the software pipelines it with
    /// another microbatch's computation.
    #[serde(default = "whole")]
    pub expert_exposed: f64,
    /// How much slower computation is while a transfer is under way, as a share of its time: the
    /// multiprocessors and the memory bandwidth that the transfer takes.
    pub slowdown: f64,
    /// Mean delay of an accelerator, as a share of its time: delays are exponential, and all wait
    /// for the longest.
    pub spread: f64,
    /// Mean time of a rank's step outside of its program (data, logging, bookkeeping, collecting
    /// garbage): exponential like the delays, and all wait for the longest.
    pub step: Seconds,
    /// From the end of a step's program to the start of the next, on all ranks alike: what the driver of
    /// the run does between steps.
    #[serde(default)]
    pub between: Seconds,
}

fn whole() -> f64 {
    1.0
}

/// The parameters of one generation of software on one accelerator.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// The names of the generation, each one release or project.
    pub software: Vec<String>,
    /// The catalogue names of the accelerators it holds for.
    pub accelerators: Vec<String>,
    /// Of those, the ones that a job uses it on unless it names another software.
    #[serde(default)]
    pub usual_for: Vec<String>,
    /// The rows of `measured/` that the parameters were fitted on, in words.
    pub fitted_on: String,
    /// Computation.
    pub kernels: Kernels,
    /// Everything else.
    pub traffic: Traffic,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    calibration: Vec<Calibration>,
}

impl Calibration {
    /// The built-in calibrations.
    #[must_use]
    pub fn built_in() -> Vec<Self> {
        Self::parse(BUILT_IN).unwrap_or_else(|error| panic!("the built-in calibration: {error}"))
    }

    /// Calibrations as a TOML file writes them.
    ///
    /// # Errors
    /// What is wrong with the file, and where.
    pub fn parse(text: &str) -> Result<Vec<Self>, toml::de::Error> {
        Ok(toml::from_str::<File>(text)?.calibration)
    }

    /// The calibration of `software` on an accelerator, or the usual one of the accelerator.
    ///
    /// # Errors
    /// [`Error::Uncalibrated`] when there is none.
    pub fn find<'c>(
        among: &'c [Self],
        software: Option<&str>,
        accelerator: &str,
    ) -> Result<&'c Self, Error> {
        let fits = |calibration: &&Self| match software {
            Some(software) => calibration.holds_for(software, accelerator),
            None => calibration.usual_for.iter().any(|usual| usual == accelerator),
        };
        let on = |calibration: &&Self| calibration.accelerators.iter().any(|on| on == accelerator);
        among.iter().find(fits).ok_or_else(|| Error::Uncalibrated {
            accelerator: accelerator.to_owned(),
            software: software.unwrap_or("any software").to_owned(),
            known: among.iter().filter(on).flat_map(|one| one.software.clone()).collect(),
        })
    }

    /// Whether the parameters hold for this software on this accelerator.
    #[must_use]
    pub fn holds_for(&self, software: &str, accelerator: &str) -> bool {
        let is = |names: &[String], name: &str| names.iter().any(|known| known == name);
        is(&self.software, software) && is(&self.accelerators, accelerator)
    }

    /// How much longer `ranks` ranks compute than one without delays: the expected longest of as
    /// many exponential delays is their mean times the harmonic number of `ranks` (Rényi 1953).
    #[must_use]
    pub fn straggling(&self, ranks: u32) -> f64 {
        1.0 + self.traffic.spread * harmonic(ranks)
    }

    /// What a step of `ranks` ranks takes outside of its program, by the same expectation.
    #[must_use]
    pub fn outside(&self, ranks: u32) -> Seconds {
        self.traffic.between + self.traffic.step * harmonic(ranks)
    }

    /// The time that `share` of steps stay below, of a step of `ranks` ranks that is expected to take
    /// `expected`, `compute` of it computing. A rank that is late in one thing is late in the other:
    /// the longest of n exponential delays stays below -ln(1 - share^(1/n)) means.
    #[must_use]
    pub fn quantile(&self, share: f64, expected: Seconds, compute: Seconds, ranks: u32) -> Seconds {
        let longest = -(-(share.ln() / f64::from(ranks)).exp_m1()).ln();
        let mean = compute * (self.traffic.spread / self.straggling(ranks)) + self.traffic.step;
        expected + mean * (longest - harmonic(ranks))
    }
}

/// Above this the harmonic number is summed by Euler and Maclaurin, exact to twelve digits.
const SUMMED: u32 = 100;

fn harmonic(number: u32) -> f64 {
    const EULER_MASCHERONI: f64 = 0.577_215_664_901_532_9;
    if number <= SUMMED {
        return (1..=number).map(|term| 1.0 / f64::from(term)).sum();
    }
    let n = f64::from(number);
    n.ln() + EULER_MASCHERONI + 1.0 / (2.0 * n) - 1.0 / (12.0 * n * n) + 1.0 / (120.0 * n.powi(4))
}

#[cfg(test)]
mod tests {
    use units::Seconds;

    use super::Calibration;

    #[test]
    fn steps_vary_as_the_longest_delay_does() {
        let mut of = Calibration::built_in().swap_remove(0);
        of.traffic.spread = 0.0;
        of.traffic.step = Seconds(0.1);
        let at = |share| of.quantile(share, Seconds(5.0), Seconds(4.0), 8192).0;
        // The quantiles of Gumbel's distribution, which many delays come close to.
        let gumbel = |share: f64| -(-share.ln()).ln();
        let within = (at(0.75) - at(0.05)) / 0.1 - (gumbel(0.75) - gumbel(0.05));
        assert!(within.abs() < 1e-3, "{within}");
        // Their mean is what was expected.
        let mean = (1..1000).map(|part| at(f64::from(part) / 1000.0)).sum::<f64>() / 999.0;
        assert!((mean - 5.0).abs() < 1e-3, "{mean}");
    }

    #[test]
    fn harmonic_numbers_are_their_sums() {
        for number in [1, 2, 100, 101, 8192] {
            let summed: f64 = (1..=number).map(|term| 1.0 / f64::from(term)).sum();
            let off = super::harmonic(number) / summed - 1.0;
            assert!(off.abs() < 1e-12, "{number}: {off}");
        }
    }
}
