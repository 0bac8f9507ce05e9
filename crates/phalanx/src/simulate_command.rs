//! `phalanx simulate`: one step in virtual time.

use std::path::Path;

use anyhow::{Context, Result};
use program::{Program, Trace};
use report::{Summary, perfetto};
use sim::step::Step;
use sim::{Roofline, World, simulate as run};

use crate::JobArgs;
use crate::job::Job;
use crate::measured::Machine;
use crate::plan_command::{describe, lowered};
use crate::prediction::Prediction;
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
    let (summary, trace) = predict(&program, &world, trace_file.is_some())?;
    if let (Some(path), Some(trace)) = (trace_file, trace) {
        std::fs::write(path, perfetto(&program, &[("predicted", &trace)]))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    let prediction = Prediction::new(&job, &program, &world, summary, source);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&prediction)?);
    } else {
        print!("{}{prediction}", describe(&job, &program));
    }
    Ok(())
}

/// The times of a step. On described hardware ranks that do the same are one, and there is a trace
/// of the first of each only where it is asked for.
fn predict(program: &Program, world: &World, traced: bool) -> Result<(Summary, Option<Trace>)> {
    let World::Roofline(roofline) = world else {
        let trace = run(program, world)?;
        return Ok((Summary::new(program, &trace), Some(trace)));
    };
    let step = Step::new(program, roofline)?;
    let times = step.run()?;
    let trace = traced.then(|| step.trace()).transpose()?;
    Ok((Summary::of(times.step_time, times.classes), trace))
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
