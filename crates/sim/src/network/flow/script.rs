//! What a member does, without its peers' names, so that members that do the same share it.

use std::collections::HashMap;
use std::ops::Range;

use collective::{Collective, Kind, Step};

/// Steps sorted by stream: by direction and peer. Streams are numbered by their first step.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Script {
    streams: Vec<Stream>,
    /// Stream by stream.
    steps: Vec<Listed>,
}

/// The steps in one direction with one peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Stream {
    pub(super) sends: bool,
    /// Where its steps begin and end.
    pub(super) steps: (u32, u32),
}

#[derive(Debug, Default, PartialEq, Eq, Hash)]
struct Listed {
    chunks: u32,
    blockers: Vec<Blocker>,
    wakes: Vec<u32>,
}

/// One step of a script.
#[derive(Debug, Clone, Copy)]
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

/// The scripts of some collectives, one behind the other.
#[derive(Debug, Default)]
pub(super) struct Scripts {
    moves: Vec<Move>,
    blockers: Vec<Blocker>,
    wakes: Vec<u32>,
    streams: Vec<Vec<Stream>>,
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
                let steps = collective.steps(member);
                if let Some(Role { script, .. }) =
                    roles.first().filter(|_| shares_script(collective))
                {
                    // All are alike, so only the names of the peers are new.
                    roles.push(Role { script: *script, peers: peers(&steps) });
                    continue;
                }
                let (script, peers) = Script::new(&steps, chunks);
                let known = numbers.get(&script).copied();
                let number = known.unwrap_or_else(|| self.append(&script));
                numbers.entry(script).or_insert(number);
                roles.push(Role { script: number, peers });
            }
            self.roles.insert(collective.clone(), roles);
        }
        &self.roles[collective]
    }

    fn append(&mut self, script: &Script) -> u32 {
        let first = self.moves.len() as u32;
        for step in &script.steps {
            let from = (self.blockers.len() as u32, self.wakes.len() as u32);
            self.blockers.extend(&step.blockers);
            self.wakes.extend(&step.wakes);
            let to = (self.blockers.len() as u32, self.wakes.len() as u32);
            let (blockers, wakes) = ((from.0, to.0), (from.1, to.1));
            self.moves.push(Move { chunks: step.chunks, blockers, wakes });
        }
        let moved = |stream: &Stream| Stream {
            steps: (first + stream.steps.0, first + stream.steps.1),
            ..*stream
        };
        self.streams.push(script.streams.iter().map(moved).collect());
        self.streams.len() as u32 - 1
    }

    /// The streams of a script.
    pub(super) fn streams(&self, script: u32) -> &[Stream] {
        &self.streams[script as usize]
    }

    /// A step.
    pub(super) fn step(&self, number: u32) -> Move {
        self.moves[number as usize]
    }

    /// What must be done before a step may start.
    pub(super) fn blockers(&self, step: Move) -> &[Blocker] {
        &self.blockers[step.blockers.0 as usize..step.blockers.1 as usize]
    }

    /// The streams that may have waited for a step.
    pub(super) fn wakes(&self, step: Move) -> Range<usize> {
        step.wakes.0 as usize..step.wakes.1 as usize
    }

    /// The stream at a place in [`Scripts::wakes`].
    pub(super) fn woken(&self, place: usize) -> u32 {
        self.wakes[place]
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
            let first = streams.last().map_or(0, |last| last.steps.1);
            streams.push(Stream { sends: *sends, steps: (first, first + count) });
        }
        let index = |(stream, nth): (u32, u32)| (streams[stream as usize].steps.0 + nth) as usize;
        let mut touched = vec![Touched::default(); chunks];
        let mut listed: Vec<Listed> = steps.iter().map(|_| Listed::default()).collect();
        for (step, place) in steps.iter().zip(places) {
            let blockers = before(*step, place, &mut touched);
            for Blocker { stream, done } in &blockers {
                let wakes = &mut listed[index((*stream, done - 1))].wakes;
                if !wakes.contains(&place.0) {
                    wakes.push(place.0);
                }
            }
            let listed = &mut listed[index(place)];
            (listed.chunks, listed.blockers) = (step.chunks().count, blockers);
        }
        let peers = peers.into_iter().map(|(_, peer)| peer).collect();
        (Self { streams, steps: listed }, peers)
    }
}

/// Whether all members are known to have the same script, so that one need be written. Others that
/// are symmetric may list their steps in another order.
fn shares_script(collective: &Collective) -> bool {
    let kind = collective.contract().kind;
    let around = matches!(kind, Kind::AllReduce | Kind::ReduceScatter | Kind::AllGather);
    around && *collective == Collective::ring(kind, collective.members())
}

/// The peer of each stream.
fn peers(steps: &[Step]) -> Vec<u32> {
    let mut seen: Vec<(bool, u32)> = Vec::new();
    for step in steps {
        let stream = (step.is_send(), step.peer());
        // Streams are few, and steps mostly go on with one of the last.
        if !seen.contains(&stream) {
            seen.push(stream);
        }
    }
    seen.into_iter().map(|(_, peer)| peer).collect()
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

#[cfg(test)]
mod tests {
    use collective::Algorithm;

    use super::*;

    #[test]
    fn members_of_a_ring_share_one_script() {
        let mut scripts = Scripts::default();
        let roles = scripts.roles(&Collective::ring(Kind::AllReduce, 8)).to_vec();
        assert!(roles.iter().all(|role| role.script == 0));
        assert_eq!((&roles[0].peers, &roles[3].peers), (&vec![1, 7], &vec![4, 2]));
        assert_eq!(scripts.moves.len(), 28);
        // The second send passes on what the first receive brought.
        let second = scripts.step(1);
        assert_eq!(scripts.blockers(second), [Blocker { stream: 1, done: 1 }]);
        scripts.roles(&Collective::ring(Kind::AllGather, 8));
        scripts.roles(&Collective::ring(Kind::AllReduce, 8));
        assert_eq!(scripts.streams.len(), 2);
    }

    #[test]
    fn one_script_stands_for_others_only_where_they_are_the_same() {
        let dims = vec![4, 2];
        let algorithms = [
            Algorithm::Ring,
            Algorithm::Direct,
            Algorithm::Pairwise,
            Algorithm::HalvingDoubling,
            Algorithm::Bruck,
            Algorithm::Torus { dims },
        ];
        let kinds = [Kind::AllReduce, Kind::ReduceScatter, Kind::AllGather, Kind::AllToAll];
        for (algorithm, kind) in algorithms.iter().flat_map(|a| kinds.map(|k| (a, k))) {
            let Ok(collective) = Collective::new(kind, algorithm.clone(), 8) else { continue };
            let chunks = collective.contract().chunks as usize;
            let script = |member| Script::new(&collective.steps(member), chunks).0;
            let same = (1..8).all(|member| script(member) == script(0));
            assert!(same || !shares_script(&collective), "{algorithm:?} {kind}");
        }
    }
}
