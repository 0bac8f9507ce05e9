//! What programs cost on a described cluster: to the simulator, and to a planner.

use anyhow::Result;
use clap::Args;
use cluster::Precision;
use plan::price::{Passage, Price, Pricing, Unpriced};
use program::{Instruction, Program, Work};
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
pub struct Described<'c> {
    pub roofline: Roofline,
    pub calibration: Option<&'c Calibration>,
}

impl<'c> Described<'c> {
    /// The described cluster of a job that computes in `precision`.
    pub fn new(
        section: &ClusterSection,
        precision: Precision,
        costing: &Costing,
        among: &'c [Calibration],
    ) -> Result<Self> {
        let cluster = section.described()?;
        let software = costing.software.as_deref().or(section.software.as_deref());
        let found = Calibration::find(among, software, &cluster.accelerator.name);
        let calibration = match (costing.efficiency, software) {
            (Some(_), _) => None,
            (None, Some(_)) => Some(found?),
            (None, None) => found.ok(),
        };
        let efficiency = costing.efficiency.unwrap_or(USUAL_SHARE);
        Ok(Self { roofline: Roofline { cluster, precision, efficiency }, calibration })
    }

    /// What is described, and how it is known how well that is used.
    pub fn source(&self) -> String {
        let Roofline { cluster, efficiency, .. } = &self.roofline;
        let known = match self.calibration {
            Some(fitted) => format!("fitted on {}", fitted.fitted_on),
            None => format!("{:.0} % of peak assumed", 100.0 * efficiency),
        };
        format!("{} of {} ({}), {known}", cluster.accelerator.name, cluster.name, cluster.source)
    }

    /// A step of `program`, every cost looked up.
    pub fn step(&self, program: &Program) -> Result<Step, sim::Error> {
        match self.costs(program)? {
            Some(costs) => Step::new(program, &costs),
            None => Step::new(program, &self.roofline),
        }
    }

    /// What a step of `program` takes, with what stands outside of the program.
    pub fn times(&self, program: &Program) -> Result<Times, sim::Error> {
        let mut times = self.step(program)?.run()?;
        let outside = self.outside();
        times.classes.iter_mut().for_each(|class| class.other += outside);
        times.step_time += outside;
        Ok(times)
    }

    /// Time of a step outside of its program.
    pub fn outside(&self) -> Seconds {
        self.calibration.map_or(Seconds::ZERO, |calibration| calibration.traffic.step)
    }

    fn costs(&self, program: &Program) -> Result<Option<Calibrated<'_>>, sim::Error> {
        let Some(calibration) = self.calibration else { return Ok(None) };
        let Roofline { cluster, precision, .. } = &self.roofline;
        let mut costs = Calibrated::new(program, cluster, *precision, calibration)?;
        costs.habits = Habits { tensor_overlap: true, ..Habits::default() };
        Ok(Some(costs))
    }
}

impl Pricing for Described<'_> {
    fn price(&self, program: &Program, list: &[Instruction]) -> Result<Vec<Price>, Unpriced> {
        Ok(match self.costs(program)? {
            Some(costs) => prices(program, list, &costs)?,
            None => prices(program, list, &self.roofline)?,
        })
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
