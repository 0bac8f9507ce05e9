//! A member's steps as passes over memory: what is read from several peers at once is reduced in one, and
//! what is sent on right away is written to the peers in the same.

use collective::{Action, Chunks, Part, Step};

/// What a member does in one go. Peers are members of the group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Pass {
    /// Let a peer have chunks as they stand.
    Send {
        to: u32,
        chunks: Chunks,
        /// Nothing else touches the chunks here until the peer has sent them back, so that it may as well
        /// write them to their place.
        grants: bool,
    },
    /// Add the chunks of some peers, in this order, and let others have the result.
    Reduce { chunks: Chunks, from: Vec<u32>, to: Vec<u32> },
    /// Take over a peer's chunks.
    Copy { from: u32, chunks: Chunks },
}

/// The passes of a part, in the order of its steps.
pub(crate) fn passes(part: &Part) -> Vec<Pass> {
    let mut passes: Vec<Pass> = Vec::new();
    for (index, step) in part.steps.iter().enumerate() {
        match (*step, passes.last_mut()) {
            (
                Step::Receive { from, chunks, action: Action::Reduce },
                Some(Pass::Reduce { chunks: same, from: sources, to }),
            ) if chunks == *same && to.is_empty() && !sources.contains(&from) => sources.push(from),
            (Step::Receive { from, chunks, action: Action::Reduce }, _) => {
                passes.push(Pass::Reduce { chunks, from: vec![from], to: Vec::new() });
            }
            (Step::Send { to, chunks }, Some(Pass::Reduce { chunks: same, to: places, .. }))
                if chunks == *same && !places.contains(&to) =>
            {
                places.push(to);
            }
            (Step::Send { to, chunks }, _) => {
                let (earlier, later) = (&part.steps[..index], &part.steps[index + 1..]);
                let read_before =
                    earlier.iter().any(|step| step.is_send() && touches(step, chunks));
                let grants = !read_before && comes_back(later, to, chunks);
                passes.push(Pass::Send { to, chunks, grants });
            }
            (Step::Receive { from, chunks, action: Action::Copy }, _) => {
                passes.push(Pass::Copy { from, chunks });
            }
        }
    }
    passes
}

/// Whether the next step that touches any of the chunks receives just them from the peer.
fn comes_back(steps: &[Step], peer: u32, chunks: Chunks) -> bool {
    let next = steps.iter().find(|step| touches(step, chunks));
    next == Some(&Step::Receive { from: peer, chunks, action: Action::Copy })
}

fn touches(step: &Step, chunks: Chunks) -> bool {
    overlap(step.chunks(), chunks)
}

/// Whether a chunk is of both.
pub(crate) fn overlap(a: Chunks, b: Chunks) -> bool {
    let (a, b) = (a.range(), b.range());
    a.start < b.end && b.start < a.end
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use collective::{Algorithm, Collective, Kind, Level};
    use proptest::prelude::*;

    use super::*;
    use crate::arena::SLOTS;

    fn send(to: u32, chunk: u32, grants: bool) -> Pass {
        Pass::Send { to, chunks: Chunks::one(chunk), grants }
    }

    #[test]
    fn a_direct_all_reduce_is_one_pass_over_memory() {
        let passes = passes(&Collective::direct(Kind::AllReduce, 3).part(1));
        let reduce = Pass::Reduce { chunks: Chunks::one(1), from: vec![0, 2], to: vec![2, 0] };
        let copy = |from| Pass::Copy { from, chunks: Chunks::one(from) };
        assert_eq!(passes, [send(2, 2, true), send(0, 0, true), reduce, copy(0), copy(2)]);
    }

    #[test]
    fn what_goes_to_several_peers_is_not_for_them_to_write() {
        let passes = passes(&Collective::direct(Kind::AllGather, 3).part(0));
        assert_eq!(passes[..2], [send(1, 0, false), send(2, 0, false)]);
    }

    fn algorithms(ranks: u32) -> Vec<Algorithm> {
        let level = |algorithm, ranks| Level { algorithm, ranks };
        let levels = vec![level(Algorithm::Direct, 2), level(Algorithm::Ring, ranks / 2)];
        vec![
            Algorithm::Ring,
            Algorithm::Direct,
            Algorithm::HalvingDoubling,
            Algorithm::Bruck,
            Algorithm::DoubleTree,
            Algorithm::Torus { dims: vec![2, ranks / 2] },
            Algorithm::Hierarchy { levels },
        ]
    }

    /// A reduction is done with its sources before it waits for room to send.
    fn one_by_one(pass: Pass) -> Vec<Pass> {
        let Pass::Reduce { chunks, from, to } = pass else {
            return vec![pass];
        };
        let sends = to.into_iter().map(|to| Pass::Send { to, chunks, grants: false });
        [Pass::Reduce { chunks, from, to: Vec::new() }].into_iter().chain(sends).collect()
    }

    /// What members wait for: of each other the next message, and of their own messages that they are read.
    #[derive(Default)]
    struct Messages {
        sent: BTreeMap<(u32, u32), Vec<Chunks>>,
        read: BTreeMap<(u32, u32), usize>,
    }

    impl Messages {
        fn waits(&self, from: u32, to: u32) -> bool {
            self.ahead(from, to) == 0
        }

        fn ahead(&self, from: u32, to: u32) -> u64 {
            let read = self.read.get(&(from, to)).copied().unwrap_or(0);
            self.sent.get(&(from, to)).map_or(0, |sent| (sent.len() - read) as u64)
        }

        /// Whether a message of a member's with such chunks is not read yet.
        fn are_read(&self, member: u32, chunks: Chunks) -> bool {
            self.sent.iter().filter(|((from, _), _)| *from == member).all(|(way, sent)| {
                let read = self.read.get(way).copied().unwrap_or(0);
                sent[read..].iter().all(|sent| !overlap(*sent, chunks))
            })
        }

        /// Whether the pass could be gone through; a member may send as many messages ahead of
        /// its reader as there is room for.
        fn go_through(&mut self, member: u32, pass: &Pass) -> bool {
            let (sources, places, chunks) = match pass {
                Pass::Send { to, chunks, .. } => (vec![], vec![*to], *chunks),
                Pass::Reduce { chunks, from, to } => (from.clone(), to.clone(), *chunks),
                Pass::Copy { from, chunks } => (vec![*from], vec![], *chunks),
            };
            let held = sources.iter().any(|from| self.waits(*from, member))
                || (!sources.is_empty() && !self.are_read(member, chunks))
                || places.iter().any(|to| self.ahead(member, *to) >= SLOTS);
            if !held {
                let read = |from: &u32| *self.read.entry((*from, member)).or_default() += 1;
                sources.iter().for_each(read);
                let send = |to: &u32| self.sent.entry((member, *to)).or_default().push(chunks);
                places.iter().for_each(send);
            }
            !held
        }
    }

    proptest! {
        /// Nobody waits for ever, though a member does one thing after the other.
        #[test]
        fn every_list_can_be_gone_through_in_its_order(
            ranks in 1_u32..20,
            kind in prop::sample::select(Kind::ALL.to_vec()),
            index in 0_usize..7,
            pieces in 1_u32..4,
        ) {
            let algorithm = algorithms(ranks).swap_remove(index);
            let Ok(collective) = Collective::new(kind, algorithm, ranks) else {
                return Ok(());
            };
            let collective = collective.clone().pipelined(pieces).unwrap_or(collective);
            prop_assume!(u64::from(collective.contract().in_flight) <= SLOTS);
            let list = |member| -> Vec<Pass> {
                passes(&collective.part(member)).into_iter().flat_map(one_by_one).collect()
            };
            let lists: Vec<_> = (0..ranks).map(list).collect();
            let (mut at, mut messages) = (vec![0; lists.len()], Messages::default());
            loop {
                let mut moved = false;
                for (member, list) in (0..).zip(&lists) {
                    let at = &mut at[member as usize];
                    while *at < list.len() && messages.go_through(member, &list[*at]) {
                        (*at, moved) = (*at + 1, true);
                    }
                }
                if !moved {
                    break;
                }
            }
            let left = lists.iter().zip(&at).position(|(list, at)| *at < list.len());
            prop_assert_eq!(left, None, "{:?}", collective);
        }
    }
}
