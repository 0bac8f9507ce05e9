//! How fast layouts are judged: `cargo bench -p plan --bench search`.

#[path = "../tests/costs/mod.rs"]
mod costs;

use costs::Described;
use divan::Bencher;
use divan::counter::ItemsCount;
use model::catalogue;
use plan::search::{Problem, calculon, search};
use plan::{Batch, PartialLayout, TensorOverlap, memory};
use units::Bytes;

fn main() {
    divan::main();
}

/// GPT-3 175B on 4,096 A100, all 1,031,448 candidates of Calculon's own enumeration, on one core.
#[divan::bench(sample_count = 3, sample_size = 1)]
fn calculon_space(bencher: Bencher) {
    let space = calculon::Space {
        config: catalogue::find("gpt-3-175b").expect("a model of the catalogue"),
        ranks: 4096,
        batch: Batch { sequence: 2048, global_batch: 4096 },
        capacity: Bytes(80 << 30),
        memory: memory::Options::default(),
    };
    let near = Described::new("dgx-a100-hdr");
    let far = near.without_domains();
    let all = || calculon::judge_all(&space, [&near, &far]).expect("every candidate has a price");
    let tally = all();
    println!("{} candidates, {} fit", tally.judged, tally.fitting);
    bencher.counter(ItemsCount::new(tally.judged)).bench_local(all);
}

/// Llama 3.1 405B on 8,192 H100, everything searched, on two cores.
#[divan::bench(sample_count = 3, sample_size = 1)]
fn llama_405b(bencher: Bencher) {
    let bytes = PartialLayout {
        parameter_bytes: Some(2),
        activation_bytes: Some(2),
        ..PartialLayout::default()
    };
    let problem = Problem {
        config: catalogue::find("llama-3.1-405b").expect("a model of the catalogue"),
        batch: Batch { sequence: 8192, global_batch: 1536 },
        ranks: 8192,
        given: &bytes,
        capacity: Bytes(80 << 30),
        memory: memory::Options::default(),
        domain: 8,
        overlaps: &[TensorOverlap::WeightGradients],
    };
    let pricing = Described::new("dgx-h100-quantum2");
    let all = || search(&problem, &pricing, 2, &|_| true).expect("every layout has a price");
    let outcome = all();
    println!(
        "{} layouts, {} fit, {} families",
        outcome.judged,
        outcome.fitting,
        outcome.families.len()
    );
    for found in outcome.families.iter().take(5) {
        println!("{:.4} {} {:?}", found.estimate.step_time.0, found.memory.total(), found.layout);
    }
    bencher.counter(ItemsCount::new(outcome.judged)).bench_local(all);
}
