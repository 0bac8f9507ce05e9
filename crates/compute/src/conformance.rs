//! The one suite that every device passes: each operator, forward and backward, held to its naive
//! definition in f64, over shapes that are small, odd, and cross the blocks devices work in.

mod reference;

use std::ops::Range;

use crate::operators::{
    AdamW, AttentionDims, ELSEWHERE, Operators, Pairing, ProductDims, Rotation, ScoreDims, Sight,
    Window, WindowMut,
};
use crate::random;
use crate::{Cpu, Precision};

/// Largest error of what every device keeps in fp32, relative to the largest element.
const FP32: f64 = 3e-6;

/// Largest error of what a bf16 device rounds: twice the rounding itself, as some operators read
/// what another has rounded.
const BF16: f64 = 1.0 / 256.0;

/// What stands before and after a window, and must stay as it is.
const MARGIN: usize = 5;

macro_rules! conforms {
    ($device:ident, $operators:expr, $tolerance:expr) => {
        conforms!($device, $operators, $tolerance; [
            a_buffer_comes_back_as_it_went
            a_slice_is_exact_and_a_cast_is_rounded
            clones_share_until_one_is_written
            products
            product_gradients
            grouped_products
            grouped_product_gradients
            rows_scaled_and_multiplied
            biases_follow_loads
            rms_norm
            rms_norm_gradients
            rotary
            rotary_undone
            attention
            attention_is_causal
            attention_survives_large_scores
            attention_gradient
            attention_over_keys_apart
            gradients_of_keys_apart
            attention_in_pieces
            swiglu
            swiglu_gradient
            embedding
            embedding_gradient
            cross_entropy
            cross_entropy_survives_large_logits
            cross_entropy_in_parts
            words_elsewhere
            columns
            sums
            adamw
        ]);
    };
    ($device:ident, $operators:expr, $tolerance:expr; [$($check:ident)*]) => {
        mod $device {
            use super::*;
            $(
                #[test]
                fn $check() {
                    super::$check(&Suite { operators: $operators, tolerance: $tolerance });
                }
            )*
        }
    };
}

conforms!(cpu, Cpu::new(1, Precision::Fp32), FP32);
conforms!(cpu_of_two_threads, Cpu::new(2, Precision::Fp32), FP32);
conforms!(cpu_in_bf16, Cpu::new(1, Precision::Bf16), BF16);
#[cfg(feature = "burn")]
conforms!(burn, crate::Burn::flex(), FP32);

/// A device, and how far what it writes in its own precision may be off.
struct Suite<O> {
    operators: O,
    tolerance: f64,
}

impl<O: Operators> Suite<O> {
    fn tensor(&self, values: &[f64]) -> O::Tensor {
        self.operators.upload(values.iter().map(|v| *v as f32).collect())
    }

    fn values(&self, tensor: &O::Tensor) -> Vec<f64> {
        let values = self.operators.download(tensor.clone());
        values.into_iter().map(f64::from).collect()
    }

    /// Holds what the device wrote in its precision to the reference.
    fn check(&self, what: &str, tensor: &O::Tensor, reference: &[f64]) {
        close(what, &self.values(tensor), reference, self.tolerance);
    }

    /// Holds what is fp32 on every device to the reference.
    fn check_fp32(&self, what: &str, tensor: &O::Tensor, reference: &[f64]) {
        close(what, &self.values(tensor), reference, FP32);
    }

    /// A buffer whose window holds `values`.
    fn framed(&self, values: &[f64]) -> O::Tensor {
        self.tensor(&framed(values))
    }

    /// Lets `write` add to a window that is not empty, and holds what it added to the reference.
    fn check_added(&self, what: &str, added: &[f64], write: impl FnOnce(WindowMut<'_, O::Tensor>)) {
        let before = framed(&normals("what was there before", added.len()));
        let mut flat = self.tensor(&before);
        write(WindowMut { flat: &mut flat, start: MARGIN, fresh: false });
        let after = self.values(&flat);
        let window = MARGIN..MARGIN + added.len();
        close(what, &after[window.clone()], &sum(&before[window.clone()], added), FP32);
        assert_eq!(after[..MARGIN], before[..MARGIN], "{what}: before the window");
        assert_eq!(after[window.end..], before[window.end..], "{what}: behind the window");
    }
}

impl<O: Operators> Suite<O> {
    /// Lets `write` fill a fresh window, whose contents must not matter.
    fn check_fresh(
        &self,
        what: &str,
        wanted: &[f64],
        write: impl FnOnce(WindowMut<'_, O::Tensor>),
    ) {
        let before = framed(&vec![f64::NAN; wanted.len()]);
        let mut flat = self.tensor(&before);
        write(WindowMut { flat: &mut flat, start: MARGIN, fresh: true });
        let after = self.values(&flat);
        let window = MARGIN..MARGIN + wanted.len();
        close(what, &after[window.clone()], wanted, FP32);
        assert_eq!(after[..MARGIN], before[..MARGIN], "{what}: before the window");
        assert_eq!(after[window.end..], before[window.end..], "{what}: behind the window");
    }
}

/// The window in the middle of a buffer that [`Suite::framed`] made.
fn window<T>(flat: &T) -> Window<'_, T> {
    Window { flat, start: MARGIN }
}

fn framed(values: &[f64]) -> Vec<f64> {
    let margin = normals("margin", 2 * MARGIN);
    [&margin[..MARGIN], values, &margin[MARGIN..]].concat()
}

/// Standard normal fp32 numbers, the same for the same name.
fn normals(name: &str, elements: usize) -> Vec<f64> {
    let stream = random::stream(1, name);
    let draws = (0..elements as u64).map(|index| random::normal(stream, index));
    draws.map(f64::from).collect()
}

fn sum(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

/// Rounded to fp32, as an upload rounds.
fn scaled(values: Vec<f64>, factor: f64) -> Vec<f64> {
    let scaled = values.into_iter().map(|v| f64::from((v * factor) as f32));
    scaled.collect()
}

fn close(what: &str, ours: &[f64], reference: &[f64], tolerance: f64) {
    assert_eq!(ours.len(), reference.len(), "{what}: elements");
    let largest = reference.iter().fold(0.0, |max: f64, v| max.max(v.abs()));
    for (index, (ours, reference)) in ours.iter().zip(reference).enumerate() {
        let error = (ours - reference).abs();
        assert!(
            error <= tolerance * largest,
            "{what}: element {index} is {ours} and should be {reference}, off by {:.1e} of the largest",
            error / largest
        );
    }
}

fn a_buffer_comes_back_as_it_went<O: Operators>(suite: &Suite<O>) {
    let operators = &suite.operators;
    for elements in [0, 1, 17, 100] {
        assert_eq!(operators.download(operators.zeros(elements)), vec![0.0; elements]);
        let buffer = operators.host_buffer(elements);
        assert_eq!(buffer.len(), elements);
        operators.recycle(buffer);
        let values = normals("buffer", elements);
        assert_eq!(suite.values(&suite.tensor(&values)), values);
    }
}

fn a_slice_is_exact_and_a_cast_is_rounded<O: Operators>(suite: &Suite<O>) {
    let values = normals("slice", 50);
    let tensor = suite.tensor(&values);
    for range in [0..50, 0..1, 3..20, 49..50, 7..7] {
        let slice = suite.operators.slice(&tensor, range.clone());
        assert_eq!(suite.values(&slice), values[range], "slices keep fp32 masters whole");
    }
    suite.check("cast", &suite.operators.cast(&tensor), &values);
}

fn clones_share_until_one_is_written<O: Operators>(suite: &Suite<O>) {
    let values = normals("clone", 20);
    let doubled = sum(&values, &values);
    let mut original = suite.tensor(&values);
    let mut copy = original.clone();
    let other = suite.tensor(&values);
    suite.operators.accumulate(&mut copy, &other);
    assert_eq!(suite.values(&original), values);
    assert_eq!(suite.values(&copy), doubled);
    suite.operators.accumulate(&mut original, &copy);
    assert_eq!(suite.values(&copy), doubled);
}

/// Rows, inner and outer widths: single, odd, and beyond the registers and blocks of a product.
fn product_shapes() -> impl Iterator<Item = ProductDims> {
    [(1, 1, 1), (1, 7, 3), (5, 1, 9), (17, 33, 65), (64, 64, 64), (3, 130, 1), (66, 19, 129)]
        .into_iter()
        .map(|(r, k, n)| ProductDims { r, k, n })
}

fn products<O: Operators>(suite: &Suite<O>) {
    for dims in product_shapes() {
        let (x, w) = (normals("x", dims.r * dims.k), normals("w", dims.n * dims.k));
        let flat = suite.framed(&w);
        let y = suite.operators.product(&suite.tensor(&x), window(&flat), dims);
        suite.check(&format!("{dims:?}"), &y, &reference::product(&x, &w, dims));
    }
}

fn product_gradients<O: Operators>(suite: &Suite<O>) {
    for dims in product_shapes() {
        let (x, w) = (normals("x", dims.r * dims.k), normals("w", dims.n * dims.k));
        let dy = normals("dy", dims.r * dims.n);
        let (x_on, dy_on, flat) = (suite.tensor(&x), suite.tensor(&dy), suite.framed(&w));
        let dx = suite.operators.product_input_gradient(&dy_on, window(&flat), dims);
        let expected = reference::product_input_gradient(&dy, &w, dims);
        suite.check(&format!("input, {dims:?}"), &dx, &expected);
        let expected = reference::product_weight_gradient(&dy, &x, dims);
        suite.check_added(&format!("weight, {dims:?}"), &expected, |dw| {
            suite.operators.product_weight_gradient(&dy_on, &x_on, dims, dw);
        });
        suite.check_fresh(&format!("fresh weight, {dims:?}"), &expected, |dw| {
            suite.operators.product_weight_gradient(&dy_on, &x_on, dims, dw);
        });
    }
}

/// Groups of rows, some of them empty.
const GROUPS: [&[usize]; 5] = [&[3], &[0, 2, 1], &[5, 0, 0, 4], &[0], &[17, 1]];

/// The parts of `x[r, k]`, `w[group, n, k]` and `y[r, n]` of a group, and its dimensions.
type Group = ([Range<usize>; 3], ProductDims);

/// Every group.
fn each_group(groups: &[usize], dims: ProductDims) -> impl Iterator<Item = Group> {
    let mut next = 0;
    groups.iter().enumerate().map(move |(group, rows)| {
        let (first, ProductDims { k, n, .. }) = (next, dims);
        next += rows;
        let of = |width: usize| first * width..next * width;
        let w = group * n * k..(group + 1) * n * k;
        ([of(k), w, of(n)], ProductDims { r: *rows, ..dims })
    })
}

fn grouped_products<O: Operators>(suite: &Suite<O>) {
    for (groups, (k, n)) in GROUPS.into_iter().zip([(1, 1), (7, 3), (16, 5), (4, 4), (33, 18)]) {
        let dims = ProductDims { r: groups.iter().sum(), k, n };
        let (x, w) = (normals("x", dims.r * k), normals("w", groups.len() * n * k));
        let flat = suite.framed(&w);
        let y = suite.operators.grouped_product(&suite.tensor(&x), window(&flat), dims, groups);
        let of_group =
            |([at_x, at_w, _], dims): Group| reference::product(&x[at_x], &w[at_w], dims);
        let expected: Vec<f64> = each_group(groups, dims).flat_map(of_group).collect();
        suite.check(&format!("{groups:?} {dims:?}"), &y, &expected);
    }
}

fn grouped_product_gradients<O: Operators>(suite: &Suite<O>) {
    for (groups, (k, n)) in GROUPS.into_iter().zip([(1, 1), (7, 3), (16, 5), (4, 4), (33, 18)]) {
        let dims = ProductDims { r: groups.iter().sum(), k, n };
        let (x, w) = (normals("x", dims.r * k), normals("w", groups.len() * n * k));
        let dy = normals("dy", dims.r * n);
        let (x_on, dy_on, flat) = (suite.tensor(&x), suite.tensor(&dy), suite.framed(&w));
        let what = format!("{groups:?} {dims:?}");
        let of_group = |([_, at_w, at_y], dims): Group| {
            reference::product_input_gradient(&dy[at_y], &w[at_w], dims)
        };
        let expected: Vec<f64> = each_group(groups, dims).flat_map(of_group).collect();
        let operators = &suite.operators;
        let dx = operators.grouped_product_input_gradient(&dy_on, window(&flat), dims, groups);
        suite.check(&what, &dx, &expected);
        let of_group = |([at_x, _, at_y], dims): Group| {
            reference::product_weight_gradient(&dy[at_y], &x[at_x], dims)
        };
        let expected: Vec<f64> = each_group(groups, dims).flat_map(of_group).collect();
        suite.check_added(&what, &expected, |dw| {
            operators.grouped_product_weight_gradient(&dy_on, &x_on, dims, groups, dw);
        });
        suite.check_fresh(&what, &expected, |dw| {
            operators.grouped_product_weight_gradient(&dy_on, &x_on, dims, groups, dw);
        });
    }
}

fn rows_scaled_and_multiplied<O: Operators>(suite: &Suite<O>) {
    for (rows, width) in ROWS_AND_WIDTHS {
        let (a, b) = (normals("a", rows * width), normals("b", rows * width));
        let factors = normals("factors", rows);
        let (a_on, what) = (suite.tensor(&a), format!("{rows} rows of {width}"));
        let scaled = suite.operators.scale_rows(&a_on, &suite.tensor(&factors), width);
        let row = |index: usize| index * width..(index + 1) * width;
        let expected = (0..rows).flat_map(|r| a[row(r)].iter().map(move |a| (r, a)));
        let expected: Vec<f64> = expected.map(|(r, a)| a * factors[r]).collect();
        suite.check(&what, &scaled, &expected);
        let dots = suite.operators.row_dots(&a_on, &suite.tensor(&b), width);
        let expected: Vec<f64> =
            (0..rows).map(|r| reference::dot(&a[row(r)], &b[row(r)])).collect();
        suite.check_fp32(&what, &dots, &expected);
    }
}

fn biases_follow_loads<O: Operators>(suite: &Suite<O>) {
    let biases = [0.5, -1.0, 0.25, 0.0, 8.0];
    let loads = suite.tensor(&[9.0, 3.0, 4.0, 5.0]);
    let mut on_device = suite.tensor(&biases);
    let loads = Window { flat: &loads, start: 1 };
    suite.operators.balance(&mut on_device, loads, 1..4, 4.0, 0.125);
    suite.check_fp32("biases", &on_device, &[0.5, -0.875, 0.25, -0.125, 8.0]);
}

const ROWS_AND_WIDTHS: [(usize, usize); 6] = [(1, 1), (3, 1), (1, 16), (4, 7), (5, 33), (2, 131)];

const EPSILON: f32 = 1e-5;

fn rms_norm<O: Operators>(suite: &Suite<O>) {
    for (rows, width) in ROWS_AND_WIDTHS {
        let (x, scale) = (normals("x", rows * width), normals("scale", width));
        let flat = suite.framed(&scale);
        let x_on = suite.tensor(&x);
        let (y, inverse) = suite.operators.rms_norm(&x_on, window(&flat), width, EPSILON);
        let what = format!("{rows} rows of {width}");
        suite.check(&what, &y, &reference::rms_norm(&x, &scale, EPSILON.into()));
        let expected = reference::inverse_rms(&x, width, EPSILON.into());
        suite.check_fp32(&what, &inverse, &expected);
    }
}

fn rms_norm_gradients<O: Operators>(suite: &Suite<O>) {
    for (rows, width) in ROWS_AND_WIDTHS {
        let (x, scale) = (normals("x", rows * width), normals("scale", width));
        let (dy, passing) = (normals("dy", rows * width), normals("passing", rows * width));
        let (x_on, flat, dy_on) = (suite.tensor(&x), suite.framed(&scale), suite.tensor(&dy));
        let (_, inverse) = suite.operators.rms_norm(&x_on, window(&flat), width, EPSILON);
        let mut dx = suite.tensor(&passing);
        let of_scale = reference::gradient(&scale, &dy, |scale| {
            reference::rms_norm(&x, scale, EPSILON.into())
        });
        let what = format!("{rows} rows of {width}");
        suite.check_added(&format!("scale, {what}"), &of_scale, |dscale| {
            let saved = (&x_on, &inverse);
            suite.operators.rms_norm_backward(&dy_on, saved, window(&flat), width, &mut dx, dscale);
        });
        suite.check_fresh(&format!("fresh scale, {what}"), &of_scale, |dscale| {
            let mut ignored = dx.clone();
            let saved = (&x_on, &inverse);
            let scale = window(&flat);
            suite.operators.rms_norm_backward(&dy_on, saved, scale, width, &mut ignored, dscale);
        });
        let of_x = reference::gradient(&x, &dy, |x| reference::rms_norm(x, &scale, EPSILON.into()));
        suite.check(&format!("input, {what}"), &dx, &sum(&passing, &of_x));
    }
}

/// One token, odd lengths, groups of 1, 2 and 4 queries to a key, values narrower than keys,
/// more than one block of queries.
fn attention_shapes() -> impl Iterator<Item = AttentionDims> {
    [
        (1, 1, 1, 1, (2, 2)),
        (2, 3, 1, 1, (4, 4)),
        (2, 5, 2, 1, (2, 2)),
        (1, 7, 4, 2, (6, 6)),
        (1, 17, 4, 1, (2, 2)),
        (1, 65, 2, 2, (4, 4)),
        (2, 9, 2, 2, (6, 4)),
        (2, 70, 2, 1, (2, 2)),
        (1, 131, 1, 1, (2, 2)),
    ]
    .into_iter()
    .map(|(sequences, length, heads, kv_heads, (head_dim, value_dim))| AttentionDims {
        sequences,
        length,
        keys: length,
        heads,
        kv_heads,
        head_dim,
        value_dim,
    })
}

fn qkv_of(dims: &AttentionDims) -> Vec<f64> {
    normals("qkv", dims.sequences * dims.length * dims.qkv_width())
}

/// Ways to rotate heads: whole, or the last components alone, of which a pair needs two.
fn rotations() -> impl Iterator<Item = (AttentionDims, usize, Pairing)> {
    attention_shapes().flat_map(|dims| {
        [Pairing::Halves, Pairing::Neighbours].into_iter().flat_map(move |pairing| {
            let whole = dims.head_dim / 2;
            [1, whole].map(|pairs| (dims, pairs, pairing))
        })
    })
}

/// Cosines and sines of arbitrary angles.
fn turns(dims: &AttentionDims, pairs: usize) -> [Vec<f64>; 2] {
    let angles = normals("angles", dims.length * pairs);
    let rounded = |f: fn(f64) -> f64| angles.iter().map(|a| f64::from(f(*a) as f32)).collect();
    [rounded(f64::cos), rounded(f64::sin)]
}

fn rotate<O: Operators>(
    suite: &Suite<O>,
    qkv: &mut O::Tensor,
    (dims, pairs, pairing): (AttentionDims, usize, Pairing),
    inverse: bool,
) {
    let [cos, sin] = &turns(&dims, pairs).map(|table| suite.tensor(&table));
    suite.operators.rotary(qkv, Rotation { cos, sin, pairing }, &dims, inverse);
}

fn rotary<O: Operators>(suite: &Suite<O>) {
    for (dims, pairs, pairing) in rotations() {
        let (qkv, turns) = (qkv_of(&dims), turns(&dims, pairs));
        let mut rotated = suite.tensor(&qkv);
        rotate(suite, &mut rotated, (dims, pairs, pairing), false);
        let expected = reference::rotary(&qkv, &turns, pairing, &dims);
        suite.check(&format!("{dims:?}, {pairs} {pairing:?}"), &rotated, &expected);
    }
}

fn rotary_undone<O: Operators>(suite: &Suite<O>) {
    for way in rotations() {
        let qkv = qkv_of(&way.0);
        let mut rotated = suite.tensor(&qkv);
        rotate(suite, &mut rotated, way, false);
        rotate(suite, &mut rotated, way, true);
        let twice = 2.0 * suite.tolerance; // rounded on the way there and on the way back
        close(&format!("{way:?}"), &suite.values(&rotated), &qkv, twice);
    }
}

/// Attention of every query to the keys beside it and before.
fn causal<O: Operators>(
    suite: &Suite<O>,
    qkv: &O::Tensor,
    dims: &AttentionDims,
) -> (O::Tensor, O::Tensor) {
    let sight = Sight { keys: None, seen: &dims.causal() };
    suite.operators.attention(qkv, sight, dims)
}

fn attention<O: Operators>(suite: &Suite<O>) {
    for dims in attention_shapes() {
        let qkv = qkv_of(&dims);
        let (y, log_sums) = causal(suite, &suite.tensor(&qkv), &dims);
        let (expected, sums) = reference::attention(&qkv, None, &dims.causal(), &dims);
        suite.check(&format!("{dims:?}"), &y, &expected);
        suite.check_fp32(&format!("log-sum-exp, {dims:?}"), &log_sums, &sums);
    }
}

/// A later token changes no bit of an earlier one's output.
fn attention_is_causal<O: Operators>(suite: &Suite<O>) {
    for dims in attention_shapes() {
        let dims = AttentionDims { sequences: 1, ..dims };
        let width = dims.output_width();
        let mut qkv = qkv_of(&dims);
        let (before, _) = causal(suite, &suite.tensor(&qkv), &dims);
        let changed = dims.length / 2;
        let later = normals("later", qkv.len());
        let first = changed * dims.qkv_width();
        qkv[first..].copy_from_slice(&later[first..]);
        let (after, _) = causal(suite, &suite.tensor(&qkv), &dims);
        let (before, after) = (suite.values(&before), suite.values(&after));
        assert_eq!(before[..changed * width], after[..changed * width], "{dims:?}");
        assert_ne!(before[changed * width..], after[changed * width..], "{dims:?}");
    }
}

fn attention_survives_large_scores<O: Operators>(suite: &Suite<O>) {
    for dims in attention_shapes() {
        let qkv = scaled(qkv_of(&dims), 30.0); // scores of thousands: their exponentials overflow
        let (y, log_sums) = causal(suite, &suite.tensor(&qkv), &dims);
        assert!(suite.values(&y).iter().all(|y| y.abs() < 200.0), "{dims:?}");
        let (_, expected) = reference::attention(&qkv, None, &dims.causal(), &dims);
        suite.check_fp32(&format!("{dims:?}"), &log_sums, &expected);
    }
}

fn attention_gradient<O: Operators>(suite: &Suite<O>) {
    for dims in attention_shapes() {
        let (qkv, seen) = (qkv_of(&dims), dims.causal());
        let dy = normals("dy", dims.sequences * dims.length * dims.output_width());
        let (qkv_on, dy_on) = (suite.tensor(&qkv), suite.tensor(&dy));
        let (y, log_sums) = causal(suite, &qkv_on, &dims);
        let (saved, sight) = ((&y, &log_sums), Sight { keys: None, seen: &seen });
        let (dqkv, apart) =
            suite.operators.attention_backward(&dy_on, &qkv_on, saved, sight, &dims);
        assert!(apart.is_none());
        let expected =
            reference::gradient(&qkv, &dy, |qkv| reference::attention(qkv, None, &seen, &dims).0);
        suite.check(&format!("{dims:?}"), &dqkv, &expected);
    }
}

/// Two documents in every sequence, and more keys than queries: those that are some tokens on.
fn attention_to_keys_apart() -> impl Iterator<Item = (AttentionDims, Vec<Range<u32>>)> {
    attention_shapes().map(|dims| {
        let dims = AttentionDims { keys: dims.length + 6, ..dims };
        let of_query = |query: u32| {
            let document = if query > 4 { 3 + query % 2 } else { 0 };
            document..query + 5
        };
        let length = dims.length as u32;
        let seen = (0..dims.sequences).flat_map(|_| (0..length).map(of_query)).collect();
        (dims, seen)
    })
}

fn keys_of(dims: &AttentionDims) -> Vec<f64> {
    normals("keys", dims.sequences * dims.keys * dims.keys_width())
}

fn attention_over_keys_apart<O: Operators>(suite: &Suite<O>) {
    for (dims, seen) in attention_to_keys_apart() {
        let (qkv, keys) = (qkv_of(&dims), keys_of(&dims));
        let keys_on = suite.tensor(&keys);
        let sight = Sight { keys: Some(&keys_on), seen: &seen };
        let (y, log_sums) = suite.operators.attention(&suite.tensor(&qkv), sight, &dims);
        let (expected, sums) = reference::attention(&qkv, Some(&keys), &seen, &dims);
        suite.check(&format!("{dims:?}"), &y, &expected);
        suite.check_fp32(&format!("log-sum-exp, {dims:?}"), &log_sums, &sums);
    }
}

fn gradients_of_keys_apart<O: Operators>(suite: &Suite<O>) {
    for (dims, seen) in attention_to_keys_apart() {
        let (qkv, keys) = (qkv_of(&dims), keys_of(&dims));
        let dy = normals("dy", dims.sequences * dims.length * dims.output_width());
        let (qkv_on, keys_on) = (suite.tensor(&qkv), suite.tensor(&keys));
        let sight = Sight { keys: Some(&keys_on), seen: &seen };
        let (y, log_sums) = suite.operators.attention(&qkv_on, sight, &dims);
        let saved = (&y, &log_sums);
        let (dqkv, dkeys) =
            suite.operators.attention_backward(&suite.tensor(&dy), &qkv_on, saved, sight, &dims);
        let of_queries = reference::gradient(&qkv, &dy, |qkv| {
            reference::attention(qkv, Some(&keys), &seen, &dims).0
        });
        suite.check(&format!("queries, {dims:?}"), &dqkv, &of_queries);
        let of_keys = reference::gradient(&keys, &dy, |keys| {
            reference::attention(&qkv, Some(keys), &seen, &dims).0
        });
        suite.check(&format!("keys, {dims:?}"), &dkeys.unwrap(), &of_keys);
    }
}

/// Attention to the halves of the keys, some of which no query of a block sees, joined.
fn attention_in_pieces<O: Operators>(suite: &Suite<O>) {
    for (dims, seen) in attention_to_keys_apart() {
        let (qkv, keys) = (suite.tensor(&qkv_of(&dims)), suite.tensor(&keys_of(&dims)));
        let sight = Sight { keys: Some(&keys), seen: &seen };
        let (expected, expected_sums) = suite.operators.attention(&qkv, sight, &dims);
        let cut = |range: Range<u32>| -> Vec<Range<u32>> {
            let clip = |seen: &Range<u32>| {
                seen.start.clamp(range.start, range.end)..seen.end.clamp(range.start, range.end)
            };
            seen.iter().map(clip).collect()
        };
        let half = dims.keys as u32 / 2;
        let (late, early) = (cut(half..dims.keys as u32), cut(0..half));
        let (mut y, mut sums) =
            suite.operators.attention(&qkv, Sight { seen: &late, ..sight }, &dims);
        let other = suite.operators.attention(&qkv, Sight { seen: &early, ..sight }, &dims);
        suite.operators.attention_join((&mut y, &mut sums), (&other.0, &other.1), &dims);
        let twice = 2.0 * suite.tolerance;
        close(&format!("{dims:?}"), &suite.values(&y), &suite.values(&expected), twice);
        suite.check_fp32(&format!("{dims:?}"), &sums, &suite.values(&expected_sums));
    }
}

/// Gates in every state, some beyond where `e^gate` overflows.
fn gates(rows: usize, width: usize) -> Vec<f64> {
    let mut gate_up = scaled(normals("gate and up", rows * 2 * width), 3.0);
    if width > 2 {
        gate_up[0] = -100.0;
        gate_up[1] = 100.0;
    }
    gate_up
}

fn swiglu<O: Operators>(suite: &Suite<O>) {
    for (rows, width) in ROWS_AND_WIDTHS {
        let gate_up = gates(rows, width);
        let y = suite.operators.swiglu(&suite.tensor(&gate_up), width);
        let expected = reference::swiglu(&gate_up, width);
        suite.check(&format!("{rows} rows of {width}"), &y, &expected);
    }
}

fn swiglu_gradient<O: Operators>(suite: &Suite<O>) {
    for (rows, width) in ROWS_AND_WIDTHS {
        let (gate_up, dy) = (gates(rows, width), normals("dy", rows * width));
        let (dy_on, gate_up_on) = (suite.tensor(&dy), suite.tensor(&gate_up));
        let ours = suite.operators.swiglu_backward(&dy_on, &gate_up_on, width);
        let expected = reference::gradient(&gate_up, &dy, |x| reference::swiglu(x, width));
        suite.check(&format!("{rows} rows of {width}"), &ours, &expected);
    }
}

const VOCABULARY: usize = 6;
const WORDS: [&[u32]; 4] = [&[0], &[5], &[3, 1, 3, 3, 0], &[2, 2]];
const EMBEDDING_WIDTHS: [usize; 4] = [1, 7, 16, 65];

fn embedding<O: Operators>(suite: &Suite<O>) {
    for (words, width) in WORDS.into_iter().zip(EMBEDDING_WIDTHS) {
        let table = normals("table", VOCABULARY * width);
        let flat = suite.framed(&table);
        let y = suite.operators.embedding(words, window(&flat), width);
        let row = |word: &u32| &table[*word as usize * width..][..width];
        let expected: Vec<f64> = words.iter().flat_map(row).copied().collect();
        suite.check(&format!("{words:?} of width {width}"), &y, &expected);
    }
}

fn embedding_gradient<O: Operators>(suite: &Suite<O>) {
    for (words, width) in WORDS.into_iter().zip(EMBEDDING_WIDTHS) {
        let dy = normals("dy", words.len() * width);
        let mut added = vec![0.0; VOCABULARY * width];
        for (word, dy) in words.iter().zip(dy.chunks_exact(width)) {
            let row = &mut added[*word as usize * width..][..width];
            row.copy_from_slice(&sum(row, dy));
        }
        suite.check_added(&format!("{words:?} of width {width}"), &added, |dtable| {
            let dy = suite.tensor(&dy);
            suite.operators.embedding_backward(&dy, words, width, dtable);
        });
    }
}

/// Holds loss and gradient to the reference, and every row of the gradient to a sum of zero.
fn check_cross_entropy<O: Operators>(suite: &Suite<O>, logits: &[f64], width: usize) {
    const SCALE: f64 = 0.25;
    let rows = logits.len() / width;
    let targets: Vec<u32> = (0..rows).map(|row| (row * 5 % width) as u32).collect();
    let mut on_device = suite.tensor(logits);
    let loss = suite.operators.cross_entropy(&mut on_device, &targets, width, SCALE as f32);
    let what = format!("{rows} rows of {width}");
    let losses = reference::cross_entropy(logits, &targets, width);
    let largest = logits.iter().fold(0.0, |max: f64, v| max.max(v.abs()));
    let expected: f64 = losses.iter().sum();
    assert!(
        (loss - expected).abs() <= FP32 * largest * rows as f64,
        "{what}: {loss} for {expected}"
    );
    let expected = reference::gradient(logits, &vec![SCALE; rows], |logits| {
        reference::cross_entropy(logits, &targets, width)
    });
    let gradient = suite.values(&on_device);
    close(&what, &gradient, &expected, suite.tolerance);
    for row in gradient.chunks_exact(width) {
        assert!(row.iter().sum::<f64>().abs() <= suite.tolerance * SCALE, "{what}: {row:?}");
    }
}

fn cross_entropy<O: Operators>(suite: &Suite<O>) {
    for (rows, width) in [(1, 2), (3, 7), (1, 16), (5, 33), (4, 131)] {
        check_cross_entropy(suite, &normals("logits", rows * width), width);
    }
}

fn cross_entropy_survives_large_logits<O: Operators>(suite: &Suite<O>) {
    check_cross_entropy(suite, &scaled(normals("logits", 5 * 33), 100.0), 33);
}

/// The vocabulary in parts, the last with a column that is no word.
fn cross_entropy_in_parts<O: Operators>(suite: &Suite<O>) {
    let (rows, words, parts, width) = (5, 11, 3, 4);
    let logits = scaled(normals("logits", rows * words), 3.0);
    let targets: Vec<u32> = (0..rows as u32).map(|row| row * 5 % words as u32).collect();
    let mut whole = suite.tensor(&logits);
    let loss = suite.operators.cross_entropy(&mut whole, &targets, words, 0.25);
    let whole = suite.values(&whole);
    let part = |of: &[f64], index: usize| -> Vec<f64> {
        let column = |row: &[f64], at: usize| row.get(index * width + at).copied();
        let rows = of.chunks_exact(words);
        rows.flat_map(|row| (0..width).map(move |at| column(row, at).unwrap_or(0.0))).collect()
    };
    let in_part = |index: usize| -> Vec<u32> {
        let first = (index * width) as u32;
        let here = first..first + width as u32;
        let row = |word: &u32| if here.contains(word) { word - first } else { ELSEWHERE };
        targets.iter().map(row).collect()
    };
    let dims = |index: usize| ScoreDims { width, words: (words - index * width).min(width) };
    let on_device: Vec<_> = (0..parts).map(|index| suite.tensor(&part(&logits, index))).collect();
    let sums = on_device.iter().enumerate().flat_map(|(index, logits)| {
        suite.values(&suite.operators.log_sums(logits, &in_part(index), dims(index)))
    });
    let sums = suite.tensor(&sums.collect::<Vec<_>>());
    for (index, mut logits) in on_device.into_iter().enumerate() {
        let (targets, dims) = (in_part(index), dims(index));
        let operators = &suite.operators;
        let found = operators.cross_entropy_of_part(&mut logits, &targets, dims, &sums, 0.25);
        assert!((found / loss - 1.0).abs() < FP32, "{found} for {loss}");
        let twice = 2.0 * suite.tolerance;
        close(&format!("part {index}"), &suite.values(&logits), &part(&whole, index), twice);
    }
}

fn words_elsewhere<O: Operators>(suite: &Suite<O>) {
    let (width, words) = (7, [2, ELSEWHERE, 0]);
    let table = suite.framed(&normals("table", 3 * width));
    let y = suite.operators.embedding(&words, window(&table), width);
    let here = suite.operators.embedding(&[2, 0], window(&table), width);
    let (y, here) = (suite.values(&y), suite.values(&here));
    assert_eq!([&y[..width], &y[2 * width..]].concat(), here);
    assert_eq!(y[width..2 * width], vec![0.0; width]);
    let dy = normals("dy", 3 * width);
    let added = [&dy[2 * width..], &vec![0.0; width], &dy[..width]].concat();
    suite.check_added("words elsewhere", &added, |dtable| {
        suite.operators.embedding_backward(&suite.tensor(&dy), &words, width, dtable);
    });
}

fn columns<O: Operators>(suite: &Suite<O>) {
    let values = normals("columns", 3 * 5);
    let mut tensor = suite.tensor(&values);
    assert_eq!(suite.operators.elements(&tensor), values.len());
    let narrow = suite.operators.columns(&tensor, 5, 1..3);
    let expected: Vec<f64> = values.chunks(5).flat_map(|row| &row[1..3]).copied().collect();
    assert_eq!(suite.values(&narrow), expected);
    suite.operators.set_columns(&mut tensor, 5, 3, &narrow);
    let moved = |row: &[f64]| [row[0], row[1], row[2], row[1], row[2]];
    let expected: Vec<f64> = values.chunks(5).flat_map(moved).collect();
    assert_eq!(suite.values(&tensor), expected);
}

fn sums<O: Operators>(suite: &Suite<O>) {
    for elements in [1, 33, 5000] {
        let (a, b) = (normals("a", elements), normals("b", elements));
        let (mut rounded, other) = (suite.tensor(&a), suite.tensor(&b));
        let mut exact = rounded.clone();
        suite.operators.add(&mut rounded, &other);
        suite.check("add", &rounded, &sum(&a, &b));
        suite.operators.accumulate(&mut exact, &other);
        suite.check_fp32("accumulate", &exact, &sum(&a, &b));
        let mut blended = suite.tensor(&a);
        suite.operators.blend(&mut blended, 0.75, &other, -0.5);
        let expected: Vec<f64> = a.iter().zip(&b).map(|(a, b)| 0.75 * a - 0.5 * b).collect();
        suite.check_fp32("blend", &blended, &expected);
        for range in [0..elements, elements / 3..elements - elements / 4, 0..0] {
            let expected = reference::dot(&a[range.clone()], &a[range.clone()]);
            let squares = suite.operators.square_sum(&suite.tensor(&a), range);
            assert!((squares - expected).abs() <= FP32 * expected, "{squares} for {expected}");
        }
    }
}

fn adamw<O: Operators>(suite: &Suite<O>) {
    const ELEMENTS: usize = 37;
    const RANGE: Range<usize> = 4..35;
    let before = ["parameters", "mean", "square"].map(|name| normals(name, ELEMENTS));
    let mut expected = before.clone();
    expected[1].fill(0.0);
    expected[2].fill(0.0);
    let mut state = expected.each_ref().map(|values| suite.tensor(values));
    for update in 1..=5 {
        let settings = AdamW {
            learning_rate: 0.01,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
            gradient_scale: 0.5,
            update,
        };
        let gradient = normals(&format!("gradient {update}"), ELEMENTS);
        let on_device = suite.tensor(&gradient);
        let gradient_of_range = Window { flat: &on_device, start: RANGE.start };
        suite.operators.adamw(&settings, state.each_mut(), gradient_of_range, RANGE);
        for index in RANGE {
            let one = [0, 1, 2].map(|part: usize| expected[part][index]);
            let one = reference::adamw(&settings, one, gradient[index]);
            (0..3).for_each(|part| expected[part][index] = one[part]);
        }
        for (part, expected) in expected.iter().enumerate() {
            suite.check_fp32(&format!("part {part}, update {update}"), &state[part], expected);
        }
    }
    let parameters = suite.values(&state[0]);
    assert_eq!(parameters[..RANGE.start], before[0][..RANGE.start], "outside the range");
    assert_eq!(parameters[RANGE.end..], before[0][RANGE.end..], "outside the range");
}
