//! The newest figures of a run in the text format of Prometheus (version 0.0.4).

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};

use anyhow::Result;
use serde_json::Value;

use super::http::{self, Content};

/// A figure: its name, whether it only grows, and what it is.
struct Meter {
    name: &'static str,
    grows: bool,
    help: &'static str,
}

const fn gauge(name: &'static str, help: &'static str) -> Meter {
    Meter { name, grows: false, help }
}

const fn counter(name: &'static str, help: &'static str) -> Meter {
    Meter { name, grows: true, help }
}

/// Every figure, by names as <https://prometheus.io/docs/practices/naming/> has them.
const METERS: [Meter; 16] = [
    gauge("phalanx_step", "The last step that is done, from 1."),
    gauge("phalanx_loss", "Mean loss of the last step over its tokens, before the update."),
    gauge("phalanx_held_out_loss", "Loss of the last evaluation."),
    gauge("phalanx_gradient_norm", "Global gradient norm of the last step before clipping."),
    gauge("phalanx_learning_rate", "Learning rate of the last step."),
    gauge("phalanx_step_seconds", "Time of the last step."),
    gauge("phalanx_tokens_per_second", "Throughput of the last step, all ranks together."),
    gauge(
        "phalanx_model_flops_utilization_ratio",
        "Model FLOPs over what the machine's large products reach.",
    ),
    gauge(
        "phalanx_exposed_communication_seconds",
        "Time of the last step in which rank 0 waited for transfers, but for the pipeline's.",
    ),
    gauge(
        "phalanx_pipeline_wait_seconds",
        "Time of the last step in which rank 0 waited for its neighbours in the pipeline.",
    ),
    counter("phalanx_steps_total", "Steps done, those done again counted again."),
    counter("phalanx_tokens_total", "Tokens trained on, those of steps done again counted again."),
    counter("phalanx_checkpoints_total", "Checkpoints written and verified."),
    counter("phalanx_recoveries_total", "How often lost ranks were replaced."),
    counter("phalanx_steps_skipped_total", "Steps left without an update."),
    counter("phalanx_steps_redone_total", "Steps done again since their numbers were wrong."),
];

/// What keys of a step's record are called here.
const OF_A_STEP: [(&str, &str); 8] = [
    ("loss", "phalanx_loss"),
    ("gradient_norm", "phalanx_gradient_norm"),
    ("learning_rate", "phalanx_learning_rate"),
    ("step_time_s", "phalanx_step_seconds"),
    ("tokens_per_s", "phalanx_tokens_per_second"),
    ("model_flops_utilization", "phalanx_model_flops_utilization_ratio"),
    ("exposed_communication_s", "phalanx_exposed_communication_seconds"),
    ("pipeline_wait_s", "phalanx_pipeline_wait_seconds"),
];

/// A run's figures by name.
#[derive(Debug, Default)]
struct Figures(BTreeMap<&'static str, f64>);

impl Figures {
    fn see(&mut self, record: &Value, tokens_per_step: u64) {
        let mut grow = |name, by: f64| *self.0.entry(name).or_default() += by;
        match record["event"].as_str().unwrap_or_default() {
            "step" => {
                grow("phalanx_steps_total", 1.0);
                grow("phalanx_tokens_total", tokens_per_step as f64);
                let values =
                    OF_A_STEP.iter().filter_map(|(key, name)| Some((*name, record[key].as_f64()?)));
                self.0.extend(values);
            }
            "evaluation" => {
                self.0.extend(record["loss"].as_f64().map(|loss| ("phalanx_held_out_loss", loss)));
            }
            "saved" => grow("phalanx_checkpoints_total", 1.0),
            "recovered" => grow("phalanx_recoveries_total", 1.0),
            "skipped" => grow("phalanx_steps_skipped_total", 1.0),
            "redone" => grow("phalanx_steps_redone_total", 1.0),
            _ => {}
        }
        self.0.extend(record["step"].as_f64().map(|step| ("phalanx_step", step)));
    }

    /// A counter is there from the start; a gauge once there is something to tell.
    fn text(&self) -> String {
        let mut text = String::new();
        for Meter { name, grows, help } in METERS {
            let kind = if grows { "counter" } else { "gauge" };
            let value = self.0.get(name).copied().or(grows.then_some(0.0));
            if let Some(value) = value {
                text += &format!("# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}\n");
            }
        }
        text
    }
}

/// What Prometheus asks.
pub struct Endpoint {
    /// Where it listens.
    pub address: SocketAddr,
    figures: Arc<Mutex<Figures>>,
    tokens_per_step: u64,
}

impl Endpoint {
    /// Answers from a thread of its own for as long as the process lives.
    pub fn open(address: IpAddr, port: u16, tokens_per_step: u64) -> Result<Self> {
        let listener = http::listen(address, port)?;
        let figures = Arc::new(Mutex::new(Figures::default()));
        let shown = Arc::clone(&figures);
        let address = listener.local_addr()?;
        std::thread::spawn(move || {
            http::serve(&listener, |path| {
                (path == "/metrics").then(|| {
                    let body = shown.lock().expect("no holder panics").text();
                    Ok(Content { kind: "text/plain; version=0.0.4", body })
                })
            });
        });
        Ok(Self { address, figures, tokens_per_step })
    }

    /// Takes over what a record says.
    pub fn see(&self, record: &Value) {
        self.figures.lock().expect("no holder panics").see(record, self.tokens_per_step);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn figures_are_the_newest_and_counters_count() {
        let mut figures = Figures::default();
        assert!(figures.text().contains("\nphalanx_recoveries_total 0\n"));
        assert!(!figures.text().contains("phalanx_loss"));
        for (step, loss) in [(1, 3.5), (2, 3.25)] {
            figures.see(
                &json!({ "event": "step", "step": step, "loss": loss, "step_time_s": 0.5 }),
                100,
            );
        }
        figures.see(&json!({ "event": "evaluation", "step": 2, "loss": 3.0 }), 100);
        figures.see(&json!({ "event": "recovered", "step": 1 }), 100);
        let text = figures.text();
        for line in [
            "# TYPE phalanx_loss gauge\nphalanx_loss 3.25\n",
            "# TYPE phalanx_steps_total counter\nphalanx_steps_total 2\n",
            "phalanx_tokens_total 200\n",
            "phalanx_held_out_loss 3\n",
            "phalanx_recoveries_total 1\n",
            "phalanx_step 1\n",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn every_figure_that_is_set_is_told() {
        let mut figures = Figures::default();
        let record: Value =
            OF_A_STEP.iter().map(|(key, _)| ((*key).to_owned(), json!(1.0))).collect();
        let mut record = record;
        record["event"] = json!("step");
        figures.see(&record, 1);
        for (_, name) in OF_A_STEP {
            assert!(figures.text().contains(&format!("\n{name} 1\n")), "{name}");
        }
    }
}
