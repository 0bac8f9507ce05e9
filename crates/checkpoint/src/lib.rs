//! Models on disk.
//!
//! [`hugging_face`] reads and writes the files that Hugging Face transformers does. Nothing here
//! knows the network or a tensor library: parameters come and go as flat buffers, one per
//! [`model::Block`].

mod atomic;
mod error;
pub mod hugging_face;

pub use error::Error;
