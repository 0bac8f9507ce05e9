//! Who belongs to a run at this moment, and what happens when one is lost.
//!
//! [`Coordinator`] decides: a state machine without clock, socket or process. [`supervise`] drives
//! it with the processes of this host, and a [`Lifeline`] is a rank's connection to it.
//! [`simulation`] drives the same coordinator with a clock, a network and a disk that do their worst.

mod coordinator;
pub mod goodput;
mod lifeline;
pub mod simulation;
mod supervise;

pub use coordinator::{Action, Coordinator, End, Event, Policy, Verdict};
pub use lifeline::{Lifeline, Meeting};
pub use supervise::supervise;

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use units::Rank;

/// What a rank says to the coordinator, one JSON object a line.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
enum Word {
    /// First of all: which process of which rank it is, and that it is one of ours.
    Hello { rank: Rank, incarnation: u64, secret: u64 },
    /// It lives, and has done so many steps.
    Alive { step: u64 },
    /// It has lost the others after so many steps, and listens for them here.
    Ready { address: SocketAddr, step: u64 },
}

/// The longest line that is read, in bytes.
const LINE_LIMIT: u64 = 1 << 10;

/// Names the coordinator's address, its secret and this process's incarnation for the ranks.
const CONTROL: &str = "PHALANX_CONTROL";
