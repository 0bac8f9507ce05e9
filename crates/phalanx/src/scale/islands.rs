//! Synchronization protocols beside each other, between islands that slow links join.
//!
//! An island is a part of the job that is joined as its cluster is; slow links join the islands.
//! Fully synchronous training sums gradients over them at every step: the program of hybrid
//! sharding, with the islands as its replicas. Local-update training (local SGD, `DiLoCo`) lets
//! each island train alone and averages their parameters every so many steps, at once or streamed
//! in fragments. What that does to the loss is not modelled.

use anyhow::{Context, Result, ensure};
use cluster::{Cluster, Routing, Tier};
use collective::Kind;
use plan::{Batch, lower};
use program::{Axis, Instruction, Program, Transfer};
use serde::Serialize;
use sim::Error;
use sim::network::{Group, Network};
use sim::step::{Costs, Step, TransferCost};
use units::{Bytes, Rank, Seconds};

use super::machine::Machine;
use super::section::IslandsSection;
use crate::described::Known;
use crate::job::Draft;
use crate::output::{percent, thousands};
use crate::plan_command::prove;

/// The drop of efficiency at which added latency is no longer tolerated.
const DROP: f64 = 0.05;
/// Added latency beyond which it is of no interest: nobody is so far away.
const FARTHEST: f64 = 1e4;
/// What streamed fragments are sent in: four bits a parameter (arXiv:2501.18512, section 2.4).
const STREAMED_BYTES: f64 = 0.5;
/// What averaged parameters are sent in otherwise: fp32, as arXiv:2311.08105.
const AVERAGED_BYTES: f64 = 4.0;

/// The protocols on one job.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    pub islands: u32,
    pub accelerators_per_island: u32,
    pub link_gbps: f64,
    pub latency_s: Seconds,
    /// Time of a step of an island alone.
    pub island_step_time_s: Seconds,
    pub protocols: Vec<Protocol>,
}

/// What a protocol costs.
#[derive(Debug, Clone, Serialize)]
pub struct Protocol {
    pub name: String,
    /// Bytes that leave an island for a step, on average.
    pub bytes_per_step: Bytes,
    /// How much longer a step takes than on an island alone, on average.
    pub exposed_s: Seconds,
    /// Throughput over that of islands that never talk.
    pub efficiency: f64,
    /// One-way latency, on top of the links' own, at which efficiency has dropped by 5 %; nothing
    /// where none that matters on earth does.
    pub tolerated_latency_s: Option<Seconds>,
}

/// The job on its islands, ready to be asked what a protocol takes.
struct Islands<'j> {
    section: &'j IslandsSection,
    machine: &'j Machine,
    size: u32,
    alone: Program,
    together: Program,
    step: Seconds,
}

/// Every protocol on the job's islands.
pub fn compare(draft: &Draft, section: &IslandsSection) -> Result<Comparison> {
    let job = draft.job();
    let machine = Machine::new(&job.cluster, job.training.precision, false)?;
    let islands = Islands::new(draft, section, &machine).context("[islands]")?;
    let protocols = [Manner::Synchronous, Manner::Local, Manner::Streaming, Manner::Never];
    let protocols = protocols.map(|kind| islands.protocol(kind));
    Ok(Comparison {
        islands: section.count,
        accelerators_per_island: islands.size,
        link_gbps: section.link_gbps,
        latency_s: section.latency_s,
        island_step_time_s: islands.step,
        protocols: protocols.into_iter().collect::<Result<_, _>>()?,
    })
}

/// How islands stay together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manner {
    /// Gradients are summed at every step.
    Synchronous,
    /// Parameters are averaged every so many steps, while training waits.
    Local,
    /// The same fragment by fragment, while training goes on.
    Streaming,
    /// Not at all.
    Never,
}

impl<'j> Islands<'j> {
    fn new(draft: &Draft, section: &'j IslandsSection, machine: &'j Machine) -> Result<Self> {
        let job = draft.job();
        let (count, all) = (section.count, job.cluster.accelerators);
        ensure!(count > 1 && all.is_multiple_of(count), "count = {count} does not divide {all}");
        ensure!(section.link_gbps > 0.0, "link_gbps must be more than 0");
        ensure!(
            section.outer_every > 0 && section.fragments > 0,
            "outer_every and fragments must be at least 1"
        );
        let batch = job.batch();
        let shared = batch.global_batch.is_multiple_of(u64::from(count));
        ensure!(shared, "count = {count} does not divide the batch of {}", batch.global_batch);
        let size = all / count;
        let own = Batch { global_batch: batch.global_batch / u64::from(count), ..batch };
        let layout = draft.layout_on(&job.cluster, size, &own)?;
        let alone = lower(&job.model, &layout, &own)?;
        let mut wide = layout;
        wide.mesh.data *= count;
        wide.mesh.replicas *= count;
        let together = lower(&job.model, &wide, &batch)?;
        [&alone, &together].into_iter().for_each(prove);
        let step =
            Step::new(&alone, &machine.costs(&alone)?)?.run()?.step_time + machine.outside(size);
        Ok(Self { section, machine, size, alone, together, step })
    }

    fn protocol(&self, kind: Manner) -> Result<Protocol, Error> {
        let time = self.time(kind, Seconds::ZERO)?;
        Ok(Protocol {
            name: self.name(kind),
            bytes_per_step: self.bytes(kind),
            exposed_s: time - self.step,
            efficiency: self.step / time,
            tolerated_latency_s: self.tolerated(kind, time)?,
        })
    }

    fn name(&self, kind: Manner) -> String {
        let IslandsSection { outer_every, fragments, overlap_steps, .. } = self.section;
        match kind {
            Manner::Synchronous => "fully synchronous".to_owned(),
            Manner::Local => format!("local updates, averaged every {outer_every} steps"),
            Manner::Streaming => format!(
                "the same streamed in {fragments} fragments of 4 bits, each within {overlap_steps} steps"
            ),
            Manner::Never => "no synchronization".to_owned(),
        }
    }

    fn parameters(&self) -> f64 {
        self.alone.blocks.values().sum::<u64>() as f64
    }

    /// What leaves an island for a step: a ring over the islands sends all but its share, twice.
    fn bytes(&self, kind: Manner) -> Bytes {
        let count = f64::from(self.section.count);
        let round = 2.0 * (count - 1.0) / count * self.parameters();
        let outer = f64::from(self.section.outer_every);
        Bytes(match kind {
            Manner::Synchronous => return self.summed(),
            Manner::Local => round * AVERAGED_BYTES / outer,
            Manner::Streaming => round * STREAMED_BYTES / outer,
            Manner::Never => 0.0,
        } as u64)
    }

    /// What the program of all islands sends along their axis.
    fn summed(&self) -> Bytes {
        let count = f64::from(self.section.count);
        let replicas = |instruction: &Instruction| match instruction {
            Instruction::Post { transfer, .. } if transfer.axis == Axis::Replica => {
                transfer.bytes().as_f64()
            }
            _ => 0.0,
        };
        let stage = |list: &Vec<Instruction>| list.iter().map(replicas).sum::<f64>();
        let ranks = f64::from(self.alone.mesh.stage_ranks());
        let all: f64 = self.together.classes.iter().map(stage).sum();
        Bytes((all * ranks * 2.0 * (count - 1.0) / count) as u64)
    }

    /// A step on average, with `added` latency on every way between islands.
    fn time(&self, kind: Manner, added: Seconds) -> Result<Seconds, Error> {
        let IslandsSection { outer_every, fragments, overlap_steps, .. } = *self.section;
        Ok(match kind {
            Manner::Never => self.step,
            Manner::Synchronous => self.synchronous(added)?,
            Manner::Local => {
                let outer = self.average(self.parameters() * AVERAGED_BYTES, added)?;
                self.step + outer * (1.0 / f64::from(outer_every))
            }
            Manner::Streaming => {
                let parts = f64::from(fragments);
                let part = self.average(self.parameters() * STREAMED_BYTES / parts, added)?;
                // Fragments follow one another: none has longer than until the next is due.
                let due = f64::from(outer_every) / parts;
                let steps = f64::from(overlap_steps).min(due);
                let exposed = (part - self.step * steps).max(Seconds::ZERO);
                self.step + exposed * (parts / f64::from(outer_every))
            }
        })
    }

    /// The average of so many bytes over all islands, every accelerator doing its share.
    fn average(&self, bytes: f64, added: Seconds) -> Result<Seconds, Error> {
        let far = Far::new(self, added)?;
        let share = Bytes((bytes / f64::from(self.size)) as u64);
        let cost = far.between(Kind::AllReduce, share)?;
        Ok(cost.latency + cost.wire.into_iter().fold(Seconds::ZERO, Seconds::max))
    }

    fn synchronous(&self, added: Seconds) -> Result<Seconds, Error> {
        let far = Far::new(self, added)?;
        Ok(Step::new(&self.together, &far)?.run()?.step_time
            + self.machine.outside(self.together.mesh.ranks()))
    }

    /// The added latency at which efficiency has dropped, found by bisection of its logarithm.
    fn tolerated(&self, kind: Manner, time: Seconds) -> Result<Option<Seconds>, Error> {
        let limit = time.0 / (1.0 - DROP);
        if self.time(kind, Seconds(FARTHEST))?.0 < limit {
            return Ok(None);
        }
        let (mut low, mut high) = (1e-7_f64.ln(), FARTHEST.ln());
        while high - low > 0.02 {
            let middle = f64::midpoint(low, high);
            let slow = self.time(kind, Seconds(middle.exp()))?.0 >= limit;
            if slow { high = middle } else { low = middle }
        }
        Ok(Some(Seconds(high.exp())))
    }
}

/// The costs of the program of all islands: inside one as on its own cluster, between them over
/// the slow links.
struct Far<'i> {
    islands: &'i Islands<'i>,
    inside: Known<'i>,
    joined: Cluster,
}

impl<'i> Far<'i> {
    fn new(islands: &'i Islands<'i>, added: Seconds) -> Result<Self, Error> {
        let inside = islands.machine.costs(&islands.alone)?;
        let joined = joined(islands.machine.cluster(), islands.size, islands.section, added);
        Ok(Self { islands, inside, joined })
    }

    /// A collective of accelerators of equal place, one on each island.
    fn between(&self, kind: Kind, bytes: Bytes) -> Result<TransferCost, Error> {
        let network = Network::new(&self.joined, &self.islands.together.mesh)?;
        let count = self.islands.section.count;
        let group = Group::new(&self.joined, Rank(0), self.islands.size, count);
        Ok(network.collective(&group, kind, bytes).cost)
    }
}

impl Costs for Far<'_> {
    fn compute(&self, _: &Program, class: usize, of: &Instruction) -> Result<Seconds, Error> {
        self.inside.compute(&self.islands.alone, class, of)
    }

    fn transfer(&self, _: &Program, class: usize, of: &Transfer) -> Result<TransferCost, Error> {
        if of.axis == Axis::Replica {
            let kind = match of.action {
                program::Action::Collective(kind) => kind,
                _ => Kind::AllReduce,
            };
            return self.between(kind, of.bytes());
        }
        let mut cost = self.inside.transfer(&self.islands.alone, class, of)?;
        if of.axis == Axis::World {
            cost.latency += self.between(Kind::AllReduce, Bytes(8))?.latency;
        }
        Ok(cost)
    }
}

/// The cluster as many times over as there are islands, with their links as the highest tier. What
/// an island's accelerators could send together is more than its link carries: that is the tier's
/// oversubscription.
fn joined(cluster: &Cluster, island: u32, section: &IslandsSection, added: Seconds) -> Cluster {
    let mut joined = cluster.clone();
    joined.accelerators = island * section.count;
    let Some(fabric) = &mut joined.fabric else { return joined };
    let last = fabric.tiers.last().copied();
    fabric.tiers.retain(|tier| tier.reach < island);
    let below: f64 = fabric.tiers.iter().map(|tier| tier.oversubscription).product();
    let latency = fabric.tiers.iter().map(|tier| tier.latency).sum::<Seconds>();
    let inside = last.map_or(Seconds::ZERO, |tier| tier.latency);
    fabric.tiers.push(Tier { reach: island, oversubscription: 1.0, latency: inside });
    let ports = fabric.nic.bandwidth.0 * f64::from(island);
    let oversubscription = (ports / (section.link_gbps * 1e9 / 8.0) / below).max(1.0);
    let own = (section.latency_s - fabric.nic.latency - latency - inside).max(Seconds::ZERO);
    fabric.tiers.push(Tier { reach: u32::MAX, oversubscription, latency: own + added });
    // Collisions are those of switches; a link between islands is one.
    fabric.routing = Routing::Adaptive;
    joined
}

impl Comparison {
    /// What is compared, in a sentence.
    pub fn describe(&self) -> String {
        format!(
            "synchronization: {} islands of {} accelerators, each joined by {} Gbit/s with {} one way; a step of an island alone takes {}; what local updates do to the loss is not modelled",
            self.islands,
            thousands(self.accelerators_per_island.into()),
            self.link_gbps,
            self.latency_s,
            self.island_step_time_s
        )
    }

    /// The head and a row for each protocol.
    pub fn rows(&self) -> Vec<Vec<String>> {
        let names = [
            "protocol",
            "leaves an island a step",
            "exposed a step",
            "efficiency",
            "5 % less at added latency of",
        ];
        let mut rows = vec![names.map(str::to_owned).to_vec()];
        rows.extend(self.protocols.iter().map(|one| {
            let tolerated = one.tolerated_latency_s;
            vec![
                one.name.clone(),
                one.bytes_per_step.to_string(),
                one.exposed_s.to_string(),
                percent(one.efficiency),
                tolerated.map_or("any".to_owned(), |latency| latency.to_string()),
            ]
        }));
        rows
    }
}
