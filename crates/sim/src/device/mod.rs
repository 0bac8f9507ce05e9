//! The described device: what operators take on an accelerator.

mod calibrated;
mod calibration;
mod habits;
mod kernels;
#[cfg(test)]
mod tests;

pub use calibrated::Calibrated;
pub use calibration::{Calibration, Traffic};
pub use habits::{Graphs, Habits};
pub use kernels::{Device, Kernels};
