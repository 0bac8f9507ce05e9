//! By which algorithms a run's collectives go: by rings, or as was measured, once per host and arrangement.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use program::{Choice, Choices};
use serde::{Deserialize, Serialize};
use transport::Communicator;
use units::Bytes;

use crate::job::Job;
use crate::measured::{Machine, cores};

/// How it is decided.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Collectives {
    /// A ring inside each host, and one between hosts.
    #[default]
    Rings,
    /// By what is fastest between the ranks at hand.
    Measured,
}

/// What earlier runs on this host have found out: a file of the user's cache, in which each arrangement of ranks has
/// an entry.
pub struct Cache {
    path: PathBuf,
    arrangement: String,
}

impl Cache {
    /// The entry for a job's ranks as they have met; `None` where the user has no home.
    pub fn new(job: &Job, communicator: &Communicator) -> Option<Self> {
        let environment = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let home = || environment("HOME").map(|home| Path::new(&home).join(".cache"));
        let folder = environment("XDG_CACHE_HOME").map(PathBuf::from).or_else(home)?;
        let transport = environment("PHALANX_TRANSPORT").unwrap_or_default();
        let arrangement = format!(
            "{} {}, {} cores, {} threads a rank, hosts {:?}, {:?}",
            env!("CARGO_PKG_VERSION"),
            transport.display(),
            cores(),
            job.cluster.threads_per_rank,
            communicator.hosts(),
            job.layout.mesh,
        );
        Some(Self { path: folder.join("phalanx/collectives.json"), arrangement })
    }

    /// What is known; nothing where the file cannot be read, which is then made anew.
    pub fn read(&self) -> Choices {
        self.entries().remove(&self.arrangement).unwrap_or_default()
    }

    /// Keeps what is known now, beside what other programs have found out.
    pub fn write(&self, choices: &Choices) -> io::Result<()> {
        let mut entries = self.entries();
        let entry = entries.entry(self.arrangement.clone()).or_default();
        let is_new = |old: &Choice| choices.0.iter().all(|new| new.occasion != old.occasion);
        entry.0.retain(is_new);
        entry.0.extend(choices.0.iter().cloned());
        let folder = self.path.parent().ok_or(io::ErrorKind::InvalidInput)?;
        fs::create_dir_all(folder)?;
        // Others may read or write it meanwhile: they find one of the two, whole.
        let draft = folder.join(format!(".collectives-{}", std::process::id()));
        fs::File::create(&draft)?.write_all(&serde_json::to_vec_pretty(&entries)?)?;
        fs::rename(draft, &self.path)
    }

    fn entries(&self) -> BTreeMap<String, Choices> {
        let text = fs::read(&self.path).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }
}

/// What an earlier run went by.
pub fn of_run(folder: &Path) -> Option<Choices> {
    let text = fs::read(folder.join("machine.json")).ok()?;
    let machine: Machine = serde_json::from_slice(&text).ok()?;
    Some(machine.profile.choices).filter(|choices| !choices.0.is_empty())
}

/// A line for each choice that is not what would be done without.
pub fn describe(choices: &Choices) -> impl Iterator<Item = String> + '_ {
    let better = choices.0.iter().filter(|choice| choice.time < choice.otherwise);
    better.map(|Choice { occasion, algorithm, pieces, time, otherwise }| {
        let pieces = if *pieces > 1 { format!(" in {pieces} pieces") } else { String::new() };
        format!(
            "{} of {} over {}: {algorithm}{pieces}, {time} beside {otherwise}",
            occasion.kind,
            Bytes(4 * occasion.elements),
            occasion.axis,
        )
    })
}

#[cfg(test)]
mod tests {
    use collective::{Algorithm, Kind};
    use program::{Axis, Occasion};
    use units::Seconds;

    use super::*;

    fn choices() -> Choices {
        let occasion = |kind| Occasion { axis: Axis::Data, kind, ranks: 4, elements: 1 << 20 };
        let choice = |kind, algorithm, pieces, time| Choice {
            occasion: occasion(kind),
            algorithm,
            pieces,
            time: Seconds(time),
            otherwise: Seconds(0.002),
        };
        Choices(vec![
            choice(Kind::AllReduce, Algorithm::DoubleTree, 4, 0.001),
            choice(Kind::AllGather, Algorithm::Ring, 1, 0.002),
        ])
    }

    #[test]
    fn only_what_is_gained_is_told() {
        let told: Vec<_> = describe(&choices()).collect();
        assert_eq!(
            told,
            ["all-reduce of 4.00 MiB over data: double-tree in 4 pieces, 1.00 ms beside 2.00 ms"]
        );
    }

    #[test]
    fn each_arrangement_has_its_own_entry_and_a_broken_file_is_made_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("phalanx/collectives.json");
        let of = |arrangement: &str| Cache { path: path.clone(), arrangement: arrangement.into() };
        assert_eq!(of("a").read(), Choices::default());
        of("a").write(&choices()).unwrap();
        assert_eq!((of("a").read(), of("b").read()), (choices(), Choices::default()));
        fs::write(&path, "no JSON").unwrap();
        assert_eq!(of("a").read(), Choices::default());
        of("b").write(&choices()).unwrap();
        assert_eq!(of("b").read(), choices());
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }
}
