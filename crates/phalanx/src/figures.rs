//! The figures at the end of a run: throughput, prediction, scaling efficiency.

use program::Breakdown;
use report::Summary;
use serde::Serialize;
use train::Outcome;
use units::Seconds;

use crate::measured::Machine;
use crate::output::thousands;
use crate::session::Session;

/// The figures of a finished run.
#[derive(Debug, Serialize)]
pub struct Figures {
    step_time_s: Seconds,
    predicted_step_time_s: Option<Seconds>,
    prediction_error: Option<f64>,
    tokens_per_s: f64,
    tokens_per_s_per_accelerator: f64,
    model_flops_utilization: Option<f64>,
    exposed_communication_s: Seconds,
    predicted_exposed_communication_s: Option<Seconds>,
    pipeline_bubble_s: Seconds,
    predicted_pipeline_bubble_s: Option<Seconds>,
    held_out_loss: f64,
    scaling_efficiency: Option<f64>,
    scaling_efficiency_bound: Option<f64>,
    scaling_baseline: Option<String>,
}

impl Figures {
    /// From the outcome and the summaries of both traces.
    pub fn new<O>(
        session: &Session<'_, O>,
        outcome: &Outcome,
        predicted: Option<&Summary>,
        measured: &Summary,
    ) -> Self {
        let program = &session.programs.step;
        let ranks = f64::from(program.mesh.ranks());
        let tokens_per_s = program.global_tokens() as f64 / outcome.step_time.0;
        let machine = session.machine.as_ref();
        let mean = predicted.map(|summary| &summary.mean);
        let (exposed, bubble) =
            (mean.map(Breakdown::exposed_communication), mean.map(|mean| mean.bubble));
        let predicted = predicted.map(|summary| summary.step_time);
        let alone = |machine: &Machine| machine.baseline_tokens as f64 / machine.baseline_step_s.0;
        Self {
            step_time_s: outcome.step_time,
            predicted_step_time_s: predicted,
            prediction_error: predicted.map(|predicted| predicted / outcome.step_time - 1.0),
            tokens_per_s,
            tokens_per_s_per_accelerator: tokens_per_s / ranks,
            model_flops_utilization: session.model_flops_utilization(tokens_per_s),
            exposed_communication_s: measured.mean.exposed_communication(),
            predicted_exposed_communication_s: exposed,
            pipeline_bubble_s: measured.mean.bubble,
            predicted_pipeline_bubble_s: bubble,
            held_out_loss: outcome.held_out_loss,
            scaling_efficiency: machine.map(|machine| tokens_per_s / ranks / alone(machine)),
            scaling_efficiency_bound: machine.map(Machine::core_share),
            scaling_baseline: machine.map(|machine| {
                format!(
                    "1 rank of {} thread(s) alone on {} tokens a step: {} tokens/s (weak scaling)",
                    session.job.cluster.threads_per_rank,
                    thousands(machine.baseline_tokens),
                    thousands(alone(machine) as u64)
                )
            }),
        }
    }
}

impl std::fmt::Display for Figures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "throughput     {} tokens/s", thousands(self.tokens_per_s as u64))?;
        if let Some(mfu) = self.model_flops_utilization {
            write!(f, ", MFU {:.1} % of this machine's measured peak", 100.0 * mfu)?;
        }
        if let (Some(predicted), Some(error)) = (self.predicted_step_time_s, self.prediction_error)
        {
            let (measured, percent) = (self.step_time_s, 100.0 * error);
            write!(
                f,
                "\nstep time      predicted {predicted}, measured {measured} (median): {percent:+.1} %"
            )?;
        }
        if let (Some(efficiency), Some(bound), Some(baseline)) =
            (self.scaling_efficiency, self.scaling_efficiency_bound, &self.scaling_baseline)
        {
            write!(f, "\nscaling        efficiency {efficiency:.3} against {baseline}")?;
            if bound < 1.0 {
                write!(f, "; ranks share cores, so at most {bound:.2}")?;
            }
        }
        writeln!(f)
    }
}
