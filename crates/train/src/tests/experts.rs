//! Mixtures of experts: however ranks share them, they train the same.

use model::{Experts, Scoring};
use plan::{ContextExchange, Recompute, TensorOverlap};

use super::*;

/// Mixtral's experts in every layer.
pub fn mixtral() -> Job {
    with_experts(config(false), Experts::new(4, 2, 24))
}

/// DeepSeek-V3's: out of groups, by biased sigmoids, beside a shared one; the first layer is dense.
/// Its attention too.
fn deepseek() -> Job {
    let experts = Experts {
        shared_width: 16,
        dense_layers: 1,
        scoring: Scoring::Sigmoid,
        groups: 2,
        groups_per_token: 1,
        scale: 2.5,
        balance_rate: 1e-2,
        ..Experts::new(8, 2, 16)
    };
    with_experts(latent_config(), experts)
}

/// DeepSeek-V2's: out of groups, by softmax among all.
fn deepseek_v2() -> Job {
    let experts = Experts {
        shared_width: 32,
        dense_layers: 1,
        scoring: Scoring::SoftmaxOfAll,
        groups: 4,
        groups_per_token: 2,
        scale: 2.0,
        ..Experts::new(8, 2, 16)
    };
    with_experts(latent_config(), experts)
}

/// Qwen3's: in every other layer, whose attention norms queries and keys.
fn qwen() -> Job {
    let config = Config { query_key_norm: true, ..config(false) };
    with_experts(config, Experts { every: 2, ..Experts::new(4, 2, 24) })
}

fn with_experts(config: Config, experts: Experts) -> Job {
    let config = Config { experts: Some(experts), feed_forward: 24, ..config };
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
    let biases = |(block, values): &(Block, Vec<f32>)| {
        let bias =
            config.parameters(*block).into_iter().find(|p| p.role == model::Role::RouterBias);
        bias.map_or(vec![], |bias| values[bias.range()].to_vec())
    };
    let moved: Vec<f32> = trained.parameters.iter().flat_map(biases).collect();
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
            context_exchange: ContextExchange::Ring,
            tensor_overlap: TensorOverlap::Pieces(2),
            recompute: Recompute::Segments(vec![model::Segment::Qkv, model::Segment::Attend]),
            ..with(mesh(2, 2, 2, 1), 2, Shard::Gradients)
        },
        Layout {
            schedule: Schedule::ZeroBubble,
            recompute: Recompute::Full,
            ..with(mesh(1, 1, 2, 2), 2, Shard::Optimizer)
        },
        Layout {
            schedule: Schedule::Interleaved,
            virtual_stages: 2,
            recompute: Recompute::Segments(vec![model::Segment::Experts]),
            ..with(mesh(1, 1, 4, 2), 4, Shard::Parameters)
        },
    ]
}

#[test]
fn other_ways_to_route_change_nothing_either() {
    for job in [deepseek_v2(), qwen()] {
        let layouts = with_other_axes().into_iter().skip(4);
        trains_the_same(&job, layouts.chain([spread(2, layout(2, 2, 2, Shard::Optimizer))]));
    }
}

#[test]
fn expert_parallelism_goes_with_every_other_axis() {
    for job in [mixtral(), deepseek()] {
        trains_the_same(&job, with_other_axes());
    }
}

/// Shared experts read what the router and the routed experts read, in passes at other times.
#[test]
fn experts_go_with_split_backward_passes_over_a_split_sequence() {
    let mesh = |data| Mesh { tensor: 2, data, pipeline: 2, ..Mesh::ONE };
    // Some turns are whole, and weights wait for long.
    let written = "0F0,0F1,0F2,0F3,0I0,0I1,0W0,0I2,0W1,0I3,0W2,0W3,\
                   0F4,0I4,0F5,0F6,0F7,0I5,0I6,0I7,0W4,0W5,0W6,0W7\n\
                   1F0,1I0,1F1,1I1,1W0,1F2,1B2,1F3,1I3,1W3,1W1,\
                   1F4,1I4,1F5,1B5,1F6,1F7,1B6,1I7,1W7,1W4\n";
    let recomputes = [Recompute::None, Recompute::Full, Recompute::Selective];
    let layouts = recomputes.into_iter().flat_map(|recompute| {
        let schedules = [
            (Schedule::ZeroBubble, 1, mesh(2)),
            (Schedule::ZeroBubble, 2, mesh(1)),
            (Schedule::Text(written.to_owned()), 1, mesh(1)),
        ];
        schedules.map(|(schedule, virtual_stages, mesh)| Layout {
            schedule,
            virtual_stages,
            recompute: recompute.clone(),
            sequence_parallel: true,
            ..Layout::new(mesh, 1, Shard::None)
        })
    });
    trains_the_same(&deepseek(), layouts);
}

#[test]
fn experts_change_no_bit_when_repeated() {
    let job = deepseek();
    let with_others = with_other_axes().into_iter().skip(4).take(2);
    for layout in with_others.chain([spread(4, layout(4, 1, 1, Shard::Gradients))]) {
        assert!(train(&job, &layout) == train(&job, &layout), "{layout:?}");
    }
}
