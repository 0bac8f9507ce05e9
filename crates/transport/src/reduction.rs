//! Sums and copies of elements that lie in memory of several processes.
//!
//! A peer that keeps to the protocol does not write what is read here, nor read what is written, before it
//! is told to. One that does not gives wrong numbers, as all bits are numbers; nothing else comes of it.

/// How many elements are taken at a time: what is then read again is still in the first cache.
const BLOCK: usize = 2048;

/// From how many elements on a copy goes past the caches: 16 MiB.
const STREAMED: usize = 4 << 20;

/// Adds the sources to `sum` in their order, and puts the result to every other place as well, all in one
/// pass over memory.
///
/// # Safety
/// All have `sum.len()` elements in memory that is mapped for as long as this takes. `sum` overlaps with none
/// of them.
#[expect(unsafe_code, reason = "the elements lie in memory of several processes")]
pub(crate) unsafe fn reduce(sum: &mut [f32], sources: &[*const f32], places: &[*mut f32]) {
    for (index, block) in sum.chunks_mut(BLOCK).enumerate() {
        let start = index * BLOCK;
        for source in sources {
            // SAFETY: inside the source, by the caller's promise; a place may be the same memory, but
            // is written below only, when this reference has ended.
            add(block, unsafe { std::slice::from_raw_parts(source.add(start), block.len()) });
        }
        for place in places {
            // SAFETY: inside the place, which does not overlap with `sum`, by the caller's promise.
            unsafe {
                std::ptr::copy_nonoverlapping(block.as_ptr(), place.add(start), block.len());
            }
        }
    }
}

/// Copies elements. Very many go past the caches, which could not keep them, so that memory need not be read
/// before it is written: 9.0 against 6.5 GB/s a core (128 MiB, Sapphire Rapids under KVM, November 2026).
///
/// # Safety
/// `from` has `to.len()` elements in memory that is mapped for as long as this takes, and does not overlap.
#[expect(unsafe_code, reason = "the elements lie in memory of several processes")]
pub(crate) unsafe fn copy(to: &mut [f32], from: *const f32) {
    #[cfg(target_arch = "x86_64")]
    if to.len() >= STREAMED && is_x86_feature_detected!("avx") {
        // SAFETY: it has AVX; the rest by the caller's promise.
        return unsafe { stream(to, from) };
    }
    // SAFETY: by the caller's promise.
    unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) };
}

/// Copies elements past the caches.
///
/// # Safety
/// As [`copy`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
#[expect(unsafe_code, reason = "the elements lie in memory of several processes")]
unsafe fn stream(to: &mut [f32], from: *const f32) {
    use std::arch::x86_64::{__m256, _mm_sfence, _mm256_loadu_ps, _mm256_stream_ps};
    // SAFETY: any eight numbers are such a vector.
    let (head, body, tail) = unsafe { to.align_to_mut::<[__m256; 2]>() };
    let (before, inside) = (head.len(), 16 * body.len());
    // SAFETY: the three parts lie behind each other, as do those of `from`, which is as long.
    unsafe {
        std::ptr::copy_nonoverlapping(from, head.as_mut_ptr(), before);
        for (index, line) in body.iter_mut().enumerate() {
            let from = from.add(before + 16 * index);
            let place: *mut f32 = line.as_mut_ptr().cast();
            _mm256_stream_ps(place, _mm256_loadu_ps(from));
            _mm256_stream_ps(place.add(8), _mm256_loadu_ps(from.add(8)));
        }
        let from = from.add(before + inside);
        std::ptr::copy_nonoverlapping(from, tail.as_mut_ptr(), tail.len());
    }
    // What is told to peers from now on comes after.
    _mm_sfence();
}

/// Adds elements, as wide as the processor can.
pub(crate) fn add(sum: &mut [f32], more: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            #[expect(unsafe_code, reason = "what the processor can was looked up")]
            // SAFETY: it has AVX-512.
            return unsafe { add_avx512(sum, more) };
        }
        if is_x86_feature_detected!("avx2") {
            #[expect(unsafe_code, reason = "what the processor can was looked up")]
            // SAFETY: it has AVX2.
            return unsafe { add_avx2(sum, more) };
        }
    }
    add_simply(sum, more);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn add_avx512(sum: &mut [f32], more: &[f32]) {
    add_simply(sum, more);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn add_avx2(sum: &mut [f32], more: &[f32]) {
    add_simply(sum, more);
}

#[inline(always)]
fn add_simply(sum: &mut [f32], more: &[f32]) {
    sum.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn sums_have_the_bits_of_their_order(
            length in 0_usize..10_000,
            count in 0_usize..4,
        ) {
            let input = |salt: usize| -> Vec<f32> {
                (0..length).map(|i| 1.0 / (1 + (i * 7 + salt * 31) % 1009) as f32).collect()
            };
            let sources: Vec<_> = (1..=count).map(input).collect();
            let mut places = vec![vec![0.0; length]; 2];
            let mut sum = input(0);
            let mut expected = input(0);
            for source in &sources {
                expected.iter_mut().zip(source).for_each(|(sum, more)| *sum += more);
            }
            let from: Vec<_> = sources.iter().map(|source| source.as_ptr()).collect();
            let to: Vec<_> = places.iter_mut().map(|place| place.as_mut_ptr()).collect();
            #[expect(unsafe_code, reason = "the function asks for it")]
            // SAFETY: all are vectors of their own, of one length.
            unsafe {
                reduce(&mut sum, &from, &to);
            }
            prop_assert!(sum == expected && places.iter().all(|place| *place == expected));
            #[expect(unsafe_code, reason = "the function asks for it")]
            // SAFETY: as above.
            unsafe {
                copy(&mut places[0], from.first().copied().unwrap_or(sum.as_ptr()));
            }
            prop_assert!(places[0] == *sources.first().unwrap_or(&sum));
        }
    }

    #[test]
    fn copies_past_the_caches_are_whole() {
        for (start, short) in [(0, 0), (1, 0), (3, 5), (15, 17)] {
            let from: Vec<f32> = (0..STREAMED + 40).map(|i| i as f32).collect();
            let mut to = vec![0.0; STREAMED + 40];
            let length = STREAMED + 20 - short;
            #[expect(unsafe_code, reason = "the function asks for it")]
            // SAFETY: both vectors are longer.
            unsafe {
                copy(&mut to[start..start + length], from[2..].as_ptr());
            }
            assert!(to[start..start + length] == from[2..2 + length]);
            assert!(to[..start].iter().chain(&to[start + length..]).all(|rest| *rest == 0.0));
        }
    }
}
