//! What can go wrong while training.

use std::path::PathBuf;

use thiserror::Error;
use units::Rank;

/// An error of the environment, the network, the data or the disk.
#[derive(Debug, Error)]
pub enum Error {
    /// The variables that say which rank this is contradict each other.
    #[error("{variable}: {reason}")]
    Identity {
        /// The variable.
        variable: &'static str,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// Communication failed.
    #[error("{rank}: {source}")]
    Communication {
        /// Who noticed.
        rank: Rank,
        /// What happened.
        source: transport::Error,
    },
    /// The data cannot be read.
    #[error(transparent)]
    Data(#[from] data::Error),
    /// A model cannot be read or written.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    /// A rank has other data than rank 0.
    #[error(
        "{rank} reads other tokens than rank 0: `{path}` differs; every host needs the same text and tokenizer"
    )]
    OtherData {
        /// Which rank.
        rank: Rank,
        /// Its token file.
        path: PathBuf,
    },
    /// The loss is no longer a number.
    #[error(
        "step {step}: the loss is {loss}, the gradient norm {gradient_norm}; stopped before the update is kept. Lower [training] learning_rate or raise warmup_steps"
    )]
    Diverged {
        /// Which step.
        step: u64,
        /// The loss.
        loss: f64,
        /// The global gradient norm.
        gradient_norm: f64,
    },
    /// The loss is no longer a number or the gradient is too large, and the job says to go back.
    #[error("step {step}: the gradient norm is {gradient_norm:.3}, over {limit:.3}")]
    Spiked {
        /// Which step.
        step: u64,
        /// The global gradient norm.
        gradient_norm: f64,
        /// The largest that would have been right.
        limit: f64,
    },
    /// Ranks that should hold the same do not.
    #[error(
        "step {step}: what {} is not what the ranks hold that should have the same: a bit flipped, in memory or on its way. Their states were last the same after step {trusted}", held_by(.ranks)
    )]
    Drifted {
        /// After which step it was seen.
        step: u64,
        /// The ranks that differ from most; all of them where there is no majority.
        ranks: Vec<Rank>,
        /// The last step after which all was well.
        trusted: u64,
    },
    /// The run was asked to stop, and did.
    #[error("stopped after step {step}, as asked; {saved}")]
    Stopped {
        /// Steps done.
        step: u64,
        /// Whether the state was saved.
        saved: String,
    },
    /// No checkpoint could be read.
    #[error("{place} has no checkpoint to go on from{}", listed(.rejected))]
    NothingToResume {
        /// Where it was looked for.
        place: String,
        /// What is wrong with each that is there, newest first.
        rejected: Vec<String>,
    },
    /// A checkpoint of a run that saw other data.
    #[error(
        "{place} is of a run on other {what} ({theirs}, the job has {ours}); go on with the job it was made by"
    )]
    OtherRun {
        /// Which checkpoint.
        place: String,
        /// What differs.
        what: &'static str,
        /// What the checkpoint has.
        theirs: u64,
        /// What the job has.
        ours: u64,
    },
    /// The ranks were called together, since there could be more of them.
    #[error("after step {step} the ranks were called together")]
    Called {
        /// After which step.
        step: u64,
    },
    /// Somebody coordinates the run already.
    #[error(
        "{place}: somebody coordinates a run there, in term {term}; stand by for it with --standby, or name another register"
    )]
    Coordinated {
        /// The register.
        place: String,
        /// Its newest term.
        term: u64,
    },
    /// Another coordinator has taken over.
    #[error("{place}: another launcher has taken this run over from this one, of term {term}")]
    Superseded {
        /// The register.
        place: String,
        /// The term that is over.
        term: u64,
    },
    /// Whoever coordinates the run cannot be joined from this host, or says that the run failed.
    #[error("{reason}")]
    Host {
        /// What is known of it.
        reason: String,
    },
    /// A rank was lost again and again, with no step done in between.
    #[error(
        "{rank}: {reason}. Ranks were lost {times} times with no step done in between: do not start the run again as it is"
    )]
    CrashLoop {
        /// Which rank, the last time.
        rank: Rank,
        /// How many times.
        times: u32,
        /// What is known of the last time.
        reason: String,
    },
    /// A rank's process could not be started or ended badly.
    #[error("{rank}: {reason}")]
    Process {
        /// Which rank.
        rank: Rank,
        /// What happened, with its own last words.
        reason: String,
        /// Its exit code, if it had one.
        code: Option<i32>,
    },
}

/// Ranks, and that they hold something.
fn held_by(ranks: &[Rank]) -> String {
    let names: Vec<String> = ranks.iter().map(ToString::to_string).collect();
    let holds = if ranks.len() == 1 { "holds" } else { "hold" };
    format!("{} {holds}", names.join(" and "))
}

/// Reasons, each on a line of its own.
fn listed(reasons: &[String]) -> String {
    reasons.iter().map(|reason| format!("\n  {reason}")).collect()
}
