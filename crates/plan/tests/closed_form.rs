//! The closed form against the event simulation, over random layouts.

mod costs;

use costs::Described;
use model::catalogue;
use plan::estimate::estimate;
use plan::{
    Batch, ContextExchange, Layout, PartialLayout, Recompute, Schedule, Shard, TensorOverlap,
    Timing, lower,
};

/// How many layouts are drawn.
const DRAWN: u32 = 100;

/// Numbers that only seem to be drawn (Knuth's linear congruential generator).
struct Draws(u64);

impl Draws {
    fn of<T: Clone>(&mut self, choices: &[T]) -> T {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        choices[(self.0 >> 33) as usize % choices.len()].clone()
    }
}

fn draw(draws: &mut Draws) -> (&'static str, u32, Batch, Layout) {
    loop {
        let model = draws.of(&[
            "llama-3.1-8b",
            "llama-3.1-70b",
            "llama-3.1-405b",
            "gpt-3-175b",
            "mixtral-8x7b",
            "deepseek-v3",
        ]);
        let config = catalogue::find(model).expect("a model of the catalogue");
        let accelerators = draws.of(&[64, 128, 256, 512]);
        let batch = Batch {
            sequence: draws.of(&[2048, 4096, 8192]),
            global_batch: draws.of(&[64, 128, 256]),
        };
        let virtual_stages = draws.of(&[1, 1, 2, 4]);
        let pipeline = draws.of(&[1, 2, 4, 8, 16]);
        let flag = |draws: &mut Draws| draws.of(&[None, Some(true)]);
        let partial = PartialLayout {
            tensor: Some(draws.of(&[1, 2, 4, 8])),
            context: Some(draws.of(&[1, 1, 2, 4])),
            pipeline: Some(pipeline),
            virtual_stages: Some(virtual_stages),
            expert: config.experts.is_some().then(|| draws.of(&[1, 4, 8])),
            micro_batch: Some(draws.of(&[1, 1, 2])),
            shard: Some(draws.of(&[
                Shard::None,
                Shard::Optimizer,
                Shard::Optimizer,
                Shard::Gradients,
                Shard::Parameters,
            ])),
            schedule: draws.of(&[None, None, Some(Schedule::Gpipe), Some(Schedule::ZeroBubble)]),
            embedding_is_layer: flag(draws),
            head_is_layer: flag(draws),
            recompute: Some(draws.of(&[
                Recompute::None,
                Recompute::Full,
                Recompute::Selective,
                Recompute::Layers(1),
            ])),
            context_exchange: Some(draws.of(&[ContextExchange::AllGather, ContextExchange::Ring])),
            tensor_overlap: Some(draws.of(&[
                TensorOverlap::WeightGradients,
                TensorOverlap::None,
                TensorOverlap::Pieces(2),
            ])),
            gradient_reduction: Some(draws.of(&[
                Timing::Overlapped,
                Timing::Overlapped,
                Timing::Exposed,
            ])),
            parameter_gathering: Some(draws.of(&[
                Timing::Overlapped,
                Timing::Overlapped,
                Timing::Exposed,
            ])),
            parameter_bytes: Some(2),
            activation_bytes: Some(2),
            ..PartialLayout::default()
        };
        let Ok(layout) = partial.complete(config, &batch, accelerators) else { continue };
        return (model, accelerators, batch, layout);
    }
}

#[test]
fn the_closed_form_is_close_to_the_event_simulation() {
    let described = Described::new("dgx-h100-quantum2");
    let mut draws = Draws(1);
    let error = |_| {
        let (model, accelerators, batch, layout) = draw(&mut draws);
        let config = catalogue::find(model).unwrap();
        let program = lower(config, &layout, &batch).unwrap();
        let truth = described.simulate(&program);
        let estimate = estimate(config, &layout, &batch, &described).unwrap();
        let error = estimate.step_time / truth - 1.0;
        println!(
            "{:+.2} % {truth} {model} on {accelerators}: {layout:?} {estimate:?}",
            100.0 * error
        );
        error.abs()
    };
    let mut errors: Vec<f64> = (0..DRAWN).map(error).collect();
    errors.sort_by(f64::total_cmp);
    let at = |share: f64| errors[((errors.len() - 1) as f64 * share) as usize];
    let mean = errors.iter().sum::<f64>() / errors.len() as f64;
    println!("median {:.4}, mean {mean:.4}, 90th {:.4}, worst {:.4}", at(0.5), at(0.9), at(1.0));
    assert!(at(0.5) < 0.01 && mean < 0.025 && at(0.9) < 0.08 && at(1.0) < 0.25, "{errors:?}");
}
