//! What one rank saves, as it will lie in its file.

use std::sync::Arc;

use model::Block;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::{Deserialize, Serialize};

use super::{Checksum, File, Kind, Piece, Rows};

/// Most elements of a piece: what has to be read, and checked, for any one of them.
const PIECE_ELEMENTS: usize = 4 << 20;

/// Bytes of the length that stands before the header of a safetensors file.
const PREFIX: usize = 8;

/// Adjacent elements of a block's flat buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// In which block.
    pub block: Block,
    /// Of what.
    pub kind: Kind,
    /// The first element.
    pub start: u64,
    /// How many.
    pub elements: u64,
}

/// One rank's part of the state, copied out of its tensors.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Shard {
    runs: Vec<Run>,
    values: Arc<Vec<f32>>,
}

impl Shard {
    /// Nothing yet, in room that was used before: fresh memory costs more than what is copied to it.
    #[must_use]
    pub fn within(mut room: Vec<f32>) -> Self {
        room.clear();
        Self { runs: vec![], values: Arc::new(room) }
    }

    /// The room of a shard that is needed no more, unless somebody else reads in it.
    #[must_use]
    pub fn into_room(self) -> Vec<f32> {
        Arc::into_inner(self.values).unwrap_or_default()
    }

    /// Adds the elements of a block that begin at `start`. Over all ranks each element of each kind
    /// is added once.
    pub fn push(&mut self, block: Block, kind: Kind, start: u64, values: &[f32]) {
        self.runs.push(Run { block, kind, start, elements: values.len() as u64 });
        Arc::make_mut(&mut self.values).extend_from_slice(values);
    }

    /// The shard of these runs whose values were taken by [`Shard::values`].
    ///
    /// # Panics
    /// When there are more or fewer values than the runs have elements.
    #[must_use]
    pub fn new(runs: Vec<Run>, values: Vec<f32>) -> Self {
        let elements: u64 = runs.iter().map(|run| run.elements).sum();
        assert_eq!(elements, values.len() as u64, "{runs:?}");
        Self { runs, values: Arc::new(values) }
    }

    /// What it holds, in order.
    #[must_use]
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// The elements of all runs, one after the other.
    #[must_use]
    pub fn values(&self) -> &Arc<Vec<f32>> {
        &self.values
    }

    /// What tells the values from others.
    #[must_use]
    pub fn checksum(&self) -> Checksum {
        Checksum::of(bytemuck::cast_slice(&self.values[..]))
    }

    /// Each run with its elements.
    pub fn iter(&self) -> impl Iterator<Item = (Run, &[f32])> {
        let mut rest = &self.values[..];
        self.runs.iter().map(move |run| {
            let (own, others) = rest.split_at(run.elements as usize);
            rest = others;
            (*run, own)
        })
    }

    /// The bytes of the file: header and data; and what they are.
    pub(super) fn encode(&self) -> (Vec<u8>, &[u8], File) {
        let header = self.header();
        let mut offset = header.len() as u64;
        let mut pieces = Vec::new();
        for (run, rows, values) in self.pieces() {
            let bytes: &[u8] = bytemuck::cast_slice(values);
            let Run { block, kind, start, elements } = run;
            let checksum = Checksum::of(bytes);
            pieces.push(Piece { block, kind, start, elements, rows, offset, checksum });
            offset += bytes.len() as u64;
        }
        let file = File { bytes: offset, header: Checksum::of(&header), pieces };
        (header, bytemuck::cast_slice(&self.values[..]), file)
    }

    /// The runs, cut where they are longer than a piece may be; or joined, where they are rows of the
    /// same columns.
    fn pieces(&self) -> Vec<(Run, Option<Rows>, &[f32])> {
        let mut pieces = Vec::new();
        let (mut runs, mut values) = (&self.runs[..], &self.values[..]);
        while let Some(first) = runs.first() {
            let rows = rows(runs);
            let count = rows.map_or(1, |rows| rows.count as usize);
            let (own, others) = values.split_at(first.elements as usize * count);
            (runs, values) = (&runs[count..], others);
            let longest = if rows.is_some() { own.len() } else { PIECE_ELEMENTS };
            for (index, values) in own.chunks(longest).enumerate() {
                let start = first.start + (index * PIECE_ELEMENTS) as u64;
                pieces.push((Run { start, elements: values.len() as u64, ..*first }, rows, values));
            }
        }
        pieces
    }

    /// The length of the header and the header, which ends in spaces so that data starts aligned.
    fn header(&self) -> Vec<u8> {
        let mut end = 0;
        let tensors = self.pieces().into_iter().map(|(run, rows, values)| {
            let Run { block, kind, start, .. } = run;
            let data_offsets = (end, end + size_of_val(values));
            end = data_offsets.1;
            let rows = rows.map(|rows| rows.count as usize);
            let shape = rows.into_iter().chain([values.len() / rows.unwrap_or(1)]).collect();
            let info = TensorInfo { dtype: Dtype::F32, shape, data_offsets };
            (format!("{block}.{}.{start}", kind.to_string().replace(' ', "-")), info)
        });
        let metadata = Metadata::new(None, tensors.collect()).expect("pieces follow each other");
        let mut json = serde_json::to_vec(&metadata).expect("a header has a JSON form");
        json.resize(json.len().next_multiple_of(PREFIX), b' ');
        [&(json.len() as u64).to_le_bytes(), json.as_slice()].concat()
    }
}

/// The rows of the same columns that the first of some runs are, as many as a piece may have.
fn rows(runs: &[Run]) -> Option<Rows> {
    let [first, second, ..] = runs else { return None };
    let stride =
        second.start.checked_sub(first.start).filter(|stride| *stride >= first.elements)?;
    let next = |run: &Run| Run { start: run.start + stride, ..*run };
    let most = (PIECE_ELEMENTS as u64).checked_div(first.elements)?;
    let joined = runs.windows(2).take_while(|pair| pair[1] == next(&pair[0]));
    let count = 1 + joined.take(most.saturating_sub(1) as usize).count() as u64;
    (count > 1).then_some(Rows { count, stride })
}

const _: () = assert!(cfg!(target_endian = "little"), "safetensors files are little-endian");
