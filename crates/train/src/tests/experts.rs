//! Mixtures of experts: however ranks share them, they train the same.

use model::{Experts, Scoring};
use plan::Recompute;

use super::*;

/// Mixtral's experts in every layer.
fn mixtral() -> Job {
    with_experts(Experts::new(4, 2, 24))
}

/// DeepSeek-V3's: out of groups, by biased sigmoids, beside a shared one; the first layer is dense.
fn deepseek() -> Job {
    with_experts(Experts {
        shared_width: 16,
        dense_layers: 1,
        scoring: Scoring::Sigmoid,
        groups: 2,
        groups_per_token: 1,
        scale: 2.5,
        balance_rate: 1e-2,
        ..Experts::new(8, 2, 16)
    })
}

fn with_experts(experts: Experts) -> Job {
    let config = Config { experts: Some(experts), feed_forward: 24, ..config(false) };
    assert_eq!(config.check(), Ok(()));
    Job { config, ..Job::new(false) }
}

fn trains_the_same(job: &Job, layouts: impl IntoIterator<Item = Layout>) {
    let expected = train(job, &job.reference());
    for layout in layouts {
        assert_same(&layout, &train(job, &layout), &expected);
    }
}

#[test]
fn a_mixture_of_experts_learns_and_balances_its_loads() {
    for job in [mixtral(), deepseek()] {
        let trained = train(&job, &job.reference());
        let (first, last) = (trained.steps[0][0], trained.steps[STEPS as usize - 1][0]);
        assert!(last < first - 0.5, "{first} -> {last}");
    }
    let trained = train(&deepseek(), &deepseek().reference());
    let config = &deepseek().config;
    let layer = Block::Layer(1);
    let bias = config.parameters(layer).into_iter().find(|p| p.role == model::Role::RouterBias);
    let (_, values) = trained.parameters.iter().find(|(block, _)| *block == layer).unwrap();
    let moved = &values[bias.unwrap().range()];
    assert!(moved.iter().any(|bias| *bias > 0.0) && moved.iter().any(|bias| *bias < 0.0));
    let steps = moved.iter().map(|bias| bias / 1e-2);
    assert!(steps.clone().all(|steps| (steps - steps.round()).abs() < 1e-3), "{moved:?}");
    assert!(steps.clone().all(|steps| steps.abs() <= STEPS as f32 + 1e-3), "{moved:?}");
}

#[test]
fn data_and_pipelines_change_nothing_with_experts() {
    for job in [mixtral(), deepseek()] {
        let shards = SHARDS.map(|shard| layout(2, 2, 2, shard));
        let accumulated = [layout(1, 1, 2, Shard::None), layout(4, 1, 1, Shard::Gradients)];
        trains_the_same(&job, shards.into_iter().chain(accumulated));
    }
}

#[test]
fn recomputation_changes_no_bit_with_experts() {
    for job in [mixtral(), deepseek()] {
        let kept = layout(2, 2, 2, Shard::Parameters);
        let expected = train(&job, &kept);
        for recompute in [Recompute::Selective, Recompute::Full, Recompute::Layers(1)] {
            let layout = Layout { recompute, ..kept.clone() };
            assert!(train(&job, &layout) == expected, "{layout:?}");
        }
    }
}

/// The layout with its experts spread over `expert` ranks.
fn spread(expert: u32, layout: Layout) -> Layout {
    Layout { mesh: Mesh { expert, ..layout.mesh }, ..layout }
}

#[test]
fn expert_parallel_ranks_change_nothing() {
    for job in [mixtral(), deepseek()] {
        let shards = SHARDS.map(|shard| spread(2, layout(4, 1, 1, shard)));
        let others = [
            spread(2, layout(2, 1, 2, Shard::Optimizer)),
            spread(4, layout(4, 1, 2, Shard::Parameters)),
            spread(4, layout(8, 1, 1, Shard::Gradients)),
            spread(2, layout(4, 2, 1, Shard::Parameters)),
        ];
        trains_the_same(&job, shards.into_iter().chain(others));
    }
    let every_expert_alone = spread(8, layout(8, 1, 1, Shard::Optimizer));
    trains_the_same(&deepseek(), [every_expert_alone]);
}

/// Layouts in which experts meet the other axes.
fn with_other_axes() -> Vec<Layout> {
    let mesh =
        |tensor, context, data, pipeline| Mesh { tensor, context, data, pipeline, ..Mesh::ONE };
    let with = |mesh: Mesh, expert, shard| Layout {
        sequence_parallel: mesh.tensor > 1,
        ..spread(expert, Layout::new(mesh, 1, shard))
    };
    vec![
        with(mesh(2, 1, 1, 1), 2, Shard::None),
        with(mesh(2, 1, 2, 1), 4, Shard::Optimizer),
        with(mesh(2, 1, 2, 2), 2, Shard::Parameters),
        with(mesh(1, 2, 2, 1), 2, Shard::Gradients),
        with(mesh(2, 2, 2, 1), 4, Shard::Parameters),
        Layout {
            schedule: Schedule::ZeroBubble,
            recompute: Recompute::Full,
            ..with(mesh(1, 1, 2, 2), 2, Shard::Optimizer)
        },
        Layout { schedule: Schedule::ZeroBubble, ..with(mesh(2, 1, 2, 2), 2, Shard::Optimizer) },
        Layout {
            schedule: Schedule::Interleaved,
            virtual_stages: 2,
            recompute: Recompute::Segments(vec![model::Segment::Experts]),
            ..with(mesh(1, 1, 4, 2), 4, Shard::Parameters)
        },
    ]
}

#[test]
fn expert_parallelism_goes_with_every_other_axis() {
    for job in [mixtral(), deepseek()] {
        trains_the_same(&job, with_other_axes());
    }
}

#[test]
fn experts_change_no_bit_when_repeated() {
    let job = deepseek();
    for layout in [spread(4, layout(4, 1, 1, Shard::Gradients)), with_other_axes().remove(4)] {
        assert!(train(&job, &layout) == train(&job, &layout), "{layout:?}");
    }
}
