//! Causal attention in blocks of queries, each against only the keys it may see, so that the
//! scores held at once stay linear in the sequence.
//!
//! Queries of one group lie below each other as rows of one matrix: keys and values are shared
//! without being repeated, and their gradients sum over the group by themselves.

use burn_tensor::{Bool, Tensor};

use super::flat;
use crate::operators::AttentionDims;

/// Queries of a head whose scores are held at once.
const BLOCK: usize = 128;

/// The score of a key that a query may not see. Finite, as shaders may assume that all numbers
/// are; its exponential is zero all the same.
const HIDDEN: f32 = -1e30;

/// Queries as `[sequences * kv_heads, group, length, head_dim]`, keys and values as
/// `[sequences * kv_heads, length, head_dim]`.
struct Heads<'a> {
    dims: &'a AttentionDims,
    queries: Tensor<4>,
    keys: Tensor<3>,
    values: Tensor<3>,
}

/// A block of queries.
#[derive(Clone, Copy)]
struct Block {
    first: usize,
    queries: usize,
    /// Keys that its last query may see.
    keys: usize,
}

impl AttentionDims {
    fn group_size(&self) -> usize {
        self.heads / self.kv_heads
    }

    fn batch(&self) -> usize {
        self.sequences * self.kv_heads
    }

    /// From `[r, heads * head_dim]` to `[sequences * kv_heads, group, length, head_dim]`.
    fn by_head(&self, tokens: Tensor<1>) -> Tensor<4> {
        let shape = [self.sequences, self.length, self.kv_heads, self.group_size(), self.head_dim];
        let tokens = tokens.reshape(shape).permute([0, 2, 3, 1, 4]);
        tokens.reshape([self.batch(), self.group_size(), self.length, self.head_dim])
    }

    /// From `[sequences * kv_heads, heads * rows, head_dim]`, where `heads` is the group's size or
    /// one, to `[sequences, rows, all heads, head_dim]`.
    fn by_token(&self, heads: Tensor<3>, rows: usize) -> Tensor<4> {
        let count = heads.shape().num_elements() / (self.sequences * rows * self.head_dim);
        let shape = [self.sequences, count, rows, self.head_dim];
        heads.reshape(shape).permute([0, 2, 1, 3])
    }
}

impl<'a> Heads<'a> {
    fn new(qkv: &Tensor<1>, dims: &'a AttentionDims) -> Self {
        let AttentionDims { sequences, length, heads, kv_heads, head_dim } = *dims;
        let qkv = qkv.clone().reshape([sequences, length, heads + 2 * kv_heads, head_dim]);
        let shared = |first| {
            let slots = qkv.clone().narrow(2, first, kv_heads).permute([0, 2, 1, 3]);
            slots.reshape([sequences * kv_heads, length, head_dim])
        };
        let queries = qkv.clone().narrow(2, 0, heads);
        Self {
            dims,
            queries: dims.by_head(flat(queries)),
            keys: shared(heads),
            values: shared(heads + kv_heads),
        }
    }

    fn keys(&self, block: Block) -> Tensor<3> {
        self.keys.clone().narrow(1, 0, block.keys)
    }

    fn values(&self, block: Block) -> Tensor<3> {
        self.values.clone().narrow(1, 0, block.keys)
    }

    /// Scores `[sequences * kv_heads, group * queries, keys]`.
    fn scores(&self, block: Block) -> Tensor<3> {
        let queries = rows_of(&self.queries, block);
        let scores = queries.matmul(self.keys(block).transpose()) * self.dims.scale();
        let shape = [self.dims.batch(), self.dims.group_size(), block.queries, block.keys];
        let unseen = Tensor::<2, Bool>::tril_mask(
            [block.queries, block.keys],
            block.first as i64,
            &scores.device(),
        );
        let unseen = unseen.reshape([1, 1, block.queries, block.keys]).expand(shape);
        let rows = scores.dims();
        scores.reshape(shape).mask_fill(unseen, HIDDEN).reshape(rows)
    }
}

fn blocks(length: usize) -> impl Iterator<Item = Block> {
    (0..length).step_by(BLOCK).map(move |first| {
        let queries = BLOCK.min(length - first);
        Block { first, queries, keys: first + queries }
    })
}

/// A block's rows of every head of a group, below each other.
fn rows_of(heads: &Tensor<4>, block: Block) -> Tensor<3> {
    let [batch, group, _, width] = heads.dims();
    let rows = heads.clone().narrow(2, block.first, block.queries);
    rows.reshape([batch, group * block.queries, width])
}

/// Weighted values `[r, heads * head_dim]` and log-sum-exps `[sequences, heads, length]`.
pub fn forward(qkv: &Tensor<1>, dims: &AttentionDims) -> (Tensor<1>, Tensor<1>) {
    let heads = Heads::new(qkv, dims);
    let (mut y, mut log_sums) = (Vec::new(), Vec::new());
    for block in blocks(dims.length) {
        let scores = heads.scores(block);
        let max = scores.clone().max_dim(2);
        let weights = (scores - max.clone()).exp();
        let sums = weights.clone().sum_dim(2);
        let weighted = weights.matmul(heads.values(block)) / sums.clone();
        y.push(dims.by_token(weighted, block.queries));
        let log_sum = max + sums.log();
        log_sums.push(log_sum.reshape([dims.sequences, dims.heads, block.queries]));
    }
    (flat(Tensor::cat(y, 1)), flat(Tensor::cat(log_sums, 2)))
}

/// Gradient of `qkv` (Dao et al. 2022, eq. 4, with `delta = rowsum(dy * y)`).
pub fn backward(
    dy: &Tensor<1>,
    qkv: &Tensor<1>,
    (y, log_sums): (&Tensor<1>, &Tensor<1>),
    dims: &AttentionDims,
) -> Tensor<1> {
    let heads = Heads::new(qkv, dims);
    let deltas = dims.by_head(dy.clone() * y.clone()).sum_dim(3);
    let dy = dims.by_head(dy.clone());
    let log_sums = log_sums.clone().reshape([dims.batch(), dims.group_size(), dims.length, 1]);
    let mut dq = Vec::new();
    let (mut dk, mut dv) = (heads.keys.zeros_like(), heads.values.zeros_like());
    for block in blocks(dims.length) {
        let weights = (heads.scores(block) - rows_of(&log_sums, block)).exp();
        let dy = rows_of(&dy, block);
        let dweights = dy.clone().matmul(heads.values(block).transpose());
        let dscores = weights.clone() * (dweights - rows_of(&deltas, block)) * dims.scale();
        dq.push(dims.by_token(dscores.clone().matmul(heads.keys(block)), block.queries));
        let queries = rows_of(&heads.queries, block);
        dk = add_rows(dk, dscores.transpose().matmul(queries));
        dv = add_rows(dv, weights.transpose().matmul(dy));
    }
    let (dk, dv) = (dims.by_token(dk, dims.length), dims.by_token(dv, dims.length));
    flat(Tensor::cat(vec![Tensor::cat(dq, 1), dk, dv], 2))
}

/// Adds to the first rows of every matrix.
fn add_rows(into: Tensor<3>, first: Tensor<3>) -> Tensor<3> {
    let [batch, rows, width] = first.dims();
    let sum = into.clone().narrow(1, 0, rows) + first;
    into.slice_assign([0..batch, 0..rows, 0..width], sum)
}
