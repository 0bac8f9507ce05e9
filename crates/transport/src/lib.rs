//! Moves bytes between ranks and runs collective schedules on them, asynchronously.
//!
//! A [`Transport`] is one rank's byte streams to its peers: [`InProcess`] between threads,
//! [`Interprocess`] between processes, over shared memory within a host and TCP between hosts. A [`Communicator`] owns one and a thread that drives every posted
//! [`Operation`] over it; the caller posts buffers, computes, and waits for them later.
//!
//! From the outside in: `communicator` is the handle, `progress` the loop of its thread, `incoming`
//! and `outgoing` the two directions of a stream, `frame` what travels on it, `interprocess` the streams
//! (`socket`; `shared_memory`, its `ring` and its `segment`), `rendezvous` how the processes of a job
//! find each other, `sharing` how two of a host come to share memory.

mod communicator;
mod element;
mod error;
mod frame;
mod in_process;
mod incoming;
mod interprocess;
mod lobby;
mod message;
mod operation;
mod outgoing;
mod progress;
mod rendezvous;
mod ring;
mod segment;
mod shared_memory;
mod sharing;
mod socket;
mod stream;

pub use communicator::{Communicator, Completed, Limits, Then, Ticket};
pub use element::{Combine, Element, Reduction};
pub use error::Error;
pub use in_process::InProcess;
pub use interprocess::Interprocess;
pub use operation::{Action, Group, Operation};
pub use rendezvous::Rendezvous;
pub use stream::{Transport, Waker};
