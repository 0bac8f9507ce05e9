//! What can go wrong between ranks.

use std::net::SocketAddr;
use std::sync::Arc;

use units::{Bytes, Rank, Seconds};

use crate::pulse::{LastHeard, Named};

/// An error of the network, a peer, or the way the job was started.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// A byte stream ended; [`Error::PeerLost`] says which operation that broke.
    #[error("the stream with {peer} ended: {reason}")]
    StreamEnded {
        /// The rank at the other end.
        peer: Rank,
        /// What the operating system or the peer's bytes said.
        reason: String,
    },
    /// A peer that an operation needs is gone.
    #[error(
        "`{operation}` (number {sequence} of its group) lost {peer}{}: {reason}; see that rank's own \
         output for the cause{last_heard}",
        on(.host)
    )]
    PeerLost {
        /// The rank that is gone.
        peer: Rank,
        /// Its host, where that is known.
        host: Option<Arc<str>>,
        /// The operation's label.
        operation: Arc<str>,
        /// Its number in the order of posting on its group, from 0.
        sequence: u64,
        /// How the peer was seen to be gone.
        reason: String,
        /// What the operation's ranks were doing.
        last_heard: LastHeard,
    },
    /// A collective failed on another rank, which says more about it.
    #[error("`{operation}` (number {sequence} of its group) failed on {peer}; see its own output")]
    FailedElsewhere {
        /// The rank on which it failed.
        peer: Rank,
        /// The local operation's label.
        operation: Arc<str>,
        /// Its number in the order of posting on its group, from 0.
        sequence: u64,
    },
    /// An operation was waited for longer than [`crate::Limits::wait`].
    #[error(
        "`{operation}` (number {sequence} of its group) is not done after {limit}: no answer from \
         {}; they may be slow, or may not have posted the same operation{last_heard}",
        Named(.waiting_for)
    )]
    Timeout {
        /// The operation's label.
        operation: Arc<str>,
        /// Its number in the order of posting on its group, from 0.
        sequence: u64,
        /// The limit that passed.
        limit: Seconds,
        /// The peers with which a transfer is outstanding.
        waiting_for: Vec<Rank>,
        /// What the operation's ranks were doing.
        last_heard: LastHeard,
    },
    /// Two ranks posted different operations as the same number of a group.
    #[error(
        "`{operation}` (number {sequence} of its group) expects chunk {chunk} of {expected} from \
         {peer}, which sends chunk {sent_chunk} of {sent}: the ranks post different operations"
    )]
    Mismatch {
        /// The rank that posted something else.
        peer: Rank,
        /// The local operation's label.
        operation: Arc<str>,
        /// Its number in the order of posting on its group, from 0.
        sequence: u64,
        /// The chunk that was expected.
        chunk: u32,
        /// Its size.
        expected: Bytes,
        /// The chunk that comes.
        sent_chunk: u32,
        /// Its size.
        sent: Bytes,
    },
    /// The job does not start, for a reason that every rank is told.
    #[error("the job does not start because of {rank}: {reason}")]
    Refused {
        /// The rank that does not fit.
        rank: Rank,
        /// Why, with what differs.
        reason: String,
    },
    /// Not everyone could be reached when the job started.
    #[error("no rendezvous at {address}: {reason}")]
    Rendezvous {
        /// Where it was tried.
        address: SocketAddr,
        /// What failed, and what to check.
        reason: String,
    },
    /// The operating system refused something that does not concern a peer.
    #[error("cannot {action}: {reason}")]
    System {
        /// What was tried.
        action: &'static str,
        /// What the operating system said.
        reason: String,
    },
}

impl Error {
    /// Turns an input-output error into one that says what was tried.
    pub(crate) fn system(action: &'static str) -> impl Fn(std::io::Error) -> Self {
        move |error| Self::System { action, reason: error.to_string() }
    }

    /// A stream with `peer` that ended for `reason`.
    pub(crate) fn ended(peer: Rank, reason: impl ToString) -> Self {
        Self::StreamEnded { peer, reason: reason.to_string() }
    }
}

/// Where a rank is, if that is known.
fn on(host: &Option<Arc<str>>) -> String {
    host.as_ref().map(|host| format!(" on {host}")).unwrap_or_default()
}
