//! Which algorithm fits where the ranks of a group are.

use collective::{Algorithm, Collective, Kind, Level};

/// A ring inside each host and a ring between hosts, where as many neighbouring members are on each; else
/// one ring. `hosts` has each member's host by number.
pub(crate) fn fitting(kind: Kind, hosts: &[u32]) -> Collective {
    let ranks = hosts.len() as u32;
    let ring = |ranks| Level { algorithm: Algorithm::Ring, ranks };
    let hierarchy = even_runs(hosts).and_then(|(per_host, hosts)| {
        let levels = vec![ring(per_host), ring(hosts)];
        Collective::new(kind, Algorithm::Hierarchy { levels }, ranks).ok()
    });
    hierarchy.unwrap_or_else(|| Collective::ring(kind, ranks))
}

/// How many neighbouring members each host has, if that is several and the same on all, and how many
/// hosts there are, if there are several.
fn even_runs(hosts: &[u32]) -> Option<(u32, u32)> {
    let runs: Vec<_> = hosts.chunk_by(|a, b| a == b).collect();
    let first = runs.first()?.len();
    let mut distinct: Vec<_> = runs.iter().map(|run| run[0]).collect();
    distinct.sort_unstable();
    distinct.dedup();
    let even = runs.iter().all(|run| run.len() == first) && distinct.len() == runs.len();
    (even && first > 1 && runs.len() > 1).then_some((first as u32, runs.len() as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hierarchy_where_hosts_are_alike_else_a_ring() {
        let algorithm = |hosts: &[u32]| fitting(Kind::AllReduce, hosts).algorithm().to_string();
        assert_eq!(algorithm(&[4, 4, 4, 2, 2, 2]), "hierarchy (ring 3, ring 2)");
        assert_eq!(algorithm(&[0, 0, 1, 1, 2, 2]), "hierarchy (ring 2, ring 3)");
        for hosts in [&[0, 0, 0, 0][..], &[0, 1, 2, 3], &[0, 0, 1], &[0, 0, 1, 1, 0, 0], &[5]] {
            assert_eq!(algorithm(hosts), "ring", "{hosts:?}");
        }
    }
}
