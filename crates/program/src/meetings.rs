//! Where the posts of different ranks meet: the rule by which a send finds its receive and the
//! members of a collective find each other. The verifier and the simulator share it.

use std::collections::BTreeMap;

use units::Rank;

use crate::{Action, Axis, Mesh, Ticket, Transfer};

/// What identifies a meeting: posts on one axis meet in posting order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Group { axis: Axis, leader: Rank },
    Pair { axis: Axis, from: Rank, to: Rank },
}

/// One rank's part in a meeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Party {
    /// Who posted.
    pub rank: Rank,
    /// Under which ticket.
    pub ticket: Ticket,
    /// What.
    pub transfer: Transfer,
}

/// Posts that have not yet met all their partners.
#[derive(Debug)]
pub struct Meetings {
    mesh: Mesh,
    posted: BTreeMap<(Place, Rank), u64>,
    open: BTreeMap<(Place, u64), Vec<Party>>,
}

impl Meetings {
    /// Nothing posted yet.
    #[must_use]
    pub fn new(mesh: Mesh) -> Self {
        Self { mesh, posted: BTreeMap::new(), open: BTreeMap::new() }
    }

    fn place(&self, party: &Party) -> (Place, usize) {
        let (rank, axis) = (party.rank, party.transfer.axis);
        match party.transfer.action {
            Action::Collective(_) | Action::Shift => {
                let leader = self.mesh.leader(rank, axis);
                (Place::Group { axis, leader }, self.mesh.degree(axis) as usize)
            }
            Action::Send { to } => {
                (Place::Pair { axis, from: rank, to: self.mesh.peer(rank, axis, to) }, 2)
            }
            Action::Receive { from } => {
                (Place::Pair { axis, from: self.mesh.peer(rank, axis, from), to: rank }, 2)
            }
        }
    }

    /// Adds a post; returns all parties, in the order they came, when it is the last one.
    pub fn post(&mut self, party: Party) -> Option<Vec<Party>> {
        let (place, expected) = self.place(&party);
        let sequence = self.posted.entry((place, party.rank)).or_default();
        let key = (place, *sequence);
        *sequence += 1;
        let parties = self.open.entry(key).or_default();
        parties.push(party);
        if parties.len() < expected {
            return None;
        }
        self.open.remove(&key)
    }

    /// Posts that never met their partners.
    pub fn unmet(&self) -> impl Iterator<Item = &Party> {
        self.open.values().flatten()
    }
}
