//! Collectives flow by flow: every rank's steps, every link, max-min fair.
//!
//! An [`Operation`] is a [`Collective`] among some ranks, and [`run`] carries out any number of them
//! on a [`Topology`], no rank folded into another. A message from one member to another flows along
//! the links of its way, which it shares max-min fairly with all that flows there; its sender is
//! free when the last byte has left, and its receiver has it a latency later. Messages of one member
//! to another keep their order, as on any connection, so that what a step waits for is a count of
//! messages per peer and no list: the memory of a rank does not grow with its steps.
//!
//! Time is counted in whole picoseconds. Where ranks do the same at the same time, all that happens
//! then is one event with many parts, and rates are set once for it.

mod build;
mod engine;
mod fair;
mod jitter;
mod queue;
mod script;
mod topology;

use collective::Collective;
use units::{Bytes, Rank, Seconds};

use crate::Error;

pub use jitter::{Jitter, quantile};
pub use topology::{Topology, Way};

/// A collective among some ranks, in a lane: a rank carries out what it has in a lane in order, and
/// what it has in different lanes at once.
#[derive(Debug, Clone)]
pub struct Operation {
    /// What the members do.
    pub collective: Collective,
    /// Who they are, in the order of members.
    pub ranks: Vec<Rank>,
    /// The whole buffer, cut evenly into the collective's chunks.
    pub bytes: Bytes,
    /// Which of the ranks' lanes it is in.
    pub lane: u32,
}

/// What came of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// When the last member of each operation was done.
    pub ends: Vec<Seconds>,
    /// When all was done.
    pub time: Seconds,
    /// Bytes that passed each link.
    pub carried: Vec<f64>,
    /// Messages that were sent.
    pub messages: u64,
}

/// What is not as described.
#[derive(Debug, Clone, Default)]
pub struct Conditions {
    /// When each rank is ready to begin; at once where none is given. Stragglers.
    pub ready: Vec<Seconds>,
    /// What comes on top of each message's latency.
    pub jitter: Option<Jitter>,
}

/// Carries out operations from a common start, on links as described.
///
/// # Errors
/// [`Error::Stuck`] when a schedule makes its members wait for each other for ever.
///
/// # Panics
/// When an operation has not one rank for each member, or a rank is not in the topology.
pub fn run(topology: &Topology, operations: &[Operation]) -> Result<Report, Error> {
    run_under(topology, operations, &Conditions::default())
}

/// Carries out operations under these conditions; slow links are the topology's.
///
/// # Errors
/// [`Error::Stuck`] when a schedule makes its members wait for each other for ever.
///
/// # Panics
/// As [`run`].
pub fn run_under(
    topology: &Topology,
    operations: &[Operation],
    conditions: &Conditions,
) -> Result<Report, Error> {
    engine::Engine::new(topology, operations, conditions).run()
}

/// What [`run`] gives, from rank 0 alone, at a cost that does not grow with ranks; `None` when not
/// all ranks do the same over the same links.
///
/// The report has the bytes of rank 0's links, the ends of the operations that it is in, and its
/// messages.
///
/// # Errors
/// [`Error::Stuck`] when a schedule makes its members wait for each other for ever.
///
/// # Panics
/// As [`run`].
pub fn run_folded(topology: &Topology, operations: &[Operation]) -> Option<Result<Report, Error>> {
    Some(engine::Engine::folded(topology, operations)?.run())
}

#[cfg(test)]
mod tests;
