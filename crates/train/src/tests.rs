//! The promise of the runtime: a layout, a transport or a repetition changes nothing that a job
//! computes.

use std::convert::Infallible;
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::Duration;

use checkpoint::hugging_face::Weights;
use compute::{Cpu, Operators, Optimizer, OuterOptimizer, Precision, Stage};
use data::{Sampler, Sampling, Source, TokenFile, TokenizerSource};
use model::{Block, Config, LatentAttention, Llama3Scaling, Rotary};
use plan::{Batch, Layout, Schedule, Shard, lower, lower_evaluation, lower_outer};
use program::{Choices, Mesh, Program};
use tempfile::TempDir;
use transport::{
    Apart, Communicator, Compression, InProcess, Limits, Rendezvous, Secret, Transport,
};
use units::Rank;

use crate::state::block_runs;
use crate::*;

mod axes;
mod experts;
mod grid;
mod hybrid;
mod local;
mod memory;
mod recomputing;
mod resuming;

use resuming::Keeping;

const STEPS: u64 = 20;
/// How far the loss and the gradient norm may be from those of one rank, relative.
const LOSS_TOLERANCE: f64 = 1e-5;
/// How far a block's parameters may be, norm-wise.
const PARAMETER_TOLERANCE: f64 = 1e-4;
const SHARDS: [Shard; 4] = [Shard::None, Shard::Optimizer, Shard::Gradients, Shard::Parameters];

/// Four layers, so that pipeline 4 has one each, with grouped queries and scaled frequencies.
fn config(tied_embeddings: bool) -> Config {
    let scaling = Llama3Scaling {
        factor: 8.0,
        low_frequency_factor: 1.0,
        high_frequency_factor: 4.0,
        original_context: 64,
    };
    Config {
        layers: 4,
        hidden: 32,
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        feed_forward: 48,
        vocabulary: 272,
        tied_embeddings,
        norm_epsilon: 1e-5,
        rotary: Rotary { theta: 10_000.0, scaling: Some(scaling) },
        context: 64,
        ..Config::default()
    }
}

/// The same with DeepSeek's attention, whose widths all differ.
fn latent_config() -> Config {
    let latent = LatentAttention {
        query_rank: Some(12),
        kv_rank: 10,
        nope_dim: 6,
        rope_dim: 4,
        value_dim: 7,
    };
    Config { latent_attention: Some(latent), kv_heads: 4, head_dim: 6, ..config(false) }
}

fn layout(data: u32, pipeline: u32, micro_batch: u64, shard: Shard) -> Layout {
    Layout::new(Mesh { data, pipeline, ..Mesh::ONE }, micro_batch, shard)
}

/// A token file that all tests read.
struct Text {
    tokens: TokenFile,
    /// Where it lies.
    _folder: TempDir,
}

static TEXT: LazyLock<Text> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text.txt");
    fs::write(&text, prose()).unwrap();
    let source = Source {
        patterns: vec![text.to_str().unwrap().to_owned()],
        limit: None,
        tokenizer: TokenizerSource::Train { vocabulary: config(false).vocabulary },
    };
    let prepared = data::prepare(&source, folder.path(), &|_| None, &mut |_| {}).unwrap();
    Text { tokens: prepared.tokens, _folder: folder }
});

/// Sentences with a structure that a small model can find.
fn prose() -> String {
    let (who, does) = (["the rank", "a stage", "one shard"], ["sends", "keeps", "sums"]);
    let what = ["its chunk", "the loss", "every gradient", "a block"];
    let sentence = |index: usize| {
        let mixed = index * index / 7;
        format!("{} {} {}.\n", who[mixed % 3], does[mixed / 3 % 3], what[index % 4])
    };
    (0..1500).map(sentence).collect()
}

fn batches(Batch { sequence, global_batch }: Batch) -> Batches {
    let file = TokenFile::open(TEXT.tokens.path()).unwrap();
    let sampling = Sampling { sequence, global_batch, seed: 7, held_out: Sampling::HELD_OUT };
    let sampler = Sampler::new(file.tokens(), sampling).unwrap();
    Batches::new(file, sampler)
}

/// What is trained; the layout comes on top.
#[derive(Clone)]
struct Job {
    config: Config,
    batch: Batch,
    precision: Precision,
    peak: f64,
    steps: u64,
    /// Whether documents do not see each other.
    masked: bool,
    /// Steps with a gradient norm over so many times the median of late are left out; 0 none.
    spike: f64,
    /// How groups that train apart meet.
    outer: OuterOptimizer,
    /// How gradients travel between hosts.
    compress: Option<Compression>,
    /// By which algorithms collectives go.
    choices: fn(&Program) -> Choices,
}

impl Job {
    fn new(tied_embeddings: bool) -> Self {
        Self {
            config: config(tied_embeddings),
            batch: Batch { sequence: 16, global_batch: 8 },
            precision: Precision::Fp32,
            peak: 3e-3,
            steps: STEPS,
            masked: false,
            spike: 0.0,
            outer: OuterOptimizer::default(),
            compress: None,
            choices: |_| Choices::default(),
        }
    }

    fn programs(&self, layout: &Layout) -> Programs {
        Programs {
            step: lower(&self.config, layout, &self.batch).unwrap(),
            evaluation: lower_evaluation(&self.config, layout, &self.batch).unwrap(),
            outer: lower_outer(&self.config, layout, &self.batch).unwrap(),
        }
    }

    /// One rank, the whole batch at once: what every other layout is held against.
    fn reference(&self) -> Layout {
        Layout::one_rank(self.batch.global_batch)
    }

    /// Clipping below the first steps' norms, warm-up and decay: all that a step can depend on.
    fn optimizer(&self) -> Optimizer {
        Optimizer {
            learning_rate: 0.0,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
            clip_norm: Some(0.5),
            outer: self.outer,
        }
    }

    fn settings(&self) -> Settings {
        let learning_rate = LearningRate {
            peak: self.peak,
            floor: 0.1 * self.peak,
            warmup_steps: 4,
            steps: self.steps,
        };
        let spike = self.spike;
        let on_divergence = if spike > 0.0 { OnDivergence::Skip } else { OnDivergence::Stop };
        Settings { learning_rate, evaluate_every: 10, first_step: 0, on_divergence, spike }
    }
}

/// What one rank saw and what it holds at the end.
#[derive(Debug, Clone, PartialEq)]
struct View {
    /// Loss and gradient norm of every step.
    steps: Vec<[f64; 2]>,
    /// Held-out losses.
    evaluations: Vec<f64>,
    /// Bytes in tensors after a step, the most there were before the first evaluation, and ever.
    live: [u64; 3],
    /// What the rank updates, and where in the model's blocks it lies.
    held: Vec<(Block, Range<usize>, Vec<f32>)>,
}

/// A run of every rank, and the model it left.
#[derive(Debug, Clone, PartialEq)]
struct Trained {
    steps: Vec<[f64; 2]>,
    evaluations: Vec<f64>,
    /// By block, as a reader of the exported folder finds it.
    parameters: Vec<(Block, Vec<f32>)>,
}

/// One rank's run, from fresh parameters to the exported model.
fn run_rank(
    job: &Job,
    layout: &Layout,
    transport: Box<dyn Transport>,
    folder: &Path,
    keeping: &Keeping,
) -> Result<View, Error> {
    let programs = job.programs(layout);
    let operators = Cpu::new(1, job.precision);
    let device = Device {
        operators: operators.clone(),
        config: job.config.clone(),
        optimizer: job.optimizer(),
    };
    let communicator = Communicator::new(transport, Limits::default()).unwrap();
    let Ok(worker) = Worker::new(device, &programs.step, communicator, |block, values| {
        Stage::<Cpu>::fresh(&job.config, 11, block, values);
        Ok::<(), Infallible>(())
    });
    let mut worker = worker.compressing(job.compress);
    worker.choose((job.choices)(&programs.step));
    let mut view =
        View { steps: Vec::new(), evaluations: Vec::new(), live: [0; 3], held: Vec::new() };
    let mut settings = job.settings();
    let mut safekeeping = keeping.start(&mut worker, &programs.step, job, &mut settings)?;
    let mut batches = batches(job.batch);
    if job.masked {
        // Any token that comes again and again will do.
        let mut first = [0];
        TEXT.tokens.window(0, &mut first).unwrap();
        batches = batches.masking(first[0]);
    }
    run(&mut worker, &programs, &batches, &settings, &mut safekeeping, &mut |event| {
        keeping.see(event, &view);
        match *event {
            Event::Step { loss, gradient_norm, .. } => {
                view.steps.push([loss, gradient_norm]);
                if view.evaluations.is_empty() {
                    let live = operators.live().unwrap();
                    view.live = [live.now.0, live.most.0, 0];
                }
            }
            Event::Evaluation { loss, .. } => view.evaluations.push(loss),
            _ => {}
        }
    })?;
    view.live[2] = operators.live().unwrap().most.0;
    export(&mut worker, &programs.step, &job.config, folder)?;
    for block in programs.step.held_blocks(worker.rank()) {
        let (range, values) = worker.stage().master(block);
        let part = (block, range.clone());
        for run in block_runs(&job.config, &programs.step, worker.rank(), part, false) {
            let (first, elements) = (run.part as usize - range.start, run.elements as usize);
            let whole = run.whole as usize..run.whole as usize + elements;
            view.held.push((block, whole, values[first..first + elements].to_vec()));
        }
    }
    Ok(view)
}

/// Runs every rank on a thread of its own.
fn run_all<F>(
    job: &Job,
    layout: &Layout,
    folder: &Path,
    transports: impl IntoIterator<Item = F>,
    keeping: &Keeping,
) -> Vec<Result<View, Error>>
where
    F: FnOnce() -> Box<dyn Transport> + Send,
{
    thread::scope(|scope| {
        let start =
            |transport: F| scope.spawn(move || run_rank(job, layout, transport(), folder, keeping));
        let ranks: Vec<_> = transports.into_iter().map(start).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn in_process(ranks: u32) -> impl Iterator<Item = impl FnOnce() -> Box<dyn Transport> + Send> {
    let mesh = InProcess::mesh(ranks).into_iter();
    mesh.map(|transport| move || Box::new(transport) as Box<dyn Transport>)
}

fn between_processes(
    ranks: u32,
    shared_memory: bool,
) -> impl Iterator<Item = impl FnOnce() -> Box<dyn Transport> + Send> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let mut listener = Some(listener);
    (0..ranks).map(move |rank| {
        let identity = "the same job".to_owned();
        let secret = Secret::new("the secret of a test").unwrap();
        let timeout = Duration::from_secs(60);
        let rank = Rank(rank);
        let rendezvous = Rendezvous {
            rank,
            ranks,
            address,
            identity,
            secret,
            timeout,
            shared_memory,
            interface: None,
        };
        let listener = listener.take().filter(|_| rank == Rank(0));
        move || Box::new(rendezvous.meet(listener).unwrap()) as Box<dyn Transport>
    })
}

/// Runs every rank, and checks that all tell the same story: every event, and every parameter that
/// any of them holds.
fn train_over<F>(job: &Job, layout: &Layout, transports: impl IntoIterator<Item = F>) -> Trained
where
    F: FnOnce() -> Box<dyn Transport> + Send,
{
    train_keeping(job, layout, transports, &Keeping::default())
}

/// As [`train_over`], keeping the state safe as told.
fn train_keeping<F>(
    job: &Job,
    layout: &Layout,
    transports: impl IntoIterator<Item = F>,
    keeping: &Keeping,
) -> Trained
where
    F: FnOnce() -> Box<dyn Transport> + Send,
{
    let folder = tempfile::tempdir().unwrap();
    let views: Result<Vec<View>, Error> =
        run_all(job, layout, folder.path(), transports, keeping).into_iter().collect();
    let views = views.unwrap_or_else(|error| panic!("{layout:?}: {error}"));
    let parameters = exported(&job.config, folder.path());
    for view in &views {
        assert_eq!(view.steps, views[0].steps, "{layout:?}");
        assert_eq!(view.evaluations, views[0].evaluations, "{layout:?}");
        for (block, range, values) in &view.held {
            let (_, whole) = parameters.iter().find(|(other, _)| other == block).unwrap();
            assert!(whole[range.clone()] == *values, "{layout:?}: {block} is not what was written");
        }
    }
    let View { steps, evaluations, .. } = views[0].clone();
    Trained { steps, evaluations, parameters }
}

fn train(job: &Job, layout: &Layout) -> Trained {
    train_over(job, layout, in_process(layout.mesh.ranks()))
}

fn exported(config: &Config, folder: &Path) -> Vec<(Block, Vec<f32>)> {
    let weights = Weights::open(folder).unwrap();
    weights.check(config).unwrap();
    let read = |block| {
        let mut values = vec![0.0; config.block_elements(block) as usize];
        weights.read_block(config, block, &mut values).unwrap();
        (block, values)
    };
    config.blocks().map(read).collect()
}

/// The length of the difference of two vectors over the length of the second.
fn distance(one: &[f32], other: &[f32]) -> f64 {
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum();
    let pairs = one.iter().zip(other);
    let difference: f64 =
        square(&mut pairs.map(|(one, other)| f64::from(*one) - f64::from(*other)));
    let whole: f64 = square(&mut other.iter().map(|value| f64::from(*value)));
    (difference / whole).sqrt()
}

/// Holds a layout to the run of one rank.
fn assert_same(layout: &Layout, trained: &Trained, reference: &Trained) {
    assert_eq!(trained.steps.len(), reference.steps.len());
    let within = |found: f64, expected: f64| (found / expected - 1.0).abs() <= LOSS_TOLERANCE;
    for (step, (found, expected)) in trained.steps.iter().zip(&reference.steps).enumerate() {
        for (found, expected) in found.iter().zip(expected) {
            assert!(within(*found, *expected), "{layout:?}, step {step}: {found} not {expected}");
        }
    }
    assert_eq!(trained.evaluations.len(), reference.evaluations.len());
    for (found, expected) in trained.evaluations.iter().zip(&reference.evaluations) {
        assert!(within(*found, *expected), "{layout:?}: held out {found}, not {expected}");
    }
    for ((block, found), (_, expected)) in trained.parameters.iter().zip(&reference.parameters) {
        let distance = distance(found, expected);
        assert!(distance <= PARAMETER_TOLERANCE, "{layout:?}: {block} is {distance} away");
    }
}

fn every_layout_trains_the_same(layouts: impl IntoIterator<Item = Layout>) {
    let layouts: Vec<Layout> = layouts.into_iter().collect();
    for tied in [false, true] {
        let job = Job::new(tied);
        let expected = train(&job, &job.reference());
        for layout in &layouts {
            assert_same(layout, &train(&job, layout), &expected);
        }
    }
}

#[test]
fn pipeline_schedules_train_the_same() {
    let with = |schedule, virtual_stages, pipeline| Layout {
        schedule,
        virtual_stages,
        ..layout(1, pipeline, 1, Shard::Optimizer)
    };
    every_layout_trains_the_same([
        with(Schedule::Gpipe, 1, 4),
        with(Schedule::Interleaved, 2, 2),
        with(Schedule::Gpipe, 2, 2),
    ]);
}

#[test]
fn training_learns() {
    let job = Job::new(false);
    let trained = train(&job, &job.reference());
    let (first, last) = (trained.steps[0][0], trained.steps[STEPS as usize - 1][0]);
    let uniform = (job.config.vocabulary as f64).ln();
    assert!((first - uniform).abs() < 0.1, "a fresh model knows nothing: {first}");
    assert!(last < first - 0.5, "{first} -> {last}");
    assert!(trained.evaluations[1] < trained.evaluations[0]);
    // Else clipping would not be held to anything.
    assert!(trained.steps.iter().any(|[_, norm]| *norm > 0.5));
}

#[test]
fn accumulation_changes_nothing() {
    every_layout_trains_the_same([1, 2, 4].map(|micro_batch| layout(1, 1, micro_batch, SHARDS[0])));
}

#[test]
fn data_parallelism_changes_nothing_at_any_shard_level() {
    let cases = [(2, 4), (2, 1), (4, 2), (4, 1)];
    every_layout_trains_the_same(
        SHARDS.into_iter().flat_map(|shard| cases.map(|(data, mb)| layout(data, 1, mb, shard))),
    );
}

/// Four ranks on two hosts: nearly the same losses, and to the bit the same every time and on all ranks.
#[test]
fn gradients_compressed_between_hosts_train_nearly_the_same() {
    let on_two_hosts = || {
        let apart = |end| Box::new(Apart::new(Box::new(end), 2)) as Box<dyn Transport>;
        InProcess::mesh(4).into_iter().map(move |end| move || apart(end))
    };
    let exact = train(&Job::new(false), &layout(4, 1, 1, Shard::None));
    for (compression, shard) in
        [(Compression::Bf16, Shard::None), (Compression::Int8, Shard::Gradients)]
    {
        let job = Job { compress: Some(compression), ..Job::new(false) };
        let layout = layout(4, 1, 1, shard);
        let trained = train_over(&job, &layout, on_two_hosts());
        assert!(trained == train_over(&job, &layout, on_two_hosts()), "{compression:?}");
        assert!(trained.steps != exact.steps, "{compression:?} changes nothing");
        for ([found, _], [expected, _]) in trained.steps.iter().zip(&exact.steps) {
            assert!((found / expected - 1.0).abs() < 0.01, "{compression:?}: {found} {expected}");
        }
    }
}

#[test]
fn a_degree_that_divides_no_block_changes_nothing() {
    let batch = Batch { sequence: 16, global_batch: 9 };
    let job = Job { batch, ..Job::new(true) };
    assert_ne!(job.config.block_elements(Block::Embedding) % 3, 0);
    let expected = train(&job, &job.reference());
    for (pipeline, shard) in [(1, Shard::Optimizer), (2, Shard::None), (2, Shard::Parameters)] {
        let layout = layout(3, pipeline, 1, shard);
        assert_same(&layout, &train(&job, &layout), &expected);
    }
}

#[test]
fn pipelines_change_nothing() {
    let cases = [(2, 8), (2, 2), (2, 1), (4, 8), (4, 2), (4, 1)];
    every_layout_trains_the_same(cases.map(|(pipeline, mb)| layout(1, pipeline, mb, Shard::None)));
}

#[test]
fn data_and_pipeline_together_change_nothing() {
    every_layout_trains_the_same(
        SHARDS.into_iter().flat_map(|shard| [4, 1].map(|mb| layout(2, 2, mb, shard))),
    );
}

#[test]
fn repetition_changes_no_bit() {
    for (layout, precision) in [
        (layout(1, 1, 4, Shard::None), Precision::Fp32),
        (layout(4, 1, 1, Shard::Gradients), Precision::Fp32),
        (layout(2, 2, 2, Shard::Parameters), Precision::Fp32),
        (layout(2, 2, 2, Shard::Optimizer), Precision::Bf16),
    ] {
        let job = Job { precision, ..Job::new(true) };
        assert!(train(&job, &layout) == train(&job, &layout), "{layout:?} {precision:?}");
    }
}

#[test]
fn the_transport_changes_no_bit() {
    for layout in [layout(4, 1, 1, Shard::Optimizer), layout(2, 2, 2, Shard::Parameters)] {
        let (job, ranks) = (Job::new(true), layout.mesh.ranks());
        let one = train_over(&job, &layout, in_process(ranks));
        for shared_memory in [false, true] {
            let other = train_over(&job, &layout, between_processes(ranks, shared_memory));
            assert!(one == other, "{layout:?}: {:?} and {:?}", one.steps, other.steps);
        }
    }
}

/// How far bf16 may be from fp32 in the loss and in the gradient norm of twenty steps, relative: twice what
/// was measured (0.05 % and 4.9 %, of latent attention 0.04 % and 2.4 %). A value is rounded by up to one
/// part in 256. The loss is a mean, in which most of that cancels; the norm is the length of a small gradient
/// that is left of larger ones, and twenty updates by it have led elsewhere.
const BF16_TOLERANCES: [f64; 2] = [0.001, 0.1];

#[test]
fn bf16_stays_close_to_fp32() {
    let llama = Job::new(false);
    let latent = Job { config: latent_config(), ..llama.clone() };
    for (job, layout) in [
        (&llama, llama.reference()),
        (&llama, layout(2, 2, 2, Shard::Parameters)),
        (&latent, latent.reference()),
    ] {
        let low = Job { precision: Precision::Bf16, ..job.clone() };
        let (fp32, bf16) = (train(job, &layout), train(&low, &layout));
        let mut worst = [0.0_f64; 2];
        for (exact, rounded) in fp32.steps.iter().zip(&bf16.steps) {
            for (worst, (exact, rounded)) in worst.iter_mut().zip(exact.iter().zip(rounded)) {
                *worst = worst.max((rounded / exact - 1.0).abs());
            }
        }
        println!("{layout:?}: loss and gradient norm within {worst:?}");
        assert!(worst.iter().all(|worst| *worst > 0.0), "bf16 rounds");
        let within = worst.iter().zip(BF16_TOLERANCES).all(|(worst, most)| *worst <= most);
        assert!(within, "{layout:?}: {worst:?}");
    }
}

#[test]
fn a_loss_that_is_no_number_stops_every_rank_at_the_same_step() {
    let job = Job { peak: 1e30, ..Job::new(false) };
    for layout in
        [job.reference(), layout(4, 1, 1, Shard::None), layout(2, 2, 2, Shard::Parameters)]
    {
        let folder = tempfile::tempdir().unwrap();
        let outcomes = run_all(
            &job,
            &layout,
            folder.path(),
            in_process(layout.mesh.ranks()),
            &Keeping::default(),
        );
        for outcome in outcomes {
            let error = outcome.unwrap_err();
            assert!(matches!(error, Error::Diverged { step: 2, .. }), "{layout:?}: {error}");
            assert!(error.to_string().contains("learning_rate"), "{error}");
        }
        assert!(!folder.path().join("config.json").exists(), "nothing is exported");
    }
}

#[test]
fn steps_with_a_large_gradient_are_left_out_on_every_rank_alike() {
    let job = Job { spike: 0.98, ..Job::new(false) };
    for layout in [job.reference(), layout(2, 2, 2, Shard::Optimizer)] {
        let folder = tempfile::tempdir().unwrap();
        let ranks = in_process(layout.mesh.ranks());
        let views = run_all(&job, &layout, folder.path(), ranks, &Keeping::default());
        let steps: Vec<_> = views.into_iter().map(|view| view.unwrap().steps).collect();
        assert!((10..STEPS as usize).contains(&steps[0].len()), "{}", steps[0].len());
        assert!(steps.iter().all(|one| *one == steps[0]), "{layout:?}");
    }
}
