//! How much of its time a run spends on steps that count, on hardware that fails at a given rate.
//!
//! The [`Coordinator`] and the choice among copies are those that ship. Steps between two losses are
//! one event, so that weeks of many thousand accelerators take seconds. A node stands for its
//! accelerators, which are lost together.

use std::collections::{BTreeSet, VecDeque};
use std::net::{Ipv4Addr, SocketAddr};

use checkpoint::store::simulated::Dice;
use units::{Rank, Seconds};

use super::{Action, Coordinator, End, Event, Policy, Seat};
use crate::copies::{Copies, Holding, agree};

/// A run and what goes wrong in it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Campaign {
    /// Nodes that train.
    pub nodes: u32,
    /// Interruptions of one node in a day.
    pub failures_per_node_day: f64,
    /// Share of them that take one node only; the others take the one that keeps its copy as well.
    pub single: f64,
    /// Share of them that are only noticed by silence.
    pub silent: f64,
    /// How long the run is watched.
    pub days: f64,
    /// A step, with all that it does besides.
    pub step: Seconds,
    /// Steps between copies in the memory of other nodes; 0 makes none.
    pub copy_every: u64,
    /// Steps between checkpoints.
    pub save_every: u64,
    /// How long training stands still for a checkpoint.
    pub save_stall: Seconds,
    /// Nodes that wait to replace others; there is always one if not given.
    pub spare_nodes: Option<u32>,
    /// Until a node that was lost is a spare.
    pub repair: Seconds,
    /// From the start of a process, on a spare node if need be, to its first word.
    pub start: Seconds,
    /// From the last word to all ranks being connected.
    pub meet: Seconds,
    /// How long the state takes from memory to memory.
    pub from_memory: Seconds,
    /// And from a checkpoint.
    pub from_checkpoint: Seconds,
    /// When the coordinator takes a silent rank for dead.
    pub silence: Seconds,
    /// Decides when and where.
    pub seed: u64,
}

/// Where the time went.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
pub struct Goodput {
    /// Steps that counted, over all time.
    pub goodput: f64,
    /// Interruptions.
    pub interruptions: u64,
    /// How many of them went back to a checkpoint.
    pub from_checkpoint: u64,
    /// All time.
    pub time_s: Seconds,
    /// In steps that counted.
    pub training_s: Seconds,
    /// In steps that were done again, or cut short.
    pub lost_work_s: Seconds,
    /// Until a loss was noticed.
    pub detection_s: Seconds,
    /// For a spare node.
    pub waiting_s: Seconds,
    /// Until all ranks were there again.
    pub restart_s: Seconds,
    /// Until they had their state.
    pub restore_s: Seconds,
    /// In the stalls of checkpoints.
    pub saving_s: Seconds,
}

const DAY: f64 = 86_400.0;
/// From the end of a process until the coordinator and the other ranks know: a socket closes.
const CLOSING: f64 = 0.1;
/// How often the coordinator looks at its clock.
const LOOK: f64 = 0.05;

struct Run {
    campaign: Campaign,
    dice: Dice,
    coordinator: Coordinator,
    incarnations: Vec<u64>,
    copies: Vec<Copies<()>>,
    now: f64,
    next_fault: f64,
    /// When nodes that were lost are spares.
    away: VecDeque<f64>,
    /// When there is a node for every process that is to be started.
    spare: f64,
    done: u64,
    spent: Goodput,
}

/// Plays a campaign.
#[must_use]
pub fn goodput(campaign: Campaign) -> Goodput {
    let policy = Policy {
        ranks: campaign.nodes,
        fewer: vec![],
        patience: Seconds(f64::INFINITY),
        seats_per_host: campaign.nodes,
        // Whoever runs so many nodes has losses during recoveries, and goes on.
        restarts: u32::MAX,
        silence: campaign.silence,
        // Until there is a node for it, and then as long as it takes.
        start: Seconds(f64::INFINITY),
        back_off: Seconds(0.5),
        lease: Seconds(f64::INFINITY),
        fence: Seconds(f64::INFINITY),
    };
    let nodes = campaign.nodes as usize;
    let mut run = Run {
        campaign,
        dice: Dice::new(campaign.seed),
        coordinator: Coordinator::new(policy, 0, Seconds::ZERO),
        incarnations: vec![0; nodes],
        copies: vec![Copies::default(); nodes],
        now: 0.0,
        next_fault: 0.0,
        away: VecDeque::new(),
        spare: 0.0,
        done: 0,
        spent: Goodput::default(),
    };
    run.hear(Event::Joined { host: 0 });
    run.next_fault = run.pause();
    run.go();
    let Goodput { time_s, training_s, .. } = run.spent;
    Goodput { goodput: training_s / time_s, ..run.spent }
}

impl Run {
    /// A share of the dice's range, above 0.
    fn chance(&mut self) -> f64 {
        (self.dice.roll() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// The time to the next fault of any node: exponential.
    fn pause(&mut self) -> f64 {
        let Campaign { nodes, failures_per_node_day, .. } = self.campaign;
        -(1.0 - self.chance()).ln() * DAY / (failures_per_node_day * f64::from(nodes))
    }

    fn go(&mut self) {
        let end = self.campaign.days * DAY;
        while self.now < end {
            self.train(self.next_fault.min(end));
            if self.now < end {
                self.interrupt();
            }
        }
        self.spent.time_s = Seconds(self.now);
        self.spent.training_s = Seconds(self.done as f64 * self.campaign.step.0);
        let parts = [
            self.spent.training_s,
            self.spent.detection_s,
            self.spent.waiting_s,
            self.spent.restart_s,
            self.spent.restore_s,
            self.spent.saving_s,
        ];
        self.spent.lost_work_s = self.spent.time_s - parts.into_iter().sum();
    }

    /// Trains until a moment, or as near to it as whole steps go.
    fn train(&mut self, until: f64) {
        let Campaign { step, copy_every, save_every, save_stall, .. } = self.campaign;
        let per_step = step.0 + save_stall.0 / save_every as f64;
        let steps = ((until - self.now) / per_step).max(0.0) as u64;
        let before = self.done;
        self.done += steps;
        let saves = self.done / save_every - before / save_every;
        self.spent.saving_s += Seconds(saves as f64 * save_stall.0);
        self.now = until;
        if copy_every == 0 {
            return;
        }
        // The newest copy is on its way to its keeper when the fault strikes, as likely as not.
        let newest = self.done / copy_every;
        let arrived = newest - u64::from(newest > 0 && self.dice.one_in(2));
        for number in newest.saturating_sub(2).max(before / copy_every)..=newest {
            self.copy(number * copy_every, number <= arrived);
        }
    }

    /// Every node keeps a copy of its part, and, if it has arrived, of its ward's.
    fn copy(&mut self, step: u64, arrived: bool) {
        let ranks = self.campaign.nodes;
        for (rank, copies) in (0..).zip(&mut self.copies) {
            let holding = |of| Holding { step, ranks, of: Rank(of) };
            copies.keep_own(holding(rank), ());
            if arrived {
                copies.keep_ward(holding((rank + ranks - 1) % ranks), ());
            }
        }
    }

    fn ranks(&self) -> impl Iterator<Item = Rank> + use<> {
        (0..self.campaign.nodes).map(Rank)
    }

    /// The run's time goes on, and is spent on something.
    fn spend(&mut self, time: f64, on: fn(&mut Goodput) -> &mut Seconds) {
        self.now += time;
        *on(&mut self.spent) += Seconds(time);
    }

    fn hear(&mut self, event: Event) -> Vec<Action> {
        self.coordinator.hear(Seconds(self.now), event)
    }

    /// From a loss to the next step. Those that are left are ready long before the new ones are.
    fn interrupt(&mut self) {
        self.ranks().for_each(|rank| drop(self.say_alive(rank)));
        let mut up = self.lose();
        while self.next_fault < up + self.campaign.meet.0 {
            self.wait_until(self.next_fault);
            self.ranks().for_each(|rank| drop(self.say_alive(rank)));
            up = up.max(self.lose());
        }
        self.wait_until(up);
        self.meet();
        self.spend(self.campaign.meet.0, |spent| &mut spent.restart_s);
        self.recover();
    }

    /// Processes are being started, or wait for a node.
    fn wait_until(&mut self, at: f64) {
        let for_nodes = self.spare.min(at) - self.now;
        self.spend(for_nodes.max(0.0), |spent| &mut spent.waiting_s);
        self.spend((at - self.now).max(0.0), |spent| &mut spent.restart_s);
    }

    /// A random node has a fault, of which the coordinator makes what it does; until when the
    /// processes that are started in its place, and in that of whoever is lost with it, have come up.
    fn lose(&mut self) -> f64 {
        self.spent.interruptions += 1;
        self.next_fault = self.now + self.pause();
        let rank = Rank(self.dice.below(self.campaign.nodes.into()) as u32);
        if self.chance() < self.campaign.silent {
            self.wait_for_silence(rank);
        }
        self.spend(CLOSING, |spent| &mut spent.detection_s);
        let up = self.replace(rank);
        let keeper = Rank((rank.0 + 1) % self.campaign.nodes);
        if self.chance() < self.campaign.single { up } else { up.max(self.replace(keeper)) }
    }

    /// A node is lost, and its memory with its processes; until when another has come up in its place.
    fn replace(&mut self, rank: Rank) -> f64 {
        self.copies[rank.index()] = Copies::default();
        let incarnation = self.incarnations[rank.index()];
        let seat = Seat(rank.0);
        let mut actions = self.hear(Event::Ended { seat, incarnation, end: End::Lost });
        let incarnation = incarnation + 1;
        while !actions.contains(&Action::Start { seat, incarnation }) {
            let next = self.coordinator.deadline().map_or(self.now, |at| at.0);
            self.spend((next - self.now).max(1e-3), |spent| &mut spent.restart_s);
            self.all_but(rank, |run, rank| drop(run.say_alive(rank)));
            actions = self.hear(Event::Tick);
        }
        self.incarnations[rank.index()] = incarnation;
        let from = self.next_spare();
        self.spare = self.spare.max(from);
        from + self.campaign.start.0
    }

    /// A node goes to be repaired; when there is another.
    fn next_spare(&mut self) -> f64 {
        let Campaign { spare_nodes, repair, .. } = self.campaign;
        let Some(spares) = spare_nodes else { return self.now };
        while self.away.front().is_some_and(|back| *back <= self.now) {
            self.away.pop_front();
        }
        self.away.push_back(self.now + repair.0);
        let first = (self.away.len() > spares as usize).then(|| self.away.pop_front()).flatten();
        first.unwrap_or(self.now)
    }

    /// Time passes until the coordinator kills a rank that says nothing.
    fn wait_for_silence(&mut self, rank: Rank) {
        self.say_alive(rank);
        self.spend(self.campaign.silence.0 + LOOK, |spent| &mut spent.detection_s);
        self.all_but(rank, |run, rank| drop(run.say_alive(rank)));
        let incarnation = self.incarnations[rank.index()];
        let killed = self.hear(Event::Tick);
        assert!(
            killed.contains(&Action::Kill { seat: Seat(rank.0), incarnation }),
            "{rank} lives on: {killed:?}"
        );
    }

    fn say_alive(&mut self, rank: Rank) -> Vec<Action> {
        let (incarnation, step) = (self.incarnations[rank.index()], self.done);
        let (seat, asked) = (Seat(rank.0), Seconds::ZERO);
        self.hear(Event::Alive { seat, incarnation, step, asked })
    }

    fn all_but(&mut self, one: Rank, mut act: impl FnMut(&mut Self, Rank)) {
        self.ranks().filter(|rank| *rank != one).for_each(|rank| act(self, rank));
    }

    /// All ranks are ready, and the coordinator has them meet.
    fn meet(&mut self) {
        let address: SocketAddr = (Ipv4Addr::LOCALHOST, 1).into();
        let mut actions = Vec::new();
        for rank in self.ranks() {
            let (incarnation, step) = (self.incarnations[rank.index()], self.done);
            actions = self.hear(Event::Ready { seat: Seat(rank.0), incarnation, address, step });
        }
        let met = actions.iter().filter(|action| matches!(action, Action::Meet { .. })).count();
        assert_eq!(met, self.campaign.nodes as usize, "all are told where to meet");
    }

    /// All go on from what they hold together, or else from the last checkpoint.
    fn recover(&mut self) {
        let holdings: Vec<BTreeSet<Holding>> = self.copies.iter().map(Copies::holdings).collect();
        match agree(&holdings) {
            Some((step, _)) => {
                self.done = step;
                self.spend(self.campaign.from_memory.0, |spent| &mut spent.restore_s);
            }
            None => {
                self.spent.from_checkpoint += 1;
                self.done -= self.done % self.campaign.save_every;
                self.spend(self.campaign.from_checkpoint.0, |spent| &mut spent.restore_s);
            }
        }
        if self.campaign.copy_every > 0 {
            self.copy(self.done, true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn campaign() -> Campaign {
        Campaign {
            nodes: 64,
            failures_per_node_day: 0.2,
            single: 1.0,
            silent: 0.1,
            days: 3.0,
            step: Seconds(10.0),
            copy_every: 1,
            save_every: 100,
            save_stall: Seconds(1.0),
            spare_nodes: None,
            repair: Seconds(DAY),
            start: Seconds(30.0),
            meet: Seconds(5.0),
            from_memory: Seconds(2.0),
            from_checkpoint: Seconds(60.0),
            silence: Seconds(60.0),
            seed: 1,
        }
    }

    /// Each loss costs a start, a meeting, the state, and on average half a step of work that is cut
    /// short and half a step that is done again.
    #[test]
    fn what_losses_cost_is_what_they_take() {
        let found = goodput(campaign());
        let expected = 64.0 * 0.2 * 3.0;
        let interruptions = found.interruptions as f64;
        assert!((interruptions / expected - 1.0).abs() < 0.4, "{found:?}");
        let each = 30.0 + 5.0 + 2.0 + 0.1 * 60.0 + 0.1 + 5.0 + 5.0;
        let lost = found.time_s.0 - found.training_s.0 - found.saving_s.0;
        assert!((lost / (interruptions * each) - 1.0).abs() < 0.3, "{found:?}");
    }

    #[test]
    fn without_copies_every_loss_goes_back_to_a_checkpoint() {
        let (with, without) =
            (goodput(campaign()), goodput(Campaign { copy_every: 0, ..campaign() }));
        assert_eq!(without.from_checkpoint, without.interruptions);
        assert!(with.from_checkpoint < with.interruptions / 4);
        // Half of 100 steps each time.
        let lost = without.lost_work_s.0 / without.interruptions as f64;
        assert!((300.0..700.0).contains(&lost), "{lost}");
        assert!(with.goodput > without.goodput);
    }

    /// A copy is of no use when it is lost with what it is a copy of.
    #[test]
    fn losses_of_two_nodes_go_back_to_a_checkpoint() {
        let found = goodput(Campaign { single: 0.75, ..campaign() });
        let share = found.from_checkpoint as f64 / found.interruptions as f64;
        assert!((0.1..0.4).contains(&share), "{found:?}");
    }

    /// With as many spares as nodes are away on average, waiting is rare; with none, every loss waits for
    /// its repair.
    #[test]
    fn spares_bound_the_waiting() {
        let with = |nodes| {
            let repair = Seconds(DAY / 4.0);
            goodput(Campaign { spare_nodes: Some(nodes), repair, days: 30.0, ..campaign() })
        };
        let waited = |found: Goodput| found.waiting_s / found.time_s;
        assert!(waited(with(0)) > 0.7);
        assert!(waited(with(12)) < 0.01);
        assert_eq!(with(1000).waiting_s, Seconds::ZERO);
        let Goodput { time_s, training_s, lost_work_s, .. } = with(0);
        assert!(lost_work_s > Seconds::ZERO && training_s < time_s);
    }
}
