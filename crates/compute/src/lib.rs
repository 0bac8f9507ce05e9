//! Carries out compute instructions: the operators of a Llama, forward and backward, on a device.
//!
//! [`Operators`] is the narrow trait that a device implements; [`Stage`] holds what one rank
//! holds (parameters, optimizer state, values on their way) and carries out instructions in terms
//! of it. There is no autograd: each backward is written out, so that memory is exact, every
//! operator can be timed, and later axes can cut between any two of them.

#[cfg(feature = "burn")]
mod burn;
mod cpu;
mod operators;
mod random;
mod sizes;
mod stage;
mod tensor;

#[cfg(feature = "burn")]
pub use burn::Burn;
pub use cpu::Cpu;
pub use operators::{
    AdamW, AttentionDims, ELSEWHERE, Live, Operators, Pairing, ProductDims, Rotation, ScoreDims,
    Sight, UNSEEN, Window, WindowMut,
};
pub use sizes::Sizes;
pub use stage::{Microbatch, Optimizer, OuterOptimizer, Precision, Stage, StageSpec};

#[cfg(test)]
mod conformance;
