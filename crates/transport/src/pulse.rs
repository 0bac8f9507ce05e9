//! Whether peers are alive: every rank says so to every other, with what it is doing, every so often.
//!
//! Time is counted in own beats: a process that was itself stopped for a while blames nobody.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use serde::Serialize;
use units::Rank;

use crate::Limits;
use crate::frame::{Header, Key, Kind};

/// Beats are rarer when there are more peers than so many, so that they cost the same.
const PEERS_AT_FULL_RATE: u32 = 256;

/// How many of its beats a peer may miss before it is silent, however long the limit.
const FEWEST_BEATS: u32 = 3;

/// What a rank was doing when it was last heard of: the oldest of its operations under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Doing {
    /// Nothing with other ranks, after so many operations.
    Nothing {
        /// How many it had posted.
        posted: u64,
    },
    /// A collective.
    Collective {
        /// The group's number.
        group: u64,
        /// The operation's number in the order of posting on its group, from 0.
        sequence: u64,
    },
    /// A collective that is waited for at once, in memory that ranks share.
    AtOnce {
        /// The group's number.
        group: u64,
        /// The operation's number among those of its group that are waited for so, from 0.
        sequence: u64,
    },
    /// A send to a rank or a receive from one.
    PointToPoint {
        /// The group's number.
        group: u64,
        /// The operation's number among those of the pair of ranks, from 0.
        sequence: u64,
    },
}

impl Doing {
    pub(crate) fn of(key: Key) -> Self {
        let Key { kind, group, sequence } = key;
        match kind {
            Kind::PointToPoint => Self::PointToPoint { group, sequence },
            _ => Self::Collective { group, sequence },
        }
    }

    /// The frame that tells a peer.
    pub(crate) fn header(self) -> Header {
        let (chunk, group, sequence) = match self {
            Self::Nothing { posted } => (0, 0, posted),
            Self::Collective { group, sequence } => (1, group, sequence),
            Self::PointToPoint { group, sequence } => (2, group, sequence),
            Self::AtOnce { group, sequence } => (3, group, sequence),
        };
        Header { chunk, ..Header::notice(Kind::Heartbeat, group, sequence) }
    }

    /// What a peer's frame tells; `None` if it is of a kind that is unknown here.
    pub(crate) fn from_header(header: Header) -> Option<Self> {
        let Key { group, sequence, .. } = header.key;
        match header.chunk {
            0 => Some(Self::Nothing { posted: sequence }),
            1 => Some(Self::Collective { group, sequence }),
            2 => Some(Self::PointToPoint { group, sequence }),
            3 => Some(Self::AtOnce { group, sequence }),
            _ => None,
        }
    }
}

impl fmt::Display for Doing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing { posted } => write!(f, "in nothing, after {posted} operations"),
            Self::Collective { group, sequence } => {
                write!(f, "in number {sequence} of group {group}")
            }
            Self::AtOnce { group, sequence } => {
                write!(f, "at once in number {sequence} of group {group}")
            }
            Self::PointToPoint { group, sequence } => {
                write!(f, "in transfer {sequence} between two ranks of group {group}")
            }
        }
    }
}

/// What the members of a group were doing when they were last heard of.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LastHeard(pub Vec<(Rank, Doing)>);

impl fmt::Display for LastHeard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut ranks: BTreeMap<Doing, Vec<Rank>> = BTreeMap::new();
        self.0.iter().for_each(|(rank, doing)| ranks.entry(*doing).or_default().push(*rank));
        let mut separator = "; last heard: ";
        for (doing, ranks) in ranks {
            write!(f, "{separator}{} {doing}", Named(&ranks))?;
            separator = "; ";
        }
        Ok(())
    }
}

/// Ranks in words; of many, the first.
pub(crate) struct Named<'a>(pub &'a [Rank]);

impl fmt::Display for Named<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 8;
        let numbers: Vec<_> = self.0.iter().take(SHOWN).map(|rank| rank.0.to_string()).collect();
        let word = if self.0.len() == 1 { "rank" } else { "ranks" };
        write!(f, "{word} {}", numbers.join(", "))?;
        match self.0.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

/// When to beat, and how many beats of silence are too many.
pub(crate) struct Metronome {
    interval: Duration,
    silence: Duration,
    next: Instant,
}

impl Metronome {
    pub(crate) fn new(limits: &Limits, ranks: u32) -> Self {
        let interval = limits.heartbeat * ranks.div_ceil(PEERS_AT_FULL_RATE).max(1);
        let silence = limits.silence.max(interval * FEWEST_BEATS);
        Self { interval, silence, next: Instant::now() + interval }
    }

    /// Whether it is time to beat.
    pub(crate) fn beats(&mut self) -> bool {
        let now = Instant::now();
        let due = now >= self.next;
        if due {
            self.next = now + self.interval;
        }
        due
    }

    /// How long it is until the next beat.
    pub(crate) fn pause(&self) -> Duration {
        self.next.saturating_duration_since(Instant::now())
    }

    /// How long a peer may be silent.
    pub(crate) fn silence(&self) -> Duration {
        self.silence
    }
}

/// A peer's life signs.
#[derive(Debug, Default)]
pub(crate) struct Pulse {
    /// Something has come since the last own beat.
    pub heard: bool,
    /// How many own beats ago something came.
    pub missed: u32,
    /// What the peer said that it was doing.
    pub doing: Option<Doing>,
}

impl Pulse {
    /// Counts an own beat; `held` while what the peer sent is left unread on purpose.
    pub(crate) fn beat(&mut self, held: bool) {
        let alive = std::mem::take(&mut self.heard) || held;
        self.missed = if alive { 0 } else { self.missed + 1 };
    }

    /// Whether the peer has been silent for too long.
    pub(crate) fn is_silent(&self, metronome: &Metronome) -> bool {
        metronome.interval * self.missed >= metronome.silence
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_silent_after_so_many_beats_unless_it_is_held_off() {
        let limits = Limits { heartbeat: Duration::from_secs(1), ..Limits::default() };
        let metronome = Metronome::new(&limits, 2);
        let mut pulse = Pulse::default();
        let beats_until_silent = |pulse: &mut Pulse| {
            let silent = |_: &u32| {
                pulse.beat(false);
                pulse.is_silent(&metronome)
            };
            (1..).find(silent)
        };
        assert_eq!(beats_until_silent(&mut pulse), Some(10), "10 s of a second each");
        pulse.beat(true);
        assert!(!pulse.is_silent(&metronome));
        pulse.heard = true;
        pulse.beat(false);
        assert_eq!(beats_until_silent(&mut pulse), Some(10));
    }

    #[test]
    fn many_peers_are_beaten_to_less_often() {
        let metronome = |ranks| Metronome::new(&Limits::default(), ranks);
        assert_eq!([2, 256, 1024, 8192].map(|n| metronome(n).interval.as_secs()), [1, 1, 4, 32]);
        assert_eq!([2, 1024, 8192].map(|n| metronome(n).silence.as_secs()), [10, 12, 96]);
    }

    #[test]
    fn what_ranks_were_doing_is_told_once_for_all_that_did_the_same() {
        let (waits, idle) =
            (Doing::Collective { group: 7, sequence: 42 }, Doing::Nothing { posted: 9 });
        let heard =
            (0..12).map(|rank| (Rank(rank), if rank == 3 { idle } else { waits })).collect();
        assert_eq!(
            LastHeard(heard).to_string(),
            "; last heard: rank 3 in nothing, after 9 operations; ranks 0, 1, 2, 4, 5, 6, 7, 8 and 3 \
             more in number 42 of group 7"
        );
        assert_eq!(LastHeard::default().to_string(), "");
    }
}
