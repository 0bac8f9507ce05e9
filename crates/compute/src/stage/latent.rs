//! Latent attention: queries, and keys with values, are expanded from narrow vectors (DeepSeek-V2,
//! arXiv:2405.04434, section 2.1). Every tensor-parallel rank makes the narrow vectors and expands
//! them for its own heads; what it leaves are queries, keys and values as of any attention.

use model::{Block, LatentAttention, Role};
use program::Value;

use super::Stage;
use super::exchanged::{Rows, Work};
use super::segments::{Owed, take};
use crate::operators::{Operators, ProductDims};

/// A product of low rank: down to a narrow vector, its norm, and up to this rank's heads.
#[derive(Clone, Copy)]
struct LowRank {
    down: Role,
    norm: Role,
    up: Role,
    /// Where the narrow vector stands among all of a token.
    first: usize,
    rank: usize,
    /// Components that the product down makes besides: the part of keys that is rotated.
    beside: usize,
    /// Where the product up stands among all of a token, and its width.
    heads: usize,
    width: usize,
}

impl LowRank {
    fn down(self, r: usize, hidden: usize) -> ProductDims {
        ProductDims { r, k: hidden, n: self.rank + self.beside }
    }

    fn up(self, r: usize) -> ProductDims {
        ProductDims { r, k: self.rank, n: self.width }
    }
}

impl<O: Operators> Stage<O> {
    /// The products of low rank, and the widths of what all of them make, narrow and for heads.
    /// Queries may be projected at once.
    fn low_ranks(&self, latent: LatentAttention) -> (Vec<LowRank>, [usize; 2]) {
        let dims = &self.program.attention;
        let [kv_rank, rope, nope] =
            [latent.kv_rank, latent.rope_dim, latent.nope_dim].map(|width| width as usize);
        let queries = latent.query_rank.map(|rank| LowRank {
            down: Role::QueryLatent,
            norm: Role::QueryLatentNorm,
            up: Role::Query,
            first: 0,
            rank: rank as usize,
            beside: 0,
            heads: 0,
            width: dims.queries_width(),
        });
        let keys = LowRank {
            down: Role::KeyLatent,
            norm: Role::KeyLatentNorm,
            up: Role::Key,
            first: queries.map_or(0, |queries| queries.rank),
            rank: kv_rank,
            beside: rope,
            heads: dims.queries_width(),
            width: dims.heads * (nope + dims.value_dim),
        };
        let widths = [keys.first + kv_rank + rope, keys.heads + keys.width];
        (queries.into_iter().chain([keys]).collect(), widths)
    }

    /// A piece of queries, keys and values, not yet rotated, of the normed stream.
    pub(super) fn expand(
        &mut self,
        x: &O::Tensor,
        work: Work,
        latent: LatentAttention,
    ) -> O::Tensor {
        let (block, r) = (Block::Layer(work.layer), self.rows(work.piece));
        let (products, [narrow_width, heads_width]) = self.low_ranks(latent);
        let mut narrow = self.operators.zeros(r * narrow_width);
        let mut heads = self.operators.zeros(r * heads_width);
        if latent.query_rank.is_none() {
            let (w, dims) = (self.window(block, Role::Query), self.whole_queries(r));
            let queries = self.operators.product(x, w, dims);
            self.operators.set_columns(&mut heads, heads_width, 0, &queries);
        }
        for low in products {
            let w = self.window(block, low.down);
            let down = self.operators.product(x, w, low.down(r, self.config.hidden as usize));
            self.operators.set_columns(&mut narrow, narrow_width, low.first, &down);
            let [_, normed, _] = self.normed(&narrow, narrow_width, low, block);
            let up = self.operators.product(&normed, self.window(block, low.up), low.up(r));
            self.operators.set_columns(&mut heads, heads_width, low.heads, &up);
        }
        let rotated = narrow_width - latent.rope_dim as usize..narrow_width;
        let rotated = self.operators.columns(&narrow, narrow_width, rotated);
        self.save(work, narrow);
        self.with_shared_keys(&heads, &rotated, latent)
    }

    /// A narrow vector, its norm, and the inverse root mean square that this divides by.
    fn normed(
        &self,
        narrow: &O::Tensor,
        width: usize,
        low: LowRank,
        block: Block,
    ) -> [O::Tensor; 3] {
        let vector = self.operators.columns(narrow, width, low.first..low.first + low.rank);
        let scale = self.window(block, low.norm);
        let (normed, inverse) =
            self.operators.rms_norm(&vector, scale, low.rank, LatentAttention::NORM_EPSILON);
        [vector, normed, inverse]
    }

    fn whole_queries(&self, r: usize) -> ProductDims {
        let n = self.program.attention.queries_width();
        ProductDims { r, k: self.config.hidden as usize, n }
    }

    /// Queries, keys and values, of queries with each head's keys and values without position, and
    /// of the rotated part of keys that all heads share.
    fn with_shared_keys(
        &self,
        heads: &O::Tensor,
        rotated: &O::Tensor,
        latent: LatentAttention,
    ) -> O::Tensor {
        let (operators, dims) = (&self.operators, &self.program.attention);
        let (nope, each) = (latent.nope_dim as usize, latent.nope_dim as usize + dims.value_dim);
        let (queries, keys) = (dims.queries_width(), dims.heads * dims.head_dim);
        let [from, to] = [queries + dims.heads * each, dims.qkv_width()];
        let both = operators.columns(heads, from, queries..from);
        let mut qkv = operators.zeros(operators.elements(heads) / from * to);
        operators.set_columns(&mut qkv, to, 0, &operators.columns(heads, from, 0..queries));
        let values = operators.columns(&both, each, nope..each);
        operators.set_columns(&mut qkv, to, queries + keys, &values);
        let mut keys = operators.zeros(operators.elements(&qkv) / to * keys);
        let without = operators.columns(&both, each, 0..nope);
        operators.set_columns(&mut keys, dims.head_dim, 0, &without);
        for head in 0..dims.heads {
            let first = head * dims.head_dim + nope;
            operators.set_columns(&mut keys, dims.heads * dims.head_dim, first, rotated);
        }
        operators.set_columns(&mut qkv, to, queries, &keys);
        qkv
    }

    /// The gradients of both inputs of [`Stage::with_shared_keys`].
    fn shared_keys_backward(&self, dqkv: &O::Tensor, latent: LatentAttention) -> [O::Tensor; 2] {
        let (operators, dims) = (&self.operators, &self.program.attention);
        let (nope, each) = (latent.nope_dim as usize, latent.nope_dim as usize + dims.value_dim);
        let (queries, keys) = (dims.queries_width(), dims.heads * dims.head_dim);
        let [to, from] = [queries + dims.heads * each, dims.qkv_width()];
        let rows = operators.elements(dqkv) / from;
        let dkeys = operators.columns(dqkv, from, queries..queries + keys);
        let mut both = operators.zeros(rows * dims.heads * each);
        let without = operators.columns(&dkeys, dims.head_dim, 0..nope);
        operators.set_columns(&mut both, each, 0, &without);
        let values = operators.columns(dqkv, from, queries + keys..from);
        operators.set_columns(&mut both, each, nope, &values);
        let mut heads = operators.zeros(rows * to);
        operators.set_columns(&mut heads, to, 0, &operators.columns(dqkv, from, 0..queries));
        operators.set_columns(&mut heads, to, queries, &both);
        let mut rotated = operators.zeros(rows * latent.rope_dim as usize);
        for head in 0..dims.heads {
            let of_head = head * dims.head_dim + nope..(head + 1) * dims.head_dim;
            operators.add(&mut rotated, &operators.columns(&dkeys, keys, of_head));
        }
        [heads, rotated]
    }

    /// Leaves the gradient of the normed stream, and adds to those of the norms' scales.
    pub(super) fn expand_backward(&mut self, work: Work, latent: LatentAttention) {
        let (block, r) = (Block::Layer(work.layer), self.rows(work.piece));
        let hidden = self.config.hidden as usize;
        let (products, [narrow_width, heads_width]) = self.low_ranks(latent);
        let narrow = self.piece(&self.saved[&work.of(work.output())], Rows::Product, work.piece);
        let dqkv = self.output_gradient(work);
        let [dheads, drotated] = self.shared_keys_backward(&dqkv, latent);
        // The gradients of the weights are found without the norms' scales, which may be gone by then:
        // they are made of the gradients of the narrow vectors and, beside them, these normed.
        let first = narrow_width - latent.rope_dim as usize;
        let inner_width = narrow_width + first;
        let mut inner = self.operators.zeros(r * inner_width);
        self.operators.set_columns(&mut inner, inner_width, first, &drotated);
        let mut dx = match latent.query_rank {
            Some(_) => self.operators.zeros(r * hidden),
            None => {
                let (w, dims) = (self.window(block, Role::Query), self.whole_queries(r));
                let dq = self.operators.columns(&dheads, heads_width, 0..dims.n);
                self.operators.product_input_gradient(&dq, w, dims)
            }
        };
        for low in products {
            let dup = low.heads..low.heads + low.width;
            let dup = self.operators.columns(&dheads, heads_width, dup);
            let w = self.window(block, low.up);
            let dnormed = self.operators.product_input_gradient(&dup, w, low.up(r));
            let [vector, normed, inverse] = self.normed(&narrow, narrow_width, low, block);
            let dvector = self.norm_gradient(&dnormed, (&vector, &inverse), (block, low.norm));
            self.operators.set_columns(&mut inner, inner_width, low.first, &dvector);
            self.operators.set_columns(&mut inner, inner_width, narrow_width + low.first, &normed);
            let ddown = low.first..low.first + low.rank + low.beside;
            let ddown = self.operators.columns(&inner, inner_width, ddown);
            let (w, dims) = (self.window(block, low.down), low.down(r, hidden));
            let more = self.operators.product_input_gradient(&ddown, w, dims);
            self.operators.add(&mut dx, &more);
        }
        if work.is_last() {
            take(&mut self.saved, work.of(work.output()));
        }
        self.owe(work, dheads, Some(inner));
        self.leave_gradient(work, Value::AttentionNormed(work.layer), dx);
    }

    /// The gradients of the weights of all products.
    pub(super) fn expand_weights(
        &mut self,
        work: Work,
        latent: LatentAttention,
        owed: Owed<O::Tensor>,
    ) {
        let (block, r) = (Block::Layer(work.layer), self.rows(work.piece));
        let hidden = self.config.hidden as usize;
        let (products, [narrow_width, heads_width]) = self.low_ranks(latent);
        let inner_width = 2 * narrow_width - latent.rope_dim as usize;
        let inner = owed.inner.expect("latent attention has two products");
        let x = self.take_input(work, owed.input);
        if latent.query_rank.is_none() {
            let dims = self.whole_queries(r);
            let dq = self.operators.columns(&owed.output, heads_width, 0..dims.n);
            let (operators, dw) = self.gradient(block, Role::Query);
            operators.product_weight_gradient(&dq, &x, dims, dw);
        }
        for low in products {
            let dup = low.heads..low.heads + low.width;
            let dup = self.operators.columns(&owed.output, heads_width, dup);
            let normed = narrow_width + low.first..narrow_width + low.first + low.rank;
            let normed = self.operators.columns(&inner, inner_width, normed);
            let (operators, dw) = self.gradient(block, low.up);
            operators.product_weight_gradient(&dup, &normed, low.up(r), dw);
            let ddown = low.first..low.first + low.rank + low.beside;
            let ddown = operators.columns(&inner, inner_width, ddown);
            let (operators, dw) = self.gradient(block, low.down);
            operators.product_weight_gradient(&ddown, &x, low.down(r, hidden), dw);
        }
    }
}
