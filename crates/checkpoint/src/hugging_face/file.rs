//! One safetensors file: a length in 8 bytes, that many bytes of JSON which say where each tensor
//! lies, then the tensors' bytes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use crate::Error;

/// Bytes of the length that stands before the header.
pub(super) const PREFIX: u64 = 8;

/// The longest header that the format allows, in bytes.
const MAX_HEADER: u64 = 100_000_000;

/// Bytes read at a time.
const READ: usize = 1 << 20;

/// An open safetensors file, its header read and found consistent with its length.
#[derive(Debug)]
pub(super) struct SafetensorsFile {
    pub(super) path: PathBuf,
    file: File,
    header: Metadata,
    data_start: u64,
}

impl SafetensorsFile {
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let metadata = file.metadata().map_err(Error::io("read", path))?;
        let damaged = |problem| Error::Safetensors { path: path.to_owned(), problem };
        let header = read_header(&file, path, metadata.len())?;
        let data_start = PREFIX + header.len() as u64;
        let header: Metadata = serde_json::from_slice(&header)
            .map_err(|error| damaged(format!("its header is malformed: {error}")))?;
        let (promised, found) = (header.data_len() as u64, metadata.len() - data_start);
        if promised != found {
            let problem = format!("its tensors take {promised} bytes and it has {found} for them");
            return Err(damaged(problem));
        }
        Ok(Self { path: path.to_owned(), file, header, data_start })
    }

    pub(super) fn tensor_names(&self) -> Vec<String> {
        self.header.offset_keys()
    }

    pub(super) fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.header.info(name)
    }

    /// Reads `tensor` as fp32. It must hold as many elements as `values`, of a dtype that
    /// [`is_read`] accepts.
    pub(super) fn read(&self, tensor: &TensorInfo, values: &mut [f32]) -> Result<(), Error> {
        let width = tensor.dtype.bitsize() / 8;
        let mut position = self.data_start + tensor.data_offsets.0 as u64;
        let mut bytes = vec![0; READ.min(values.len() * width)];
        for values in values.chunks_mut(READ / width) {
            let bytes = &mut bytes[..values.len() * width];
            self.file.read_exact_at(bytes, position).map_err(Error::io("read", &self.path))?;
            decode(tensor.dtype, bytes, values);
            position += bytes.len() as u64;
        }
        Ok(())
    }
}

/// Whether tensors of `dtype` can be read as fp32.
pub(super) fn is_read(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

/// The bytes of the header, whose claimed length is trusted only as far as the file goes.
fn read_header(file: &File, path: &Path, length: u64) -> Result<Vec<u8>, Error> {
    let damaged = |problem| Error::Safetensors { path: path.to_owned(), problem };
    if length < PREFIX {
        return Err(damaged(format!("it has {length} bytes, not even a header")));
    }
    let mut prefix = [0; PREFIX as usize];
    file.read_exact_at(&mut prefix, 0).map_err(Error::io("read", path))?;
    let claimed = u64::from_le_bytes(prefix);
    if claimed > MAX_HEADER.min(length - PREFIX) {
        let problem = format!("it has {length} bytes and claims a header of {claimed}");
        return Err(damaged(problem));
    }
    let mut header = vec![0; claimed as usize];
    file.read_exact_at(&mut header, PREFIX).map_err(Error::io("read", path))?;
    Ok(header)
}

fn decode(dtype: Dtype, bytes: &[u8], values: &mut [f32]) {
    match dtype {
        Dtype::F32 => decode_each(bytes, values, f32::from_le_bytes),
        Dtype::F16 => decode_each(bytes, values, |bytes| f16::from_le_bytes(bytes).to_f32()),
        Dtype::BF16 => decode_each(bytes, values, |bytes| bf16::from_le_bytes(bytes).to_f32()),
        other => unreachable!("{other:?} is refused before any tensor is read"),
    }
}

fn decode_each<const WIDTH: usize>(
    bytes: &[u8],
    values: &mut [f32],
    decode: impl Fn([u8; WIDTH]) -> f32,
) {
    let (elements, _) = bytes.as_chunks();
    for (value, element) in values.iter_mut().zip(elements) {
        *value = decode(*element);
    }
}
