//! The flight recorder: what a rank did last, for whoever asks why a job stopped.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use serde::{Serialize, Serializer};
use units::{Bytes, BytesPerSecond, Rank, Seconds};

use crate::operation::Active;
use crate::pulse::{Doing, LastHeard};
use crate::{Error, Group, SlowLink};

/// How many operations that are over are kept.
const KEPT: usize = 256;

/// What a rank did last, and what it knows of the others.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Flight {
    /// Whose it is.
    pub rank: Rank,
    /// How many operations the rank has posted or carried out itself in all.
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
    /// Its number in the order of posting, on its group or between two ranks of it, from 0; those that are waited
    /// for at once among ranks that share memory are numbered apart.
    pub sequence: u64,
    /// The size of its buffer.
    pub bytes: Bytes,
    /// When it was posted, from the start of communication; to some milliseconds for what a rank carries out itself.
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

impl Flight {
    /// Adds what the rank carried out itself, so many operations in all, in the order in which operations ended.
    pub(crate) fn add(&mut self, posted: u64, records: impl Iterator<Item = Record>) {
        self.posted += posted;
        self.operations.extend(records);
        let end = |record: &Record| record.ended_s.map_or(f64::INFINITY, |end| end.0);
        self.operations.sort_by(|a, b| end(a).total_cmp(&end(b)));
        let over = self.operations.iter().filter(|record| record.ended_s.is_some()).count();
        self.operations.drain(..over.saturating_sub(KEPT));
    }

    /// What the members of a group were last known to do; this rank itself is in this.
    pub(crate) fn last_heard(&self, group: &Group, own: Doing) -> LastHeard {
        let doing = |rank: &Rank| match self.peers.iter().find(|peer| peer.rank == *rank) {
            Some(peer) => Some((*rank, peer.doing?)),
            None => (*rank == self.rank).then_some((*rank, own)),
        };
        LastHeard(group.ranks.iter().filter_map(doing).collect())
    }
}

/// What the rank's own thread is in at this moment, for the heartbeats.
#[derive(Debug, Default)]
pub(crate) struct Current {
    group: AtomicU64,
    /// The operation's number plus one; 0 when there is none.
    number: AtomicU64,
}

impl Current {
    fn set(&self, operation: Option<(u64, u64)>) {
        let (group, number) = operation.map_or((0, 0), |(group, number)| (group, number + 1));
        self.group.store(group, Relaxed);
        self.number.store(number, Relaxed);
    }

    /// What to tell the peers.
    pub(crate) fn doing(&self) -> Option<Doing> {
        let group = self.group.load(Relaxed);
        let sequence = self.number.load(Relaxed).checked_sub(1)?;
        Some(Doing::AtOnce { group, sequence })
    }
}

/// Keeps the last operations that the rank carried out on its own thread, of which one may take less than a
/// microsecond: memory and labels are used again, and times are of the kernel's coarse clock, which goes by some
/// milliseconds and takes no time to read.
#[derive(Debug)]
pub(crate) struct Log {
    /// On that clock.
    begin: Duration,
    current: Arc<Current>,
    posted: u64,
    /// The operation with number `n` is at `n % KEPT`.
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    label: String,
    operation: (u64, u64),
    bytes: Bytes,
    posted: Duration,
    ended: Duration,
    waiting_for: Vec<Rank>,
    failure: Option<String>,
}

impl Log {
    /// Counts from now on.
    pub(crate) fn new(current: Arc<Current>) -> Self {
        Self { begin: coarse_time(), current, posted: 0, entries: Vec::new() }
    }

    pub(crate) fn posted(&self) -> u64 {
        self.posted
    }

    /// Notes that an operation begins.
    pub(crate) fn begin(&mut self, label: &str, operation: (u64, u64), bytes: Bytes) {
        self.current.set(Some(operation));
        let at = self.posted as usize % KEPT;
        let now = coarse_time();
        self.posted += 1;
        if self.entries.len() < KEPT {
            let (label, waiting_for) = (label.to_owned(), Vec::new());
            let (posted, ended, failure) = (now, now, None);
            self.entries.push(Entry {
                label,
                operation,
                bytes,
                posted,
                ended,
                waiting_for,
                failure,
            });
            return;
        }
        let entry = &mut self.entries[at];
        entry.label.clear();
        entry.label.push_str(label);
        entry.waiting_for.clear();
        (entry.operation, entry.bytes, entry.posted, entry.failure) = (operation, bytes, now, None);
    }

    /// Notes that the operation is over, and why it failed if it did.
    pub(crate) fn end(&mut self, failure: Option<&Error>) {
        self.current.set(None);
        let at = (self.posted as usize - 1) % KEPT;
        let entry = &mut self.entries[at];
        entry.ended = coarse_time();
        entry.failure = failure.map(ToString::to_string);
        if let Some(Error::Timeout { waiting_for, .. }) = failure {
            entry.waiting_for.clone_from(waiting_for);
        }
    }

    /// The last operations.
    pub(crate) fn records(&self) -> impl Iterator<Item = Record> {
        let since = |at: Duration| Seconds((at - self.begin).as_secs_f64());
        self.entries.iter().map(move |entry| Record {
            label: entry.label.as_str().into(),
            group: entry.operation.0,
            sequence: entry.operation.1,
            bytes: entry.bytes,
            posted_s: since(entry.posted),
            started_s: Some(since(entry.posted)),
            ended_s: Some(since(entry.ended)),
            waiting_for: entry.waiting_for.clone(),
            failure: entry.failure.clone(),
        })
    }
}

/// What the kernel's coarse clock shows.
fn coarse_time() -> Duration {
    let time = clock_gettime(ClockId::MonotonicCoarse);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Keeps the last operations.
pub(crate) struct Recorder {
    begin: Instant,
    posted: u64,
    over: VecDeque<Record>,
}

impl Recorder {
    /// Counts from `begin`.
    pub(crate) fn new(begin: Instant) -> Self {
        Self { begin, posted: 0, over: VecDeque::with_capacity(KEPT) }
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
