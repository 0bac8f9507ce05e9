//! The real runtime: ranks that carry out their programs together.
//!
//! [`Identity`] says which rank a process is, [`control`] starts local ones and keeps them going, a [`Worker`] carries
//! out programs, [`measure`] finds out how fast this machine does, and [`run`] trains. Which
//! program, on what hardware, and how it is shown are others' business.

mod agreement;
mod batches;
mod choose;
pub mod control;
mod copies;
mod error;
mod export;
mod identity;
mod launch;
mod learning_rate;
mod measure;
mod memory;
mod numbers;
mod pace;
mod replicas;
mod resume;
mod run;
mod safekeeping;
mod secret;
mod state;
mod worker;

pub use batches::Batches;
pub use copies::{Delivery, Holding, agree, deliveries};
pub use error::Error;
pub use export::export;
pub use identity::{Identity, Launcher};
pub use learning_rate::LearningRate;
pub use measure::{LinkTimes, Measurements, Rehearsal, measure};
pub use memory::planned_peak;
pub use numbers::{Norms, OnDivergence};
pub use pace::{Pace, Slow};
pub use replicas::Replicas;
pub use resume::{Resumed, resume};
pub use run::{Event, Outcome, Programs, Settings, StateSource, run};
pub use safekeeping::{Checkpoints, Safekeeping};
pub use secret::secret;
pub use state::{restore, saved_blocks, snapshot};
pub use worker::{Clock, Device, Worker};

#[cfg(test)]
mod tests;
