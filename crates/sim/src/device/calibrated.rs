//! A job's costs: its program's operators on a device, its transfers on a network.

use cluster::{Cluster, Precision};
use collective::Kind;
use model::{Pass, Segment};
use program::{Axis, Buffer, Instruction, Program, Transfer};
use units::{Bytes, Rank, Seconds};

use super::kernels::Direction;
use super::{Calibration, Device};
use crate::Error;
use crate::network::Network;
use crate::step::{Costs, Resource, TransferCost};

/// What a program costs on a cluster with one generation of software.
#[derive(Debug, Clone)]
pub struct Calibrated<'a> {
    device: Device,
    network: Network<'a>,
    calibration: &'a Calibration,
    /// Whether tensor-parallel transfers are pipelined with the products beside them.
    pub tensor_overlap: bool,
    straggling: f64,
}

impl<'a> Calibrated<'a> {
    /// The costs of `program` on `cluster`, with the products of layers in `precision`.
    ///
    /// # Errors
    /// When the cluster has too few accelerators.
    pub fn new(
        program: &Program,
        cluster: &'a Cluster,
        precision: Precision,
        calibration: &'a Calibration,
    ) -> Result<Self, Error> {
        let kernels = calibration.kernels.clone();
        Ok(Self {
            device: Device { accelerator: cluster.accelerator.clone(), precision, kernels },
            network: Network::new(cluster, &program.mesh)?,
            straggling: calibration.straggling(program.mesh.ranks()),
            tensor_overlap: false,
            calibration,
        })
    }

    fn representative(program: &Program, class: usize) -> Rank {
        program.mesh.peer(Rank(0), Axis::Pipeline, class as u32)
    }

    /// Heads are computed in bf16 whatever the layers are computed in (Transformer Engine keeps
    /// fp8 to the products of layers).
    fn precision(&self, segment: Segment) -> Precision {
        match segment {
            Segment::Logits if self.device.precision.bits() < 16.0 => Precision::Bf16,
            _ => self.device.precision,
        }
    }
}

impl Costs for Calibrated<'_> {
    fn compute(&self, program: &Program, _: usize, of: &Instruction) -> Result<Seconds, Error> {
        let (precision, direction) = match *of {
            Instruction::Compute { segment, pass, .. } => {
                let forward = matches!(pass, Pass::Forward | Pass::Recompute);
                let direction = if forward { Direction::Forward } else { Direction::Backward };
                (self.precision(segment), direction)
            }
            _ => (self.device.precision, Direction::Forward),
        };
        let operators = program.operators(of);
        let times = operators.iter().map(|op| self.device.operator(op, precision, direction));
        let total: Seconds = times.sum::<Result<Seconds, Error>>()?;
        Ok(total * self.straggling)
    }

    fn transfer(
        &self,
        program: &Program,
        class: usize,
        of: &Transfer,
    ) -> Result<TransferCost, Error> {
        let rank = Self::representative(program, class);
        let estimate = match of.buffer {
            // Two sums over all ranks: we gather them to add them in rank order; the software that
            // was measured reduces them.
            Buffer::Statistics => {
                let group = self.network.group(rank, of.axis);
                self.network.collective(&group, Kind::AllReduce, Bytes(8))
            }
            _ => self.network.transfer(rank, of),
        };
        let traffic = &self.calibration.traffic;
        let exposed = if of.axis == Axis::Tensor && self.tensor_overlap {
            traffic.tensor_exposed
        } else {
            1.0
        };
        let mut cost = estimate.cost;
        cost.latency = cost.latency * exposed;
        cost.wire[Resource::Domain as usize] =
            cost.wire[Resource::Domain as usize] * (exposed / traffic.domain);
        cost.wire[Resource::Nic as usize] =
            cost.wire[Resource::Nic as usize] * (exposed / traffic.fabric);
        cost.compute_slowdown = traffic.slowdown;
        Ok(cost)
    }
}
