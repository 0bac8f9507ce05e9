//! Whole steps on described hardware.

mod costs;

pub use costs::{Costs, Resource, TransferCost};
