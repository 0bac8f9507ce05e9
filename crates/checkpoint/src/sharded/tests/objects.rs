//! Checkpoints in a service of objects, here in memory.

use super::damage::{damage, what_was_saved_is_found_or_nothing};
use super::*;
use crate::store::Objects;

/// A store of objects.
fn objects() -> Arc<dyn Store> {
    let service = Arc::new(object_store::memory::InMemory::new());
    Arc::new(Objects::new(service, "runs/job-001".into()).unwrap())
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

proptest! {
    #[test]
    fn whatever_happens_to_objects_nothing_is_loaded_that_was_not_saved(
        layout in 0_usize..3,
        happens in prop::collection::vec((damage(), any::<prop::sample::Index>()), 1..4),
    ) {
        what_was_saved_is_found_or_nothing(objects(), layout, happens)?;
    }
}
