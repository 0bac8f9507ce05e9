//! All-reduce between hosts, for `bench/hosts`: as one rank of a launcher, or what the simulator
//! predicts.
//!
//!     hosts measure BYTES REPEATS             one line of JSON on rank 0
//!     hosts endless BYTES                     until it fails; what went wrong, on every rank
//!     hosts predict PER_HOST PER_RACK RANKS LINK_BYTES_PER_S UPLINK_BYTES_PER_S BYTES

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cluster::{Domain, Link, Routing, Shape, Tier, catalogue};
use collective::{Algorithm, Collective, Kind, Level};
use serde_json::json;
use sim::network::flow;
use train::Identity;
use transport::{Action, Communicator, Group, Limits, Operation, Rendezvous};
use units::{Bytes, BytesPerSecond, Rank, Seconds};

/// How long a host may be silent.
const SILENCE: Duration = Duration::from_secs(3);

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |index: usize| -> Result<f64, Box<dyn Error>> {
        Ok(arguments.get(index).ok_or("too few arguments")?.parse()?)
    };
    match arguments.first().map(String::as_str) {
        Some("measure") => measure(number(1)? as usize, number(2)? as usize),
        Some("endless") => endless(number(1)? as usize),
        Some("predict") => {
            let (per_host, per_rack, ranks) = (number(1)?, number(2)?, number(3)?);
            let rates = (number(4)?, number(5)?);
            predict(per_host as u32, per_rack as u32, ranks as u32, rates, number(6)? as u64)
        }
        _ => Err("say measure, endless or predict".into()),
    }
}

fn join() -> Result<Communicator, Box<dyn Error>> {
    let identity = Identity::read(&|name| std::env::var(name).ok())?.ok_or("no launcher")?;
    let Identity { rank, ranks, master, secret, .. } = identity;
    let timeout = Duration::from_secs(20);
    let (identity, shared_memory) = ("hosts".into(), true);
    let rendezvous = Rendezvous {
        rank,
        ranks,
        address: master,
        identity,
        secret,
        timeout,
        shared_memory,
        interface: None,
    };
    let limits = Limits { silence: SILENCE, ..Limits::default() };
    Ok(Communicator::new(Box::new(rendezvous.meet(None)?), limits)?)
}

/// Median times of an all-reduce by a ring and by what the communicator has found out about hosts.
fn measure(bytes: usize, repeats: usize) -> Result<(), Box<dyn Error>> {
    let mut communicator = join()?;
    let (own, ranks) = (communicator.rank(), communicator.ranks());
    let world = Group { id: 1, ranks: (0..ranks).map(Rank).collect() };
    let chosen = communicator.fitting(Kind::AllReduce, &world);
    let mut medians = Vec::new();
    for collective in [Collective::ring(Kind::AllReduce, ranks), chosen.clone()] {
        let part = Arc::new(collective.part(own.0));
        let mut times = Vec::new();
        for repeat in 0..=repeats {
            communicator.barrier(&world)?;
            let start = Instant::now();
            let action = Action::Collective(Arc::clone(&part));
            let buffer = vec![1.0; bytes / 4];
            let (group, label) = (world.clone(), "all-reduce".into());
            let ticket = communicator.post(Operation { group, action, buffer, label })?;
            let sums = communicator.wait(ticket)?.buffer;
            assert!(sums.iter().all(|sum| *sum == ranks as f32), "a wrong sum");
            communicator.barrier(&world)?;
            // The first fills the congestion window.
            times.extend((repeat > 0).then(|| Seconds(start.elapsed().as_secs_f64())));
        }
        medians.push(Seconds::median(times));
    }
    if own == Rank(0) {
        let chosen = chosen.algorithm().to_string();
        println!("{}", json!({"ring_s": medians[0], "chosen_s": medians[1], "chosen": chosen}));
    }
    Ok(())
}

fn endless(bytes: usize) -> Result<(), Box<dyn Error>> {
    let mut communicator = join()?;
    let (own, ranks) = (communicator.rank(), communicator.ranks());
    let world = Group { id: 1, ranks: (0..ranks).map(Rank).collect() };
    let part = Arc::new(communicator.fitting(Kind::AllReduce, &world).part(own.0));
    loop {
        let action = Action::Collective(Arc::clone(&part));
        let (group, label) = (world.clone(), "all-reduce".into());
        let buffer = vec![1.0; bytes / 4];
        let ticket = communicator.post(Operation { group, action, buffer, label })?;
        if let Err(error) = communicator.wait(ticket) {
            println!("{own}: {error}");
            return Ok(());
        }
    }
}

/// The same on links as described: a port for each host, and one for each rack where racks are smaller
/// than the whole.
fn predict(
    per_host: u32,
    per_rack: u32,
    ranks: u32,
    (link, uplink): (f64, f64),
    bytes: u64,
) -> Result<(), Box<dyn Error>> {
    let mut cluster = catalogue::find("dgx-h100-quantum2")?;
    let wire = |rate| Link { latency: Seconds(50e-6), bandwidth: BytesPerSecond(rate) };
    let shape = Shape::Switched(wire(MEMORY_BYTES_PER_S));
    cluster.accelerators = ranks;
    cluster.domain = Domain { accelerators: per_host, shape, in_network_reduction: None };
    let fabric = cluster.fabric.as_mut().ok_or("a cluster without a fabric")?;
    fabric.nic = wire(link);
    fabric.rails = false;
    fabric.routing = Routing::Spray;
    let tier = |reach, oversubscription| Tier { reach, oversubscription, latency: Seconds::ZERO };
    // All ranks of a host share its port.
    fabric.tiers = vec![tier(per_rack, f64::from(per_host))];
    let hosts_per_rack = per_rack / per_host;
    if per_rack < ranks {
        fabric.tiers.push(tier(ranks, f64::from(hosts_per_rack) * link / uplink));
    }
    let topology = flow::Topology::new(&cluster, ranks);
    let level = |ranks| Level { algorithm: Algorithm::Ring, ranks };
    let levels = vec![level(per_host), level(ranks / per_host)];
    let chosen = Collective::new(Kind::AllReduce, Algorithm::Hierarchy { levels }, ranks)?;
    let ring = Collective::ring(Kind::AllReduce, ranks);
    let time = |collective| {
        let ranks = (0..ranks).map(Rank).collect();
        let operation = flow::Operation { collective, ranks, bytes: Bytes(bytes), lane: 0 };
        flow::run(&topology, &[operation]).map(|report| report.time)
    };
    println!("{}", json!({"ring_s": time(ring)?, "chosen_s": time(chosen)?}));
    Ok(())
}

/// What a rank moves to another of its host, in bytes a second: so much more than any link that it
/// hardly counts.
const MEMORY_BYTES_PER_S: f64 = 2e9;
