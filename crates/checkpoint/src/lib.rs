//! Models on disk.
//!
//! [`hugging_face`] reads and writes the files that Hugging Face transformers does. [`sharded`] keeps
//! the whole state of training: written by many ranks, read by any other number of them, whole or
//! not there, and never loaded when damaged. Nothing here knows the network or a tensor library:
//! parameters come and go as flat buffers, one per [`model::Block`].

mod atomic;
mod error;
pub mod hugging_face;
pub mod sharded;
pub mod store;

pub use error::Error;
