//! `phalanx launch`: what a cluster's own tools need to start a job, from its job file.

mod kubernetes;
mod script;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde::Deserialize;

use crate::JobArgs;
use crate::device::DeviceName;
use crate::job::{Draft, Job};
use crate::output::print_text;

/// How a job is started on a cluster: `[launch]` of the job file, or options of the same names.
#[derive(Debug, Clone, Default, Args, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LaunchSection {
    /// Ranks on each host; all on one unless given
    #[arg(long, value_name = "N")]
    pub ranks_per_host: Option<u32>,
    /// Longest time, as Slurm writes it: minutes, HH:MM:SS or D-HH:MM:SS
    #[arg(long)]
    pub time: Option<String>,
    /// Who pays, in Slurm's accounts
    #[arg(long)]
    pub account: Option<String>,
    /// Slurm's partition
    #[arg(long)]
    pub partition: Option<String>,
    /// The container image for Kubernetes, made from Containerfile
    #[arg(long)]
    pub image: Option<String>,
    /// The persistent volume claim for Kubernetes that holds text and runs; the job's paths are below it
    #[arg(long)]
    pub claim: Option<String>,
}

impl LaunchSection {
    /// What is given here, else what is given there.
    fn or(self, other: Self) -> Self {
        Self {
            ranks_per_host: self.ranks_per_host.or(other.ranks_per_host),
            time: self.time.or(other.time),
            account: self.account.or(other.account),
            partition: self.partition.or(other.partition),
            image: self.image.or(other.image),
            claim: self.claim.or(other.claim),
        }
    }
}

/// For which launchers, and where to.
#[derive(Debug, Args)]
pub struct LaunchOptions {
    /// A script for sbatch
    #[arg(long)]
    slurm: bool,
    /// A JobSet, and a TrainJob for Kubeflow
    #[arg(long)]
    kubernetes: bool,
    /// A script that calls mpirun (Open MPI)
    #[arg(long)]
    mpirun: bool,
    /// A script that calls torchrun
    #[arg(long)]
    torchrun: bool,
    /// Write files into this folder instead of printing them
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    #[command(flatten)]
    section: LaunchSection,
}

/// A job and how it lies on hosts: what all launchers are told.
struct Plan<'a> {
    job: &'a Job,
    /// The job file's path, what stands in it, and the keys that replace some of it.
    path: PathBuf,
    text: String,
    set: &'a [String],
    section: LaunchSection,
    ranks_per_host: u32,
    hosts: u32,
}

/// A file for a launcher: its name, and what stands in it.
type File = (&'static str, String);

/// Prints or writes what the chosen launchers need.
pub fn launch(args: &JobArgs, options: &LaunchOptions) -> Result<()> {
    let draft = args.draft()?;
    let section = options.section.clone().or(draft.job().launch.clone());
    let job = trainable(draft)?;
    let plan = Plan::new(&job, args, section)?;
    let files = plan.files(options)?;
    ensure!(
        !files.is_empty(),
        "say for which launcher: --slurm, --kubernetes, --mpirun or --torchrun"
    );
    let Some(folder) = &options.out else {
        if args.json {
            let object: serde_json::Map<_, _> =
                files.into_iter().map(|(name, text)| (name.to_owned(), text.into())).collect();
            println!("{}", serde_json::to_string_pretty(&object)?);
            return Ok(());
        }
        if let [(_, text)] = &files[..] {
            return print_text(text);
        }
        for (name, text) in files {
            println!("# {name}\n{text}");
        }
        return Ok(());
    };
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    for (name, text) in files {
        let path = folder.join(name);
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        println!("{}", path.display());
    }
    Ok(())
}

/// The job, if it can be trained: a mistake is better found here than in a queue.
fn trainable(draft: Draft) -> Result<Job> {
    draft.job().cluster.require_local()?;
    let layout = draft.simplest()?;
    layout.require_runnable()?;
    let job = draft.laid_out(layout);
    job.local_precision()?;
    ensure!(!job.data.text.is_empty(), "[data] text is missing: there is nothing to train on");
    Ok(job)
}

impl<'a> Plan<'a> {
    fn new(job: &'a Job, args: &'a JobArgs, section: LaunchSection) -> Result<Self> {
        let ranks = job.cluster.accelerators;
        let ranks_per_host = section.ranks_per_host.unwrap_or(ranks);
        ensure!(
            ranks_per_host > 0 && ranks.is_multiple_of(ranks_per_host),
            "[launch] ranks_per_host = {ranks_per_host} does not divide [cluster] accelerators = {ranks}"
        );
        if let Some(time) = section.time.as_ref().filter(|time| !is_time(time)) {
            bail!("[launch] time = \"{time}\" is not minutes, HH:MM:SS or D-HH:MM:SS");
        }
        let path = std::fs::canonicalize(&args.job)
            .with_context(|| format!("cannot find {}", args.job.display()))?;
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let hosts = ranks / ranks_per_host;
        Ok(Self { job, path, text, set: &args.set, section, ranks_per_host, hosts })
    }

    fn files(&self, options: &LaunchOptions) -> Result<Vec<File>> {
        let mut files = Vec::new();
        let mut when = |wanted: bool, name, text: fn(&Self) -> String| {
            files.extend(wanted.then(|| (name, text(self))));
        };
        when(options.slurm, "job.sbatch", script::slurm);
        when(options.mpirun, "mpirun.sh", script::mpirun);
        when(options.torchrun, "torchrun.sh", script::torchrun);
        if options.kubernetes {
            let image = self.section.image.as_deref();
            let image = image.context("[launch] image is missing: Kubernetes starts containers")?;
            files.push(("jobset.yaml", kubernetes::jobset(self, image)));
            files.push(("trainjob.yaml", kubernetes::trainjob(self, image)));
        }
        Ok(files)
    }

    /// The command of one rank, for a shell. `job` is the job file where it runs.
    fn command(&self, job: &str) -> String {
        let set = self.set.iter().map(|setting| format!(" --set {}", quoted(setting)));
        format!("\"$phalanx\" train {}{}", quoted(job), set.collect::<String>())
    }

    fn uses_gpus(&self) -> bool {
        self.job.cluster.device != DeviceName::Cpu
    }

    /// Lines that make `resume` an option of `train`, when an earlier run did not finish.
    fn resume(&self) -> String {
        let name = format!("{}-", self.job.name);
        let runs = quoted(&self.job.run.folder.join(name).to_string_lossy());
        // Checkpoints that are kept elsewhere are found by the run's name.
        let saved = match &self.job.checkpoint.folder {
            None => "[ -n \"$(ls -A \"$run/checkpoints\" 2>/dev/null)\" ] || continue\n    ",
            Some(_) => "",
        };
        format!(
            "for run in $(ls -rd {runs}[0-9]* 2>/dev/null); do\n    \
             [ -e \"$run/summary.json\" ] && break\n    \
             {saved}resume=(--resume \"$run\")\n    \
             break\n\
             done\n"
        )
    }
}

/// A word of a shell.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Minutes, HH:MM:SS or D-HH:MM:SS.
fn is_time(text: &str) -> bool {
    let number = |part: &str| !part.is_empty() && part.chars().all(|c| c.is_ascii_digit());
    let (days, rest) = text.split_once('-').unwrap_or(("0", text));
    number(days) && rest.split(':').count() <= 3 && rest.split(':').all(number)
}

/// A name that Kubernetes takes (RFC 1123): small letters, digits and dashes.
fn label(name: &str) -> String {
    let small = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let name: String = name.chars().map(small).take(40).collect();
    format!("phalanx-{}", name.trim_matches('-'))
}

/// Where a job file is, for the comment at the head of what was made from it.
fn made_from(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    format!("# Made from {name} by `phalanx launch`.\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_shell_stay_one_word() {
        assert_eq!(quoted("training.steps=20"), "training.steps=20");
        assert_eq!(quoted("it's here"), r"'it'\''s here'");
        assert_eq!(quoted(""), "''");
    }

    #[test]
    fn times_are_as_slurm_writes_them() {
        for right in ["90", "12:00:00", "1-12:00:00", "30:00"] {
            assert!(is_time(right), "{right}");
        }
        for wrong in ["", "an hour", "1h", "1-", "1:2:3:4"] {
            assert!(!is_time(wrong), "{wrong}");
        }
    }

    #[test]
    fn names_are_labels() {
        assert_eq!(label("Llama 3.1_405B"), "phalanx-llama-3-1-405b");
    }
}
