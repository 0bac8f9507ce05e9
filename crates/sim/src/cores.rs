//! Processor sharing: runnable threads divide a host's cores evenly.

use std::collections::BTreeMap;

use units::Seconds;

use crate::agenda::Moment;

/// One host's cores and the tasks that run on them.
///
/// All threads run at the same rate, at most one core each, and so do those of other programs. So one number, how far a task has come
/// that has run since the start, dates every task's end, and a change of rate moves no task.
#[derive(Debug)]
pub(crate) struct Cores<Task> {
    cores: f64,
    /// Threads of other programs that always run, on average.
    others: f64,
    threads: f64,
    progress: f64,
    updated: Seconds,
    started: u64,
    running: BTreeMap<(Moment, u64), (u32, Task)>,
}

impl<Task> Cores<Task> {
    pub(crate) fn new(cores: u32, others: f64) -> Self {
        Self {
            cores: f64::from(cores),
            others,
            threads: 0.0,
            progress: 0.0,
            updated: Seconds::ZERO,
            started: 0,
            running: BTreeMap::new(),
        }
    }

    /// Starts a task of `threads` threads that takes `work` with a core for each.
    pub(crate) fn start(&mut self, now: Seconds, work: Seconds, threads: u32, task: Task) {
        self.advance(now);
        let end = Moment(self.progress + work.0);
        self.running.insert((end, self.started), (threads, task));
        self.started += 1;
        self.threads += f64::from(threads);
    }

    /// When the next task ends if none is started before.
    pub(crate) fn next_end(&self) -> Option<Seconds> {
        let ((end, _), _) = self.running.first_key_value()?;
        Some(self.updated + Seconds((end.0 - self.progress) / self.rate()))
    }

    /// Ends the task that was to end next, at the time it was to.
    pub(crate) fn end_next(&mut self, now: Seconds) -> Option<Task> {
        let ((end, _), (threads, task)) = self.running.pop_first()?;
        self.updated = now;
        // Exactly there, whatever the rounding on the way.
        self.progress = end.0;
        self.threads -= f64::from(threads);
        Some(task)
    }

    /// The share of a core that each thread has.
    fn rate(&self) -> f64 {
        (self.cores / (self.threads + self.others)).min(1.0)
    }

    fn advance(&mut self, now: Seconds) {
        self.progress += self.rate() * (now - self.updated).0;
        self.updated = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(cores: u32, tasks: &[(f64, f64, u32)]) -> Vec<f64> {
        run_beside(0.0, cores, tasks)
    }

    fn run_beside(others: f64, cores: u32, tasks: &[(f64, f64, u32)]) -> Vec<f64> {
        let mut host = Cores::new(cores, others);
        let mut ends = vec![0.0; tasks.len()];
        for (task, (start, work, threads)) in tasks.iter().enumerate() {
            drain(&mut host, *start, &mut ends);
            host.start(Seconds(*start), Seconds(*work), *threads, task);
        }
        drain(&mut host, f64::INFINITY, &mut ends);
        ends
    }

    fn drain(host: &mut Cores<usize>, until: f64, ends: &mut [f64]) {
        while let Some(end) = host.next_end().filter(|end| end.0 <= until) {
            let task = host.end_next(end).unwrap();
            ends[task] = end.0;
        }
    }

    #[test]
    fn with_a_core_each_nobody_waits() {
        assert_eq!(run(2, &[(0.0, 1.0, 1), (0.0, 2.0, 1)]), [1.0, 2.0]);
    }

    #[test]
    fn one_core_is_shared_until_the_shorter_task_ends() {
        assert_eq!(run(1, &[(0.0, 1.0, 1), (0.0, 3.0, 1)]), [2.0, 4.0]);
        assert_eq!(run(1, &[(0.0, 2.0, 1), (1.0, 1.0, 1)]), [3.0, 3.0]);
    }

    #[test]
    fn other_programs_take_their_share() {
        assert_eq!(run_beside(1.0, 2, &[(0.0, 1.0, 1)]), [1.0]);
        assert_eq!(run_beside(1.0, 2, &[(0.0, 1.0, 1), (0.0, 1.0, 1)]), [1.5, 1.5]);
    }

    #[test]
    fn a_task_takes_a_share_for_each_of_its_threads() {
        assert_eq!(run(2, &[(0.0, 2.0, 2), (0.0, 1.0, 1)]), [2.5, 1.5]);
    }
}
