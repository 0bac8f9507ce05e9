//! A described cluster with the software that uses it: what a program takes there.

use anyhow::Result;
use cluster::{Cluster, PerDomain, Precision, Shape};
use program::{Axis, Breakdown, Instruction, Program, Transfer};
use sim::device::{Calibrated, Calibration, Habits};
use sim::step::{Costs, Step, TransferCost};
use sim::{Error, Roofline};
use units::Seconds;

use crate::cluster_section::{ClusterSection, LOCAL};
use crate::described::USUAL_SHARE;

/// A described cluster and what was fitted on accelerators like its own.
#[derive(Debug, Clone)]
pub struct Machine {
    pub section: ClusterSection,
    pub cluster: Cluster,
    pub precision: Precision,
    calibration: Option<Calibration>,
    sharp: bool,
}

/// What a step takes, and what of it is to blame on what.
#[derive(Debug, Clone)]
pub struct Timing {
    pub step_time: Seconds,
    /// The mean over ranks.
    pub mean: Breakdown,
    /// The part of computing that is waiting for the slowest rank.
    pub stragglers: Seconds,
    /// How much shorter the step would be if no transfer had a latency.
    pub latency: Seconds,
}

impl Machine {
    /// The cluster of a job, its fabric's switches reducing if asked to and able.
    pub fn new(section: &ClusterSection, precision: Precision, sharp: bool) -> Result<Self> {
        let cluster = section.described()?;
        let among = Calibration::built_in();
        let software = section.software.as_deref();
        let found = Calibration::find(&among, software, &cluster.accelerator.name);
        let calibration = if software.is_some() { Some(found?) } else { found.ok() };
        let (section, calibration) = (section.clone(), calibration.cloned());
        Ok(Self { section, cluster, precision, calibration, sharp })
    }

    /// The same for a job of this size: one that leaves part of a torus gets a torus of its own, the
    /// most cubic there is.
    pub fn sized(&self, accelerators: u32) -> Result<Self> {
        let domain = &self.cluster.domain;
        let torus = matches!(domain.shape, Shape::Torus { .. });
        if !torus || accelerators >= domain.accelerators {
            return Ok(self.clone());
        }
        let section = ClusterSection {
            name: LOCAL.to_owned(),
            accelerators,
            accelerator: Some(self.cluster.accelerator.name.clone()),
            per_domain: Some(PerDomain::Accelerators(accelerators)),
            pue: Some(self.cluster.power.pue),
            fabric: None,
            link_gbps_per_accelerator: None,
            ..self.section.clone()
        };
        let cluster = section.described()?;
        Ok(Self { section, cluster, ..self.clone() })
    }

    /// What it is, and where its figures come from.
    pub fn describe(&self) -> String {
        let known = match &self.calibration {
            Some(fitted) => format!("fitted on {}", fitted.fitted_on),
            None => format!("{:.0} % of peak assumed: nothing was fitted", 100.0 * USUAL_SHARE),
        };
        let Cluster { accelerator, fabric, domain, .. } = &self.cluster;
        let fabric = fabric.as_ref().map_or("no fabric", |fabric| &fabric.name);
        let sharp = if self.sharp { ", reducing in its switches" } else { "" };
        let size = match &domain.shape {
            Shape::Torus { .. } => format!("a torus of up to {}", domain.accelerators),
            _ => format!("domains of {}", domain.accelerators),
        };
        format!("{} in {size} on {fabric}{sharp}; {known}", accelerator.name)
    }

    /// What the program's instructions and transfers take.
    pub fn costs(&self, program: &Program) -> Result<Costing<'_>, Error> {
        let Some(calibration) = &self.calibration else {
            return Ok(Costing::Peak(Roofline {
                cluster: self.cluster.clone(),
                precision: self.precision,
                efficiency: USUAL_SHARE,
            }));
        };
        let mut costs = Calibrated::new(program, &self.cluster, self.precision, calibration)?
            .with_in_network_reduction(self.sharp);
        costs.habits = Habits { tensor_overlap: true, ..Habits::default() };
        Ok(Costing::Fitted(costs))
    }

    /// What a step takes beside its program.
    pub fn outside(&self) -> Seconds {
        self.calibration.as_ref().map_or(Seconds::ZERO, |fitted| fitted.traffic.step)
    }

    /// Simulates a step, and once more without latencies.
    pub fn time(&self, program: &Program) -> Result<Timing, Error> {
        let costs = self.costs(program)?;
        let mut times = Step::new(program, &costs)?.run()?;
        let at_once = Step::new(program, &AtOnce(&costs))?.run()?.step_time;
        let outside = self.outside();
        times.classes.iter_mut().for_each(|class| class.other += outside);
        let mean = Breakdown::mean(&times.classes);
        let ranks = program.mesh.ranks();
        let slower = self.calibration.as_ref().map_or(1.0, |fitted| fitted.straggling(ranks));
        let stragglers = mean.compute * (1.0 - 1.0 / slower);
        let latency = (times.step_time - at_once).max(Seconds::ZERO);
        Ok(Timing { step_time: times.step_time + outside, mean, stragglers, latency })
    }
}

/// Costs as fitted, or from peak rates.
#[derive(Debug)]
pub enum Costing<'m> {
    Fitted(Calibrated<'m>),
    Peak(Roofline),
}

impl Costs for Costing<'_> {
    fn check(&self, program: &Program) -> Result<(), Error> {
        match self {
            Self::Fitted(costs) => costs.check(program),
            Self::Peak(costs) => costs.check(program),
        }
    }

    fn compute(&self, program: &Program, class: usize, of: &Instruction) -> Result<Seconds, Error> {
        match self {
            Self::Fitted(costs) => costs.compute(program, class, of),
            Self::Peak(costs) => costs.compute(program, class, of),
        }
    }

    fn transfer(
        &self,
        program: &Program,
        class: usize,
        of: &Transfer,
    ) -> Result<TransferCost, Error> {
        match self {
            Self::Fitted(costs) => costs.transfer(program, class, of),
            Self::Peak(costs) => costs.transfer(program, class, of),
        }
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
            (Cause::Compute, *compute - self.stragglers),
            (Cause::Stragglers, self.stragglers),
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
