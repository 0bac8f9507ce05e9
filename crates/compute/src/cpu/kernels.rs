//! The loops between the products, written so that the compiler turns them into vector code, and
//! compiled once for each vector extension; the best one the processor has is chosen at run time.
//!
//! Sums run over [`LANES`] partial sums in a fixed order, so a result does not depend on which
//! version ran.

use std::ops::Range;

use multiversion::multiversion;

use crate::operators::{AdamW, Pairing, UNSEEN};

/// Partial sums of a reduction: one AVX-512 register of fp32.
const LANES: usize = 16;

/// `e^x` to within two units in the last place, without a branch or a call, so that it
/// vectorises: `2^n` by exponent bits times a polynomial on `[-ln2 / 2, ln2 / 2]`.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding and subtracting it rounds to an integer
    const LN2_HIGH: f32 = 0.693_359_4; // exact in few bits, so n * LN2_HIGH is exact
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Not `clamp`: these two selects let a NaN through.
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND; // its low bits hold n
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let tail =
        r * (1.0 / 6.0 + r * (1.0 / 24.0 + r * (1.0 / 120.0 + r * (1.0 / 720.0 + r / 5040.0))));
    let polynomial = 1.0 + r + r * r * (0.5 + tail);
    polynomial * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23)
}

/// Folds `f` over two slices of one length in [`LANES`] lanes, then the lanes by `combine`.
#[inline(always)]
fn fold_pairs(
    (a, b): (&[f32], &[f32]),
    start: f32,
    f: impl Fn(f32, f32, f32) -> f32,
    combine: impl Fn(f32, f32) -> f32,
) -> f32 {
    let mut lanes = [start; LANES];
    let (a_chunks, a_rest) = a.as_chunks::<LANES>();
    let (b_chunks, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for lane in 0..LANES {
            lanes[lane] = f(lanes[lane], a[lane], b[lane]);
        }
    }
    for (lane, (a, b)) in lanes.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *lane = f(*lane, *a, *b);
    }
    lanes.into_iter().fold(start, combine)
}

/// Sum of `f(a, b)`.
#[inline(always)]
fn sum_pairs(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    fold_pairs((a, b), 0.0, |sum, a, b| sum + f(a, b), |a, b| a + b)
}

#[inline(always)]
fn max_of(values: &[f32]) -> f32 {
    fold_pairs((values, values), f32::NEG_INFINITY, |max, a, _| max.max(a), f32::max)
}

#[inline(always)]
fn sum_of(values: &[f32]) -> f32 {
    sum_pairs(values, values, |a, _| a)
}

/// Rounds to the nearest bf16, ties to even.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub fn round_to_bf16(values: &mut [f32]) {
    for value in values {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & 0xffff_0000;
        *value = if value.is_nan() { f32::NAN } else { f32::from_bits(rounded) };
    }
}

/// `into += other`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub fn add(into: &mut [f32], other: &[f32]) {
    for (into, other) in into.iter_mut().zip(other) {
        *into += other;
    }
}

/// `a . b`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    sum_pairs(a, b, |a, b| a * b)
}

/// Sum of squares, in f64 over runs short enough for fp32 partial sums.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub fn square_sum(values: &[f32]) -> f64 {
    values.chunks(4096).map(|run| f64::from(sum_pairs(run, run, |a, _| a * a))).sum()
}

/// `y = x * inverse * scale` by rows, with `inverse = 1 / sqrt(mean(x^2) + epsilon)` kept
/// (Zhang & Sennrich 2019, eq. 4).
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub fn rms_norm(x: &[f32], scale: &[f32], epsilon: f32, y: &mut [f32], inverse: &mut [f32]) {
    let width = scale.len();
    let rows = x.chunks_exact(width).zip(y.chunks_exact_mut(width));
    for ((x, y), inverse) in rows.zip(inverse) {
        let mean = sum_pairs(x, x, |a, _| a * a) / width as f32;
        *inverse = 1.0 / (mean + epsilon).sqrt();
        for ((y, x), scale) in y.iter_mut().zip(x).zip(scale) {
            *y = x * *inverse * scale;
        }
    }
}

/// With `g = dy * scale`: `dx += inverse * g - x * inverse^3 * mean(g * x)`, and
/// `dscale += dy * x * inverse` over rows.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub fn rms_norm_backward(
    dy: &[f32],
    (x, inverse): (&[f32], &[f32]),
    scale: &[f32],
    dx: &mut [f32],
    dscale: &mut [f32],
) {
    let width = scale.len();
    let rows = dy.chunks_exact(width).zip(x.chunks_exact(width));
    for (((dy, x), dx), inverse) in rows.zip(dx.chunks_exact_mut(width)).zip(inverse) {
        let mut lanes = [0.0f32; LANES];
        for (i, ((dy, x), scale)) in dy.iter().zip(x).zip(scale).enumerate() {
            lanes[i % LANES] += dy * x * scale;
        }
        let pull = lanes.iter().sum::<f32>() / width as f32 * inverse * inverse * inverse;
        for ((dx, (dy, x)), scale) in dx.iter_mut().zip(dy.iter().zip(x)).zip(scale) {
            *dx += dy * scale * inverse - x * pull;
        }
        for (dscale, (dy, x)) in dscale.iter_mut().zip(dy.iter().zip(x)) {
            *dscale += dy * x * inverse;
        }
    }
}

/// Turns the last components of every head in a row, as pairs, by the row's angles; backwards when
/// `inverse`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub fn rotate(
    row: &mut [f32],
    head_dim: usize,
    (cos, sin, pairing): (&[f32], &[f32], Pairing),
    inverse: bool,
) {
    let pairs = cos.len();
    let sign = if inverse { -1.0 } else { 1.0 };
    let turn = |a: &mut f32, b: &mut f32, cos: f32, sin: f32| {
        (*a, *b) = (*a * cos - *b * sign * sin, *b * cos + *a * sign * sin);
    };
    for head in row.chunks_exact_mut(head_dim) {
        let (_, rotated) = head.split_at_mut(head_dim - 2 * pairs);
        let angles = cos.iter().zip(sin);
        match pairing {
            Pairing::Halves => {
                let (low, high) = rotated.split_at_mut(pairs);
                for ((low, high), (cos, sin)) in low.iter_mut().zip(high).zip(angles) {
                    turn(low, high, *cos, *sin);
                }
            }
            Pairing::Neighbours => {
                for ([even, odd], (cos, sin)) in rotated.as_chunks_mut().0.iter_mut().zip(angles) {
                    turn(even, odd, *cos, *sin);
                }
            }
        }
    }
}

/// Softmax over the scores of a row that are `seen`, zero elsewhere; returns their log-sum-exp,
/// [`UNSEEN`] of none.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub fn softmax(scores: &mut [f32], seen: Range<usize>) -> f32 {
    let (before, rest) = scores.split_at_mut(seen.start);
    let (scores, after) = rest.split_at_mut(seen.len());
    before.fill(0.0);
    after.fill(0.0);
    if scores.is_empty() {
        return UNSEEN;
    }
    let max = max_of(scores);
    for score in scores.iter_mut() {
        *score = exp(*score - max);
    }
    let sum = sum_of(scores);
    let inverse = 1.0 / sum;
    for score in scores.iter_mut() {
        *score *= inverse;
    }
    max + sum.ln()
}

/// From scores and the gradient of the weights: weights into `scores`, the gradient of the scores
/// into `gradients`, zero where they are not `seen`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub fn softmax_backward(
    scores: &mut [f32],
    gradients: &mut [f32],
    seen: Range<usize>,
    (log_sum, delta): (f32, f32),
) {
    for hidden in [0..seen.start, seen.end..scores.len()] {
        scores[hidden.clone()].fill(0.0);
        gradients[hidden].fill(0.0);
    }
    let (scores, gradients) = (&mut scores[seen.clone()], &mut gradients[seen]);
    for (score, gradient) in scores.iter_mut().zip(gradients) {
        *score = exp(*score - log_sum);
        *gradient = *score * (*gradient - delta);
    }
}

/// Joins the values of a query, weighted by what it found among some keys, to those of others;
/// returns the log-sum-exp of all.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub fn join(y: &mut [f32], log_sum: f32, other: &[f32], other_sum: f32) -> f32 {
    let max = log_sum.max(other_sum);
    let (own, others) = (exp(log_sum - max), exp(other_sum - max));
    let sum = own + others;
    let (own, others) = (own / sum, others / sum);
    for (y, other) in y.iter_mut().zip(other) {
        *y = *y * own + other * others;
    }
    max + sum.ln()
}

/// `silu(gate) * up` of rows `[gate | up]` (Shazeer 2020, eq. 6).
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub fn swiglu(gate_up: &[f32], width: usize, y: &mut [f32]) {
    for (gate_up, y) in gate_up.chunks_exact(2 * width).zip(y.chunks_exact_mut(width)) {
        let (gate, up) = gate_up.split_at(width);
        for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
            *y = gate * up / (1.0 + exp(-gate));
        }
    }
}

/// With `s = sigmoid(gate)`: `dup = dy * gate * s`, `dgate = dy * up * s * (1 + gate * (1 - s))`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub fn swiglu_backward(dy: &[f32], gate_up: &[f32], width: usize, dgate_up: &mut [f32]) {
    let rows = gate_up.chunks_exact(2 * width).zip(dgate_up.chunks_exact_mut(2 * width));
    for ((gate_up, dgate_up), dy) in rows.zip(dy.chunks_exact(width)) {
        let (gate, up) = gate_up.split_at(width);
        let (dgate, dup) = dgate_up.split_at_mut(width);
        for i in 0..width {
            let sigmoid = 1.0 / (1.0 + exp(-gate[i]));
            dup[i] = dy[i] * gate[i] * sigmoid;
            dgate[i] = dy[i] * up[i] * sigmoid * (1.0 + gate[i] * (1.0 - sigmoid));
        }
    }
}

/// The cross-entropy of one row of logits with `target`; the row becomes its gradient times
/// `gradient_scale`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub fn cross_entropy(row: &mut [f32], target: usize, gradient_scale: f32) -> f64 {
    let max = max_of(row);
    let target_logit = row[target];
    for logit in row.iter_mut() {
        *logit = exp(*logit - max);
    }
    let sum = sum_of(row);
    let factor = gradient_scale / sum;
    for weight in row.iter_mut() {
        *weight *= factor;
    }
    row[target] -= gradient_scale;
    f64::from(max) + f64::from(sum).ln() - f64::from(target_logit)
}

/// The maximum of some scores, and the sum of their exponentials less it.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub fn log_sum(scores: &[f32]) -> (f32, f32) {
    let max = max_of(scores);
    (max, sum_pairs(scores, scores, |score, _| exp(score - max)))
}

/// The maximum, the sum and the target's score of a row of which each part begins with its own.
pub fn join_log_sums<'a>(parts: impl Iterator<Item = &'a [f32]> + Clone) -> (f32, f32, f32) {
    let max = parts.clone().fold(f32::NEG_INFINITY, |max, part| max.max(part[0]));
    let (mut sum, mut score) = (0.0, 0.0);
    for part in parts {
        sum += part[1] * exp(part[0] - max);
        score += part[2];
    }
    (max, sum, score)
}

/// `e^(score - max)` times a factor, in place.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub fn softmax_times(scores: &mut [f32], max: f32, factor: f32) {
    for score in scores.iter_mut() {
        *score = exp(*score - max) * factor;
    }
}

/// See [`AdamW`].
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub fn adamw(
    settings: &AdamW,
    parameters: &mut [f32],
    [mean, square]: [&mut [f32]; 2],
    gradient: &[f32],
) {
    let AdamW { beta1, beta2, epsilon, gradient_scale, .. } = *settings;
    let ((step, root), kept) = (settings.bias_corrected(), settings.kept());
    let moments = mean.iter_mut().zip(square.iter_mut());
    for ((parameter, (mean, square)), gradient) in parameters.iter_mut().zip(moments).zip(gradient)
    {
        let gradient = gradient * gradient_scale;
        *mean += (gradient - *mean) * (1.0 - beta1);
        *square = *square * beta2 + gradient * gradient * (1.0 - beta2);
        *parameter = *parameter * kept - step * *mean / (square.sqrt() / root + epsilon);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_wherever_its_result_is_a_normal_number() {
        const STEPS: u32 = 1_000_000;
        for step in 0..=STEPS {
            let x = -87.0 + 175.0 * (step as f32 / STEPS as f32);
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 1e-6, "e^{x} is off by {error:.1e}");
        }
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn exp_is_finite_beyond_its_range() {
        assert_eq!(exp(-1e30), exp(-87.0));
        assert_eq!(exp(1e30), exp(88.0));
    }

    #[test]
    fn bf16_ties_go_to_even() {
        let (ulp, half) = (1.0 / 128.0, 1.0 / 256.0);
        let mut values = [1.0, 1.0 + half, 1.0 + ulp + half, 1.0 + half * 1.01, f32::NAN];
        round_to_bf16(&mut values);
        assert_eq!(values[..4], [1.0, 1.0, 1.0 + 2.0 * ulp, 1.0 + ulp]);
        assert!(values[4].is_nan());
    }
}
