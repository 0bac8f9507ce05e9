//! The binary and the repository, held to what they promise.

#![expect(clippy::unwrap_used, reason = "a test may panic on its own files")]

mod bad_input;
mod bench;
mod book;
mod catalogue;
mod dashboards;
mod launch;
mod machine;
mod place;
mod plan_and_simulate;
mod report;
mod repository;
mod scale;
mod score;
mod survive;
mod together;
mod train;
mod validate;
