//! What the fabric makes of traffic between domains: uplinks with less bandwidth than the ports
//! below them, and flows that collide on them.

use cluster::{Cluster, Fabric, Routing, Shape, Tier};

use units::Seconds;

use super::collisions;
use super::geometry::{Group, Slowdown};

/// How many times longer the group's bytes take on the fabric than over its ports alone, when all
/// groups like it are at it at once.
pub(super) fn slowdown(cluster: &Cluster, group: &Group) -> Slowdown {
    let Some(fabric) = cluster.fabric.as_ref().filter(|_| group.domains > 1) else {
        return Slowdown { neighbours: 1.0, everyone: 1.0 };
    };
    let leaves = group.blocks(fabric.tiers[0].reach);
    let of = |leaving: &dyn Fn(u32) -> f64| {
        let full = oversubscribed(fabric, group.tier, cluster.domain.accelerators, leaving);
        full.max(collided(cluster, fabric, group.tier, leaves, leaving))
    };
    let all = f64::from(group.ranks - group.per_domain);
    Slowdown {
        // A ring or a tree leaves a run of members once.
        neighbours: of(&|reach| 1.0 / group.domains_within(reach)),
        everyone: of(&|reach| (f64::from(group.ranks) - group.members_within(reach)) / all),
    }
}

/// What NCCL's latencies of a hop over the network hold for: InfiniBand, a tier further each, which
/// is `quantum2-ndr` of the catalogue.
const RECKONED: [Seconds; 3] = [Seconds(1.55e-6), Seconds(2.35e-6), Seconds(3.35e-6)];

/// What the fabric's latency adds to that of a collective, as NCCL reckons it: more than nothing
/// where the fabric is slower to answer than the one that NCCL was tuned on, less where it is
/// quicker. `hops` says how many follow one another between as many domains, or islands of them;
/// those between islands are taken to be the only ones that go up to the tier which joins those.
pub(super) fn distance(cluster: &Cluster, group: &Group, hops: impl Fn(f64) -> f64) -> Seconds {
    let Some(fabric) = cluster.fabric.as_ref().filter(|_| group.domains > 1) else {
        return Seconds::ZERO;
    };
    let mut below = f64::from(group.domains);
    let mut distance = Seconds::ZERO;
    for (index, tier) in fabric.tiers[..=group.tier].iter().enumerate() {
        let above = if index == group.tier { 1.0 } else { f64::from(group.blocks(tier.reach)) };
        let reckoned = RECKONED[index.min(RECKONED.len() - 1)];
        distance += (fabric.latency(index) - reckoned) * (hops(below) - hops(above)).max(0.0);
        below = above.min(below);
    }
    distance
}

/// The slowdown of messages from every rank to the one `stride` further.
pub(super) fn message_slowdown(cluster: &Cluster, tier: usize, stride: u32) -> f64 {
    let Some(fabric) = cluster.fabric.as_ref() else { return 1.0 };
    let leaving = |reach: u32| (f64::from(stride) / f64::from(reach)).min(1.0);
    let full = oversubscribed(fabric, tier, cluster.domain.accelerators, leaving);
    // A message waits for its own links only, not for those of every other leaf.
    full.max(collided(cluster, fabric, tier, 1, leaving))
}

/// The tightest level up to `tier`: the share of the traffic that leaves a group of the tier below
/// over the share of the ports' bandwidth that leads out of it.
fn oversubscribed(fabric: &Fabric, tier: usize, domain: u32, leaving: impl Fn(u32) -> f64) -> f64 {
    let mut oversubscription = 1.0;
    let mut below = domain;
    let mut slowest = 1.0_f64;
    for Tier { reach, oversubscription: here, .. } in &fabric.tiers[..=tier] {
        oversubscription *= here;
        slowest = slowest.max(oversubscription * leaving(below));
        below = *reach;
    }
    slowest
}

/// The fullest uplink of the leaves, in flows, over the flows that a port is spread over. Higher
/// tiers have many more paths and are left out.
fn collided(
    cluster: &Cluster,
    fabric: &Fabric,
    tier: usize,
    leaves: u32,
    leaving: impl Fn(u32) -> f64,
) -> f64 {
    let Routing::Ecmp { flows_per_pair } = fabric.routing else { return 1.0 };
    if tier == 0 {
        return 1.0;
    }
    let reach = fabric.tiers[0].reach;
    let sharing = if fabric.rails { cluster.per_node } else { fabric.accelerators_per_nic };
    let ports = f64::from((reach / sharing).max(1));
    let up: f64 = fabric.tiers[..2].iter().map(|tier| tier.oversubscription).product();
    let flows = ports * leaving(reach) * f64::from(flows_per_pair);
    let links = (ports / up).max(1.0);
    let fullest = collisions::fullest(flows.ceil() as u32, links as u32, leaves);
    (fullest / f64::from(flows_per_pair)).max(1.0)
}

/// What a rank can send into its domain to `others` members there: one link to a switch, or one to
/// each of them.
pub(super) fn port(cluster: &Cluster, others: u32) -> units::BytesPerSecond {
    let link = cluster.domain.shape.link().bandwidth;
    match cluster.domain.shape {
        Shape::Mesh(_) => link * f64::from(others.max(1)),
        Shape::Switched(_) | Shape::Torus { .. } => link,
    }
}
