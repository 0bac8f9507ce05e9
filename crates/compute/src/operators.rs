//! The trait a device implements: some fifteen operators with explicit forward and backward.
//!
//! Tensors are flat and row-major; dimensions come with the call. Shapes are written with
//! `r` rows (tokens), `k` inner and `n` outer width. Sizes that do not fit are a bug of the
//! caller and panic.

use std::ops::Range;

use units::Bytes;

/// A matrix or vector inside a block's flat buffer.
#[derive(Debug, Clone, Copy)]
pub struct Window<'a, T> {
    /// The flat buffer.
    pub flat: &'a T,
    /// First element.
    pub start: usize,
}

/// See [`Window`]; what is written is added to what is there, unless the window is fresh.
#[derive(Debug)]
pub struct WindowMut<'a, T> {
    /// The flat buffer.
    pub flat: &'a mut T,
    /// First element.
    pub start: usize,
    /// What is there is unspecified and is overwritten: saves clearing a gradient before its first
    /// microbatch. [`Operators::embedding_backward`], which leaves most rows alone, takes no fresh
    /// window.
    pub fresh: bool,
}

/// A linear layer `[r, k] -> [r, n]` with weights `[n, k]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProductDims {
    /// Tokens.
    pub r: usize,
    /// Width of the input.
    pub k: usize,
    /// Width of the output.
    pub n: usize,
}

/// Grouped-query attention of the queries in `qkv` of `[sequences * length, (heads + kv_heads) *
/// head_dim + kv_heads * value_dim]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionDims {
    /// Sequences.
    pub sequences: usize,
    /// Queries of each.
    pub length: usize,
    /// Keys of each: `length` where they stand beside the queries.
    pub keys: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head's queries and keys.
    pub head_dim: usize,
    /// Width of a head's values.
    pub value_dim: usize,
}

/// What the queries of an attention look at.
#[derive(Debug)]
pub struct Sight<'a, T> {
    /// Keys and values, `[sequences * keys, kv_heads * (head_dim + value_dim)]`; none where they stand beside
    /// the queries, in `qkv`.
    pub keys: Option<&'a T>,
    /// The keys of its sequence that each query may see, `[sequences * length]`.
    pub seen: &'a [Range<u32>],
}

impl<T> Clone for Sight<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Sight<'_, T> {}

impl AttentionDims {
    /// Width of a row of queries, keys and values.
    #[must_use]
    pub fn qkv_width(&self) -> usize {
        self.queries_width() + self.keys_width()
    }

    /// Width of a row of queries.
    #[must_use]
    pub fn queries_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of a row of keys and values that stand apart.
    #[must_use]
    pub fn keys_width(&self) -> usize {
        self.kv_heads * (self.head_dim + self.value_dim)
    }

    /// Width of a row of weighted values.
    #[must_use]
    pub fn output_width(&self) -> usize {
        self.heads * self.value_dim
    }

    /// Every query sees the keys beside it and before: what there is without other ranks and
    /// documents.
    #[must_use]
    pub fn causal(&self) -> Vec<Range<u32>> {
        (0..self.sequences).flat_map(|_| (1..=self.length as u32).map(|end| 0..end)).collect()
    }

    /// What products of queries and keys are multiplied by: `1 / sqrt(head_dim)`.
    #[must_use]
    pub fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}

/// The log-sum-exp of no scores at all: finite, as shaders may assume that all numbers are; its
/// exponential is zero all the same.
pub const UNSEEN: f32 = -1e30;

/// In place of a word or a target whose row of the vocabulary another rank holds.
pub const ELSEWHERE: u32 = u32::MAX;

/// A rank's part of the scores over the vocabulary, `[r, width]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScoreDims {
    /// Width of a row.
    pub width: usize,
    /// Its columns that are words; what is beyond them counts for nothing.
    pub words: usize,
}

/// Cosines and sines of every position and pair, `[length, pairs]` each. What is rotated are the
/// last components of a head, two to a pair: all of them, or those that latent attention keeps apart.
#[derive(Debug, Clone, Copy)]
pub struct Rotation<'a, T> {
    /// Cosines.
    pub cos: &'a T,
    /// Sines; negated for the inverse rotation.
    pub sin: &'a T,
    /// Which components are a pair.
    pub pairing: Pairing,
}

/// Which of the components that are rotated are a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairing {
    /// One of the first half with one of the second: Hugging Face's way for a Llama.
    Halves,
    /// Neighbours: `DeepSeek`'s way.
    Neighbours,
}

/// One `AdamW` update (Loshchilov & Hutter 2019, alg. 2), as `torch.optim.AdamW` computes it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub learning_rate: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Decoupled weight decay; 0 where it does not apply.
    pub weight_decay: f32,
    /// What the gradient is multiplied by first: the clipping factor.
    pub gradient_scale: f32,
    /// This update's number, from 1, for the bias corrections.
    pub update: u64,
}

impl AdamW {
    /// The learning rate over the bias correction of the first moment, and the root of the bias
    /// correction of the second; computed in f64, as torch does.
    #[must_use]
    pub fn bias_corrected(&self) -> (f32, f32) {
        let correction = |beta: f32| 1.0 - f64::from(beta).powf(self.update as f64);
        let rate = f64::from(self.learning_rate) / correction(self.beta1);
        (rate as f32, correction(self.beta2).sqrt() as f32)
    }

    /// What is left of a parameter after decay.
    #[must_use]
    pub fn kept(&self) -> f32 {
        1.0 - self.learning_rate * self.weight_decay
    }
}

/// Bytes in a device's tensors and in the host buffers that transfers move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Live {
    /// Now.
    pub now: Bytes,
    /// At the peak.
    pub most: Bytes,
}

/// The operators of a device. All arithmetic is fp32 unless the device was made for a lower
/// precision, in which case it rounds what it writes (reductions and optimizer state stay fp32).
pub trait Operators: Clone {
    /// A flat tensor on the device; cloning it is cheap and shares the contents until one side
    /// is written.
    type Tensor: Clone;

    /// What the device and its clones hold: an exact count, on devices that keep one.
    fn live(&self) -> Option<Live> {
        None
    }
    /// Has a device that counts find its peak anew from now on.
    fn forget_peak(&self) {}
    /// Tells a device that counts how many elements of host buffers are with transfers now.
    fn set_under_way(&self, _elements: usize) {}
    /// Whether tensors have contents. Where they do not, and are only counted, experts are taken to
    /// get even loads.
    fn has_contents(&self) -> bool {
        true
    }

    /// A tensor of zeros.
    fn zeros(&self, elements: usize) -> Self::Tensor;
    /// A tensor with these contents.
    fn upload(&self, values: Vec<f32>) -> Self::Tensor;
    /// The contents of a tensor that is no longer needed.
    fn download(&self, tensor: Self::Tensor) -> Vec<f32>;
    /// Copies the contents of a tensor, which stays.
    fn read(&self, tensor: &Self::Tensor, into: &mut [f32]);
    /// Shows part of a tensor, which stays.
    fn show<R>(
        &self,
        tensor: &Self::Tensor,
        range: Range<usize>,
        to: impl FnOnce(&[f32]) -> R,
    ) -> R {
        let copy = self.download(self.slice(tensor, range));
        let shown = to(&copy);
        self.recycle(copy);
        shown
    }
    /// A host buffer of unspecified contents, recycled when it can be.
    fn host_buffer(&self, elements: usize) -> Vec<f32>;
    /// Gives a host buffer back for recycling.
    fn recycle(&self, buffer: Vec<f32>);
    /// A copy of part of a tensor, bit for bit.
    fn slice(&self, tensor: &Self::Tensor, range: Range<usize>) -> Self::Tensor;
    /// How many elements a tensor has.
    fn elements(&self, tensor: &Self::Tensor) -> usize;
    /// A copy of some columns of rows of `width`, bit for bit.
    fn columns(&self, tensor: &Self::Tensor, width: usize, range: Range<usize>) -> Self::Tensor;
    /// Puts columns, as [`Operators::columns`] copied them, in place of those from `first` on.
    fn set_columns(
        &self,
        into: &mut Self::Tensor,
        width: usize,
        first: usize,
        columns: &Self::Tensor,
    );
    /// A copy rounded to the device's compute precision; the tensor itself when that is fp32.
    fn cast(&self, tensor: &Self::Tensor) -> Self::Tensor;

    /// `y[r, n] = x[r, k] w[n, k]^T`.
    fn product(
        &self,
        x: &Self::Tensor,
        w: Window<'_, Self::Tensor>,
        dims: ProductDims,
    ) -> Self::Tensor;
    /// `dx[r, k] = dy[r, n] w[n, k]`.
    fn product_input_gradient(
        &self,
        dy: &Self::Tensor,
        w: Window<'_, Self::Tensor>,
        dims: ProductDims,
    ) -> Self::Tensor;
    /// `dw[n, k] += dy[r, n]^T x[r, k]`.
    fn product_weight_gradient(
        &self,
        dy: &Self::Tensor,
        x: &Self::Tensor,
        dims: ProductDims,
        dw: WindowMut<'_, Self::Tensor>,
    );

    /// As [`Operators::product`], group by group: the next `rows[g]` rows of `x` with the `g`-th matrix
    /// `[n, k]` of `w`. `dims.r` is the sum of all rows.
    fn grouped_product(
        &self,
        x: &Self::Tensor,
        w: Window<'_, Self::Tensor>,
        dims: ProductDims,
        rows: &[usize],
    ) -> Self::Tensor;
    /// As [`Operators::product_input_gradient`], group by group.
    fn grouped_product_input_gradient(
        &self,
        dy: &Self::Tensor,
        w: Window<'_, Self::Tensor>,
        dims: ProductDims,
        rows: &[usize],
    ) -> Self::Tensor;
    /// As [`Operators::product_weight_gradient`], group by group.
    fn grouped_product_weight_gradient(
        &self,
        dy: &Self::Tensor,
        x: &Self::Tensor,
        dims: ProductDims,
        rows: &[usize],
        dw: WindowMut<'_, Self::Tensor>,
    );

    /// Rows of `width`, each times its own factor.
    fn scale_rows(&self, x: &Self::Tensor, factors: &Self::Tensor, width: usize) -> Self::Tensor;
    /// The product of each row of `a` with the same row of `b`, in fp32.
    fn row_dots(&self, a: &Self::Tensor, b: &Self::Tensor, width: usize) -> Self::Tensor;

    /// `y = x / rms(x) * scale` by rows of `width`; also the inverse root mean squares, `[r]`.
    fn rms_norm(
        &self,
        x: &Self::Tensor,
        scale: Window<'_, Self::Tensor>,
        width: usize,
        epsilon: f32,
    ) -> (Self::Tensor, Self::Tensor);
    /// Adds the gradient of `x` to `dx`, and that of the scale to `dscale`.
    fn rms_norm_backward(
        &self,
        dy: &Self::Tensor,
        saved: (&Self::Tensor, &Self::Tensor),
        scale: Window<'_, Self::Tensor>,
        width: usize,
        dx: &mut Self::Tensor,
        dscale: WindowMut<'_, Self::Tensor>,
    );

    /// Rotates queries and keys in place.
    fn rotary(
        &self,
        qkv: &mut Self::Tensor,
        rotation: Rotation<'_, Self::Tensor>,
        dims: &AttentionDims,
        inverse: bool,
    );
    /// Weighted values `[r, heads * value_dim]`, and the log-sum-exp of every query's scores,
    /// `[sequences, heads, length]`. Where a query sees no key, that is [`UNSEEN`] or less, and its
    /// weighted values are finite.
    fn attention(
        &self,
        qkv: &Self::Tensor,
        sight: Sight<'_, Self::Tensor>,
        dims: &AttentionDims,
    ) -> (Self::Tensor, Self::Tensor);
    /// Joins what attention to other keys has found to what it found before.
    fn attention_join(
        &self,
        found: (&mut Self::Tensor, &mut Self::Tensor),
        other: (&Self::Tensor, &Self::Tensor),
        dims: &AttentionDims,
    );
    /// Gradient of `qkv`, and of keys and values that stand apart, zero in `qkv` then. Scores are
    /// recomputed from the log-sum-exp of all keys, seen here or elsewhere.
    fn attention_backward(
        &self,
        dy: &Self::Tensor,
        qkv: &Self::Tensor,
        saved: (&Self::Tensor, &Self::Tensor),
        sight: Sight<'_, Self::Tensor>,
        dims: &AttentionDims,
    ) -> (Self::Tensor, Option<Self::Tensor>);

    /// `y[r, width] = silu(gate) * up` of `gate_up[r, 2 width]`.
    fn swiglu(&self, gate_up: &Self::Tensor, width: usize) -> Self::Tensor;
    /// Gradient of `gate_up`.
    fn swiglu_backward(
        &self,
        dy: &Self::Tensor,
        gate_up: &Self::Tensor,
        width: usize,
    ) -> Self::Tensor;

    /// Rows of `table` picked by `words`; zeros for a word that is [`ELSEWHERE`].
    fn embedding(
        &self,
        words: &[u32],
        table: Window<'_, Self::Tensor>,
        width: usize,
    ) -> Self::Tensor;
    /// Adds each row of `dy` to the row of `dtable` its word names, if it is here.
    fn embedding_backward(
        &self,
        dy: &Self::Tensor,
        words: &[u32],
        width: usize,
        dtable: WindowMut<'_, Self::Tensor>,
    );

    /// Sum over rows of the cross-entropy with `targets`, and in place of the logits its gradient
    /// times `gradient_scale`.
    fn cross_entropy(
        &self,
        logits: &mut Self::Tensor,
        targets: &[u32],
        width: usize,
        gradient_scale: f32,
    ) -> f64;

    /// Of each row of a part of the scores, `[r, 3]`: the maximum, the sum of exponentials less it,
    /// and the target's score or, where the target is [`ELSEWHERE`], zero.
    fn log_sums(&self, logits: &Self::Tensor, targets: &[u32], dims: ScoreDims) -> Self::Tensor;
    /// As [`Operators::cross_entropy`] where `logits` are a part of the scores; `log_sums` are those
    /// of every part, one after the other.
    fn cross_entropy_of_part(
        &self,
        logits: &mut Self::Tensor,
        targets: &[u32],
        dims: ScoreDims,
        log_sums: &Self::Tensor,
        gradient_scale: f32,
    ) -> f64;

    /// `into += other`, for values on their way.
    fn add(&self, into: &mut Self::Tensor, other: &Self::Tensor);
    /// `into += other` in fp32 whatever the precision, for sums of gradients.
    fn accumulate(&self, into: &mut Self::Tensor, other: &Self::Tensor);
    /// Moves the biases of part of a tensor by `rate`: down where the load is above `mean`, up where it
    /// is below (DeepSeek-V3, arXiv:2412.19437, section 2.1.2); `loads` begins with that part's.
    fn balance(
        &self,
        biases: &mut Self::Tensor,
        loads: Window<'_, Self::Tensor>,
        range: Range<usize>,
        mean: f32,
        rate: f32,
    );
    /// `into` times `kept` plus `other` times `factor`, in fp32 whatever the precision.
    fn blend(&self, into: &mut Self::Tensor, kept: f32, other: &Self::Tensor, factor: f32);
    /// Sum of squares of part of a tensor.
    fn square_sum(&self, tensor: &Self::Tensor, range: Range<usize>) -> f64;
    /// Updates part of the parameters and their two moments; `gradient` begins with that part's.
    fn adamw(
        &self,
        settings: &AdamW,
        state: [&mut Self::Tensor; 3],
        gradient: Window<'_, Self::Tensor>,
        range: Range<usize>,
    );
}
