//! `phalanx simulate`: one step in virtual time.

use std::path::Path;

use anyhow::{Context, Result};
use program::{Program, Trace};
use report::{Communicators, Summary, chakra, perfetto};
use sim::device::{Calibrated, Calibration, Habits};
use sim::step::Step;
use sim::{Roofline, World, simulate as run};
use units::{Rank, Seconds};

use crate::job::Job;
use crate::measured::Machine;
use crate::plan_command::{describe, lowered};
use crate::prediction::Prediction;
use crate::train_command;
use crate::{JobArgs, SimulateOptions};

/// Prints where the time of a step goes, and whether it fits.
pub fn simulate(args: &JobArgs, options: &SimulateOptions) -> Result<()> {
    let job = Job::read(&args.job, &args.set)?;
    let program = lowered(&job)?;
    let calibrations = Calibration::built_in();
    let calibration = calibration(&job, options, &calibrations)?;
    let (world, source) = world(args, &job, options, calibration)?;
    let traced = options.trace.is_some() || options.chakra.is_some();
    let (summary, trace) = predict(&program, &world, calibration, traced)?;
    if let Some(trace) = trace {
        write(&program, &trace, options)?;
    }
    let prediction = Prediction::new(&job, &program, &world, summary, source);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&prediction)?);
    } else {
        print!("{}{prediction}", describe(&job, &program));
    }
    prediction.fits()
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

/// The share of peak where nothing was fitted: what large products reach in training.
const USUAL_SHARE: f64 = 0.6;

/// The calibration that a job on described accelerators is costed with, if there is one.
fn calibration<'c>(
    job: &Job,
    options: &SimulateOptions,
    among: &'c [Calibration],
) -> Result<Option<&'c Calibration>> {
    if job.cluster.is_local() || options.efficiency.is_some() {
        return Ok(None);
    }
    let accelerator = job.cluster.described()?.accelerator.name;
    let found = Calibration::find(among, options.software.as_deref(), &accelerator);
    if options.software.is_some() { Ok(Some(found?)) } else { Ok(found.ok()) }
}

/// The times of a step. On described hardware ranks that do the same are one, and there is a trace
/// of the first of each only where it is asked for.
fn predict(
    program: &Program,
    world: &World,
    calibration: Option<&Calibration>,
    traced: bool,
) -> Result<(Summary, Option<Trace>)> {
    let World::Roofline(roofline) = world else {
        let trace = run(program, world)?;
        return Ok((Summary::new(program, &trace), Some(trace)));
    };
    let (step, outside) = match calibration {
        None => (Step::new(program, roofline)?, Seconds::ZERO),
        Some(calibration) => {
            let Roofline { cluster, precision, .. } = roofline;
            let mut costs = Calibrated::new(program, cluster, *precision, calibration)?;
            costs.habits = Habits { tensor_overlap: true, ..Habits::default() };
            (Step::new(program, &costs)?, calibration.traffic.step)
        }
    };
    let mut times = step.run()?;
    times.classes.iter_mut().for_each(|class| class.other += outside);
    let trace = traced.then(|| step.trace()).transpose()?;
    Ok((Summary::of(times.step_time + outside, times.classes), trace))
}

/// How long things take for this job, and where that is known from.
fn world(
    args: &JobArgs,
    job: &Job,
    options: &SimulateOptions,
    calibration: Option<&Calibration>,
) -> Result<(World, String)> {
    let efficiency = options.efficiency.unwrap_or(USUAL_SHARE);
    if !job.cluster.is_local() {
        let cluster = job.cluster.described()?;
        let known = match calibration {
            Some(fitted) => format!("fitted on {}", fitted.fitted_on),
            None => format!("{:.0} % of peak assumed", 100.0 * efficiency),
        };
        let source = format!(
            "{} of {} ({}), {known}",
            cluster.accelerator.name, cluster.name, cluster.source
        );
        let precision = job.training.precision;
        return Ok((World::Roofline(Roofline { cluster, precision, efficiency }), source));
    }
    let (machine, source) = match &options.machine {
        Some(path) => {
            let machine = Machine::read(path, &job.model, job.layout.shape(&job.batch()))?;
            (machine, format!("as measured in {}", path.display()))
        }
        None => (train_command::measure_only(args, job)?, "this one, measured now".to_owned()),
    };
    Ok((World::Profile(machine.profile), source))
}
