//! What programs cost on a described cluster: to the simulator, and to a planner.

use anyhow::Result;
use plan::price::{Passage, Price, Pricing, Unpriced};
use program::{Instruction, Program, Work};
use sim::Roofline;
use sim::device::{Calibrated, Calibration};
use sim::step::{Costs, Step, Times, TransferCost};
use units::Seconds;

/// A cluster, and how well its accelerators are used: as was fitted, or at a share of their peak.
#[derive(Debug, Clone)]
pub struct Described<'c> {
    pub roofline: Roofline,
    pub calibration: Option<&'c Calibration>,
}

impl Described<'_> {
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
        costs.tensor_overlap = true;
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
