//! Whatever happens to a disk, what is loaded is what was saved.

mod damage;
#[cfg(feature = "object-store")]
mod objects;

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use model::{Block, Config, Rotary};
use proptest::prelude::*;
use units::Rank;

use super::manifest::{file_name, part_name, unseal};
use std::iter;

use super::*;
use crate::Error;
use crate::hugging_face::{Dtype, Weights};
use crate::store::simulated::{Dice, Faults, SimulatedDisk};
use crate::store::{Folder, Store};

const ROOT: &str = "/checkpoints";
const SEED: u64 = 3;

fn config() -> Config {
    Config {
        layers: 1,
        hidden: 4,
        heads: 2,
        kv_heads: 1,
        head_dim: 2,
        feed_forward: 6,
        vocabulary: 10,
        tied_embeddings: false,
        norm_epsilon: 1e-5,
        rotary: Rotary { theta: 1e4, scaling: None },
        context: 16,
        ..Config::default()
    }
}

fn progress(step: u64) -> Progress {
    Progress { step, position: 8 * step, seed: SEED, tokens: 99 }
}

/// What a run holds after a step: another value everywhere.
fn value(step: u64, block: Block, kind: Kind, element: u64) -> f32 {
    let block = config().blocks().position(|other| other == block).unwrap() as u64;
    let mixed = Dice::new(step << 40 | block << 32 | (kind as u64) << 30 | element).roll();
    f32::from_bits((mixed as u32 & 0x7fff_ffff).min(0x7f00_0000))
}

fn values(step: u64, block: Block, kind: Kind, range: Range<u64>) -> Vec<f32> {
    range.map(|element| value(step, block, kind, element)).collect()
}

/// How the state is spread over the ranks that save it.
#[derive(Debug, Clone, Copy)]
enum Spread {
    /// Each has a chunk of every block.
    Chunks,
    /// All have everything, and the first saves.
    Replicas,
    /// Each has some columns, and of an even number of ranks half of them.
    Columns,
}

/// Who saves what.
#[derive(Debug, Clone, Copy)]
struct Layout {
    spread: Spread,
    ranks: u32,
}

impl From<u32> for Layout {
    fn from(ranks: u32) -> Self {
        Self { spread: Spread::Chunks, ranks }
    }
}

impl Layout {
    fn all(ranks: u32) -> [Self; 3] {
        [Spread::Chunks, Spread::Replicas, Spread::Columns].map(|spread| Self { spread, ranks })
    }

    /// The elements of a block that a rank saves.
    fn ranges(self, rank: u32, elements: u64) -> Vec<Range<u64>> {
        const WIDTH: u64 = 6;
        let part = |of: u64, rank: u32, ranks: u32| {
            of * u64::from(rank) / u64::from(ranks)..of * u64::from(rank + 1) / u64::from(ranks)
        };
        match self.spread {
            Spread::Chunks => vec![part(elements, rank, self.ranks)],
            Spread::Replicas if rank > 0 => vec![],
            Spread::Replicas => iter::once(0..elements).collect(),
            Spread::Columns => {
                let tensor = if self.ranks.is_multiple_of(2) { 2 } else { self.ranks };
                let columns = part(WIDTH, rank % tensor, tensor);
                let held = (0..elements).filter(|element| columns.contains(&(element % WIDTH)));
                let held: Vec<u64> = held.collect();
                let own = part(held.len() as u64, rank / tensor, self.ranks / tensor);
                let held = &held[own.start as usize..own.end as usize];
                let rows = held.chunk_by(|one, next| one + 1 == *next);
                rows.map(|row| row[0]..row[0] + row.len() as u64).collect()
            }
        }
    }
}

/// What a rank of several saves.
fn shard(step: u64, rank: u32, layout: impl Into<Layout>) -> Shard {
    let layout = layout.into();
    let mut shard = Shard::default();
    for block in config().blocks() {
        for kind in Kind::ALL {
            for range in layout.ranges(rank, config().block_elements(block)) {
                shard.push(block, kind, range.start, &values(step, block, kind, range.clone()));
            }
        }
    }
    shard
}

/// All that is saved of a step; the first error.
fn save(
    store: &dyn Store,
    step: u64,
    layout: impl Into<Layout>,
    attempt: u64,
) -> Result<(), Error> {
    let layout = layout.into();
    for rank in 0..layout.ranks {
        write_shard(store, step, attempt, Rank(rank), &shard(step, rank, layout))?;
    }
    assert!(commit(store, progress(step), attempt, layout.ranks, &config())?);
    retain(store, 1, step)
}

/// The state that a checkpoint holds is that of its step.
fn assert_right(checkpoint: &Checkpoint) {
    let step = checkpoint.progress().step;
    assert_eq!(checkpoint.progress(), progress(step));
    for block in config().blocks() {
        for kind in Kind::ALL {
            let expected = values(step, block, kind, 0..config().block_elements(block));
            let mut found = vec![f32::NAN; expected.len()];
            checkpoint.read(block, kind, 0, &mut found).unwrap();
            assert_eq!(found, expected, "{block} {kind}");
        }
    }
}

/// A disk, and a store on it.
fn simulated() -> (SimulatedDisk, Arc<dyn Store>) {
    let disk = SimulatedDisk::new(Path::new(ROOT));
    let store = Arc::new(Folder::on(disk.clone(), Path::new(ROOT)));
    (disk, store)
}

/// The step of the newest checkpoint, whose contents are right.
fn newest(store: &Arc<dyn Store>) -> Option<u64> {
    let (checkpoint, _) = Checkpoint::newest(store, &config()).unwrap();
    checkpoint.map(|checkpoint| {
        assert_right(&checkpoint);
        checkpoint.progress().step
    })
}

fn file(step: u64, attempt: u64, name: &str) -> PathBuf {
    Path::new(ROOT).join(commit::folder_name(step, attempt)).join(name)
}

#[test]
fn what_is_saved_is_loaded_and_one_older_is_kept_no_longer() {
    let (disk, store) = simulated();
    assert_eq!(newest(&store), None);
    save(&*store, 10, 3, 0).unwrap();
    save(&*store, 20, 2, 0).unwrap();
    assert_eq!(newest(&store), Some(20));
    let names: Vec<_> = disk.files().into_iter().map(|(path, _)| path).collect();
    let expected = ["manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"];
    assert_eq!(names, expected.map(|name| file(20, 0, name)));
}

/// A checkpoint of step 50 is whole when ranks go back to step 47. Rank 1 has written step 50 anew
/// when rank 0 makes the checkpoint of step 48.
#[test]
fn parts_of_a_step_that_is_saved_anew_are_left_for_rank_0_to_find() {
    let (_, store) = simulated();
    save(&*store, 50, 2, 1).unwrap();
    write_shard(&*store, 50, 2, Rank(1), &shard(50, 1, 2)).unwrap();
    save(&*store, 48, 2, 2).unwrap();
    write_shard(&*store, 50, 2, Rank(0), &shard(50, 0, 2)).unwrap();
    assert!(commit(&*store, progress(50), 2, 2, &config()).unwrap());
}

#[test]
fn forgetting_to_sync_is_found_out() {
    let survives = |seed| {
        let (disk, store) = simulated();
        save(&*store, 10, 2, 0).unwrap();
        disk.fail(Faults { lies: true, ..Faults::default() });
        save(&*store, 20, 2, 0).unwrap();
        disk.reboot(&mut Dice::new(seed));
        newest(&store) == Some(20)
    };
    assert!((0..20).any(|seed| !survives(seed)), "the crash test would find nothing");
}

#[test]
fn a_full_disk_fails_the_save_and_keeps_the_old_checkpoint() {
    let (disk, store) = simulated();
    save(&*store, 10, 2, 0).unwrap();
    let used: u64 = disk.files().iter().map(|(_, bytes)| bytes).sum();
    for capacity in (used..2 * used).step_by(97) {
        disk.fail(Faults { capacity: Some(capacity), ..Faults::default() });
        match save(&*store, 20, 2, 0) {
            Err(Error::Store { action: "write", source, .. }) => {
                assert_eq!(source.kind(), io::ErrorKind::StorageFull);
                assert_eq!(newest(&store), Some(10));
            }
            other => panic!("{other:?}"),
        }
    }
    disk.fail(Faults::default());
    save(&*store, 20, 2, 0).unwrap();
    assert_eq!(newest(&store), Some(20));
}

/// Two checkpoints, of steps 10 and 20, that ranks of a layout have saved.
fn save_two(store: &dyn Store, layout: Layout) {
    for step in [10, 20] {
        for rank in 0..layout.ranks {
            write_shard(store, step, 0, Rank(rank), &shard(step, rank, layout)).unwrap();
        }
        assert!(commit(store, progress(step), 0, layout.ranks, &config()).unwrap());
    }
}

/// Two checkpoints of two ranks.
fn two() -> (SimulatedDisk, Arc<dyn Store>) {
    let (disk, store) = simulated();
    save_two(&*store, Layout::from(2));
    (disk, store)
}

#[test]
fn a_lost_file_is_walked_back_from() {
    for name in ["manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"] {
        let (_, store) = two();
        store.remove(&format!("{}/{name}", commit::folder_name(20, 0))).unwrap();
        assert_eq!(newest(&store), Some(10), "{name}");
    }
}

#[test]
fn another_model_is_refused() {
    let (_, store) = two();
    let other = Config { vocabulary: 11, ..config() };
    let (found, rejected) = Checkpoint::newest(&store, &other).unwrap();
    assert!(found.is_none() && rejected.len() == 2, "{rejected:?}");
    assert!(matches!(rejected[0].error, Error::OtherModel { .. }), "{}", rejected[0].error);
}

#[test]
fn what_is_missing_or_twice_is_no_checkpoint() {
    let (_, store) = simulated();
    write_shard(&*store, 1, 0, Rank(0), &shard(1, 0, 2)).unwrap();
    assert!(!commit(&*store, progress(1), 0, 2, &config()).unwrap(), "rank 1 has not written");
    let gap = commit(&*store, progress(1), 0, 1, &config()).unwrap_err();
    assert!(matches!(gap, Error::Gap { block: Block::Embedding, element: 20, .. }), "{gap}");
    write_shard(&*store, 1, 0, Rank(1), &shard(1, 0, 1)).unwrap();
    let overlap = commit(&*store, progress(1), 0, 2, &config()).unwrap_err();
    assert!(matches!(overlap, Error::Overlap { .. }), "{overlap}");
    assert_eq!(newest(&store), None);
}

#[test]
fn older_manifests_are_read_and_newer_ones_refused() {
    let (_, store) = two();
    let name = format!("{}/manifest.json", commit::folder_name(20, 0));
    let bytes = store.get(&name, 0..store.length(&name).unwrap()).unwrap();
    let text = String::from_utf8(bytes).unwrap();
    // The first version is this one without rows, which chunks have none of.
    for (version, found) in [("1", Some(20)), ("3", Some(10))] {
        let other = text.replacen("\"version\":2", &format!("\"version\":{version}"), 1);
        store.put(&name, &[other.as_bytes()]).unwrap();
        assert_eq!(newest(&store), found);
    }
    let (_, rejected) = Checkpoint::newest(&store, &config()).unwrap();
    let said = rejected[0].error.to_string();
    assert!(said.contains("it has version 3, this program reads 1 to 2"), "{said}");
}

/// A store whose listings are late: what was there at first is in all of them.
struct Late {
    store: Arc<dyn Store>,
    first: Mutex<BTreeMap<String, Vec<String>>>,
}

impl Store for Late {
    fn put(&self, name: &str, pieces: &[&[u8]]) -> io::Result<()> {
        self.store.put(name, pieces)
    }

    fn get(&self, name: &str, range: Range<u64>) -> io::Result<Vec<u8>> {
        self.store.get(name, range)
    }

    fn length(&self, name: &str) -> io::Result<u64> {
        self.store.length(name)
    }

    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        let now = self.store.list(folder)?;
        let mut first = self.first.lock().unwrap();
        Ok(first.entry(folder.to_owned()).or_insert(now).clone())
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
fn a_late_listing_hides_what_is_there_and_shows_nothing_that_is_not() {
    let (_, store) = two();
    let late: Arc<dyn Store> =
        Arc::new(Late { store: Arc::clone(&store), first: Mutex::default() });
    assert_eq!(newest(&late), Some(20));
    save(&*store, 30, 2, 0).unwrap();
    // Those before are removed, and still listed.
    assert_eq!((newest(&late), newest(&store)), (None, Some(30)));
}

#[test]
fn columns_are_one_piece_however_many_rows_they_have() {
    let columns = |ranks| Layout { spread: Spread::Columns, ranks };
    let (_, store) = simulated();
    save(&*store, 20, columns(3), 0).unwrap();
    let name = format!("{}/manifest.json", commit::folder_name(20, 0));
    let bytes = store.get(&name, 0..store.length(&name).unwrap()).unwrap();
    let manifest: Manifest = unseal(&bytes).unwrap();
    for file in manifest.files {
        // Rows of a block that are cut short at its end are another.
        assert!(file.pieces.len() <= 2 * 3 * Kind::ALL.len(), "{:?}", file.pieces);
        assert!(file.pieces.iter().any(|piece| piece.rows.is_some_and(|rows| rows.count > 5)));
    }
}

#[test]
fn it_exports_to_hugging_face() {
    let (_, store) = two();
    let (checkpoint, _) = Checkpoint::newest(&store, &config()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    checkpoint.unwrap().export(folder.path(), Dtype::F32).unwrap();
    let weights = Weights::open(folder.path()).unwrap();
    weights.check(&config()).unwrap();
    for block in config().blocks() {
        let mut found = vec![0.0; config().block_elements(block) as usize];
        weights.read_block(&config(), block, &mut found).unwrap();
        assert_eq!(found, values(20, block, Kind::Parameter, 0..found.len() as u64));
    }
}

#[test]
fn files_are_plain_safetensors() {
    let (_, store) = two();
    let name = format!("{}/{}", commit::folder_name(20, 0), file_name(Rank(1)));
    let bytes = store.get(&name, 0..store.length(&name).unwrap()).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let start = config().block_elements(Block::Head) / 2;
    let tensor = tensors.tensor(&format!("head.second-moment.{start}")).unwrap();
    let expected = values(20, Block::Head, Kind::SecondMoment, start..2 * start);
    let expected: Vec<u8> = expected.iter().flat_map(|value| value.to_le_bytes()).collect();
    assert_eq!(tensor.data(), expected);
}

fn setup(store: &Arc<dyn Store>, rank: u32, attempt: u64, patience: Duration) -> Setup {
    let (store, config) = (Arc::clone(store), config());
    let (rank, is_ours) = (Rank(rank), Arc::new(|| true));
    Setup { store, config, rank, ranks: 2, attempt, keep: 2, patience, is_ours }
}

#[test]
fn ranks_save_beside_training() {
    let folder = tempfile::tempdir().unwrap();
    let store: Arc<dyn Store> = Arc::new(Folder::new(folder.path()));
    let mut savers = [0, 1].map(|rank| Saver::new(setup(&store, rank, 5, Duration::from_secs(60))));
    for step in [10, 20, 30] {
        for (rank, saver) in savers.iter_mut().enumerate() {
            saver.save(progress(step), Arc::new(shard(step, rank as u32, 2)));
        }
    }
    for mut saver in savers {
        let saved = saver.finish();
        let steps: Vec<_> = saved.iter().map(|saved| (saved.step, saved.outcome.is_ok())).collect();
        assert_eq!(steps, [(10, true), (20, true), (30, true)]);
    }
    assert_eq!(newest(&store), Some(30));
    assert_eq!(Checkpoint::names(&*store).unwrap().len(), 2);
}

#[test]
fn a_rank_that_never_writes_is_named_and_nothing_is_made_of_two_attempts() {
    let (_, store) = simulated();
    write_shard(&*store, 10, 4, Rank(1), &shard(10, 1, 2)).unwrap();
    let mut alone = Saver::new(setup(&store, 0, 5, Duration::ZERO));
    alone.save(progress(10), Arc::new(shard(10, 0, 2)));
    let saved = alone.finish();
    let Err(Error::Incomplete { rank, .. }) = &saved[0].outcome else { panic!("{saved:?}") };
    assert_eq!(*rank, Rank(1));
    assert_eq!(newest(&store), None);
}

#[test]
fn a_wait_for_a_rank_that_failed_is_given_up() {
    let (_, store) = simulated();
    let mut alone = Saver::new(setup(&store, 0, 5, Duration::from_secs(1 << 40)));
    alone.save(progress(10), Arc::new(shard(10, 0, 2)));
    // The thread may not be waiting yet, and hears it nevertheless.
    alone.give_up();
    let saved = alone.finish().remove(0).outcome.unwrap_err().to_string();
    assert!(saved.contains("rank 1 wrote no part of it"), "{saved}");
}

#[test]
fn ranks_whose_run_is_no_longer_theirs_make_no_checkpoint_of_it() {
    let (_, store) = simulated();
    let mut savers: Vec<Saver> = (0..2)
        .map(|rank| {
            let is_ours = Arc::new(|| false);
            Saver::new(Setup { is_ours, ..setup(&store, rank, 0, Duration::MAX) })
        })
        .collect();
    for (rank, saver) in (0..).zip(&mut savers) {
        saver.save(progress(4), Arc::new(shard(4, rank, 2)));
    }
    assert!(matches!(&savers[0].finish()[..], [Saved { outcome: Err(Error::NotOurs { .. }), .. }]));
    assert_eq!(newest(&store), None);
}

#[test]
fn nobody_waits_for_ranks_after_the_saver_is_dropped() {
    let (_, store) = simulated();
    let mut alone = Saver::new(setup(&store, 0, 5, Duration::from_secs(1 << 40)));
    alone.save(progress(10), Arc::new(shard(10, 0, 2)));
    drop(alone);
    assert_eq!(newest(&store), None);
}

proptest! {
    #[test]
    fn any_range_is_read_whoever_wrote_it(
        ranks in 1_u32..6,
        spread in 0_usize..3,
        block in 0_usize..3,
        kind in 0_usize..3,
        ends in (0_u64..=200, 0_u64..=200),
    ) {
        let (_, store) = simulated();
        save(&*store, 20, Layout::all(ranks)[spread], 0).unwrap();
        let checkpoint = Checkpoint::newest(&store, &config()).unwrap().0.unwrap();
        let block = config().blocks().nth(block).unwrap();
        let (kind, elements) = (Kind::ALL[kind], config().block_elements(block));
        let (one, other) = (ends.0.min(elements), ends.1.min(elements));
        let range = one.min(other)..one.max(other);
        let mut found = vec![f32::NAN; (range.end - range.start) as usize];
        checkpoint.read(block, kind, range.start, &mut found).unwrap();
        prop_assert_eq!(found, values(20, block, kind, range));
    }

    #[test]
    fn random_bytes_are_no_manifest(bytes: Vec<u8>) {
        prop_assert!(unseal::<Manifest>(&bytes).is_err());
        let (_, store) = two();
        let name = format!("{}/manifest.json", commit::folder_name(20, 0));
        store.put(&name, &[&bytes]).unwrap();
        prop_assert_eq!(newest(&store), Some(10));
    }

    #[test]
    fn random_bytes_are_no_part(bytes: Vec<u8>) {
        let (_, store) = simulated();
        write_shard(&*store, 20, 0, Rank(0), &shard(20, 0, 1)).unwrap();
        let name = format!("{}/{}", commit::folder_name(20, 0), part_name(Rank(0)));
        store.put(&name, &[&bytes]).unwrap();
        let refused = matches!(
            commit(&*store, progress(20), 0, 1, &config()),
            Err(Error::Damaged { .. })
        );
        prop_assert!(refused);
    }
}
