//! The page of a run, from the files in its folder; also while it is still under way.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use program::{Program, Trace};
use report::page::{
    self, Fact, Happening, Held, Origin, Page, ScalingCurve, ScalingPoint, Section, StepRecord,
    Training,
};
use report::{Summary, read_perfetto};
use serde_json::Value;
use sim::World;
use units::{Bytes, Seconds};

use super::links;
use crate::job::Job;
use crate::ledger::Ledger;
use crate::measured::Machine;
use crate::output::{percent, thousands};
use crate::plan_command::{describe_layout, lowered};

/// First steps that typical times leave out, as the run's own do: buffers are made in them.
const WARM_UP: usize = 2;

/// What a run's folder holds.
struct Run {
    name: String,
    job: Job,
    program: Program,
    machine: Option<Machine>,
    records: Vec<Value>,
    ledger: Ledger,
    /// Written when the run ends.
    summary: Value,
    predicted: Option<Trace>,
    measured: Option<Trace>,
}

/// The page of the run in `folder`.
pub fn page(folder: &Path, curves: Vec<ScalingCurve>) -> Result<Page> {
    let run = Run::read(folder)?;
    let training = run.training();
    let steps: Vec<(Origin, &Trace)> = [
        run.predicted.as_ref().map(|trace| (Origin::Predicted, trace)),
        run.measured.as_ref().map(|trace| (Origin::Measured, trace)),
    ]
    .into_iter()
    .flatten()
    .collect();
    let summaries: Vec<(Origin, Summary)> =
        steps.iter().map(|(origin, trace)| (*origin, Summary::new(&run.program, trace))).collect();
    let columns: Vec<(Origin, &Summary)> =
        summaries.iter().map(|(origin, summary)| (*origin, summary)).collect();
    let mut sections = vec![page::training(&training)];
    if steps.is_empty() {
        let how =
            "A step is recorded when the run ends; a prediction needs `[run] measure = true`.";
        sections.push(Section::absent("A step, rank by rank", how));
    } else {
        sections.push(page::timeline(&run.program, &steps));
        sections.push(page::time(&columns));
    }
    sections.push(run.links(columns.last()));
    sections.push(run.scaling(curves));
    sections.push(run.history());
    sections.push(run.memory());
    sections.push(Section::absent(
        "Energy",
        "Not measured here. On a described cluster `phalanx report JOB` says what a step takes by the makers' ratings.",
    ));
    Ok(Page {
        title: run.name.clone(),
        about: run.about(),
        facts: run.facts(&training),
        sections,
        refresh_s: None,
    })
}

impl Run {
    fn read(folder: &Path) -> Result<Self> {
        let path = |name: &str| folder.join(name);
        let read = |name: &str| optional(path(name));
        let job = Job::read_resolved(&path("job.toml"))
            .with_context(|| format!("{} is not the folder of a run", folder.display()))?;
        let program = lowered(&job)?;
        ensure!(
            read("program.txt")?.is_none_or(|text| text == program.to_string()),
            "{} was made by another version of phalanx: its program is not what this one makes of its job",
            folder.display()
        );
        let machine: Option<Machine> = read("machine.json")?
            .map(|text| serde_json::from_str(&text).context("machine.json"))
            .transpose()?;
        let records = read("metrics.jsonl")?.unwrap_or_default();
        let ledger = Ledger::read(&records);
        // The last line may be half written.
        let records = records.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let summary = match read("summary.json")? {
            Some(text) => serde_json::from_str(&text).context("summary.json")?,
            None => Value::Null,
        };
        let mut traces = match read("trace.json")? {
            Some(text) => read_perfetto(&text).context("trace.json")?,
            None => BTreeMap::new(),
        };
        let measured = traces.remove("measured");
        let predicted = match traces.remove("predicted") {
            None => machine.as_ref().map(|machine| predict(&program, machine)).transpose()?,
            recorded => recorded,
        };
        let name = folder.canonicalize().ok();
        let name = name.as_deref().and_then(Path::file_name).map(|name| name.to_string_lossy());
        let name = name.map_or_else(|| job.name.clone(), String::from);
        Ok(Self { name, job, program, machine, records, ledger, summary, predicted, measured })
    }

    fn about(&self) -> Vec<String> {
        let (model, cluster) = (&self.job.model, &self.job.cluster);
        vec![format!(
            "{} parameters on {} rank(s) of this machine: {}.",
            thousands(model.parameter_count()),
            cluster.accelerators,
            describe_layout(&self.job, &self.program),
        )]
    }

    /// The records of an event, in order.
    fn of<'a>(&'a self, event: &'a str) -> impl Iterator<Item = &'a Value> {
        self.records.iter().filter(move |record| record["event"] == event)
    }

    fn training(&self) -> Training {
        let step = |record: &Value| {
            let step = record["step"].as_u64()?;
            let (loss, tokens_per_s) = (record["loss"].as_f64()?, record["tokens_per_s"].as_f64()?);
            Some((step, StepRecord { step, loss, tokens_per_s }))
        };
        // A step that was done again is as it was the last time.
        let steps: BTreeMap<u64, StepRecord> = self.of("step").filter_map(step).collect();
        let scored = |record: &Value| Some((record["step"].as_u64()?, record["loss"].as_f64()?));
        let held_out: BTreeMap<u64, f64> = self.of("evaluation").filter_map(scored).collect();
        let tokens = self.program.global_tokens() as f64;
        Training {
            steps: steps.into_values().collect(),
            held_out: held_out.into_iter().collect(),
            predicted_tokens_per_s: self
                .predicted
                .as_ref()
                .map(|trace| tokens / trace.duration().0),
        }
    }

    /// The median step time, as the run itself tells when it is over.
    fn step_time(&self) -> Option<Seconds> {
        if let Some(told) = self.summary["step_time_s"].as_f64() {
            return Some(Seconds(told));
        }
        let mut times: Vec<f64> =
            self.of("step").skip(WARM_UP).filter_map(|step| step["step_time_s"].as_f64()).collect();
        times.sort_by(f64::total_cmp);
        times.get(times.len() / 2).copied().map(Seconds)
    }

    fn tokens_per_s(&self) -> Option<f64> {
        Some(self.program.global_tokens() as f64 / self.step_time()?.0)
    }

    /// Throughput of a rank over that of one rank alone.
    fn efficiency(&self) -> Option<f64> {
        let machine = self.machine.as_ref()?;
        let alone = machine.baseline_tokens as f64 / machine.baseline_step_s.0;
        Some(self.tokens_per_s()? / f64::from(self.program.mesh.ranks()) / alone)
    }

    fn facts(&self, training: &Training) -> Vec<Fact> {
        let mut facts = Vec::new();
        let mut fact = |name, value: String, note: String| facts.push(Fact { name, value, note });
        if let Some(last) = training.steps.last() {
            let steps = format!("measured, step {} of {}", last.step, self.job.training.steps);
            fact("training loss", format!("{:.3}", last.loss), steps);
        }
        if let Some((step, loss)) = training.held_out.last() {
            fact("held-out loss", format!("{loss:.3}"), format!("measured, after step {step}"));
        }
        if let Some(rate) = self.tokens_per_s() {
            fact("tokens a second", thousands(rate as u64), "measured, by the median step".into());
        }
        if let Some(measured) = self.step_time() {
            let predicted = self.predicted.as_ref().map(Trace::duration);
            let beside = predicted.map(|predicted| {
                let error = 100.0 * (predicted / measured - 1.0);
                format!("; predicted {predicted}, {error:+.1} %").replace('-', "−")
            });
            let note = format!("measured{}", beside.unwrap_or_default());
            fact("step time", measured.to_string(), note);
        } else if let Some(trace) = &self.predicted {
            fact("step time", trace.duration().to_string(), "predicted".into());
        }
        if let (Some(efficiency), Some(machine)) = (self.efficiency(), &self.machine) {
            let bound = match machine.core_share() {
                share if share < 1.0 => format!("; ranks share cores, at most {}", percent(share)),
                _ => String::new(),
            };
            let note = format!("measured, against one rank alone{bound}");
            fact("scaling efficiency", percent(efficiency), note);
        }
        facts
    }

    fn links(&self, step: Option<&(Origin, &Summary)>) -> Section {
        match (&self.machine, step) {
            (Some(machine), Some((origin, summary))) if self.program.mesh.ranks() > 1 => {
                let levels = links::of_host(&self.program, machine.profile.link.bandwidth);
                page::topology(&levels, summary.step_time, *origin)
            }
            (_, Some(_)) if self.program.mesh.ranks() == 1 => {
                Section::absent("Links and their load", "One rank alone sends nothing.")
            }
            _ => Section::absent(
                "Links and their load",
                "The link of this machine is measured with `[run] measure = true`.",
            ),
        }
    }

    fn scaling(&self, mut curves: Vec<ScalingCurve>) -> Section {
        let mut said = Vec::new();
        if let (Some(machine), Some(tokens_per_s), Some(efficiency)) =
            (&self.machine, self.tokens_per_s(), self.efficiency())
        {
            let ranks = self.program.mesh.ranks();
            let alone = machine.baseline_tokens as f64 / machine.baseline_step_s.0;
            let point = |accelerators, tokens_per_s, efficiency, bound: &str| ScalingPoint {
                accelerators,
                tokens_per_s,
                efficiency,
                bound: bound.to_owned(),
            };
            let shared = if machine.core_share() < 1.0 { "ranks share cores" } else { "" };
            let points = vec![
                point(1, alone, 1.0, "one rank alone"),
                point(ranks, tokens_per_s, efficiency, shared),
            ];
            said.push(format!(
                "Weak scaling: one rank alone on {} tokens a step, and {ranks} on {}.",
                thousands(machine.baseline_tokens),
                thousands(self.program.global_tokens())
            ));
            let curve = ScalingCurve { name: self.name.clone(), origin: Origin::Measured, points };
            curves.insert(0, curve);
        }
        if curves.is_empty() {
            let how = "A baseline is measured with `[run] measure = true`; `phalanx scale JOB --json` with `--scale` adds simulated sizes.";
            return Section::absent("Scaling", how);
        }
        page::scaling(&curves, &said)
    }

    /// Of each rank, what was planned above what was measured.
    fn memory(&self) -> Section {
        let by_rank = |key: &str| -> Vec<Bytes> {
            let ranks = self.summary[key].as_array().into_iter().flatten();
            ranks.filter_map(Value::as_u64).map(Bytes).collect()
        };
        let (planned, counted) =
            (by_rank("memory_bytes_peak_by_rank_planned"), by_rank("memory_bytes_peak_by_rank"));
        let mut held: Vec<Held> = Vec::new();
        for (rank, resident) in by_rank("resident_bytes_peak_by_rank").into_iter().enumerate() {
            let mut put = |of: &str, tensors: Option<&Bytes>, all: Bytes| {
                let tensors = tensors.copied().unwrap_or_default();
                let items = vec![
                    ("tensors and transfers", tensors),
                    ("rest of the process", Bytes(all.0.saturating_sub(tensors.0))),
                ];
                held.push(Held { by: format!("rank {rank}, {of}"), items });
            };
            if let Some(planned) = planned.get(rank) {
                put("planned", Some(planned), *planned);
            }
            put("measured", counted.get(rank), resident);
        }
        if held.is_empty() {
            return Section::absent("Memory", "Counted when the run ends, where the system tells.");
        }
        let said = "The most that each rank held: tensors and the buffers of transfers, planned from the \
                    program's list before anything was computed and counted while it was; and its \
                    process, as the operating system tells, with program, text, shared memory and what \
                    measuring the machine took.";
        page::memory(said, &held, None)
    }

    fn history(&self) -> Section {
        let of = |record| losses(record).into_iter().chain(happening(record));
        let happenings: Vec<_> = self.records.iter().flat_map(of).collect();
        let Ledger { goodput, detection_s, recovery_s, redone_s, saving_s, .. } = self.ledger;
        let said = format!(
            "Of the time of steps and what stood in their way {} was training that counts: noticing losses took {detection_s}, recovering {recovery_s}, steps done again {redone_s}, standing still to save {saving_s}.",
            percent(goodput)
        );
        let said = if self.ledger.recoveries > 0 { vec![said] } else { Vec::new() };
        page::history(&happenings, self.job.training.steps, &said)
    }
}

/// The processes that were lost before a recovery.
fn losses(record: &Value) -> Vec<Happening> {
    let step = record["step"].as_u64().unwrap_or_default();
    let one = |loss: &Value| {
        let text = |key: &str| loss[key].as_str().unwrap_or_default().to_owned();
        let noticed = Seconds(loss["detection_s"].as_f64().unwrap_or_default());
        let (rank, host, cause) = (&loss["rank"], text("host"), text("cause"));
        let detail = format!("Rank {rank} on {host} {cause}; noticed after {noticed}.");
        Happening { step, kind: "lost", detail: Some(detail) }
    };
    record["losses"].as_array().into_iter().flatten().map(one).collect()
}

/// What a record says beside training.
fn happening(record: &Value) -> Option<Happening> {
    let step = record["step"].as_u64()?;
    let number = |key: &str| record[key].as_f64().unwrap_or(f64::NAN);
    let text = |key: &str| record[key].as_str().unwrap_or_default();
    let (kind, detail) = match record["event"].as_str()? {
        "step" | "evaluation" | "saving" => return None,
        "saved" => ("checkpoint", None),
        "recovered" => {
            let (time, source) = (Seconds(number("time_s")), text("source"));
            let again = record["steps_redone"].as_u64().unwrap_or_default();
            let how = format!(
                "All go on after {time}, with state from {source}; {again} step(s) done again."
            );
            ("recovered", Some(how))
        }
        "not-saved" => ("not saved", Some(format!("No checkpoint: {}.", text("reason")))),
        "redone" => {
            let right = record["right"] == true;
            let then = if right { "right the second time" } else { "and again" };
            ("done again", Some(format!("Numbers were wrong, {then}: {}.", record["ranks"])))
        }
        "skipped" => {
            let (norm, limit) = (number("gradient_norm"), number("limit"));
            ("left out", Some(format!("The gradient norm was {norm:.3}, over {limit:.3}.")))
        }
        "slow" => {
            let (rank, factor) = (&record["rank"], number("factor"));
            ("slow", Some(format!("Rank {rank} took {factor:.2} times as long as its peers.")))
        }
        "rolled-back" => ("rolled back", Some(format!("To step {}.", record["to"]))),
        other => ("else", Some(other.to_owned())),
    };
    Some(Happening { step, kind, detail })
}

fn predict(program: &Program, machine: &Machine) -> Result<Trace> {
    Ok(sim::simulate(program, &World::Profile(machine.profile.clone()))?)
}

/// A file that may not be there, or not yet.
fn optional(path: PathBuf) -> Result<Option<String>> {
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}
