//! Sums that are rounded on their way between hosts, where bytes are dear.
//!
//! A chunk is rounded by itself, and rounding what is rounded changes nothing, so that all members of an
//! all-reduce end with the same bits: who has the last partial sum rounds it once, and hands on what all others
//! get.

use collective::Action;
use half::bf16;

/// How what is summed travels between hosts. Partial sums are rounded when they leave a host, and the result of
/// an all-reduce once more; what stays within a host, and every addition, is fp32.
///
/// Around a ring over so many hosts a sum is rounded as many times: its error is at most [`Compression::error`] as
/// many times, of the sum of magnitudes for bf16, of the largest such sum in its block for int8.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compression {
    /// Half the bytes: 8 significant bits.
    Bf16,
    /// A quarter and a little: 8-bit integers, of which every 32 have a power of two as scale (MXINT8 of the OCP
    /// Microscaling Formats specification 1.0, 2023).
    Int8,
}

/// How many elements have a scale together.
const BLOCK: usize = 32;

/// The scale of a block that holds what is no finite number.
const NOT_FINITE: u8 = 255;

impl Compression {
    /// How much one rounding changes an element at most, as a share of the element for bf16 and of the largest in
    /// its block for int8.
    #[must_use]
    pub const fn error(self) -> f64 {
        match self {
            Self::Bf16 => 1.0 / 256.0,
            Self::Int8 => 1.0 / 127.0,
        }
    }

    /// How many words a chunk of so many elements takes.
    pub(crate) const fn words(self, elements: usize) -> usize {
        match self {
            Self::Bf16 => elements.div_ceil(2),
            Self::Int8 => (elements.div_ceil(BLOCK) + elements).div_ceil(4),
        }
    }

    /// Appends a chunk as it travels.
    pub(crate) fn encode(self, chunk: &[f32], words: &mut Vec<f32>) {
        let start = words.len();
        words.resize(start + self.words(chunk.len()), 0.0);
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut words[start..]);
        match self {
            Self::Bf16 => {
                for (two, element) in bytes.as_chunks_mut().0.iter_mut().zip(chunk) {
                    *two = bf16::from_f32(*element).to_le_bytes();
                }
            }
            Self::Int8 => {
                let (scales, integers) = bytes.split_at_mut(chunk.len().div_ceil(BLOCK));
                let blocks = chunk.chunks(BLOCK).zip(integers.chunks_mut(BLOCK));
                for ((block, integers), scale) in blocks.zip(scales) {
                    *scale = scale_of(block);
                    // Of a power of two the inverse is exact.
                    let inverse = 1.0 / power_of_two(*scale);
                    for (integer, element) in integers.iter_mut().zip(block) {
                        let rounded = (element * inverse).round_ties_even().max(-127.0);
                        *integer = (rounded as i8).to_le_bytes()[0];
                    }
                }
            }
        }
    }

    /// Puts a chunk that travelled to where it belongs, or adds it.
    pub(crate) fn decode(self, words: &[f32], chunk: &mut [f32], action: Action) {
        match action {
            Action::Copy => self.each(words, chunk, |element, value| *element = value),
            Action::Reduce => self.each(words, chunk, |element, value| *element += value),
        }
    }

    fn each(self, words: &[f32], chunk: &mut [f32], put: impl Fn(&mut f32, f32)) {
        let bytes: &[u8] = bytemuck::cast_slice(words);
        match self {
            Self::Bf16 => {
                for (element, two) in chunk.iter_mut().zip(bytes.as_chunks().0) {
                    put(element, bf16::from_le_bytes(*two).to_f32());
                }
            }
            Self::Int8 => {
                let (scales, integers) = bytes.split_at(chunk.len().div_ceil(BLOCK));
                let blocks = chunk.chunks_mut(BLOCK).zip(integers.chunks(BLOCK));
                for ((block, integers), scale) in blocks.zip(scales) {
                    let scale = power_of_two(*scale);
                    for (element, integer) in block.iter_mut().zip(integers) {
                        put(element, f32::from(i8::from_le_bytes([*integer])) * scale);
                    }
                }
            }
        }
    }

    /// What a chunk is after it has travelled.
    pub fn round(self, chunk: &mut [f32]) {
        let mut words = Vec::new();
        self.encode(chunk, &mut words);
        self.decode(&words, chunk, Action::Copy);
    }
}

/// The exponent, plus 127, of the least power of two of which the largest magnitude is at most 127 times as much;
/// near the largest of all numbers, where rounding up would be infinite, of the power of two below, and what is
/// past 127 times as much becomes that.
fn scale_of(block: &[f32]) -> u8 {
    let largest = block.iter().fold(0.0_f32, |largest, element| match element.is_finite() {
        true => largest.max(element.abs()),
        false => f32::INFINITY,
    });
    if largest.is_infinite() {
        return NOT_FINITE;
    }
    let (exponent, fraction) = (largest.to_bits() >> 23, largest.to_bits() & 0x7f_ffff);
    // 127 is 1.984375 times 2 to the 6th.
    let more = u32::from(fraction > 0x7e_0000 && exponent < 254);
    (exponent + more).saturating_sub(6) as u8
}

/// Two to the power of an exponent that has 127 added to it; no number for [`NOT_FINITE`].
fn power_of_two(exponent: u8) -> f32 {
    match exponent {
        NOT_FINITE => f32::NAN,
        0 => f32::from_bits(1 << 22),
        exponent => f32::from_bits(u32::from(exponent) << 23),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Numbers of all magnitudes, many of one.
    fn element() -> impl Strategy<Value = f32> {
        prop_oneof![
            -1.0_f32..1.0,
            any::<f32>().prop_filter("a number", |x| x.is_finite()),
            (f32::MAX / 2.0)..=f32::MAX,
            f32::MIN..=(f32::MIN / 2.0),
            Just(0.0)
        ]
    }

    proptest! {
        #[test]
        fn rounding_keeps_to_its_bound_and_is_done_once(
            chunk in prop::collection::vec(element(), 0..200),
            int8: bool,
        ) {
            let compression = if int8 { Compression::Int8 } else { Compression::Bf16 };
            let mut rounded = chunk.clone();
            compression.round(&mut rounded);
            for (before, after) in chunk.chunks(BLOCK).zip(rounded.chunks(BLOCK)) {
                let largest = before.iter().fold(0.0_f64, |m, x| m.max(f64::from(x.abs())));
                for (x, y) in before.iter().zip(after) {
                    let of = if int8 { largest } else { f64::from(x.abs()) };
                    let close = (f64::from(*x) - f64::from(*y)).abs() <= of * compression.error() + 1e-38;
                    // In bf16 the largest numbers of all round to infinity.
                    let infinite = !int8 && y.is_infinite() && x.abs() > 3.389e38;
                    prop_assert!(close || infinite, "{x} became {y}");
                }
            }
            let mut again = rounded.clone();
            compression.round(&mut again);
            let bits = |chunk: &[f32]| chunk.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(&again), bits(&rounded));
        }

        #[test]
        fn whatever_comes_is_decoded(
            bytes in prop::collection::vec(any::<u8>(), 400),
            elements in 0_usize..200,
            int8: bool,
        ) {
            let compression = if int8 { Compression::Int8 } else { Compression::Bf16 };
            let words: Vec<f32> = bytes.chunks_exact(4).map(bytemuck::pod_read_unaligned).collect();
            let mut chunk = vec![1.0; elements];
            compression.decode(&words[..compression.words(elements)], &mut chunk, Action::Reduce);
        }
    }

    #[test]
    fn what_is_no_number_is_none_in_its_whole_block() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut chunk = [1.0_f32; 70];
            chunk[40] = bad;
            let mut two_bytes = chunk;
            Compression::Int8.round(&mut chunk);
            assert!(chunk[32..64].iter().all(|x| x.is_nan()));
            assert!(chunk[..32].iter().chain(&chunk[64..]).all(|x| *x == 1.0));
            Compression::Bf16.round(&mut two_bytes);
            assert!(!two_bytes[40].is_finite() && two_bytes[41] == 1.0);
        }
    }

    #[test]
    fn a_chunk_takes_a_half_and_a_quarter() {
        assert_eq!([0, 1, 3, 256].map(|n| Compression::Bf16.words(n)), [0, 1, 2, 128]);
        assert_eq!([0, 1, 3, 256].map(|n| Compression::Int8.words(n)), [0, 1, 1, 66]);
    }
}
