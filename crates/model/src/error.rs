//! What is wrong with a description of a model.

use thiserror::Error;

use crate::ConfigError;

/// A model that cannot be found, read or built.
#[derive(Debug, Error, PartialEq)]
pub enum Error {
    /// The catalogue has no such model.
    #[error("the catalogue has no model `{name}`; the nearest is `{nearest}`")]
    UnknownModel {
        /// What was asked for.
        name: String,
        /// The catalogue's name that resembles it most.
        nearest: &'static str,
    },
    /// A `config.json` that is not a JSON object.
    #[error("not a JSON object: {0}")]
    Json(String),
    /// A key of a `config.json` that is missing, malformed, or asks for what no Llama has.
    #[error("`{key}` {problem}")]
    Key {
        /// The key, with the object it stands in.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Dimensions that contradict each other.
    #[error(transparent)]
    Config(#[from] ConfigError),
}
