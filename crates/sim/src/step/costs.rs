//! The seam between what ranks do and how long it takes on described hardware.

use program::{Axis, Instruction, Mesh, Program, Transfer};
use units::{Rank, Seconds};

use crate::Error;

/// A connection of a rank that all its transfers share; each has its own way out and way in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Resource {
    /// Into the scale-up domain: `NVLink`, Infinity Fabric, the links of a torus.
    Domain,
    /// Into the fabric between domains.
    Nic,
}

impl Resource {
    /// How many there are.
    pub const COUNT: usize = 2;
}

/// What a transfer takes on one of its ranks when nothing else is under way.
///
/// Alone it takes its latency and then the longest of its wire times. Transfers that are on the
/// wire at once and load the same way of the same connection slow each other down, max-min fairly
/// by the share of its own speed that each still has.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct TransferCost {
    /// Time that passes whatever else is under way: rounds, hops, protocol.
    pub latency: Seconds,
    /// How long the transfer occupies each [`Resource`], at that resource's full rate.
    pub wire: [Seconds; Resource::COUNT],
    /// How much longer computation takes while the transfer is under way, as a share of its time
    /// alone: 0.1 when a tenth more. Several transfers add up.
    pub compute_slowdown: f64,
}

/// How long things take. Ranks of one class (one pipeline stage) do the same and cost the same.
///
/// Costs are looked up once for each kind of instruction before a step is simulated: a compute
/// cost may depend on the class, the segment, the pass and the layer or block, not on the
/// microbatch; a transfer's on everything but the layer, block or microbatch in its buffer's name.
pub trait Costs {
    /// Refuses a program that cannot run here at all.
    ///
    /// # Errors
    /// What is wrong with the hardware or the program's size.
    fn check(&self, program: &Program) -> Result<(), Error> {
        let _ = program;
        Ok(())
    }

    /// Time on the compute stream of a rank of `class` when no transfer is under way. Asked for
    /// every kind of instruction but posts, waits and releases.
    ///
    /// # Errors
    /// When there is no figure for it.
    fn compute(
        &self,
        program: &Program,
        class: usize,
        instruction: &Instruction,
    ) -> Result<Seconds, Error>;

    /// What a transfer takes that a rank of `class` posts. Of a send and its receive the send is
    /// asked for; a collective of several classes takes the most that any of them says.
    ///
    /// # Errors
    /// When there is no figure for it.
    fn transfer(
        &self,
        program: &Program,
        class: usize,
        transfer: &Transfer,
    ) -> Result<TransferCost, Error>;
}

/// A pair of functions, from an instruction and from a transfer to what it takes.
impl<C, T> Costs for (C, T)
where
    C: Fn(usize, &Instruction) -> Seconds,
    T: Fn(usize, &Transfer) -> TransferCost,
{
    fn compute(&self, _: &Program, class: usize, of: &Instruction) -> Result<Seconds, Error> {
        Ok(self.0(class, of))
    }

    fn transfer(&self, _: &Program, class: usize, of: &Transfer) -> Result<TransferCost, Error> {
        Ok(self.1(class, of))
    }
}

/// The first rank of a class.
pub(crate) fn representative(mesh: &Mesh, class: usize) -> Rank {
    mesh.peer(Rank(0), Axis::Pipeline, class as u32)
}
