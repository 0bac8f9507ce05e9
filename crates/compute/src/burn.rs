//! Any device that Burn has a backend for: the operators in terms of its tensors, in fp32 and
//! without its autodiff.

mod attention;

use std::ops::Range;

use burn_tensor::{Device, IndexingUpdateOp, Int, Tensor, TensorData, activation};

use crate::operators::{
    AdamW, AttentionDims, ELSEWHERE, Operators, Pairing, ProductDims, Rotation, ScoreDims, Sight,
    Window, WindowMut,
};

/// Operators on a device of Burn's.
#[derive(Debug, Clone)]
pub struct Burn {
    device: Device,
}

impl Burn {
    /// The CPU: slower than [`crate::Cpu`], and there to test on any machine what the GPUs run.
    #[must_use]
    pub fn flex() -> Self {
        Self { device: Device::flex() }
    }

    /// The NVIDIA GPU of this index.
    #[cfg(feature = "burn-cuda")]
    #[must_use]
    pub fn cuda(index: usize) -> Self {
        Self { device: Device::cuda(index) }
    }

    /// The AMD GPU of this index.
    #[cfg(feature = "burn-rocm")]
    #[must_use]
    pub fn rocm(index: usize) -> Self {
        Self { device: Device::rocm(index) }
    }

    /// The discrete GPU of this index, through Vulkan.
    #[cfg(feature = "burn-vulkan")]
    #[must_use]
    pub fn vulkan(index: usize) -> Self {
        Self { device: Device::vulkan(burn_tensor::DeviceKind::DiscreteGpu(index)) }
    }

    /// The GPU of an Apple machine.
    #[cfg(feature = "burn-metal")]
    #[must_use]
    pub fn metal() -> Self {
        Self { device: Device::metal(burn_tensor::DeviceKind::DefaultDevice) }
    }

    /// Rows of several groups in one tensor of so many elements.
    fn joined(&self, groups: Vec<Tensor<2>>, elements: usize) -> Tensor<1> {
        if groups.is_empty() { self.zeros(elements) } else { flat(Tensor::cat(groups, 0)) }
    }

    /// Words as indices; one that is elsewhere as the first, for [`Burn::here`] to hide.
    fn words(&self, words: &[u32]) -> Tensor<1, Int> {
        let index = |word: u32| if word == ELSEWHERE { 0 } else { i64::from(word) };
        let words: Vec<i64> = words.iter().copied().map(index).collect();
        let count = words.len();
        Tensor::from_data(TensorData::new(words, [count]), &self.device)
    }

    /// One for each word that is here, zero for one that is elsewhere, `[r, 1]`.
    fn here(&self, words: &[u32]) -> Tensor<2> {
        let here = words.iter().map(|word| if *word == ELSEWHERE { 0.0 } else { 1.0 });
        self.upload(here.collect()).reshape([words.len(), 1])
    }
}

/// The first `elements` of a window.
fn part(window: &Window<'_, Tensor<1>>, elements: usize) -> Tensor<1> {
    window.flat.clone().slice(window.start..window.start + elements)
}

/// Replaces the elements of a window, seen in `shape`, by `f` of them.
fn update<const D: usize>(
    window: WindowMut<'_, Tensor<1>>,
    shape: [usize; D],
    f: impl FnOnce(Tensor<D>) -> Tensor<D>,
) {
    let elements: usize = shape.iter().product();
    let range = window.start..window.start + elements;
    window.flat.inplace(|flat| {
        let before = flat.clone().slice(range.clone()).reshape(shape);
        let updated = f(if window.fresh { before.zeros_like() } else { before });
        flat.slice_assign(range, updated.reshape([elements]))
    });
}

/// A flat tensor as rows of `width`.
fn rows(flat: &Tensor<1>, width: usize) -> Tensor<2> {
    let elements = flat.dims()[0];
    flat.clone().reshape([elements / width, width])
}

/// The groups that have rows, and where these are.
fn filled(groups: &[usize]) -> impl Iterator<Item = (usize, Range<usize>)> {
    let ranges = groups.iter().scan(0, |next, rows| {
        *next += rows;
        Some(*next - rows..*next)
    });
    ranges.enumerate().filter(|(_, range)| !range.is_empty())
}

/// The first `rows * columns` of a window as a matrix.
fn matrix(window: &Window<'_, Tensor<1>>, rows: usize, columns: usize) -> Tensor<2> {
    part(window, rows * columns).reshape([rows, columns])
}

/// The elements of a tensor in order.
fn flat<const D: usize>(tensor: Tensor<D>) -> Tensor<1> {
    let elements = tensor.shape().num_elements();
    tensor.reshape([elements])
}

/// A tensor cut in two along `dim`, the first piece `first` long.
fn split<const D: usize>(tensor: Tensor<D>, dim: usize, first: usize) -> [Tensor<D>; 2] {
    let rest = tensor.dims()[dim] - first;
    [tensor.clone().narrow(dim, 0, first), tensor.narrow(dim, first, rest)]
}

/// Rows of a table that reach as far as `words` do: a window does not know its own end.
fn rows_named(words: &[u32]) -> usize {
    let here = words.iter().filter(|word| **word != ELSEWHERE);
    here.max().map_or(1, |word| *word as usize + 1)
}

/// Brings a tensor to the host.
///
/// # Panics
/// When the device fails: of memory, or altogether.
fn to_host(tensor: Tensor<1>) -> Vec<f32> {
    tensor.try_into_vec_as().unwrap_or_else(|error| panic!("the device failed: {error}"))
}

impl Operators for Burn {
    type Tensor = Tensor<1>;

    fn zeros(&self, elements: usize) -> Tensor<1> {
        Tensor::zeros([elements], &self.device)
    }

    fn upload(&self, values: Vec<f32>) -> Tensor<1> {
        let elements = values.len();
        Tensor::from_data(TensorData::new(values, [elements]), &self.device)
    }

    fn download(&self, tensor: Tensor<1>) -> Vec<f32> {
        to_host(tensor)
    }

    fn read(&self, tensor: &Tensor<1>, into: &mut [f32]) {
        into.copy_from_slice(&to_host(tensor.clone()));
    }

    fn host_buffer(&self, elements: usize) -> Vec<f32> {
        vec![0.0; elements]
    }

    fn recycle(&self, buffer: Vec<f32>) {
        drop(buffer);
    }

    fn slice(&self, tensor: &Tensor<1>, range: Range<usize>) -> Tensor<1> {
        tensor.clone().slice(range)
    }

    fn elements(&self, tensor: &Tensor<1>) -> usize {
        tensor.dims()[0]
    }

    fn columns(&self, tensor: &Tensor<1>, width: usize, range: Range<usize>) -> Tensor<1> {
        flat(rows(tensor, width).narrow(1, range.start, range.len()))
    }

    fn set_columns(&self, into: &mut Tensor<1>, width: usize, first: usize, columns: &Tensor<1>) {
        let count = into.dims()[0] / width;
        let columns = rows(columns, columns.dims()[0] / count);
        let last = first + columns.dims()[1];
        into.inplace(|into| {
            flat(rows(&into, width).slice_assign([0..count, first..last], columns))
        });
    }

    fn cast(&self, tensor: &Tensor<1>) -> Tensor<1> {
        tensor.clone()
    }

    fn product(&self, x: &Tensor<1>, w: Window<'_, Tensor<1>>, dims: ProductDims) -> Tensor<1> {
        let w = matrix(&w, dims.n, dims.k);
        flat(rows(x, dims.k).matmul(w.transpose()))
    }

    fn product_input_gradient(
        &self,
        dy: &Tensor<1>,
        w: Window<'_, Tensor<1>>,
        dims: ProductDims,
    ) -> Tensor<1> {
        flat(rows(dy, dims.n).matmul(matrix(&w, dims.n, dims.k)))
    }

    fn product_weight_gradient(
        &self,
        dy: &Tensor<1>,
        x: &Tensor<1>,
        dims: ProductDims,
        dw: WindowMut<'_, Tensor<1>>,
    ) {
        let added = rows(dy, dims.n).transpose().matmul(rows(x, dims.k));
        update(dw, [dims.n, dims.k], |dw| dw + added);
    }

    fn grouped_product(
        &self,
        x: &Tensor<1>,
        w: Window<'_, Tensor<1>>,
        dims: ProductDims,
        groups: &[usize],
    ) -> Tensor<1> {
        let ProductDims { r, k, n } = dims;
        let x = rows(x, k);
        let of_group = |(group, range): (usize, Range<usize>)| {
            let w = Window { start: w.start + group * n * k, ..w };
            x.clone().slice([range]).matmul(matrix(&w, n, k).transpose())
        };
        self.joined(filled(groups).map(of_group).collect(), r * n)
    }

    fn grouped_product_input_gradient(
        &self,
        dy: &Tensor<1>,
        w: Window<'_, Tensor<1>>,
        dims: ProductDims,
        groups: &[usize],
    ) -> Tensor<1> {
        let ProductDims { r, k, n } = dims;
        let dy = rows(dy, n);
        let of_group = |(group, range): (usize, Range<usize>)| {
            let w = Window { start: w.start + group * n * k, ..w };
            dy.clone().slice([range]).matmul(matrix(&w, n, k))
        };
        self.joined(filled(groups).map(of_group).collect(), r * k)
    }

    fn grouped_product_weight_gradient(
        &self,
        dy: &Tensor<1>,
        x: &Tensor<1>,
        dims: ProductDims,
        groups: &[usize],
        dw: WindowMut<'_, Tensor<1>>,
    ) {
        let ProductDims { k, n, .. } = dims;
        let (dy, x) = (rows(dy, n), rows(x, k));
        update(dw, [groups.len(), n, k], |mut dw| {
            for (group, range) in filled(groups) {
                let dy = dy.clone().slice([range.clone()]);
                let added = dy.transpose().matmul(x.clone().slice([range]));
                let before = dw.clone().slice([group..group + 1]);
                dw = dw.slice_assign([group..group + 1], before + added.reshape([1, n, k]));
            }
            dw
        });
    }

    fn scale_rows(&self, x: &Tensor<1>, factors: &Tensor<1>, width: usize) -> Tensor<1> {
        flat(rows(x, width) * rows(factors, 1))
    }

    fn row_dots(&self, a: &Tensor<1>, b: &Tensor<1>, width: usize) -> Tensor<1> {
        flat((rows(a, width) * rows(b, width)).sum_dim(1))
    }

    fn rms_norm(
        &self,
        x: &Tensor<1>,
        scale: Window<'_, Tensor<1>>,
        width: usize,
        epsilon: f32,
    ) -> (Tensor<1>, Tensor<1>) {
        let x = rows(x, width);
        let inverse = (x.clone().square().mean_dim(1) + epsilon).sqrt().recip();
        let y = x * inverse.clone() * matrix(&scale, 1, width);
        (flat(y), flat(inverse))
    }

    fn rms_norm_backward(
        &self,
        dy: &Tensor<1>,
        (x, inverse): (&Tensor<1>, &Tensor<1>),
        scale: Window<'_, Tensor<1>>,
        width: usize,
        dx: &mut Tensor<1>,
        dscale: WindowMut<'_, Tensor<1>>,
    ) {
        let (dy, inverse) = (rows(dy, width), rows(inverse, 1));
        let normed = rows(x, width) * inverse.clone();
        let pulled = dy.clone() * matrix(&scale, 1, width);
        let along = (pulled.clone() * normed.clone()).mean_dim(1);
        let added = (pulled - normed.clone() * along) * inverse;
        dx.inplace(|dx| dx + flat(added));
        update(dscale, [1, width], |dscale| dscale + (dy * normed).sum_dim(0));
    }

    fn rotary(
        &self,
        qkv: &mut Tensor<1>,
        rotation: Rotation<'_, Tensor<1>>,
        dims: &AttentionDims,
        inverse: bool,
    ) {
        let AttentionDims { sequences, length, heads, kv_heads, head_dim, .. } = *dims;
        let pairs = rotation.cos.dims()[0] / length;
        // The two of a pair lie along the last dimension but one, or along the last.
        let (along, shape) = match rotation.pairing {
            Pairing::Halves => (3, [sequences, length, heads + kv_heads, 2, pairs]),
            Pairing::Neighbours => (4, [sequences, length, heads + kv_heads, pairs, 2]),
        };
        let angles = match rotation.pairing {
            Pairing::Halves => [1, length, 1, 1, pairs],
            Pairing::Neighbours => [1, length, 1, pairs, 1],
        };
        let cos = rotation.cos.clone().reshape(angles);
        let sin = rotation.sin.clone().reshape(angles);
        let sin = if inverse { -sin } else { sin };
        qkv.inplace(|qkv| {
            let rows = qkv.reshape([sequences, length, dims.qkv_width()]);
            let [heads_of, values] = split(rows, 2, (heads + kv_heads) * head_dim);
            let heads_of = heads_of.reshape([sequences, length, heads + kv_heads, head_dim]);
            let still = head_dim - 2 * pairs;
            let turning = heads_of.clone().narrow(3, still, 2 * pairs);
            let [a, b] = split(turning.reshape(shape), along, 1);
            let turned_a = a.clone() * cos.clone() - b.clone() * sin.clone();
            let turned_b = b * cos + a * sin;
            let turned = Tensor::cat(vec![turned_a, turned_b], along);
            let turned = turned.reshape([sequences, length, heads + kv_heads, 2 * pairs]);
            let turned = heads_of.slice_assign(
                [0..sequences, 0..length, 0..heads + kv_heads, still..head_dim],
                turned,
            );
            let turned = turned.reshape([sequences, length, (heads + kv_heads) * head_dim]);
            flat(Tensor::cat(vec![turned, values], 2))
        });
    }

    fn attention(
        &self,
        qkv: &Tensor<1>,
        sight: Sight<'_, Tensor<1>>,
        dims: &AttentionDims,
    ) -> (Tensor<1>, Tensor<1>) {
        attention::forward(qkv, sight, dims)
    }

    fn attention_join(
        &self,
        found: (&mut Tensor<1>, &mut Tensor<1>),
        other: (&Tensor<1>, &Tensor<1>),
        dims: &AttentionDims,
    ) {
        attention::join(found, other, dims);
    }

    fn attention_backward(
        &self,
        dy: &Tensor<1>,
        qkv: &Tensor<1>,
        saved: (&Tensor<1>, &Tensor<1>),
        sight: Sight<'_, Tensor<1>>,
        dims: &AttentionDims,
    ) -> (Tensor<1>, Option<Tensor<1>>) {
        attention::backward(dy, qkv, saved, sight, dims)
    }

    fn swiglu(&self, gate_up: &Tensor<1>, width: usize) -> Tensor<1> {
        let [gate, up] = split(rows(gate_up, 2 * width), 1, width);
        flat(activation::silu(gate) * up)
    }

    fn swiglu_backward(&self, dy: &Tensor<1>, gate_up: &Tensor<1>, width: usize) -> Tensor<1> {
        let dy = rows(dy, width);
        let [gate, up] = split(rows(gate_up, 2 * width), 1, width);
        let sigmoid = activation::sigmoid(gate.clone());
        let slope = (gate.clone() * (1.0 - sigmoid.clone()) + 1.0) * sigmoid.clone();
        let dup = dy.clone() * gate * sigmoid;
        flat(Tensor::cat(vec![dy * up * slope, dup], 1))
    }

    fn embedding(&self, words: &[u32], table: Window<'_, Tensor<1>>, width: usize) -> Tensor<1> {
        let table = matrix(&table, rows_named(words), width);
        flat(table.select(0, self.words(words)) * self.here(words))
    }

    fn embedding_backward(
        &self,
        dy: &Tensor<1>,
        words: &[u32],
        width: usize,
        dtable: WindowMut<'_, Tensor<1>>,
    ) {
        let (named, dy) = (self.words(words), rows(dy, width) * self.here(words));
        update(dtable, [rows_named(words), width], |dtable| {
            dtable.select_assign(0, named, dy, IndexingUpdateOp::Add)
        });
    }

    fn cross_entropy(
        &self,
        logits: &mut Tensor<1>,
        targets: &[u32],
        width: usize,
        gradient_scale: f32,
    ) -> f64 {
        let targets = self.words(targets).reshape([targets.len(), 1]);
        let shifted = {
            let logits = rows(logits, width);
            logits.clone() - logits.max_dim(1)
        };
        let weights = shifted.clone().exp();
        let sums = weights.clone().sum_dim(1);
        let losses = sums.clone().log() - shifted.gather(1, targets.clone());
        let at_targets = Tensor::full(targets.dims(), -gradient_scale, &self.device);
        let gradient = weights * sums.recip() * gradient_scale;
        *logits = flat(gradient.scatter(1, targets, at_targets, IndexingUpdateOp::Add));
        to_host(flat(losses)).into_iter().map(f64::from).sum()
    }

    fn log_sums(&self, logits: &Tensor<1>, targets: &[u32], dims: ScoreDims) -> Tensor<1> {
        let logits = rows(logits, dims.width);
        let named = self.words(targets).reshape([targets.len(), 1]);
        let scores = logits.clone().gather(1, named) * self.here(targets);
        let logits = logits.narrow(1, 0, dims.words);
        let max = logits.clone().max_dim(1);
        let sums = (logits - max.clone()).exp().sum_dim(1);
        flat(Tensor::cat(vec![max, sums, scores], 1))
    }

    fn cross_entropy_of_part(
        &self,
        logits: &mut Tensor<1>,
        targets: &[u32],
        dims: ScoreDims,
        log_sums: &Tensor<1>,
        gradient_scale: f32,
    ) -> f64 {
        let ScoreDims { width, words } = dims;
        let parts = log_sums.dims()[0] / (3 * targets.len());
        let of_parts = log_sums.clone().reshape([parts, targets.len(), 3]);
        let [maxima, rest] = split(of_parts, 2, 1);
        let [sums, scores] = split(rest, 2, 1);
        let max = maxima.clone().max_dim(0);
        let sum = (sums * (maxima - max.clone()).exp()).sum_dim(0).reshape([targets.len(), 1]);
        let max = max.reshape([targets.len(), 1]);
        let score = scores.sum_dim(0).reshape([targets.len(), 1]);
        let losses = max.clone() + sum.clone().log() - score;
        let logits_of = rows(logits, width);
        let seen = logits_of.clone().narrow(1, 0, words);
        let gradient = (seen - max).exp() * sum.recip() * gradient_scale;
        // Columns beyond the words are padding, which has no gradient.
        let gradient = logits_of.zeros_like().slice_assign([0..targets.len(), 0..words], gradient);
        let named = self.words(targets).reshape([targets.len(), 1]);
        let at_targets = self.here(targets) * -gradient_scale;
        *logits = flat(gradient.scatter(1, named, at_targets, IndexingUpdateOp::Add));
        to_host(flat(losses)).into_iter().map(f64::from).sum()
    }

    fn add(&self, into: &mut Tensor<1>, other: &Tensor<1>) {
        into.inplace(|into| into + other.clone());
    }

    fn accumulate(&self, into: &mut Tensor<1>, other: &Tensor<1>) {
        self.add(into, other);
    }

    fn blend(&self, into: &mut Tensor<1>, kept: f32, other: &Tensor<1>, factor: f32) {
        into.inplace(|into| into * kept + other.clone() * factor);
    }

    fn balance(
        &self,
        biases: &mut Tensor<1>,
        loads: Window<'_, Tensor<1>>,
        range: Range<usize>,
        mean: f32,
        rate: f32,
    ) {
        let moved = (part(&loads, range.len()) - mean).sign() * rate;
        let window = WindowMut { flat: biases, start: range.start, fresh: false };
        update(window, [range.len()], |biases| biases - moved);
    }

    fn square_sum(&self, tensor: &Tensor<1>, range: Range<usize>) -> f64 {
        to_host(tensor.clone().slice(range).square().sum())[0].into()
    }

    fn adamw(
        &self,
        settings: &AdamW,
        [parameters, mean, square]: [&mut Tensor<1>; 3],
        gradient: Window<'_, Tensor<1>>,
        range: Range<usize>,
    ) {
        let AdamW { beta1, beta2, epsilon, gradient_scale, .. } = *settings;
        let gradient = part(&gradient, range.len()) * gradient_scale;
        let (start, shape) = (range.start, [range.len()]);
        update(WindowMut { flat: mean, start, fresh: false }, shape, |mean| {
            mean * beta1 + gradient.clone() * (1.0 - beta1)
        });
        update(WindowMut { flat: square, start, fresh: false }, shape, |square| {
            square * beta2 + gradient.square() * (1.0 - beta2)
        });
        let (step, root) = settings.bias_corrected();
        let (mean, square) = (mean.clone().slice(range.clone()), square.clone().slice(range));
        let moved = mean * step / (square.sqrt() / root + epsilon);
        update(WindowMut { flat: parameters, start, fresh: false }, shape, |parameters| {
            parameters * settings.kept() - moved
        });
    }
}
