//! What a run went through and where its time went, read off its record.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;
use serde_json::Value;
use units::Seconds;

/// What a run survived. Times are rank 0's.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Ledger {
    /// How often ranks began anew.
    pub recoveries: u64,
    /// Processes that were lost.
    pub losses: u64,
    /// Steps that were done again.
    pub steps_redone: u64,
    /// Steps whose text was left out, or whose update was.
    pub steps_left_out: u64,
    /// Steps that count twice in the history of the model; none ever should.
    pub steps_repeated: u64,
    /// Steps that count, done for the first or only time.
    pub training_s: Seconds,
    /// Steps that were lost, and done again.
    pub redone_s: Seconds,
    /// Until a loss was noticed.
    pub detection_s: Seconds,
    /// From then to the next step.
    pub recovery_s: Seconds,
    /// Standing still to save.
    pub saving_s: Seconds,
    /// The share of all of these that is training.
    pub goodput: f64,
}

impl Ledger {
    /// From the lines of `metrics.jsonl`; what is no record is passed over.
    pub fn read(text: &str) -> Self {
        let mut ledger = Self::default();
        // The steps of the model's history so far, with their times.
        let mut history: BTreeMap<u64, f64> = BTreeMap::new();
        let records = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        for record in records {
            let seconds = |name: &str| Seconds(record[name].as_f64().unwrap_or_default());
            let step = record["step"].as_u64().unwrap_or_default();
            match record["event"].as_str() {
                Some("step") => {
                    let again = history.insert(step, seconds("step_time_s").0);
                    ledger.steps_repeated += u64::from(again.is_some());
                }
                Some("recovered") => {
                    let lost = history.split_off(&(step + 1));
                    ledger.steps_redone += record["steps_redone"].as_u64().unwrap_or_default();
                    ledger.redone_s += Seconds(lost.values().sum());
                    ledger.recoveries += 1;
                    ledger.recovery_s += seconds("time_s");
                    let losses = record["losses"].as_array().map_or(&[][..], Vec::as_slice);
                    ledger.losses += losses.len() as u64;
                    let detection = losses.iter().filter_map(|loss| loss["detection_s"].as_f64());
                    ledger.detection_s += Seconds(detection.fold(0.0, f64::max));
                }
                Some("rolled-back") => {
                    let to = record["to"].as_u64().unwrap_or_default();
                    ledger.steps_left_out += step.saturating_sub(to);
                }
                Some("skipped") => ledger.steps_left_out += 1,
                Some("saving") => ledger.saving_s += seconds("stall_s"),
                _ => {}
            }
        }
        ledger.training_s = Seconds(history.values().sum());
        let all = ledger.all();
        ledger.goodput = if all > Seconds::ZERO { ledger.training_s / all } else { 1.0 };
        ledger
    }

    fn all(&self) -> Seconds {
        self.training_s + self.redone_s + self.detection_s + self.recovery_s + self.saving_s
    }
}

impl fmt::Display for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { losses, recoveries, steps_redone, .. } = self;
        write!(
            f,
            "survived       {losses} process(es) lost, {recoveries} recoveries, {steps_redone} step(s) done again; goodput {:.1} %",
            100.0 * self.goodput
        )?;
        let shares = [
            ("noticing", self.detection_s),
            ("recovering", self.recovery_s),
            ("steps done again", self.redone_s),
            ("saving", self.saving_s),
        ];
        let shares =
            shares.map(|(what, time)| format!("{what} {:.1} %", 100.0 * (time / self.all())));
        write!(f, " ({})", shares.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_lost_is_told_apart_from_what_counts() {
        let text = r#"
            {"event":"step","step":1,"step_time_s":2.0}
            {"event":"step","step":2,"step_time_s":3.0}
            {"event":"saving","step":2,"stall_s":0.5}
            {"event":"step","step":3,"step_time_s":2.0}
            {"event":"recovered","step":2,"time_s":1.0,"steps_redone":1,"losses":[{"detection_s":0.25},{"detection_s":0.5}]}
            {"event":"step","step":3,"step_time_s":2.0}
            {"event":"recovered","step":1,"time_s":1.0,"losses":[]}
            {"event":"rolled-back","step":3,"to":1}
            {"event":"skipped","step":4}
            {"event":"step","step":5,"step_time_s":2.0}"#;
        let ledger = Ledger::read(text);
        let expected = Ledger {
            recoveries: 2,
            losses: 2,
            steps_redone: 1,
            steps_left_out: 3,
            steps_repeated: 0,
            training_s: Seconds(4.0),
            redone_s: Seconds(7.0),
            detection_s: Seconds(0.5),
            recovery_s: Seconds(2.0),
            saving_s: Seconds(0.5),
            goodput: 4.0 / 14.0,
        };
        assert_eq!(ledger, expected);
        let twice = r#"{"event":"step","step":7,"step_time_s":1.0}"#;
        assert_eq!(Ledger::read(&format!("{twice}\n{twice}")).steps_repeated, 1);
    }
}
