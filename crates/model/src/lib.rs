//! Llama-class models as arithmetic: parameters, operators, FLOPs and bytes.
//!
//! Nothing here holds a tensor or knows a device. A model is a [`Config`]; its parameters come in
//! [`Block`]s (what is gathered, reduced and updated together), its work in [`Segment`]s (what an
//! instruction of a program carries out), and each segment in [`Operator`]s (what is counted,
//! costed and timed).

pub mod catalogue;
mod config;
mod error;
pub mod hugging_face;
mod operator;
mod parameters;
mod part;
mod rotary;
mod segment;
mod shape;
mod stored;
mod variants;
mod work;

pub use config::{Config, ConfigError};
pub use error::Error;
pub use operator::Operator;
pub use parameters::{Block, Parameter, Role, Split};
pub use part::{Place, Run};
pub use rotary::{Llama3Scaling, Rotary};
pub use segment::{Pass, Segment};
pub use shape::{AttentionKernel, Shape};
pub use stored::Architecture;
pub use variants::{Activation, Experts, LatentAttention, Norm, Positions, Scoring, SlidingWindow};
pub use work::Counting;
