//! Lines of the logs of MLPerf Training, `:::MLLOG {...}`: one event each, told apart by its key.
//!
//! The form is that of `mlperf_logging` (github.com/mlcommons/logging, `mllog/README.md`, 2026).

mod own;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use own::{FILE, OwnLog, Samples, stop};

/// What a line begins with, after whatever a launcher has put before it.
const MARK: &str = ":::MLLOG";

/// Keys that a log is read by.
pub mod key {
    pub const BENCHMARK: &str = "submission_benchmark";
    pub const SUBMITTER: &str = "submission_org";
    pub const PLATFORM: &str = "submission_platform";
    pub const INIT_START: &str = "init_start";
    pub const INIT_STOP: &str = "init_stop";
    pub const RUN_START: &str = "run_start";
    pub const RUN_STOP: &str = "run_stop";
    pub const BLOCK_START: &str = "block_start";
    pub const BLOCK_STOP: &str = "block_stop";
    pub const EVAL_START: &str = "eval_start";
    pub const EVAL_STOP: &str = "eval_stop";
    pub const EVAL_ACCURACY: &str = "eval_accuracy";
    pub const TRACKED_STATS: &str = "tracked_stats";
    pub const GLOBAL_BATCH_SIZE: &str = "global_batch_size";
    pub const MAX_SEQUENCE_LENGTH: &str = "max_sequence_length";
    pub const NUMBER_OF_RANKS: &str = "number_of_ranks";
}

/// An event of a training run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    #[serde(default)]
    pub namespace: String,
    /// Milliseconds since 1970.
    pub time_ms: u64,
    pub event_type: EventType,
    pub key: String,
    #[serde(default)]
    pub value: Value,
    #[serde(default)]
    pub metadata: Value,
}

/// Whether an event begins something, ends it, or is a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum EventType {
    IntervalStart,
    IntervalEnd,
    PointInTime,
}

impl Entry {
    /// The event as a line of a log.
    pub fn line(&self) -> String {
        format!("{MARK} {}\n", serde_json::to_string(self).expect("an event has a JSON form"))
    }

    /// A number beside the event.
    pub fn noted(&self, name: &str) -> Option<f64> {
        self.metadata.get(name)?.as_f64()
    }
}

/// The events of a log in the order of time, and how many lines could not be read: ranks that
/// write at once tear each other's lines.
pub fn read(log: &str) -> (Vec<Entry>, usize) {
    let mut torn = 0;
    let mut entries: Vec<Entry> = Vec::new();
    for (_, text) in log.lines().filter_map(|line| line.split_once(MARK)) {
        match serde_json::Deserializer::from_str(text).into_iter().next() {
            Some(Ok(entry)) => entries.push(entry),
            _ => torn += 1,
        }
    }
    entries.sort_by_key(|entry| entry.time_ms);
    (entries, torn)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_as_it_was_written_whatever_stands_around_it() {
        let entry = Entry {
            namespace: String::new(),
            time_ms: 1_744_812_678_480,
            event_type: EventType::PointInTime,
            key: key::TRACKED_STATS.to_owned(),
            value: serde_json::json!({"train_step_time": 54.7}),
            metadata: serde_json::json!({"step": 1152.0}),
        };
        let log = format!("noise\n   0: {}:::MLLOG {{\"torn", entry.line());
        assert_eq!(read(&log), (vec![entry], 1));
    }
}
