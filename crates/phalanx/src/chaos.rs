//! Faults on demand: what a run survives can be seen on a real one.

use std::collections::BTreeSet;
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};
use checkpoint::store::simulated::Dice;
use rustix::process::{Signal, getpid, kill_process};
use units::Rank;

/// What is done to a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// Signal 9.
    Kill,
    /// SIGSTOP: it lives and does nothing.
    Stop,
    /// A bit of its state flips.
    Flip,
}

/// Faults to be injected, as `--chaos` names them.
#[derive(Debug, Clone, PartialEq)]
pub struct Chaos(Vec<Clause>);

#[derive(Debug, Clone, Copy, PartialEq)]
enum Clause {
    /// To a rank, when it has done a step.
    At { fault: Fault, rank: Rank, step: u64 },
    /// To random ranks, every so many steps on average.
    Every { fault: Fault, steps: u64, seed: u64 },
}

impl FromStr for Chaos {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let clause = |text: &str| clause(text).with_context(|| format!("--chaos: `{text}`"));
        text.split(',').map(clause).collect::<Result<_>>().map(Self)
    }
}

fn clause(text: &str) -> Result<Clause> {
    let number = |text: &str| text.parse::<u64>().with_context(|| format!("`{text}` is no number"));
    if let Some((name, rest)) = text.split_once('~') {
        let (steps, seed) = rest.split_once('#').unwrap_or((rest, "0"));
        let (fault, steps, seed) = (fault(name)?, number(steps)?, number(seed)?);
        ensure!(steps > 0, "0 steps between faults; name at least 1");
        return Ok(Clause::Every { fault, steps, seed });
    }
    let parts = text.split_once(':').and_then(|(name, rest)| Some((name, rest.split_once('@')?)));
    let Some((name, (rank, step))) = parts else {
        bail!("write FAULT:RANK@STEP, as in kill:2@7, or FAULT~STEPS#SEED, as in kill~50#1");
    };
    let (rank, step) = (Rank(u32::try_from(number(rank)?)?), number(step)?);
    Ok(Clause::At { fault: fault(name)?, rank, step })
}

fn fault(name: &str) -> Result<Fault> {
    match name {
        "kill" => Ok(Fault::Kill),
        "stop" => Ok(Fault::Stop),
        "flip" => Ok(Fault::Flip),
        other => bail!("there is no fault `{other}`; there are `kill`, `stop` and `flip`"),
    }
}

impl Chaos {
    /// The faults of a rank in a run of so many steps and ranks, in order.
    fn of(&self, rank: Rank, ranks: u32, steps: u64) -> Vec<(u64, Fault)> {
        let mut faults = Vec::new();
        for clause in &self.0 {
            match *clause {
                Clause::At { fault, rank: of, step } => {
                    faults.extend((of == rank).then_some((step, fault)));
                }
                Clause::Every { fault, steps: every, seed } => {
                    let mut dice = Dice::new(seed);
                    for step in 1..=steps {
                        let (hit, whom) = (dice.one_in(every), dice.below(ranks.into()));
                        faults.extend((hit && whom == u64::from(rank.0)).then_some((step, fault)));
                    }
                }
            }
        }
        faults.sort_by_key(|(step, _)| *step);
        faults
    }

    /// After which steps a bit of a rank's state flips.
    pub fn flips(&self, rank: Rank, ranks: u32, steps: u64) -> BTreeSet<u64> {
        let flips = self.of(rank, ranks, steps).into_iter();
        flips.filter(|(_, fault)| *fault == Fault::Flip).map(|(step, _)| step).collect()
    }

    /// Does to this process what is its turn, when it has done `step` of `steps` steps; it is the
    /// `incarnation`th of its rank, so that a step that is done again is not hit again.
    pub fn strike(&self, rank: Rank, ranks: u32, incarnation: u64, (step, steps): (u64, u64)) {
        let fatal =
            self.of(rank, ranks, steps).into_iter().filter(|(_, fault)| *fault != Fault::Flip);
        // Each costs the rank a process.
        let fault = fatal.into_iter().nth(incarnation as usize);
        let signal = match fault {
            Some((at, Fault::Kill)) if at == step => Signal::KILL,
            Some((at, Fault::Stop)) if at == step => Signal::STOP,
            _ => return,
        };
        // Nothing keeps a process from this.
        let _ = kill_process(getpid(), signal);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_read_and_fall_due_one_process_at_a_time() {
        let chaos: Chaos = "kill:2@7,stop:2@3,kill:1@9".parse().unwrap();
        assert_eq!(chaos.of(Rank(2), 4, 20), [(3, Fault::Stop), (7, Fault::Kill)]);
        assert_eq!(chaos.of(Rank(0), 4, 20), []);
        let random: Chaos = "kill~10#5".parse().unwrap();
        let all: Vec<_> = (0..4).flat_map(|rank| random.of(Rank(rank), 4, 1000)).collect();
        assert!((70..130).contains(&all.len()), "{}", all.len());
    }

    #[test]
    fn what_is_no_fault_is_said() {
        let refused = |text: &str| format!("{:#}", text.parse::<Chaos>().unwrap_err());
        assert!(
            refused("drown:1@2").contains("no fault `drown`; there are `kill`, `stop` and `flip`")
        );
        assert!(refused("kill").contains("write FAULT:RANK@STEP, as in kill:2@7"));
        assert!(refused("kill:x@3").contains("`x` is no number"));
        assert!(refused("kill~0").contains("at least 1"));
    }
}
