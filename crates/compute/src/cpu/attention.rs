//! Attention in blocks of queries: scores of one block at a time, and only against keys that some
//! of them may see, so that memory stays linear in the sequence and half the work is skipped.
//!
//! Forward as in Dao et al. 2022 (FlashAttention) with whole rows of scores; backward as in its
//! eq. 4 with `delta = rowsum(dy * y)`. A head's rows are copied together first: a power of two
//! apart, as they lie in `qkv`, they would all fall into the same few cache lines.

use std::ops::Range;

use super::Tensor;
use super::kernels;
use super::product::{Matrix, MatrixMut, multiply};
use crate::operators::{AttentionDims, Sight, UNSEEN};

/// Queries whose scores are held at once: large enough for efficient products, small enough for
/// the scores to stay in cache.
const BLOCK: usize = 64;

/// The columns of one head in rows of `width`.
#[derive(Clone, Copy)]
struct Columns {
    first: usize,
    count: usize,
    width: usize,
}

impl Columns {
    fn copy(self, rows: &[f32], dense: &mut [f32]) {
        let rows = rows.chunks_exact(self.width);
        for (row, dense) in rows.zip(dense.chunks_exact_mut(self.count)) {
            dense.copy_from_slice(&row[self.first..self.first + self.count]);
        }
    }

    fn fill(self, rows: &mut [f32], dense: &[f32]) {
        let rows = rows.chunks_exact_mut(self.width);
        for (row, dense) in rows.zip(dense.chunks_exact(self.count)) {
            row[self.first..self.first + self.count].copy_from_slice(dense);
        }
    }
}

/// A block of queries, and the keys that any of them may see.
#[derive(Clone)]
struct Block {
    first: usize,
    queries: usize,
    keys: Range<usize>,
}

impl Block {
    /// The keys that a query of the block may see, counted from the block's first.
    fn seen(&self, row: usize, seen: &[Range<u32>]) -> Range<usize> {
        let Range { start, end } = seen[self.first + row];
        if start < end {
            start as usize - self.keys.start..end as usize - self.keys.start
        } else {
            0..0
        }
    }
}

fn blocks(seen: &[Range<u32>]) -> impl Iterator<Item = Block> {
    seen.chunks(BLOCK).enumerate().map(|(index, seen)| {
        let some = || seen.iter().filter(|seen| !seen.is_empty());
        let start = some().map(|seen| seen.start).min().unwrap_or_default() as usize;
        let end = some().map(|seen| seen.end).max().unwrap_or_default() as usize;
        Block { first: index * BLOCK, queries: seen.len(), keys: start..end }
    })
}

/// Where the keys and values of each head lie: beside the queries or apart.
#[derive(Clone, Copy)]
struct KeyColumns<'a> {
    rows: &'a [f32],
    /// The column of the first key, and the width of a row.
    first: usize,
    width: usize,
}

impl<'a> KeyColumns<'a> {
    fn new(qkv: &'a [f32], sight: Sight<'a, Tensor>, dims: &AttentionDims) -> Self {
        match sight.keys {
            None => Self { rows: qkv, first: dims.queries_width(), width: dims.qkv_width() },
            Some(keys) => Self { rows: keys.values(), first: 0, width: dims.keys_width() },
        }
    }

    fn sequence(self, index: usize, dims: &AttentionDims) -> &'a [f32] {
        let elements = dims.keys * self.width;
        &self.rows[index * elements..(index + 1) * elements]
    }

    fn key(self, kv_head: usize, dims: &AttentionDims) -> Columns {
        let (first, count) = (self.first + kv_head * dims.head_dim, dims.head_dim);
        Columns { first, count, width: self.width }
    }

    fn value(self, kv_head: usize, dims: &AttentionDims) -> Columns {
        let after_keys = self.first + dims.kv_heads * dims.head_dim;
        let (first, count) = (after_keys + kv_head * dims.value_dim, dims.value_dim);
        Columns { first, count, width: self.width }
    }
}

impl AttentionDims {
    fn query(&self, head: usize) -> Columns {
        let count = self.head_dim;
        Columns { first: head * count, count, width: self.qkv_width() }
    }

    fn output(&self, head: usize) -> Columns {
        let count = self.value_dim;
        Columns { first: head * count, count, width: self.output_width() }
    }

    /// The query heads that share a key/value head.
    fn group(&self, kv_head: usize) -> Range<usize> {
        let size = self.heads / self.kv_heads;
        kv_head * size..(kv_head + 1) * size
    }

    /// Room for one head's queries in one sequence.
    fn queries(&self) -> Vec<f32> {
        vec![0.0; self.length * self.head_dim]
    }

    /// Room for one head's keys and values in one sequence.
    fn keys_and_values(&self) -> [Vec<f32>; 2] {
        [self.head_dim, self.value_dim].map(|width| vec![0.0; self.keys * width])
    }

    /// Room for one head's outputs in one sequence.
    fn outputs(&self) -> Vec<f32> {
        vec![0.0; self.length * self.value_dim]
    }

    fn scores(&self) -> Vec<f32> {
        vec![0.0; BLOCK.min(self.length) * self.keys]
    }
}

/// Some rows of a matrix of so many columns.
fn part(dense: &[f32], rows: Range<usize>, width: usize) -> Matrix<'_> {
    Matrix::rows(&dense[rows.start * width..], rows.len(), width)
}

fn part_mut(dense: &mut [f32], rows: Range<usize>, width: usize) -> MatrixMut<'_> {
    MatrixMut::rows(&mut dense[rows.start * width..], rows.len(), width)
}

/// Fills `y` `[r, heads * value_dim]` and `log_sums` `[sequences, heads, length]`.
pub fn forward(
    qkv: &[f32],
    sight: Sight<'_, Tensor>,
    dims: &AttentionDims,
    y: &mut [f32],
    log_sums: &mut [f32],
) {
    let [mut q, mut out] = [dims.queries(), dims.outputs()];
    let [mut k, mut v] = dims.keys_and_values();
    let mut scores = dims.scores();
    let keys = KeyColumns::new(qkv, sight, dims);
    let sequences = qkv
        .chunks_exact(dims.length * dims.qkv_width())
        .zip(y.chunks_exact_mut(dims.length * dims.output_width()))
        .zip(log_sums.chunks_exact_mut(dims.heads * dims.length))
        .zip(sight.seen.chunks_exact(dims.length));
    for (index, (((qkv, y), log_sums), seen)) in sequences.enumerate() {
        let beside = keys.sequence(index, dims);
        for kv_head in 0..dims.kv_heads {
            keys.key(kv_head, dims).copy(beside, &mut k);
            keys.value(kv_head, dims).copy(beside, &mut v);
            for head in dims.group(kv_head) {
                dims.query(head).copy(qkv, &mut q);
                let log_sums = &mut log_sums[head * dims.length..(head + 1) * dims.length];
                head_forward([&q, &k, &v], seen, dims, &mut scores, (&mut out, log_sums));
                dims.output(head).fill(y, &out);
            }
        }
    }
}

fn head_forward(
    [q, k, v]: [&[f32]; 3],
    seen: &[Range<u32>],
    dims: &AttentionDims,
    scores: &mut [f32],
    (out, log_sums): (&mut [f32], &mut [f32]),
) {
    for block in blocks(seen) {
        let (queries, keys) = (block.queries, block.keys.len());
        let rows = block.first..block.first + queries;
        if keys == 0 {
            out[rows.start * dims.value_dim..rows.end * dims.value_dim].fill(0.0);
            log_sums[rows].fill(UNSEEN);
            continue;
        }
        let scores = &mut scores[..queries * keys];
        let q = part(q, rows.clone(), dims.head_dim);
        let k = part(k, block.keys.clone(), dims.head_dim).transposed();
        multiply(q, k, dims.scale(), MatrixMut::rows(scores, queries, keys), false, 1);
        for (row, scores) in scores.chunks_exact_mut(keys).enumerate() {
            log_sums[block.first + row] = kernels::softmax(scores, block.seen(row, seen));
        }
        let p = Matrix::rows(scores, queries, keys);
        let out = part_mut(out, rows, dims.value_dim);
        let v = part(v, block.keys.clone(), dims.value_dim);
        multiply(p, v, 1.0, out, false, 1);
    }
}

/// Joins what was found among other keys; see [`kernels::join`].
pub fn join(
    (y, log_sums): (&mut [f32], &mut [f32]),
    (other, other_sums): (&[f32], &[f32]),
    dims: &AttentionDims,
) {
    let heads = y.chunks_exact_mut(dims.value_dim).zip(other.chunks_exact(dims.value_dim));
    for (index, (y, other)) in heads.enumerate() {
        let (token, head) = (index / dims.heads, index % dims.heads);
        let (sequence, query) = (token / dims.length, token % dims.length);
        let at = (sequence * dims.heads + head) * dims.length + query;
        log_sums[at] = kernels::join(y, log_sums[at], other, other_sums[at]);
    }
}

/// Fills `dqkv` from the gradient `dy` of the output and what the forward pass saved; where keys
/// stand apart, their gradient goes to `apart`.
pub fn backward(
    dy: &[f32],
    qkv: &[f32],
    (y, log_sums): (&[f32], &[f32]),
    sight: Sight<'_, Tensor>,
    dims: &AttentionDims,
    (dqkv, mut apart): (&mut [f32], Option<&mut [f32]>),
) {
    let mut head = Head::new(dims);
    let [mut dk, mut dv] = dims.keys_and_values();
    let keys = KeyColumns::new(qkv, sight, dims);
    let rows = dims.length * dims.output_width();
    let sequences = dy
        .chunks_exact(rows)
        .zip(y.chunks_exact(rows))
        .zip(qkv.chunks_exact(dims.length * dims.qkv_width()))
        .zip(log_sums.chunks_exact(dims.heads * dims.length))
        .zip(dqkv.chunks_exact_mut(dims.length * dims.qkv_width()))
        .zip(sight.seen.chunks_exact(dims.length));
    for (sequence, (((((dy, y), qkv), log_sums), dqkv), seen)) in sequences.enumerate() {
        let beside = keys.sequence(sequence, dims);
        for kv_head in 0..dims.kv_heads {
            let (key, value) = (keys.key(kv_head, dims), keys.value(kv_head, dims));
            key.copy(beside, &mut head.k);
            value.copy(beside, &mut head.v);
            dk.fill(0.0); // the heads of a group add to the same keys and values
            dv.fill(0.0);
            for index in dims.group(kv_head) {
                dims.query(index).copy(qkv, &mut head.q);
                dims.output(index).copy(dy, &mut head.dy);
                dims.output(index).copy(y, &mut head.y);
                let log_sums = &log_sums[index * dims.length..(index + 1) * dims.length];
                head.backward(dims, seen, log_sums, (&mut dk, &mut dv));
                dims.query(index).fill(dqkv, &head.dq);
            }
            let elements = dims.keys * keys.width;
            let into = match &mut apart {
                Some(apart) => &mut apart[sequence * elements..(sequence + 1) * elements],
                None => &mut *dqkv,
            };
            key.fill(into, &dk);
            value.fill(into, &dv);
        }
    }
}

/// One head of one sequence on its way back, with its workspace.
struct Head {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    y: Vec<f32>,
    dy: Vec<f32>,
    dq: Vec<f32>,
    weights: Vec<f32>,
    gradients: Vec<f32>,
}

impl Head {
    fn new(dims: &AttentionDims) -> Self {
        let [k, v] = dims.keys_and_values();
        Self {
            q: dims.queries(),
            k,
            v,
            y: dims.outputs(),
            dy: dims.outputs(),
            dq: dims.queries(),
            weights: dims.scores(),
            gradients: dims.scores(),
        }
    }

    fn backward(
        &mut self,
        dims: &AttentionDims,
        seen: &[Range<u32>],
        log_sums: &[f32],
        (dk, dv): (&mut [f32], &mut [f32]),
    ) {
        for block in blocks(seen) {
            let (queries, keys) = (block.queries, block.keys.len());
            let rows = block.first..block.first + queries;
            if keys == 0 {
                self.dq[rows.start * dims.head_dim..rows.end * dims.head_dim].fill(0.0);
                continue;
            }
            let p = &mut self.weights[..queries * keys];
            let ds = &mut self.gradients[..queries * keys];
            let (head_dim, value_dim) = (dims.head_dim, dims.value_dim);
            let q = part(&self.q, rows.clone(), head_dim);
            let dy = part(&self.dy, rows.clone(), value_dim);
            let k = part(&self.k, block.keys.clone(), head_dim);
            let v = part(&self.v, block.keys.clone(), value_dim);
            multiply(q, k.transposed(), dims.scale(), MatrixMut::rows(p, queries, keys), false, 1);
            multiply(dy, v.transposed(), 1.0, MatrixMut::rows(ds, queries, keys), false, 1);
            for row in 0..queries {
                let (place, scores) = (block.first + row, row * keys..(row + 1) * keys);
                let values = place * value_dim..(place + 1) * value_dim;
                let delta = kernels::dot(&self.dy[values.clone()], &self.y[values]);
                let saved = (log_sums[place], delta);
                let seen = block.seen(row, seen);
                kernels::softmax_backward(&mut p[scores.clone()], &mut ds[scores], seen, saved);
            }
            let p = Matrix::rows(p, queries, keys).transposed();
            multiply(p, dy, 1.0, part_mut(dv, block.keys.clone(), value_dim), true, 1);
            let ds = Matrix::rows(ds, queries, keys);
            multiply(ds, k, dims.scale(), part_mut(&mut self.dq, rows, head_dim), false, 1);
            let dk = part_mut(dk, block.keys.clone(), head_dim);
            multiply(ds.transposed(), q, dims.scale(), dk, true, 1);
        }
    }
}
