//! What a planner pays for memory: `cargo bench -p plan --bench memory`.

use divan::{Bencher, black_box};
use model::catalogue;
use plan::memory::{Footprint, Options};
use plan::{Batch, Layout, Shard};
use program::Mesh;

const MODELS: [&str; 2] = ["llama-3.1-405b", "deepseek-v3"];

fn main() {
    divan::main();
}

fn layout() -> (Layout, Batch) {
    let mesh = Mesh { tensor: 8, context: 2, data: 64, pipeline: 8, ..Mesh::ONE };
    let layout = Layout { virtual_stages: 8, ..Layout::new(mesh, 1, Shard::Optimizer) };
    (layout, Batch { sequence: 8192, global_batch: 1536 })
}

/// Counting a model, once for all layouts.
#[divan::bench(args = MODELS)]
fn count(bencher: Bencher, model: &str) {
    let config = catalogue::find(model).expect("a model of the catalogue");
    bencher.bench(|| Footprint::new(black_box(config)));
}

/// The fullest of eight stages with eight virtual stages each.
#[divan::bench(args = MODELS)]
fn peak(bencher: Bencher, model: &str) {
    let footprint = Footprint::new(catalogue::find(model).expect("a model of the catalogue"));
    let (layout, batch) = layout();
    let options = Options::default();
    bencher.bench(|| footprint.peak(black_box(&layout), &batch, &options));
}
