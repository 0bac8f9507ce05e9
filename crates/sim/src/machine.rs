//! The seam between what ranks do and how long it takes.

use collective::Action;
use program::Ticket;
use units::{Bytes, Rank, Seconds};

/// One chunk on its way from one member of a transfer to another.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Message {
    /// The transfer it belongs to.
    pub(crate) transfer: usize,
    /// The sending member, by place in the transfer's group.
    pub(crate) sender: u32,
    /// The receiving member, by place in the transfer's group.
    pub(crate) receiver: u32,
    /// The sender's step that it carries out.
    pub(crate) step: usize,
    /// The sending rank.
    pub(crate) from: Rank,
    /// The receiving rank.
    pub(crate) to: Rank,
    /// Its size.
    pub(crate) bytes: Bytes,
    /// What the receiver does with it.
    pub(crate) action: Action,
    /// The sender's ticket: transfers posted earlier go first.
    pub(crate) ticket: Ticket,
}

/// Something that a machine was asked to do has come about.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Completion {
    /// The rank's compute thread is done with its work.
    Computed(Rank),
    /// The message has left; its sender may reuse the buffer.
    Sent(Message),
    /// The message is with its receiver, copied or reduced.
    Arrived(Message),
}

/// Hardware in virtual time: it is given work and says, in order of time, what is done.
pub(crate) trait Machine {
    /// The virtual time.
    fn now(&self) -> Seconds;
    /// Starts work on a rank's compute thread that takes `work` when nothing else runs.
    fn compute(&mut self, rank: Rank, work: Seconds);
    /// Starts a message.
    fn send(&mut self, message: Message);
    /// Moves time on to the next completion; `None` when there is nothing under way.
    fn next(&mut self) -> Option<Completion>;
}
