use cluster::{Domain, Fabric, Link, Routing, Tier, catalogue};
use proptest::prelude::*;
use units::BytesPerSecond;

use super::*;

const GIB: Bytes = Bytes(1 << 30);

fn mesh(tensor: u32, context: u32, data: u32, pipeline: u32) -> Mesh {
    Mesh { tensor, context, data, pipeline, ..Mesh::ONE }
}

fn h100() -> Cluster {
    catalogue::find("dgx-h100-quantum2").unwrap()
}

/// Slices of a torus of these dims, with 50 GB/s and 1 us a link, joined by 12.5 GB/s.
fn torus(dims: &[u32], slices: u32) -> Cluster {
    let link = Link { latency: Seconds(1e-6), bandwidth: BytesPerSecond(50e9) };
    let chips = dims.iter().product();
    let mut cluster = h100();
    cluster.accelerators = chips * slices;
    cluster.per_node = 4;
    cluster.domain = Domain {
        accelerators: chips,
        shape: Shape::Torus { dims: dims.to_vec(), wrap: true, link },
        in_network_reduction: None,
    };
    let nic = Link { latency: Seconds(10e-6), bandwidth: BytesPerSecond(12.5e9) };
    let fabric = cluster.fabric.take().unwrap();
    let tiers = vec![Tier { reach: 1 << 20, oversubscription: 1.0, latency: Seconds::ZERO }];
    cluster.fabric = Some(Fabric { nic, tiers, rails: false, ..fabric });
    cluster
}

/// Ports of 50 GB/s below leaves of 16, pods of 3,072 and 1:7 above, as in Meta's cluster.
fn oversubscribed(routing: Routing) -> Cluster {
    let mut cluster = h100();
    cluster.accelerators = 24_576;
    let fabric = cluster.fabric.take().unwrap();
    let tier = |reach, oversubscription| Tier { reach, oversubscription, latency: Seconds(1e-6) };
    let tiers = vec![tier(16, 1.0), tier(3072, 1.0), tier(24_576, 7.0)];
    cluster.fabric = Some(Fabric { tiers, rails: false, routing, ..fabric });
    cluster
}

fn bus_bandwidth(estimate: &Estimate, ranks: f64, phases: f64) -> f64 {
    GIB.as_f64() / estimate.alone().0 * phases * (ranks - 1.0) / ranks / 1e9
}

#[test]
fn an_all_reduce_in_one_h100_node_is_as_fast_as_measured() {
    let cluster = h100();
    let network = Network::new(&cluster, &mesh(8, 1, 1, 1)).unwrap();
    let group = network.group(Rank(0), Axis::Tensor);
    let estimate = network.collective(&group, Kind::AllReduce, GIB);
    assert_eq!(estimate.method, Method::Nccl(Algorithm::Nvls, Protocol::Simple));
    // Public nccl-tests logs of DGX H100 show 470 to 480 GB/s of bus bandwidth.
    let bus = bus_bandwidth(&estimate, 8.0, 2.0);
    assert!((460.0..485.0).contains(&bus), "{bus}");
    assert_eq!(estimate.cost.wire[1], Seconds::ZERO);
}

#[test]
fn data_parallel_groups_of_one_rank_a_node_have_a_port_each() {
    let cluster = h100();
    let network = Network::new(&cluster, &mesh(8, 1, 64, 1)).unwrap();
    let group = network.group(Rank(3), Axis::Data);
    assert_eq!((group.domains, group.per_domain, group.tier), (64, 1, 1));
    let estimate = network.collective(&group, Kind::ReduceScatter, GIB);
    let bus = bus_bandwidth(&estimate, 64.0, 1.0);
    assert!((40.0..=50.0).contains(&bus), "{bus}: {estimate:?}");
    assert_eq!(estimate.bytes[0], Bytes::ZERO);
}

#[test]
fn groups_of_whole_nodes_load_their_ports_together() {
    let cluster = h100();
    let network = Network::new(&cluster, &mesh(1, 1, 64, 1)).unwrap();
    let estimate = network.collective(&network.group(Rank(0), Axis::Data), Kind::AllGather, GIB);
    let bus = bus_bandwidth(&estimate, 64.0, 1.0);
    assert!((300.0..=400.0).contains(&bus), "{bus}: {estimate:?}");
    let [domain, nic] = estimate.cost.wire;
    assert!(nic > domain && domain.0 > 0.5 * nic.0, "{estimate:?}");
}

#[test]
fn sharp_halves_what_passes_the_ports() {
    let cluster = h100();
    let plain = Network::new(&cluster, &mesh(1, 1, 256, 1)).unwrap();
    let group = plain.group(Rank(0), Axis::Data);
    let sharp = plain.clone().with_in_network_reduction(true);
    let [plain, sharp] = [plain, sharp].map(|n| n.collective(&group, Kind::AllReduce, GIB));
    assert!(
        sharp.alone() < plain.alone() && sharp.cost.latency < plain.cost.latency,
        "{plain:?} {sharp:?}"
    );
    assert!(sharp.bytes[1].0 * 2 <= plain.bytes[1].0 + plain.bytes[1].0 / 20);
}

#[test]
fn oversubscription_hurts_groups_with_few_members_below_it() {
    let cluster = oversubscribed(Routing::Adaptive);
    let near = Group::new(&cluster, Rank(0), 16, 512);
    let far = Group::new(&cluster, Rank(0), 3072, 8);
    let pod = Group::new(&cluster, Rank(0), 16, 192);
    let slowdown = |group: &Group| group.slowdown.neighbours;
    assert_eq!((pod.tier, near.tier, far.tier), (1, 2, 2));
    assert_eq!((slowdown(&pod), slowdown(&near), slowdown(&far)), (1.0, 1.0, 7.0));
    assert_eq!(fabric::message_slowdown(&cluster, 2, 3072), 7.0);
    assert_eq!(fabric::message_slowdown(&cluster, 1, 1024), 1.0);
    let everyone = near.slowdown.everyone;
    assert!((4.0..7.0).contains(&everyone), "{everyone}");
}

#[test]
fn flows_collide_unless_packets_are_spread() {
    let [one, many, spray] =
        [Routing::Ecmp { flows_per_pair: 1 }, Routing::Ecmp { flows_per_pair: 16 }, Routing::Spray]
            .map(|routing| fabric::message_slowdown(&oversubscribed(routing), 1, 64));
    assert!((2.5..3.5).contains(&one) && (1.2..1.7).contains(&many), "{one} {many}");
    assert_eq!(spray, 1.0);
}

#[test]
fn rings_over_all_dims_of_a_torus_fill_its_links() {
    let cluster = torus(&[4, 8, 16], 1);
    let network = Network::new(&cluster, &mesh(16, 1, 32, 1)).unwrap();
    let tensor = network.collective(&network.group(Rank(5), Axis::Tensor), Kind::AllGather, GIB);
    assert_eq!(tensor.method, Method::Torus(1));
    assert_eq!(tensor.cost.wire[0], Seconds(GIB.as_f64() * 15.0 / 16.0 / 100e9));
    assert_eq!(tensor.cost.latency, Seconds(8e-6));
    let data = network.collective(&network.group(Rank(5), Axis::Data), Kind::AllReduce, GIB);
    assert_eq!(data.method, Method::Torus(2));
    let expected = 2.0 * GIB.as_f64() * 31.0 / 32.0 / 200e9;
    assert!((data.cost.wire[0].0 - expected).abs() < 1e-12);
}

#[test]
fn parts_of_lines_have_no_way_around_and_strides_share_links() {
    let line = |members, stride, closed| torus::Line { members, stride, closed };
    assert_eq!(torus::lines(&[16, 16], true, 1, 4), [line(4, 1, false)]);
    assert_eq!(torus::lines(&[16, 16], true, 4, 4), [line(4, 4, true)]);
    assert_eq!(torus::lines(&[16, 16], true, 8, 8), [line(2, 8, true), line(4, 1, false)]);
    assert_eq!(torus::lines(&[4, 16], true, 1, 64), [line(16, 1, true), line(4, 1, true)]);
    assert_eq!(torus::lines(&[16], true, 3, 4), [line(4, 1, false)]);
}

#[test]
fn slices_reduce_inside_before_they_reduce_between() {
    let cluster = torus(&[16, 16], 4);
    let network = Network::new(&cluster, &mesh(1, 1, 1024, 1)).unwrap();
    let group = network.group(Rank(0), Axis::Data);
    assert_eq!((group.domains, group.per_domain), (4, 256));
    let estimate = network.collective(&group, Kind::AllReduce, GIB);
    assert_eq!(estimate.method, Method::Slices(2));
    let expected = 2.0 * GIB.as_f64() / 256.0 * 3.0 / 4.0 / 12.5e9;
    assert!((estimate.cost.wire[1].0 - expected).abs() < 1e-12, "{estimate:?}");
}

#[test]
fn a_mesh_that_does_not_fit_is_refused() {
    let cluster = torus(&[2, 2], 1);
    let error = Network::new(&cluster, &mesh(8, 1, 1, 1)).unwrap_err();
    assert!(matches!(error, Error::TooSmall { accelerators: 4, ranks: 8, .. }), "{error}");
}

#[test]
fn nothing_costs_nothing() {
    let cluster = h100();
    let network = Network::new(&cluster, &Mesh::ONE).unwrap();
    let group = network.group(Rank(0), Axis::Data);
    assert_eq!(network.collective(&group, Kind::AllReduce, GIB), Estimate::NOTHING);
    assert_eq!(network.message(Rank(0), Rank(0), GIB), Estimate::NOTHING);
}

/// Any cluster of the catalogue, and some that are not in it.
fn any_cluster() -> impl Strategy<Value = Cluster> {
    let known = prop::sample::select(catalogue::Kind::Cluster.names().collect::<Vec<_>>());
    prop_oneof![
        8 => known.prop_map(|name| catalogue::find(name).unwrap()),
        1 => Just(torus(&[4, 8, 8], 8)),
        1 => Just(oversubscribed(Routing::Ecmp { flows_per_pair: 4 })),
    ]
}

proptest! {
    /// Every answer asserts its own lower bound; here it is made to answer. More bytes may take less where
    /// the library chooses another algorithm for them, by a model that knows no collisions.
    #[test]
    fn no_answer_beats_physics_and_more_bytes_the_same_way_take_no_less(
        cluster in any_cluster(),
        powers in prop::array::uniform4(0_u32..4),
        rank in 0_u32..1024,
        bytes in 1_u64..1 << 34,
        sharp in any::<bool>(),
    ) {
        let [tensor, context, data, pipeline] = powers.map(|power| 1 << power);
        let mesh = mesh(tensor, context, data, pipeline);
        prop_assume!(mesh.ranks() <= cluster.accelerators);
        let network = Network::new(&cluster, &mesh).unwrap().with_in_network_reduction(sharp);
        let rank = Rank(rank % mesh.ranks());
        for axis in [Axis::Tensor, Axis::Context, Axis::Data, Axis::Pipeline, Axis::World] {
            let group = network.group(rank, axis);
            for kind in [Kind::AllReduce, Kind::AllGather, Kind::ReduceScatter] {
                let [less, more] =
                    [bytes, 2 * bytes].map(|bytes| network.collective(&group, kind, Bytes(bytes)));
                let [sooner, later] = [&less, &more].map(|of| of.alone().0);
                prop_assert!(sooner.is_finite() && later.is_finite());
                prop_assert!(
                    sooner <= later || less.method != more.method,
                    "{kind:?} on {axis:?}: {sooner} {later}"
                );
            }
            let exchanged = network.all_to_all(&group, Bytes(bytes));
            prop_assert!(exchanged.alone().0.is_finite());
            let peer = mesh.peer(rank, axis, 0);
            prop_assert!(network.message(rank, peer, Bytes(bytes)).alone().0.is_finite());
        }
    }
}
