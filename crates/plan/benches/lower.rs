//! Lowering and verifying the program of the largest published run: Llama 3.1 405B on 8,192 ranks.

use model::{Config, catalogue};
use plan::{Batch, Layout, PartialLayout, lower};

fn main() {
    divan::main();
}

/// MLPerf Training 5.0: tensor 8, context 2, pipeline 8 with 8 stages a rank, data 64.
fn run() -> (&'static Config, Layout, Batch) {
    let config = catalogue::find("llama-3.1-405b").unwrap_or_else(|error| panic!("{error}"));
    let batch = Batch { sequence: 8192, global_batch: 1536 };
    let layout = PartialLayout {
        tensor: Some(8),
        context: Some(2),
        pipeline: Some(8),
        virtual_stages: Some(8),
        micro_batch: Some(1),
        embedding_is_layer: Some(true),
        head_is_layer: Some(true),
        ..PartialLayout::default()
    };
    let layout = layout.complete(config, &batch, 8192).unwrap_or_else(|error| panic!("{error}"));
    (config, layout, batch)
}

#[divan::bench]
fn lowers(bencher: divan::Bencher) {
    let (config, layout, batch) = run();
    bencher.bench(|| lower(config, &layout, &batch).map(|program| program.classes.len()));
}

#[divan::bench]
fn verifies(bencher: divan::Bencher) {
    let (config, layout, batch) = run();
    let program = lower(config, &layout, &batch).unwrap_or_else(|error| panic!("{error}"));
    let instructions: usize = program.classes.iter().map(Vec::len).sum();
    println!("{instructions} instructions of {} bytes", size_of::<program::Instruction>());
    bencher.bench(|| program.verify());
}
