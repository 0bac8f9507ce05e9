//! Plans in words: tables, reasons, and why others lost.

use std::fmt::Write;

use plan::{Layout, Recompute, Schedule, Shard};
use program::{Axis, Program, Work};
use units::{Bytes, Seconds};

use crate::output::{columns, percent, thousands};
use crate::planner::{Neighbour, Plan, Planned, Planner};

/// Rows of the table of a front.
const FRONT_ROWS: usize = 8;

/// What the data axis shares out, and among how many.
pub fn shard(layout: &Layout) -> String {
    let word = format!("{:?}", layout.shard).to_lowercase();
    match layout.mesh.replicas {
        1 => word,
        replicas => format!("{word} in {replicas} replicas"),
    }
}

/// What is computed again.
pub fn recompute(layout: &Layout) -> String {
    match &layout.recompute {
        Recompute::Layers(layers) => format!("{layers} layer(s) a stage"),
        Recompute::Segments(segments) => format!("{} segment(s)", segments.len()),
        other => format!("{other:?}").to_lowercase(),
    }
}

fn schedule(layout: &Layout) -> &'static str {
    match layout.schedule {
        Schedule::Gpipe => "gpipe",
        Schedule::OneForwardOneBackward => "1f1b",
        Schedule::Interleaved => "interleaved",
        Schedule::ZeroBubble => "zero-bubble",
        Schedule::Text(_) => "text",
    }
}

/// A layout in one line.
pub fn short(layout: &Layout) -> String {
    let mesh = &layout.mesh;
    let mut text = format!("data {} x pipeline {}", mesh.data, mesh.pipeline);
    if layout.virtual_stages > 1 {
        write!(text, " ({} stages each)", layout.virtual_stages).expect("a string takes text");
    }
    for (axis, degree) in
        [("context", mesh.context), ("tensor", mesh.tensor), ("expert", mesh.expert)]
    {
        if degree > 1 {
            write!(text, " x {axis} {degree}").expect("a string takes text");
        }
    }
    let (micro_batch, shard, recompute) = (layout.micro_batch, shard(layout), recompute(layout));
    write!(text, ", micro_batch {micro_batch}, shard {shard}, recompute {recompute}")
        .expect("a string takes text");
    text
}

/// The table of the best plans.
pub fn table(planner: &Planner, plans: &[&Plan]) -> String {
    let head = [
        "",
        "step time",
        "tokens/s each",
        "goodput",
        "bubble",
        "memory",
        "energy",
        "data",
        "context",
        "tensor",
        "expert",
        "pipeline",
        "stages each",
        "micro_batch",
        "schedule",
        "shard",
        "recompute",
    ];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for (index, plan) in plans.iter().enumerate() {
        let (layout, mesh) = (&plan.layout, &plan.layout.mesh);
        let time = plan.step_time();
        let bubble = plan.breakdown().map_or(plan.estimate.bubble, |mean| mean.bubble);
        let mark = if plan.times.is_some() { "" } else { "~" };
        rows.push(vec![
            format!("{}.", index + 1),
            format!("{mark}{time}"),
            thousands(planner.rate(plan) as u64),
            thousands(planner.goodput(plan) as u64),
            percent(bubble / time),
            plan.memory.total().to_string(),
            plan.energy.map_or("-".to_owned(), |energy| energy.to_string()),
            mesh.data.to_string(),
            mesh.context.to_string(),
            mesh.tensor.to_string(),
            mesh.expert.to_string(),
            mesh.pipeline.to_string(),
            layout.virtual_stages.to_string(),
            layout.micro_batch.to_string(),
            schedule(layout).to_owned(),
            shard(layout),
            recompute(layout),
        ]);
    }
    columns(&rows)
}

/// The front, thinned to a few rows.
pub fn front(planned: &Planned) -> Vec<&Plan> {
    let step = planned.front.len().div_ceil(FRONT_ROWS).max(1);
    planned.front.iter().step_by(step).map(|index| &planned.plans[*index]).collect()
}

/// Why the best plan is as it is.
pub fn reasons(planner: &Planner, plan: &Plan, program: &Program) -> Vec<String> {
    let mut reasons = Vec::new();
    let (layout, mesh) = (&plan.layout, &plan.layout.mesh);
    let (time, cluster) = (plan.step_time(), &planner.described.roofline.cluster);
    let mean = plan.breakdown().unwrap_or_default();
    let exposed = |axis: Axis| mean.exposed.get(&axis).copied().unwrap_or_default();
    let hidden = |axis: Axis| mean.hidden.get(&axis).copied().unwrap_or_default();
    let shares = |axis: Axis| {
        format!(
            "{} of the step exposed, {} hidden",
            percent(exposed(axis) / time),
            percent(hidden(axis) / time)
        )
    };
    let domain = cluster.domain.accelerators;
    let place = |degree: u32| match degree <= domain {
        true => format!("inside the scale-up domain of {domain}"),
        false => format!("across {} scale-up domains", degree.div_ceil(domain)),
    };
    let each = |axis: Axis| of_layer(program, axis);
    if mesh.tensor > 1 {
        reasons.push(format!(
            "tensor {} keeps its {} a layer and microbatch {}: {}",
            mesh.tensor,
            each(Axis::Tensor),
            place(mesh.tensor),
            shares(Axis::Tensor)
        ));
    }
    if mesh.context > 1 {
        reasons.push(format!(
            "context {} splits each sequence into parts of {} tokens, {} a layer and microbatch {}: {}",
            mesh.context,
            thousands(program.shape.sequence / u64::from(mesh.context)),
            each(Axis::Context),
            place(mesh.tensor * mesh.context),
            shares(Axis::Context)
        ));
    }
    if mesh.expert > 1 {
        reasons.push(format!(
            "expert {} sends {} a layer and microbatch {}: {}",
            mesh.expert,
            each(Axis::Expert),
            place(mesh.expert * mesh.expert_tensor),
            shares(Axis::Expert)
        ));
    }
    if mesh.pipeline > 1 {
        let (p, v, m) = (mesh.pipeline, layout.virtual_stages, program.microbatches);
        let ideal = f64::from(p - 1) / (f64::from(m) * f64::from(v));
        reasons.push(format!(
            "pipeline {p} with {v} stage(s) each and {m} microbatches, {}: {} of the step is bubble (a plain schedule of equal stages has {} of its work)",
            schedule(layout), percent(mean.bubble / time), percent(ideal)
        ));
    }
    if mesh.data * mesh.context > 1 {
        reasons.push(format!(
            "data {} shares out {}: {}",
            mesh.data,
            match layout.shard {
                Shard::None => "nothing, and sums gradients".to_owned(),
                _ => shard(layout),
            },
            shares(Axis::Data)
        ));
    }
    reasons.push(kept(plan, cluster.accelerator.memory));
    reasons
}

/// What memory has to say.
fn kept(plan: &Plan, capacity: Bytes) -> String {
    let again = match plan.layout.recompute {
        Recompute::None => "nothing is computed again".to_owned(),
        _ => format!("computed again: {}", recompute(&plan.layout)),
    };
    format!("{again}; {}", plan.memory.describe(capacity))
}

/// Bytes that a rank hands to transfers along an axis, for each layer and microbatch.
fn of_layer(program: &Program, axis: Axis) -> Bytes {
    let bytes: u64 = program
        .classes
        .iter()
        .flatten()
        .filter_map(|instruction| match instruction {
            program::Instruction::Post { transfer, .. } if transfer.axis == axis => {
                Some(transfer.bytes().0)
            }
            _ => None,
        })
        .sum();
    Bytes(bytes / u64::from(program.microbatches) / u64::from(program.layers))
}

/// Why another value of a key is not better, in a line.
pub fn lost(best: &Plan, Neighbour { key, value, best: other }: &Neighbour) -> String {
    // Like is compared with like.
    let simulated = best.times.is_some() && other.times.is_some();
    let time = |plan: &Plan| if simulated { plan.step_time() } else { plan.estimate.step_time };
    let more = 100.0 * (time(other) / time(best) - 1.0);
    let because = because(best, other, simulated);
    format!("{key} {value}: {more:+.1} % at best ({}): {because}", short(&other.layout))
}

/// Where a step's time goes, by simulation or by the closed form.
fn parts(plan: &Plan, simulated: bool) -> [(&'static str, Seconds); 5] {
    let estimate = &plan.estimate;
    let [computing, within, bubble, data, update] = match plan.breakdown().filter(|_| simulated) {
        Some(mean) => {
            let update = mean.work.get(&Work::Update).copied().unwrap_or_default();
            let exposed = |is: fn(Axis) -> bool| {
                mean.exposed.iter().filter(|(axis, _)| is(**axis)).map(|(_, time)| *time).sum()
            };
            let within =
                exposed(|axis| matches!(axis, Axis::Tensor | Axis::Context | Axis::Expert));
            let data =
                exposed(|axis| matches!(axis, Axis::Data | Axis::Replica | Axis::ExpertData));
            let between = exposed(|axis| matches!(axis, Axis::Pipeline | Axis::PipelineBack));
            [mean.compute - update, within, mean.bubble + between, data, update]
        }
        None => {
            let computing = estimate.computing - estimate.update;
            let within = (estimate.turns - computing).max(Seconds::ZERO);
            [computing, within, estimate.bubble, estimate.data, estimate.update]
        }
    };
    [
        ("computing", computing),
        ("exposed transfers within layers", within),
        ("bubble", bubble),
        ("exposed transfers of the data axis", data),
        ("the update", update),
    ]
}

/// The part of a step that grew most.
fn because(best: &Plan, other: &Plan, simulated: bool) -> String {
    let parts = |plan| parts(plan, simulated).into_iter();
    let grown =
        parts(other).zip(parts(best)).map(|((name, theirs), (_, mine))| (name, theirs - mine));
    let most = grown.max_by(|a, b| a.1.0.total_cmp(&b.1.0));
    match most.filter(|(_, more)| more.0 > 0.0) {
        Some((name, more)) => format!("{name} +{more}"),
        None => "about the same".to_owned(),
    }
}
