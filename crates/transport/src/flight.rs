//! The flight recorder: what a rank did last, for whoever asks why a job stopped.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use serde::{Serialize, Serializer};
use units::{Bytes, BytesPerSecond, Rank, Seconds};

use crate::SlowLink;
use crate::operation::Active;
use crate::pulse::Doing;

/// How many operations that are over are kept.
const KEPT: usize = 256;

/// What a rank did last, and what it knows of the others.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Flight {
    /// Whose it is.
    pub rank: Rank,
    /// How many operations the rank has posted in all.
    pub posted: u64,
    /// The last operations that are over, in the order in which they ended, then those under way in
    /// the order of posting.
    pub operations: Vec<Record>,
    /// The other ranks that it has or had a stream with, or lost.
    pub peers: Vec<Peer>,
    /// The links that were found to be much slower than others, in the order in which they were.
    pub slow_links: Vec<SlowLink>,
}

/// An operation.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Record {
    /// What its messages call it.
    #[serde(serialize_with = "text")]
    pub label: Arc<str>,
    /// The group's number.
    pub group: u64,
    /// Its number in the order of posting, on its group or between two ranks of it, from 0.
    pub sequence: u64,
    /// The size of its buffer.
    pub bytes: Bytes,
    /// When it was posted, from the start of communication.
    pub posted_s: Seconds,
    /// When its first byte moved.
    pub started_s: Option<Seconds>,
    /// When it was over.
    pub ended_s: Option<Seconds>,
    /// The ranks with which a transfer of it was outstanding, then or now.
    pub waiting_for: Vec<Rank>,
    /// Why it failed.
    pub failure: Option<String>,
}

fn text<S: Serializer>(text: &str, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(text)
}

/// Another rank, as it was last heard of.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Peer {
    /// Which.
    pub rank: Rank,
    /// Its host, where that is known.
    pub host: Option<String>,
    /// What it last said that it was doing.
    pub doing: Option<Doing>,
    /// For how many heartbeats of this rank nothing has come from it.
    pub missed_heartbeats: u32,
    /// How its stream ended.
    pub gone: Option<String>,
    /// How fast frames of 64 KiB and more went to it when there last were enough to tell.
    pub sends: Option<BytesPerSecond>,
    /// How fast they came from it.
    pub receives: Option<BytesPerSecond>,
}

/// Keeps the last operations.
pub(crate) struct Recorder {
    begin: Instant,
    posted: u64,
    over: VecDeque<Record>,
}

impl Recorder {
    pub(crate) fn new() -> Self {
        Self { begin: Instant::now(), posted: 0, over: VecDeque::with_capacity(KEPT) }
    }

    /// Notes that an operation was posted.
    pub(crate) fn post(&mut self) {
        self.posted += 1;
    }

    pub(crate) fn posted(&self) -> u64 {
        self.posted
    }

    /// Notes that an operation is over, at the time given, and why it failed if it did.
    pub(crate) fn end(&mut self, operation: &Active, at: Instant, failure: Option<String>) {
        let ended_s = Some(self.since(at));
        let record = Record { ended_s, failure, ..self.record(operation) };
        self.over.truncate(KEPT - 1);
        self.over.push_front(record);
    }

    /// The last operations, and those that are under way.
    pub(crate) fn operations<'a>(
        &self,
        under_way: impl Iterator<Item = &'a Active>,
    ) -> Vec<Record> {
        let over = self.over.iter().rev().cloned();
        over.chain(under_way.map(|operation| self.record(operation))).collect()
    }

    fn record(&self, operation: &Active) -> Record {
        Record {
            label: Arc::clone(&operation.label),
            group: operation.key.group,
            sequence: operation.key.sequence,
            bytes: operation.bytes(),
            posted_s: self.since(operation.posted),
            started_s: operation.started.map(|at| self.since(at)),
            ended_s: None,
            waiting_for: operation.waiting_for(),
            failure: None,
        }
    }

    fn since(&self, at: Instant) -> Seconds {
        Seconds(at.saturating_duration_since(self.begin).as_secs_f64())
    }
}
