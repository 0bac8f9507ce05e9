//! Collective algorithms as data: per-rank lists of sends and receives of chunks.
//!
//! A [`Schedule`] says what every member of a group sends and receives, in which order it reduces,
//! and how many sends to one peer may be under way. [`Schedule::verify`] proves it symbolically, an
//! [`Executor`] walks one member's list, and [`Algorithm::cost`] is its closed form. The simulator
//! drives the executor with virtual time and the runtime with bytes; neither has its own copy of an
//! algorithm.
//!
//! Members are numbered by their position in the group, from 0; which ranks of the job they are is
//! the caller's business.

mod algorithm;
mod executor;
mod schedule;
mod verify;

pub use algorithm::{Algorithm, Cost, direct, ring};
pub use executor::Executor;
pub use schedule::{Action, Kind, Schedule, Step, chunk_range};
pub use verify::Error;
