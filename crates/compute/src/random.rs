//! Initial parameters: normal deviates that depend on the seed and the parameter's place alone, so
//! that every layout starts from the same model.

/// `SplitMix64` (Steele et al. 2014): a counter-based generator, so that element `i` needs no
/// other.
fn split_mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// In `(0, 1]`, from the upper 53 bits.
fn unit(bits: u64) -> f64 {
    ((bits >> 11) + 1) as f64 / (1u64 << 53) as f64
}

/// A standard normal deviate for element `index` of stream `stream` (Box & Muller 1958).
pub fn normal(stream: u64, index: u64) -> f32 {
    let counter = split_mix(stream).wrapping_add(index.wrapping_mul(2));
    let (u, v) = (
        unit(split_mix(counter)),
        unit(split_mix(counter.wrapping_add(1))),
    );
    ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
}

/// A stream for a named parameter under a seed.
pub fn stream(seed: u64, name: &str) -> u64 {
    name.bytes().fold(split_mix(seed), |state, byte| {
        split_mix(state ^ u64::from(byte))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deviates_are_normal_and_reproducible() {
        let stream = stream(7, "model.layers.0.mlp.up_proj.weight");
        let draws: Vec<f64> = (0..20_000).map(|i| f64::from(normal(stream, i))).collect();
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        let variance = draws.iter().map(|x| x * x).sum::<f64>() / draws.len() as f64;
        assert!(mean.abs() < 0.02, "{mean}");
        assert!((variance - 1.0).abs() < 0.03, "{variance}");
        assert_eq!(normal(stream, 3), normal(stream, 3));
    }
}
