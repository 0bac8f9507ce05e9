//! A job's costs: its program's operators on a device, its transfers on a network.

use cluster::{Cluster, Precision};
use collective::Kind;
use model::{Operator, Pass, Segment};
use program::{Action, Axis, Buffer, Instruction, Program, Transfer, Value};
use units::{Bytes, Rank, Seconds};

use super::kernels::{Direction, Manner};
use super::{Calibration, Device, Habits};
use crate::Error;
use crate::network::Network;
use crate::step::{Costs, Resource, TransferCost};

/// What a program costs on a cluster with one generation of software.
#[derive(Debug, Clone)]
pub struct Calibrated<'a> {
    device: Device,
    network: Network<'a>,
    calibration: &'a Calibration,
    /// What the job switches on of what its software offers; nothing unless set.
    pub habits: Habits,
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
            habits: Habits::default(),
            calibration,
        })
    }

    /// The same with or without reduction in the fabric's switches, where those can (SHARP); off at
    /// first.
    #[must_use]
    pub fn with_in_network_reduction(mut self, asked: bool) -> Self {
        self.network = self.network.with_in_network_reduction(asked);
        self
    }

    fn representative(program: &Program, class: usize) -> Rank {
        program.mesh.peer(Rank(0), Axis::Pipeline, class as u32)
    }

    /// Heads are computed in bf16 whatever the layers are computed in (Transformer Engine keeps
    /// fp8 to the products of layers), unless the job says otherwise.
    fn precision(&self, segment: Segment) -> Precision {
        let precision = self.device.precision;
        let kept = segment == Segment::Logits && !self.habits.head_eight;
        if kept && precision.bits() < 16.0 { Precision::Bf16 } else { precision }
    }
}

impl Calibrated<'_> {
    fn manner(&self, of: &Instruction) -> Manner {
        let habits = &self.habits;
        let attention =
            if habits.attention_eight { self.device.precision } else { Precision::Bf16 };
        let precision = self.device.precision;
        let alone = Manner {
            direction: Direction::Forward,
            precision,
            attention,
            captured: false,
            fused: false,
            routed: false,
        };
        let Instruction::Compute { segment, pass, .. } = *of else { return alone };
        let forward = matches!(pass, Pass::Forward | Pass::Recompute);
        Manner {
            direction: if forward { Direction::Forward } else { Direction::Backward },
            precision: self.precision(segment),
            captured: habits.graphs.capture(segment),
            fused: habits.fused_experts && segment == Segment::Experts,
            routed: segment == Segment::Experts,
            ..alone
        }
    }

    /// The share of a transfer that is not hidden behind the computation beside it.
    fn exposed(&self, program: &Program, class: usize, of: &Transfer) -> f64 {
        let traffic = &self.calibration.traffic;
        match of.axis {
            Axis::Tensor if self.habits.tensor_overlap && !is_of_experts(of.buffer) => {
                traffic.tensor_exposed
            }
            Axis::Expert if self.habits.expert_overlap => {
                let unpaired = program.classes.get(class).map_or(0.0, |list| unpaired(list));
                unpaired + (1.0 - unpaired) * traffic.expert_exposed
            }
            _ => 1.0,
        }
    }

    /// What an exchange of tokens sends into the domain and into the fabric, of what it would if
    /// each copy of a token travelled alone. A dispatcher that knows where copies go sends a token
    /// once to each rank that holds any of its experts, and once to each domain.
    fn copies(&self, program: &Program, rank: Rank, of: &Transfer) -> [f64; 2] {
        let exchanged = of.axis == Axis::Expert
            && of.action == Action::Collective(Kind::AllToAll)
            && self.habits.fused_dispatch;
        let Some(chosen) = experts_per_token(program).filter(|_| exchanged) else {
            return [1.0; 2];
        };
        let group = self.network.group(rank, of.axis);
        [hit(group.ranks, chosen), hit(group.domains, chosen)]
    }
}

impl Costs for Calibrated<'_> {
    fn compute(&self, program: &Program, _: usize, of: &Instruction) -> Result<Seconds, Error> {
        let manner = self.manner(of);
        let operators = program.operators(of);
        let times = operators.iter().map(|operator| self.device.operator(operator, manner));
        let total: Seconds = times.sum::<Result<Seconds, Error>>()?;
        Ok(total * self.straggling)
    }

    fn transfer(
        &self,
        program: &Program,
        class: usize,
        of: &Transfer,
    ) -> Result<TransferCost, Error> {
        if self.habits.gathered_before && matches!(of.buffer, Buffer::Parameters(_)) {
            return Ok(TransferCost::default());
        }
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
        let exposed = self.exposed(program, class, of);
        let [inside, outside] = self.copies(program, rank, of);
        let together = matches!(of.action, Action::Collective(_));
        let reached = if together { traffic.fabric } else { traffic.point_to_point };
        let mut cost = estimate.cost;
        cost.latency = cost.latency * exposed;
        cost.wire[Resource::Domain as usize] =
            cost.wire[Resource::Domain as usize] * (exposed * inside / traffic.domain);
        cost.wire[Resource::Nic as usize] =
            cost.wire[Resource::Nic as usize] * (exposed * outside / reached);
        cost.compute_slowdown = traffic.slowdown;
        Ok(cost)
    }
}

/// Whether ranks that split each expert gather or add up a buffer: no product is cut to hide that.
fn is_of_experts(buffer: Buffer) -> bool {
    match buffer {
        Buffer::Activation { value, .. } | Buffer::ActivationGradient { value, .. } => {
            matches!(value, Value::Dispatched(_) | Value::Expertise(_))
        }
        _ => false,
    }
}

/// Of `places` that `chosen` choices fall on alike, how many are hit, as a share of the choices.
pub(super) fn hit(places: u32, chosen: f64) -> f64 {
    let places = f64::from(places);
    places * (1.0 - (1.0 - 1.0 / places).powf(chosen)) / chosen
}

/// The share of a rank's turns through experts that no turn of the other direction is beside, for
/// exchanges of tokens to hide behind: those that fill the pipeline and those that empty it.
pub(super) fn unpaired(list: &[Instruction]) -> f64 {
    let turns = list.iter().filter_map(|instruction| match instruction {
        Instruction::Compute { segment: Segment::Experts, pass, .. } => {
            Some(*pass == Pass::Forward)
        }
        _ => None,
    });
    let forward: Vec<bool> = turns.collect();
    let filling = forward.iter().take_while(|forward| **forward).count();
    let emptying = forward.iter().rev().take_while(|forward| !**forward).count();
    (filling + emptying) as f64 / forward.len().max(1) as f64
}

/// How many experts a token visits: rows that dispatching makes of those that are routed.
fn experts_per_token(program: &Program) -> Option<f64> {
    let rows = |wanted: Segment| {
        let mut operators =
            program.segments.iter().filter_map(|((segment, pass, _), operators)| {
                (*segment == wanted && *pass == Pass::Forward).then_some(operators)
            });
        operators.next()?.iter().find_map(|operator| match *operator {
            Operator::Route { rows, .. } | Operator::Permute { rows, .. } => Some(rows as f64),
            _ => None,
        })
    };
    Some(rows(Segment::Dispatch)? / rows(Segment::Route)?)
}
