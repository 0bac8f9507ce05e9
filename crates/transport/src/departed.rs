//! Which peers have left, told by the communication thread to the rank's own.

use std::sync::OnceLock;

use units::Rank;

/// By rank: how it went, if it did.
#[derive(Debug)]
pub(crate) struct Departed(Vec<OnceLock<Gone>>);

/// How a peer went.
#[derive(Debug, Clone)]
pub(crate) struct Gone {
    /// It said goodbye, having done its part of whatever it posted.
    pub orderly: bool,
    pub reason: String,
}

impl Departed {
    pub(crate) fn new(ranks: u32) -> Self {
        Self((0..ranks).map(|_| OnceLock::new()).collect())
    }

    /// Notes that a peer has left, once.
    pub(crate) fn note(&self, rank: Rank, gone: &Gone) {
        self.0[rank.index()].get_or_init(|| gone.clone());
    }

    pub(crate) fn get(&self, rank: Rank) -> Option<&Gone> {
        self.0[rank.index()].get()
    }
}
