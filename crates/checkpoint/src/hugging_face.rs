//! A model folder of Hugging Face transformers: `config.json`, and the weights in
//! `model.safetensors` or in shards with an index.
//!
//! Reading: [`read_config`], [`Weights::open`], [`Weights::check`], then [`Weights::read_block`]
//! for the blocks a rank holds. Writing needs no communication: with a [`Writer`] each pipeline
//! stage writes the shard of its blocks, and one rank the index and the config.

mod file;
mod weights;
mod writer;

use std::fs;
use std::path::Path;

use model::Config;

use crate::Error;

pub use weights::Weights;
pub use writer::{Dtype, Writer};

const CONFIG: &str = "config.json";
const WHOLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Reads the `config.json` in `folder`.
///
/// # Errors
/// [`Error::Io`] if it cannot be read, [`Error::Config`] if it describes no Llama.
pub fn read_config(folder: &Path) -> Result<Config, Error> {
    let path = folder.join(CONFIG);
    let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    model::hugging_face::from_json(&text).map_err(|source| Error::Config { path, source })
}

#[cfg(test)]
mod tests;
