//! Causal attention in blocks of queries: scores of one block at a time, and only against keys
//! that it may see, so that memory stays linear in the sequence and half the work is skipped.
//!
//! Forward as in Dao et al. 2022 (FlashAttention) with whole rows of scores; backward as in its
//! eq. 4 with `delta = rowsum(dy * y)`. A head's rows are copied together first: a power of two
//! apart, as they lie in `qkv`, they would all fall into the same few cache lines.

use super::kernels;
use super::product::{Matrix, MatrixMut, multiply};
use crate::operators::AttentionDims;

/// Queries whose scores are held at once: large enough for efficient products, small enough for
/// the scores to stay in cache.
const BLOCK: usize = 64;

/// The columns of one head in rows of `width`.
#[derive(Clone, Copy)]
struct Columns {
    first: usize,
    width: usize,
}

impl Columns {
    fn copy(self, rows: &[f32], dense: &mut [f32], head_dim: usize) {
        let rows = rows.chunks_exact(self.width);
        for (row, dense) in rows.zip(dense.chunks_exact_mut(head_dim)) {
            dense.copy_from_slice(&row[self.first..self.first + head_dim]);
        }
    }

    fn fill(self, rows: &mut [f32], dense: &[f32], head_dim: usize) {
        let rows = rows.chunks_exact_mut(self.width);
        for (row, dense) in rows.zip(dense.chunks_exact(head_dim)) {
            row[self.first..self.first + head_dim].copy_from_slice(dense);
        }
    }
}

impl AttentionDims {
    fn output_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Elements of one head's queries, keys, values or outputs in one sequence.
    fn head_elements(&self) -> usize {
        self.length * self.head_dim
    }

    fn qkv_columns(&self, index: usize) -> Columns {
        Columns { first: index * self.head_dim, width: self.qkv_width() }
    }

    fn query(&self, head: usize) -> Columns {
        self.qkv_columns(head)
    }

    fn key(&self, kv_head: usize) -> Columns {
        self.qkv_columns(self.heads + kv_head)
    }

    fn value(&self, kv_head: usize) -> Columns {
        self.qkv_columns(self.heads + self.kv_heads + kv_head)
    }

    fn output(&self, head: usize) -> Columns {
        Columns { first: head * self.head_dim, width: self.output_width() }
    }

    /// The query heads that share a key/value head.
    fn group(&self, kv_head: usize) -> std::ops::Range<usize> {
        let size = self.heads / self.kv_heads;
        kv_head * size..(kv_head + 1) * size
    }

    /// Blocks of queries as (first query, queries, keys they may see).
    fn blocks(&self) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
        let length = self.length;
        (0..length).step_by(BLOCK).map(move |first| {
            let queries = BLOCK.min(length - first);
            (first, queries, first + queries)
        })
    }

    fn rows<'a>(&self, dense: &'a [f32], first: usize, rows: usize) -> Matrix<'a> {
        Matrix::rows(&dense[first * self.head_dim..], rows, self.head_dim)
    }

    fn rows_mut<'a>(&self, dense: &'a mut [f32], first: usize, rows: usize) -> MatrixMut<'a> {
        MatrixMut::rows(&mut dense[first * self.head_dim..], rows, self.head_dim)
    }

    fn dense(&self) -> Vec<f32> {
        vec![0.0; self.head_elements()]
    }

    fn scores(&self) -> Vec<f32> {
        vec![0.0; BLOCK.min(self.length) * self.length]
    }
}

/// Fills `y` `[r, heads * head_dim]` and `log_sums` `[sequences, heads, length]`.
pub fn forward(qkv: &[f32], dims: &AttentionDims, y: &mut [f32], log_sums: &mut [f32]) {
    let [mut q, mut k, mut v, mut out] = [dims.dense(), dims.dense(), dims.dense(), dims.dense()];
    let mut scores = dims.scores();
    let sequences = qkv
        .chunks_exact(dims.length * dims.qkv_width())
        .zip(y.chunks_exact_mut(dims.length * dims.output_width()))
        .zip(log_sums.chunks_exact_mut(dims.heads * dims.length));
    for ((qkv, y), log_sums) in sequences {
        for kv_head in 0..dims.kv_heads {
            dims.key(kv_head).copy(qkv, &mut k, dims.head_dim);
            dims.value(kv_head).copy(qkv, &mut v, dims.head_dim);
            for head in dims.group(kv_head) {
                dims.query(head).copy(qkv, &mut q, dims.head_dim);
                let log_sums = &mut log_sums[head * dims.length..(head + 1) * dims.length];
                head_forward([&q, &k, &v], dims, &mut scores, &mut out, log_sums);
                dims.output(head).fill(y, &out, dims.head_dim);
            }
        }
    }
}

fn head_forward(
    [q, k, v]: [&[f32]; 3],
    dims: &AttentionDims,
    scores: &mut [f32],
    out: &mut [f32],
    log_sums: &mut [f32],
) {
    for (first, queries, keys) in dims.blocks() {
        let scores = &mut scores[..queries * keys];
        let q = dims.rows(q, first, queries);
        let k = dims.rows(k, 0, keys).transposed();
        multiply(q, k, dims.scale(), MatrixMut::rows(scores, queries, keys), false, 1);
        for (row, scores) in scores.chunks_exact_mut(keys).enumerate() {
            log_sums[first + row] = kernels::softmax_prefix(scores, first + row + 1);
        }
        let p = Matrix::rows(scores, queries, keys);
        let out = dims.rows_mut(out, first, queries);
        multiply(p, dims.rows(v, 0, keys), 1.0, out, false, 1);
    }
}

/// Fills `dqkv` from the gradient `dy` of the output and what the forward pass saved.
pub fn backward(
    dy: &[f32],
    qkv: &[f32],
    (y, log_sums): (&[f32], &[f32]),
    dims: &AttentionDims,
    dqkv: &mut [f32],
) {
    let mut head = Head::new(dims);
    let [mut dk, mut dv] = [dims.dense(), dims.dense()];
    let rows = dims.length * dims.output_width();
    let sequences = dy
        .chunks_exact(rows)
        .zip(y.chunks_exact(rows))
        .zip(qkv.chunks_exact(dims.length * dims.qkv_width()))
        .zip(log_sums.chunks_exact(dims.heads * dims.length))
        .zip(dqkv.chunks_exact_mut(dims.length * dims.qkv_width()));
    for ((((dy, y), qkv), log_sums), dqkv) in sequences {
        for kv_head in 0..dims.kv_heads {
            dims.key(kv_head).copy(qkv, &mut head.k, dims.head_dim);
            dims.value(kv_head).copy(qkv, &mut head.v, dims.head_dim);
            dk.fill(0.0); // the heads of a group add to the same keys and values
            dv.fill(0.0);
            for index in dims.group(kv_head) {
                dims.query(index).copy(qkv, &mut head.q, dims.head_dim);
                dims.output(index).copy(dy, &mut head.dy, dims.head_dim);
                dims.output(index).copy(y, &mut head.y, dims.head_dim);
                let log_sums = &log_sums[index * dims.length..(index + 1) * dims.length];
                head.backward(dims, log_sums, &mut dk, &mut dv);
                dims.query(index).fill(dqkv, &head.dq, dims.head_dim);
            }
            dims.key(kv_head).fill(dqkv, &dk, dims.head_dim);
            dims.value(kv_head).fill(dqkv, &dv, dims.head_dim);
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
        Self {
            q: dims.dense(),
            k: dims.dense(),
            v: dims.dense(),
            y: dims.dense(),
            dy: dims.dense(),
            dq: dims.dense(),
            weights: dims.scores(),
            gradients: dims.scores(),
        }
    }

    fn backward(&mut self, dims: &AttentionDims, log_sums: &[f32], dk: &mut [f32], dv: &mut [f32]) {
        for (first, queries, keys) in dims.blocks() {
            let p = &mut self.weights[..queries * keys];
            let ds = &mut self.gradients[..queries * keys];
            let (q, dy) = (dims.rows(&self.q, first, queries), dims.rows(&self.dy, first, queries));
            let (k, v) = (dims.rows(&self.k, 0, keys), dims.rows(&self.v, 0, keys));
            multiply(q, k.transposed(), dims.scale(), MatrixMut::rows(p, queries, keys), false, 1);
            multiply(dy, v.transposed(), 1.0, MatrixMut::rows(ds, queries, keys), false, 1);
            for row in 0..queries {
                let (place, scores) = (first + row, row * keys..(row + 1) * keys);
                let values = place * dims.head_dim..(place + 1) * dims.head_dim;
                let delta = kernels::dot(&self.dy[values.clone()], &self.y[values]);
                let saved = (log_sums[place], delta);
                kernels::softmax_backward(
                    &mut p[scores.clone()],
                    &mut ds[scores],
                    place + 1,
                    saved,
                );
            }
            let p = Matrix::rows(p, queries, keys).transposed();
            multiply(p, dy, 1.0, dims.rows_mut(dv, 0, keys), true, 1);
            let ds = Matrix::rows(ds, queries, keys);
            let dq = dims.rows_mut(&mut self.dq, first, queries);
            multiply(ds, k, dims.scale(), dq, false, 1);
            multiply(ds.transposed(), q, dims.scale(), dims.rows_mut(dk, 0, keys), true, 1);
        }
    }
}
