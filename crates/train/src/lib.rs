//! The real runtime: ranks that carry out their programs together.
//!
//! [`Identity`] says which rank a process is, [`launch`] starts local ones, a [`Worker`] carries
//! out programs, [`measure`] finds out how fast this machine does, and [`run`] trains. Which
//! program, on what hardware, and how it is shown are others' business.

mod agreement;
mod batches;
mod error;
mod export;
mod identity;
mod launch;
mod learning_rate;
mod measure;
mod resume;
mod run;
mod safekeeping;
mod state;
mod worker;

pub use batches::Batches;
pub use error::Error;
pub use export::export;
pub use identity::{Identity, Launcher};
pub use launch::{handed_listener, launch};
pub use learning_rate::LearningRate;
pub use measure::{LinkTimes, Measurements, measure};
pub use resume::{Resumed, resume};
pub use run::{Event, Outcome, Programs, Settings, run};
pub use safekeeping::{Checkpoints, Safekeeping};
pub use state::{restore, saved_blocks, snapshot};
pub use worker::{Clock, Device, Worker};

#[cfg(test)]
mod tests;
