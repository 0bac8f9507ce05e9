//! Text to tokens and back, by a Hugging Face `tokenizer.json` or one trained here.

use std::fs;
use std::io::Write;
use std::path::Path;

use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};
use xxhash_rust::xxh3::xxh3_128;

use crate::disk::write_atomically;
use crate::{Corpus, Error};

/// The token that a tokenizer trained here puts after every document.
pub const END_OF_TEXT: &str = "<|end_of_text|>";

/// What published tokenizers call the token after a document; the first one present is used.
const ENDS: [&str; 5] = [END_OF_TEXT, "<|endoftext|>", "</s>", "<eos>", "<|eot_id|>"];

/// Every byte has a token, and the end of text has one.
const LEAST_VOCABULARY: u64 = 257;

/// Training looks at no more text than this: merges of a larger sample differ little, and the time
/// stays within seconds.
const SAMPLE_BYTES: usize = 16 << 20;

/// How Llama 3 splits text into words before any merge: contractions, letters with one leading
/// character, up to three digits, punctuation, line ends, blanks.
const WORDS: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// A tokenizer that knows its vocabulary and its end-of-text token.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The `tokenizer.json` it was made from, kept so that saving and hashing are exact.
    json: Vec<u8>,
    end_of_text: u32,
    vocabulary: u64,
}

impl Tokenizer {
    /// Reads a Hugging Face `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::Read`], or [`Error::Tokenizer`] where it does not parse or names no end of text.
    pub fn from_file(path: &Path) -> Result<Self, Error> {
        let json = fs::read(path).map_err(Error::read(path))?;
        Self::from_json(json).map_err(|reason| Error::Tokenizer {
            path: path.into(),
            reason: reason.to_string(),
        })
    }

    fn from_json(json: Vec<u8>) -> tokenizers::Result<Self> {
        let mut inner = tokenizers::Tokenizer::from_bytes(&json)?;
        // A document is cut and filled by the sampler alone, whatever the file says.
        inner.with_truncation(None)?.with_padding(None);
        // Text that spells a special token (this very file does) must not become one.
        inner.set_encode_special_tokens(true);
        let end_of_text = ENDS
            .iter()
            .find_map(|end| inner.token_to_id(end))
            .ok_or_else(|| format!("it has none of the end-of-text tokens {}", ENDS.join(", ")))?;
        let largest = inner
            .get_vocab(true)
            .into_values()
            .max()
            .unwrap_or(end_of_text);
        Ok(Self {
            inner,
            json,
            end_of_text,
            vocabulary: u64::from(largest) + 1,
        })
    }

    /// Trains a byte-level BPE with Llama 3's word splitting, of exactly `vocabulary` tokens: the
    /// end of text (token 0), the 256 bytes, then merges. The same corpus gives the same tokenizer.
    ///
    /// A corpus above 16 MiB is sampled: every k-th document, k as small as fits.
    ///
    /// # Errors
    /// A vocabulary that is too small for the bytes or too large for the text; a corpus that no
    /// longer reads.
    pub fn train(corpus: &Corpus, vocabulary: u64) -> Result<Self, Error> {
        if vocabulary < LEAST_VOCABULARY {
            return Err(Error::VocabularyTooSmall {
                asked: vocabulary,
                least: LEAST_VOCABULARY,
            });
        }
        let sample = sample(corpus, SAMPLE_BYTES)?;
        let tokenizer = train(&sample, vocabulary).map_err(tokenization)?;
        if tokenizer.vocabulary < vocabulary {
            let reached = tokenizer.vocabulary;
            return Err(Error::VocabularyTooLarge {
                asked: vocabulary,
                reached,
            });
        }
        Ok(tokenizer)
    }

    /// Writes a `tokenizer.json` that Hugging Face `transformers` reads; one that was read is
    /// written back byte for byte.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn save(&self, path: &Path) -> Result<(), Error> {
        write_atomically(path, |mut file| {
            file.write_all(&self.json).map_err(Error::write(path))
        })
    }

    /// The tokens of a text, without any special token before or after.
    ///
    /// # Errors
    /// [`Error::Tokenization`] where the tokenizer has no token for a part of the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let encoding = self.inner.encode_fast(text, false).map_err(tokenization)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of some tokens, special ones included.
    ///
    /// # Errors
    /// [`Error::Tokenization`] where the tokenizer's decoder fails.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, Error> {
        self.inner.decode(tokens, false).map_err(tokenization)
    }

    /// The smallest vocabulary of a model that takes every token: one more than the largest.
    #[must_use]
    pub fn vocabulary(&self) -> u64 {
        self.vocabulary
    }

    /// The token that stands after every document.
    #[must_use]
    pub fn end_of_text(&self) -> u32 {
        self.end_of_text
    }

    /// A hash of the `tokenizer.json`.
    #[must_use]
    pub fn fingerprint(&self) -> u128 {
        xxh3_128(&self.json)
    }
}

fn tokenization(error: tokenizers::Error) -> Error {
    Error::Tokenization(error.to_string())
}

/// Every k-th document, k the smallest that keeps the sample near `limit`; the last one is cut.
fn sample(corpus: &Corpus, limit: usize) -> Result<Vec<String>, Error> {
    let stride = corpus.bytes().0.div_ceil(limit as u64).max(1);
    let mut sample = Vec::new();
    let mut room = limit;
    for (index, text) in corpus.texts().enumerate() {
        let mut text = text?;
        if room == 0 {
            break;
        }
        if (index as u64).is_multiple_of(stride) {
            text.truncate(text.floor_char_boundary(room));
            room -= text.len();
            sample.push(text);
        }
    }
    Ok(sample)
}

/// Trains on `sample` and reads the result back, so that a tokenizer just trained and the same one
/// loaded from its file are one.
fn train(sample: &[String], vocabulary: u64) -> tokenizers::Result<Tokenizer> {
    let mut trainer: TrainerWrapper = BpeTrainerBuilder::new()
        .vocab_size(usize::try_from(vocabulary)?)
        .show_progress(false)
        .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build()
        .into();
    let words = Split::new(
        SplitPattern::Regex(WORDS.into()),
        SplitDelimiterBehavior::Isolated,
        false,
    )?;
    let bytes = ByteLevel::new(false, true, false);
    let mut inner = tokenizers::Tokenizer::new(BPE::default());
    inner
        .with_pre_tokenizer(Some(Sequence::new(vec![words.into(), bytes.into()])))
        .with_decoder(Some(bytes))
        .train(&mut trainer, sample.iter())?;
    Tokenizer::from_json(inner.to_string(true)?.into_bytes())
}
