//! The training loop of one rank.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::time::Instant;

use checkpoint::sharded::Shard;
use compute::Operators;
use program::{Axis, Instruction, Lane, Program, Span, Trace};
use serde::{Deserialize, Serialize};
use units::{Rank, Seconds};

use crate::agreement::{Agreement, Word};
use crate::control::Loss;
use crate::numbers::{Norms, OnDivergence};
use crate::pace::{Pace, Slow};
use crate::state::kinds;
use crate::worker::Clock;
use crate::{Batches, Error, LearningRate, Safekeeping, Worker};

/// The programs of a run.
#[derive(Debug, Clone)]
pub struct Programs {
    /// One optimizer step.
    pub step: Program,
    /// One evaluation.
    pub evaluation: Program,
    /// The outer update of groups that train apart, after every so many steps as the step's program
    /// says and after the last.
    pub outer: Option<Program>,
}

/// How long and how fast to train.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// The learning rate of each step, and how many there are.
    pub learning_rate: LearningRate,
    /// Evaluate after every so many steps, and after the last.
    pub evaluate_every: u64,
    /// Steps that were done before: 0, or those of the checkpoint that was resumed.
    pub first_step: u64,
    /// What is done about a step whose loss or gradient is no number, or too large.
    pub on_divergence: OnDivergence,
    /// A gradient is too large when its norm is over so many times the median of late; 0 never.
    pub spike: f64,
}

/// What happened; every rank sees the same events with its own times.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "event")]
pub enum Event {
    /// A step is done.
    Step {
        /// Which, from 1.
        step: u64,
        /// Mean loss over its tokens, before the update.
        loss: f64,
        /// Global gradient norm before clipping.
        gradient_norm: f64,
        /// Learning rate.
        learning_rate: f64,
        /// From its start to the next one's, without evaluation.
        step_time_s: Seconds,
        /// Time this rank waited for transfers of every axis but the pipeline.
        exposed_communication_s: Seconds,
        /// Time this rank waited for its neighbours in the pipeline: bubble, and transfers.
        pipeline_wait_s: Seconds,
    },
    /// A step was done again, since its numbers were wrong the first time.
    Redone {
        /// Which.
        step: u64,
        /// The ranks whose numbers were none.
        ranks: Vec<Rank>,
        /// Whether they were right the second time: then it was the hardware.
        right: bool,
    },
    /// A step was left without an update.
    Skipped {
        /// Which.
        step: u64,
        /// Its global gradient norm, if that is a number.
        gradient_norm: f64,
        /// The largest that would have been right.
        limit: f64,
    },
    /// The state of an earlier step was gone back to, and the text of the steps since is left out.
    RolledBack {
        /// After which step training goes on.
        step: u64,
        /// Of which step the state is.
        to: u64,
    },
    /// A rank holds up others that do the same.
    Slow {
        /// After which step.
        step: u64,
        /// Which rank.
        rank: Rank,
        /// How long it is busy with a step, over what its peers are.
        factor: f64,
    },
    /// The held-out text has been scored.
    Evaluation {
        /// After which step.
        step: u64,
        /// Mean loss over held-out tokens.
        loss: f64,
    },
    /// Ranks were lost, or came back, and those that are there met anew: training goes on after this step.
    Recovered {
        /// After which step.
        step: u64,
        /// With how many ranks.
        ranks: u32,
        /// The number of the meeting at which the ranks began anew.
        generation: u64,
        /// From the loss, as this rank saw it, to the first step after it.
        time_s: Seconds,
        /// Where the state came from.
        source: StateSource,
        /// Steps that had been done and are done again.
        steps_redone: u64,
        /// Who was lost.
        losses: Vec<Loss>,
        /// What this rank saw of it: in which transfer it noticed; empty if it was lost itself.
        seen: String,
    },
    /// A checkpoint is being written.
    Saving {
        /// After which step.
        step: u64,
        /// How long training stood still for it.
        stall_s: Seconds,
    },
    /// A checkpoint is written and verified; on ranks other than 0, this rank's part of it.
    Saved {
        /// After which step.
        step: u64,
        /// How long that took.
        time_s: Seconds,
    },
    /// A checkpoint could not be written; training goes on.
    NotSaved {
        /// After which step.
        step: u64,
        /// Why not.
        reason: String,
    },
}

/// Where ranks that begin anew have their state from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StateSource {
    /// The memory of the ranks that were left.
    Memory,
    /// A checkpoint.
    Checkpoint,
    /// The start of the run.
    Start,
}

/// A finished run.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Median step time after the first steps.
    pub step_time: Seconds,
    /// Loss of the last evaluation.
    pub held_out_loss: f64,
    /// On rank 0, every rank's spans of one step of about median time; else this rank's.
    pub trace: Trace,
}

/// Steps at the start that the median leaves out: buffers are made in them.
const WARM_UP: usize = 2;
/// After so many steps in a row without an update no other will do better.
const MOST_SKIPPED: u32 = 10;
/// Recent steps whose spans are kept, to find one of median time.
const KEPT: usize = 9;

/// Trains.
///
/// # Errors
/// When communication or the data fails, or the loss is no longer a number; [`Error::Stopped`] when
/// any rank was asked to stop.
pub fn run<O: Operators>(
    worker: &mut Worker<O>,
    programs: &Programs,
    batches: &Batches,
    settings: &Settings,
    safekeeping: &mut Safekeeping,
    observe: &mut dyn FnMut(&Event),
) -> Result<Outcome, Error> {
    let outcome = run_steps(worker, programs, batches, settings, safekeeping, observe);
    if outcome.is_err() {
        safekeeping.salvage(worker, &programs.step);
    }
    outcome
}

fn run_steps<O: Operators>(
    worker: &mut Worker<O>,
    programs: &Programs,
    batches: &Batches,
    settings: &Settings,
    safekeeping: &mut Safekeeping,
    observe: &mut dyn FnMut(&Event),
) -> Result<Outcome, Error> {
    let steps = settings.learning_rate.steps;
    let mut times = Vec::new();
    let mut kept: VecDeque<(Seconds, Vec<Span>)> = VecDeque::new();
    let mut held_out_loss = f64::NAN;
    let mut watch = Watch::new(&programs.step, settings);
    safekeeping.begin(worker, &programs.step, settings.first_step)?;
    for step in settings.first_step..steps {
        let word = watch.word(worker, &programs.step, safekeeping, step);
        let agreement = Agreement::propose(worker, word)?;
        let begin = Instant::now();
        let spans = watch.train_step(worker, programs, batches, settings, step, observe)?;
        let time = Seconds(begin.elapsed().as_secs_f64());
        // Before it counts as done: the words come behind the copies of the state of the step before.
        let words = agreement.words(worker)?;
        watch.hear(&words, &programs.step, safekeeping, step, observe)?;
        let event = event(worker, programs, settings, step, (time, &spans));
        watch.end(time, &event);
        let applied = worker.stage().accepts_update();
        if applied {
            observe(&event);
        }
        outer_update(worker, programs, (step + 1, steps))?;
        if safekeeping.flips.remove(&(step + 1)) {
            flip(worker);
        }
        times.push(time);
        kept.truncate(KEPT - 1);
        kept.push_front((time, spans));
        let due = settings.evaluate_every > 0 && (step + 1).is_multiple_of(settings.evaluate_every);
        if due || step + 1 == steps {
            held_out_loss = evaluate(worker, programs, batches)?;
            observe(&Event::Evaluation { step: step + 1, loss: held_out_loss });
        }
        if words.iter().any(|word| word.stop) && step + 1 < steps {
            safekeeping.stop(worker, &programs.step, step + 1, observe)?;
        }
        safekeeping.after_step(worker, &programs.step, (step + 1, steps), observe)?;
        if words.iter().any(|word| word.called) && step + 1 < steps {
            safekeeping.part(worker, &programs.step, step + 1, observe)?;
        }
    }
    if times.is_empty() {
        // All steps had been done when ranks were lost.
        held_out_loss = evaluate(worker, programs, batches)?;
        observe(&Event::Evaluation { step: steps, loss: held_out_loss });
    }
    let counted = times.split_off(WARM_UP.min(times.len().saturating_sub(1)));
    let trace = gather_trace(worker, kept)?;
    Ok(Outcome { step_time: Seconds::median(counted), held_out_loss, trace })
}

/// Carries out an outer update when it is due, after `step` of `steps` steps.
fn outer_update<O: Operators>(
    worker: &mut Worker<O>,
    programs: &Programs,
    (step, steps): (u64, u64),
) -> Result<(), Error> {
    let every = u64::from(programs.step.local_steps);
    if let Some(outer) = &programs.outer
        && (step.is_multiple_of(every) || step == steps)
    {
        worker.execute(outer, vec![], 0.0, Clock::Wall)?;
    }
    Ok(())
}

fn train_step<O: Operators>(
    worker: &mut Worker<O>,
    programs: &Programs,
    batches: &Batches,
    settings: &Settings,
    step: u64,
) -> Result<Vec<Span>, Error> {
    let microbatches = batches.step(&programs.step, worker.rank(), step)?;
    let rate = settings.learning_rate.at(step);
    worker.stage().set_updates(step);
    worker.execute(&programs.step, microbatches, rate, Clock::Wall)
}

/// What is looked at in every step: its numbers, how long each rank is busy, and whether ranks that
/// hold the same state still do.
struct Watch {
    norms: Norms,
    pace: Pace,
    on_divergence: OnDivergence,
    /// Steps in a row that were left without an update.
    skipped: u32,
    /// When the last step was over for this rank, and how long it was busy with it.
    over: Instant,
    busy: Seconds,
    /// The last step after which the ranks' states were the same, or have come from one place.
    trusted: u64,
}

impl Watch {
    fn new(program: &Program, settings: &Settings) -> Self {
        let stage = |rank| program.mesh.coordinate(rank, Axis::Pipeline);
        let stages = (0..program.mesh.ranks()).map(|rank| stage(Rank(rank))).collect();
        Self {
            norms: Norms::new(settings.spike),
            pace: Pace::new(stages),
            on_divergence: settings.on_divergence,
            skipped: 0,
            over: Instant::now(),
            busy: Seconds::ZERO,
            trusted: settings.first_step,
        }
    }

    /// What this rank tells the others at the start of a step.
    fn word<O: Operators>(
        &mut self,
        worker: &mut Worker<O>,
        program: &Program,
        safekeeping: &Safekeeping,
        step: u64,
    ) -> Word {
        let due = safekeeping.compares_after(step);
        let state = if due { comparison(worker, program) } else { 0 };
        self.over = Instant::now();
        let (stop, called) = (safekeeping.stops(), safekeeping.called.load(Ordering::Relaxed));
        Word { stop, called, busy: self.busy, state }
    }

    /// Trains a step. One whose numbers are wrong has no effect, and is done again: if they are right
    /// then, it was the hardware; else it is the data or the model, and the job says what to do.
    fn train_step<O: Operators>(
        &mut self,
        worker: &mut Worker<O>,
        programs: &Programs,
        batches: &Batches,
        settings: &Settings,
        step: u64,
        observe: &mut dyn FnMut(&Event),
    ) -> Result<Vec<Span>, Error> {
        let limit = self.norms.limit();
        worker.stage().limit_gradient_norm(limit);
        let mut spans = train_step(worker, programs, batches, settings, step)?;
        if !worker.stage().accepts_update() {
            let ranks = worker.stage().not_finite();
            spans = train_step(worker, programs, batches, settings, step)?;
            let right = worker.stage().accepts_update();
            observe(&Event::Redone { step: step + 1, ranks, right });
        }
        let (loss, gradient_norm) = (worker.stage().loss(), worker.stage().gradient_norm());
        if worker.stage().accepts_update() {
            self.skipped = 0;
            self.norms.note(gradient_norm);
        } else if self.on_divergence == OnDivergence::Skip && self.skipped < MOST_SKIPPED {
            self.skipped += 1;
            observe(&Event::Skipped { step: step + 1, gradient_norm, limit });
        } else if self.on_divergence == OnDivergence::RollBack {
            return Err(Error::Spiked { step: step + 1, gradient_norm, limit });
        } else {
            return Err(Error::Diverged { step: step + 1, loss, gradient_norm });
        }
        Ok(spans)
    }

    /// What the others have told at the start of this step.
    fn hear(
        &mut self,
        words: &[Word],
        program: &Program,
        safekeeping: &mut Safekeeping,
        step: u64,
        observe: &mut dyn FnMut(&Event),
    ) -> Result<(), Error> {
        let busy: Vec<Seconds> = words.iter().map(|word| word.busy).collect();
        for Slow { rank, factor } in self.pace.see(&busy) {
            observe(&Event::Slow { step, rank, factor });
        }
        if !safekeeping.compares_after(step) {
            return Ok(());
        }
        let states: Vec<u32> = words.iter().map(|word| word.state).collect();
        let ranks = drifted(program, &states);
        if ranks.is_empty() {
            self.trusted = step;
            return Ok(());
        }
        safekeeping.distrust(self.trusted);
        Err(Error::Drifted { step, ranks, trusted: self.trusted })
    }

    /// A step is over: what was not waiting for others was this rank's own.
    fn end(&mut self, step_time: Seconds, event: &Event) {
        if let Event::Step { exposed_communication_s, pipeline_wait_s, .. } = event {
            self.busy = step_time - *exposed_communication_s - *pipeline_wait_s;
        }
    }
}

/// Flips a bit of a parameter.
fn flip<O: Operators>(worker: &mut Worker<O>) {
    let stage = worker.stage();
    let block = stage.blocks()[0];
    let mut state = stage.snapshot(block, stage.held(block));
    if let Some(value) = state[0].first_mut() {
        *value = f32::from_bits(value.to_bits() ^ 1 << 20);
    }
    stage.restore(block, state);
}

/// What tells the state of this rank from another, if others hold the same: part of a hash, never 0.
fn comparison<O: Operators>(worker: &mut Worker<O>, program: &Program) -> u32 {
    let peers = program.mesh.degree(Axis::Data);
    if program.optimizer_sharded || peers == 1 {
        return 0;
    }
    let stage = worker.stage();
    let mut shard = Shard::default();
    for block in stage.blocks().to_vec() {
        let held = stage.held(block);
        stage.show(block, held.clone(), |index, values| {
            shard.push(block, kinds(program)[index], held.start as u64, values);
        });
    }
    shard.checksum().low() | 1
}

/// The ranks whose state is not that of most of those that should hold the same; all of them where
/// none is in the majority.
fn drifted(program: &Program, states: &[u32]) -> Vec<Rank> {
    let mut ranks = Vec::new();
    for rank in (0..states.len() as u32).map(Rank) {
        let group = program.mesh.group(rank, Axis::Data);
        let like = |state: u32| group.iter().filter(|one| states[one.index()] == state).count();
        if 2 * like(states[rank.index()]) <= group.len() && group.len() > 1 {
            ranks.push(rank);
        }
    }
    ranks
}

/// Mean loss over held-out text.
fn evaluate<O: Operators>(
    worker: &mut Worker<O>,
    programs: &Programs,
    batches: &Batches,
) -> Result<f64, Error> {
    let microbatches = batches.evaluation(&programs.evaluation, worker.rank())?;
    worker.execute(&programs.evaluation, microbatches, 0.0, Clock::Wall)?;
    Ok(worker.stage().loss())
}

fn event<O: Operators>(
    worker: &mut Worker<O>,
    programs: &Programs,
    settings: &Settings,
    step: u64,
    (time, spans): (Seconds, &[Span]),
) -> Event {
    let rank = worker.rank();
    let list = programs.step.instructions(rank);
    let waits = |for_pipeline: bool| {
        let waits = spans.iter().filter(|span| {
            let axis = match list[span.instruction as usize] {
                Instruction::Wait { ticket } => programs.step.transfer(rank, ticket),
                _ => None,
            }
            .map(|transfer| transfer.axis);
            span.lane == Lane::Wait && axis.is_some_and(Axis::is_pipeline) == for_pipeline
        });
        waits.map(|span| span.end - span.start).sum()
    };
    Event::Step {
        step: step + 1,
        loss: worker.stage().loss(),
        gradient_norm: worker.stage().gradient_norm(),
        learning_rate: settings.learning_rate.at(step),
        step_time_s: time,
        exposed_communication_s: waits(false),
        pipeline_wait_s: waits(true),
    }
}

/// Rank 0 picks a kept step of median time, and every rank sends its spans of it.
fn gather_trace<O: Operators>(
    worker: &mut Worker<O>,
    kept: VecDeque<(Seconds, Vec<Span>)>,
) -> Result<Trace, Error> {
    let rank = worker.rank();
    let failed = |source| Error::Communication { rank, source };
    let mut order: Vec<usize> = (0..kept.len()).collect();
    order.sort_by(|a, b| kept[*a].0.0.total_cmp(&kept[*b].0.0));
    let choice = order.get(order.len() / 2).copied().unwrap_or_default() as u64;
    let (communicator, world) = worker.communication(Axis::World);
    let choices = communicator.all_gather_bytes(world, &choice.to_le_bytes()).map_err(failed)?;
    let chosen = choices[0].first().copied().map_or(0, usize::from);
    let own = kept.get(chosen).map(|(_, spans)| spans.as_slice()).unwrap_or_default();
    let json = serde_json::to_vec(own).expect("spans have a JSON form");
    let all = communicator.all_gather_bytes(world, &json).map_err(failed)?;
    if rank != Rank(0) {
        return Ok(Trace { spans: own.to_vec() });
    }
    let spans = all.iter().filter_map(|json| serde_json::from_slice::<Vec<Span>>(json).ok());
    Ok(Trace { spans: spans.flatten().collect() })
}
