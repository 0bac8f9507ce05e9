//! `phalanx simulate`: one step in virtual time.

use std::path::Path;

use anyhow::{Context, Result};
use program::Program;
use report::{Summary, perfetto, summary_table};
use serde_json::json;
use sim::{Roofline, World, simulate as run};
use units::Joules;

use crate::JobArgs;
use crate::job::Job;
use crate::measured::Machine;
use crate::output::thousands;
use crate::plan_command::{describe, lowered};
use crate::train_command;

/// Prints where the time of a step goes.
pub fn simulate(
    args: &JobArgs,
    machine: Option<&Path>,
    efficiency: f64,
    trace_file: Option<&Path>,
) -> Result<()> {
    let job = Job::read(&args.job, &args.set)?;
    let program = lowered(&job)?;
    let (world, source) = world(args, &job, machine, efficiency)?;
    let trace = run(&program, &world)?;
    let summary = Summary::new(&program, &trace);
    if let Some(path) = trace_file {
        std::fs::write(path, perfetto(&program, &[("predicted", &trace)]))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    let drawn = drawn(&world, &program, &summary);
    let tokens_per_s = program.global_tokens() as f64 / summary.step_time.0;
    if args.json {
        let answer = json!({
            "step_time_s": summary.step_time,
            "tokens_per_s": tokens_per_s,
            "tokens_per_s_per_accelerator": tokens_per_s / f64::from(program.mesh.ranks()),
            "exposed_communication_s": summary.mean.exposed_communication(),
            "pipeline_bubble_s": summary.mean.bubble,
            "compute_s": summary.mean.compute,
            "energy_j": drawn.map(|drawn| drawn.energy),
            "energy_j_per_token": drawn.map(|drawn| drawn.energy_per_token),
            "usd": drawn.and_then(|drawn| drawn.usd),
            "machine": source,
        });
        println!("{}", serde_json::to_string_pretty(&answer)?);
        return Ok(());
    }
    print!("{}", describe(&job, &program));
    println!("machine        {source}\n");
    print!("{}", summary_table(&[("predicted", &summary)]));
    println!("{:<32}{:>12}", "tokens/s", thousands(tokens_per_s as u64));
    if let Some(drawn) = drawn {
        println!("{:<32}{:>12}", "energy at the wall", drawn.energy.to_string());
        println!("{:<32}{:>12}", "energy a token", drawn.energy_per_token.to_string());
    }
    Ok(())
}

/// What a step on described hardware draws at the wall, and what it costs.
#[derive(Clone, Copy)]
struct Drawn {
    energy: Joules,
    energy_per_token: Joules,
    usd: Option<f64>,
}

/// `None` for a measured machine, and where the maker publishes no power rating.
fn drawn(world: &World, program: &Program, summary: &Summary) -> Option<Drawn> {
    let World::Roofline(Roofline { cluster, .. }) = world else { return None };
    let ranks = program.mesh.ranks();
    let busy = summary.mean.compute / summary.step_time;
    let energy = cluster.energy(ranks, summary.step_time, busy)?.facility;
    let energy_per_token = energy * (1.0 / program.global_tokens() as f64);
    Some(Drawn { energy, energy_per_token, usd: cluster.usd(ranks, summary.step_time) })
}

/// How long things take for this job, and where that is known from.
fn world(
    args: &JobArgs,
    job: &Job,
    machine: Option<&Path>,
    efficiency: f64,
) -> Result<(World, String)> {
    if !job.cluster.is_local() {
        let cluster = job.cluster.described()?;
        let source = format!(
            "{} of {} ({}), {:.0} % of peak assumed",
            cluster.accelerator.name,
            cluster.name,
            cluster.source,
            100.0 * efficiency
        );
        let precision = job.training.precision;
        return Ok((World::Roofline(Roofline { cluster, precision, efficiency }), source));
    }
    let (machine, source) = match machine {
        Some(path) => {
            let machine = Machine::read(path, &job.model, job.layout.shape(&job.batch()))?;
            (machine, format!("as measured in {}", path.display()))
        }
        None => (train_command::measure_only(args, job)?, "this one, measured now".to_owned()),
    };
    Ok((World::Profile(machine.profile), source))
}
