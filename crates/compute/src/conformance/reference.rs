//! The operators' definitions, written out naively in f64. Their gradients are central
//! differences of these definitions, so that no formula is trusted twice.

use std::ops::Range;

use crate::operators::{AdamW, AttentionDims, Pairing, ProductDims};

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// What `f` pulls back to its input at `x` when its output's gradient is `dy`.
pub fn gradient(x: &[f64], dy: &[f64], f: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let moved = |index: usize, step: f64| {
        let mut x = x.to_vec();
        x[index] += step;
        dot(&f(&x), dy)
    };
    let slope = |index| (moved(index, STEP) - moved(index, -STEP)) / (2.0 * STEP);
    (0..x.len()).map(slope).collect()
}

/// Calls `f` with the index of each element of `x[r, k]`, `w[n, k]` and `y[r, n]` that meet.
fn meetings(dims: ProductDims, mut f: impl FnMut(usize, usize, usize)) {
    let ProductDims { r, k, n } = dims;
    for row in 0..r {
        for outer in 0..n {
            for inner in 0..k {
                f(row * k + inner, outer * k + inner, row * n + outer);
            }
        }
    }
}

pub fn product(x: &[f64], w: &[f64], dims: ProductDims) -> Vec<f64> {
    let mut y = vec![0.0; dims.r * dims.n];
    meetings(dims, |at_x, at_w, at_y| y[at_y] += x[at_x] * w[at_w]);
    y
}

pub fn product_input_gradient(dy: &[f64], w: &[f64], dims: ProductDims) -> Vec<f64> {
    let mut dx = vec![0.0; dims.r * dims.k];
    meetings(dims, |at_x, at_w, at_y| dx[at_x] += dy[at_y] * w[at_w]);
    dx
}

pub fn product_weight_gradient(dy: &[f64], x: &[f64], dims: ProductDims) -> Vec<f64> {
    let mut dw = vec![0.0; dims.n * dims.k];
    meetings(dims, |at_x, at_w, at_y| dw[at_w] += dy[at_y] * x[at_x]);
    dw
}

/// The inverse root mean square of every row.
pub fn inverse_rms(x: &[f64], width: usize, epsilon: f64) -> Vec<f64> {
    let inverse = |row: &[f64]| 1.0 / (dot(row, row) / width as f64 + epsilon).sqrt();
    x.chunks_exact(width).map(inverse).collect()
}

pub fn rms_norm(x: &[f64], scale: &[f64], epsilon: f64) -> Vec<f64> {
    let inverse = inverse_rms(x, scale.len(), epsilon);
    let value = |(i, x)| x * inverse[i / scale.len()] * scale[i % scale.len()];
    x.iter().enumerate().map(value).collect()
}

/// Rotates the last components of the queries and keys of every row.
pub fn rotary(
    qkv: &[f64],
    [cos, sin]: &[Vec<f64>; 2],
    pairing: Pairing,
    dims: &AttentionDims,
) -> Vec<f64> {
    let (width, pairs) = (dims.qkv_width(), cos.len() / dims.length);
    let mut rotated = qkv.to_vec();
    for row in 0..qkv.len() / width {
        for head in 0..dims.heads + dims.kv_heads {
            let first = row * width + (head + 1) * dims.head_dim - 2 * pairs;
            for pair in 0..pairs {
                let [one, other] = match pairing {
                    Pairing::Halves => [pair, pair + pairs],
                    Pairing::Neighbours => [2 * pair, 2 * pair + 1],
                };
                let angle = (row % dims.length) * pairs + pair;
                let (a, b) = (qkv[first + one], qkv[first + other]);
                rotated[first + one] = a * cos[angle] - b * sin[angle];
                rotated[first + other] = a * sin[angle] + b * cos[angle];
            }
        }
    }
    rotated
}

/// Weighted values `[r, heads * value_dim]` and log-sum-exps `[sequences, heads, length]` of the keys
/// that are `seen`, beside the queries or in `apart`.
pub fn attention(
    qkv: &[f64],
    apart: Option<&[f64]>,
    seen: &[Range<u32>],
    dims: &AttentionDims,
) -> (Vec<f64>, Vec<f64>) {
    let (heads, width) = (dims.heads, dims.head_dim);
    let query =
        |token: usize, head: usize| &qkv[token * dims.qkv_width() + head * width..][..width];
    let shared = |sequence: usize, key: u32| {
        let key = sequence * dims.keys + key as usize;
        match apart {
            Some(apart) => &apart[key * dims.keys_width()..],
            None => &qkv[key * dims.qkv_width() + dims.queries_width()..],
        }
    };
    let mut y = vec![0.0; dims.sequences * dims.length * dims.output_width()];
    let mut log_sums = Vec::new();
    for sequence in 0..dims.sequences {
        for head in 0..heads {
            let of = head / (heads / dims.kv_heads);
            let key = |at| &shared(sequence, at)[of * width..][..width];
            let first_value = dims.kv_heads * width + of * dims.value_dim;
            let value = |at| &shared(sequence, at)[first_value..][..dims.value_dim];
            for token in sequence * dims.length..(sequence + 1) * dims.length {
                let seen = seen[token].clone();
                let score = |at| dot(query(token, head), key(at)) / (width as f64).sqrt();
                let scores: Vec<f64> = seen.clone().map(score).collect();
                let log_sum = log_sum_exp(&scores);
                let y = &mut y[(token * heads + head) * dims.value_dim..][..dims.value_dim];
                for (at, score) in seen.zip(scores) {
                    let weight = (score - log_sum).exp();
                    y.iter_mut().zip(value(at)).for_each(|(y, v)| *y += weight * v);
                }
                log_sums.push(log_sum);
            }
        }
    }
    (y, log_sums)
}

pub fn swiglu(gate_up: &[f64], width: usize) -> Vec<f64> {
    let value = |(gate, up): (&f64, &f64)| gate / (1.0 + (-gate).exp()) * up;
    let rows = gate_up.chunks_exact(2 * width).map(|row| row.split_at(width));
    rows.flat_map(|(gate, up)| gate.iter().zip(up).map(value)).collect()
}

fn log_sum_exp(values: &[f64]) -> f64 {
    let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    max + values.iter().map(|v| (v - max).exp()).sum::<f64>().ln()
}

/// The cross-entropy of every row of logits.
pub fn cross_entropy(logits: &[f64], targets: &[u32], width: usize) -> Vec<f64> {
    let rows = logits.chunks_exact(width).zip(targets);
    rows.map(|(row, target)| log_sum_exp(row) - row[*target as usize]).collect()
}

/// One update of one parameter and its two moments, as `torch.optim.AdamW` documents it.
pub fn adamw(settings: &AdamW, [parameter, mean, square]: [f64; 3], gradient: f64) -> [f64; 3] {
    let (beta1, beta2) = (f64::from(settings.beta1), f64::from(settings.beta2));
    let (rate, decay) = (f64::from(settings.learning_rate), f64::from(settings.weight_decay));
    let gradient = gradient * f64::from(settings.gradient_scale);
    let mean = beta1 * mean + (1.0 - beta1) * gradient;
    let square = beta2 * square + (1.0 - beta2) * gradient * gradient;
    let unbiased_mean = mean / (1.0 - beta1.powf(settings.update as f64));
    let unbiased_square = square / (1.0 - beta2.powf(settings.update as f64));
    let direction = unbiased_mean / (unbiased_square.sqrt() + f64::from(settings.epsilon));
    [parameter - rate * decay * parameter - rate * direction, mean, square]
}
