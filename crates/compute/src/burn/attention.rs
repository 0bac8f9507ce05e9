//! Attention in blocks of queries, each against only the keys that some of them may see, so that the
//! scores held at once stay linear in the sequence.
//!
//! Queries of one group lie below each other as rows of one matrix: keys and values are shared
//! without being repeated, and their gradients sum over the group by themselves.

use std::ops::Range;

use burn_tensor::{Bool, Device, Tensor, TensorData};

use super::{flat, split};
use crate::operators::{AttentionDims, Sight, UNSEEN};

/// Queries of a head whose scores are held at once.
const BLOCK: usize = 128;

/// Queries as `[sequences * kv_heads, group, length, head_dim]`, keys as `[sequences * kv_heads, keys,
/// head_dim]`, values as `[sequences * kv_heads, keys, value_dim]`.
struct Heads<'a> {
    dims: &'a AttentionDims,
    seen: &'a [Range<u32>],
    queries: Tensor<4>,
    keys: Tensor<3>,
    values: Tensor<3>,
}

/// A block of queries, and the keys that any of them may see in any sequence.
#[derive(Clone)]
struct Block {
    first: usize,
    queries: usize,
    keys: Range<usize>,
}

impl AttentionDims {
    fn group_size(&self) -> usize {
        self.heads / self.kv_heads
    }

    fn batch(&self) -> usize {
        self.sequences * self.kv_heads
    }

    /// From `[r, heads * width]` to `[sequences * kv_heads, group, length, width]`.
    fn by_head(&self, tokens: Tensor<1>, width: usize) -> Tensor<4> {
        let shape = [self.sequences, self.length, self.kv_heads, self.group_size(), width];
        let tokens = tokens.reshape(shape).permute([0, 2, 3, 1, 4]);
        tokens.reshape([self.batch(), self.group_size(), self.length, width])
    }

    /// From `[sequences * kv_heads, heads * rows, width]`, where `heads` is the group's size or one,
    /// to `[sequences, rows, all heads * width]`.
    fn by_token(&self, heads: Tensor<3>, rows: usize) -> Tensor<3> {
        let width = heads.dims()[2];
        let count = heads.shape().num_elements() / (self.sequences * rows * width);
        let tokens = heads.reshape([self.sequences, count, rows, width]).permute([0, 2, 1, 3]);
        tokens.reshape([self.sequences, rows, count * width])
    }

    /// From `[sequences, keys, kv_heads * width]` to `[sequences * kv_heads, keys, width]`.
    fn shared(&self, tokens: Tensor<3>, width: usize) -> Tensor<3> {
        let tokens = tokens.reshape([self.sequences, self.keys, self.kv_heads, width]);
        tokens.permute([0, 2, 1, 3]).reshape([self.batch(), self.keys, width])
    }
}

impl<'a> Heads<'a> {
    fn new(qkv: &Tensor<1>, sight: Sight<'a, Tensor<1>>, dims: &'a AttentionDims) -> Self {
        let qkv = qkv.clone().reshape([dims.sequences, dims.length, dims.qkv_width()]);
        let [queries, beside] = split(qkv, 2, dims.queries_width());
        let apart = |keys_of: &Tensor<1>| {
            keys_of.clone().reshape([dims.sequences, dims.keys, dims.keys_width()])
        };
        let keys_and_values = sight.keys.map_or(beside, apart);
        let [keys, values] = split(keys_and_values, 2, dims.kv_heads * dims.head_dim);
        Self {
            dims,
            seen: sight.seen,
            queries: dims.by_head(flat(queries), dims.head_dim),
            keys: dims.shared(keys, dims.head_dim),
            values: dims.shared(values, dims.value_dim),
        }
    }

    fn keys(&self, block: &Block) -> Tensor<3> {
        self.keys.clone().narrow(1, block.keys.start, block.keys.len())
    }

    fn values(&self, block: &Block) -> Tensor<3> {
        self.values.clone().narrow(1, block.keys.start, block.keys.len())
    }

    fn blocks(&self) -> impl Iterator<Item = Block> + use<> {
        let length = self.dims.length;
        let block = |first: usize| {
            let queries = BLOCK.min(length - first);
            let of_block = |of_sequence: &'a [Range<u32>]| &of_sequence[first..first + queries];
            let seen = || self.seen.chunks(length).flat_map(of_block).filter(|s| !s.is_empty());
            // Of none, one key stands for what is hidden from all.
            let start = seen().map(|seen| seen.start).min().unwrap_or(0) as usize;
            let end = seen().map(|seen| seen.end).max().unwrap_or(1) as usize;
            Block { first, queries, keys: start..end }
        };
        (0..length).step_by(BLOCK).map(block).collect::<Vec<_>>().into_iter()
    }

    /// Which scores of a block, `[sequences, 1, queries, keys]`, are of keys that are not seen.
    fn hidden(&self, block: &Block, device: &Device) -> Tensor<4, Bool> {
        let Block { first, queries, ref keys } = *block;
        let causal = |(query, seen): (usize, &Range<u32>)| {
            seen.start == 0 && seen.end as usize == query % self.dims.length + 1
        };
        if self.seen.iter().enumerate().all(causal) {
            let hidden = Tensor::<2, Bool>::tril_mask([queries, keys.len()], first as i64, device);
            return hidden.reshape([1, 1, queries, keys.len()]);
        }
        let of_block = |seen: &'a [Range<u32>]| &seen[first..first + queries];
        let rows = self.seen.chunks(self.dims.length).flat_map(of_block);
        let hides = |seen: &Range<u32>, key: usize| !seen.contains(&(key as u32));
        let hidden: Vec<bool> =
            rows.flat_map(|seen| keys.clone().map(|key| hides(seen, key))).collect();
        let shape = [self.dims.sequences, 1, queries, keys.len()];
        Tensor::from_data(TensorData::new(hidden, shape), device)
    }

    /// Scores `[sequences * kv_heads, group * queries, keys]`.
    fn scores(&self, block: &Block) -> Tensor<3> {
        let queries = rows_of(&self.queries, block);
        let scores = queries.matmul(self.keys(block).transpose()) * self.dims.scale();
        let shape = [self.dims.sequences, self.dims.heads, block.queries, block.keys.len()];
        let hidden = self.hidden(block, &scores.device()).expand(shape);
        let rows = scores.dims();
        scores.reshape(shape).mask_fill(hidden, UNSEEN).reshape(rows)
    }
}

/// A block's rows of every head of a group, below each other.
fn rows_of(heads: &Tensor<4>, block: &Block) -> Tensor<3> {
    let [batch, group, _, width] = heads.dims();
    let rows = heads.clone().narrow(2, block.first, block.queries);
    rows.reshape([batch, group * block.queries, width])
}

/// Weighted values `[r, heads * value_dim]` and log-sum-exps `[sequences, heads, length]`.
pub fn forward(
    qkv: &Tensor<1>,
    sight: Sight<'_, Tensor<1>>,
    dims: &AttentionDims,
) -> (Tensor<1>, Tensor<1>) {
    let heads = Heads::new(qkv, sight, dims);
    let (mut y, mut log_sums) = (Vec::new(), Vec::new());
    for block in heads.blocks() {
        let scores = heads.scores(&block);
        let max = scores.clone().max_dim(2);
        let weights = (scores - max.clone()).exp();
        let sums = weights.clone().sum_dim(2);
        let weighted = weights.matmul(heads.values(&block)) / sums.clone();
        y.push(dims.by_token(weighted, block.queries));
        let log_sum = max + sums.log();
        log_sums.push(log_sum.reshape([dims.sequences, dims.heads, block.queries]));
    }
    (flat(Tensor::cat(y, 1)), flat(Tensor::cat(log_sums, 2)))
}

/// Joins what was found among other keys.
pub fn join(
    (y, log_sums): (&mut Tensor<1>, &mut Tensor<1>),
    (other, other_sums): (&Tensor<1>, &Tensor<1>),
    dims: &AttentionDims,
) {
    let AttentionDims { sequences, length, heads, value_dim, .. } = *dims;
    let by_token = |sums: &Tensor<1>| {
        sums.clone().reshape([sequences, heads, length, 1]).permute([0, 2, 1, 3])
    };
    let values = |y: &Tensor<1>| y.clone().reshape([sequences, length, heads, value_dim]);
    let (own, others) = (by_token(log_sums), by_token(other_sums));
    let max = own.clone().max_pair(others.clone());
    let (own, others) = ((own - max.clone()).exp(), (others - max.clone()).exp());
    let sum = own.clone() + others.clone();
    *y = flat((values(y) * own + values(other) * others) / sum.clone());
    *log_sums = flat((max + sum.log()).permute([0, 2, 1, 3]));
}

/// Gradients of `qkv`, and of keys and values that stand apart (Dao et al. 2022, eq. 4, with
/// `delta = rowsum(dy * y)`).
pub fn backward(
    dy: &Tensor<1>,
    qkv: &Tensor<1>,
    (y, log_sums): (&Tensor<1>, &Tensor<1>),
    sight: Sight<'_, Tensor<1>>,
    dims: &AttentionDims,
) -> (Tensor<1>, Option<Tensor<1>>) {
    let heads = Heads::new(qkv, sight, dims);
    let deltas = dims.by_head(dy.clone() * y.clone(), dims.value_dim).sum_dim(3);
    let dy = dims.by_head(dy.clone(), dims.value_dim);
    let log_sums = log_sums.clone().reshape([dims.batch(), dims.group_size(), dims.length, 1]);
    let mut dq = Vec::new();
    let (mut dk, mut dv) = (heads.keys.zeros_like(), heads.values.zeros_like());
    for block in heads.blocks() {
        let weights = (heads.scores(&block) - rows_of(&log_sums, &block)).exp();
        let dy = rows_of(&dy, &block);
        let dweights = dy.clone().matmul(heads.values(&block).transpose());
        let dscores = weights.clone() * (dweights - rows_of(&deltas, &block)) * dims.scale();
        dq.push(dims.by_token(dscores.clone().matmul(heads.keys(&block)), block.queries));
        let queries = rows_of(&heads.queries, &block);
        dk = add_rows(dk, block.keys.start, dscores.transpose().matmul(queries));
        dv = add_rows(dv, block.keys.start, weights.transpose().matmul(dy));
    }
    let (dk, dv) = (dims.by_token(dk, dims.keys), dims.by_token(dv, dims.keys));
    let (dq, dkv) = (Tensor::cat(dq, 1), Tensor::cat(vec![dk, dv], 2));
    match sight.keys {
        None => (flat(Tensor::cat(vec![dq, dkv], 2)), None),
        Some(_) => {
            let shape = [dims.sequences, dims.length, dims.keys_width()];
            let beside = Tensor::zeros(shape, &dq.device());
            (flat(Tensor::cat(vec![dq, beside], 2)), Some(flat(dkv)))
        }
    }
}

/// Adds to rows of every matrix from `start` on.
fn add_rows(into: Tensor<3>, start: usize, added: Tensor<3>) -> Tensor<3> {
    let [batch, rows, width] = added.dims();
    let sum = into.clone().narrow(1, start, rows) + added;
    into.slice_assign([0..batch, start..start + rows, 0..width], sum)
}
