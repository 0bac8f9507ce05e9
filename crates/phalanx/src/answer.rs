//! What the commands answer, for callers that are programs: the objects that `--json` prints.

use std::sync::atomic::AtomicBool;

use anyhow::{Result, bail};
use clap::Parser;
use serde_json::Value;

use crate::{Cli, Command, JobArgs, message, plan_command, scale, simulate_command};

/// Why there is no answer: what the command would say on standard error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refusal(String);

/// Answers a command on a job: the object that `phalanx ARGUMENTS --json` prints.
///
/// `arguments` are a command line without the program's name. With `contents`, the job file is not
/// read: it holds this, and its name is for messages. Once `stop` is set, a search ends with the
/// best that it has found, and a curve with an error.
///
/// # Errors
/// [`Refusal`], also where the command prints its answer and fails because that is no.
pub fn answer(
    arguments: &[String],
    contents: Option<String>,
    stop: &AtomicBool,
) -> Result<Value, Refusal> {
    let words = std::iter::once("phalanx").chain(arguments.iter().map(String::as_str));
    let cli = Cli::try_parse_from(words).map_err(|error| Refusal(error.to_string()))?;
    answered(cli.command, contents, stop).map_err(|error| Refusal(message(&error)))
}

fn answered(command: Command, contents: Option<String>, stop: &AtomicBool) -> Result<Value> {
    let asked = |job| JobArgs { contents, json: true, ..job };
    match command {
        Command::Plan { job, options } => plan_command::answer(&asked(job), &options, stop),
        Command::Simulate { job, options } => simulate_command::answer(&asked(job), &options),
        Command::Scale { job, options } => scale::answer(&asked(job), &options, stop),
        _ => bail!("only plan, simulate and scale answer with an object"),
    }
}
