//! Searching layouts: nothing is left out, and the number of threads changes nothing.

mod costs;

use costs::Described;
use model::catalogue;
use plan::search::{Family, Outcome, Problem, calculon, search};
use plan::{Batch, PartialLayout, Shard, TensorOverlap, memory};
use units::Bytes;

const OVERLAPS: [TensorOverlap; 1] = [TensorOverlap::WeightGradients];

fn found(given: &PartialLayout, model: &str, ranks: u32, threads: usize) -> Outcome {
    let problem = Problem {
        config: catalogue::find(model).expect("a model of the catalogue"),
        batch: Batch { sequence: 8192, global_batch: 64 },
        ranks,
        given,
        capacity: Bytes(80 << 30),
        memory: memory::Options::default(),
        domain: 8,
        overlaps: &OVERLAPS,
    };
    search(&problem, &Described::new("dgx-h100-quantum2"), threads, &|_| true)
        .expect("every layout has a price")
}

fn halves() -> PartialLayout {
    PartialLayout {
        context: Some(1),
        sequence_parallel: Some(true),
        parameter_bytes: Some(2),
        activation_bytes: Some(2),
        ..PartialLayout::default()
    }
}

#[test]
fn threads_change_nothing() {
    let [one, two] = [1, 2].map(|threads| found(&halves(), "llama-3.1-8b", 16, threads));
    assert!(one.families.len() > 50, "{}", one.families.len());
    assert_eq!(one, two);
}

#[test]
fn what_is_found_can_be_lowered_and_fits() {
    for (model, ranks) in [("llama-3.1-70b", 32), ("mixtral-8x7b", 16)] {
        let outcome = found(&halves(), model, ranks, 2);
        let config = catalogue::find(model).unwrap();
        let batch = Batch { sequence: 8192, global_batch: 64 };
        let footprint = memory::Footprint::new(config);
        let options = memory::Options::default();
        for found in outcome.families.iter().step_by(outcome.families.len() / 40 + 1) {
            assert_eq!(found.layout.check(config, &batch), Ok(()), "{:?}", found.layout);
            let peak = footprint.peak(&found.layout, &batch, &options);
            assert_eq!(peak.total(), found.memory.total(), "{:?}", found.layout);
            assert_eq!(found.layout.mesh.ranks(), ranks);
            let told = PartialLayout::of(&found.layout).complete(config, &batch, ranks);
            assert_eq!(told.as_ref(), Ok(&found.layout));
        }
    }
}

#[test]
fn what_is_given_is_kept() {
    let given = PartialLayout { tensor: Some(4), shard: Some(Shard::Parameters), ..halves() };
    let outcome = found(&given, "llama-3.1-8b", 16, 2);
    let kept = |family: Family| family.degrees[0] == 4 && family.shard.0 == Shard::Parameters;
    assert!(!outcome.families.is_empty());
    assert!(outcome.families.iter().all(|found| kept(Family::of(&found.layout))));
}

#[test]
fn a_search_that_is_stopped_says_so_and_keeps_what_it_has() {
    let given = halves();
    let problem = Problem {
        config: catalogue::find("llama-3.1-8b").unwrap(),
        batch: Batch { sequence: 8192, global_batch: 64 },
        ranks: 16,
        given: &given,
        capacity: Bytes(80 << 30),
        memory: memory::Options::default(),
        domain: 8,
        overlaps: &OVERLAPS,
    };
    let pricing = Described::new("dgx-h100-quantum2");
    let outcome = search(&problem, &pricing, 1, &|progress| progress.done < 2).unwrap();
    assert!(outcome.stopped && !outcome.families.is_empty());
}

#[test]
fn where_nothing_fits_the_nearest_is_told() {
    let outcome = found(&halves(), "llama-3.1-405b", 8, 2);
    assert_eq!((outcome.fitting, outcome.families.len()), (0, 0));
    let (_, memory) = outcome.least.unwrap();
    assert!(memory.total() > Bytes(80 << 30));
}

/// 1,031,448 candidates for GPT-3 175B on 4,096 ranks without a second memory tier, as Calculon's
/// own enumeration counts them; here on 16 ranks with a batch of 16.
#[test]
fn the_space_of_calculon_is_enumerated_as_it_does() {
    let space = calculon::Space {
        config: catalogue::find("gpt-3-175b").unwrap(),
        ranks: 16,
        batch: Batch { sequence: 2048, global_batch: 16 },
        capacity: Bytes(640 << 30),
        memory: memory::Options::default(),
    };
    let near = Described::new("dgx-h100-quantum2");
    let far = near.without_domains();
    let tally = calculon::judge_all(&space, [&near, &far]).unwrap();
    assert_eq!(tally.judged, 141_130);
    assert!(tally.fitting > 0 && tally.fitting < tally.judged);
}
