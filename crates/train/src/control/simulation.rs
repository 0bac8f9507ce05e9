//! The code that recovers runs, under a clock, a network and a disk that do their worst.
//!
//! What decides is what ships: the [`Coordinator`](super::Coordinator), the copies in the memory of
//! ranks and the choice among them, and all of a checkpoint from its pieces to its manifest, on a
//! disk in memory. Ranks are played: they compute nothing but a number that tells the whole history
//! of a run. One seed decides everything: how many ranks on how many hosts, how long each word takes,
//! who dies, halts, is cut off or loses power in the middle of a write, and when.
//!
//! Safety is checked all the time, liveness once the faults stop.

mod coordination;
mod disk;
mod faults;
mod ranks;
mod world;

use units::Seconds;

use world::World;

/// What is wrong on purpose, to see that it is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// A generation begins before all have left the one before.
    MeetsWithoutAll,
    /// Words of processes that are no more are taken for those of the new one.
    HearsTheDead,
    /// Training goes on from the newest copy that anyone holds, whole or not.
    RecoversHalf,
    /// Files and names are not synced.
    SkipsSync,
    /// A checkpoint is called whole before every rank has written its part.
    CommitsAlone,
    /// What was trained on is skipped by one step when a run goes on.
    DropsTokens,
    /// Old checkpoints are removed before the new one is whole.
    RemovesEarly,
    /// A coordinator goes on deciding when it can no longer know that nobody has taken over.
    NeverStepsDown,
    /// Whoever takes over starts processes before those of the old coordinator must have ended.
    StartsAtOnce,
    /// Processes that were told to end are taken for ended.
    CountsOnKills,
    /// Parts of the state are taken for what they would be over as many ranks as there are now.
    MixesSpreads,
    /// Nobody calls the ranks together when there could be more.
    NeverGrows,
}

impl Bug {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::MeetsWithoutAll,
        Self::HearsTheDead,
        Self::RecoversHalf,
        Self::SkipsSync,
        Self::CommitsAlone,
        Self::DropsTokens,
        Self::RemovesEarly,
        Self::NeverStepsDown,
        Self::StartsAtOnce,
        Self::CountsOnKills,
        Self::MixesSpreads,
        Self::NeverGrows,
    ];

    /// As it is named on a command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::MeetsWithoutAll => "meets-without-all",
            Self::HearsTheDead => "hears-the-dead",
            Self::RecoversHalf => "recovers-half",
            Self::SkipsSync => "skips-sync",
            Self::CommitsAlone => "commits-alone",
            Self::DropsTokens => "drops-tokens",
            Self::RemovesEarly => "removes-early",
            Self::NeverStepsDown => "never-steps-down",
            Self::StartsAtOnce => "starts-at-once",
            Self::CountsOnKills => "counts-on-kills",
            Self::MixesSpreads => "mixes-spreads",
            Self::NeverGrows => "never-grows",
        }
    }
}

/// What a run went through, and came to its end nevertheless.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Survived {
    /// Ranks of the run.
    pub ranks: u32,
    /// Steps that were done.
    pub steps: u64,
    /// Faults of all kinds.
    pub faults: u64,
    /// How often ranks began anew.
    pub generations: u64,
    /// How often they were fewer than all.
    pub smaller: u64,
    /// How often the whole run was started anew, its launcher lost.
    pub launches: u64,
    /// How often another coordinator took over.
    pub takeovers: u64,
    /// Checkpoints that were whole.
    pub checkpoints: u64,
    /// Steps that were done again.
    pub redone: u64,
    /// How long it took, in virtual time.
    pub time: Seconds,
}

/// Runs what a seed says.
///
/// # Errors
/// What was violated, and when.
pub fn run(seed: u64, bug: Option<Bug>) -> Result<Survived, String> {
    World::new(seed, bug).run()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_schedule_of_faults_breaks_a_run() {
        let mut all = Survived::default();
        for seed in 0..1000 {
            let survived =
                run(seed, None).unwrap_or_else(|violation| panic!("{seed}: {violation}"));
            all.faults += survived.faults;
            all.launches += survived.launches;
            all.takeovers += survived.takeovers;
            all.checkpoints += survived.checkpoints;
            all.redone += survived.redone;
            all.smaller += survived.smaller;
        }
        // The schedules would show nothing if nothing happened in them.
        assert!(all.faults > 2000 && all.checkpoints > 1500, "{all:?}");
        assert!(all.launches > 40 && all.takeovers > 100 && all.smaller > 100, "{all:?}");
    }

    #[test]
    fn a_seed_is_one_run() {
        for seed in 0..50 {
            assert_eq!(run(seed, None), run(seed, None));
        }
    }

    #[test]
    fn planted_bugs_are_found() {
        for bug in Bug::ALL {
            let found = (0..1500).any(|seed| run(seed, Some(bug)).is_err());
            assert!(found, "{bug:?} goes unnoticed");
        }
    }
}
