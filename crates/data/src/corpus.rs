//! The text a job names: which files, which documents, in which order.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::iter;
use std::path::{Path, PathBuf};

use glob::{MatchOptions, Pattern};
use serde::Deserialize;
use units::Bytes;
use xxhash_rust::xxh3::Xxh3;

use crate::{Environment, Error, expand};

/// Hidden files and folders (`.git` above all) are text nobody meant, unless a pattern names them.
const SKIP_HIDDEN: MatchOptions = MatchOptions {
    case_sensitive: true,
    require_literal_separator: true,
    require_literal_leading_dot: true,
};

type Texts = Box<dyn Iterator<Item = Result<String, Error>>>;

/// The documents of a job, in the order of their full paths.
///
/// Holds paths and totals, not the text: each pass reads the files again, so a corpus may be far
/// larger than memory (one document may not).
#[derive(Debug)]
pub struct Corpus {
    files: Vec<PathBuf>,
    documents: u64,
    bytes: Bytes,
    skipped: u64,
    fingerprint: u128,
}

impl Corpus {
    /// Finds the files of `patterns` and reads them once, to count and to fingerprint.
    ///
    /// A pattern is a file, a folder (every text file below it) or a glob of both, after [`expand`]. A
    /// `.jsonl` file holds one document per line, under `text`; every other file is one document.
    /// Empty documents are none. With `limit`, documents are taken whole until it is reached.
    ///
    /// # Errors
    /// A pattern that is malformed or matches nothing, a file that cannot be read, a malformed line
    /// of a `.jsonl` file, a named file that is not text, or no text at all. What a folder or glob
    /// holds beside text is no error; [`Corpus::skipped`] counts it.
    pub fn open(
        patterns: &[String],
        limit: Option<Bytes>,
        environment: Environment<'_>,
    ) -> Result<Self, Error> {
        let found = find_all(patterns, environment)?;
        let mut scan = Scan::default();
        for (path, named) in &found {
            if limit.is_some_and(|limit| scan.digest.bytes >= limit) {
                break;
            }
            scan.file(path, *named, limit)?;
        }
        if scan.digest.documents == 0 {
            return Err(Error::NoText { files: found.len(), skipped: scan.skipped });
        }
        Ok(Self {
            files: scan.files,
            documents: scan.digest.documents,
            bytes: scan.digest.bytes,
            skipped: scan.skipped,
            fingerprint: scan.digest.fingerprint(),
        })
    }

    /// Reads the documents again, in order. Each is an error where its file no longer reads.
    pub fn texts(&self) -> impl Iterator<Item = Result<String, Error>> + use<'_> {
        let documents = usize::try_from(self.documents).unwrap_or(usize::MAX);
        self.files.iter().flat_map(|path| texts(path)).take(documents)
    }

    /// How many documents there are; at least one.
    #[must_use]
    pub fn documents(&self) -> u64 {
        self.documents
    }

    /// The UTF-8 bytes of all documents together.
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        self.bytes
    }

    /// Files passed over in folders and globs because they are not text.
    #[must_use]
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// A hash of the documents and their order; where the files lie does not enter it.
    #[must_use]
    pub fn fingerprint(&self) -> u128 {
        self.fingerprint
    }
}

/// Totals and a hash over documents, in order.
#[derive(Default)]
pub struct Digest {
    documents: u64,
    /// The UTF-8 bytes added so far.
    pub bytes: Bytes,
    hash: Xxh3,
}

impl Digest {
    /// Adds the next document.
    pub fn add(&mut self, text: &str) {
        self.documents += 1;
        self.bytes += Bytes(text.len() as u64);
        // The length keeps two documents apart from their concatenation.
        self.hash.update(&(text.len() as u64).to_le_bytes());
        self.hash.update(text.as_bytes());
    }

    /// The hash so far.
    pub fn fingerprint(&self) -> u128 {
        self.hash.digest128()
    }
}

/// The first pass over the files: which of them hold text, and how much.
#[derive(Default)]
struct Scan {
    files: Vec<PathBuf>,
    skipped: u64,
    digest: Digest,
}

impl Scan {
    fn file(&mut self, path: &Path, named: bool, limit: Option<Bytes>) -> Result<(), Error> {
        for text in texts(path) {
            if limit.is_some_and(|limit| self.digest.bytes >= limit) {
                break;
            }
            match text {
                Err(Error::NotText(_)) if !named => {
                    self.skipped += 1;
                    return Ok(());
                }
                text => self.digest.add(&text?),
            }
        }
        self.files.push(path.into());
        Ok(())
    }
}

/// The files of all patterns by full path, each with whether a pattern names it outright.
fn find_all(
    patterns: &[String],
    environment: Environment<'_>,
) -> Result<BTreeMap<PathBuf, bool>, Error> {
    let mut found = BTreeMap::new();
    for written in patterns {
        let expanded = expand(written, environment)?;
        let path = Path::new(&expanded);
        if path.is_file() {
            found.insert(plain(path), true);
            continue;
        }
        let files = if path.is_dir() { below(written, path)? } else { find(written, &expanded)? };
        if files.is_empty() {
            return Err(Error::NothingMatched { written: written.clone(), expanded });
        }
        for file in files {
            found.entry(file).or_insert(false);
        }
    }
    Ok(found)
}

/// The files that one glob matches, and those below the folders it matches.
fn find(written: &str, pattern: &str) -> Result<Vec<PathBuf>, Error> {
    let mut files = Vec::new();
    let mut walked: Option<PathBuf> = None;
    for path in matches(written, pattern)? {
        // `**` matches a folder before what lies in it, which need not be walked again.
        if walked.as_ref().is_some_and(|folder| path.starts_with(folder)) {
            continue;
        }
        if path.is_dir() {
            files.extend(below(written, &path)?);
            walked = Some(path);
        } else if path.is_file() {
            files.push(plain(&path));
        }
    }
    Ok(files)
}

/// Every file below a folder.
fn below(written: &str, folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let pattern = format!("{}/**/*", Pattern::escape(&folder.to_string_lossy()));
    let paths = matches(written, &pattern)?.into_iter();
    Ok(paths.filter(|path| path.is_file()).map(|path| plain(&path)).collect())
}

/// What a glob matches, folders too.
fn matches(written: &str, pattern: &str) -> Result<Vec<PathBuf>, Error> {
    let entries = glob::glob_with(pattern, SKIP_HIDDEN)
        .map_err(|source| Error::Pattern { written: written.into(), source })?;
    let paths = entries.map(|entry| {
        entry.map_err(|error| Error::Read { path: error.path().into(), source: error.into() })
    });
    paths.collect()
}

/// A path without `./` in it, so that a file found by two patterns is read once.
fn plain(path: &Path) -> PathBuf {
    path.components().collect()
}

/// The documents of one file, without the empty ones.
fn texts(path: &Path) -> Texts {
    let texts = if path.extension().is_some_and(|extension| extension == "jsonl") {
        json_lines(path)
    } else {
        Box::new(iter::once(whole(path)))
    };
    Box::new(texts.filter(|text| !matches!(text, Ok(text) if text.is_empty())))
}

/// A file as one document. A zero byte is valid UTF-8 and yet a sure sign of a binary file.
fn whole(path: &Path) -> Result<String, Error> {
    let bytes = fs::read(path).map_err(Error::read(path))?;
    match String::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text),
        _ => Err(Error::NotText(path.into())),
    }
}

#[derive(Deserialize)]
struct JsonLine {
    text: String,
}

/// A file as one document per line, read line by line; blank lines are passed over.
fn json_lines(path: &Path) -> Texts {
    let path = path.to_path_buf();
    match File::open(&path) {
        Err(source) => Box::new(iter::once(Err(Error::Read { path, source }))),
        Ok(file) => Box::new(
            BufReader::new(file)
                .split(b'\n')
                .enumerate()
                .filter(|(_, line)| !matches!(line, Ok(line) if line.trim_ascii().is_empty()))
                .map(move |(index, line)| json_line(&path, index + 1, line)),
        ),
    }
}

fn json_line(path: &Path, line: usize, content: io::Result<Vec<u8>>) -> Result<String, Error> {
    let content = content.map_err(Error::read(path))?;
    serde_json::from_slice::<JsonLine>(&content).map(|line| line.text).map_err(|error| {
        Error::JsonLine {
            path: path.into(),
            line,
            // To the parser this is line 1 of its own text.
            reason: error.to_string().replace(" at line 1 column ", ", column "),
        }
    })
}
