//! Collective algorithms as data: per-rank lists of sends and receives of chunks.
//!
//! A [`Collective`] generates what one member sends and receives, and in which order it reduces: its
//! [`Part`]. A [`Schedule`] is all members' parts, [`Schedule::verify`] proves it symbolically, an
//! [`Executor`] walks one member's list, and [`Collective::cost`] is the closed form. The simulator
//! drives the executor with virtual time and the runtime with bytes; neither has its own copy of an
//! algorithm.
//!
//! Members are numbered by their position in the group, from 0; which ranks of the job they are is
//! the caller's business.

mod algorithm;
mod collective;
mod error;
mod executor;
mod kind;
mod placement;
mod schedule;
mod text;
mod verify;

pub use algorithm::{Algorithm, Level};
pub use collective::{Collective, Cost};
pub use error::Error;
pub use executor::Executor;
pub use kind::{Contract, Kind};
pub use placement::Placement;
pub use schedule::{Action, Chunks, Part, Schedule, Step, chunk_range};
