//! One run from its first step to its last, in virtual time.

use std::collections::VecDeque;

use units::Seconds;

use super::{Reliability, Shares};
use crate::step::mix;

/// Where the time of a run went.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Run {
    /// From its start to its end.
    pub time: Seconds,
    /// Failures.
    pub failures: u32,
    /// Training that counts: all that was asked for.
    pub work: Seconds,
    /// Writing checkpoints.
    pub stalled: Seconds,
    /// Training that was lost and done again.
    pub redone: Seconds,
    /// Until failures were noticed.
    pub detecting: Seconds,
    /// Until the ranks trained again.
    pub restarting: Seconds,
    /// For a spare node.
    pub waiting: Seconds,
}

/// The longest a run is followed, as a multiple of its work: one that fails faster than it gets on
/// never ends.
const HOPELESS: f64 = 1000.0;

impl Run {
    /// Plays a run of `work` of training. Failures come at a constant rate, also while the job is
    /// down; a checkpoint counts once it is written.
    pub(super) fn new(of: &Reliability, work: Seconds, seed: u64) -> Self {
        let mut playing = Playing {
            of,
            interval: of.interval().0,
            draws: seed,
            next_failure: 0.0,
            away: VecDeque::new(),
            run: Self { work, ..Self::default() },
        };
        playing.next_failure = playing.lasts();
        playing.play();
        playing.run
    }

    /// The same as shares of the whole.
    #[must_use]
    pub fn shares(&self) -> Shares {
        let share = |part: Seconds| part / self.time;
        Shares {
            effective: share(self.work),
            stalled: share(self.stalled),
            redone: share(self.redone),
            detecting: share(self.detecting),
            restarting: share(self.restarting),
            waiting: share(self.waiting),
        }
    }
}

struct Playing<'r> {
    of: &'r Reliability,
    interval: f64,
    draws: u64,
    next_failure: f64,
    /// When nodes under repair come back.
    away: VecDeque<f64>,
    run: Run,
}

impl Playing<'_> {
    /// A number in (0, 1].
    fn draw(&mut self) -> f64 {
        self.draws = self.draws.wrapping_add(0x9e37_79b9_7f4a_7c15);
        ((mix(self.draws) >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// How long it goes well, from now on.
    fn lasts(&mut self) -> f64 {
        -self.of.between_failures.0 * self.draw().ln()
    }

    fn play(&mut self) {
        let work = self.run.work.0;
        let (mut done, mut saved) = (0.0, 0.0);
        while done < work && self.run.time.0 < HOPELESS * work {
            let whole = self.interval.min(work - saved);
            let last = saved + whole >= work;
            let stall = if last { 0.0 } else { self.of.stall.0 };
            let to_go = saved + whole - done;
            let ok = self.next_failure - self.run.time.0;
            if ok >= to_go + stall {
                self.run.time.0 += to_go + stall;
                self.run.stalled.0 += stall;
                (done, saved) = (saved + whole, saved + whole);
                continue;
            }
            let trained = ok.min(to_go);
            self.run.stalled.0 += ok - trained;
            self.run.time.0 += ok;
            let kept = self.recover(saved, done + trained);
            self.run.redone.0 += done + trained - kept;
            done = kept;
        }
    }

    /// After a failure: until the ranks train again; how much of what was done is kept.
    fn recover(&mut self, saved: f64, done: f64) -> f64 {
        let mut kept = self.kept(saved, done);
        loop {
            self.run.failures += 1;
            self.spend(self.of.detect.0, |run| &mut run.detecting);
            let wait = self.wait_for_spare();
            self.spend(wait, |run| &mut run.waiting);
            self.next_failure = self.run.time.0 + self.lasts();
            let ok = self.next_failure - self.run.time.0;
            self.spend(ok.min(self.of.restart.0), |run| &mut run.restarting);
            if ok >= self.of.restart.0 {
                return kept;
            }
            kept = self.kept(saved, kept);
        }
    }

    fn spend(&mut self, time: f64, on: impl Fn(&mut Run) -> &mut Seconds) {
        self.run.time.0 += time;
        on(&mut self.run).0 += time;
    }

    /// What is left of `done` in some memory, or of `saved` on the disk.
    fn kept(&mut self, saved: f64, done: f64) -> f64 {
        let Some(memory) = self.of.memory else { return saved };
        let covered = self.draw() <= memory.covers;
        let copied = (done / memory.every.0).floor() * memory.every.0;
        if covered { copied.max(saved).min(done) } else { saved }
    }

    /// The node that failed goes to repair; how long until another takes its place.
    fn wait_for_spare(&mut self) -> f64 {
        let Some(spares) = self.of.spares else { return 0.0 };
        let now = self.run.time.0;
        while self.away.front().is_some_and(|back| *back <= now) {
            self.away.pop_front();
        }
        self.away.push_back(now + spares.repair.0);
        if self.away.len() <= spares.nodes as usize {
            return 0.0;
        }
        let first = self.away.pop_front().unwrap_or(now);
        first - now
    }
}
