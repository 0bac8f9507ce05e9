//! The CPU device: products by the `gemm` crate, our own fused loops around them.
//!
//! Lower precision is emulated: what an operator writes is rounded to bf16 and kept in fp32, which
//! gives bf16's numbers with fp32 accumulation but neither its speed nor its memory.

mod attention;
mod kernels;
mod product;

use std::ops::Range;
use std::rc::Rc;

use crate::operators::{
    AdamW, AttentionDims, ELSEWHERE, Live, Operators, ProductDims, Rotation, ScoreDims, Sight,
    Window, WindowMut,
};
use crate::stage::Precision;
use crate::tensor::{self, Pool};

use self::product::{Matrix, MatrixMut, multiply};

/// A flat tensor in this process's memory.
pub type Tensor = tensor::Tensor<Vec<f32>>;

/// Operators on the CPU, with `threads` threads for products.
#[derive(Debug, Clone)]
pub struct Cpu {
    pool: Rc<Pool<Vec<f32>>>,
    threads: usize,
    precision: Precision,
}

impl Cpu {
    /// A device of `threads` threads that rounds to `precision`.
    #[must_use]
    pub fn new(threads: usize, precision: Precision) -> Self {
        Self { pool: Rc::default(), threads, precision }
    }

    /// A tensor of unspecified contents.
    fn uninitialised(&self, elements: usize) -> Tensor {
        Tensor::new(self.pool.take(elements), &self.pool)
    }

    fn round(&self, values: &mut [f32]) {
        if self.precision == Precision::Bf16 {
            kernels::round_to_bf16(values);
        }
    }

    /// A tensor that `write` fills and the precision rounds.
    fn written(&self, elements: usize, write: impl FnOnce(&mut [f32])) -> Tensor {
        let mut tensor = self.uninitialised(elements);
        let values = tensor.values_mut();
        write(values);
        self.round(values);
        tensor
    }
}

fn at<'a>(window: &Window<'a, Tensor>, elements: usize) -> &'a [f32] {
    &window.flat.values()[window.start..window.start + elements]
}

fn at_mut(window: WindowMut<'_, Tensor>, elements: usize) -> &mut [f32] {
    &mut window.flat.values_mut()[window.start..window.start + elements]
}

/// Where each group's rows are, one group after the other.
fn ranges(rows: &[usize]) -> impl Iterator<Item = Range<usize>> {
    rows.iter().scan(0, |next, rows| {
        *next += rows;
        Some(*next - rows..*next)
    })
}

impl Operators for Cpu {
    type Tensor = Tensor;

    fn live(&self) -> Option<Live> {
        Some(self.pool.live())
    }

    fn forget_peak(&self) {
        self.pool.forget_peak();
    }

    fn set_under_way(&self, elements: usize) {
        self.pool.set_under_way(elements);
    }

    fn zeros(&self, elements: usize) -> Tensor {
        self.written(elements, |values| values.fill(0.0))
    }

    fn upload(&self, values: Vec<f32>) -> Tensor {
        Tensor::new(values, &self.pool)
    }

    fn download(&self, tensor: Tensor) -> Vec<f32> {
        tensor.into_storage()
    }

    fn read(&self, tensor: &Tensor, into: &mut [f32]) {
        into.copy_from_slice(tensor.values());
    }

    fn show<R>(&self, tensor: &Tensor, range: Range<usize>, to: impl FnOnce(&[f32]) -> R) -> R {
        to(&tensor.values()[range])
    }

    fn host_buffer(&self, elements: usize) -> Vec<f32> {
        self.pool.take(elements)
    }

    fn recycle(&self, buffer: Vec<f32>) {
        self.pool.give(buffer);
    }

    fn slice(&self, tensor: &Tensor, range: Range<usize>) -> Tensor {
        let source = &tensor.values()[range];
        let mut slice = self.uninitialised(source.len());
        slice.values_mut().copy_from_slice(source);
        slice
    }

    fn elements(&self, tensor: &Tensor) -> usize {
        tensor.values().len()
    }

    fn columns(&self, tensor: &Tensor, width: usize, range: Range<usize>) -> Tensor {
        let rows = tensor.values().chunks_exact(width);
        let mut columns = self.uninitialised(rows.len() * range.len());
        for (row, into) in rows.zip(columns.values_mut().chunks_exact_mut(range.len())) {
            into.copy_from_slice(&row[range.clone()]);
        }
        columns
    }

    fn set_columns(&self, into: &mut Tensor, width: usize, first: usize, columns: &Tensor) {
        let rows = into.values_mut().chunks_exact_mut(width);
        let narrow = columns.values().len() / rows.len();
        for (row, columns) in rows.zip(columns.values().chunks_exact(narrow)) {
            row[first..first + narrow].copy_from_slice(columns);
        }
    }

    fn cast(&self, tensor: &Tensor) -> Tensor {
        let mut cast = tensor.clone();
        if self.precision == Precision::Bf16 {
            self.round(cast.values_mut());
        }
        cast
    }

    fn product(&self, x: &Tensor, w: Window<'_, Tensor>, dims: ProductDims) -> Tensor {
        let ProductDims { r, k, n } = dims;
        let w = Matrix::rows(at(&w, n * k), n, k).transposed();
        self.written(r * n, |y| {
            multiply(
                Matrix::rows(x.values(), r, k),
                w,
                1.0,
                MatrixMut::rows(y, r, n),
                false,
                self.threads,
            );
        })
    }

    fn product_input_gradient(
        &self,
        dy: &Tensor,
        w: Window<'_, Tensor>,
        dims: ProductDims,
    ) -> Tensor {
        let ProductDims { r, k, n } = dims;
        let w = Matrix::rows(at(&w, n * k), n, k);
        self.written(r * k, |dx| {
            multiply(
                Matrix::rows(dy.values(), r, n),
                w,
                1.0,
                MatrixMut::rows(dx, r, k),
                false,
                self.threads,
            );
        })
    }

    fn product_weight_gradient(
        &self,
        dy: &Tensor,
        x: &Tensor,
        dims: ProductDims,
        dw: WindowMut<'_, Tensor>,
    ) {
        let ProductDims { r, k, n } = dims;
        let dy = Matrix::rows(dy.values(), r, n).transposed();
        let accumulate = !dw.fresh;
        let dw = MatrixMut::rows(at_mut(dw, n * k), n, k);
        multiply(dy, Matrix::rows(x.values(), r, k), 1.0, dw, accumulate, self.threads);
    }

    fn grouped_product(
        &self,
        x: &Tensor,
        w: Window<'_, Tensor>,
        dims: ProductDims,
        rows: &[usize],
    ) -> Tensor {
        let ProductDims { r, k, n } = dims;
        let (x, w) = (x.values(), at(&w, rows.len() * n * k));
        self.written(r * n, |y| {
            for (group, range) in ranges(rows).enumerate() {
                let x = Matrix::rows(&x[range.start * k..range.end * k], range.len(), k);
                let w = Matrix::rows(&w[group * n * k..], n, k).transposed();
                let y = &mut y[range.start * n..range.end * n];
                multiply(x, w, 1.0, MatrixMut::rows(y, range.len(), n), false, self.threads);
            }
        })
    }

    fn grouped_product_input_gradient(
        &self,
        dy: &Tensor,
        w: Window<'_, Tensor>,
        dims: ProductDims,
        rows: &[usize],
    ) -> Tensor {
        let ProductDims { r, k, n } = dims;
        let (dy, w) = (dy.values(), at(&w, rows.len() * n * k));
        self.written(r * k, |dx| {
            for (group, range) in ranges(rows).enumerate() {
                let dy = Matrix::rows(&dy[range.start * n..range.end * n], range.len(), n);
                let w = Matrix::rows(&w[group * n * k..], n, k);
                let dx = &mut dx[range.start * k..range.end * k];
                multiply(dy, w, 1.0, MatrixMut::rows(dx, range.len(), k), false, self.threads);
            }
        })
    }

    fn grouped_product_weight_gradient(
        &self,
        dy: &Tensor,
        x: &Tensor,
        dims: ProductDims,
        rows: &[usize],
        dw: WindowMut<'_, Tensor>,
    ) {
        let ProductDims { k, n, .. } = dims;
        let (dy, x, accumulate) = (dy.values(), x.values(), !dw.fresh);
        let dw = at_mut(dw, rows.len() * n * k).chunks_exact_mut(n * k);
        for (dw, range) in dw.zip(ranges(rows)) {
            if range.is_empty() {
                // The product of nothing leaves what is there.
                if !accumulate {
                    dw.fill(0.0);
                }
                continue;
            }
            let dy = Matrix::rows(&dy[range.start * n..range.end * n], range.len(), n).transposed();
            let x = Matrix::rows(&x[range.start * k..range.end * k], range.len(), k);
            multiply(dy, x, 1.0, MatrixMut::rows(dw, n, k), accumulate, self.threads);
        }
    }

    fn scale_rows(&self, x: &Tensor, factors: &Tensor, width: usize) -> Tensor {
        let rows = x.values().chunks_exact(width).zip(factors.values());
        self.written(x.values().len(), |y| {
            for ((x, factor), y) in rows.zip(y.chunks_exact_mut(width)) {
                y.iter_mut().zip(x).for_each(|(y, x)| *y = factor * x);
            }
        })
    }

    fn row_dots(&self, a: &Tensor, b: &Tensor, width: usize) -> Tensor {
        let rows = a.values().chunks_exact(width).zip(b.values().chunks_exact(width));
        let mut dots = self.uninitialised(rows.len());
        for ((a, b), dot) in rows.zip(dots.values_mut()) {
            *dot = kernels::dot(a, b);
        }
        dots
    }

    fn rms_norm(
        &self,
        x: &Tensor,
        scale: Window<'_, Tensor>,
        width: usize,
        epsilon: f32,
    ) -> (Tensor, Tensor) {
        let x = x.values();
        let mut inverse = self.uninitialised(x.len() / width);
        let y = self.written(x.len(), |y| {
            kernels::rms_norm(x, at(&scale, width), epsilon, y, inverse.values_mut());
        });
        (y, inverse)
    }

    fn rms_norm_backward(
        &self,
        dy: &Tensor,
        (x, inverse): (&Tensor, &Tensor),
        scale: Window<'_, Tensor>,
        width: usize,
        dx: &mut Tensor,
        dscale: WindowMut<'_, Tensor>,
    ) {
        let saved = (x.values(), inverse.values());
        let dx = dx.values_mut();
        let fresh = dscale.fresh;
        let dscale = at_mut(dscale, width);
        if fresh {
            dscale.fill(0.0);
        }
        kernels::rms_norm_backward(dy.values(), saved, at(&scale, width), dx, dscale);
        self.round(dx);
    }

    fn rotary(
        &self,
        qkv: &mut Tensor,
        rotation: Rotation<'_, Tensor>,
        dims: &AttentionDims,
        inverse: bool,
    ) {
        let values = qkv.values_mut();
        let (cos, sin) = (rotation.cos.values(), rotation.sin.values());
        let pairs = cos.len() / dims.length;
        for (row, qkv) in values.chunks_exact_mut(dims.qkv_width()).enumerate() {
            let angles = (row % dims.length) * pairs..(row % dims.length + 1) * pairs;
            let queries_and_keys = (dims.heads + dims.kv_heads) * dims.head_dim;
            let turn = (&cos[angles.clone()], &sin[angles], rotation.pairing);
            kernels::rotate(&mut qkv[..queries_and_keys], dims.head_dim, turn, inverse);
        }
        self.round(values);
    }

    fn attention(
        &self,
        qkv: &Tensor,
        sight: Sight<'_, Tensor>,
        dims: &AttentionDims,
    ) -> (Tensor, Tensor) {
        let queries = dims.sequences * dims.length * dims.heads;
        let mut log_sums = self.uninitialised(queries);
        let y = self.written(queries * dims.value_dim, |y| {
            attention::forward(qkv.values(), sight, dims, y, log_sums.values_mut());
        });
        (y, log_sums)
    }

    fn attention_join(
        &self,
        (y, log_sums): (&mut Tensor, &mut Tensor),
        (other, other_sums): (&Tensor, &Tensor),
        dims: &AttentionDims,
    ) {
        let found = (y.values_mut(), log_sums.values_mut());
        attention::join(found, (other.values(), other_sums.values()), dims);
        self.round(y.values_mut());
    }

    fn attention_backward(
        &self,
        dy: &Tensor,
        qkv: &Tensor,
        (y, log_sums): (&Tensor, &Tensor),
        sight: Sight<'_, Tensor>,
        dims: &AttentionDims,
    ) -> (Tensor, Option<Tensor>) {
        let saved = (y.values(), log_sums.values());
        let mut apart = sight.keys.map(|keys| self.uninitialised(keys.values().len()));
        let dqkv = self.written(qkv.values().len(), |dqkv| {
            let apart = apart.as_mut().map(Tensor::values_mut);
            if apart.is_some() {
                dqkv.fill(0.0);
            }
            attention::backward(dy.values(), qkv.values(), saved, sight, dims, (dqkv, apart));
        });
        if let Some(apart) = &mut apart {
            self.round(apart.values_mut());
        }
        (dqkv, apart)
    }

    fn swiglu(&self, gate_up: &Tensor, width: usize) -> Tensor {
        let gate_up = gate_up.values();
        self.written(gate_up.len() / 2, |y| kernels::swiglu(gate_up, width, y))
    }

    fn swiglu_backward(&self, dy: &Tensor, gate_up: &Tensor, width: usize) -> Tensor {
        let gate_up = gate_up.values();
        self.written(gate_up.len(), |dgate_up| {
            kernels::swiglu_backward(dy.values(), gate_up, width, dgate_up);
        })
    }

    fn embedding(&self, words: &[u32], table: Window<'_, Tensor>, width: usize) -> Tensor {
        self.written(words.len() * width, |y| {
            for (word, row) in words.iter().zip(y.chunks_exact_mut(width)) {
                if *word == ELSEWHERE {
                    row.fill(0.0);
                    continue;
                }
                let start = table.start + *word as usize * width;
                row.copy_from_slice(&table.flat.values()[start..start + width]);
            }
        })
    }

    fn embedding_backward(
        &self,
        dy: &Tensor,
        words: &[u32],
        width: usize,
        dtable: WindowMut<'_, Tensor>,
    ) {
        let table = &mut dtable.flat.values_mut()[dtable.start..];
        let rows = words.iter().zip(dy.values().chunks_exact(width));
        for (word, row) in rows.filter(|(word, _)| **word != ELSEWHERE) {
            let start = *word as usize * width;
            kernels::add(&mut table[start..start + width], row);
        }
    }

    fn cross_entropy(
        &self,
        logits: &mut Tensor,
        targets: &[u32],
        width: usize,
        gradient_scale: f32,
    ) -> f64 {
        let rows = logits.values_mut().chunks_exact_mut(width);
        let losses = rows
            .zip(targets)
            .map(|(row, target)| kernels::cross_entropy(row, *target as usize, gradient_scale));
        let loss = losses.sum();
        self.round(logits.values_mut());
        loss
    }

    fn log_sums(&self, logits: &Tensor, targets: &[u32], dims: ScoreDims) -> Tensor {
        let mut sums = self.uninitialised(3 * targets.len());
        let rows = logits.values().chunks_exact(dims.width).zip(targets);
        for ((row, target), sums) in rows.zip(sums.values_mut().chunks_exact_mut(3)) {
            let score = if *target == ELSEWHERE { 0.0 } else { row[*target as usize] };
            let (max, sum) = kernels::log_sum(&row[..dims.words]);
            sums.copy_from_slice(&[max, sum, score]);
        }
        sums
    }

    fn cross_entropy_of_part(
        &self,
        logits: &mut Tensor,
        targets: &[u32],
        dims: ScoreDims,
        log_sums: &Tensor,
        gradient_scale: f32,
    ) -> f64 {
        let parts = log_sums.values();
        let mut loss = 0.0;
        let rows = logits.values_mut().chunks_exact_mut(dims.width).zip(targets);
        for (index, (row, target)) in rows.enumerate() {
            let of_row = parts.chunks_exact(3 * targets.len()).map(|part| &part[3 * index..]);
            let (max, sum, score) = kernels::join_log_sums(of_row);
            let (row, padding) = row.split_at_mut(dims.words);
            padding.fill(0.0);
            kernels::softmax_times(row, max, gradient_scale / sum);
            if *target != ELSEWHERE {
                row[*target as usize] -= gradient_scale;
            }
            loss += f64::from(max) + f64::from(sum).ln() - f64::from(score);
        }
        self.round(logits.values_mut());
        loss
    }

    fn add(&self, into: &mut Tensor, other: &Tensor) {
        let values = into.values_mut();
        kernels::add(values, other.values());
        self.round(values);
    }

    fn accumulate(&self, into: &mut Tensor, other: &Tensor) {
        kernels::add(into.values_mut(), other.values());
    }

    fn blend(&self, into: &mut Tensor, kept: f32, other: &Tensor, factor: f32) {
        for (into, other) in into.values_mut().iter_mut().zip(other.values()) {
            *into = *into * kept + other * factor;
        }
    }

    fn balance(
        &self,
        biases: &mut Tensor,
        loads: Window<'_, Tensor>,
        range: Range<usize>,
        mean: f32,
        rate: f32,
    ) {
        let loads = at(&loads, range.len());
        for (bias, load) in biases.values_mut()[range].iter_mut().zip(loads) {
            if *load != mean {
                *bias += rate * (mean - load).signum();
            }
        }
    }

    fn square_sum(&self, tensor: &Tensor, range: Range<usize>) -> f64 {
        kernels::square_sum(&tensor.values()[range])
    }

    fn adamw(
        &self,
        settings: &AdamW,
        [parameters, mean, square]: [&mut Tensor; 3],
        gradient: Window<'_, Tensor>,
        range: Range<usize>,
    ) {
        kernels::adamw(
            settings,
            &mut parameters.values_mut()[range.clone()],
            [&mut mean.values_mut()[range.clone()], &mut square.values_mut()[range.clone()]],
            at(&gradient, range.len()),
        );
    }
}
