//! What is seen and recorded of a run as it goes.

use std::time::Instant;

use serde_json::{Value, json};
use train::Event;

use crate::output::{Progress, thousands};
use crate::session::Session;

/// Turns events into progress lines and records.
pub struct Watch<'a, O> {
    session: &'a Session<'a, O>,
    progress: Progress,
    begin: Instant,
    first_step: u64,
    steps: u64,
    held_out: Option<f64>,
    /// The first and the last loss.
    pub losses: [f64; 2],
}

impl<'a, O> Watch<'a, O> {
    /// Watches a session up to step `steps`, of which `first_step` were done before.
    pub fn new(session: &'a Session<'a, O>, first_step: u64, steps: u64) -> Self {
        let progress = Progress::new("training", steps, !session.speaks);
        let losses = [f64::NAN; 2];
        Self { session, progress, begin: Instant::now(), first_step, steps, held_out: None, losses }
    }

    /// Shows an event and returns its record.
    pub fn see(&mut self, event: &Event) -> Value {
        let mut record = serde_json::to_value(event).expect("events have a JSON form");
        match *event {
            Event::Step {
                step,
                loss,
                step_time_s,
                exposed_communication_s,
                pipeline_wait_s,
                ..
            } => {
                if self.losses[0].is_nan() {
                    self.losses[0] = loss;
                }
                self.losses[1] = loss;
                let tokens = self.session.programs.step.global_tokens() as f64;
                let tokens_per_s = tokens / step_time_s.0;
                let mfu = self.session.model_flops_utilization(tokens_per_s);
                let shares = [exposed_communication_s, pipeline_wait_s]
                    .map(|waited| 100.0 * (waited / step_time_s));
                self.line(step, loss, tokens_per_s, mfu, shares);
                if let Value::Object(fields) = &mut record {
                    fields.insert("tokens_per_s".into(), json!(tokens_per_s));
                    fields.insert("model_flops_utilization".into(), json!(mfu));
                }
            }
            Event::Evaluation { step, loss } => {
                self.held_out = Some(loss);
                self.progress.say(&format!("step {step:>5}  held-out loss {loss:.4}"));
            }
            Event::NotSaved { step, ref reason } => {
                self.progress.say(&format!("step {step:>5}  NO CHECKPOINT: {reason}"));
            }
            Event::Recovered { step, ranks, time_s, source, ref losses, ref seen, .. } => {
                let source = serde_json::to_value(source).expect("a name has a JSON form");
                let source = source.as_str().unwrap_or_default();
                let causes: Vec<String> =
                    losses.iter().map(|loss| format!("{} {}", loss.rank, loss.cause)).collect();
                // What all ranks leave has no other cause than what each saw.
                let why = if causes.is_empty() { seen.clone() } else { causes.join("; ") };
                self.progress.say(&format!(
                    "step {step:>5}  recovered from {source} in {time_s}, {ranks} rank(s): {why}"
                ));
            }
            Event::Redone { step, ref ranks, right } => {
                let names: Vec<String> = ranks.iter().map(ToString::to_string).collect();
                let whose = if names.is_empty() { "all ranks".into() } else { names.join(", ") };
                let then = if right { "right the second time" } else { "and again" };
                self.progress.say(&format!("step {step:>5}  NUMBERS WRONG on {whose}, {then}"));
            }
            Event::Skipped { step, gradient_norm, limit } => {
                self.progress.say(&format!(
                    "step {step:>5}  SKIPPED: the gradient norm is {gradient_norm:.3}, over {limit:.3}"
                ));
            }
            Event::RolledBack { step, to } => {
                self.progress.say(&format!(
                    "step {step:>5}  ROLLED BACK to the state of step {to}; the text since is left out"
                ));
            }
            Event::Slow { step, rank, factor } => {
                self.progress.say(&format!(
                    "step {step:>5}  SLOW: {rank} takes {factor:.2} times as long as its peers"
                ));
            }
            Event::Saving { .. } | Event::Saved { .. } => {}
        }
        record
    }

    fn line(&self, step: u64, loss: f64, tokens_per_s: f64, mfu: Option<f64>, shares: [f64; 2]) {
        let each = self.begin.elapsed() / (step - self.first_step) as u32;
        let left = each * (self.steps - step) as u32;
        let mfu = mfu.map(|mfu| format!("  MFU {:.0} %", 100.0 * mfu)).unwrap_or_default();
        let [exposed, pipeline] = shares;
        let pipeline = match self.session.job.layout.mesh.pipeline {
            1 => String::new(),
            _ => format!("  pipeline waits {pipeline:.0} %"),
        };
        let text = format!(
            "step {step:>5}  loss {loss:.4}  {} tok/s{mfu}  exposed {exposed:.0} %{pipeline}",
            thousands(tokens_per_s as u64)
        );
        self.progress.update(step, &text, Some(left));
    }
}
