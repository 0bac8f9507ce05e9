//! The binary and the repository, held to what they promise.

mod bad_input;
mod place;
mod plan_and_simulate;
mod repository;
mod together;
mod train;
