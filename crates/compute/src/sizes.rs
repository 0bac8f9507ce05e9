//! A device whose tensors have a size and no contents: with it a stage goes through a program's list
//! as on any device, which says to the byte what that needs of memory before anything is computed.

use std::ops::Range;
use std::rc::Rc;

use crate::operators::{
    AdamW, AttentionDims, Live, Operators, ProductDims, Rotation, ScoreDims, Sight, Window,
    WindowMut,
};
use crate::stage::Precision;
use crate::tensor::{Pool, Storage, Tensor};

/// Room for elements that are nowhere.
#[derive(Debug, Default)]
pub struct Length(usize);

impl Storage for Length {
    fn new(elements: usize) -> Self {
        Self(elements)
    }

    fn elements(&self) -> usize {
        self.0
    }

    fn copy_from(&mut self, _: &Self) {}
}

/// Counts what operators make and free on [`Cpu`](crate::Cpu).
#[derive(Debug, Clone)]
pub struct Sizes {
    pool: Rc<Pool<Length>>,
    precision: Precision,
}

type Size = Tensor<Length>;

impl Sizes {
    /// As a device that rounds to `precision`.
    #[must_use]
    pub fn new(precision: Precision) -> Self {
        Self { pool: Rc::default(), precision }
    }

    fn made(&self, elements: usize) -> Size {
        Tensor::new(self.pool.take(elements), &self.pool)
    }
}

/// A tensor that is written is its own, as everywhere.
fn write(tensor: &mut Size) {
    tensor.storage_mut();
}

impl Operators for Sizes {
    type Tensor = Size;

    fn live(&self) -> Option<Live> {
        Some(self.pool.live())
    }

    fn set_under_way(&self, elements: usize) {
        self.pool.set_under_way(elements);
    }

    fn has_contents(&self) -> bool {
        false
    }

    fn zeros(&self, elements: usize) -> Size {
        self.made(elements)
    }

    fn upload(&self, values: Vec<f32>) -> Size {
        self.made(values.len())
    }

    /// Zeros that are never touched cost no memory.
    fn download(&self, tensor: Size) -> Vec<f32> {
        vec![0.0; tensor.into_storage().0]
    }

    fn read(&self, _: &Size, _: &mut [f32]) {}

    fn host_buffer(&self, elements: usize) -> Vec<f32> {
        vec![0.0; elements]
    }

    fn recycle(&self, _: Vec<f32>) {}

    fn slice(&self, _: &Size, range: Range<usize>) -> Size {
        self.made(range.len())
    }

    fn elements(&self, tensor: &Size) -> usize {
        tensor.elements()
    }

    fn columns(&self, tensor: &Size, width: usize, range: Range<usize>) -> Size {
        self.made(tensor.elements() / width * range.len())
    }

    fn set_columns(&self, into: &mut Size, _: usize, _: usize, _: &Size) {
        write(into);
    }

    fn cast(&self, tensor: &Size) -> Size {
        let mut cast = tensor.clone();
        if self.precision == Precision::Bf16 {
            write(&mut cast);
        }
        cast
    }

    fn product(&self, _: &Size, _: Window<'_, Size>, dims: ProductDims) -> Size {
        self.made(dims.r * dims.n)
    }

    fn product_input_gradient(&self, _: &Size, _: Window<'_, Size>, dims: ProductDims) -> Size {
        self.made(dims.r * dims.k)
    }

    fn product_weight_gradient(&self, _: &Size, _: &Size, _: ProductDims, dw: WindowMut<'_, Size>) {
        write(dw.flat);
    }

    fn grouped_product(
        &self,
        x: &Size,
        w: Window<'_, Size>,
        dims: ProductDims,
        _: &[usize],
    ) -> Size {
        self.product(x, w, dims)
    }

    fn grouped_product_input_gradient(
        &self,
        dy: &Size,
        w: Window<'_, Size>,
        dims: ProductDims,
        _: &[usize],
    ) -> Size {
        self.product_input_gradient(dy, w, dims)
    }

    fn grouped_product_weight_gradient(
        &self,
        dy: &Size,
        x: &Size,
        dims: ProductDims,
        _: &[usize],
        dw: WindowMut<'_, Size>,
    ) {
        self.product_weight_gradient(dy, x, dims, dw);
    }

    fn scale_rows(&self, x: &Size, _: &Size, _: usize) -> Size {
        self.made(x.elements())
    }

    fn row_dots(&self, a: &Size, _: &Size, width: usize) -> Size {
        self.made(a.elements() / width)
    }

    fn rms_norm(&self, x: &Size, _: Window<'_, Size>, width: usize, _: f32) -> (Size, Size) {
        let inverse = self.made(x.elements() / width);
        (self.made(x.elements()), inverse)
    }

    fn rms_norm_backward(
        &self,
        _: &Size,
        _: (&Size, &Size),
        _: Window<'_, Size>,
        _: usize,
        dx: &mut Size,
        dscale: WindowMut<'_, Size>,
    ) {
        write(dx);
        write(dscale.flat);
    }

    fn rotary(&self, qkv: &mut Size, _: Rotation<'_, Size>, _: &AttentionDims, _: bool) {
        write(qkv);
    }

    fn attention(&self, _: &Size, _: Sight<'_, Size>, dims: &AttentionDims) -> (Size, Size) {
        let queries = dims.sequences * dims.length * dims.heads;
        let log_sums = self.made(queries);
        (self.made(queries * dims.value_dim), log_sums)
    }

    fn attention_join(
        &self,
        (y, log_sums): (&mut Size, &mut Size),
        _: (&Size, &Size),
        _: &AttentionDims,
    ) {
        write(y);
        write(log_sums);
    }

    fn attention_backward(
        &self,
        _: &Size,
        qkv: &Size,
        _: (&Size, &Size),
        sight: Sight<'_, Size>,
        _: &AttentionDims,
    ) -> (Size, Option<Size>) {
        let apart = sight.keys.map(|keys| self.made(keys.elements()));
        (self.made(qkv.elements()), apart)
    }

    fn swiglu(&self, gate_up: &Size, _: usize) -> Size {
        self.made(gate_up.elements() / 2)
    }

    fn swiglu_backward(&self, _: &Size, gate_up: &Size, _: usize) -> Size {
        self.made(gate_up.elements())
    }

    fn embedding(&self, words: &[u32], _: Window<'_, Size>, width: usize) -> Size {
        self.made(words.len() * width)
    }

    fn embedding_backward(&self, _: &Size, _: &[u32], _: usize, dtable: WindowMut<'_, Size>) {
        write(dtable.flat);
    }

    fn cross_entropy(&self, logits: &mut Size, _: &[u32], _: usize, _: f32) -> f64 {
        write(logits);
        0.0
    }

    fn log_sums(&self, _: &Size, targets: &[u32], _: ScoreDims) -> Size {
        self.made(3 * targets.len())
    }

    fn cross_entropy_of_part(
        &self,
        logits: &mut Size,
        _: &[u32],
        _: ScoreDims,
        _: &Size,
        _: f32,
    ) -> f64 {
        write(logits);
        0.0
    }

    fn add(&self, into: &mut Size, _: &Size) {
        write(into);
    }

    fn accumulate(&self, into: &mut Size, _: &Size) {
        write(into);
    }

    fn balance(&self, biases: &mut Size, _: Window<'_, Size>, _: Range<usize>, _: f32, _: f32) {
        write(biases);
    }

    fn blend(&self, into: &mut Size, _: f32, _: &Size, _: f32) {
        write(into);
    }

    fn square_sum(&self, _: &Size, _: Range<usize>) -> f64 {
        0.0
    }

    fn adamw(&self, _: &AdamW, state: [&mut Size; 3], _: Window<'_, Size>, _: Range<usize>) {
        state.into_iter().for_each(write);
    }
}
