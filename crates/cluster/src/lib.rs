//! Accelerators, nodes and fabrics as described hardware: what a cluster is made of, how fast its
//! parts are said to be, what they draw, and which link joins two ranks.
//!
//! Nothing here knows a model or the passing of time. Described hardware comes from the
//! [`catalogue`] or from a user's file of the same form; what was measured on a machine at hand is
//! the simulator's `Profile`.

mod accelerator;
pub mod catalogue;
mod check;
mod composition;
mod energy;
mod fragment;
mod topology;

use thiserror::Error;

pub use accelerator::{Accelerator, Generation, Precision, Vendor};
pub use composition::{Composition, PerDomain};
pub use energy::Energy;
pub use fragment::Fragment;
pub use topology::{Cluster, Domain, Fabric, Link, Power, Price, Routing, Shape, Tier};

/// Why there is no such cluster.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// A name that the catalogue does not have.
    #[error(
        "the catalogue has no {kind} `{name}`; did you mean `{nearest}`? `phalanx catalogue` lists all"
    )]
    Unknown {
        /// What was looked for.
        kind: catalogue::Kind,
        /// The name that was given.
        name: String,
        /// The entry spelled most like it.
        nearest: String,
    },
    /// A file that cannot be read.
    #[error("cannot read the cluster file {path}: {reason}")]
    Unreadable {
        /// Which file.
        path: String,
        /// What the system says.
        reason: String,
    },
    /// An entry that is not of the catalogue's form.
    #[error("{place}: {reason}")]
    Malformed {
        /// Which entry or file.
        place: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Parts that do not make a cluster.
    #[error("cluster {cluster}: {reason}")]
    Unfit {
        /// Which cluster.
        cluster: String,
        /// What to change.
        reason: String,
    },
}
