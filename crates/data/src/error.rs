//! What the world can do wrong between a job's text and its tokens.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Text, a tokenizer or a token file that cannot be used; each says what to do next.
#[derive(Debug, Error)]
pub enum Error {
    /// A path refers to an environment variable that is not set.
    #[error(
        "`{written}` uses the environment variable {variable}, which is not set; set it, or give a default: ${{{variable}:-...}}"
    )]
    Variable {
        /// The path as written.
        written: String,
        /// The variable's name.
        variable: String,
    },
    /// A `${` without its `}`.
    #[error("`{0}` opens `${{` and does not close it; write ${{NAME}} or ${{NAME:-default}}")]
    Unclosed(String),
    /// A glob that does not parse.
    #[error("`{written}` is not a valid pattern: {source}; escape special characters as [*]")]
    Pattern {
        /// The pattern as written.
        written: String,
        /// What is wrong with it.
        source: glob::PatternError,
    },
    /// A pattern without a single file.
    #[error(
        "no file matches `{written}` (expanded to `{expanded}`); name a file, a folder or a glob that exists"
    )]
    NothingMatched {
        /// The pattern as written.
        written: String,
        /// The pattern with its home folder and variables filled in.
        expanded: String,
    },
    /// Files were found, and no text in them.
    #[error(
        "no text in the {files} files found, of which {skipped} are not UTF-8; name files with text, or raise the limit"
    )]
    NoText {
        /// Files that matched.
        files: usize,
        /// How many of them are binary.
        skipped: u64,
    },
    /// A file or folder that cannot be read.
    #[error("cannot read {}: {source}; check that it exists and may be read", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file that cannot be written.
    #[error("cannot write {}: {source}; check the folder's permissions and free space", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file named as text that is not.
    #[error("{} is not UTF-8 text; convert it, or leave it out", .0.display())]
    NotText(PathBuf),
    /// A line of a `.jsonl` file that is not an object with a string under `text`.
    #[error("{}, line {line}: {reason}; each line must be {{\"text\": \"...\"}}", path.display())]
    JsonLine {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What the parser said, with the column.
        reason: String,
    },
    /// The text changed between its first reading and its encoding.
    #[error("the text changed while it was being prepared; run again once nothing writes to it")]
    Changed,
    /// A `tokenizer.json` that cannot be used.
    #[error("{} is not a usable tokenizer: {reason}; give a Hugging Face tokenizer.json", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The tokenizer refused a text or a sequence of tokens.
    #[error("the tokenizer failed: {0}; check its tokenizer.json")]
    Tokenization(String),
    /// A vocabulary that cannot hold every byte and the end-of-text token.
    #[error("a vocabulary of {asked} is too small; a byte-level one needs at least {least}")]
    VocabularyTooSmall {
        /// The vocabulary asked for.
        asked: u64,
        /// The smallest there is.
        least: u64,
    },
    /// The text has fewer distinct words than the vocabulary asked for.
    #[error(
        "the text fills a vocabulary of {reached} only, {asked} were asked for; ask for {reached} or fewer, or give more text"
    )]
    VocabularyTooLarge {
        /// The vocabulary asked for.
        asked: u64,
        /// The largest this text fills.
        reached: u64,
    },
    /// A token file that is not one, or not whole.
    #[error("{} is damaged: {reason}; delete it, and the next run builds it again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A sampling setting outside its range.
    #[error("`{key}` = {value} cannot be sampled; it must be {range}")]
    Setting {
        /// The setting's name.
        key: &'static str,
        /// Its value.
        value: String,
        /// The values allowed.
        range: &'static str,
    },
    /// The text does not fill one batch after the held-out part is set aside.
    #[error(
        "the text is too short for one batch: {available} tokens, and {needed} are needed for {global_batch} sequences of {sequence} tokens beside the held-out ones; give more text, or lower `global_batch` or `sequence`"
    )]
    TooShort {
        /// Tokens in the text.
        available: u64,
        /// The fewest that would do.
        needed: u64,
        /// Sequences per step.
        global_batch: u64,
        /// Tokens per sequence.
        sequence: u64,
    },
}

impl Error {
    /// Names the file or folder that a read failed on.
    pub(crate) fn read(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Read {
            path: path.into(),
            source,
        }
    }

    /// Names the file that a write failed on.
    pub(crate) fn write(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Write {
            path: path.into(),
            source,
        }
    }

    pub(crate) fn damaged(path: &Path, reason: impl Into<String>) -> Self {
        Self::Damaged {
            path: path.into(),
            reason: reason.into(),
        }
    }
}
