//! The token file: a checked header, then every document's tokens, each followed by an end of text.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use units::Bytes;
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use crate::corpus::Digest;
use crate::disk::write_atomically;
use crate::prepare::{Progress, Stage};
use crate::{Corpus, Error, Tokenizer};

const MAGIC: [u8; 8] = *b"PHLXTOKN";
const VERSION: u32 = 1;

/// Text encoded at once: enough documents to keep every core busy, few enough for any memory.
const BATCH_BYTES: usize = 1 << 20;

/// Bytes read at once while the checksum is verified.
const CHECK_BYTES: usize = 1 << 20;

/// The first bytes of the file, little-endian, in this order after magic and version.
#[derive(Debug, Clone, Copy)]
pub struct Header {
    /// One more than the largest token; up to 65,536 a token takes two bytes, above it four.
    vocabulary: u64,
    /// Tokens in the payload.
    tokens: u64,
    /// Of the text and the tokenizer.
    fingerprint: u128,
}

impl Header {
    /// Magic, version, the fields, checksum.
    pub const BYTES: usize = 8 + 4 + 8 + 8 + 16 + 16;
    const CHECKSUM_AT: usize = Self::BYTES - 16;

    fn word_bytes(&self) -> usize {
        if self.vocabulary <= 1 << 16 { 2 } else { 4 }
    }

    /// The header's bytes; the checksum covers `payload` and then all that stands before itself.
    fn to_bytes(self, mut payload: Xxh3) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..20].copy_from_slice(&self.vocabulary.to_le_bytes());
        bytes[20..28].copy_from_slice(&self.tokens.to_le_bytes());
        bytes[28..44].copy_from_slice(&self.fingerprint.to_le_bytes());
        payload.update(&bytes[..Self::CHECKSUM_AT]);
        bytes[Self::CHECKSUM_AT..].copy_from_slice(&payload.digest128().to_le_bytes());
        bytes
    }

    /// Reads the fields, or says why these bytes begin no token file.
    fn from_bytes(bytes: &[u8; Self::BYTES]) -> Result<Self, String> {
        if bytes[..8] != MAGIC {
            return Err("it is not a token file".into());
        }
        let version = u32::from_le_bytes(array(&bytes[8..12]));
        if version != VERSION {
            return Err(format!(
                "it has version {version}, this program reads {VERSION}"
            ));
        }
        Ok(Self {
            vocabulary: u64::from_le_bytes(array(&bytes[12..20])),
            tokens: u64::from_le_bytes(array(&bytes[20..28])),
            fingerprint: u128::from_le_bytes(array(&bytes[28..44])),
        })
    }
}

/// A slice of known length as an array.
fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(bytes);
    array
}

/// The tokens of a corpus on disk, checked when opened.
///
/// Windows are read at their position rather than mapped into memory: one sequence is one read of
/// a few KiB, which the page cache serves as fast as a mapping would, and a file that is truncated
/// under a running job is an error that names it instead of a fatal signal.
#[derive(Debug)]
pub struct TokenFile {
    file: File,
    path: PathBuf,
    header: Header,
}

impl TokenFile {
    /// Encodes `corpus` into `path`, which appears whole or not at all, and opens it.
    ///
    /// Documents are encoded on all cores and written in order. `progress` hears of the bytes of
    /// text done.
    ///
    /// # Errors
    /// Text that no longer reads or has [`Error::Changed`], a tokenizer that fails, a folder that
    /// cannot be written.
    pub fn build(
        corpus: &Corpus,
        tokenizer: &Tokenizer,
        path: &Path,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Self, Error> {
        write_atomically(path, |file| {
            let header = Header {
                vocabulary: tokenizer.vocabulary(),
                tokens: 0,
                fingerprint: fingerprint(corpus, tokenizer),
            };
            let mut writer = Writer::new(path, file, header)?;
            encode(corpus, tokenizer, &mut writer, progress)?;
            writer.finish()
        })?;
        Self::open(path)
    }

    /// Opens a token file and verifies its header, length and checksum.
    ///
    /// # Errors
    /// [`Error::Read`], or [`Error::Damaged`] with what is wrong.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(Error::read(path))?;
        let length = file.metadata().map_err(Error::read(path))?.len();
        if length < Header::BYTES as u64 {
            let reason = format!("{} is too short for its header", Bytes(length));
            return Err(Error::damaged(path, reason));
        }
        let mut bytes = [0; Header::BYTES];
        file.read_exact_at(&mut bytes, 0)
            .map_err(Error::read(path))?;
        let header = Header::from_bytes(&bytes).map_err(|reason| Error::damaged(path, reason))?;
        let tokens = Self {
            file,
            path: path.into(),
            header,
        };
        tokens.check(length, &bytes)?;
        Ok(tokens)
    }

    /// Verifies the length and the checksum against the header.
    fn check(&self, length: u64, header: &[u8; Header::BYTES]) -> Result<(), Error> {
        let word = self.header.word_bytes() as u64;
        let payload = length - Header::BYTES as u64;
        if self.header.tokens.checked_mul(word) != Some(payload) {
            let reason = format!(
                "it holds {payload} bytes of tokens where its header says {} tokens of {word}",
                self.header.tokens
            );
            return Err(Error::damaged(&self.path, reason));
        }
        if self.header.to_bytes(self.hash(length)?) != *header {
            let reason = "its checksum does not match its content";
            return Err(Error::damaged(&self.path, reason));
        }
        Ok(())
    }

    /// The hash of the payload of a file of `length` bytes.
    fn hash(&self, length: u64) -> Result<Xxh3, Error> {
        let mut hash = Xxh3::new();
        let mut buffer = vec![0; CHECK_BYTES];
        for at in (Header::BYTES as u64..length).step_by(CHECK_BYTES) {
            let size = (length - at).min(CHECK_BYTES as u64) as usize;
            self.read_at(&mut buffer[..size], at)?;
            hash.update(&buffer[..size]);
        }
        Ok(hash)
    }

    /// Reads the tokens `start..start + into.len()`.
    ///
    /// # Errors
    /// [`Error::Read`] where the file no longer reads.
    ///
    /// # Panics
    /// When the window reaches beyond [`TokenFile::tokens`]: a sampler made for another file.
    pub fn window(&self, start: u64, into: &mut [u32]) -> Result<(), Error> {
        let end = start.checked_add(into.len() as u64);
        assert!(
            end.is_some_and(|end| end <= self.header.tokens),
            "window of {} tokens at {start} in a file of {}",
            into.len(),
            self.header.tokens
        );
        let word = self.header.word_bytes();
        let mut bytes = vec![0; into.len() * word];
        self.read_at(&mut bytes, Header::BYTES as u64 + start * word as u64)?;
        for (token, bytes) in into.iter_mut().zip(bytes.chunks_exact(word)) {
            *token = match word {
                2 => u32::from(u16::from_le_bytes(array(bytes))),
                _ => u32::from_le_bytes(array(bytes)),
            };
        }
        Ok(())
    }

    fn read_at(&self, into: &mut [u8], at: u64) -> Result<(), Error> {
        self.file
            .read_exact_at(into, at)
            .map_err(Error::read(&self.path))
    }

    /// How many tokens the file holds.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.header.tokens
    }

    /// One more than the largest token the tokenizer has.
    #[must_use]
    pub fn vocabulary(&self) -> u64 {
        self.header.vocabulary
    }

    /// A hash of the text and the tokenizer that the file was built from.
    #[must_use]
    pub fn fingerprint(&self) -> u128 {
        self.header.fingerprint
    }

    /// Where the file lies, for another process to open.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The fingerprint of the token file of a corpus under a tokenizer.
pub fn fingerprint(corpus: &Corpus, tokenizer: &Tokenizer) -> u128 {
    let parts = [
        corpus.fingerprint(),
        tokenizer.fingerprint(),
        u128::from(VERSION),
    ];
    xxh3_128(&parts.map(u128::to_le_bytes).concat())
}

/// A token file being written: its payload goes first, its header when both are known.
struct Writer<'a> {
    path: &'a Path,
    file: BufWriter<&'a File>,
    header: Header,
    hash: Xxh3,
}

impl<'a> Writer<'a> {
    fn new(path: &'a Path, file: &'a File, header: Header) -> Result<Self, Error> {
        let mut writer = Self {
            path,
            file: BufWriter::new(file),
            header,
            hash: Xxh3::new(),
        };
        writer.write(&[0; Header::BYTES])?;
        Ok(writer)
    }

    fn push(&mut self, tokens: &[u32]) -> Result<(), Error> {
        let word = self.header.word_bytes();
        let bytes: Vec<u8> = tokens
            .iter()
            .flat_map(|token| token.to_le_bytes().into_iter().take(word))
            .collect();
        self.header.tokens += tokens.len() as u64;
        self.hash.update(&bytes);
        self.write(&bytes)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let path = self.path;
        self.file.write_all(bytes).map_err(Error::write(path))
    }

    fn finish(mut self) -> Result<(), Error> {
        let header = self.header.to_bytes(self.hash);
        self.file
            .flush()
            .and_then(|()| self.file.get_ref().write_all_at(&header, 0))
            .map_err(Error::write(self.path))
    }
}

/// Encodes all of `corpus` in batches of documents, each on all cores.
fn encode(
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    writer: &mut Writer<'_>,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), Error> {
    let mut texts = corpus.texts();
    let mut seen = Digest::default();
    loop {
        let batch = next_batch(&mut texts, &mut seen)?;
        if batch.is_empty() {
            break;
        }
        for tokens in encode_batch(&batch, tokenizer)? {
            writer.push(&tokens)?;
        }
        progress(Progress {
            stage: Stage::Encoding,
            done: seen.bytes,
            total: corpus.bytes(),
        });
    }
    // A file edited since the corpus was opened would be cached under the wrong fingerprint.
    if seen.fingerprint() != corpus.fingerprint() {
        return Err(Error::Changed);
    }
    Ok(())
}

/// The next documents, [`BATCH_BYTES`] of them or a little more; none at the end.
fn next_batch(
    texts: &mut impl Iterator<Item = Result<String, Error>>,
    seen: &mut Digest,
) -> Result<Vec<String>, Error> {
    let mut batch = Vec::new();
    let mut bytes = 0;
    while bytes < BATCH_BYTES
        && let Some(text) = texts.next().transpose()?
    {
        seen.add(&text);
        bytes += text.len();
        batch.push(text);
    }
    Ok(batch)
}

/// The tokens of each document of a batch with the end of text after it, in the order given.
fn encode_batch(batch: &[String], tokenizer: &Tokenizer) -> Result<Vec<Vec<u32>>, Error> {
    batch
        .par_iter()
        .map(|text| {
            let mut tokens = tokenizer.encode(text)?;
            tokens.push(tokenizer.end_of_text());
            Ok(tokens)
        })
        .collect()
}
