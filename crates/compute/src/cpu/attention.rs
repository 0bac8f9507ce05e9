//! Causal attention in blocks of queries: scores of one block at a time, and only against keys
//! that it may see, so that memory stays linear in the sequence and half the work is skipped.
//!
//! Forward as in Dao et al. 2022 (FlashAttention) with whole rows of scores; backward as in its
//! eq. 4 with `delta = rowsum(dy * y)`.

use super::kernels;
use super::product::{Matrix, MatrixMut, multiply};
use crate::operators::AttentionDims;

/// Queries whose scores are held at once: large enough for efficient products, small enough for
/// the scores to stay in cache.
const BLOCK: usize = 64;

/// Where a head's rows lie in `qkv` and in the output.
struct Head {
    query: usize,
    key: usize,
    value: usize,
    output: usize,
    log_sum: usize,
}

impl AttentionDims {
    fn output_width(&self) -> usize {
        self.heads * self.head_dim
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    fn head(&self, sequence: usize, head: usize) -> Head {
        let first = sequence * self.length;
        let kv_head = head / (self.heads / self.kv_heads);
        let row = first * self.qkv_width();
        Head {
            query: row + head * self.head_dim,
            key: row + (self.heads + kv_head) * self.head_dim,
            value: row + (self.heads + self.kv_heads + kv_head) * self.head_dim,
            output: first * self.output_width() + head * self.head_dim,
            log_sum: (sequence * self.heads + head) * self.length,
        }
    }

    fn heads_of_all_sequences(&self) -> impl Iterator<Item = Head> + '_ {
        (0..self.sequences).flat_map(move |s| (0..self.heads).map(move |h| self.head(s, h)))
    }

    /// Blocks of queries as (first query, queries, keys they may see).
    fn blocks(&self) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
        let length = self.length;
        (0..length).step_by(BLOCK).map(move |first| {
            let queries = BLOCK.min(length - first);
            (first, queries, first + queries)
        })
    }

    /// `rows` rows of one head's queries, keys or values from `start`.
    fn rows<'a>(&self, qkv: &'a [f32], start: usize, first: usize, rows: usize) -> Matrix<'a> {
        let start = start + first * self.qkv_width();
        Matrix::strided(&qkv[start..], rows, self.head_dim, self.qkv_width())
    }

    fn rows_mut<'a>(
        &self,
        qkv: &'a mut [f32],
        start: usize,
        first: usize,
        rows: usize,
    ) -> MatrixMut<'a> {
        let start = start + first * self.qkv_width();
        MatrixMut::strided(&mut qkv[start..], rows, self.head_dim, self.qkv_width())
    }

    /// One head's rows of the output.
    fn outputs<'a>(&self, y: &'a [f32], head: &Head, first: usize, rows: usize) -> Matrix<'a> {
        let start = head.output + first * self.output_width();
        Matrix::strided(&y[start..], rows, self.head_dim, self.output_width())
    }
}

/// Fills `y` `[r, heads * head_dim]` and `log_sums` `[sequences, heads, length]`.
pub fn forward(qkv: &[f32], dims: &AttentionDims, y: &mut [f32], log_sums: &mut [f32]) {
    let mut scores = vec![0.0; BLOCK.min(dims.length) * dims.length];
    let width = dims.output_width();
    for head in dims.heads_of_all_sequences() {
        for (first, queries, keys) in dims.blocks() {
            let scores = &mut scores[..queries * keys];
            let q = dims.rows(qkv, head.query, first, queries);
            let k = dims.rows(qkv, head.key, 0, keys).transposed();
            multiply(
                q,
                k,
                dims.scale(),
                MatrixMut::rows(scores, queries, keys),
                false,
                1,
            );
            for (row, scores) in scores.chunks_exact_mut(keys).enumerate() {
                let log_sum = kernels::softmax_prefix(scores, first + row + 1);
                log_sums[head.log_sum + first + row] = log_sum;
            }
            let v = dims.rows(qkv, head.value, 0, keys);
            let rows = &mut y[head.output + first * width..];
            let y = MatrixMut::strided(rows, queries, dims.head_dim, width);
            multiply(Matrix::rows(scores, queries, keys), v, 1.0, y, false, 1);
        }
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
    dqkv.fill(0.0); // heads of a group add to the same keys and values
    let size = BLOCK.min(dims.length) * dims.length;
    let (mut weights, mut gradients) = (vec![0.0; size], vec![0.0; size]);
    let mut deltas = vec![0.0; dims.length];
    let width = dims.output_width();
    for head in dims.heads_of_all_sequences() {
        for (row, delta) in deltas.iter_mut().enumerate() {
            let range = head.output + row * width..head.output + row * width + dims.head_dim;
            *delta = kernels::dot(&dy[range.clone()], &y[range]);
        }
        for (first, queries, keys) in dims.blocks() {
            let p = &mut weights[..queries * keys];
            let ds = &mut gradients[..queries * keys];
            let q = dims.rows(qkv, head.query, first, queries);
            let k = dims.rows(qkv, head.key, 0, keys);
            let v = dims.rows(qkv, head.value, 0, keys);
            let dy = dims.outputs(dy, &head, first, queries);
            multiply(
                q,
                k.transposed(),
                dims.scale(),
                MatrixMut::rows(p, queries, keys),
                false,
                1,
            );
            multiply(
                dy,
                v.transposed(),
                1.0,
                MatrixMut::rows(ds, queries, keys),
                false,
                1,
            );
            for row in 0..queries {
                let range = row * keys..(row + 1) * keys;
                let saved = (log_sums[head.log_sum + first + row], deltas[first + row]);
                let seen = first + row + 1;
                kernels::softmax_backward(&mut p[range.clone()], &mut ds[range], seen, saved);
            }
            let p = Matrix::rows(p, queries, keys).transposed();
            multiply(
                p,
                dy,
                1.0,
                dims.rows_mut(dqkv, head.value, 0, keys),
                true,
                1,
            );
            let ds = Matrix::rows(ds, queries, keys);
            let dq = dims.rows_mut(dqkv, head.query, first, queries);
            multiply(ds, k, dims.scale(), dq, true, 1);
            let dk = dims.rows_mut(dqkv, head.key, 0, keys);
            multiply(ds.transposed(), q, dims.scale(), dk, true, 1);
        }
    }
}
