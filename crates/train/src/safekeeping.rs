//! What keeps the state of a run safe: checkpoints, and an orderly stop.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use checkpoint::sharded::{Progress, Saved, Saver};
use compute::Operators;
use program::{Axis, Program};
use units::Seconds;

use crate::replicas::Replicas;
use crate::state::snapshot;
use crate::{Error, Event, Worker};

/// How a rank keeps its state safe.
#[derive(Default)]
pub struct Safekeeping {
    /// Set when this process is asked to stop: all ranks save after the step at hand and stop.
    pub stop: Arc<AtomicBool>,
    /// Set when all ranks are to leave after the step at hand, since there could be more of them.
    pub called: Arc<AtomicBool>,
    /// Copies in the memory of other ranks, if there are.
    pub replicas: Option<Replicas>,
    /// Where checkpoints are saved, if they are.
    pub checkpoints: Option<Checkpoints>,
    /// Ranks that hold the same compare it after every so many steps; 0 never.
    pub compare_every_steps: u64,
    /// After which steps a bit of this rank's state is flipped, to see that it is found.
    pub flips: BTreeSet<u64>,
}

/// When and what is saved.
pub struct Checkpoints {
    /// Saves this rank's part.
    pub saver: Saver,
    /// A checkpoint after every so many steps and after the last; 0 only when asked to stop.
    pub every_steps: u64,
    /// Whether training goes on while a checkpoint is written.
    pub asynchronous: bool,
    /// The run at its start; how far it has come is filled in.
    pub run: Progress,
    /// Why this rank could not write its part of the last checkpoint.
    failure: Option<String>,
}

impl Safekeeping {
    /// Whether this rank was asked to stop.
    pub(crate) fn stops(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Whether ranks compare what they hold after a step.
    pub(crate) fn compares_after(&self, step: u64) -> bool {
        self.compare_every_steps > 0 && step.is_multiple_of(self.compare_every_steps)
    }

    /// What was copied after a later step may be wrong: it is forgotten.
    pub(crate) fn distrust(&mut self, step: u64) {
        if let Some(replicas) = &mut self.replicas {
            replicas.forget_after(step);
        }
    }

    /// Whatever was copied is forgotten.
    pub fn forget_copies(&mut self) {
        if let Some(replicas) = &mut self.replicas {
            replicas.forget();
        }
    }

    /// Copies the state that training starts from.
    ///
    /// # Errors
    /// When communication fails.
    pub(crate) fn begin<O: Operators>(
        &mut self,
        worker: &mut Worker<O>,
        program: &Program,
        step: u64,
    ) -> Result<(), Error> {
        let replicas = self.replicas.as_mut();
        replicas.map_or(Ok(()), |replicas| replicas.begin(worker, program, step))
    }

    /// After a loss: keeps what has arrived of the others' state.
    pub(crate) fn salvage<O: Operators>(&mut self, worker: &mut Worker<O>, program: &Program) {
        if let Some(replicas) = &mut self.replicas {
            replicas.salvage(worker, program);
        }
    }

    /// Saves when it is time to, after `step` of `steps` steps; tells of what has been saved.
    ///
    /// # Errors
    /// When communication fails. A save that fails is told of and training goes on.
    pub(crate) fn after_step<O: Operators>(
        &mut self,
        worker: &mut Worker<O>,
        program: &Program,
        (step, steps): (u64, u64),
        observe: &mut dyn FnMut(&Event),
    ) -> Result<(), Error> {
        if let Some(replicas) = &mut self.replicas {
            replicas.after_step(worker, program, step)?;
        }
        let Some(checkpoints) = &mut self.checkpoints else { return Ok(()) };
        checkpoints.tell(false, observe);
        let every = checkpoints.every_steps;
        if every > 0 && (step.is_multiple_of(every) || step == steps) {
            checkpoints.save(worker, program, step, observe)?;
        }
        if step == steps {
            checkpoints.agree(worker, observe)?;
        }
        Ok(())
    }

    /// Saves and waits until it is done, since all ranks were asked to stop after `step`.
    ///
    /// # Errors
    /// [`Error::Stopped`], always.
    pub(crate) fn stop<O: Operators>(
        &mut self,
        worker: &mut Worker<O>,
        program: &Program,
        step: u64,
        observe: &mut dyn FnMut(&Event),
    ) -> Result<(), Error> {
        let Some(checkpoints) = &mut self.checkpoints else {
            return Err(Error::Stopped { step, saved: "nothing is saved, as the job says".into() });
        };
        checkpoints.save(worker, program, step, observe)?;
        let saved = match checkpoints.agree(worker, observe)? {
            None => "its state is saved".to_owned(),
            Some(reason) => format!("ITS STATE COULD NOT BE SAVED: {reason}"),
        };
        Err(Error::Stopped { step, saved })
    }

    /// Keeps the state after `step`, in memory or else in a checkpoint, for the ranks to go on from when
    /// they have met anew.
    ///
    /// # Errors
    /// [`Error::Called`], or what went wrong.
    pub(crate) fn part<O: Operators>(
        &mut self,
        worker: &mut Worker<O>,
        program: &Program,
        step: u64,
        observe: &mut dyn FnMut(&Event),
    ) -> Result<(), Error> {
        if let Some(replicas) = &mut self.replicas {
            replicas.hold(worker, program, step)?;
        } else if let Some(checkpoints) = &mut self.checkpoints {
            checkpoints.save(worker, program, step, observe)?;
            checkpoints.agree(worker, observe)?;
        }
        Err(Error::Called { step })
    }
}

impl Checkpoints {
    /// Ready to save a run.
    #[must_use]
    pub fn new(saver: Saver, every_steps: u64, asynchronous: bool, run: Progress) -> Self {
        Self { saver, every_steps, asynchronous, run, failure: None }
    }

    fn save<O: Operators>(
        &mut self,
        worker: &mut Worker<O>,
        program: &Program,
        step: u64,
        observe: &mut dyn FnMut(&Event),
    ) -> Result<(), Error> {
        let start = std::time::Instant::now();
        // The committing rank would wait for the parts of those that have failed; so they go first.
        if worker.rank().0 != 0 {
            self.tell(true, observe);
        }
        self.agree_on_failures(worker)?;
        let shard = Arc::new(snapshot(worker, program));
        let progress = Progress { step, position: step * program.global_batch(), ..self.run };
        self.saver.save(progress, shard);
        if !self.asynchronous {
            self.agree(worker, observe)?;
        }
        let stall_s = Seconds(start.elapsed().as_secs_f64());
        observe(&Event::Saving { step, stall_s });
        Ok(())
    }

    /// Tells of what has been saved, if `wait` after all of it.
    fn tell(&mut self, wait: bool, observe: &mut dyn FnMut(&Event)) -> Option<String> {
        let saved = if wait { self.saver.finish() } else { self.saver.finished() };
        for Saved { step, time, outcome } in saved {
            self.failure = outcome.err().map(|error| error.to_string());
            observe(&match &self.failure {
                None => Event::Saved { step, time_s: time },
                Some(reason) => Event::NotSaved { step, reason: reason.clone() },
            });
        }
        self.failure.clone()
    }

    /// Waits for what is being saved; why it could not be, on every rank alike.
    fn agree<O: Operators>(
        &mut self,
        worker: &mut Worker<O>,
        observe: &mut dyn FnMut(&Event),
    ) -> Result<Option<String>, Error> {
        // The committing rank would wait for the parts of those that have failed; so they go first.
        if worker.rank().0 != 0 {
            self.tell(true, observe);
        }
        self.agree_on_failures(worker)?;
        self.tell(true, observe);
        self.agree_on_failures(worker)
    }

    /// Whether the last save failed on any rank, and why; then no rank waits for it any more.
    fn agree_on_failures<O: Operators>(
        &mut self,
        worker: &mut Worker<O>,
    ) -> Result<Option<String>, Error> {
        let rank = worker.rank();
        let own = self.failure.take().unwrap_or_default();
        let (communicator, world) = worker.communication(Axis::World);
        let all = communicator.all_gather_bytes(world, own.as_bytes());
        let all = all.map_err(|source| Error::Communication { rank, source })?;
        let failure = all.iter().find(|reason| !reason.is_empty());
        if failure.is_some() {
            self.saver.give_up();
        }
        Ok(failure.map(|reason| String::from_utf8_lossy(reason).into_owned()))
    }
}
