//! Elements of other types than fp32 in buffers, which are made of words as long as an fp32's.

use bytemuck::Pod;
use half::{bf16, f16};

/// What a buffer's words are made of. Where elements are longer than a word, the chunks of a collective
/// must not cut them; where they are shorter, a buffer ends with as many as fill its last word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "these are their names everywhere")]
pub enum Element {
    F64,
    F32,
    F16,
    Bf16,
    I64,
    I32,
    I16,
    I8,
    U8,
}

/// What two elements become.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Combine {
    /// Their sum; of integers, without the digits that are too many.
    Sum,
    /// Their product, likewise.
    Product,
    /// The lower; no number if one is none.
    Minimum,
    /// The higher; no number if one is none.
    Maximum,
    /// The bits that both have, of integers alone.
    And,
    /// The bits that one has, of integers alone.
    Or,
    /// The bits that only one has, of integers alone.
    Xor,
}

/// How a collective reduces. Two-byte numbers are combined in fp32 and rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Reduction {
    /// What is combined.
    pub element: Element,
    /// How.
    pub combine: Combine,
}

impl Element {
    /// How long an element is, in bytes.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::Bf16 | Self::I16 => 2,
            Self::I8 | Self::U8 => 1,
        }
    }

    /// How many bytes are combined at least, since a buffer is made of words.
    pub(crate) const fn unit(self) -> usize {
        if self.bytes() > 4 { self.bytes() } else { 4 }
    }

    const fn is_integer(self) -> bool {
        !matches!(self, Self::F64 | Self::F32 | Self::F16 | Self::Bf16)
    }
}

impl Reduction {
    /// What collectives do unless told otherwise.
    pub const SUM: Self = Self { element: Element::F32, combine: Combine::Sum };

    /// Whether there is such a reduction: numbers with a fraction have no bits to speak of.
    #[must_use]
    pub const fn exists(self) -> bool {
        let bits = matches!(self.combine, Combine::And | Combine::Or | Combine::Xor);
        !bits || self.element.is_integer()
    }

    /// Combines the elements in `into` with those in `more`, which has as many.
    pub(crate) fn apply(self, into: &mut [f32], more: &[f32]) {
        if self == Self::SUM {
            return into.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
        }
        let (into, more) = (bytemuck::cast_slice_mut(into), bytemuck::cast_slice(more));
        let how = self.combine;
        match self.element {
            Element::F64 => each(into, more, |a: f64, b| a.combined(b, how)),
            Element::F32 => each(into, more, |a: f32, b| a.combined(b, how)),
            Element::F16 => each(into, more, |a, b| {
                let [a, b] = [a, b].map(|bits| f16::from_bits(bits).to_f32());
                f16::from_f32(a.combined(b, how)).to_bits()
            }),
            Element::Bf16 => each(into, more, |a, b| {
                let [a, b] = [a, b].map(|bits| bf16::from_bits(bits).to_f32());
                bf16::from_f32(a.combined(b, how)).to_bits()
            }),
            Element::I64 => each(into, more, |a: i64, b| a.combined(b, how)),
            Element::I32 => each(into, more, |a: i32, b| a.combined(b, how)),
            Element::I16 => each(into, more, |a: i16, b| a.combined(b, how)),
            Element::I8 => each(into, more, |a: i8, b| a.combined(b, how)),
            Element::U8 => each(into, more, |a: u8, b| a.combined(b, how)),
        }
    }
}

/// Combines elements wherever they lie.
fn each<T: Pod>(into: &mut [u8], more: &[u8], combined: impl Fn(T, T) -> T) {
    let width = size_of::<T>();
    for (into, more) in into.chunks_exact_mut(width).zip(more.chunks_exact(width)) {
        let [a, b] = [&*into, more].map(bytemuck::pod_read_unaligned);
        into.copy_from_slice(bytemuck::bytes_of(&combined(a, b)));
    }
}

trait Number {
    fn combined(self, other: Self, how: Combine) -> Self;
}

macro_rules! fractions {
    ($($fraction:ty)*) => { $(impl Number for $fraction {
        fn combined(self, other: Self, how: Combine) -> Self {
            match how {
                Combine::Sum => self + other,
                Combine::Product => self * other,
                Combine::Minimum if self.is_nan() || self < other => self,
                Combine::Maximum if self.is_nan() || self > other => self,
                Combine::Minimum | Combine::Maximum => other,
                Combine::And | Combine::Or | Combine::Xor => unreachable!("{how:?} of fractions"),
            }
        }
    })* };
}
fractions!(f64 f32);

macro_rules! integers {
    ($($integer:ty)*) => { $(impl Number for $integer {
        fn combined(self, other: Self, how: Combine) -> Self {
            match how {
                Combine::Sum => self.wrapping_add(other),
                Combine::Product => self.wrapping_mul(other),
                Combine::Minimum => self.min(other),
                Combine::Maximum => self.max(other),
                Combine::And => self & other,
                Combine::Or => self | other,
                Combine::Xor => self ^ other,
            }
        }
    })* };
}
integers!(i64 i32 i16 i8 u8);

#[cfg(test)]
mod tests {
    use super::*;

    /// Two elements combined, in a buffer of words.
    fn combined<T: Pod>(element: Element, combine: Combine, a: &[T], b: &[T]) -> Vec<T> {
        let words = |elements: &[T]| {
            let mut words = vec![0.0_f32; size_of_val(elements).div_ceil(4)];
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut words);
            bytes[..size_of_val(elements)].copy_from_slice(bytemuck::cast_slice(elements));
            words
        };
        let mut into = words(a);
        Reduction { element, combine }.apply(&mut into, &words(b));
        let bytes: &[u8] = bytemuck::cast_slice(&into);
        bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).take(a.len()).collect()
    }

    #[test]
    fn every_element_is_combined_in_every_way() {
        use Combine::{And, Maximum, Minimum, Or, Product, Sum, Xor};
        // All of these are exact in two bytes.
        let (a, b) = (3.25, -1.5);
        let fractions = [(Sum, 1.75), (Product, -4.875), (Minimum, -1.5), (Maximum, 3.25)];
        for (how, expected) in fractions {
            assert_eq!(combined(Element::F64, how, &[a; 3], &[b; 3]), [expected; 3]);
            let [a, b, expected] = [a, b, expected].map(|number| number as f32);
            assert_eq!(combined(Element::F32, how, &[a; 3], &[b; 3]), [expected; 3]);
            let bits = |number| bf16::from_f32(number).to_bits();
            let found = combined(Element::Bf16, how, &[bits(a); 3], &[bits(b); 3]);
            assert_eq!(found, [bits(expected); 3]);
            let bits = |number| f16::from_f32(number).to_bits();
            let found = combined(Element::F16, how, &[bits(a); 3], &[bits(b); 3]);
            assert_eq!(found, [bits(expected); 3]);
        }
        let integers =
            [(Sum, 16), (Product, 60), (Minimum, 6), (Maximum, 10), (And, 2), (Or, 14), (Xor, 12)];
        for (how, expected) in integers {
            assert_eq!(combined(Element::I64, how, &[6_i64; 3], &[10; 3]), [expected; 3]);
            assert_eq!(combined(Element::I32, how, &[6_i32; 3], &[10; 3]), [expected as i32; 3]);
            assert_eq!(combined(Element::I16, how, &[6_i16; 3], &[10; 3]), [expected as i16; 3]);
            assert_eq!(combined(Element::I8, how, &[6_i8; 3], &[10; 3]), [expected as i8; 3]);
            assert_eq!(combined(Element::U8, how, &[6_u8; 3], &[10; 3]), [expected as u8; 3]);
        }
        assert_eq!(combined(Element::U8, Sum, &[200_u8], &[100]), [44]);
    }

    #[test]
    fn what_is_no_number_stays_so() {
        for (a, b) in [(f64::NAN, 1.0), (1.0, f64::NAN)] {
            for how in [Combine::Sum, Combine::Product, Combine::Minimum, Combine::Maximum] {
                assert!(combined(Element::F64, how, &[a], &[b])[0].is_nan(), "{how:?}");
            }
        }
    }
}
