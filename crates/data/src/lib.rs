//! From text to the tokens of step k: corpus, tokenizer, token file, sampler.
//!
//! [`prepare`] reads the text that a job names, finds or trains its tokenizer, and leaves one token
//! file in a cache folder. A [`Sampler`] then says which tokens each position of each step reads:
//! a pure function of the seed and a global index, so a run resumes anywhere, and every layout and
//! rank count sees the same text in the same order.
//!
//! Nothing here knows how a batch is spread over ranks, what a model is, or that a network exists.

mod corpus;
mod disk;
mod error;
mod expand;
mod prepare;
mod sampler;
mod tokenizer;
mod tokens;

#[cfg(test)]
mod tests;

pub use corpus::Corpus;
pub use error::Error;
pub use expand::{Environment, expand};
pub use prepare::{Prepared, Progress, Source, Stage, TokenizerSource, prepare};
pub use sampler::{Sampler, Sampling};
pub use tokenizer::{END_OF_TEXT, Tokenizer};
pub use tokens::TokenFile;
