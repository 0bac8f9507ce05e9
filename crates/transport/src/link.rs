//! How fast links are, so that one that silently became slow is named: a rank compares what it moves to and from
//! its peers, those of its own host and those of others apart.
//!
//! A frame counts from the moment its first byte could move to its last, so that a rank that computes is no slow
//! link, and one behind which data pile up is; of many frames the median, as any may have waited for a core.

use std::fmt;
use std::time::Instant;

use serde::Serialize;
use units::{Bytes, BytesPerSecond, Rank, Seconds};

/// How many times slower than the median of its like a link is that is named.
const FACTOR: f64 = 4.0;

/// Over how many heartbeats links are compared.
pub(crate) const WINDOW_BEATS: u32 = 10;

/// The smallest frame that counts: smaller ones tell of latency, and of what else the ranks do.
const FRAME: Bytes = Bytes(64 << 10);

/// What is faster tells of the core that a thread had or waited for, not of the link.
const LEAST: Seconds = Seconds(100e-6);

/// How many frames must have gone over a link for it to be judged, and how many are looked at.
const FRAMES: std::ops::RangeInclusive<usize> = 8..=256;

/// A link that is much slower than the others of its rank.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SlowLink {
    /// The rank at the other end.
    pub peer: Rank,
    /// Its host, where that is known.
    pub host: Option<String>,
    /// Whether it is slow towards the peer; else from it.
    pub towards: bool,
    /// How fast frames went over it.
    pub rate: BytesPerSecond,
    /// The median of the links like it.
    pub median: BytesPerSecond,
}

impl fmt::Display for SlowLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { peer, host, towards, rate, median } = self;
        let way = if *towards { "to" } else { "from" };
        let host = host.as_ref().map(|host| format!(" on {host}")).unwrap_or_default();
        write!(f, "the link {way} {peer}{host} moves {rate:.1}, others like it {median:.1}")
    }
}

/// How fast frames went in one direction of a stream.
#[derive(Debug, Default)]
pub(crate) struct Gauge {
    rates: Vec<BytesPerSecond>,
    /// The link was named, and has not recovered since.
    pub named: bool,
}

impl Gauge {
    /// Counts a frame that could move since then.
    pub(crate) fn count(&mut self, bytes: u64, since: Instant) {
        if bytes >= FRAME.0 && self.rates.len() < *FRAMES.end() {
            let time = Seconds(since.elapsed().as_secs_f64());
            self.rates.push(Bytes(bytes) / time.max(LEAST));
        }
    }

    /// The median rate since it was last known; `None` while there are too few frames.
    pub(crate) fn read(&mut self) -> Option<BytesPerSecond> {
        (self.rates.len() >= *FRAMES.start()).then(|| median(std::mem::take(&mut self.rates)).1)
    }
}

/// Of the rates of links that are alike, the median, if any of them is much slower.
pub(crate) fn median_if_uneven(
    rates: impl Iterator<Item = BytesPerSecond>,
) -> Option<BytesPerSecond> {
    let rates: Vec<_> = rates.collect();
    if rates.is_empty() {
        return None;
    }
    let (least, median) = median(rates);
    is_slow(least, median).then_some(median)
}

/// The least and the median of some rates; of an even number of them, the upper.
fn median(mut rates: Vec<BytesPerSecond>) -> (BytesPerSecond, BytesPerSecond) {
    rates.sort_by(|a, b| a.0.total_cmp(&b.0));
    (rates[0], rates[rates.len() / 2])
}

pub(crate) fn is_slow(rate: BytesPerSecond, median: BytesPerSecond) -> bool {
    rate.0 * FACTOR < median.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_slow_beside_others() {
        let median = |rates: &[f64]| median_if_uneven(rates.iter().map(|r| BytesPerSecond(*r)));
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[1.0]), None);
        assert_eq!(median(&[1.0, 3.0, 4.0]), None);
        assert_eq!(median(&[8.0, 1.0]), Some(BytesPerSecond(8.0)), "in and out of a ring");
        assert_eq!(median(&[9.0, 8.0, 1.0, 7.0]), Some(BytesPerSecond(8.0)));
    }

    #[test]
    fn a_link_is_judged_by_many_large_frames() {
        let mut gauge = Gauge::default();
        let now = Instant::now();
        (0..100).for_each(|_| gauge.count(FRAME.0 - 4, now));
        assert_eq!(gauge.read(), None, "small frames");
        (0..7).for_each(|_| gauge.count(FRAME.0, now));
        assert_eq!(gauge.read(), None, "few frames");
        gauge.count(FRAME.0, now);
        assert!(gauge.read().is_some_and(|rate| rate.0 > 0.0));
        assert_eq!(gauge.read(), None, "read before");
        (0..8).for_each(|_| gauge.count(FRAME.0, Instant::now()));
        assert!(gauge.read().is_some_and(|rate| rate <= FRAME / LEAST), "as fast as can be told");
    }
}
