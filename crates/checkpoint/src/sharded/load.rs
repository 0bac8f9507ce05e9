//! From a checkpoint to any part of the state.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use model::{Block, Config};
use units::Rank;

use super::commit::step_of;
use super::manifest::{File, Index, Kind, Manifest, Piece, file_name, unseal};
use super::{Checksum, Progress};
use crate::Error;
use crate::hugging_face::{Dtype, Writer};
use crate::store::Store;

/// The name of the manifest within a checkpoint.
pub(super) const MANIFEST: &str = "manifest.json";

/// The longest manifest that is read, in bytes.
const MANIFEST_LIMIT: u64 = 1 << 30;

/// A whole checkpoint, open for reading.
pub struct Checkpoint {
    store: Arc<dyn Store>,
    folder: String,
    manifest: Manifest,
    index: Index,
}

/// A checkpoint that was passed over, and why.
#[derive(Debug)]
pub struct Rejected {
    /// Its name.
    pub folder: String,
    /// What is wrong with it.
    pub error: Error,
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Checkpoint").field(&self.folder).finish()
    }
}

impl Checkpoint {
    /// The names of the whole checkpoints in a store, newest first; they may be damaged.
    ///
    /// # Errors
    /// [`Error::Store`] when the store refuses.
    pub fn names(store: &dyn Store) -> Result<Vec<String>, Error> {
        let mut names = Vec::new();
        for folder in folders(store)? {
            let files = store.list(&folder).map_err(Error::store("list", store, &folder))?;
            if files.iter().any(|name| name == MANIFEST) {
                names.push(folder);
            }
        }
        Ok(names)
    }

    /// Opens a checkpoint of a model of `config`: its manifest is as written and names every element
    /// of the state once, and every file is there with its length.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::Damaged`], [`Error::OtherModel`], [`Error::Gap`] or
    /// [`Error::Overlap`].
    pub fn open(store: Arc<dyn Store>, folder: &str, config: &Config) -> Result<Self, Error> {
        let manifest = read_manifest(&*store, folder)?;
        let index = manifest.index(&store.place(&format!("{folder}/{MANIFEST}")), config)?;
        Ok(Self { store, folder: folder.to_owned(), manifest, index })
    }

    /// The newest checkpoint that is as written to the last bit, and the newer ones that are not.
    ///
    /// # Errors
    /// [`Error::Store`] when the store cannot be listed.
    pub fn newest(
        store: &Arc<dyn Store>,
        config: &Config,
    ) -> Result<(Option<Self>, Vec<Rejected>), Error> {
        let mut rejected = Vec::new();
        for folder in Self::names(&**store)? {
            let opened = Self::open(Arc::clone(store), &folder, config);
            match opened.and_then(|checkpoint| checkpoint.verify().map(|()| checkpoint)) {
                Ok(checkpoint) => return Ok((Some(checkpoint), rejected)),
                Err(error) => rejected.push(Rejected { folder, error }),
            }
        }
        Ok((None, rejected))
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.folder
    }

    /// How far training had come.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.manifest.progress
    }

    /// Of how many groups that train apart the state is; 1 where all ranks train together.
    #[must_use]
    pub fn groups(&self) -> u64 {
        self.manifest.groups()
    }

    /// Checks every byte.
    ///
    /// # Errors
    /// [`Error::Store`] or [`Error::Damaged`] for the first file that is not as written.
    pub fn verify(&self) -> Result<(), Error> {
        for (rank, file) in (0..).map(Rank).zip(&self.manifest.files) {
            verify_file(&*self.store, &path(&self.folder, rank), file)?;
        }
        Ok(())
    }

    /// Reads the elements of a block that begin at `start`, whoever wrote them.
    ///
    /// # Errors
    /// [`Error::Store`] or [`Error::Damaged`]; what is in `values` is of no use then.
    ///
    /// # Panics
    /// When the model has no such block, or the block no such elements.
    pub fn read(
        &self,
        block: Block,
        kind: Kind,
        start: u64,
        values: &mut [f32],
    ) -> Result<(), Error> {
        let pieces = self.index.get(&(block, kind));
        let pieces = pieces.unwrap_or_else(|| panic!("the model has no {block}"));
        let wanted = start..start + values.len() as u64;
        let mut missing = values.len();
        for (start, file, piece) in pieces {
            let piece = &self.manifest.files[*file].pieces[*piece];
            if *start >= wanted.end || piece.end() <= Some(wanted.start) {
                continue;
            }
            let found = self.read_piece(Rank(*file as u32), piece)?;
            let (found, _) = found.as_chunks::<4>();
            for (row, found) in piece.rows().zip(found.chunks_exact(piece.width() as usize)) {
                let (first, end) = (row.start.max(wanted.start), row.end.min(wanted.end));
                if first < end {
                    let found = &found[(first - row.start) as usize..(end - row.start) as usize];
                    let into = (first - wanted.start) as usize..(end - wanted.start) as usize;
                    missing -= found.len();
                    for (value, bytes) in values[into].iter_mut().zip(found) {
                        *value = f32::from_le_bytes(*bytes);
                    }
                }
            }
        }
        assert_eq!(missing, 0, "{block} has no elements up to {}", wanted.end);
        Ok(())
    }

    /// Writes the parameters as a folder that Hugging Face transformers opens, a block at a time; of
    /// groups that train apart, those they had after their last outer update.
    ///
    /// # Errors
    /// As [`Checkpoint::read`], and [`Error::Io`] when the folder cannot be written.
    pub fn export(&self, folder: &Path, dtype: Dtype) -> Result<(), Error> {
        let config = &self.manifest.config;
        let writer = Writer::new(folder, config, dtype)?;
        let blocks: Vec<Block> = config.blocks().collect();
        for (index, block) in blocks.iter().enumerate() {
            let mut values = vec![0.0; config.block_elements(*block) as usize];
            let kind = if self.groups() > 1 { Kind::Anchor } else { Kind::Parameter };
            self.read(*block, kind, 0, &mut values)?;
            writer.write_shard(index, blocks.len(), &[(*block, &values)])?;
        }
        writer.write_index(&blocks.into_iter().map(|block| vec![block]).collect::<Vec<_>>())?;
        writer.write_config()
    }

    fn read_piece(&self, rank: Rank, piece: &Piece) -> Result<Vec<u8>, Error> {
        read_piece(&*self.store, &path(&self.folder, rank), piece)
    }
}

/// The name of a rank's file in a store.
fn path(folder: &str, rank: Rank) -> String {
    format!("{folder}/{}", file_name(rank))
}

/// The manifest of a checkpoint, if it is as written and every file is there with its length.
fn read_manifest(store: &dyn Store, folder: &str) -> Result<Manifest, Error> {
    let name = format!("{folder}/{MANIFEST}");
    let damaged = |problem| Error::Damaged { place: store.place(&name), problem };
    let manifest: Manifest = unseal(&read_whole(store, &name)?).map_err(damaged)?;
    if step_of(folder) != Some(manifest.progress.step) {
        return Err(damaged(format!("it is of step {}", manifest.progress.step)));
    }
    for (rank, file) in (0..).map(Rank).zip(&manifest.files) {
        let name = path(folder, rank);
        let found = store.length(&name).map_err(Error::store("read", store, &name))?;
        if found != file.bytes {
            let problem = format!("it has {found} bytes, it should have {}", file.bytes);
            return Err(Error::Damaged { place: store.place(&name), problem });
        }
    }
    Ok(manifest)
}

/// Whether a checkpoint is whole, as far as that is seen without reading all of it.
pub(super) fn looks_whole(store: &dyn Store, folder: &str) -> bool {
    read_manifest(store, folder).is_ok()
}

/// The names of all checkpoints, whole or not, newest first.
pub(super) fn folders(store: &dyn Store) -> Result<Vec<String>, Error> {
    let mut folders = store.list("").map_err(Error::store("list", store, ""))?;
    folders.retain(|folder| step_of(folder).is_some());
    folders.sort_by(|one, other| other.cmp(one));
    Ok(folders)
}

/// The contents of a small file.
pub(super) fn read_whole(store: &dyn Store, name: &str) -> Result<Vec<u8>, Error> {
    let length = store.length(name).map_err(Error::store("read", store, name))?;
    if length > MANIFEST_LIMIT {
        let problem = format!("it has {length} bytes, more than any manifest");
        return Err(Error::Damaged { place: store.place(name), problem });
    }
    store.get(name, 0..length).map_err(Error::store("read", store, name))
}

/// Reads a file again and compares it with what it should be.
pub(super) fn verify_file(store: &dyn Store, name: &str, file: &File) -> Result<(), Error> {
    let header = store.get(name, 0..file.header_bytes());
    let header = header.map_err(Error::store("read", store, name))?;
    if Checksum::of(&header) != file.header {
        let problem = "the checksum of its header is another".to_owned();
        return Err(Error::Damaged { place: store.place(name), problem });
    }
    file.pieces.iter().try_for_each(|piece| read_piece(store, name, piece).map(drop))
}

/// The bytes of a piece, if they are as written.
fn read_piece(store: &dyn Store, name: &str, piece: &Piece) -> Result<Vec<u8>, Error> {
    let Piece { block, kind, start, elements, .. } = piece;
    let damaged = |problem| Error::Damaged { place: store.place(name), problem };
    let range = piece.bytes().ok_or_else(|| damaged("a piece has no end".to_owned()))?;
    let bytes = store.get(name, range).map_err(Error::store("read", store, name))?;
    let found = Checksum::of(&bytes);
    if found == piece.checksum {
        return Ok(bytes);
    }
    Err(damaged(format!(
        "the checksum of {elements} elements of {block} ({kind}) from {start} on is {found}, it should be {}",
        piece.checksum
    )))
}
