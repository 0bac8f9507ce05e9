//! The simplest cost of computing: peak rates and bandwidths.

use cluster::{Cluster, Precision};
use model::Operator;
use program::{Instruction, Program, Transfer};
use units::{FlopsPerSecond, Seconds};

use super::costs::{Costs, TransferCost, representative};
use crate::Error;
use crate::network::Network;
use crate::world::positive;

/// Every operator takes the longer of its floating-point operations at a share of the peak rate
/// and its bytes at the memory's rate.
///
/// What a transfer costs, the [`Network`] says; it takes nothing from computation.
#[derive(Debug, Clone, PartialEq)]
pub struct Roofline {
    /// The accelerators and links.
    pub cluster: Cluster,
    /// What products are computed in.
    pub precision: Precision,
    /// The share of the peak rate that operators reach, above 0 and at most 1.
    pub efficiency: f64,
}

impl Costs for Roofline {
    fn check(&self, program: &Program) -> Result<(), Error> {
        let (cluster, ranks) = (&self.cluster, program.mesh.ranks());
        if ranks > cluster.accelerators {
            return Err(Error::TooSmall {
                cluster: cluster.name.clone(),
                accelerators: cluster.accelerators,
                ranks,
            });
        }
        positive("efficiency", self.efficiency)?;
        positive("peak_flops", self.peak()?.0)?;
        positive("memory_bytes_per_s", cluster.accelerator.memory_bandwidth.0)?;
        Ok(cluster.check()?)
    }

    fn compute(&self, program: &Program, _: usize, of: &Instruction) -> Result<Seconds, Error> {
        let rate = FlopsPerSecond(self.peak()?.0 * self.efficiency);
        let operators = program.operators(of);
        Ok(operators.iter().map(|operator| self.operator(operator, rate)).sum())
    }

    fn transfer(
        &self,
        program: &Program,
        class: usize,
        transfer: &Transfer,
    ) -> Result<TransferCost, Error> {
        let network = Network::new(&self.cluster, &program.mesh)?;
        Ok(network.transfer(representative(&program.mesh, class), transfer).cost)
    }
}

impl Roofline {
    fn operator(&self, operator: &Operator, rate: FlopsPerSecond) -> Seconds {
        let bytes = operator.bytes(self.precision.element());
        (operator.flops() / rate).max(bytes / self.cluster.accelerator.memory_bandwidth)
    }

    fn peak(&self) -> Result<FlopsPerSecond, Error> {
        let accelerator = &self.cluster.accelerator;
        let peak = accelerator.peak.get(&self.precision).copied();
        peak.ok_or_else(|| Error::Precision {
            accelerator: accelerator.name.clone(),
            precision: self.precision,
            known: accelerator.peak.keys().map(Precision::to_string).collect(),
        })
    }
}
