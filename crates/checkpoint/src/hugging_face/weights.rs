//! Reading a model's weights, block by block.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use model::{Block, Config, Parameter};
use safetensors::tensor::TensorInfo;
use serde::Deserialize;

use super::file::{SafetensorsFile, is_read};
use super::{INDEX, WHOLE};
use crate::Error;

/// The weights of a model folder. Headers are in memory; tensors are read when asked for.
#[derive(Debug)]
pub struct Weights {
    folder: PathBuf,
    /// The file that holds each tensor.
    tensors: BTreeMap<String, Arc<SafetensorsFile>>,
}

/// The part of `model.safetensors.index.json` that says which file holds a tensor.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Weights {
    /// Opens `model.safetensors` in `folder`, or else the shards that
    /// `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// [`Error::NoWeights`] if there are neither; [`Error::Safetensors`] for a file that is cut
    /// short or damaged; [`Error::Index`] for an index that does not match its shards.
    pub fn open(folder: &Path) -> Result<Self, Error> {
        if folder.join(WHOLE).exists() {
            Self::open_whole(folder)
        } else if folder.join(INDEX).exists() {
            Self::open_shards(folder)
        } else {
            Err(Error::NoWeights { folder: folder.to_owned() })
        }
    }

    fn open_whole(folder: &Path) -> Result<Self, Error> {
        let file = Arc::new(SafetensorsFile::open(&folder.join(WHOLE))?);
        let names = file.tensor_names().into_iter();
        Ok(Self {
            folder: folder.to_owned(),
            tensors: names.map(|name| (name, file.clone())).collect(),
        })
    }

    fn open_shards(folder: &Path) -> Result<Self, Error> {
        let path = folder.join(INDEX);
        let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let refuse = |problem| Error::Index { path: path.clone(), problem };
        let index: Index = serde_json::from_str(&text)
            .map_err(|error| refuse(format!("not an index of shards: {error}")))?;
        let mut shards = BTreeMap::new();
        for name in index.weight_map.values() {
            let shard = folder.join(name);
            if !shard.exists() {
                let problem = format!("shard {name} is not in the folder; download it too");
                return Err(refuse(problem));
            }
            if !shards.contains_key(name) {
                shards.insert(name.clone(), Arc::new(SafetensorsFile::open(&shard)?));
            }
        }
        let mut tensors = BTreeMap::new();
        for (tensor, shard) in index.weight_map {
            if shards[&shard].tensor(&tensor).is_none() {
                let problem = format!("tensor `{tensor}` is not in {shard}, as the index says");
                return Err(refuse(problem));
            }
            tensors.insert(tensor, shards[&shard].clone());
        }
        Ok(Self { folder: folder.to_owned(), tensors })
    }

    /// Checks that the weights are those of a model of `config`: every parameter is there with its
    /// shape, and nothing else is.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Shape`] or [`Error::Dtype`] for the first parameter that is
    /// not as expected, else [`Error::Unexpected`] naming what is left over.
    pub fn check(&self, config: &Config) -> Result<(), Error> {
        let mut left: BTreeSet<_> = self.tensors.keys().collect();
        for block in config.blocks() {
            for parameter in config.stored_parameters(block) {
                self.find(&parameter)?;
                left.remove(&parameter.name);
            }
        }
        let tensors: Vec<_> =
            left.into_iter().filter(|name| !is_redundant(name, config)).cloned().collect();
        if tensors.is_empty() {
            return Ok(());
        }
        Err(Error::Unexpected { folder: self.folder.clone(), tensors })
    }

    /// Reads the parameters of `block` into its flat buffer, as fp32.
    ///
    /// # Errors
    /// As [`Weights::check`], for the parameters of this block; [`Error::Io`] if a read fails.
    ///
    /// # Panics
    /// If `values` has not the length of the block.
    pub fn read_block(
        &self,
        config: &Config,
        block: Block,
        values: &mut [f32],
    ) -> Result<(), Error> {
        assert_eq!(values.len() as u64, config.block_elements(block), "{block}");
        for parameter in config.stored_parameters(block) {
            let (file, tensor) = self.find(&parameter)?;
            file.read(tensor, &mut values[parameter.range()])?;
        }
        Ok(())
    }

    /// The tensor of `parameter` and the file it lies in, if it is what the config says.
    fn find(&self, parameter: &Parameter) -> Result<(&SafetensorsFile, &TensorInfo), Error> {
        let name = &parameter.name;
        let file = self.tensors.get(name);
        let found = file.and_then(|file| Some((file, file.tensor(name)?)));
        let (file, tensor) = found.ok_or_else(|| Error::Missing {
            folder: self.folder.clone(),
            tensor: name.clone(),
            expected: parameter.shape.clone(),
        })?;
        check_tensor(file, tensor, parameter)?;
        Ok((file, tensor))
    }
}

fn check_tensor(
    file: &SafetensorsFile,
    tensor: &TensorInfo,
    parameter: &Parameter,
) -> Result<(), Error> {
    let shape: Vec<_> = tensor.shape.iter().map(|size| *size as u64).collect();
    if shape != parameter.shape {
        return Err(Error::Shape {
            path: file.path.clone(),
            tensor: parameter.name.clone(),
            expected: parameter.shape.clone(),
            found: shape,
        });
    }
    if !is_read(tensor.dtype) {
        return Err(Error::Dtype {
            path: file.path.clone(),
            tensor: parameter.name.clone(),
            found: format!("{:?}", tensor.dtype),
        });
    }
    Ok(())
}

/// Whether a tensor says nothing new: a tied head stored a second time, or the rotary frequencies
/// that old conversions kept.
fn is_redundant(name: &str, config: &Config) -> bool {
    (config.tied_embeddings && name == "lm_head.weight") || name.ends_with(".rotary_emb.inv_freq")
}
