//! What a transfer costs on a described cluster, when all groups along its axis do the same at once.
//!
//! A [`Network`] is a cluster with a job's mesh laid over it: ranks fill accelerators in their
//! order. For every transfer it says which latency it has, how long it occupies a rank's way into
//! its scale-up domain and its way into the fabric, and by which method. Between GPUs the method is
//! the one that NCCL's tuner picks ([`crate::nccl`]); in a torus it is rings over all dimensions.
//! On top come what NCCL does not know: uplinks that are oversubscribed or on which flows collide.
//!
//! No answer is faster than physics: the fewest bytes that must pass a link, over its bandwidth.

mod collisions;
mod fabric;
pub mod flow;
mod geometry;
mod gpus;
mod limit;
mod torus;

use std::fmt;

use cluster::{Cluster, Shape};
use collective::Kind;
use program::{Action, Axis, Mesh, Transfer};
use units::{Bytes, Rank, Seconds};

use crate::Error;
use crate::nccl::{Algorithm, Protocol};
use crate::step::{Resource, TransferCost};

pub use geometry::{Group, Slowdown};

/// A cluster as a job's groups use it.
#[derive(Debug, Clone)]
pub struct Network<'a> {
    cluster: &'a Cluster,
    mesh: Mesh,
    in_network_reduction: bool,
}

/// What a transfer costs, and why.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// What it takes.
    pub cost: TransferCost,
    /// How it is carried out.
    pub method: Method,
    /// What a rank sends over each of its connections, on average over the group.
    pub bytes: [Bytes; Resource::COUNT],
}

/// How a transfer is carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Method {
    /// Not at all: the group has one member.
    Nothing,
    /// By NCCL, in this way.
    Nccl(Algorithm, Protocol),
    /// By a message from one rank to another, under this protocol.
    Message(Protocol),
    /// By messages from every member to every other.
    Pairwise,
    /// By rings over this many dimensions of a torus at once.
    Torus(u32),
    /// By rings inside tori, then between them over the fabric.
    Slices(u32),
}

impl<'a> Network<'a> {
    /// The mesh laid over the cluster.
    ///
    /// # Errors
    /// [`Error::TooSmall`] when the mesh has more ranks than the cluster accelerators.
    pub fn new(cluster: &'a Cluster, mesh: &Mesh) -> Result<Self, Error> {
        let ranks = mesh.ranks();
        if ranks > cluster.accelerators {
            return Err(Error::TooSmall {
                cluster: cluster.name.clone(),
                accelerators: cluster.accelerators,
                ranks,
            });
        }
        Ok(Self { cluster, mesh: *mesh, in_network_reduction: false })
    }

    /// The same with or without reduction in the fabric's switches, where those can. NCCL needs it
    /// asked for (`NCCL_COLLNET_ENABLE`), and so it is off at first.
    #[must_use]
    pub fn with_in_network_reduction(self, asked: bool) -> Self {
        let able = self.cluster.fabric.as_ref().is_some_and(|fabric| fabric.in_network_reduction);
        Self { in_network_reduction: asked && able, ..self }
    }

    /// The group of `rank` along `axis`, as it lies on the cluster.
    #[must_use]
    pub fn group(&self, rank: Rank, axis: Axis) -> Group {
        let count = self.mesh.degree(axis);
        if axis == Axis::World || count < 2 {
            // All that there are, however they are numbered.
            let first = if count < 2 { self.mesh.accelerator(rank) } else { Rank(0) };
            return Group::new(self.cluster, first, 1, count);
        }
        let first = self.mesh.accelerator(self.mesh.leader(rank, axis));
        let next = self.mesh.accelerator(self.mesh.peer(rank, axis, 1));
        Group::new(self.cluster, first, next.0 - first.0, count)
    }

    /// What a transfer takes that `rank` posts.
    #[must_use]
    pub fn transfer(&self, rank: Rank, transfer: &Transfer) -> Estimate {
        let (axis, bytes) = (transfer.axis, transfer.bytes());
        match transfer.action {
            Action::Collective(Kind::AllToAll) => self.all_to_all(&self.group(rank, axis), bytes),
            Action::Collective(kind) => self.collective(&self.group(rank, axis), kind, bytes),
            Action::Send { to: peer } | Action::Receive { from: peer } => {
                self.message(rank, self.mesh.peer(rank, axis, peer), bytes)
            }
            // The ring is as slow as the link between its ends.
            Action::Shift => {
                let last = self.mesh.degree(axis) - 1;
                self.message(self.mesh.peer(rank, axis, last), self.mesh.leader(rank, axis), bytes)
            }
        }
    }

    /// What a collective of a group takes, of this many bytes: the whole buffer, also for
    /// reduce-scatter and all-gather.
    #[must_use]
    pub fn collective(&self, group: &Group, kind: Kind, bytes: Bytes) -> Estimate {
        if group.ranks < 2 || bytes == Bytes::ZERO {
            return Estimate::NOTHING;
        }
        let estimate = match &self.cluster.domain.shape {
            Shape::Torus { .. } => torus::collective(self, group, kind, bytes),
            Shape::Switched(_) | Shape::Mesh(_) => gpus::collective(self, group, kind, bytes),
        };
        limit::assert_possible(self, group, kind, bytes, &estimate);
        estimate
    }

    /// What it takes that every member sends a part of `bytes` to every other.
    #[must_use]
    pub fn all_to_all(&self, group: &Group, bytes: Bytes) -> Estimate {
        if group.ranks < 2 || bytes == Bytes::ZERO {
            return Estimate::NOTHING;
        }
        let estimate = match &self.cluster.domain.shape {
            Shape::Torus { .. } => torus::all_to_all(self, group, bytes),
            Shape::Switched(_) | Shape::Mesh(_) => gpus::all_to_all(self, group, bytes),
        };
        // All but its own part leaves a member, as in a gather.
        limit::assert_possible(self, group, Kind::AllGather, bytes, &estimate);
        estimate
    }

    /// What a message from one rank to another takes, when all ranks send as far as this one.
    #[must_use]
    pub fn message(&self, from: Rank, to: Rank, bytes: Bytes) -> Estimate {
        let [from, to] = [from, to].map(|rank| self.mesh.accelerator(rank));
        if from == to || bytes == Bytes::ZERO {
            return Estimate::NOTHING;
        }
        let estimate = match &self.cluster.domain.shape {
            Shape::Torus { .. } => torus::message(self, from, to, bytes),
            Shape::Switched(_) | Shape::Mesh(_) => gpus::message(self, from, to, bytes),
        };
        limit::assert_message_possible(self, from, to, bytes, &estimate);
        estimate
    }
}

impl Estimate {
    const NOTHING: Self = Self {
        cost: TransferCost {
            latency: Seconds::ZERO,
            wire: [Seconds::ZERO; Resource::COUNT],
            compute_slowdown: 0.0,
        },
        method: Method::Nothing,
        bytes: [Bytes::ZERO; Resource::COUNT],
    };

    /// What the transfer takes when nothing else is under way.
    #[must_use]
    pub fn alone(&self) -> Seconds {
        let longest = self.cost.wire.into_iter().fold(Seconds::ZERO, Seconds::max);
        self.cost.latency + longest
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.write_str("nothing"),
            Self::Nccl(algorithm, protocol) => write!(f, "{algorithm}, {protocol}"),
            Self::Message(protocol) => write!(f, "message, {protocol}"),
            Self::Pairwise => f.write_str("pairwise messages"),
            Self::Torus(dims) => write!(f, "rings over {dims} dims"),
            Self::Slices(dims) => write!(f, "rings over {dims} dims and between slices"),
        }
    }
}

#[cfg(test)]
mod tests;
