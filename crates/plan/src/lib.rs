//! Parallel layouts, and their lowering to programs.
//!
//! A [`Layout`] says how a model is spread over ranks; [`lower`] turns it into the instruction
//! lists that the simulator and the runtime read. New parallelism is new lowering here, and
//! nothing else.

mod check;
pub mod estimate;
mod layout;
mod lower;
pub mod memory;
mod options;
mod partial;
pub mod price;
mod schedule;
pub mod search;

pub use check::LayoutError;
pub use layout::{Batch, Layout};
pub use lower::{lower, lower_evaluation, lower_outer};
pub use options::{ContextExchange, Recompute, Shard, TensorOverlap, Timing};
pub use partial::PartialLayout;
pub use schedule::{Schedule, Turn};

#[cfg(test)]
mod tests;
