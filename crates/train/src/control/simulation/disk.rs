//! The checkpoints of a simulated run: the code that ships, on a disk in memory.

use std::path::Path;
use std::sync::Arc;

use checkpoint::sharded::{Checkpoint, Kind, Progress, Shard, commit, retain, write_shard};
use checkpoint::store::simulated::{Dice, Faults, SimulatedDisk};
use checkpoint::store::{Folder, Store};
use model::{Block, Config, Rotary};
use units::Rank;

use super::Bug;
use super::world::State;

const ROOT: &str = "/checkpoints";
/// Whole checkpoints that are kept.
const KEEP: usize = 2;
/// Of the run; any would do.
const SEED: u64 = 3;
const TOKENS: u64 = 99;

/// The smallest model there is.
fn config() -> Config {
    Config {
        layers: 0,
        hidden: 2,
        heads: 1,
        kv_heads: 1,
        head_dim: 2,
        feed_forward: 1,
        vocabulary: 4,
        tied_embeddings: false,
        norm_epsilon: 1e-5,
        rotary: Rotary { theta: 1e4, scaling: None },
        context: 16,
        ..Config::default()
    }
}

pub struct Checkpoints {
    disk: SimulatedDisk,
    store: Arc<dyn Store>,
    config: Config,
    bug: Option<Bug>,
    /// Changes after which power is lost.
    crash_after: Option<u64>,
    /// The last step of which a checkpoint was called whole.
    promised: Option<u64>,
}

fn half(state: State, element: usize) -> f32 {
    f32::from_bits((state.value >> (32 * (element % 2))) as u32)
}

fn progress(state: State) -> Progress {
    Progress { step: state.step, position: state.position, seed: SEED, tokens: TOKENS }
}

impl Checkpoints {
    pub fn new(bug: Option<Bug>) -> Self {
        let disk = SimulatedDisk::new(Path::new(ROOT));
        let store = Arc::new(Folder::on(disk.clone(), Path::new(ROOT)));
        let (crash_after, promised) = (None, None);
        let mut checkpoints = Self { disk, store, config: config(), bug, crash_after, promised };
        checkpoints.heal();
        checkpoints
    }

    /// What the disk does wrong from now on, besides what the bug does.
    fn fail(&mut self, faults: Faults) {
        self.crash_after = faults.crash_after;
        self.disk.fail(Faults { lies: self.bug == Some(Bug::SkipsSync), ..faults });
    }

    /// The disk works.
    pub fn heal(&mut self) {
        self.fail(Faults::default());
    }

    /// There is room for so many more bytes.
    pub fn fill(&mut self, room: u64) {
        let used: u64 = self.disk.files().iter().map(|(_, bytes)| bytes).sum();
        self.fail(Faults { capacity: Some(used + room), ..Faults::default() });
    }

    /// Power will be lost after so many changes.
    pub fn crash_after(&mut self, changes: u64) {
        self.fail(Faults { crash_after: Some(changes), ..Faults::default() });
    }

    /// Whether power is lost.
    pub fn crashed(&self) -> bool {
        self.crash_after.is_some_and(|changes| self.disk.changes() >= changes)
    }

    /// Power comes back: what was synced is there, and some of the rest.
    pub fn reboot(&mut self, dice: &mut Dice) {
        self.disk.reboot(dice);
        self.heal();
    }

    /// A rank's part of a checkpoint, of so many; whether it was written.
    pub fn write(&self, (rank, ranks): (Rank, u32), attempt: u64, state: State) -> bool {
        let mut shard = Shard::default();
        for block in self.config.blocks() {
            let elements = self.config.block_elements(block) as usize;
            let range = collective::chunk_range(elements, ranks, rank.0);
            let values: Vec<f32> = range.clone().map(|element| half(state, element)).collect();
            for kind in Kind::ALL {
                shard.push(block, kind, range.start as u64, &values);
            }
        }
        write_shard(&*self.store, state.step, attempt, rank, &shard).is_ok()
    }

    /// Makes a checkpoint if all have written; `None` when the disk refuses.
    pub fn commit(&mut self, ranks: u32, attempt: u64, state: State) -> Option<bool> {
        let store = &*self.store;
        if self.bug == Some(Bug::RemovesEarly) {
            for folder in Checkpoint::names(store).unwrap_or_default() {
                drop(store.remove(&format!("{folder}/manifest.json")));
            }
        }
        let whole = match commit(store, progress(state), attempt, ranks, &self.config) {
            Err(_) => return None,
            Ok(false) if self.bug == Some(Bug::CommitsAlone) => true,
            Ok(whole) => whole,
        };
        if !whole {
            return Some(false);
        }
        self.promised = self.promised.max(Some(state.step));
        // Old ones may stay.
        drop(retain(store, KEEP, state.step));
        Some(true)
    }

    /// The newest checkpoint, all of which must be right.
    pub fn newest(&self, right: &[State]) -> Result<Option<State>, String> {
        let found = Checkpoint::newest(&self.store, &self.config).map_err(|e| e.to_string())?;
        let Some(checkpoint) = found.0 else { return Ok(None) };
        let step = checkpoint.progress().step;
        let state = right[step as usize];
        let blocks: Vec<Block> = self.config.blocks().collect();
        for (block, kind) in blocks.iter().flat_map(|block| Kind::ALL.map(|kind| (*block, kind))) {
            let mut values = vec![0.0; self.config.block_elements(block) as usize];
            checkpoint.read(block, kind, 0, &mut values).map_err(|error| error.to_string())?;
            let same =
                |(element, value): (usize, &f32)| value.to_bits() == half(state, element).to_bits();
            if !values.iter().enumerate().all(same) || checkpoint.progress() != progress(state) {
                return Err(format!("the checkpoint of step {step} holds something else"));
            }
        }
        Ok(Some(state))
    }

    /// What was called whole once is there, or something newer.
    pub fn check(&self, right: &[State]) -> Result<(), String> {
        let newest = self.newest(right)?.map(|state| state.step);
        if newest < self.promised {
            return Err(format!("saved after step {:?}, and {newest:?} is there", self.promised));
        }
        Ok(())
    }
}
