//! Costs of a described cluster, as the simulator has them.

use cluster::{Cluster, Precision};
use plan::price::{Passage, Price, Pricing, Unpriced};
use program::{Instruction, Program, Work};
use sim::device::{Calibrated, Calibration};
use sim::step::{Costs, Step};
use units::Seconds;

/// A cluster of the catalogue with the usual software of its accelerators.
pub struct Described {
    cluster: Cluster,
    calibration: Calibration,
}

impl Described {
    pub fn new(cluster: &str) -> Self {
        let cluster = cluster::catalogue::find(cluster).expect("a cluster of the catalogue");
        let all = Calibration::built_in();
        let usual = Calibration::find(&all, None, &cluster.accelerator.name);
        let calibration = usual.expect("its accelerator has a calibration").clone();
        Self { cluster, calibration }
    }

    /// The same with every accelerator in a domain of its own.
    #[allow(dead_code, reason = "the search's tests and benchmark alone")]
    pub fn without_domains(&self) -> Self {
        let mut cluster = self.cluster.clone();
        (cluster.domain.accelerators, cluster.per_node) = (1, 1);
        Self { cluster, calibration: self.calibration.clone() }
    }

    fn costs(&self, program: &Program) -> Result<Calibrated<'_>, sim::Error> {
        Calibrated::new(program, &self.cluster, Precision::Bf16, &self.calibration)
    }

    /// The step time by event simulation.
    #[allow(dead_code, reason = "the closed form's test alone")]
    pub fn simulate(&self, program: &Program) -> Seconds {
        let costs = self.costs(program).expect("the cluster is large enough");
        let step = Step::new(program, &costs).expect("everything has a cost");
        step.run().expect("the program is sound").step_time
    }
}

impl Pricing for Described {
    fn price(&self, program: &Program, list: &[Instruction]) -> Result<Vec<Price>, Unpriced> {
        let costs = self.costs(program)?;
        let price = |instruction: &Instruction| match instruction {
            Instruction::Post { transfer, .. } => {
                let cost = costs.transfer(program, 0, transfer)?;
                let (latency, wire, slowdown) = (cost.latency, cost.wire, cost.compute_slowdown);
                Ok(Price::Transfer(Passage { latency, wire, slowdown }))
            }
            _ if Work::of(instruction).is_none() => Ok(Price::Nothing),
            _ => costs.compute(program, 0, instruction).map(Price::Compute),
        };
        Ok(list.iter().map(price).collect::<Result<_, sim::Error>>()?)
    }
}
