//! One run by its log: how long a step took and how long the training.

use anyhow::{Result, bail, ensure};
use serde::Serialize;
use units::Seconds;

use crate::mllog::{self, Entry, key};

/// Sequence lengths that the rules of a benchmark fix and its logs need not say
/// (github.com/mlcommons/training, the README of each benchmark, 2026).
const SEQUENCES: [(&str, u64); 5] = [
    ("gpt3", 2048),
    ("llama2_70b_lora", 8192),
    ("llama31_405b", 8192),
    ("llama31_8b", 8192),
    ("deepseekv3_671b", 4096),
];

/// Where the time of a step comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Timing {
    /// The median time between the log's lines of consecutive steps.
    Steps,
    /// The median time between evaluations, over the steps there.
    Evaluations,
    /// As between evaluations, but with an evaluation inside each: a step takes at most so long.
    AtMost,
}

/// What a log says of its run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Run {
    pub benchmark: String,
    pub submitter: Option<String>,
    pub platform: Option<String>,
    /// Sequences of a step.
    pub global_batch: u64,
    /// Tokens of a sequence.
    pub sequence: u64,
    /// Whether the run reached its target.
    pub success: bool,
    pub time_to_train_s: Option<Seconds>,
    pub step_time_s: Option<Seconds>,
    pub timing: Option<Timing>,
    /// Sequences trained on when the run ended, as its evaluations tell.
    pub samples: Option<u64>,
    /// What was evaluated last: a loss.
    pub evaluated: Option<f64>,
    /// Ranks that the log names, or that have left their mark in it.
    pub ranks: Option<u32>,
    /// Lines that could not be read.
    pub torn_lines: usize,
}

impl Run {
    /// Reads a log.
    pub fn read(log: &str) -> Result<Self> {
        let (entries, torn_lines) = mllog::read(log);
        let value = |key: &str| entries.iter().find(|entry| entry.key == key).map(|it| &it.value);
        let text = |key: &str| value(key)?.as_str().map(str::to_owned);
        let number = |key: &str| value(key)?.as_f64();
        let Some(benchmark) = text(key::BENCHMARK) else {
            bail!("no line says {}: is this the log of rank 0?", key::BENCHMARK)
        };
        let ruled = SEQUENCES.iter().find(|(name, _)| *name == benchmark).map(|(_, ruled)| *ruled);
        let sequence = number(key::MAX_SEQUENCE_LENGTH).map(|length| length as u64).or(ruled);
        let Some(sequence) = sequence else {
            bail!("no line says {}, and {benchmark} has no usual one", key::MAX_SEQUENCE_LENGTH)
        };
        let global_batch = number(key::GLOBAL_BATCH_SIZE).unwrap_or_default() as u64;
        ensure!(global_batch > 0, "no line says {}", key::GLOBAL_BATCH_SIZE);
        let at = |key: &str| entries.iter().find(|entry| entry.key == key);
        let (start, stop) = (at(key::RUN_START), at(key::RUN_STOP));
        ensure!(start.is_some(), "no line says {}: the run never began", key::RUN_START);
        let ends = start.zip(stop);
        let success = stop.is_some_and(|stop| stop.metadata["status"] == "success");
        let mut walk = Walk::new(global_batch, sequence);
        entries.iter().for_each(|entry| walk.pass(entry));
        let (step_time_s, timing) = walk.step_time().unzip();
        let marks = entries.iter().filter(|entry| entry.key == key::INIT_START).count() as u32;
        let last = entries.iter().rfind(|entry| entry.key == key::EVAL_ACCURACY);
        Ok(Self {
            benchmark,
            submitter: text(key::SUBMITTER),
            platform: text(key::PLATFORM),
            global_batch,
            sequence,
            success,
            time_to_train_s: ends.map(|(start, stop)| between(start.time_ms, stop.time_ms)),
            step_time_s,
            timing,
            samples: walk.samples(),
            evaluated: last.and_then(|entry| entry.value.as_f64()),
            ranks: number(key::NUMBER_OF_RANKS).map(|ranks| ranks as u32).or(Some(marks)),
            torn_lines,
        })
    }
}

fn between(from_ms: u64, to_ms: u64) -> Seconds {
    Seconds(to_ms.saturating_sub(from_ms) as f64 / 1000.0)
}

/// A walk through a log, from one evaluation to the next.
struct Walk {
    global_batch: f64,
    tokens: f64,
    /// What positions count in a step, once it is known.
    counted: Option<f64>,
    /// Since when there was nothing but training, and the steps at the last line of one.
    open_ms: Option<u64>,
    last_step: Option<(u64, f64)>,
    /// Times between lines of consecutive steps, and how far apart these are as the log counts.
    gaps: Vec<(f64, f64)>,
    /// The last line of a step before an evaluation, as the log counts, and in steps.
    met: Option<(f64, f64)>,
    /// Training that has ended and whose steps are not known yet.
    trained: Seconds,
    /// Steps that the block's beginning announces.
    announced: Option<f64>,
    /// Steps up to the last evaluation.
    steps: f64,
    /// Training between evaluations: its time, and its steps.
    spans: Vec<(Seconds, f64)>,
    evaluates_apart: bool,
}

impl Walk {
    fn new(global_batch: u64, sequence: u64) -> Self {
        let global_batch = global_batch as f64;
        Self {
            global_batch,
            tokens: global_batch * sequence as f64,
            counted: None,
            open_ms: None,
            last_step: None,
            gaps: Vec::new(),
            met: None,
            trained: Seconds::ZERO,
            announced: None,
            steps: 0.0,
            spans: Vec::new(),
            evaluates_apart: false,
        }
    }

    /// How far a run has come at an evaluation, in steps. Logs count samples, or tokens: those whose
    /// first evaluation or block is further than the tokens of a step.
    fn in_steps(&mut self, position: f64) -> f64 {
        if self.counted.is_none() && position > 0.0 {
            let tokens = position >= self.tokens;
            self.counted = Some(if tokens { self.tokens } else { self.global_batch });
        }
        position / self.counted.unwrap_or(self.global_batch)
    }

    /// What lines of steps count in a step: one, its samples or its tokens, whichever agrees best
    /// with an evaluation that follows; samples where none does.
    fn unit(&self) -> f64 {
        let Some((counted, steps)) = self.met else { return self.global_batch };
        let off = |unit: &f64| (counted / unit / steps).ln().abs();
        let units = [1.0, self.global_batch, self.tokens];
        units.into_iter().min_by(|a, b| off(a).total_cmp(&off(b))).expect("there are three")
    }

    fn pass(&mut self, entry: &Entry) {
        let position = ["samples_count", "epoch_num", "first_epoch_num"]
            .iter()
            .find_map(|name| entry.noted(name))
            .map(|position| self.in_steps(position));
        match entry.key.as_str() {
            key::RUN_START | key::BLOCK_START | key::EVAL_STOP => {
                self.open_ms = Some(entry.time_ms);
                self.last_step = None;
                self.announced = entry.noted("epoch_count").map(|count| self.in_steps(count));
            }
            key::BLOCK_STOP | key::RUN_STOP => {
                self.close(entry.time_ms);
                if let Some(announced) = self.announced.filter(|_| !self.evaluates_apart) {
                    self.span(announced);
                }
            }
            key::EVAL_START => {
                let position = position.unwrap_or(self.steps);
                if let Some((_, counted)) = self.last_step.filter(|_| position > 0.0) {
                    self.met = Some((counted, position));
                }
                self.close(entry.time_ms);
                self.evaluates_apart = true;
                let steps = position - self.steps;
                self.span(steps);
                self.steps += steps;
            }
            key::TRACKED_STATS if is_step(entry) => {
                self.step(entry.time_ms, entry.noted("step"));
            }
            _ => {}
        }
    }

    /// Training stops.
    fn close(&mut self, time_ms: u64) {
        if let Some(open_ms) = self.open_ms.take() {
            self.trained += between(open_ms, time_ms);
        }
    }

    fn span(&mut self, steps: f64) {
        if steps > 0.0 && self.trained > Seconds::ZERO {
            self.spans.push((self.trained, steps));
        }
        self.trained = Seconds::ZERO;
    }

    /// A step has ended, of which the log may say the number.
    fn step(&mut self, time_ms: u64, step: Option<f64>) {
        let Some(step) = step.filter(|_| self.open_ms.is_some()) else { return };
        if let Some((before_ms, before)) = self.last_step.replace((time_ms, step))
            && step > before
        {
            self.gaps.push((between(before_ms, time_ms).0, step - before));
        }
    }

    /// The best that the log tells of a step's time.
    fn step_time(&self) -> Option<(Seconds, Timing)> {
        let unit = self.unit();
        let gaps = self.gaps.iter().map(|(time, counted)| time * unit / counted);
        if let Some(gap) = median(gaps.collect()) {
            return Some((Seconds(gap), Timing::Steps));
        }
        // The first one warms up.
        let skip = usize::from(self.spans.len() > 2);
        let times = self.spans.iter().skip(skip).map(|(time, steps)| time.0 / steps);
        let timing = if self.evaluates_apart { Timing::Evaluations } else { Timing::AtMost };
        median(times.collect()).map(|time| (Seconds(time), timing))
    }

    fn samples(&self) -> Option<u64> {
        let steps = self.steps.max(self.spans.iter().map(|(_, steps)| steps).sum());
        (steps > 0.0).then_some((steps * self.global_batch).round() as u64)
    }
}

/// Whether statistics are those of a training step.
fn is_step(entry: &Entry) -> bool {
    let names = entry.value.as_object().into_iter().flat_map(|stats| stats.keys());
    names.into_iter().any(|name| name.starts_with("train_step_tim"))
}

/// The middle one, or the mean of the two in the middle.
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        even if even % 2 == 0 => Some(f64::midpoint(values[middle - 1], values[middle])),
        _ => Some(values[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines as NeMo writes them for Llama 3.1 405B, shortened: one for each step.
    const STEPS: &str = r#"
:::MLLOG {"namespace": "", "time_ms": 1000, "event_type": "INTERVAL_START", "key": "init_start", "value": null, "metadata": {"file": "pretrain.py", "lineno": 699}}
:::MLLOG {"namespace": "", "time_ms": 1001, "event_type": "INTERVAL_START", "key": "init_start", "value": null, "metadata": {"file": "pretrain.py", "lineno": 699}}
:::MLLOG {"namespace": "", "time_ms": 1002, "event_type": "POINT_IN_TIME", "key": "submission_benchmark", "value": "llama31_405b", "metadata": {}}
:::MLLOG {"namespace": "", "time_ms": 1002, "event_type": "POINT_IN_TIME", "key": "submission_org", "value": "NVIDIA", "metadata": {}}
:::MLLOG {"namespace": "", "time_ms": 1003, "event_type": "POINT_IN_TIME", "key": "global_batch_size", "value": 1152, "metadata": {}}
:::MLLOG {"namespace": "", "time_ms": 1003, "event_type": "POINT_IN_TIME", "key": "max_sequence_length", "value": 8192, "metadata": {}}
:::MLLOG {"namespace": "", "time_ms": 2000, "event_type": "INTERVAL_START", "key": "run_start", "value": null, "metadata": {}}
:::MLLOG {"namespace": "", "time_ms": 2000, "event_type": "INTERVAL_START", "key": "block_start", "value": null, "metadata": {"samples_count": 0}}
:::MLLOG {"namespace": "", "time_ms": 57000, "event_type": "POINT_IN_TIME", "key": "tracked_stats", "value": {"train_step_time": 54.71, "reduced_train_loss": 7.73}, "metadata": {"step": 1152.0}}
:::MLLOG {"namespace": "", "time_ms": 112000, "event_type": "POINT_IN_TIME", "key": "tracked_stats", "value": {"train_step_time": 54.97, "reduced_train_loss": 7.71}, "metadata": {"step": 2304.0}}
:::MLLOG {"namespace": "", "time_ms": 222000, "event_type": "POINT_IN_TIME", "key": "tracked_stats", "value": {"train_step_time": 54.93, "reduced_train_loss": 7.72}, "metadata": {"step": 4608.0}}
:::MLLOG {"namespace": "", "time_ms": 222100, "event_type": "INTERVAL_END", "key": "block_stop", "value": null, "metadata": {"samples_count": 0}}
:::MLLOG {"namespace": "", "time_ms": 222100, "event_type": "INTERVAL_START", "key": "eval_start", "value": null, "metadata": {"samples_count": 4608}}
:::MLLOG {"namespace": "", "time_ms": 322000, "event_type": "POINT_IN_TIME", "key": "eval_accuracy", "value": 5.5, "metadata": {"samples_count": 4608}}
:::MLLOG {"namespace": "", "time_ms": 322000, "event_type": "INTERVAL_END", "key": "eval_stop", "value": null, "metadata": {"samples_count": 4608}}
:::MLLOG {"namespace": "", "time_ms": 323000, "event_type": "INTERVAL_END", "key": "run_stop", "value": null, "metadata": {"samples_count": 4608, "status": "success"}}
"#;

    #[test]
    fn a_step_takes_what_lies_between_the_lines_of_two() {
        let run = Run::read(STEPS).unwrap();
        assert_eq!((run.step_time_s, run.timing), (Some(Seconds(55.0)), Some(Timing::Steps)));
        assert_eq!((run.global_batch, run.sequence, run.ranks), (1152, 8192, Some(2)));
        assert_eq!((run.time_to_train_s, run.success), (Some(Seconds(321.0)), true));
        assert_eq!((run.samples, run.evaluated), (Some(4608), Some(5.5)));
        assert_eq!(run.submitter.as_deref(), Some("NVIDIA"));
    }

    /// A log without lines of steps, of blocks that last so long, with so many samples in each.
    fn blocks(counted: &str, lengths_s: &[u64], samples: u64, with_evaluations: bool) -> String {
        let mut time_ms = 0;
        let mut log = String::new();
        let mut line = |time_ms: u64, key: &str, value: &str, metadata: String| {
            log += &format!(
                ":::MLLOG {{\"namespace\": \"\", \"time_ms\": {time_ms}, \"event_type\": \"POINT_IN_TIME\", \
                 \"key\": \"{key}\", \"value\": {value}, \"metadata\": {{{metadata}}}}}\n"
            );
        };
        line(0, "submission_benchmark", "\"gpt3\"", String::new());
        line(0, "global_batch_size", "2048", String::new());
        line(0, "run_start", "null", String::new());
        for (index, length) in lengths_s.iter().enumerate() {
            let first = index as u64 * samples;
            line(
                time_ms,
                "block_start",
                "null",
                format!("\"first_epoch_num\": {first}, \"epoch_count\": {samples}"),
            );
            time_ms += 1000 * length;
            line(time_ms, "block_stop", "null", format!("\"first_epoch_num\": {first}"));
            let end = format!("\"{counted}\": {}", first + samples);
            if with_evaluations {
                line(time_ms, "eval_start", "null", end.clone());
                time_ms += 30_000;
                line(time_ms, "eval_stop", "null", end.clone());
            }
            line(time_ms, "eval_accuracy", "2.7", end);
        }
        line(time_ms, "run_stop", "null", "\"status\": \"aborted\"".to_owned());
        log
    }

    #[test]
    fn lines_of_steps_count_samples_or_steps() {
        let steps = STEPS.replace("1152.0", "1").replace("2304.0", "2").replace("4608.0", "4");
        assert_eq!(Run::read(&steps).unwrap().step_time_s, Some(Seconds(55.0)));
        // So many steps apart as a batch has samples.
        let far = |number: u64| format!("\"step\": {}.0", number * 16);
        let mut log = STEPS.replace("1152,", "16,").replace("4608", "1024");
        for (before, after) in [(1152, 16), (2304, 32), (1024, 64)] {
            log = log.replace(&format!("\"step\": {before}.0"), &far(after / 16));
        }
        assert_eq!(Run::read(&log).unwrap().step_time_s, Some(Seconds(55.0 / 16.0)));
    }

    #[test]
    fn without_such_lines_it_takes_what_lies_between_evaluations() {
        // GPT-3 counts tokens: 12 steps of 2,048 x 2,048; the first block warms up.
        let log = blocks("epoch_num", &[170, 120, 123, 120], 12 * 2048 * 2048, true);
        let run = Run::read(&log).unwrap();
        assert_eq!((run.step_time_s, run.timing), (Some(Seconds(10.0)), Some(Timing::Evaluations)));
        assert_eq!((run.success, run.sequence), (false, 2048));
        // Others count samples, however many there will be.
        let log = blocks("samples_count", &[24; 1200], 2 * 2048, true);
        assert_eq!(Run::read(&log).unwrap().step_time_s, Some(Seconds(12.0)));
    }

    #[test]
    fn where_evaluations_are_inside_a_step_takes_at_most_so_long() {
        let log = blocks("epoch_num", &[300, 240, 240], 12 * 2048 * 2048, false);
        let run = Run::read(&log).unwrap();
        assert_eq!((run.step_time_s, run.timing), (Some(Seconds(20.0)), Some(Timing::AtMost)));
    }

    #[test]
    fn what_is_no_log_of_a_run_says_what_is_missing() {
        let refused = |log: &str| Run::read(log).unwrap_err().to_string();
        insta::assert_snapshot!(refused("nothing"), @"no line says submission_benchmark: is this the log of rank 0?");
        let lines: Vec<&str> = STEPS.lines().filter(|line| !line.contains("run_start")).collect();
        insta::assert_snapshot!(refused(&lines.join("\n")), @"no line says run_start: the run never began");
    }
}
