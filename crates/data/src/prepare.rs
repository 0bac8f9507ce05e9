//! From a job's text to an open token file, by way of a cache.

use std::path::{Path, PathBuf};

use units::Bytes;
use xxhash_rust::xxh3::xxh3_128;

use crate::{Corpus, Environment, Error, TokenFile, Tokenizer, tokens};

/// Raised whenever [`Tokenizer::train`] comes to give another result, so that no cached tokenizer
/// of the old kind is taken for one of the new.
const TRAINING_VERSION: u128 = 1;

/// What a job says about its text.
#[derive(Debug, Clone, PartialEq)]
pub struct Source {
    /// Files, folders and globs, as [`Corpus::open`] reads them.
    pub patterns: Vec<String>,
    /// Take no more text than this; `None` takes all.
    pub limit: Option<Bytes>,
    /// Where the tokenizer comes from.
    pub tokenizer: TokenizerSource,
}

/// Where a tokenizer comes from.
#[derive(Debug, Clone, PartialEq)]
pub enum TokenizerSource {
    /// A Hugging Face `tokenizer.json`; `~` and `${...}` are expanded.
    File(String),
    /// Trained on the text, with exactly this many tokens.
    Train {
        /// Tokens in the vocabulary.
        vocabulary: u64,
    },
}

/// Text made ready to train on.
#[derive(Debug)]
pub struct Prepared {
    /// Every document's tokens.
    pub tokens: TokenFile,
    /// The tokenizer that made them.
    pub tokenizer: Tokenizer,
    /// How many documents there are.
    pub documents: u64,
    /// The UTF-8 bytes of the documents.
    pub bytes: Bytes,
    /// Files passed over because they are not text.
    pub skipped: u64,
}

/// A part of the preparation that takes long enough to watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The tokenizer is being trained; heard of when it begins and when it ends.
    TrainingTokenizer,
    /// The text is being encoded; heard of after every batch.
    Encoding,
}

/// How far a stage has come.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// The stage.
    pub stage: Stage,
    /// Text done.
    pub done: Bytes,
    /// Text in all.
    pub total: Bytes,
}

/// Reads the text of `source`, finds or trains its tokenizer, and opens its token file.
///
/// The tokenizer and the token file are kept in the folder `cache` under names that hold a hash of
/// what they were made from: what is there is used again, what is missing or damaged is built. Any
/// number of processes may prepare the same source at once; they build the same bytes.
///
/// # Errors
/// Those of [`Corpus::open`], [`Tokenizer::from_file`], [`Tokenizer::train`] and
/// [`TokenFile::build`].
pub fn prepare(
    source: &Source,
    cache: &Path,
    environment: Environment<'_>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Prepared, Error> {
    let corpus = Corpus::open(&source.patterns, source.limit, environment)?;
    let tokenizer = match &source.tokenizer {
        TokenizerSource::File(path) => {
            Tokenizer::from_file(Path::new(&crate::expand(path, environment)?))?
        }
        TokenizerSource::Train { vocabulary } => trained(&corpus, *vocabulary, cache, progress)?,
    };
    Ok(Prepared {
        tokens: encoded(&corpus, &tokenizer, cache, progress)?,
        tokenizer,
        documents: corpus.documents(),
        bytes: corpus.bytes(),
        skipped: corpus.skipped(),
    })
}

/// The tokenizer trained on `corpus`, from the cache if it is there.
fn trained(
    corpus: &Corpus,
    vocabulary: u64,
    cache: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<Tokenizer, Error> {
    let parts = [
        corpus.fingerprint(),
        u128::from(vocabulary),
        TRAINING_VERSION,
    ];
    let made_from = xxh3_128(&parts.map(u128::to_le_bytes).concat());
    let path = cached(cache, "tokenizer", made_from, "json");
    match Tokenizer::from_file(&path) {
        Ok(tokenizer) if tokenizer.vocabulary() == vocabulary => return Ok(tokenizer),
        _ => {}
    }
    let total = corpus.bytes();
    progress(Progress {
        stage: Stage::TrainingTokenizer,
        done: Bytes::ZERO,
        total,
    });
    let tokenizer = Tokenizer::train(corpus, vocabulary)?;
    tokenizer.save(&path)?;
    progress(Progress {
        stage: Stage::TrainingTokenizer,
        done: total,
        total,
    });
    Ok(tokenizer)
}

/// The token file of `corpus`, from the cache if it is there.
fn encoded(
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    cache: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<TokenFile, Error> {
    let made_from = tokens::fingerprint(corpus, tokenizer);
    let path = cached(cache, "tokens", made_from, "bin");
    match TokenFile::open(&path) {
        Ok(tokens) if tokens.fingerprint() == made_from => Ok(tokens),
        _ => TokenFile::build(corpus, tokenizer, &path, progress),
    }
}

fn cached(cache: &Path, kind: &str, made_from: u128, extension: &str) -> PathBuf {
    cache.join(format!("{kind}-{made_from:032x}.{extension}"))
}
