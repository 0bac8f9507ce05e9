use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use half::{bf16, f16};
use model::{Block, Config};
use safetensors::SafeTensors;
use safetensors::tensor::{TensorView, serialize};
use tempfile::TempDir;

use super::*;

const NORM: &str = "model.norm.weight";

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden").join(name)
}

fn tiny() -> (Config, Weights) {
    let folder = golden("tiny-llama");
    (read_config(&folder).unwrap(), Weights::open(&folder).unwrap())
}

fn read_all(weights: &Weights, config: &Config) -> Vec<(Block, Vec<f32>)> {
    let read = |block| {
        let mut values = vec![f32::NAN; config.block_elements(block) as usize];
        weights.read_block(config, block, &mut values).unwrap();
        (block, values)
    };
    config.blocks().map(read).collect()
}

/// Writes a model with `per_shard` blocks in each shard.
fn write_all(
    folder: &Path,
    config: &Config,
    dtype: Dtype,
    blocks: &[(Block, Vec<f32>)],
    per_shard: usize,
) {
    let writer = Writer::new(folder, config, dtype).unwrap();
    let shards: Vec<_> = blocks.chunks(per_shard).collect();
    for (index, shard) in shards.iter().enumerate() {
        let shard: Vec<_> =
            shard.iter().map(|(block, values)| (*block, values.as_slice())).collect();
        writer.write_shard(index, shards.len(), &shard).unwrap();
    }
    if shards.len() > 1 {
        let blocks = |shard: &&[(Block, Vec<f32>)]| shard.iter().map(|(block, _)| *block).collect();
        writer.write_index(&shards.iter().map(blocks).collect::<Vec<_>>()).unwrap();
    }
    writer.write_config().unwrap();
}

fn file_names(folder: &TempDir) -> Vec<String> {
    let entries = fs::read_dir(folder.path()).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A copy of the golden model that a test may spoil.
fn copy_of_golden() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in [CONFIG, WHOLE] {
        fs::copy(golden("tiny-llama").join(name), folder.path().join(name)).unwrap();
    }
    folder
}

/// A tensor of a file that a test makes up.
struct Tensor {
    name: String,
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

/// A copy of the golden model whose tensors `change` may drop, alter or add to.
fn rewritten(change: impl Fn(&mut Vec<Tensor>)) -> TempDir {
    let folder = copy_of_golden();
    let path = folder.path().join(WHOLE);
    let bytes = fs::read(&path).unwrap();
    let golden = SafeTensors::deserialize(&bytes).unwrap().tensors();
    let own = |(name, view): (String, TensorView<'_>)| Tensor {
        name,
        dtype: view.dtype(),
        shape: view.shape().to_vec(),
        data: view.data().to_vec(),
    };
    let mut tensors: Vec<_> = golden.into_iter().map(own).collect();
    change(&mut tensors);
    let views = tensors.iter().map(|tensor| {
        let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.data);
        (&tensor.name, view.unwrap())
    });
    fs::write(&path, serialize(views, None).unwrap()).unwrap();
    folder
}

fn check(folder: &TempDir) -> Result<(), Error> {
    Weights::open(folder.path())?.check(&read_config(folder.path())?)
}

fn message(folder: &TempDir) -> String {
    check(folder).unwrap_err().to_string()
}

#[test]
fn reads_every_parameter_where_its_block_has_it() {
    let (config, weights) = tiny();
    weights.check(&config).unwrap();
    let bytes = fs::read(golden("tiny-llama").join(WHOLE)).unwrap();
    let reference = SafeTensors::deserialize(&bytes).unwrap();
    for (block, values) in read_all(&weights, &config) {
        for parameter in config.parameters(block) {
            let expected = reference.tensor(&parameter.name).unwrap().data();
            let found: Vec<_> =
                values[parameter.range()].iter().flat_map(|v| v.to_le_bytes()).collect();
            assert!(found == expected, "{}", parameter.name);
        }
    }
}

#[test]
fn a_tied_head_may_be_stored_a_second_time() {
    let folder = golden("tiny-llama-tied");
    let tied = read_config(&folder).unwrap();
    Weights::open(&folder).unwrap().check(&tied).unwrap();
    tiny().1.check(&tied).unwrap();
}

#[test]
fn fp32_is_written_and_read_back_exactly_in_any_number_of_shards() {
    let (config, weights) = tiny();
    let blocks = read_all(&weights, &config);
    for per_shard in 1..=blocks.len() {
        let folder = tempfile::tempdir().unwrap();
        write_all(folder.path(), &config, Dtype::F32, &blocks, per_shard);
        check(&folder).unwrap();
        assert_eq!(read_config(folder.path()).unwrap(), config);
        assert_eq!(read_all(&Weights::open(folder.path()).unwrap(), &config), blocks);
    }
}

#[test]
fn bf16_is_rounded_to_nearest() {
    let (config, weights) = tiny();
    let mut blocks = read_all(&weights, &config);
    let folder = tempfile::tempdir().unwrap();
    write_all(folder.path(), &config, Dtype::BF16, &blocks, 2);
    for value in blocks.iter_mut().flat_map(|(_, values)| values) {
        *value = bf16::from_f32(*value).to_f32();
    }
    assert_eq!(read_all(&Weights::open(folder.path()).unwrap(), &config), blocks);
}

#[test]
fn f16_is_read() {
    let (config, weights) = tiny();
    let mut blocks = read_all(&weights, &config);
    let folder = rewritten(|tensors| {
        for tensor in tensors {
            let (elements, _) = tensor.data.as_chunks();
            let halves = elements.iter().map(|bytes| f16::from_f32(f32::from_le_bytes(*bytes)));
            tensor.data = halves.flat_map(f16::to_le_bytes).collect();
            tensor.dtype = safetensors::Dtype::F16;
        }
    });
    for value in blocks.iter_mut().flat_map(|(_, values)| values) {
        *value = f16::from_f32(*value).to_f32();
    }
    let weights = Weights::open(folder.path()).unwrap();
    assert_eq!(read_all(&weights, &config), blocks);
}

#[test]
fn the_files_have_the_names_that_transformers_looks_for() {
    let (config, weights) = tiny();
    let blocks = read_all(&weights, &config);
    let folder = tempfile::tempdir().unwrap();
    write_all(folder.path(), &config, Dtype::F32, &blocks, 4);
    assert_eq!(file_names(&folder), [CONFIG, WHOLE]);
    // A save in more shards supersedes it.
    write_all(folder.path(), &config, Dtype::F32, &blocks, 2);
    let shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    assert_eq!(file_names(&folder), [CONFIG, shards[0], shards[1], INDEX]);
    let index = fs::read_to_string(folder.path().join(INDEX)).unwrap();
    let index: serde_json::Value = serde_json::from_str(&index).unwrap();
    assert_eq!(index["metadata"]["total_size"], 4 * config.parameter_count());
    assert_eq!(index["weight_map"]["model.embed_tokens.weight"], shards[0]);
    assert_eq!(index["weight_map"]["lm_head.weight"], shards[1]);
}

#[test]
fn a_missing_parameter_is_named() {
    let folder = rewritten(|tensors| tensors.retain(|tensor| tensor.name != NORM));
    let expected = format!("no tensor `{NORM}`, which the config gives shape [64]");
    assert!(message(&folder).contains(&expected));
}

#[test]
fn tensors_of_another_model_are_named() {
    let folder = rewritten(|tensors| {
        for name in ["self_attn.rotary_emb.inv_freq", "self_attn.q_norm.weight"] {
            tensors.push(Tensor {
                name: format!("model.layers.0.{name}"),
                dtype: safetensors::Dtype::F32,
                shape: vec![1],
                data: vec![0; 4],
            });
        }
    });
    // The rotary frequencies follow from the config; only the other one is in the way.
    let expected = "the config has no place for model.layers.0.self_attn.q_norm.weight; are";
    assert!(message(&folder).contains(expected));
}

#[test]
fn another_shape_is_told_beside_the_expected_one() {
    let (config, weights) = tiny();
    let wider = Config { vocabulary: 256, ..config };
    let error = weights.check(&wider).unwrap_err().to_string();
    let expected = "model.safetensors: tensor `model.embed_tokens.weight` has shape [128, 64], \
                    the config gives it [256, 64]";
    assert!(error.contains(expected), "{error}");
}

#[test]
fn integers_are_no_weights() {
    let folder = rewritten(|tensors| {
        let norm = tensors.iter_mut().find(|tensor| tensor.name == NORM);
        norm.unwrap().dtype = safetensors::Dtype::I32;
    });
    let expected = format!("tensor `{NORM}` holds I32; F32, F16 and BF16");
    assert!(message(&folder).contains(&expected));
}

#[test]
fn absent_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    assert!(
        Weights::open(folder.path())
            .unwrap_err()
            .to_string()
            .starts_with("no model.safetensors and no")
    );
    let error = read_config(folder.path()).unwrap_err().to_string();
    assert!(error.starts_with("cannot read") && error.contains(CONFIG), "{error}");

    let (config, weights) = tiny();
    write_all(folder.path(), &config, Dtype::F32, &read_all(&weights, &config), 2);
    let shard = folder.path().join("model-00002-of-00002.safetensors");
    fs::remove_file(&shard).unwrap();
    let error = message(&folder);
    assert!(
        error.contains("index.json: shard model-00002-of-00002.safetensors is not in"),
        "{error}"
    );
    fs::copy(folder.path().join("model-00001-of-00002.safetensors"), shard).unwrap();
    let error = message(&folder);
    assert!(error.contains("tensor `lm_head.weight` is not in model-00002-of-00002"), "{error}");
    fs::write(folder.path().join(INDEX), "{}").unwrap();
    assert!(message(&folder).contains("not an index of shards: missing field `weight_map`"));
}

#[test]
fn a_file_cut_short_anywhere_is_refused() {
    let folder = copy_of_golden();
    let path = folder.path().join(WHOLE);
    let file = File::options().write(true).open(&path).unwrap();
    let length = file.metadata().unwrap().len();
    // Every byte of the header, then a stride through the tensors that meets no boundary; from
    // the end, so that one file serves all.
    let header = 8 + header_length(&path);
    let cuts = (header..length).step_by(997).chain([length - 1]);
    let mut cuts: Vec<_> = (0..header).chain(cuts).collect();
    cuts.sort_unstable();
    for cut in cuts.into_iter().rev() {
        file.set_len(cut).unwrap();
        let error = Weights::open(folder.path()).unwrap_err();
        assert!(
            matches!(&error, Error::Safetensors { path: named, .. } if *named == path),
            "{error}"
        );
    }
}

#[test]
fn a_file_that_goes_on_after_its_tensors_is_refused() {
    let folder = copy_of_golden();
    let file = File::options().write(true).open(folder.path().join(WHOLE)).unwrap();
    let length = file.metadata().unwrap().len();
    file.set_len(length + 1).unwrap();
    assert!(message(&folder).contains("bytes and it has"));
}

#[test]
fn an_absurd_header_length_is_refused() {
    let folder = copy_of_golden();
    let file = File::options().write(true).open(folder.path().join(WHOLE)).unwrap();
    for claimed in [u64::MAX, u64::MAX - 7, 1 << 40, 100_000_001, 400_000, 0, 1] {
        file.write_all_at(&claimed.to_le_bytes(), 0).unwrap();
        assert!(message(&folder).contains("is not a whole safetensors file"), "{claimed}");
    }
}

#[test]
fn a_flipped_bit_in_the_header_is_refused_or_harmless() {
    let folder = copy_of_golden();
    let (config, weights) = tiny();
    let blocks = read_all(&weights, &config);
    let path = folder.path().join(WHOLE);
    let bytes = fs::read(&path).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    let mut refused = 0;
    for position in 0..8 + header_length(&path) {
        let byte = bytes[position as usize];
        for bit in 0..8 {
            file.write_all_at(&[byte ^ (1 << bit)], position).unwrap();
            match check(&folder) {
                Err(_) => refused += 1,
                Ok(()) => {
                    let weights = Weights::open(folder.path()).unwrap();
                    assert!(read_all(&weights, &config) == blocks, "bit {bit} of {position}");
                }
            }
        }
        file.write_all_at(&[byte], position).unwrap();
    }
    assert!(refused > 7 * header_length(&path));
}

fn header_length(path: &Path) -> u64 {
    let bytes = fs::read(path).unwrap();
    u64::from_le_bytes(bytes[..8].try_into().unwrap())
}
