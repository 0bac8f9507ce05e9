//! What a member does, without its peers' names, so that members that do the same share it.

use std::collections::HashMap;
use std::ops::Range;

use collective::{Collective, Step};

/// Steps sorted by stream: by direction and peer. Streams are numbered by their first step.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct Script {
    pub(super) streams: Vec<Stream>,
    pub(super) moves: Vec<Move>,
    blockers: Vec<Blocker>,
    wakes: Vec<u32>,
}

/// The steps in one direction with one peer.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct Stream {
    pub(super) sends: bool,
    /// Its first step, in the script's moves.
    pub(super) first: u32,
    /// Its steps.
    pub(super) count: u32,
}

/// One step.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct Move {
    /// Chunks that it moves.
    pub(super) chunks: u32,
    blockers: (u32, u32),
    wakes: (u32, u32),
}

/// A step may start when so many of another stream's are done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Blocker {
    pub(super) stream: u32,
    pub(super) done: u32,
}

/// A member's script, by number, and the peer of each of its streams.
#[derive(Debug, Clone)]
pub(super) struct Role {
    pub(super) script: u32,
    pub(super) peers: Vec<u32>,
}

/// The scripts of some collectives.
#[derive(Debug, Default)]
pub(super) struct Scripts {
    pub(super) all: Vec<Script>,
    roles: HashMap<Collective, Vec<Role>>,
}

impl Scripts {
    /// The roles of a collective's members.
    pub(super) fn roles(&mut self, collective: &Collective) -> &[Role] {
        if !self.roles.contains_key(collective) {
            let chunks = collective.contract().chunks as usize;
            let mut numbers: HashMap<Script, u32> = HashMap::new();
            let mut roles = Vec::new();
            for member in 0..collective.members() {
                let (script, peers) = Script::new(&collective.steps(member), chunks);
                let next = (self.all.len() + numbers.len()) as u32;
                roles.push(Role { script: *numbers.entry(script).or_insert(next), peers });
            }
            let mut new: Vec<(Script, u32)> = numbers.into_iter().collect();
            new.sort_by_key(|(_, number)| *number);
            self.all.extend(new.into_iter().map(|(script, _)| script));
            self.roles.insert(collective.clone(), roles);
        }
        &self.roles[collective]
    }
}

/// What has touched a chunk so far: the last receive, and the sends since. By place: stream and
/// number in it.
#[derive(Clone, Default)]
struct Touched {
    receive: Option<(u32, u32)>,
    sends: Vec<(u32, u32)>,
}

impl Script {
    /// The rules of [`collective::Executor`]: a step waits for every earlier step that touches its
    /// chunks, unless both only send, and steps of a stream keep their order.
    fn new(steps: &[Step], chunks: usize) -> (Self, Vec<u32>) {
        let (places, counts, peers) = sort(steps);
        let mut streams: Vec<Stream> = Vec::new();
        for (count, (sends, _)) in counts.iter().zip(&peers) {
            let first = streams.last().map_or(0, |last| last.first + last.count);
            streams.push(Stream { sends: *sends, first, count: *count });
        }
        let index = |(stream, nth): (u32, u32)| (streams[stream as usize].first + nth) as usize;
        let mut touched = vec![Touched::default(); chunks];
        let mut blockers: Vec<Vec<Blocker>> = vec![Vec::new(); steps.len()];
        let mut wakes: Vec<Vec<u32>> = vec![Vec::new(); steps.len()];
        let mut moved = vec![0; steps.len()];
        for (step, place) in steps.iter().zip(places) {
            let before = before(*step, place, &mut touched);
            for Blocker { stream, done } in &before {
                let wake = &mut wakes[index((*stream, done - 1))];
                if !wake.contains(&place.0) {
                    wake.push(place.0);
                }
            }
            moved[index(place)] = step.chunks().count;
            blockers[index(place)] = before;
        }
        let (moves, blockers, wakes) = flatten(&moved, blockers, wakes);
        (
            Self { streams, moves, blockers, wakes },
            peers.into_iter().map(|(_, peer)| peer).collect(),
        )
    }

    /// What must be done before the step may start.
    pub(super) fn blockers(&self, step: u32) -> &[Blocker] {
        let (start, end) = self.moves[step as usize].blockers;
        &self.blockers[start as usize..end as usize]
    }

    /// The streams that may have waited for the step.
    pub(super) fn wakes(&self, step: u32) -> Range<usize> {
        let (start, end) = self.moves[step as usize].wakes;
        start as usize..end as usize
    }

    /// The stream at a place of [`Script::wakes`].
    pub(super) fn woken(&self, place: usize) -> u32 {
        self.wakes[place]
    }
}

/// Every step's place, every stream's steps, and whether it sends and to or from whom.
#[allow(clippy::type_complexity, reason = "three lists, used once")]
fn sort(steps: &[Step]) -> (Vec<(u32, u32)>, Vec<u32>, Vec<(bool, u32)>) {
    let mut numbers: HashMap<(bool, u32), u32> = HashMap::new();
    let (mut places, mut counts, mut peers) = (Vec::new(), Vec::new(), Vec::new());
    for step in steps {
        let key = (step.is_send(), step.peer());
        let stream = *numbers.entry(key).or_insert_with(|| {
            counts.push(0);
            peers.push(key);
            counts.len() as u32 - 1
        });
        places.push((stream, counts[stream as usize]));
        counts[stream as usize] += 1;
    }
    (places, counts, peers)
}

/// What a step waits for, which it then takes its place in. Of each stream only the last step
/// counts, for they are done in order.
fn before(step: Step, place: (u32, u32), touched: &mut [Touched]) -> Vec<Blocker> {
    let mut blockers: Vec<Blocker> = Vec::new();
    let mut wait = |(stream, nth): (u32, u32)| {
        if stream == place.0 {
            return;
        }
        match blockers.iter_mut().find(|blocker| blocker.stream == stream) {
            Some(blocker) => blocker.done = blocker.done.max(nth + 1),
            None => blockers.push(Blocker { stream, done: nth + 1 }),
        }
    };
    for chunk in step.chunks().range() {
        let touched = &mut touched[chunk as usize];
        touched.receive.into_iter().for_each(&mut wait);
        if step.is_send() {
            touched.sends.push(place);
        } else {
            touched.sends.drain(..).for_each(&mut wait);
            touched.receive = Some(place);
        }
    }
    blockers
}

fn flatten(
    moved: &[u32],
    blockers: Vec<Vec<Blocker>>,
    wakes: Vec<Vec<u32>>,
) -> (Vec<Move>, Vec<Blocker>, Vec<u32>) {
    let (mut moves, mut all_blockers, mut all_wakes) = (Vec::new(), Vec::new(), Vec::new());
    for ((chunks, blockers), wakes) in moved.iter().zip(blockers).zip(wakes) {
        let from = (all_blockers.len() as u32, all_wakes.len() as u32);
        all_blockers.extend(blockers);
        all_wakes.extend(wakes);
        let to = (all_blockers.len() as u32, all_wakes.len() as u32);
        moves.push(Move { chunks: *chunks, blockers: (from.0, to.0), wakes: (from.1, to.1) });
    }
    (moves, all_blockers, all_wakes)
}

#[cfg(test)]
mod tests {
    use collective::Kind;

    use super::*;

    #[test]
    fn members_of_a_ring_share_one_script() {
        let mut scripts = Scripts::default();
        let roles = scripts.roles(&Collective::ring(Kind::AllReduce, 8)).to_vec();
        assert_eq!(scripts.all.len(), 1);
        assert!(roles.iter().all(|role| role.script == 0));
        assert_eq!((&roles[0].peers, &roles[3].peers), (&vec![1, 7], &vec![4, 2]));
        let script = &scripts.all[0];
        assert_eq!(script.moves.len(), 28);
        // The second send passes on what the first receive brought.
        assert_eq!(script.blockers(1), [Blocker { stream: 1, done: 1 }]);
        scripts.roles(&Collective::ring(Kind::AllGather, 8));
        scripts.roles(&Collective::ring(Kind::AllReduce, 8));
        assert_eq!(scripts.all.len(), 2);
    }
}
