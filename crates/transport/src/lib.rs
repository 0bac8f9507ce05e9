//! Moves bytes between ranks and runs collective schedules on them, asynchronously.
//!
//! A [`Transport`] is one rank's byte streams to its peers: [`InProcess`] between threads,
//! [`Interprocess`] between processes, over shared memory within a host and TCP between hosts, and,
//! with the feature `mpi`, `Mpi` over what MPI runs on. A [`Communicator`] owns one and a thread that drives every posted
//! [`Operation`] over it; the caller posts buffers, computes, and waits for them later.
//!
//! From the outside in: `communicator` is the handle, `progress` the loop of its thread, `incoming`
//! and `outgoing` the two directions of a stream, `frame` what travels on it, `pulse` whether peers
//! live, `link` how fast the ways to them are, `compression` how sums travel between hosts, `flight` what is told when one does not, `interprocess` the streams
//! (`socket`; `shared_memory`, its `ring` and its `segment`), `rendezvous` how the processes of a job
//! find each other (`lobby`, `handshake`, `message`), `door` how two of them come to be connected, `sharing`
//! how those of a host come to share memory,
//! `topology` which algorithm fits where ranks are.
//!
//! Collectives that are waited for at once go another way where all ranks of the group share an `arena`:
//! `local` carries them out on the calling thread, in `passes` over its peers' memory (`reduction`), told
//! what is ready by messages on the `board`. Another engine may carry them out too: MPI's, or with the feature `nccl`
//! NCCL ([`Native`]).

mod apart;
mod arena;
mod board;
mod buffer;
mod communicator;
mod compression;
mod departed;
mod door;
mod element;
mod error;
mod flight;
mod frame;
mod handshake;
mod in_process;
mod incoming;
mod interprocess;
mod link;
mod lobby;
mod local;
mod message;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "nccl")]
mod nccl;
mod operation;
mod outgoing;
mod passes;
mod probe;
mod progress;
mod pulse;
mod reduction;
mod rendezvous;
mod ring;
mod segment;
mod shared_memory;
mod sharing;
mod signal;
mod socket;
mod stream;
mod topology;

pub use apart::Apart;
pub use arena::Arena;
pub use buffer::Buffer;
pub use communicator::{Communicator, Completed, Limits, Then, Ticket};
pub use compression::Compression;
pub use element::{Combine, Element, Reduction};
pub use error::Error;
pub use flight::{Flight, Peer, Record};
pub use handshake::{Secret, accept as demand_proof, connect as prove};
pub use in_process::InProcess;
pub use interprocess::Interprocess;
pub use link::SlowLink;
#[cfg(feature = "mpi")]
pub use mpi::Mpi;
#[cfg(feature = "nccl")]
pub use nccl::{Nccl, NcclFiles};
pub use operation::{Action, Group, Operation};
pub use probe::Probe;
pub use pulse::{Doing, LastHeard};
pub use rendezvous::Rendezvous;
pub use stream::{Native, Share, Transport, Waker};
