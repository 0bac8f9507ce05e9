//! `phalanx plan`: the best layouts of a job, and the program that the best becomes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use clap::Args;
use plan::{PartialLayout, lower};
use program::Program;
use serde_json::{Value, json};
use signal_hook::consts::SIGINT;
use signal_hook::flag;
use units::Rank;

use crate::JobArgs;
use crate::carried::{self, Carried};
use crate::described::Costing;
use crate::foreign::settings::launches;
use crate::job::{Draft, Job};
use crate::output::{Progress, print_text, thousands};
use crate::plan_report::{front, lost, reasons, table};
use crate::planner::{Plan, Planned, Planner};

/// What planning takes besides a job.
#[derive(Debug, Args)]
pub struct PlanOptions {
    /// Print every rank's instructions
    #[arg(long)]
    show_program: bool,
    /// How many of the best plans are shown
    #[arg(long, value_name = "PLANS", default_value_t = 10)]
    best: usize,
    #[command(flatten)]
    costing: Costing,
}

/// Prints the best layouts of a job; on this machine the one it has, since it is measured first.
pub fn plan(args: &JobArgs, options: &PlanOptions) -> Result<()> {
    if args.json {
        let answer = until_interrupted(|stop| answer(args, options, stop))?;
        println!("{}", serde_json::to_string_pretty(&answer)?);
        return Ok(());
    }
    let draft = args.draft()?;
    if draft.job().cluster.is_local() {
        return show(&simplest(draft, args)?, options.show_program);
    }
    let planner = Planner::new(&draft, &options.costing)?;
    let planned = until_interrupted(|stop| searched(&planner, args, stop))?;
    print_text(&Report::new(&planner, &planned)?.text(options))
}

/// The object of `--json`.
pub fn answer(args: &JobArgs, options: &PlanOptions, stop: &AtomicBool) -> Result<Value> {
    let draft = args.draft()?;
    if draft.job().cluster.is_local() {
        let job = simplest(draft, args)?;
        return Ok(description(&job, &lowered(&job)?, options.show_program));
    }
    let planner = Planner::new(&draft, &options.costing)?;
    let planned = searched(&planner, args, stop)?;
    Ok(Report::new(&planner, &planned)?.json(options))
}

fn simplest(draft: Draft, args: &JobArgs) -> Result<Job> {
    let layout = draft.simplest().with_context(|| args.job.display().to_string())?;
    Ok(draft.laid_out(layout))
}

/// Runs what stops when the user asks it to.
fn until_interrupted<T>(run: impl FnOnce(&AtomicBool) -> Result<T>) -> Result<T> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let handler = flag::register(SIGINT, Arc::clone(&interrupted))?;
    let outcome = run(&interrupted);
    signal_hook::low_level::unregister(handler);
    outcome
}

/// Plans with progress for who watches, until done or stopped.
fn searched(planner: &Planner, args: &JobArgs, stop: &AtomicBool) -> Result<Planned> {
    let bar = Progress::when_watched("planning", 1000, args.json);
    let planned = planner.plan(&|progress| {
        let share = 1000 * progress.done / progress.of.max(1);
        bar.update(share as u64, &format!("{} layouts", thousands(progress.judged)), None);
        !stop.load(Ordering::Relaxed)
    });
    let planned = planned.with_context(|| args.job.display().to_string())?;
    planner.verify(&planned.plans[0])?;
    Ok(planned)
}

/// What is printed of plans.
struct Report<'p> {
    planner: &'p Planner<'p>,
    planned: &'p Planned,
    job: Job,
    program: Program,
    carried: Vec<Carried>,
}

impl<'p> Report<'p> {
    fn new(planner: &'p Planner<'p>, planned: &'p Planned) -> Result<Self> {
        let layout = planned.plans[0].layout.clone();
        let job = planner.draft.clone().laid_out(layout);
        let program = lowered(&job)?;
        let carried = carried::carried(&planner.described, &program)?;
        Ok(Self { planner, planned, job, program, carried })
    }

    fn best(&self) -> &'p Plan {
        &self.planned.plans[0]
    }

    fn text(&self, options: &PlanOptions) -> String {
        let Self { planner, planned, job, program, .. } = self;
        let outcome = &planned.outcome;
        let stopped =
            if outcome.stopped { "; stopped early, so there may be better ones" } else { "" };
        let mut text = format!(
            "machine        {}\n{}searched       {} layouts, {} fit{stopped}; the best simulated (~ estimated)\n\n",
            planner.described.source(),
            describe(job, program),
            thousands(outcome.judged),
            thousands(outcome.fitting),
        );
        let plans: Vec<&Plan> = planned.plans.iter().take(options.best).collect();
        text += &format!("best plans\n{}\n", table(planner, &plans));
        let list = |title: &str, lines: Vec<String>| {
            let lines: String = lines.iter().map(|line| format!("  {line}\n")).collect();
            format!("{title}\n{lines}\n")
        };
        text += &list("why the first", reasons(planner, self.best(), program));
        text += &list("why not others", self.neighbours());
        let placed = placed(planned);
        if !placed.is_empty() {
            text += &list("axes on the accelerators, from neighbours to far apart", placed);
        }
        text += &format!("transfers of the first\n{}\n", carried::table(&self.carried));
        if let Some(nodes) = self.nodes() {
            text += &list("nodes", nodes);
        }
        text += &format!(
            "no other is better in time, memory, energy and goodput at once\n{}\n",
            table(planner, &front(planned))
        );
        for launch in launches(&job.layout, &job.batch()) {
            let lacks = match launch.lacks.is_empty() {
                true => String::new(),
                false => format!(" (cannot be told: {})", launch.lacks.join(", ")),
            };
            text += &list(&format!("{}{lacks}", launch.trainer), vec![launch.settings.join(" ")]);
        }
        let keys = PartialLayout::of(&job.layout);
        let keys = toml::to_string(&keys).expect("a layout has a TOML form");
        text += &list("the first as [layout]", keys.lines().map(str::to_owned).collect());
        if options.show_program {
            text += &format!("{program}\n");
        }
        text
    }

    /// The nodes that the job goes on, where not all are to be had.
    fn nodes(&self) -> Option<Vec<String>> {
        let fragment = self.job.cluster.fragment().ok()??;
        let counted = [("used", &fragment.nodes), ("spare", &fragment.spare)];
        let line = |(what, nodes): (&str, &Vec<u32>)| format!("{what}: {}", runs(nodes));
        Some(counted.into_iter().map(line).collect())
    }

    fn neighbours(&self) -> Vec<String> {
        let neighbours = self.planned.neighbours.iter();
        neighbours.map(|neighbour| lost(self.best(), neighbour)).collect()
    }

    fn json(&self, options: &PlanOptions) -> Value {
        let Self { planner, planned, job, program, .. } = self;
        let all = |plans: &[&Plan]| -> Vec<Value> {
            plans.iter().map(|plan| figures(planner, plan)).collect()
        };
        let plans: Vec<&Plan> = planned.plans.iter().take(options.best).collect();
        let front: Vec<&Plan> = planned.front.iter().map(|index| &planned.plans[*index]).collect();
        let mut whole = description(job, program, options.show_program);
        let more = json!({
            "machine": planner.described.source(),
            "judged": planned.outcome.judged,
            "fitting": planned.outcome.fitting,
            "stopped": planned.outcome.stopped,
            "plans": all(&plans),
            "front": all(&front),
            "reasons": reasons(planner, self.best(), program),
            "why_not": self.neighbours(),
            "placements": placed(planned),
            "transfers": self.carried,
            "nodes": self.job.cluster.fragment().ok().flatten().map(|fragment| fragment.nodes),
            "launch": launches(&job.layout, &job.batch()),
        });
        if let (Value::Object(whole), Value::Object(more)) = (&mut whole, more) {
            whole.extend(more);
        }
        whole
    }
}

/// What each order of the axes costs.
fn placed(planned: &Planned) -> Vec<String> {
    let Some(best) = planned.placements.first() else { return vec![] };
    let line = |plan: &Plan| {
        let more = 100.0 * (plan.step_time() / best.step_time() - 1.0);
        let name = plan.layout.mesh.placement.name();
        format!("{name}: {}, {more:+.1} %", plan.step_time())
    };
    planned.placements.iter().map(line).collect()
}

/// Numbers with runs of them shortened: `0-31, 33, 40-63`.
fn runs(numbers: &[u32]) -> String {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for number in numbers {
        match runs.last_mut().filter(|(_, last)| last + 1 == *number) {
            Some((_, last)) => *last = *number,
            None => runs.push((*number, *number)),
        }
    }
    let run = |(first, last): (u32, u32)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    runs.into_iter().map(run).collect::<Vec<_>>().join(", ")
}

/// A plan's figures, with units in their keys.
fn figures(planner: &Planner, plan: &Plan) -> Value {
    let mean = plan.breakdown();
    json!({
        "step_time_s": plan.step_time(),
        "simulated": plan.times.is_some(),
        "estimated_step_time_s": plan.estimate.step_time,
        "tokens_per_s_per_accelerator": planner.rate(plan),
        "effective_share": plan.effective,
        "goodput_tokens_per_s_per_accelerator": planner.goodput(plan),
        "compute_s": mean.as_ref().map(|mean| mean.compute),
        "pipeline_bubble_s": mean.as_ref().map(|mean| mean.bubble),
        "exposed_communication_s": mean.as_ref().map(|mean| mean.exposed_communication()),
        "memory_bytes_peak": plan.memory.total(),
        "energy_j": plan.energy,
        "layout": plan.layout,
    })
}

fn description(job: &Job, program: &Program, show_program: bool) -> Value {
    json!({
        "parameters": job.model.parameter_count(),
        "layout": job.layout,
        "ranks": job.layout.mesh.ranks(),
        "microbatches": program.microbatches,
        "flops_per_step": (0..program.classes.len())
            .map(|class| program.flops(class).0 * u64::from(job.layout.mesh.data))
            .sum::<u64>(),
        "program": show_program.then(|| program.to_string()),
    })
}

/// Prints the one layout of a job, and with `show_program` every instruction.
fn show(job: &Job, show_program: bool) -> Result<()> {
    let program = lowered(job)?;
    print!("{}", describe(job, &program));
    for stage in 0..job.layout.mesh.pipeline {
        let first = job.layout.mesh.peer(Rank(0), program::Axis::Pipeline, stage);
        let blocks = program.held_blocks(first);
        let elements: u64 = blocks.iter().map(|block| program.blocks[block]).sum();
        println!(
            "stage {stage}        {} to {}: {} parameters, {} a step, {} handed to transfers",
            blocks[0],
            blocks[blocks.len() - 1],
            thousands(elements),
            program.flops(stage as usize),
            program.transferred(stage as usize),
        );
    }
    if show_program {
        println!("\n{program}");
    }
    Ok(())
}

/// The job's program, proved sound.
pub fn lowered(job: &Job) -> Result<Program> {
    let program = lower(&job.model, &job.layout, &job.batch())?;
    prove(&program);
    Ok(program)
}

/// Proves what was lowered sound.
///
/// # Panics
/// Where it is not: the lowering is wrong.
pub fn prove(program: &Program) {
    assert_eq!(program.verify(), Ok(()), "what is lowered verifies");
}

/// The model and the layout in two lines.
pub fn describe(job: &Job, program: &Program) -> String {
    let model = &job.model;
    format!(
        "model          {} parameters: {} layers, hidden {}, {} heads ({} kv), feed-forward {}, vocabulary {}\n\
         layout         {}\n",
        thousands(model.parameter_count()),
        model.layers,
        model.hidden,
        model.heads,
        model.kv_heads,
        model.feed_forward,
        model.vocabulary,
        describe_layout(job, program),
    )
}

/// The layout in half a sentence.
pub fn describe_layout(job: &Job, program: &Program) -> String {
    let shard = format!("{:?}", job.layout.shard).to_lowercase();
    let apart = match job.layout.local_steps {
        0 => String::new(),
        steps => format!(", {} groups apart for {steps} steps", job.layout.mesh.replicas),
    };
    format!(
        "{}, shard {shard}{apart}, {} microbatch(es) of {} x {} tokens a rank, {} tokens a step",
        job.layout.mesh,
        program.microbatches,
        program.shape.sequences,
        program.shape.sequence,
        thousands(program.global_tokens()),
    )
}
