//! What programs cost on a described cluster: to the simulator, and to a planner.

use anyhow::Result;
use clap::Args;
use cluster::Precision;
use plan::price::{Passage, Price, Pricing, Unpriced};
use program::{Instruction, Program, Transfer, Work};
use report::Summary;
use sim::Roofline;
use sim::device::{Calibrated, Calibration, Habits};
use sim::step::{Costs, Step, Times, TransferCost};
use units::Seconds;

use crate::cluster_section::ClusterSection;

/// The share of peak where nothing was fitted: what large products reach in training.
pub const USUAL_SHARE: f64 = 0.6;

/// How well described accelerators are taken to be used.
#[derive(Debug, Clone, Default, Args)]
pub struct Costing {
    /// Share of peak that described accelerators reach, instead of what was fitted on measurements
    #[arg(long, value_name = "SHARE")]
    pub efficiency: Option<f64>,
    /// Software whose fitted parameters are used; the usual one of the accelerator unless given
    #[arg(long, value_name = "NAME", conflicts_with = "efficiency")]
    pub software: Option<String>,
}

/// A cluster, and how well its accelerators are used: as was fitted, or at a share of their peak.
#[derive(Debug, Clone)]
pub struct Described {
    pub roofline: Roofline,
    pub calibration: Option<Calibration>,
    /// Whether the fabric's switches reduce, where they can and something was fitted.
    pub in_network_reduction: bool,
}

impl Described {
    /// The described cluster of a job that computes in `precision`; its fabric does not reduce.
    pub fn new(section: &ClusterSection, precision: Precision, costing: &Costing) -> Result<Self> {
        let cluster = section.described()?;
        let software = costing.software.as_deref().or(section.software.as_deref());
        let among = Calibration::built_in();
        let found = Calibration::find(&among, software, &cluster.accelerator.name);
        let calibration = match (costing.efficiency, software) {
            (Some(_), _) => None,
            (None, Some(_)) => Some(found?),
            (None, None) => found.ok(),
        };
        let efficiency = costing.efficiency.unwrap_or(USUAL_SHARE);
        Ok(Self {
            roofline: Roofline { cluster, precision, efficiency },
            calibration: calibration.cloned(),
            in_network_reduction: false,
        })
    }

    /// What is described, and how it is known how well that is used.
    pub fn source(&self) -> String {
        let Roofline { cluster, efficiency, .. } = &self.roofline;
        let known = match &self.calibration {
            Some(fitted) => format!("fitted on {}", fitted.fitted_on),
            None => format!("{:.0} % of peak assumed", 100.0 * efficiency),
        };
        format!("{} of {} ({}), {known}", cluster.accelerator.name, cluster.name, cluster.source)
    }

    /// A step of `program`, every cost looked up.
    pub fn step(&self, program: &Program) -> Result<Step, sim::Error> {
        Step::new(program, &self.costs(program)?)
    }

    /// What a step of `program` takes, with what stands outside of the program.
    pub fn times(&self, program: &Program) -> Result<Times, sim::Error> {
        let mut times = self.step(program)?.run()?;
        let outside = self.outside(program.mesh.ranks());
        times.classes.iter_mut().for_each(|class| class.other += outside);
        times.step_time += outside;
        Ok(times)
    }

    /// Time of a step of `ranks` ranks outside of its program.
    pub fn outside(&self, ranks: u32) -> Seconds {
        self.calibration.as_ref().map_or(Seconds::ZERO, |fitted| fitted.outside(ranks))
    }

    /// The times that one step in twenty, in two, and all but one in twenty stay below, where it is
    /// known how ranks are delayed.
    pub fn quantiles(&self, step: &Summary, ranks: u32) -> Option<[Seconds; 3]> {
        let fitted = self.calibration.as_ref()?;
        let (expected, compute) = (step.step_time, step.mean.compute);
        Some([0.05, 0.5, 0.95].map(|share| fitted.quantile(share, expected, compute, ranks)))
    }

    /// What the program's instructions and transfers take.
    pub fn costs(&self, program: &Program) -> Result<Known<'_>, sim::Error> {
        let Some(calibration) = &self.calibration else { return Ok(Known::Peak(&self.roofline)) };
        let Roofline { cluster, precision, .. } = &self.roofline;
        let mut costs = Calibrated::new(program, cluster, *precision, calibration)?
            .with_in_network_reduction(self.in_network_reduction);
        costs.habits = Habits { tensor_overlap: true, ..Habits::default() };
        Ok(Known::Fitted(Box::new(costs)))
    }
}

/// Costs as fitted, or from peak rates.
#[derive(Debug)]
pub enum Known<'d> {
    Fitted(Box<Calibrated<'d>>),
    Peak(&'d Roofline),
}

impl Costs for Known<'_> {
    fn check(&self, program: &Program) -> Result<(), sim::Error> {
        match self {
            Self::Fitted(costs) => costs.check(program),
            Self::Peak(costs) => costs.check(program),
        }
    }

    fn compute(
        &self,
        program: &Program,
        class: usize,
        of: &Instruction,
    ) -> Result<Seconds, sim::Error> {
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
    ) -> Result<TransferCost, sim::Error> {
        match self {
            Self::Fitted(costs) => costs.transfer(program, class, of),
            Self::Peak(costs) => costs.transfer(program, class, of),
        }
    }
}

impl Pricing for Described {
    fn price(&self, program: &Program, list: &[Instruction]) -> Result<Vec<Price>, Unpriced> {
        Ok(prices(program, list, &self.costs(program)?)?)
    }
}

fn prices(
    program: &Program,
    list: &[Instruction],
    costs: &impl Costs,
) -> Result<Vec<Price>, sim::Error> {
    let price = |instruction: &Instruction| match instruction {
        Instruction::Post { transfer, .. } => {
            let TransferCost { latency, wire, compute_slowdown } =
                costs.transfer(program, 0, transfer)?;
            Ok(Price::Transfer(Passage { latency, wire, slowdown: compute_slowdown }))
        }
        _ if Work::of(instruction).is_none() => Ok(Price::Nothing),
        _ => costs.compute(program, 0, instruction).map(Price::Compute),
    };
    list.iter().map(price).collect()
}
