//! A program in virtual time: what [`simulate`] makes of it is the same kind of trace that the
//! runtime records.
//!
//! Hosts like this one are simulated as the runtime runs them: each rank is a
//! [`program::Executor`], each member of a collective a [`collective::Executor`], and this crate only
//! decides when what they start is done. On described accelerators a transfer has one [`step::TransferCost`]
//! and ranks that do the same are one, so that a step of thousands of ranks takes milliseconds: see
//! [`step`].

mod agenda;
mod cores;
pub mod device;
mod exchange;
pub mod goodput;
mod machine;
mod measured;
pub mod nccl;
pub mod network;
mod simulation;
pub mod step;
mod world;

use cluster::Precision;
use model::{Pass, Segment};
use program::{Program, Trace};
use thiserror::Error;
use units::Rank;

use measured::Measured;
use simulation::Simulation;
pub use step::Roofline;
use step::Step;
pub use world::{MeasuredLink, Profile, SegmentTime, World};

/// Why a program cannot be simulated.
#[derive(Debug, Error, PartialEq)]
pub enum Error {
    /// The profile lacks a segment.
    #[error("the profile has no time for the {pass} pass of {segment}; measure this machine again")]
    Unmeasured {
        /// Which segment.
        segment: Segment,
        /// In which direction.
        pass: Pass,
    },
    /// The accelerator does not compute in this precision.
    #[error("accelerator {accelerator} has no {precision}; it has {}", known.join(", "))]
    Precision {
        /// Which accelerator.
        accelerator: String,
        /// What was asked for.
        precision: Precision,
        /// What it has.
        known: Vec<String>,
    },
    /// Nothing was fitted on this accelerator with this software.
    #[error(
        "nothing was fitted on {accelerator} with {software}; {}",
        if known.is_empty() { "give a share of peak with --efficiency".to_owned() } else { format!("there is {}", known.join(", ")) }
    )]
    Uncalibrated {
        /// Which accelerator.
        accelerator: String,
        /// Which software was asked for.
        software: String,
        /// The software that something was fitted with on it.
        known: Vec<String>,
    },
    /// The program has more ranks than the cluster has accelerators.
    #[error("cluster {cluster} has {accelerators} accelerators, the program {ranks} ranks")]
    TooSmall {
        /// Which cluster.
        cluster: String,
        /// What it has.
        accelerators: u32,
        /// What the program needs.
        ranks: u32,
    },
    /// A number with which nothing would ever end.
    #[error("`{key}` = {value} cannot be simulated; rates must be positive, times not negative")]
    Unusable {
        /// Which number.
        key: &'static str,
        /// Its value.
        value: f64,
    },
    /// The cluster's parts do not fit together.
    #[error(transparent)]
    Cluster(#[from] cluster::Error),
    /// A disturbance of a rank that the program does not have.
    #[error("there is no {rank}; ranks are numbered 0 to {}", ranks - 1)]
    NoSuchRank {
        /// Which.
        rank: Rank,
        /// How many there are.
        ranks: u32,
    },
    /// A file of NCCL's that cannot be read as what it should be.
    #[error("{file}:{line}: <{element}> {reason}")]
    Import {
        /// Which file.
        file: String,
        /// In which line, from 1.
        line: u32,
        /// At which element.
        element: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The program would hang; its verifier says why.
    #[error("the program cannot go on: {}", blocked.join("; "))]
    Stuck {
        /// Where the ranks stand.
        blocked: Vec<String>,
    },
}

/// Runs one step of `program` in virtual time, from a start common to all ranks.
///
/// The trace has a compute span for every instruction that computes, a wait span wherever a rank
/// was held up (by a wait, or by a post while too many transfers were in flight), and a transfer
/// span from each post to its completion on that rank. Equal arguments give equal traces.
///
/// # Errors
/// When the world lacks a number that the program needs or has a useless one, and when the program
/// would hang.
pub fn simulate(program: &Program, world: &World) -> Result<Trace, Error> {
    match world {
        World::Profile(profile) => {
            profile.check()?;
            let machine = Measured::new(profile, program.mesh.ranks());
            Simulation::new(program, profile, machine)?.run()
        }
        World::Roofline(roofline) => Step::new(program, roofline)?.trace_of_all(),
    }
}

#[cfg(test)]
mod tests;
