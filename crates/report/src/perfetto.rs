//! Traces in the trace-event format of Chrome, which Perfetto opens.

use std::collections::{BTreeMap, BTreeSet};

use program::{Action, Instruction, Lane, Program, Span, Trace, Transfer};
use serde::Deserialize;
use serde_json::{Value, json};
use units::{Rank, Seconds};

/// The thread that shows what a rank computes.
const COMPUTE: u32 = 1;
/// The thread that shows what a rank waits for.
const WAIT: u32 = 2;
/// The first of the threads that show transfers; as many as are under way at once.
const TRANSFER: u32 = 3;

/// Traces of one step of `program`, each with the name of its source, as JSON that Perfetto and
/// `chrome://tracing` load: a process for each source and rank in it, a thread for each lane.
///
/// # Panics
/// When a trace is of another program.
#[must_use]
pub fn perfetto(program: &Program, sources: &[(&str, &Trace)]) -> String {
    let mut events = Vec::new();
    for (source, (name, trace)) in (0..).zip(sources) {
        let ranks: BTreeSet<Rank> = trace.spans.iter().map(|span| span.rank).collect();
        for rank in ranks {
            let process = Process {
                program,
                rank,
                // Sources of one rank stand one below the other. Process 0 is special to viewers.
                id: 1 + rank.0 * sources.len() as u32 + source,
            };
            events.push(process.label("process_name", 0, &format!("{rank} {name}")));
            process.write(trace, &mut events);
        }
    }
    json!({ "displayTimeUnit": "ms", "traceEvents": events }).to_string()
}

/// A file of [`perfetto`].
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct File {
    trace_events: Vec<Event>,
}

/// What is read of an event of it: a span, or the label of a process or thread.
#[derive(Deserialize)]
struct Event {
    ph: String,
    pid: u32,
    tid: u32,
    name: String,
    args: Arguments,
    /// Microseconds.
    #[serde(default)]
    ts: f64,
    #[serde(default)]
    dur: f64,
}

#[derive(Deserialize)]
struct Arguments {
    instruction: Option<u32>,
    name: Option<String>,
}

/// The traces in a file that [`perfetto`] wrote, by the name of their source, to the nanosecond.
///
/// # Errors
/// When the text is not JSON of that form.
pub fn read_perfetto(text: &str) -> Result<BTreeMap<String, Trace>, serde_json::Error> {
    let File { trace_events: events } = serde_json::from_str(text)?;
    // A process is called `rank 3 predicted`.
    let process = |event: &Event| {
        let mut words = event.args.name.as_deref()?.split(' ').skip(1);
        let rank = words.next()?.parse().ok()?;
        Some((event.pid, (Rank(rank), words.next()?.to_owned())))
    };
    let named = events.iter().filter(|event| event.name == "process_name");
    let processes: BTreeMap<u32, (Rank, String)> = named.filter_map(process).collect();
    let mut traces: BTreeMap<String, Trace> = BTreeMap::new();
    for event in events.iter().filter(|event| event.ph == "X") {
        let (Some((rank, source)), Some(instruction)) =
            (processes.get(&event.pid), event.args.instruction)
        else {
            continue;
        };
        let lane = match event.tid {
            COMPUTE => Lane::Compute,
            WAIT => Lane::Wait,
            _ => Lane::Transfer,
        };
        let (start, end) = (Seconds(event.ts * 1e-6), Seconds((event.ts + event.dur) * 1e-6));
        let span = Span { rank: *rank, instruction, lane, start, end };
        traces.entry(source.clone()).or_default().spans.push(span);
    }
    Ok(traces)
}

/// One rank in one trace.
struct Process<'a> {
    program: &'a Program,
    rank: Rank,
    id: u32,
}

impl Process<'_> {
    fn write(&self, trace: &Trace, events: &mut Vec<Value>) {
        let mut spans: Vec<&Span> =
            trace.spans.iter().filter(|span| span.rank == self.rank).collect();
        spans.sort_by(|a, b| a.start.0.total_cmp(&b.start.0));
        // When each transfer thread is free again.
        let mut free: Vec<u64> = Vec::new();
        for span in spans {
            let thread = match span.lane {
                Lane::Compute => COMPUTE,
                Lane::Wait => WAIT,
                Lane::Transfer => TRANSFER + first_free(&mut free, span),
            };
            events.push(self.event(span, thread));
        }
        events.push(self.label("thread_name", COMPUTE, "compute"));
        events.push(self.label("thread_name", WAIT, "wait"));
        for thread in (TRANSFER..).take(free.len()) {
            events.push(self.label("thread_name", thread, "transfer"));
        }
    }

    fn event(&self, span: &Span, thread: u32) -> Value {
        let (start, end) = (nanoseconds(span.start), nanoseconds(span.end));
        json!({
            "ph": "X",
            "pid": self.id,
            "tid": thread,
            "ts": microseconds(start),
            "dur": microseconds(end - start),
            "name": self.name(span),
            "args": { "instruction": span.instruction, "as listed": self.listed(span).to_string() },
        })
    }

    fn label(&self, what: &str, thread: u32, name: &str) -> Value {
        json!({ "ph": "M", "pid": self.id, "tid": thread, "name": what, "args": { "name": name } })
    }

    fn listed(&self, span: &Span) -> &Instruction {
        &self.program.instructions(self.rank)[span.instruction as usize]
    }

    fn name(&self, span: &Span) -> String {
        match self.listed(span) {
            Instruction::Wait { ticket } => {
                let transfer = self.program.transfer(self.rank, *ticket);
                format!("wait for {}", transfer.map(describe).unwrap_or_default())
            }
            Instruction::Post { .. } if span.lane == Lane::Wait => "too many in flight".to_owned(),
            Instruction::Post { transfer, .. } => describe(transfer),
            Instruction::Compute { segment, pass, layer, microbatch, piece }
                if segment.is_layer() =>
            {
                format!("{pass} {segment}{piece} layer{layer} mb{microbatch}")
            }
            Instruction::Compute { segment, pass, microbatch, .. } => {
                format!("{pass} {segment} mb{microbatch}")
            }
            other => other.to_string(),
        }
    }
}

fn describe(transfer: &Transfer) -> String {
    let (axis, buffer) = (transfer.axis, transfer.buffer);
    match transfer.action {
        Action::Collective(kind) => format!("{kind} {axis} {buffer}"),
        Action::Send { .. } => format!("send {axis} {buffer}"),
        Action::Receive { .. } => format!("receive {axis} {buffer}"),
        Action::Shift => format!("shift {axis} {buffer}"),
    }
}

/// The first thread that is free when the span starts; viewers draw one span at a time on each.
fn first_free(free: &mut Vec<u64>, span: &Span) -> u32 {
    let start = nanoseconds(span.start);
    let thread = free.iter().position(|free| *free <= start).unwrap_or(free.len());
    if thread == free.len() {
        free.push(0);
    }
    free[thread] = nanoseconds(span.end);
    thread as u32
}

/// Whole numbers, so that spans which touch do not overlap by a rounding error.
fn nanoseconds(time: Seconds) -> u64 {
    (time.0 * 1e9).round() as u64
}

fn microseconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::fixture::{program, trace};

    fn events(text: &str, phase: &str) -> Vec<Value> {
        let parsed: Value = serde_json::from_str(text).unwrap();
        let events = parsed["traceEvents"].as_array().unwrap();
        events.iter().filter(|event| event["ph"] == phase).cloned().collect()
    }

    #[test]
    fn what_is_written_can_be_read() {
        let mut later = trace();
        later.spans.truncate(2);
        let sources = [("predicted", &later), ("measured", &trace())];
        let read = read_perfetto(&perfetto(&program(), &sources)).unwrap();
        let order = |trace: &Trace| {
            let mut spans: Vec<_> = trace
                .spans
                .iter()
                .map(|span| (span.rank, span.lane, span.instruction, nanoseconds(span.end)))
                .collect();
            spans.sort_unstable();
            spans
        };
        assert_eq!(order(&read["measured"]), order(&trace()));
        assert_eq!(order(&read["predicted"]), order(&later));
        assert!(read_perfetto("{}").is_err());
    }

    #[test]
    fn every_span_is_there_under_its_name() {
        let text = perfetto(&program(), &[("measured", &trace())]);
        let events = events(&text, "X");
        assert_eq!(events.len(), trace().spans.len());
        let names: Vec<_> = events.iter().take(4).map(|event| &event["name"]).collect();
        let expected = [
            "forward qkv layer3 mb0",
            "send pipeline stream4 mb0",
            "all-reduce data gradients(layer3)",
            "wait for all-reduce data gradients(layer3)",
        ];
        assert_eq!(names, expected);
    }

    #[test]
    fn each_rank_of_each_source_is_a_process() {
        let text = perfetto(&program(), &[("predicted", &trace()), ("measured", &trace())]);
        let labels = events(&text, "M");
        let processes = labels.iter().filter(|event| event["name"] == "process_name");
        let names: BTreeMap<_, _> = processes
            .map(|event| (event["pid"].as_u64().unwrap(), event["args"]["name"].clone()))
            .collect();
        assert_eq!(names.len(), 8);
        assert_eq!(
            (&names[&1], &names[&2]),
            (&json!("rank 0 predicted"), &json!("rank 0 measured"))
        );
    }

    #[test]
    fn spans_on_one_thread_do_not_overlap() {
        let text = perfetto(&program(), &[("measured", &trace())]);
        let mut ends: BTreeMap<(u64, u64), f64> = BTreeMap::new();
        for event in events(&text, "X") {
            let thread = (event["pid"].as_u64().unwrap(), event["tid"].as_u64().unwrap());
            let start = event["ts"].as_f64().unwrap();
            let end = ends.entry(thread).or_default();
            assert!(start >= *end, "{event}");
            *end = start + event["dur"].as_f64().unwrap();
        }
        let transfer_threads = ends.keys().filter(|(pid, tid)| *pid == 1 && *tid >= 3);
        assert_eq!(transfer_threads.count(), 2);
    }
}
