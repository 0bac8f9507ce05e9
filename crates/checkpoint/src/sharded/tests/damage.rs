//! Crashes, damage and malice: what is loaded is what was saved, or nothing.

use serde_json::Value;

use super::super::manifest::seal;
use super::*;
use crate::store::Objects;

/// A store of objects.
fn objects() -> Arc<dyn Store> {
    let service = Arc::new(object_store::memory::InMemory::new());
    Arc::new(Objects::new(service, "runs/job-001".into()).unwrap())
}

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

/// A service that is lost after some changes. Of the last nobody hears whether it was made.
struct Lost {
    service: Arc<dyn Store>,
    left: Mutex<u64>,
    last_is_made: bool,
}

impl Lost {
    fn change(&self, make: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut left = self.left.lock().unwrap();
        match *left {
            0 => return Err(io::ErrorKind::ConnectionReset.into()),
            1 if !self.last_is_made => {}
            _ => make()?,
        }
        *left -= 1;
        if *left == 0 { Err(io::ErrorKind::ConnectionReset.into()) } else { Ok(()) }
    }
}

impl Store for Lost {
    fn put(&self, name: &str, pieces: &[&[u8]]) -> io::Result<()> {
        self.change(|| self.service.put(name, pieces))
    }

    fn get(&self, name: &str, range: Range<u64>) -> io::Result<Vec<u8>> {
        self.service.get(name, range)
    }

    fn length(&self, name: &str) -> io::Result<u64> {
        self.service.length(name)
    }

    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        self.service.list(folder)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.change(|| self.service.remove(name))
    }

    fn remove_folder(&self, folder: &str) -> io::Result<()> {
        self.service.remove_folder(folder)
    }

    fn place(&self, name: &str) -> String {
        self.service.place(name)
    }
}

#[test]
fn a_service_that_is_lost_at_any_request_leaves_a_whole_checkpoint() {
    for (layout, last_is_made) in Layout::all(3).into_iter().flat_map(|l| [(l, false), (l, true)]) {
        for changes in 1.. {
            let service = objects();
            save(&*service, 10, 2, 0).unwrap();
            let left = Mutex::new(changes);
            let lost = Lost { service: Arc::clone(&service), left, last_is_made };
            let saved = save(&lost, 20, layout, 0);
            let found = newest(&service);
            let whole = if saved.is_ok() { found == Some(20) } else { found >= Some(10) };
            assert!(whole, "{layout:?}, request {changes}: {found:?}");
            save(&*service, 20, 2, 1).unwrap();
            assert_eq!(newest(&service), Some(20));
            if saved.is_ok() {
                assert!(changes > 10, "{changes}");
                break;
            }
        }
    }
}

#[test]
fn objects_keep_checkpoints_like_folders() {
    let store = objects();
    assert_eq!(newest(&store), None);
    save(&*store, 10, 3, 0).unwrap();
    save(&*store, 20, 2, 0).unwrap();
    assert_eq!(newest(&store), Some(20));
    assert_eq!(Checkpoint::names(&*store).unwrap().len(), 1);
    let name = format!("{}/{}", commit::folder_name(20, 0), file_name(Rank(1)));
    let length = store.length(&name).unwrap();
    assert_eq!(store.get(&name, 1..length + 1).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    store.put(&name, &[&vec![0; length as usize]]).unwrap();
    assert_eq!(newest(&store), None);
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
enum Damage {
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

fn damage() -> impl Strategy<Value = Damage> {
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

proptest! {
    #[test]
    fn whatever_happens_to_files_nothing_is_loaded_that_was_not_saved(
        in_objects: bool,
        layout in 0_usize..3,
        happens in prop::collection::vec((damage(), any::<prop::sample::Index>()), 1..4),
    ) {
        let store = if in_objects { objects() } else { simulated().1 };
        save_two(&*store, Layout::all(2)[layout]);
        let before = files(&*store);
        for (damage, file) in happens {
            damage.happen_to(&*store, file);
        }
        let after = files(&*store);
        // What is found is right, to the last bit, and a checkpoint that nothing happened to is found.
        let found = newest(&store);
        let sound = [20, 10].into_iter().find(|step| of(*step, &before) == of(*step, &after));
        prop_assert!(found >= sound, "{found:?}, {sound:?}");
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
