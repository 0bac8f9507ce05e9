//! Saving beside training: a thread that writes while the next steps run.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use model::Config;
use units::{Rank, Seconds};

use super::commit::{commit, folder_name, missing, retain, write_shard};
use super::{Progress, Shard};
use crate::Error;
use crate::store::Store;

/// The pauses in which rank 0 looks for what other ranks have written, from the first to the longest.
const PAUSES: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(200)];

/// Who saves what, where.
#[derive(Clone)]
pub struct Setup {
    /// Where to.
    pub store: Arc<dyn Store>,
    /// The model.
    pub config: Config,
    /// Which rank this is.
    pub rank: Rank,
    /// Of how many that save together.
    pub ranks: u32,
    /// The same number on all of them, which no others have.
    pub attempt: u64,
    /// Checkpoints to keep.
    pub keep: usize,
    /// How long rank 0 waits for the others to have written.
    pub patience: Duration,
    /// Whether these ranks are still those that the run has: else they make no checkpoint of it.
    pub is_ours: Arc<dyn Fn() -> bool + Send + Sync>,
}

/// What became of a save.
#[derive(Debug)]
pub struct Saved {
    /// After which step.
    pub step: u64,
    /// How long writing took, on this rank.
    pub time: Seconds,
    /// On rank 0 whether there is a new checkpoint, elsewhere whether this rank's part is written.
    pub outcome: Result<(), Error>,
}

/// Saves on a thread of its own, one checkpoint at a time. Dropping it ends a wait for other ranks,
/// and then what has not become a checkpoint never will.
pub struct Saver {
    jobs: Option<SyncSender<(Progress, Arc<Shard>)>>,
    results: Receiver<Saved>,
    /// Told of the step that no rank waits for any more, or dropped, to end the wait for other ranks.
    interest: Option<Sender<u64>>,
    /// The step of the last save that was handed over.
    last: u64,
    /// Saves handed over whose result was not asked for yet.
    pending: usize,
    thread: Option<JoinHandle<()>>,
}

impl Saver {
    /// Ready to save.
    #[must_use]
    pub fn new(setup: Setup) -> Self {
        let (jobs, inbox) = mpsc::sync_channel::<(Progress, Arc<Shard>)>(0);
        let (results_in, results) = mpsc::channel();
        let (interest, interested) = mpsc::channel();
        let work = move || {
            for (progress, shard) in inbox {
                let start = Instant::now();
                let outcome = setup.save(progress, &shard, &interested);
                let time = Seconds(start.elapsed().as_secs_f64());
                // Nobody may be left to tell.
                drop(results_in.send(Saved { step: progress.step, time, outcome }));
            }
        };
        let thread = std::thread::Builder::new().name("checkpoint".to_owned()).spawn(work);
        let thread = Some(thread.expect("a thread can be started"));
        Self { jobs: Some(jobs), results, interest: Some(interest), last: 0, pending: 0, thread }
    }

    /// Saves, once the save before is done.
    pub fn save(&mut self, progress: Progress, shard: Arc<Shard>) {
        self.last = progress.step;
        let jobs = self.jobs.as_ref().expect("it is open until it is dropped");
        jobs.send((progress, shard)).expect("the thread lives until it is dropped");
        self.pending += 1;
    }

    /// What has been saved since it was last asked.
    pub fn finished(&mut self) -> Vec<Saved> {
        let saved: Vec<_> = self.results.try_iter().collect();
        self.pending -= saved.len();
        saved
    }

    /// Waits for what is being saved.
    pub fn finish(&mut self) -> Vec<Saved> {
        let saved: Vec<_> = self.results.iter().take(self.pending).collect();
        self.pending = 0;
        saved
    }

    /// Ends the wait for other ranks, of which one has failed to write its part of the last save.
    pub fn give_up(&mut self) {
        if self.pending > 0
            && let Some(interest) = &self.interest
        {
            let _ = interest.send(self.last); // it has ended already when nobody listens
        }
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        self.jobs = None;
        self.interest = None;
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(!matches!(ended, Some(Err(_))) || std::thread::panicking(), "saving panicked");
    }
}

impl Setup {
    fn save(
        &self,
        progress: Progress,
        shard: &Shard,
        interest: &Receiver<u64>,
    ) -> Result<(), Error> {
        let store = &*self.store;
        write_shard(store, progress.step, self.attempt, self.rank, shard)?;
        if self.rank != Rank(0) {
            return Ok(());
        }
        let begin = Instant::now();
        let [mut pause, longest] = PAUSES;
        let commit = || match (self.is_ours)() {
            true => commit(store, progress, self.attempt, self.ranks, &self.config),
            false => Err(Error::NotOurs { folder: self.place(progress.step) }),
        };
        while !commit()? {
            let waited = begin.elapsed();
            let goes_on = match interest.recv_timeout(pause) {
                Ok(step) => step < progress.step,
                Err(error) => error == RecvTimeoutError::Timeout,
            };
            if waited > self.patience || !goes_on {
                return Err(self.incomplete(progress.step, waited));
            }
            pause = (2 * pause).min(longest);
        }
        retain(store, self.keep, progress.step)
    }

    fn incomplete(&self, step: u64, waited: Duration) -> Error {
        let rank = missing(&*self.store, step, self.attempt, self.ranks).unwrap_or(self.rank);
        Error::Incomplete { folder: self.place(step), rank, waited_s: waited.as_secs_f64() }
    }

    fn place(&self, step: u64) -> String {
        self.store.place(&folder_name(step, self.attempt))
    }
}
