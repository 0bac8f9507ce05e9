//! Views of steps and runs: pure functions from programs, traces and records to numbers and text.
//!
//! Nothing here knows whether a trace was predicted or measured; the two are shown side by side.

mod chakra;
pub mod page;
mod perfetto;
mod summary;
mod table;
mod tensorboard;

#[cfg(test)]
mod fixture;

pub use chakra::{Communicators, chakra};
pub use perfetto::{perfetto, read_perfetto};
pub use summary::Summary;
pub use table::{communication_table, summary_table, work_table};
pub use tensorboard::{tensorboard_head, tensorboard_scalars};
