//! What no method can beat: the fewest bytes that must pass a link, over its described bandwidth.

use cluster::Shape;
use collective::Kind;
use units::{Bytes, BytesPerSecond, Rank, Seconds};

use super::geometry::Group;
use super::{Estimate, Method, Network, fabric, gpus};

/// Rounding of whole bytes and of sums.
const TOLERANCE: f64 = 1e-6;

/// An answer below the limit is a bug in the model.
pub(super) fn assert_possible(
    network: &Network,
    group: &Group,
    kind: Kind,
    bytes: Bytes,
    estimate: &Estimate,
) {
    let least = least(network, group, kind, bytes, estimate.method);
    let alone = estimate.alone();
    assert!(
        alone.0 >= least.0 * (1.0 - TOLERANCE),
        "{kind} of {bytes} over {group:?} by {}: {alone} is less than physics' {least}",
        estimate.method,
    );
}

/// The same for a message.
pub(super) fn assert_message_possible(
    network: &Network,
    from: Rank,
    to: Rank,
    bytes: Bytes,
    estimate: &Estimate,
) {
    let cluster = network.cluster;
    let bandwidth = match &cluster.fabric {
        Some(fabric) if !cluster.same_domain(from, to) => fabric.nic.bandwidth,
        _ => cluster.domain.shape.link().bandwidth,
    };
    let (least, alone) = (bytes / bandwidth, estimate.alone());
    assert!(
        alone.0 >= least.0 * (1.0 - TOLERANCE),
        "{bytes} from {from} to {to}: {alone} is less than physics' {least}",
    );
}

/// Every member of a domain must send or receive what the others hold; every domain likewise.
fn least(network: &Network, group: &Group, kind: Kind, bytes: Bytes, method: Method) -> Seconds {
    let cluster = network.cluster;
    let others = |of: u32| (f64::from(of) - 1.0) / f64::from(of);
    // A switch that reduces takes every contribution once and gives every sum once.
    let phases = |reduced: bool| if kind == Kind::AllReduce && !reduced { 2.0 } else { 1.0 };
    let time =
        |share: f64, bandwidth: BytesPerSecond| Seconds(bytes.as_f64() * share / bandwidth.0);
    let near = group.per_domain;
    let link = cluster.domain.shape.link().bandwidth;
    let port = match &cluster.domain.shape {
        Shape::Torus { dims, .. } => link * (2.0 * dims.len() as f64),
        _ => fabric::port(cluster, near - 1),
    };
    let inside = time(phases(gpus::reduces_in_domain(method)) * others(near), port);
    let Some(fabric) = cluster.fabric.as_ref().filter(|_| group.domains > 1) else { return inside };
    let share = phases(gpus::reduces_in_network(method)) * others(group.domains) / f64::from(near);
    inside.max(time(share, fabric.nic.bandwidth))
}
