//! The microbatches of a step, from the token file.

use std::ops::Range;

use compute::Microbatch;
use data::{Sampler, TokenFile};
use program::Program;
use units::Rank;

use crate::Error;

/// Reads what each rank trains on.
#[derive(Debug)]
pub struct Batches {
    file: TokenFile,
    sampler: Sampler,
    held_out: Vec<Range<u64>>,
}

impl Batches {
    /// Batches of `file` in the order of `sampler`.
    #[must_use]
    pub fn new(file: TokenFile, sampler: Sampler) -> Self {
        Self { file, sampler, held_out: sampler.evaluation_windows().collect() }
    }

    /// Tokens in the file.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.file.tokens()
    }

    /// What tells these tokens from others.
    #[must_use]
    pub fn fingerprint(&self) -> u64 {
        let fingerprint = self.file.fingerprint();
        (fingerprint >> 64) as u64 ^ fingerprint as u64
    }

    /// Windows held out for evaluation.
    #[must_use]
    pub fn held_out(&self) -> u64 {
        self.held_out.len() as u64
    }

    /// The microbatches of `rank` in a training step: the same tokens for every layout.
    ///
    /// # Errors
    /// When the token file cannot be read.
    pub fn step(&self, program: &Program, rank: Rank, step: u64) -> Result<Vec<Microbatch>, Error> {
        let first = step * program.global_batch();
        self.read(program, rank, |position| self.sampler.train_window(first + position))
    }

    /// The microbatches of `rank` in an evaluation; a batch larger than what was held out goes
    /// round it again.
    ///
    /// # Errors
    /// When the token file cannot be read.
    pub fn evaluation(&self, program: &Program, rank: Rank) -> Result<Vec<Microbatch>, Error> {
        let count = self.held_out();
        self.read(program, rank, |position| self.held_out[(position % count) as usize].clone())
    }

    fn read(
        &self,
        program: &Program,
        rank: Rank,
        window: impl Fn(u64) -> Range<u64>,
    ) -> Result<Vec<Microbatch>, Error> {
        let length = program.shape.sequence as usize;
        let mut tokens = vec![0; length + 1];
        let mut microbatch = |index| {
            let (mut words, mut targets) = (Vec::new(), Vec::new());
            for position in program.positions(rank, index) {
                self.file.window(window(position).start, &mut tokens)?;
                words.extend_from_slice(&tokens[..length]);
                targets.extend_from_slice(&tokens[1..]);
            }
            Ok(Microbatch { words, targets })
        };
        (0..program.microbatches).map(&mut microbatch).collect()
    }
}
