//! Where the time of a step went.

use std::collections::BTreeMap;

use program::{
    Axis, Breakdown, Instruction, Lane, Meetings, Party, Program, Span, Ticket, Trace, Work,
};
use serde::Serialize;
use units::{Rank, Seconds};

/// The time of a step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Until the last rank was done.
    #[serde(rename = "step_time_s")]
    pub step_time: Seconds,
    /// Of each rank, in order; or of each class of ranks that do the same, all of one size.
    pub ranks: Vec<Breakdown>,
    /// The mean over the ranks.
    pub mean: Breakdown,
}

impl Summary {
    /// Sums up `trace`, which is of one step of `program`, predicted or measured.
    ///
    /// # Panics
    /// When the trace is of another program.
    #[must_use]
    pub fn new(program: &Program, trace: &Trace) -> Self {
        let transfers = Transfers::new(program, trace);
        let mut ranks = vec![Breakdown::default(); program.mesh.ranks() as usize];
        for span in &trace.spans {
            let rank = &mut ranks[span.rank.index()];
            match span.lane {
                Lane::Compute => compute(program, span, rank),
                Lane::Wait => transfers.attribute(span, rank),
                Lane::Transfer => {}
            }
        }
        transfers.attribute_hidden(&mut ranks);
        let step_time = trace.duration();
        for rank in &mut ranks {
            rank.other = rank.rest_of(step_time);
        }
        Self::of(step_time, ranks)
    }

    /// Sums up a step of which the time of each rank, or of each class of ranks, is known.
    #[must_use]
    pub fn of(step_time: Seconds, ranks: Vec<Breakdown>) -> Self {
        Self { step_time, mean: Breakdown::mean(&ranks), ranks }
    }
}

fn compute(program: &Program, span: &Span, rank: &mut Breakdown) {
    let time = span.end - span.start;
    let instruction = &program.instructions(span.rank)[span.instruction as usize];
    rank.compute += time;
    if let Some(work) = Work::of(instruction) {
        *rank.work.entry(work).or_default() += time;
    }
}

/// The transfers of a step, by rank and index of the post.
struct Transfers<'a> {
    program: &'a Program,
    /// The post of each ticket, by class.
    posts: Vec<BTreeMap<Ticket, u32>>,
    spans: BTreeMap<(Rank, u32), Span>,
    /// When the last party had posted.
    met: BTreeMap<(Rank, u32), Seconds>,
}

impl<'a> Transfers<'a> {
    fn new(program: &'a Program, trace: &Trace) -> Self {
        let transfers = trace.spans.iter().filter(|span| span.lane == Lane::Transfer);
        let mut this = Self {
            program,
            posts: program.classes.iter().map(|list| posts(list)).collect(),
            spans: transfers.map(|span| ((span.rank, span.instruction), *span)).collect(),
            met: BTreeMap::new(),
        };
        let mut meetings = Meetings::new(program.mesh);
        for rank in (0..program.mesh.ranks()).map(Rank) {
            for party in parties(program, rank) {
                let parties = meetings.post(party).unwrap_or_default();
                this.meet(&parties);
            }
        }
        this
    }

    /// Notes when the last of the parties posted.
    fn meet(&mut self, parties: &[Party]) {
        let keys: Vec<_> =
            parties.iter().map(|party| (party.rank, self.post(party.rank, party.ticket))).collect();
        let started = keys.iter().filter_map(|key| Some(self.spans.get(key)?.start));
        let last = started.fold(Seconds::ZERO, Seconds::max);
        self.met.extend(keys.into_iter().map(|key| (key, last)));
    }

    fn post(&self, rank: Rank, ticket: Ticket) -> u32 {
        let class = self.program.mesh.coordinate(rank, Axis::Pipeline);
        self.posts[class as usize][&ticket]
    }

    /// Splits a wait at the time when the last party had posted.
    fn attribute(&self, wait: &Span, rank: &mut Breakdown) {
        let list = self.program.instructions(wait.rank);
        let awaited = match &list[wait.instruction as usize] {
            Instruction::Wait { ticket } => Some(self.post(wait.rank, *ticket)),
            _ => self.oldest_under_way(wait),
        };
        let Some(Instruction::Post { transfer, .. }) = awaited.map(|post| &list[post as usize])
        else {
            // A held-up post of which the trace does not tell why.
            return;
        };
        let met = awaited.and_then(|post| self.met.get(&(wait.rank, post)).copied());
        let split = met.unwrap_or_default().0.clamp(wait.start.0, wait.end.0);
        rank.bubble += Seconds(split) - wait.start;
        *rank.exposed.entry(transfer.axis).or_default() += wait.end - Seconds(split);
    }

    /// What of the time that transfers of an axis were under way did not hold the rank up. Spans
    /// are visited by rank and post; those of one axis overlap when several peers are talked to.
    fn attribute_hidden(&self, ranks: &mut [Breakdown]) {
        let mut under_way: BTreeMap<(Rank, Axis), Vec<(Seconds, Seconds)>> = BTreeMap::new();
        for ((rank, post), span) in &self.spans {
            let list = self.program.instructions(*rank);
            if let Instruction::Post { transfer, .. } = &list[*post as usize]
                && let Some(met) = self.met.get(&(*rank, *post))
            {
                under_way.entry((*rank, transfer.axis)).or_default().push((*met, span.end));
            }
        }
        for ((rank, axis), intervals) in under_way {
            let breakdown = &mut ranks[rank.index()];
            let exposed = breakdown.exposed.get(&axis).copied().unwrap_or_default();
            let hidden = (union(intervals) - exposed).max(Seconds::ZERO);
            breakdown.hidden.insert(axis, hidden);
        }
    }

    /// What a post waits for while the window is full.
    fn oldest_under_way(&self, wait: &Span) -> Option<u32> {
        let earlier = (wait.rank, 0)..(wait.rank, wait.instruction);
        let mut under_way = self.spans.range(earlier);
        let oldest = under_way.find(|(_, span)| span.end > wait.start);
        oldest.map(|((_, post), _)| *post)
    }
}

/// The time that at least one of the intervals covers.
fn union(mut intervals: Vec<(Seconds, Seconds)>) -> Seconds {
    intervals.sort_by(|a, b| a.0.0.total_cmp(&b.0.0));
    let (mut covered, mut until) = (Seconds::ZERO, Seconds::ZERO);
    for (start, end) in intervals {
        covered += (end - start.max(until)).max(Seconds::ZERO);
        until = until.max(end);
    }
    covered
}

fn posts(list: &[Instruction]) -> BTreeMap<Ticket, u32> {
    let post = |(index, instruction): (usize, &Instruction)| match instruction {
        Instruction::Post { ticket, .. } => Some((*ticket, index as u32)),
        _ => None,
    };
    list.iter().enumerate().filter_map(post).collect()
}

fn parties(program: &Program, rank: Rank) -> impl Iterator<Item = Party> {
    let party = move |instruction: &Instruction| match *instruction {
        Instruction::Post { ticket, transfer } => Some(Party { rank, ticket, transfer }),
        _ => None,
    };
    program.instructions(rank).iter().filter_map(party)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{program, trace};

    #[test]
    fn a_wait_is_bubble_until_the_sender_posts_and_communication_from_then_on() {
        let summary = Summary::new(&program(), &trace());
        assert_eq!(summary.step_time, Seconds(10.0));
        let receiver = &summary.ranks[2];
        assert_eq!(receiver.compute, Seconds(3.0));
        assert_eq!(receiver.bubble, Seconds(2.0));
        assert_eq!(receiver.exposed[&Axis::Pipeline], Seconds(0.5));
        assert_eq!(receiver.other, Seconds(4.5));
    }

    #[test]
    fn a_wait_for_a_collective_belongs_to_its_axis() {
        let summary = Summary::new(&program(), &trace());
        let first = &summary.ranks[0];
        assert_eq!(first.exposed[&Axis::Data], Seconds(5.0));
        assert_eq!(first.bubble, Seconds(1.0), "rank 1 posts a second later");
        assert_eq!(first.exposed_communication(), Seconds(5.0));
    }

    #[test]
    fn a_transfer_behind_compute_is_hidden() {
        let summary = Summary::new(&program(), &trace());
        let first = &summary.ranks[0];
        assert_eq!(first.hidden[&Axis::Pipeline], Seconds(0.5), "nothing waited for the send");
        assert_eq!(first.hidden[&Axis::Data], Seconds::ZERO);
        assert_eq!(summary.ranks[2].hidden[&Axis::Pipeline], Seconds::ZERO);
        let parts: Seconds = first.work.values().copied().sum();
        assert_eq!(parts, first.compute);
    }

    #[test]
    fn a_held_up_post_waits_for_the_oldest_transfer() {
        let summary = Summary::new(&program(), &trace());
        assert_eq!(summary.ranks[1].exposed[&Axis::Pipeline], Seconds(0.5));
    }

    #[test]
    fn the_mean_is_over_all_ranks() {
        let summary = Summary::new(&program(), &trace());
        assert_eq!(summary.mean.compute, Seconds(2.5));
        let total: Seconds = summary.ranks.iter().map(|rank| rank.bubble).sum();
        assert_eq!(summary.mean.bubble, total * 0.25);
    }

    #[test]
    fn keys_carry_their_units() {
        let json = serde_json::to_value(Summary::new(&program(), &trace())).unwrap();
        assert_eq!(json["step_time_s"], 10.0);
        assert_eq!(json["ranks"][0]["exposed_communication_s"]["data"], 5.0);
    }
}
