//! What can go wrong with files.

use std::io;
use std::path::{Path, PathBuf};

use model::Block;
use thiserror::Error;
use units::Rank;

use crate::sharded::Kind;
use crate::store::Store;

/// A file that cannot be read or written, or does not hold what it should.
#[derive(Debug, Error)]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried: "open", "read", "write", "create".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// A store refused.
    #[error("cannot {action} {place}: {source}")]
    Store {
        /// What was tried: "read", "write", "list", "remove".
        action: &'static str,
        /// Which file of which store.
        place: String,
        /// The store's reason.
        source: io::Error,
    },
    /// A file of a checkpoint is not what was written.
    #[error("{place} is damaged: {problem}")]
    Damaged {
        /// Which file of which store.
        place: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A checkpoint of another model.
    #[error("{place} is of another model: {difference}; name the job it was made by")]
    OtherModel {
        /// Which file of which store.
        place: String,
        /// What differs.
        difference: String,
    },
    /// A checkpoint that lacks a part of the state.
    #[error("{place} lacks {kind} {element} of {block}, of which there are {elements}")]
    Gap {
        /// Which file of which store.
        place: String,
        /// Of what.
        kind: Kind,
        /// In which block.
        block: Block,
        /// The first missing element.
        element: u64,
        /// How many the block has.
        elements: u64,
    },
    /// A checkpoint that has a part of the state twice.
    #[error("{place} has {kind} {element} of {block} twice")]
    Overlap {
        /// Which file of which store.
        place: String,
        /// Of what.
        kind: Kind,
        /// In which block.
        block: Block,
        /// The first element that is there twice.
        element: u64,
    },
    /// A rank did not write its part in time.
    #[error("{folder} is not complete: {rank} wrote no part of it within {waited_s:.0} s")]
    Incomplete {
        /// The checkpoint.
        folder: String,
        /// The first rank that is missing.
        rank: Rank,
        /// How long it was waited for, in seconds.
        waited_s: f64,
    },
    /// A rank has lost its coordinator, and others may have taken its run over.
    #[error("{folder} is not made a checkpoint: others may have taken this run over")]
    NotOurs {
        /// The checkpoint.
        folder: String,
    },
    /// A `config.json` that describes no Llama.
    #[error("{}: {source}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: model::Error,
    },
    /// The folder holds no weights.
    #[error(
        "no model.safetensors and no model.safetensors.index.json in {}; name the folder that holds the downloaded model",
        folder.display()
    )]
    NoWeights {
        /// The folder.
        folder: PathBuf,
    },
    /// A file of weights that was cut short or damaged.
    #[error(
        "{} is not a whole safetensors file: {problem}; download or write it again",
        path.display()
    )]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// An index of shards that contradicts itself or the files beside it.
    #[error("{}: {problem}", path.display())]
    Index {
        /// The index.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A parameter of the model is not in the weights.
    #[error(
        "{}: no tensor `{tensor}`, which the config gives shape {expected:?}; are config.json and weights of the same model?",
        folder.display()
    )]
    Missing {
        /// The folder of the weights.
        folder: PathBuf,
        /// The parameter's Hugging Face name.
        tensor: String,
        /// Its shape by the config.
        expected: Vec<u64>,
    },
    /// A tensor has another shape than the config gives it.
    #[error(
        "{}: tensor `{tensor}` has shape {found:?}, the config gives it {expected:?}; are config.json and weights of the same model?",
        path.display()
    )]
    Shape {
        /// The file.
        path: PathBuf,
        /// The parameter's Hugging Face name.
        tensor: String,
        /// Its shape by the config.
        expected: Vec<u64>,
        /// Its shape in the file.
        found: Vec<u64>,
    },
    /// A tensor holds numbers that are not read.
    #[error(
        "{}: tensor `{tensor}` holds {found}; F32, F16 and BF16 are read, so convert it to one of them",
        path.display()
    )]
    Dtype {
        /// The file.
        path: PathBuf,
        /// The parameter's Hugging Face name.
        tensor: String,
        /// The dtype in the file.
        found: String,
    },
    /// Tensors that the model has no use for: it is another model.
    #[error(
        "{}: the config has no place for {}; are config.json and weights of the same model?",
        folder.display(),
        .tensors.join(", ")
    )]
    Unexpected {
        /// The folder of the weights.
        folder: PathBuf,
        /// The tensors' names, sorted.
        tensors: Vec<String>,
    },
}

impl Error {
    /// For `map_err`: what a store refused to do, and with which file.
    pub(crate) fn store(
        action: &'static str,
        store: &dyn Store,
        name: &str,
    ) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Store { action, place: store.place(name), source }
    }

    /// For `map_err`: what the operating system refused to do, and to which file.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }
}
