//! Saving and loading what ranks hold of columns: as pieces of many rows, and as a piece for every row.

use std::path::Path;
use std::sync::Arc;

use checkpoint::sharded::{Checkpoint, Kind, Progress, Shard, commit, write_shard};
use checkpoint::store::simulated::SimulatedDisk;
use checkpoint::store::{Folder, Store};
use divan::Bencher;
use model::{Config, Rotary};
use units::Rank;

/// Ranks that split the columns, and how many there are.
const RANKS: u32 = 4;
const COLUMNS: u64 = 512;

fn main() {
    for joined in [true, false] {
        let store = saved(joined);
        let bytes: u64 = Checkpoint::names(&*store)
            .map(|names| {
                let name = format!("{}/manifest.json", names[0]);
                store.length(&name).unwrap_or_default()
            })
            .unwrap_or_else(|error| panic!("{error}"));
        println!("joined {joined}: a manifest of {bytes} bytes");
    }
    divan::main();
}

/// 9 million elements of each kind.
fn config() -> Config {
    Config {
        layers: 2,
        hidden: COLUMNS,
        heads: 8,
        kv_heads: 8,
        head_dim: 64,
        feed_forward: 2048,
        vocabulary: 512,
        tied_embeddings: false,
        norm_epsilon: 1e-5,
        rotary: Rotary { theta: 1e4, scaling: None },
        context: 16,
        ..Config::default()
    }
}

/// What a rank has: its columns of every block. Rows of different kinds that take turns are not joined.
fn shard(rank: u32, joined: bool) -> Shard {
    let (config, width) = (config(), COLUMNS / u64::from(RANKS));
    let mut shard = Shard::default();
    let values = vec![1.0; width as usize];
    for block in config.blocks() {
        let rows = config.block_elements(block) / COLUMNS;
        let row = |shard: &mut Shard, kind, row| {
            shard.push(block, kind, row * COLUMNS + u64::from(rank) * width, &values);
        };
        match joined {
            true => Kind::ALL.iter().for_each(|k| (0..rows).for_each(|n| row(&mut shard, *k, n))),
            false => (0..rows).for_each(|n| Kind::ALL.iter().for_each(|k| row(&mut shard, *k, n))),
        }
    }
    shard
}

fn save(store: &dyn Store, shards: &[Shard]) {
    for (rank, shard) in (0..).map(Rank).zip(shards) {
        write_shard(store, 1, 0, rank, shard).unwrap_or_else(|error| panic!("{error}"));
    }
    let progress = Progress { step: 1, position: 8, seed: 1, tokens: 1 };
    let whole = commit(store, progress, 0, RANKS, &config());
    assert!(whole.unwrap_or_else(|error| panic!("{error}")));
}

/// In memory, so that only what the processor does is measured.
fn store() -> Arc<dyn Store> {
    let root = Path::new("/checkpoints");
    Arc::new(Folder::on(SimulatedDisk::new(root), root))
}

fn saved(joined: bool) -> Arc<dyn Store> {
    let store = store();
    save(&*store, &(0..RANKS).map(|rank| shard(rank, joined)).collect::<Vec<_>>());
    store
}

#[divan::bench(args = [true, false], sample_count = 5)]
fn saves(bencher: Bencher, joined: bool) {
    let shards: Vec<Shard> = (0..RANKS).map(|rank| shard(rank, joined)).collect();
    bencher.with_inputs(store).bench_refs(|store| save(&**store, &shards));
}

#[divan::bench(args = [true, false], sample_count = 5)]
fn loads(bencher: Bencher, joined: bool) {
    let (store, config) = (saved(joined), config());
    bencher.bench(|| {
        let (found, _) =
            Checkpoint::newest(&store, &config).unwrap_or_else(|error| panic!("{error}"));
        let Some(checkpoint) = found else { panic!("it was just saved") };
        for block in config.blocks() {
            let mut values = vec![0.0; config.block_elements(block) as usize];
            for kind in Kind::ALL {
                let read = checkpoint.read(block, kind, 0, &mut values);
                read.unwrap_or_else(|error| panic!("{error}"));
            }
        }
    });
}
