//! The microbatches of a step, from the token file.

use std::ops::Range;

use compute::Microbatch;
use data::{Sampler, TokenFile};
use program::{Axis, Program};
use units::Rank;

use crate::Error;

/// Reads what each rank trains on.
#[derive(Debug)]
pub struct Batches {
    file: TokenFile,
    sampler: Sampler,
    held_out: Vec<Range<u64>>,
    /// The token that ends a document, if none is to see another.
    end_of_text: Option<u32>,
}

impl Batches {
    /// Batches of `file` in the order of `sampler`.
    #[must_use]
    pub fn new(file: TokenFile, sampler: Sampler) -> Self {
        let held_out = sampler.evaluation_windows().collect();
        Self { file, sampler, held_out, end_of_text: None }
    }

    /// The same, where the tokens of a document see nothing before its first: documents end with
    /// `end_of_text`.
    #[must_use]
    pub fn masking(self, end_of_text: u32) -> Self {
        Self { end_of_text: Some(end_of_text), ..self }
    }

    /// Tokens in the file.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.file.tokens()
    }

    /// The file that they are read from.
    #[must_use]
    pub fn path(&self) -> &std::path::Path {
        self.file.path()
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

    /// Windows to train on before any comes again.
    #[must_use]
    pub fn windows_per_epoch(&self) -> u64 {
        self.sampler.windows_per_epoch()
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
        let place = program.mesh.coordinate(rank, Axis::Context);
        let own = program.shape.token_ranges(u64::from(place));
        let own = own.map(|range| range.start as usize..range.end as usize);
        let mut tokens = vec![0; length + 1];
        let mut microbatch = |index| {
            let mut microbatch = Microbatch::default();
            for position in program.positions(rank, index) {
                self.file.window(window(position).start, &mut tokens)?;
                let starts = self.end_of_text.map(|end| document_starts(&tokens[..length], end));
                for range in own.clone() {
                    microbatch.words.extend_from_slice(&tokens[range.clone()]);
                    microbatch.targets.extend_from_slice(&tokens[range.start + 1..=range.end]);
                    if let Some(starts) = &starts {
                        microbatch.starts.extend_from_slice(&starts[range]);
                    }
                }
            }
            Ok(microbatch)
        };
        (0..program.microbatches).map(&mut microbatch).collect()
    }
}

/// Where the document of every token begins within these tokens. The end of a text belongs to it.
fn document_starts(tokens: &[u32], end_of_text: u32) -> Vec<u32> {
    let mut start = 0;
    let of_token = |(index, token): (usize, &u32)| {
        let own = start;
        if *token == end_of_text {
            start = index as u32 + 1;
        }
        own
    };
    tokens.iter().enumerate().map(of_token).collect()
}
