//! `phalanx simulate`: one step in virtual time.

use std::path::Path;

use anyhow::{Context, Result, bail};
use plan::{lower, lower_outer};
use program::{Program, Trace};
use report::{Communicators, Summary, chakra, perfetto};
use serde::Serialize;
use serde_json::Value;
use sim::{World, simulate as run};
use units::Rank;

use crate::described::Described;
use crate::faults_command;
use crate::job::Job;
use crate::measured::Machine;
use crate::plan_command::{describe, prove};
use crate::prediction::Prediction;
use crate::train_command;
use crate::{JobArgs, SimulateOptions};

/// Prints where the time of a step goes, and whether it fits.
pub fn simulate(args: &JobArgs, options: &SimulateOptions) -> Result<()> {
    let (job, program, prediction) = predicted(args, options, train_command::measure_only)?;
    let faults = options.faults.then(|| faults_command::of_job(&job, prediction.step_time()));
    let faults = faults.transpose()?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&Answer { prediction: &prediction, faults })?);
    } else {
        print!("{}{prediction}", describe(&job, &program));
        faults.iter().for_each(|faults| print!("\n{faults}"));
    }
    prediction.fits()
}

/// What is predicted, and what comes of it under failures, where that was asked for.
#[derive(Serialize)]
struct Answer<'a> {
    #[serde(flatten)]
    prediction: &'a Prediction,
    #[serde(skip_serializing_if = "Option::is_none")]
    faults: Option<faults_command::Told>,
}

/// The object of `--json`. This process cannot be every rank of a measurement.
pub fn answer(args: &JobArgs, options: &SimulateOptions) -> Result<Value> {
    let unmeasured = |_: &JobArgs, _: &Job| {
        bail!(
            "a job on this machine needs its measurements: give the machine.json of a run of \
             `phalanx train` as `machine`"
        )
    };
    let (_, _, prediction) = predicted(args, options, unmeasured)?;
    let answer = serde_json::to_value(&prediction)?;
    prediction.fits()?;
    Ok(answer)
}

/// Simulates a step of the job; where no measurements are given, this machine is measured.
fn predicted(
    args: &JobArgs,
    options: &SimulateOptions,
    measure: impl Fn(&JobArgs, &Job) -> Result<Machine>,
) -> Result<(Job, Program, Prediction)> {
    let job =
        Job::of(args.draft()?, &options.costing).with_context(|| args.job.display().to_string())?;
    let program = lower(&job.model, &job.layout, &job.batch())?;
    let traced = options.trace.is_some() || options.chakra.is_some();
    let outer = lower_outer(&job.model, &job.layout, &job.batch())?;
    let mut outer_time = None;
    let (world, source, quantiles, (summary, trace)) = if job.cluster.is_local() {
        prove(&program);
        let (world, source) = measured(args, &job, options, measure)?;
        let trace = run(&program, &world)?;
        if let Some(outer) = &outer {
            outer_time = Some(run(outer, &world)?.duration());
        }
        (world, source, None, (Summary::new(&program, &trace), Some(trace)))
    } else {
        let precision = job.training.precision;
        let described = Described::new(&job.cluster, precision, &options.costing)?;
        let predict = || predict(&program, &described, traced);
        let ((), predicted) = rayon::join(|| prove(&program), predict);
        let predicted = predicted?;
        if let Some(outer) = &outer {
            outer_time = Some(described.times(outer)?.step_time);
        }
        let varies = described.quantiles(&predicted.0, program.mesh.ranks());
        (World::Roofline(described.roofline.clone()), described.source(), varies, predicted)
    };
    if let Some(trace) = trace {
        write(&program, &trace, options)?;
    }
    let mut prediction = Prediction::new(&job, &program, &world, summary, quantiles, source);
    if let Some(time) = outer_time {
        prediction = prediction.with_outer_update(time, job.layout.local_steps);
    }
    Ok((job, program, prediction))
}

/// The files that were asked for.
fn write(program: &Program, trace: &Trace, options: &SimulateOptions) -> Result<()> {
    if let Some(path) = &options.trace {
        write_file(path, perfetto(program, &[("predicted", trace)]))?;
    }
    let Some(folder) = &options.chakra else { return Ok(()) };
    std::fs::create_dir(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let ranks = (0..program.mesh.ranks()).map(Rank);
    let first = |rank: &Rank| rank.0.is_multiple_of(program.mesh.stage_ranks());
    let mut communicators = Communicators::default();
    for rank in ranks.filter(|rank| options.chakra_every_rank || first(rank)) {
        let bytes = chakra(program, rank, trace, &mut communicators);
        write_file(&folder.join(format!("step.{}.et", rank.0)), bytes)?;
    }
    write_file(&folder.join("communicators.json"), communicators.json())
}

fn write_file(path: &Path, contents: impl AsRef<[u8]>) -> Result<()> {
    std::fs::write(path, contents).with_context(|| format!("cannot write {}", path.display()))
}

/// The times of a step on described hardware: ranks that do the same are one, and there is a trace
/// of the first of each only where it is asked for.
fn predict(
    program: &Program,
    described: &Described,
    traced: bool,
) -> Result<(Summary, Option<Trace>)> {
    let times = described.times(program)?;
    let trace = traced.then(|| described.step(program)?.trace()).transpose()?;
    Ok((Summary::of(times.step_time, times.classes), trace))
}

/// How long things take on this machine, and where that is known from.
fn measured(
    args: &JobArgs,
    job: &Job,
    options: &SimulateOptions,
    measure: impl Fn(&JobArgs, &Job) -> Result<Machine>,
) -> Result<(World, String)> {
    let (machine, source) = match &options.machine {
        Some(path) => {
            let machine = Machine::read(path, &job.model, job.layout.shape(&job.batch()))?;
            (machine, format!("as measured in {}", path.display()))
        }
        None => (measure(args, job)?, "this one, measured now".to_owned()),
    };
    Ok((World::Profile(machine.profile), source))
}
