//! Crashes, damage and malice: what is loaded is what was saved, or nothing.

use serde_json::Value;

use super::super::manifest::seal;
use super::*;

#[test]
fn a_crash_at_any_change_leaves_a_whole_checkpoint() {
    for layout in Layout::all(3) {
        let changes = {
            let (disk, store) = simulated();
            save(&*store, 10, 2, 0).unwrap();
            disk.fail(Faults::default());
            save(&*store, 20, layout, 0).unwrap();
            disk.changes()
        };
        assert!(changes > 40, "{changes}");
        for (crash_after, seed) in (0..=changes).flat_map(|n| (0..20).map(move |seed| (n, seed))) {
            let (disk, store) = simulated();
            save(&*store, 10, 2, 0).unwrap();
            disk.fail(Faults { crash_after: Some(crash_after), ..Faults::default() });
            let saved = save(&*store, 20, layout, 0);
            assert_eq!(saved.is_ok(), crash_after == changes, "{crash_after}: {saved:?}");
            disk.reboot(&mut Dice::new(seed));
            let found = newest(&store);
            let whole = if saved.is_ok() { found == Some(20) } else { found >= Some(10) };
            assert!(whole, "{layout:?}, change {crash_after}, seed {seed}: {found:?}");
            // The job goes on from there, and another attempt at the same step is no problem.
            save(&*store, 20, 2, 1).unwrap();
            assert_eq!(newest(&store), Some(20));
        }
    }
}

#[test]
fn every_flipped_bit_and_every_cut_is_found_and_said() {
    let mut spoiled = 0;
    for layout in Layout::all(2) {
        let lengths = {
            let (disk, store) = simulated();
            save_two(&*store, layout);
            disk.files()
        };
        let folder = file(20, 0, "");
        for (path, bytes) in lengths.iter().filter(|(path, _)| path.starts_with(&folder)) {
            for byte in (0..*bytes).step_by(11) {
                let (disk, store) = simulated();
                save_two(&*store, layout);
                disk.flip(path, 8 * byte + byte % 8);
                let (checkpoint, rejected) = Checkpoint::newest(&store, &config()).unwrap();
                let checkpoint = checkpoint.unwrap();
                assert_right(&checkpoint);
                assert_eq!(checkpoint.progress().step, 10, "{}: byte {byte}", path.display());
                let said = rejected[0].error.to_string();
                assert!(said.contains("step-0000000020"), "{said}");
                spoiled += 1;
                disk.truncate(path, byte);
                assert_eq!(newest(&store), Some(10));
            }
        }
    }
    assert!(spoiled > 500, "{spoiled}");
}

/// Puts another manifest in the place of the newest, with a checksum that is right.
fn replace_manifest(store: &dyn Store, manifest: &Value) {
    let name = format!("{}/manifest.json", commit::folder_name(20, 0));
    store.put(&name, &[&seal(manifest)]).unwrap();
}

/// Every number and every string in a value.
fn leaves<'a>(value: &'a mut Value, found: &mut Vec<&'a mut Value>) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(|item| leaves(item, found)),
        Value::Object(fields) => fields.values_mut().for_each(|field| leaves(field, found)),
        leaf => found.push(leaf),
    }
}

fn hostile() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<u64>().prop_map(Value::from),
        (0_u64..200).prop_map(Value::from),
        Just(Value::from(u64::MAX)),
        any::<i64>().prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
        Just(Value::Null),
    ]
}

/// What happens to a stored file, or to two.
#[derive(Debug, Clone)]
pub(super) enum Damage {
    Flip {
        bit: prop::sample::Index,
    },
    Cut {
        at: prop::sample::Index,
    },
    Grow {
        by: Vec<u8>,
    },
    Overwrite {
        at: prop::sample::Index,
        with: Vec<u8>,
    },
    /// Two stretches of a file change places.
    Shuffle {
        one: prop::sample::Index,
        other: prop::sample::Index,
        bytes: usize,
    },
    /// Two files change places.
    Swap {
        with: prop::sample::Index,
    },
    Lose,
}

pub(super) fn damage() -> impl Strategy<Value = Damage> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        index().prop_map(|bit| Damage::Flip { bit }),
        index().prop_map(|at| Damage::Cut { at }),
        any::<Vec<u8>>().prop_map(|by| Damage::Grow { by }),
        (index(), any::<Vec<u8>>()).prop_map(|(at, with)| Damage::Overwrite { at, with }),
        (index(), index(), 1..200_usize).prop_map(|(one, other, bytes)| Damage::Shuffle {
            one,
            other,
            bytes
        }),
        index().prop_map(|with| Damage::Swap { with }),
        Just(Damage::Lose),
    ]
}

/// Every file with its contents.
fn files(store: &dyn Store) -> Vec<(String, Vec<u8>)> {
    let folders = store.list("").unwrap().into_iter();
    let names = folders.flat_map(|folder| {
        let names = store.list(&folder).unwrap();
        names.into_iter().map(move |name| format!("{folder}/{name}"))
    });
    let read = |name: String| {
        let bytes = store.get(&name, 0..store.length(&name).unwrap()).unwrap();
        (name, bytes)
    };
    names.map(read).collect()
}

impl Damage {
    fn happen_to(self, store: &dyn Store, file: prop::sample::Index) {
        let files = files(store);
        if files.is_empty() {
            return;
        }
        let (name, mut bytes) = files[file.index(files.len())].clone();
        let length = bytes.len().max(1);
        match self {
            Self::Flip { bit } if !bytes.is_empty() => {
                let bit = bit.index(8 * length);
                bytes[bit / 8] ^= 1 << (bit % 8);
            }
            Self::Flip { .. } => {}
            Self::Cut { at } => bytes.truncate(at.index(length)),
            Self::Grow { by } => bytes.extend(by),
            Self::Overwrite { at, with } => {
                let room = bytes.iter_mut().skip(at.index(length));
                room.zip(with).for_each(|(byte, with)| *byte = with);
            }
            Self::Shuffle { one, other, bytes: most } => {
                let (one, other) = (one.index(length), other.index(length));
                let (one, other) = (one.min(other), one.max(other));
                let count = most.min(other - one).min(bytes.len().saturating_sub(other));
                (0..count).for_each(|byte| bytes.swap(one + byte, other + byte));
            }
            Self::Swap { with } => {
                let (other, others) = files[with.index(files.len())].clone();
                store.put(&other, &[&bytes]).unwrap();
                bytes = others;
            }
            Self::Lose => return store.remove(&name).unwrap(),
        }
        store.put(&name, &[&bytes]).unwrap();
    }
}

/// The files of a checkpoint.
fn of(step: u64, files: &[(String, Vec<u8>)]) -> Vec<&(String, Vec<u8>)> {
    let folder = commit::folder_name(step, 0);
    files.iter().filter(|(name, _)| name.starts_with(&folder)).collect()
}

/// Two checkpoints are saved, and then files are damaged: what is found is right, to the last bit, and a
/// checkpoint that nothing happened to is found.
pub(super) fn what_was_saved_is_found_or_nothing(
    store: Arc<dyn Store>,
    layout: usize,
    happens: Vec<(Damage, prop::sample::Index)>,
) -> Result<(), TestCaseError> {
    save_two(&*store, Layout::all(2)[layout]);
    let before = files(&*store);
    for (damage, file) in happens {
        damage.happen_to(&*store, file);
    }
    let after = files(&*store);
    let found = newest(&store);
    let sound = [20, 10].into_iter().find(|step| of(*step, &before) == of(*step, &after));
    prop_assert!(found >= sound, "{found:?}, {sound:?}");
    Ok(())
}

proptest! {
    #[test]
    fn whatever_happens_to_files_nothing_is_loaded_that_was_not_saved(
        layout in 0_usize..3,
        happens in prop::collection::vec((damage(), any::<prop::sample::Index>()), 1..4),
    ) {
        what_was_saved_is_found_or_nothing(simulated().1, layout, happens)?;
    }

    #[test]
    fn a_hostile_manifest_is_refused_or_harmless(
        layout in 0_usize..3,
        choice: prop::sample::Index,
        with in hostile(),
    ) {
        let (_, store) = simulated();
        save_two(&*store, Layout::all(2)[layout]);
        let name = format!("{}/manifest.json", commit::folder_name(20, 0));
        let bytes = store.get(&name, 0..store.length(&name).unwrap()).unwrap();
        let mut manifest: Value = unseal(&bytes).unwrap();
        let mut found = Vec::new();
        leaves(&mut manifest, &mut found);
        *found.swap_remove(choice.index(found.len())) = with;
        replace_manifest(&*store, &manifest);
        let (checkpoint, _) = Checkpoint::newest(&store, &config()).unwrap();
        // Only what is no part of the state can be another: how far training had come.
        let checkpoint = checkpoint.unwrap();
        for block in config().blocks() {
            let mut found = vec![0.0; config().block_elements(block) as usize];
            checkpoint.read(block, Kind::Parameter, 0, &mut found).unwrap();
            let step = checkpoint.progress().step;
            prop_assert_eq!(&found, &values(step, block, Kind::Parameter, 0..found.len() as u64));
        }
    }
}
