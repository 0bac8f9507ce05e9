//! A run that is saved, stopped and gone on with is the run that was never stopped.

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex};

use checkpoint::sharded::{Checkpoint, Progress, Saver, Setup};
use checkpoint::store::simulated::{Faults, SimulatedDisk};
use checkpoint::store::{Folder, Store};
use program::Program;

use super::*;

const EVERY: u64 = 5;

/// How a test keeps the state of its ranks.
#[derive(Clone, Default)]
pub struct Keeping {
    store: Option<Arc<dyn Store>>,
    /// Goes on from what is in the store.
    resume: bool,
    /// Asks every rank to stop as soon as one has seen so many steps.
    stop_at: Option<usize>,
    stop: Arc<AtomicBool>,
    asynchronous: bool,
    /// Flips a bit of a rank's state after a step.
    flip: Option<(Rank, u64)>,
}

impl Keeping {
    pub fn in_store(store: &Arc<dyn Store>) -> Self {
        Self { store: Some(Arc::clone(store)), asynchronous: true, ..Self::default() }
    }

    pub fn resuming(store: &Arc<dyn Store>) -> Self {
        Self { resume: true, ..Self::in_store(store) }
    }

    /// Resumes, and is ready to save.
    pub fn start(
        &self,
        worker: &mut Worker<Cpu>,
        program: &Program,
        job: &Job,
        settings: &mut Settings,
    ) -> Result<Safekeeping, Error> {
        let Some(store) = &self.store else { return Ok(Safekeeping::default()) };
        if self.resume {
            settings.first_step =
                resume(worker, program, store, &job.config, u64::MAX)?.progress.step;
        }
        let (communicator, world) = worker.communication(program::Axis::World);
        let setup = Setup {
            store: Arc::clone(store),
            config: job.config.clone(),
            rank: communicator.rank(),
            ranks: world.ranks.len() as u32,
            attempt: settings.first_step,
            keep: 2,
            patience: Duration::from_secs(60),
            is_ours: Arc::new(|| true),
        };
        let run = Progress { step: 0, position: 0, seed: 11, tokens: 5 };
        let checkpoints = Checkpoints::new(Saver::new(setup), EVERY, self.asynchronous, run);
        let replicas = Some(Replicas::new(2, 1));
        let (stop, checkpoints) = (Arc::clone(&self.stop), Some(checkpoints));
        let own = self.flip.filter(|(rank, _)| *rank == worker.rank());
        let flips = own.map(|(_, step)| step).into_iter().collect();
        Ok(Safekeeping {
            stop,
            replicas,
            checkpoints,
            compare_every_steps: 3,
            flips,
            ..Safekeeping::default()
        })
    }

    pub fn see(&self, event: &Event, view: &View) {
        let step =
            matches!(event, Event::Step { .. }) && Some(view.steps.len() + 1) == self.stop_at;
        if step {
            self.stop.store(true, Ordering::Relaxed);
        }
    }
}

pub fn memory() -> (SimulatedDisk, Arc<dyn Store>) {
    let disk = SimulatedDisk::new(Path::new("/"));
    let store: Arc<dyn Store> = Arc::new(Folder::on(disk.clone(), Path::new("/")));
    (disk, store)
}

pub fn resumed(job: &Job, layout: &Layout, store: &Arc<dyn Store>) -> Trained {
    let keeping = Keeping::resuming(store);
    train_keeping(job, layout, in_process(layout.mesh.ranks()), &keeping)
}

fn layouts() -> [Layout; 6] {
    [
        layout(1, 1, 4, Shard::None),
        layout(2, 1, 2, Shard::None),
        layout(3, 2, 1, Shard::Optimizer),
        layout(2, 2, 1, Shard::Gradients),
        layout(2, 2, 1, Shard::Parameters),
        hybrid::layout(4, 2, Shard::Optimizer),
    ]
}

/// Runs a job with checkpoints until it is asked to stop in some step.
fn stopped(job: &Job, layout: &Layout, store: &Arc<dyn Store>, step: usize) {
    let keeping = Keeping { stop_at: Some(step), ..Keeping::in_store(store) };
    let ranks = in_process(layout.mesh.ranks());
    let folder = tempfile::tempdir().unwrap();
    for outcome in run_all(job, layout, folder.path(), ranks, &keeping) {
        let error = outcome.unwrap_err();
        assert!(matches!(error, Error::Stopped { .. }), "{layout:?}: {error}");
        assert!(error.to_string().contains("its state is saved"), "{error}");
    }
}

#[test]
fn saving_changes_no_bit_and_neither_does_going_on() {
    let job = Job { batch: Batch { sequence: 16, global_batch: 12 }, ..Job::new(true) };
    for layout in layouts() {
        let expected = train(&job, &layout);
        let (disk, store) = memory();
        let ranks = || in_process(layout.mesh.ranks());
        let saved = train_keeping(&job, &layout, ranks(), &Keeping::in_store(&store));
        assert!(saved == expected, "{layout:?}");
        let names = Checkpoint::names(&*store).unwrap();
        assert_eq!(names.len(), 2, "{names:?}");
        // As if it had been lost after step 15: the newer one goes.
        disk.truncate(&PathBuf::from(format!("/{}/manifest.json", names[0])), 10);
        let resumed = resumed(&job, &layout, &store);
        assert_eq!(resumed.steps, expected.steps[15..], "{layout:?}");
        assert!(resumed.parameters == expected.parameters, "{layout:?}");
    }
}

#[test]
fn a_run_that_is_asked_to_stop_saves_and_goes_on_to_the_same_end() {
    let job = Job { batch: Batch { sequence: 16, global_batch: 12 }, ..Job::new(false) };
    for layout in layouts() {
        let (_, store) = memory();
        stopped(&job, &layout, &store, 7);
        let (expected, resumed) = (train(&job, &layout), resumed(&job, &layout, &store));
        let done = STEPS as usize - resumed.steps.len();
        // Whoever is ahead when the first is asked says so with its next step.
        assert!((7..=9).contains(&done), "{done}");
        assert_eq!(resumed.steps, expected.steps[done..], "{layout:?}");
        assert!(resumed.parameters == expected.parameters, "{layout:?}");
    }
}

#[test]
fn any_layout_goes_on_where_any_other_stopped() {
    let job = Job { batch: Batch { sequence: 16, global_batch: 12 }, ..Job::new(true) };
    let expected = train(&job, &job.reference());
    for before in layouts() {
        let (disk, store) = memory();
        train_keeping(&job, &before, in_process(before.mesh.ranks()), &Keeping::in_store(&store));
        for after in layouts() {
            let newest = Checkpoint::names(&*store).unwrap().remove(0);
            disk.truncate(&PathBuf::from(format!("/{newest}/manifest.json")), 0);
            let mut resumed = resumed(&job, &after, &store);
            let first = expected.steps[..15].to_vec();
            resumed.steps = [first, resumed.steps].concat();
            resumed.evaluations = [vec![expected.evaluations[0]], resumed.evaluations].concat();
            assert_same(&after, &resumed, &expected);
        }
    }
}

#[test]
fn a_full_disk_does_not_stop_training() {
    let job = Job::new(false);
    for asynchronous in [true, false] {
        let layout = layout(2, 2, 1, Shard::Optimizer);
        let (disk, store) = memory();
        disk.fail(Faults { capacity: Some(2000), ..Faults::default() });
        let keeping = Keeping { asynchronous, ..Keeping::in_store(&store) };
        let trained = train_keeping(&job, &layout, in_process(4), &keeping);
        assert!(trained == train(&job, &layout));
        assert_eq!(Checkpoint::names(&*store).unwrap().len(), 0);
    }
}

/// A store in which rank 1's files cannot be written, which it learns only after rank 0 has looked for
/// them several times.
struct Sluggish {
    store: Arc<dyn Store>,
    looks: (Mutex<u32>, Condvar),
}

impl Store for Sluggish {
    fn put(&self, name: &str, pieces: &[&[u8]]) -> io::Result<()> {
        if !name.contains("rank-00001") {
            return self.store.put(name, pieces);
        }
        let (looks, looked) = &self.looks;
        *looked.wait_while(looks.lock().unwrap(), |looks| *looks < 3).unwrap() = 0;
        Err(io::ErrorKind::StorageFull.into())
    }

    fn get(&self, name: &str, range: Range<u64>) -> io::Result<Vec<u8>> {
        self.store.get(name, range)
    }

    fn length(&self, name: &str) -> io::Result<u64> {
        self.store.length(name)
    }

    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        *self.looks.0.lock().unwrap() += 1;
        self.looks.1.notify_all();
        self.store.list(folder)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.store.remove(name)
    }

    fn remove_folder(&self, folder: &str) -> io::Result<()> {
        self.store.remove_folder(folder)
    }

    fn place(&self, name: &str) -> String {
        self.store.place(name)
    }
}

#[test]
fn nobody_hangs_on_a_rank_whose_write_is_slow_to_fail() {
    let (job, layout) = (Job::new(false), layout(2, 2, 1, Shard::Optimizer));
    let expected = train(&job, &layout);
    for asynchronous in [true, false] {
        let sluggish = Sluggish { store: memory().1, looks: Default::default() };
        let store: Arc<dyn Store> = Arc::new(sluggish);
        let keeping = Keeping { asynchronous, ..Keeping::in_store(&store) };
        assert!(train_keeping(&job, &layout, in_process(4), &keeping) == expected);
        assert_eq!(Checkpoint::names(&*store).unwrap().len(), 0);
    }
}

#[test]
fn nothing_to_resume_is_said_with_the_reasons() {
    let (disk, store) = memory();
    let (job, layout) = (Job::new(false), layout(2, 1, 1, Shard::None));
    let try_it = || {
        let keeping = Keeping { resume: true, ..Keeping::in_store(&store) };
        let folder = tempfile::tempdir().unwrap();
        let outcomes = run_all(&job, &layout, folder.path(), in_process(2), &keeping);
        outcomes.into_iter().map(|outcome| outcome.unwrap_err().to_string()).collect::<Vec<_>>()
    };
    assert_eq!(try_it(), ["/ has no checkpoint to go on from"; 2]);
    stopped(&job, &layout, &store, 2);
    let name = Checkpoint::names(&*store).unwrap().remove(0);
    disk.flip(&PathBuf::from(format!("/{name}/rank-00001.safetensors")), 80_000);
    for said in try_it() {
        let reason = format!("\n  rank 0: /{name}/rank-00001.safetensors is damaged: the checksum");
        assert!(said.contains(&reason), "{said}");
    }
}

#[test]
fn parameters_that_ranks_split_are_resumed_on_any_mesh() {
    let llama = Job { batch: Batch { sequence: 16, global_batch: 12 }, ..Job::new(true) };
    let latent = Job { config: latent_config(), ..llama.clone() };
    resumes_on_any_mesh(&llama);
    resumes_on_any_mesh(&latent);
}

fn resumes_on_any_mesh(job: &Job) {
    let expected = train(job, &job.reference());
    let with = |mesh, shard| Layout { sequence_parallel: true, ..Layout::new(mesh, 1, shard) };
    let layouts = [
        with(Mesh { tensor: 2, data: 2, ..Mesh::ONE }, Shard::Parameters),
        layout(1, 1, 4, Shard::None),
        with(Mesh { tensor: 4, pipeline: 2, ..Mesh::ONE }, Shard::None),
        with(Mesh { tensor: 2, context: 2, ..Mesh::ONE }, Shard::Optimizer),
    ];
    for (index, before) in layouts.iter().enumerate() {
        let after = &layouts[(index + 1) % layouts.len()];
        let (disk, store) = memory();
        let ranks = in_process(before.mesh.ranks());
        train_keeping(job, before, ranks, &Keeping::in_store(&store));
        let newest = Checkpoint::names(&*store).unwrap().remove(0);
        disk.truncate(&PathBuf::from(format!("/{newest}/manifest.json")), 0);
        let mut resumed = resumed(job, after, &store);
        resumed.steps = [expected.steps[..15].to_vec(), resumed.steps].concat();
        resumed.evaluations = [vec![expected.evaluations[0]], resumed.evaluations].concat();
        assert_same(after, &resumed, &expected);
    }
}

#[test]
fn a_flipped_bit_is_found_and_the_rank_is_named() {
    let job = Job { batch: Batch { sequence: 16, global_batch: 12 }, ..Job::new(true) };
    for (ranks, named) in [(3, vec![Rank(1)]), (2, vec![Rank(0), Rank(1)])] {
        let layout = layout(ranks, 1, 2, Shard::None);
        let (_, store) = memory();
        let keeping = Keeping { flip: Some((Rank(1), 4)), ..Keeping::in_store(&store) };
        let folder = tempfile::tempdir().unwrap();
        for outcome in run_all(&job, &layout, folder.path(), in_process(ranks), &keeping) {
            let error = outcome.unwrap_err();
            // After step 3 all was well, and after step 6 they compared again.
            let Error::Drifted { step: 6, ranks, trusted: 3 } = &error else { panic!("{error}") };
            assert_eq!(*ranks, named);
            assert!(error.to_string().contains("a bit flipped"), "{error}");
        }
    }
}
