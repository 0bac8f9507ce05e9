//! The best layouts of a job: searched by the closed form, the best of them simulated.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Result, bail};
use plan::estimate::Estimate;
use plan::memory::{DoesNotFit, Footprint, Options, StageMemory};
use plan::search::{Family, Found, Outcome, Problem, Progress, search};
use plan::{Layout, TensorOverlap, lower};
use program::{Breakdown, Placement};
use sim::step::Times;
use units::{Joules, Seconds};

use crate::described::{Costing, Described};
use crate::job::{Draft, Job};

/// Layouts that are simulated: of the fastest by the closed form, and more of them as long as it promises
/// less than the best simulated takes; and of those that no other beats in time, memory and energy at once.
const SIMULATED: usize = 24;
const MOST_SIMULATED: usize = 96;
const SIMULATED_OF_FRONT: usize = 16;
/// How much longer than the fastest a plan may take that is worth a look for its memory or energy.
const SLOWEST: f64 = 2.0;
/// Instructions of a program, over all classes, above which the closed form's word is taken: a
/// hundred megabytes, and a second.
const MOST_INSTRUCTIONS: f64 = 1e6;
/// Instructions of a microbatch in a layer, forward and backward, about.
const INSTRUCTIONS_PER_LAYER: f64 = 60.0;

/// No layout fits.
#[derive(Debug, thiserror::Error)]
#[error("none of {judged} layouts fits; of them all {layout} needs least: {reason}")]
pub struct NothingFits {
    judged: u64,
    layout: String,
    reason: DoesNotFit,
}

/// A layout with what is known of it.
#[derive(Debug, Clone)]
pub struct Plan {
    pub layout: Layout,
    /// By the closed form, with what stands outside of the program.
    pub estimate: Estimate,
    pub memory: StageMemory,
    /// By event simulation, where that was done.
    pub times: Option<Times>,
    /// At the wall, for a step; where the maker of the accelerator publishes a rating.
    pub energy: Option<Joules>,
    /// Share of the time of a long run that is training, by the job's `[goodput]`.
    pub effective: f64,
}

impl Plan {
    /// The time of a step, as well as it is known.
    pub fn step_time(&self) -> Seconds {
        self.times.as_ref().map_or(self.estimate.step_time, |times| times.step_time)
    }

    /// Where the time goes on average, where it was simulated.
    pub fn breakdown(&self) -> Option<Breakdown> {
        self.times.as_ref().map(|times| Breakdown::mean(&times.classes))
    }
}

/// What planning a job found.
#[derive(Debug)]
pub struct Planned {
    /// What was simulated, the fastest first.
    pub plans: Vec<Plan>,
    /// Of them, those that no other beats in time, memory, energy and goodput at once; by time.
    pub front: Vec<usize>,
    /// The best with other values of each key.
    pub neighbours: Vec<Neighbour>,
    /// The best with its axes in every order on the accelerators, the fastest first.
    pub placements: Vec<Plan>,
    /// The fastest of every family, by the closed form.
    pub outcome: Outcome,
}

/// Who is told how far planning is, and says whether to go on.
pub type Watch<'w> = &'w (dyn Fn(Progress) -> bool + Sync);

/// Plans jobs on one described cluster.
pub struct Planner<'a> {
    pub draft: &'a Draft,
    pub described: Described,
    pub threads: usize,
}

/// The fastest layout of a draft.
pub fn best_layout(draft: &Draft, costing: &Costing) -> Result<Layout> {
    let planner = Planner::new(draft, costing)?;
    let planned = planner.plan(&|_| true)?;
    Ok(planned.plans[0].layout.clone())
}

impl<'a> Planner<'a> {
    pub fn new(draft: &'a Draft, costing: &Costing) -> Result<Self> {
        let job = draft.job();
        let described = Described::new(&job.cluster, job.training.precision, costing)?;
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self { draft, described, threads })
    }

    fn job(&self) -> &Job {
        self.draft.job()
    }

    fn memory(&self) -> Options {
        Options::new(self.job().training.precision, &self.draft.given.simplest())
    }

    /// Searches, and simulates the best.
    ///
    /// # Errors
    /// [`NothingFits`], or hardware that has no price.
    pub fn plan(&self, watch: Watch) -> Result<Planned> {
        let job = self.job();
        let cluster = &self.described.roofline.cluster;
        // Where the calibration has what hides transfers of products, cutting products is not
        // reckoned besides.
        let cut =
            [TensorOverlap::WeightGradients, TensorOverlap::Pieces(2), TensorOverlap::Pieces(4)];
        let calibrated = self.described.calibration.is_some();
        let problem = Problem {
            config: &job.model,
            batch: job.batch(),
            ranks: job.cluster.accelerators,
            given: &self.draft.given,
            capacity: cluster.accelerator.memory,
            memory: self.memory(),
            domain: cluster.domain.accelerators,
            overlaps: if calibrated { &cut[..1] } else { &cut },
        };
        let outcome = search(&problem, &self.described, self.threads, watch)
            .map_err(|error| anyhow::anyhow!(error))?;
        if outcome.families.is_empty() {
            return Err(self.nothing(&outcome, &problem));
        }
        let mut plans = self.simulated(&outcome)?;
        let mut neighbours = self.neighbours(&plans, &outcome.families)?;
        // Where the closed form was too careful, the way leads on from there.
        while let Some(better) = faster(&neighbours, plans[0].step_time()) {
            plans.insert(0, better.clone());
            neighbours = self.neighbours(&plans, &outcome.families)?;
        }
        let placements = self.placements(&plans[0])?;
        if let Some(better) =
            placements.first().filter(|best| best.step_time() < plans[0].step_time())
        {
            plans.insert(0, better.clone());
        }
        let front = front(&plans);
        Ok(Planned { plans, front, neighbours, placements, outcome })
    }

    /// A plan with its axes in every order on the accelerators, the fastest first; nothing where
    /// the order is given or makes no difference.
    fn placements(&self, plan: &Plan) -> Result<Vec<Plan>> {
        let cluster = &self.described.roofline.cluster;
        let alone = self.job().cluster.accelerators <= cluster.domain.accelerators;
        if self.draft.given.placement.is_some() || alone || plan.layout.mesh.expert > 1 {
            return Ok(vec![]);
        }
        let mut plans = Vec::new();
        for placement in Placement::ALL {
            let mut other = plan.clone();
            other.layout.mesh.placement = placement;
            plans.push(self.simulate(other)?);
        }
        plans.sort_by(|one, other| one.step_time().0.total_cmp(&other.step_time().0));
        Ok(plans)
    }

    fn nothing(&self, outcome: &Outcome, problem: &Problem) -> anyhow::Error {
        let Some((layout, _)) = &outcome.least else {
            // What is given divides nothing; the simplest completion says what.
            return self.draft.simplest().err().unwrap_or_else(|| {
                anyhow::anyhow!("[layout] what is given leaves no layout to choose from")
            });
        };
        let footprint = Footprint::new(problem.config);
        let Problem { batch, memory, capacity, .. } = problem;
        match footprint.fit(layout, batch, memory, *capacity) {
            Ok(_) => unreachable!("the search found that nothing fits"),
            Err(reason) => {
                let layout = crate::plan_report::short(layout);
                NothingFits { judged: outcome.judged, layout, reason }.into()
            }
        }
    }

    /// The best of every kind, simulated.
    fn simulated(&self, outcome: &Outcome) -> Result<Vec<Plan>> {
        let plans: Vec<Plan> = outcome.families.iter().map(|found| self.plan_of(found)).collect();
        let fastest = 0..plans.len().min(SIMULATED);
        let front = front(&plans);
        let step = front.len().div_ceil(SIMULATED_OF_FRONT).max(1);
        let mut chosen: BTreeSet<usize> = fastest.chain(front.into_iter().step_by(step)).collect();
        let mut more: Vec<usize> = chosen.iter().copied().collect();
        let mut simulated = Vec::new();
        while !more.is_empty() {
            simulated.extend(self.simulate_all(&plans, &more)?);
            simulated.sort_by(|(a, one), (b, other): &(usize, Plan)| {
                one.step_time().0.total_cmp(&other.step_time().0).then(a.cmp(b))
            });
            let best = simulated[0].1.step_time();
            let promises =
                |index: &usize| plans[*index].step_time() < best && !chosen.contains(index);
            more = (0..plans.len().min(MOST_SIMULATED)).filter(promises).take(SIMULATED).collect();
            chosen.extend(&more);
        }
        Ok(simulated.into_iter().map(|(_, plan)| plan).collect())
    }

    /// Those of the plans that are chosen, simulated, each with its place among them all.
    fn simulate_all(&self, plans: &[Plan], chosen: &[usize]) -> Result<Vec<(usize, Plan)>> {
        let next = AtomicUsize::new(0);
        let work = || {
            let mut done = Vec::new();
            while let Some(index) = chosen.get(next.fetch_add(1, Ordering::Relaxed)) {
                done.push((*index, self.simulate(plans[*index].clone())?));
            }
            Ok::<_, anyhow::Error>(done)
        };
        let shares: Result<Vec<_>> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..self.threads).map(|_| scope.spawn(work)).collect();
            workers.into_iter().map(|worker| worker.join().expect("no plan panics")).collect()
        });
        Ok(shares?.into_iter().flatten().collect())
    }

    /// Why not a little more or less of everything: the best of the other values of each key, simulated.
    fn neighbours(&self, plans: &[Plan], families: &[Found]) -> Result<Vec<Neighbour>> {
        let others = others(families, &Family::of(&plans[0].layout));
        let promising = |other: &Other| {
            let found = families.iter().find(|found| (other.has)(&Family::of(&found.layout)));
            let found = found.expect("a family has this value");
            let known = plans.iter().find(|plan| plan.layout == found.layout);
            known.cloned().unwrap_or_else(|| self.plan_of(found))
        };
        let mut promising: Vec<Plan> = others.iter().map(promising).collect();
        let unknown = |index: &usize| promising[*index].times.is_none();
        let unknown: Vec<usize> = (0..promising.len()).filter(unknown).collect();
        for (index, plan) in self.simulate_all(&promising, &unknown)? {
            promising[index] = plan;
        }
        let neighbour = |(Other { key, value, has }, plan): (Other, Plan)| {
            let known = plans.iter().find(|plan| has(&Family::of(&plan.layout)));
            let faster = known.filter(|known| known.step_time() <= plan.step_time());
            Neighbour { key, value, best: faster.cloned().unwrap_or(plan) }
        };
        Ok(others.into_iter().zip(promising).map(neighbour).collect())
    }

    fn plan_of(&self, found: &Found) -> Plan {
        let mut estimate = found.estimate;
        estimate.step_time += self.described.outside(found.layout.mesh.ranks());
        let layout = found.layout.clone();
        let memory = found.memory;
        let (ranks, held) = (layout.mesh.ranks(), memory.state());
        let effective = self.job().goodput.reliability(ranks, held).expected();
        let mut plan = Plan { layout, estimate, memory, times: None, energy: None, effective };
        plan.energy = self.energy(&plan);
        plan
    }

    fn simulate(&self, mut plan: Plan) -> Result<Plan> {
        let job = self.job();
        let microbatches = f64::from(plan.layout.microbatches(&job.batch()));
        let layers = f64::from(job.model.layers);
        if microbatches * layers * INSTRUCTIONS_PER_LAYER > MOST_INSTRUCTIONS {
            return Ok(plan);
        }
        let program = lower(&job.model, &plan.layout, &job.batch())?;
        plan.times = Some(self.described.times(&program)?);
        plan.energy = self.energy(&plan);
        Ok(plan)
    }

    fn energy(&self, plan: &Plan) -> Option<Joules> {
        let computing = plan.breakdown().map_or(plan.estimate.computing, |mean| mean.compute);
        let time = plan.step_time();
        let ranks = plan.layout.mesh.ranks();
        let cluster = &self.described.roofline.cluster;
        cluster.energy(ranks, time, computing / time).map(|energy| energy.facility)
    }

    /// Tokens a second and accelerator.
    pub fn rate(&self, plan: &Plan) -> f64 {
        let job = self.job();
        let tokens = job.training.sequence * job.training.global_batch;
        tokens as f64 / plan.step_time().0 / f64::from(plan.layout.mesh.ranks())
    }

    /// The same over a long run, with what goes wrong in it.
    pub fn goodput(&self, plan: &Plan) -> f64 {
        plan.effective * self.rate(plan)
    }

    /// Makes sure that the winner's program is sound.
    pub fn verify(&self, plan: &Plan) -> Result<()> {
        let job = self.job();
        let program = lower(&job.model, &plan.layout, &job.batch())?;
        if let Err(error) = program.verify() {
            bail!("the program of the best plan is not sound: {error}");
        }
        Ok(())
    }
}

/// The plans that no other beats in time, memory, energy and goodput at once, by time.
fn front(plans: &[Plan]) -> Vec<usize> {
    let figures = |plan: &Plan| {
        let energy = plan.energy.map_or(0.0, |energy| energy.0);
        let lost = plan.step_time().0 / plan.effective;
        [plan.step_time().0, plan.memory.total().as_f64(), energy, lost]
    };
    let figures: Vec<[f64; 4]> = plans.iter().map(figures).collect();
    let mut order: Vec<usize> = (0..plans.len()).collect();
    order.sort_by(|a, b| figures[*a][0].total_cmp(&figures[*b][0]).then(a.cmp(b)));
    let slowest = SLOWEST * order.first().map_or(0.0, |first| figures[*first][0]);
    order.retain(|index| figures[*index][0] <= slowest);
    let mut front: Vec<usize> = Vec::new();
    for index in order {
        // What comes before is at least as fast.
        let beats = |other: &usize| {
            let (one, other) = (figures[index], figures[*other]);
            (1..4).all(|figure| other[figure] <= one[figure])
        };
        if !front.iter().any(beats) {
            front.push(index);
        }
    }
    front
}

/// The fastest plan with another value of a key, all else free.
#[derive(Debug, Clone)]
pub struct Neighbour {
    pub key: &'static str,
    pub value: String,
    pub best: Plan,
}

/// The fastest of them, if that takes less than a limit.
fn faster(neighbours: &[Neighbour], limit: Seconds) -> Option<&Plan> {
    let plans = neighbours.iter().map(|neighbour| &neighbour.best);
    let best = plans.min_by(|one, other| one.step_time().0.total_cmp(&other.step_time().0));
    best.filter(|best| best.step_time() < limit)
}

/// A degree of a family of layouts.
type Degree = fn(&Family) -> u64;

/// Another value of a key, and which families have it.
struct Other {
    key: &'static str,
    value: String,
    has: Box<dyn Fn(&Family) -> bool>,
}

/// The next smaller and larger value of each degree, and all other words.
fn others(families: &[Found], best: &Family) -> Vec<Other> {
    let keys: [(&'static str, Degree); 6] = [
        ("tensor", |family| family.degrees[0].into()),
        ("context", |family| family.degrees[1].into()),
        ("expert", |family| family.degrees[2].into()),
        ("pipeline", |family| family.degrees[3].into()),
        ("virtual_stages", |family| family.virtual_stages.into()),
        ("micro_batch", |family| family.micro_batch),
    ];
    let mut others = Vec::new();
    for (key, of) in keys {
        let values: BTreeSet<u64> =
            families.iter().map(|found| of(&Family::of(&found.layout))).collect();
        let mine = of(best);
        let near = [values.range(..mine).next_back(), values.range(mine + 1..).next()];
        others.extend(near.into_iter().flatten().map(|&wanted| Other {
            key,
            value: wanted.to_string(),
            has: Box::new(move |family| of(family) == wanted),
        }));
    }
    let mut seen = BTreeSet::from([best.shard.0]);
    let mut recomputed = BTreeSet::from([best.recompute]);
    for Found { layout, .. } in families {
        let Family { shard, recompute, .. } = Family::of(layout);
        if seen.insert(shard.0) {
            let (value, has) = (
                crate::plan_report::shard(layout),
                Box::new(move |family: &Family| family.shard.0 == shard.0),
            );
            others.push(Other { key: "shard", value, has });
        }
        if recomputed.insert(recompute) {
            let (value, has) = (
                crate::plan_report::recompute(layout),
                Box::new(move |family: &Family| family.recompute == recompute),
            );
            others.push(Other { key: "recompute", value, has });
        }
    }
    others
}

#[cfg(test)]
mod tests {
    use super::*;

    const JOB: &str = r#"
[model]
name = "llama-3.1-8b"

[cluster]
name = "dgx-h100-quantum2"
accelerators = 16

[training]
sequence = 8192
global_batch = 16
precision = "bf16"

[layout]
context = 1
sequence_parallel = true
"#;

    #[test]
    fn what_is_found_does_not_depend_on_threads() {
        let draft = Draft::parse(JOB, "test").unwrap();
        let planned = |threads| {
            let planner = Planner { threads, ..Planner::new(&draft, &Costing::default()).unwrap() };
            let Planned { plans, front, outcome, .. } = planner.plan(&|_| true).unwrap();
            let plans: Vec<_> =
                plans.into_iter().map(|plan| (plan.layout, plan.times, plan.memory)).collect();
            (plans, front, outcome)
        };
        let alone = planned(1);
        assert!(alone.0.len() > 10);
        assert_eq!(alone, planned(3));
    }
}
