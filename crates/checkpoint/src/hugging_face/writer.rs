//! Writing a model's weights, each pipeline stage its own shard.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use half::bf16;
use model::{Block, Config, Parameter};
use safetensors::tensor::{Metadata, TensorInfo};
use serde::Serialize;
use units::Bytes;

use super::file::PREFIX;
use super::{CONFIG, INDEX, WHOLE};
use crate::{Error, atomic};

/// Elements converted at a time.
const CONVERT: usize = 1 << 16;

/// What the numbers of a file are stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE single precision: exact.
    F32,
    /// The upper half of it, rounded to nearest even.
    BF16,
}

/// Writes a model into a folder that transformers opens. Every file appears whole or not at all.
#[derive(Debug)]
pub struct Writer<'a> {
    folder: PathBuf,
    config: &'a Config,
    dtype: Dtype,
}

/// `model.safetensors.index.json`.
#[derive(Serialize)]
struct Index {
    metadata: IndexMetadata,
    weight_map: BTreeMap<String, String>,
}

#[derive(Serialize)]
struct IndexMetadata {
    total_parameters: u64,
    total_size: Bytes,
}

impl Dtype {
    /// Bytes of one element.
    #[must_use]
    pub fn width(self) -> Bytes {
        Bytes(match self {
            Self::F32 => 4,
            Self::BF16 => 2,
        })
    }
}

impl<'a> Writer<'a> {
    /// A writer of a model of `config` into `folder`, which is made if it is not there.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder cannot be made.
    pub fn new(folder: &Path, config: &'a Config, dtype: Dtype) -> Result<Self, Error> {
        fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        Ok(Self { folder: folder.to_owned(), config, dtype })
    }

    /// Writes shard `index` of `count`: `blocks` with their flat buffers. One shard alone is
    /// `model.safetensors` and needs no index.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written.
    ///
    /// # Panics
    /// If `index` is not below `count`, or a buffer has not the length of its block.
    pub fn write_shard(
        &self,
        index: usize,
        count: usize,
        blocks: &[(Block, &[f32])],
    ) -> Result<(), Error> {
        let mut parameters = vec![];
        for (block, values) in blocks {
            let expected = self.config.block_elements(*block);
            assert_eq!(values.len() as u64, expected, "{block}");
            for parameter in self.config.stored_parameters(*block) {
                let values = &values[parameter.range()];
                parameters.push((parameter, values));
            }
        }
        let path = self.folder.join(shard_name(index, count));
        atomic::write(&path, |file| {
            file.write_all(&header(&parameters, self.dtype)?)?;
            for (_, values) in &parameters {
                write_values(file, values, self.dtype)?;
            }
            Ok(())
        })
    }

    /// Writes the index that says which of the `shards`, each given by its blocks, holds what.
    ///
    /// A `model.safetensors` that an earlier save in one shard left is removed, for readers would
    /// take it for the model. So the index comes last, when every shard is on disk.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written.
    ///
    /// # Panics
    /// If the shards do not hold every block of the model exactly once.
    pub fn write_index(&self, shards: &[Vec<Block>]) -> Result<(), Error> {
        let mut blocks = shards.concat();
        let mut expected: Vec<Block> = self.config.blocks().collect();
        blocks.sort();
        expected.sort();
        assert_eq!(blocks, expected, "{shards:?}");
        let index = self.index(shards);
        let path = self.folder.join(INDEX);
        atomic::write(&path, |file| Ok(serde_json::to_writer_pretty(file, &index)?))?;
        let whole = self.folder.join(WHOLE);
        match fs::remove_file(&whole) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::io("remove", &whole)(error))
            }
            _ => Ok(()),
        }
    }

    /// Writes `config.json`.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written.
    pub fn write_config(&self) -> Result<(), Error> {
        let text = model::hugging_face::to_json(self.config);
        atomic::write(&self.folder.join(CONFIG), |file| file.write_all(text.as_bytes()))
    }

    fn index(&self, shards: &[Vec<Block>]) -> Index {
        let mut weight_map = BTreeMap::new();
        for (shard, blocks) in shards.iter().enumerate() {
            for parameter in blocks.iter().flat_map(|block| self.config.stored_parameters(*block)) {
                weight_map.insert(parameter.name, shard_name(shard, shards.len()));
            }
        }
        let total_parameters = self.config.parameter_count();
        Index {
            metadata: IndexMetadata {
                total_parameters,
                total_size: self.dtype.width() * total_parameters,
            },
            weight_map,
        }
    }
}

fn shard_name(index: usize, count: usize) -> String {
    assert!(index < count, "shard {index} of {count}");
    match count {
        1 => WHOLE.to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
    }
}

/// The length of the header and the header, which ends in spaces so that tensors start aligned.
fn header(parameters: &[(Parameter, &[f32])], dtype: Dtype) -> io::Result<Vec<u8>> {
    let mut end = 0;
    let tensors = parameters.iter().map(|(parameter, values)| {
        let start = end;
        end += values.len() * dtype.width().0 as usize;
        let info = TensorInfo {
            dtype: match dtype {
                Dtype::F32 => safetensors::Dtype::F32,
                Dtype::BF16 => safetensors::Dtype::BF16,
            },
            shape: parameter.shape.iter().map(|size| *size as usize).collect(),
            data_offsets: (start, end),
        };
        (parameter.name.clone(), info)
    });
    // Transformers 4 refuses a file that does not say which library's layout it has.
    let format = [("format".to_owned(), "pt".to_owned())];
    let metadata = Metadata::new(Some(format.into_iter().collect()), tensors.collect())
        .map_err(io::Error::other)?;
    let mut json = serde_json::to_vec(&metadata)?;
    json.resize(json.len().next_multiple_of(PREFIX as usize), b' ');
    Ok([&(json.len() as u64).to_le_bytes(), json.as_slice()].concat())
}

fn write_values(file: &mut impl Write, values: &[f32], dtype: Dtype) -> io::Result<()> {
    let mut bytes = vec![];
    for values in values.chunks(CONVERT) {
        bytes.clear();
        match dtype {
            Dtype::F32 => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
            Dtype::BF16 => {
                bytes.extend(values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()));
            }
        }
        file.write_all(&bytes)?;
    }
    Ok(())
}
