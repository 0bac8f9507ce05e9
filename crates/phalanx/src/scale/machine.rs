//! A described cluster with the software that uses it: what a program takes there.

use anyhow::Result;
use cluster::{Cluster, PerDomain, Precision, Shape};
use program::{Axis, Breakdown, Instruction, Program, Transfer};
use sim::Error;
use sim::step::{Costs, Step, TransferCost};
use units::Seconds;

use crate::cluster_section::{ClusterSection, LOCAL};
use crate::described::{Costing, Described, Known, USUAL_SHARE};

/// A described cluster and what was fitted on accelerators like its own.
#[derive(Debug, Clone)]
pub struct Machine {
    pub section: ClusterSection,
    described: Described,
}

/// What a step takes, and what of it is to blame on what.
#[derive(Debug, Clone)]
pub struct Timing {
    pub step_time: Seconds,
    /// The mean over ranks.
    pub mean: Breakdown,
    /// The part of computing that is waiting for the slowest rank.
    pub slowed: Seconds,
    /// The same of what ranks do between steps.
    pub waited: Seconds,
    /// How much shorter the step would be if no transfer had a latency.
    pub latency: Seconds,
}

impl Machine {
    /// The cluster of a job, its fabric's switches reducing if asked to and able.
    pub fn new(section: &ClusterSection, precision: Precision, sharp: bool) -> Result<Self> {
        let mut described = Described::new(section, precision, &Costing::default())?;
        described.in_network_reduction = sharp;
        Ok(Self { section: section.clone(), described })
    }

    pub fn cluster(&self) -> &Cluster {
        &self.described.roofline.cluster
    }

    pub fn precision(&self) -> Precision {
        self.described.roofline.precision
    }

    /// The same for a job of this size: one that leaves part of a torus gets a torus of its own, the
    /// most cubic there is.
    pub fn sized(&self, accelerators: u32) -> Result<Self> {
        let domain = &self.cluster().domain;
        let torus = matches!(domain.shape, Shape::Torus { .. });
        if !torus || accelerators >= domain.accelerators {
            return Ok(self.clone());
        }
        let section = ClusterSection {
            name: LOCAL.to_owned(),
            accelerators,
            accelerator: Some(self.cluster().accelerator.name.clone()),
            per_domain: Some(PerDomain::Accelerators(accelerators)),
            pue: Some(self.cluster().power.pue),
            fabric: None,
            link_gbps_per_accelerator: None,
            ..self.section.clone()
        };
        let mut described = self.described.clone();
        described.roofline.cluster = section.described()?;
        Ok(Self { section, described })
    }

    /// What it is, and where its figures come from.
    pub fn describe(&self) -> String {
        let known = match &self.described.calibration {
            Some(fitted) => format!("fitted on {}", fitted.fitted_on),
            None => format!("{:.0} % of peak assumed: nothing was fitted", 100.0 * USUAL_SHARE),
        };
        let Cluster { accelerator, fabric, domain, .. } = self.cluster();
        let fabric = fabric.as_ref().map_or("no fabric", |fabric| &fabric.name);
        let sharp =
            if self.described.in_network_reduction { ", reducing in its switches" } else { "" };
        let size = match &domain.shape {
            Shape::Torus { .. } => format!("a torus of up to {}", domain.accelerators),
            _ => format!("domains of {}", domain.accelerators),
        };
        format!("{} in {size} on {fabric}{sharp}; {known}", accelerator.name)
    }

    /// What the program's instructions and transfers take.
    pub fn costs(&self, program: &Program) -> Result<Known<'_>, Error> {
        self.described.costs(program)
    }

    /// What a step of `ranks` ranks takes beside its program.
    pub fn outside(&self, ranks: u32) -> Seconds {
        self.described.outside(ranks)
    }

    /// Simulates a step, and once more without latencies.
    pub fn time(&self, program: &Program) -> Result<Timing, Error> {
        let costs = self.costs(program)?;
        let mut times = Step::new(program, &costs)?.run()?;
        let at_once = Step::new(program, &AtOnce(&costs))?.run()?.step_time;
        let ranks = program.mesh.ranks();
        let outside = self.outside(ranks);
        times.classes.iter_mut().for_each(|class| class.other += outside);
        let mean = Breakdown::mean(&times.classes);
        let slower =
            self.described.calibration.as_ref().map_or(1.0, |fitted| fitted.straggling(ranks));
        let slowed = mean.compute * (1.0 - 1.0 / slower);
        let waited = outside - self.outside(1);
        let latency = (times.step_time - at_once).max(Seconds::ZERO);
        Ok(Timing { step_time: times.step_time + outside, mean, slowed, waited, latency })
    }
}

/// The same without latencies.
struct AtOnce<'c, C>(&'c C);

impl<C: Costs> Costs for AtOnce<'_, C> {
    fn compute(&self, program: &Program, class: usize, of: &Instruction) -> Result<Seconds, Error> {
        self.0.compute(program, class, of)
    }

    fn transfer(
        &self,
        program: &Program,
        class: usize,
        of: &Transfer,
    ) -> Result<TransferCost, Error> {
        let cost = self.0.transfer(program, class, of)?;
        Ok(TransferCost { latency: Seconds::ZERO, ..cost })
    }
}

/// What holds a step up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    Compute,
    Stragglers,
    Bubble,
    Data,
    Tensor,
    Context,
    Expert,
    Pipeline,
    Rest,
}

impl std::fmt::Display for Cause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Compute => "compute",
            Self::Stragglers => "stragglers",
            Self::Bubble => "bubble",
            Self::Data => "data-parallel",
            Self::Tensor => "tensor",
            Self::Context => "context",
            Self::Expert => "expert",
            Self::Pipeline => "pipeline messages",
            Self::Rest => "the rest",
        })
    }
}

impl Timing {
    /// The step by what it was spent on.
    pub fn by_cause(&self) -> std::collections::BTreeMap<Cause, Seconds> {
        let Breakdown { compute, exposed, bubble, .. } = &self.mean;
        let mut causes = std::collections::BTreeMap::from([
            (Cause::Compute, *compute - self.slowed),
            (Cause::Stragglers, self.slowed + self.waited),
            (Cause::Bubble, *bubble),
        ]);
        for (axis, time) in exposed {
            let cause = match axis {
                Axis::Data | Axis::Replica | Axis::ExpertData => Cause::Data,
                Axis::Tensor => Cause::Tensor,
                Axis::Context => Cause::Context,
                Axis::Expert => Cause::Expert,
                Axis::Pipeline | Axis::PipelineBack | Axis::Tied => Cause::Pipeline,
                Axis::World => Cause::Rest,
            };
            *causes.entry(cause).or_default() += *time;
        }
        let told: Seconds = causes.values().copied().sum();
        *causes.entry(Cause::Rest).or_default() += (self.step_time - told).max(Seconds::ZERO);
        causes
    }
}
