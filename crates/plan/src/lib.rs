//! Parallel layouts, and their lowering to programs.
//!
//! A [`Layout`] says how a model is spread over ranks; [`lower`] turns it into the instruction
//! lists that the simulator and the runtime read. New parallelism is new lowering here, and
//! nothing else.

mod layout;
mod lower;
pub mod memory;
mod schedule;

pub use layout::{Batch, Layout, LayoutError, PartialLayout, Shard};
pub use lower::{lower, lower_evaluation};

#[cfg(test)]
mod tests;
