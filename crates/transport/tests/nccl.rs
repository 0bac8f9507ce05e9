//! Collectives by NCCL, whose place a library of C takes that does the work in ordinary memory: see `stand_in.c`.
#![allow(clippy::unwrap_used, reason = "a test's helpers may panic as its tests do")]

mod mesh;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use collective::{Collective, Kind, chunk_range};
use transport::{Communicator, Error, Group, Limits, Nccl, NcclFiles};
use units::Rank;

/// Compiles a library from C.
fn compiled(source: &Path, name: &str) -> PathBuf {
    let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let mut compiler = Command::new("cc");
    compiler.args(["-std=c11", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-pthread", "-o"]);
    let compiled = compiler.arg(&library).arg(source).status().unwrap();
    assert!(compiled.success(), "cc does not compile {}", source.display());
    library
}

/// The stand-in for both libraries.
fn stand_in() -> NcclFiles {
    static LIBRARY: OnceLock<OsString> = OnceLock::new();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stand_in.c");
    let library = LIBRARY.get_or_init(|| compiled(&source, "libstandin.so").into());
    NcclFiles { nccl: Some(library.clone()), cuda_runtime: Some(library.clone()) }
}

/// Runs ranks that share no memory, each with a GPU.
fn run<T: Send>(
    ranks: u32,
    limit: Duration,
    body: impl Fn(Communicator, Arc<Nccl>) -> T + Sync,
) -> Vec<T> {
    let files = stand_in();
    mesh::run(mesh::in_process(ranks), Limits::default(), |communicator| {
        let rank = communicator.rank();
        let nccl = Nccl::load(&files, rank, communicator.place_on_host(), limit).unwrap();
        let nccl = Arc::new(nccl);
        body(communicator.with_native(Arc::<Nccl>::clone(&nccl)), nccl)
    })
}

const LONG: Duration = Duration::from_secs(60);

fn value(rank: u32, index: usize) -> f32 {
    (rank as usize * 7 + index % 1021) as f32
}

#[test]
fn collectives_go_by_way_of_the_gpu() {
    for ranks in [1, 2, 3] {
        run(ranks, LONG, |mut communicator, _| {
            let (rank, group) = (communicator.rank(), Group::world(ranks));
            assert_eq!(communicator.native_name(), Some("NCCL"));
            let sum = |i| (0..ranks).map(|rank| value(rank, i)).sum::<f32>();
            for length in [0, 1, 2, 7, 10_007, 100] {
                let mut carry_out = |kind| {
                    let mut buffer: Vec<f32> = (0..length).map(|i| value(rank.0, i)).collect();
                    let ring = Collective::ring(kind, ranks);
                    communicator.run_on(&group, &ring, &mut buffer, kind.name()).unwrap();
                    buffer
                };
                let block = |rank| chunk_range(length, ranks, rank);
                let summed = carry_out(Kind::AllReduce);
                assert!(summed.iter().enumerate().all(|(i, found)| *found == sum(i)));
                let scattered = carry_out(Kind::ReduceScatter);
                assert!(block(rank.0).all(|i| scattered[i] == sum(i)), "{scattered:?}");
                let gathered = carry_out(Kind::AllGather);
                assert!((0..ranks).all(|of| block(of).all(|i| gathered[i] == value(of, i))));
                let told = carry_out(Kind::Broadcast);
                assert!(told.iter().enumerate().all(|(i, found)| *found == value(0, i)));
                // NCCL has no such thing.
                communicator.barrier_at_once(&group).unwrap();
            }
        });
    }
}

#[test]
fn groups_have_communicators_of_their_own() {
    let groups = [[0, 1], [2, 0], [1, 2]].map(|ranks| ranks.map(Rank));
    run(3, LONG, |mut communicator, nccl| {
        for _ in 0..2 {
            for (id, ranks) in (1..).zip(&groups) {
                let group = Group { id, ranks: ranks.to_vec().into() };
                let Some(member) = group.member(communicator.rank()) else { continue };
                let mut buffer = vec![member as f32 + id as f32; 100];
                let all_reduce = Collective::ring(Kind::AllReduce, 2);
                communicator.run_on(&group, &all_reduce, &mut buffer, "sum").unwrap();
                assert_eq!(buffer, vec![1.0 + 2.0 * id as f32; 100]);
                let share = &mut |_: &[u8]| unreachable!("they know each other");
                if member == 0 {
                    nccl.send(&group, ranks[1], &[4.0, 5.0], share).unwrap();
                } else {
                    let mut received = [0.0; 2];
                    nccl.receive(&group, ranks[0], &mut received, share).unwrap();
                    assert_eq!(received, [4.0, 5.0]);
                }
            }
        }
    });
}

/// The stand-in never ends an all-reduce of 13 elements.
#[test]
fn what_hangs_is_given_up() {
    let outcomes = run(2, Duration::from_millis(20), |mut communicator, _| {
        let (group, all_reduce) = (Group::world(2), Collective::ring(Kind::AllReduce, 2));
        let mut sum = |length| {
            let outcome = communicator.run_on(&group, &all_reduce, &mut vec![1.0; length], "sum");
            outcome.map_err(|error| error.to_string())
        };
        [sum(12), sum(13), sum(12)]
    });
    for [before, hung, after] in outcomes {
        assert_eq!(before, Ok(()));
        assert!(hung.unwrap_err().contains("use NCCL: a collective is not done after 20ms"));
        assert!(after.unwrap_err().contains("given up"));
    }
}

#[test]
fn a_library_that_is_not_there_or_another_is_named_with_what_to_do() {
    let refused = |files: &NcclFiles| match Nccl::load(files, Rank(0), 0, LONG) {
        Err(Error::System { action: "use NCCL", reason }) => reason,
        other => panic!("{other:?}"),
    };
    let missing = NcclFiles { nccl: Some("/none/libnccl.so.2".into()), ..stand_in() };
    let said = refused(&missing);
    assert!(said.contains("/none/libnccl.so.2 cannot be loaded"), "{said}");
    assert!(said.contains("PHALANX_NCCL") && said.contains("nvidia-nccl-cu12"), "{said}");
    let missing = NcclFiles { cuda_runtime: Some("/none/libcudart.so".into()), ..stand_in() };
    assert!(refused(&missing).contains("PHALANX_CUDART"));
    // Too old to have all functions.
    let source = Path::new(env!("CARGO_TARGET_TMPDIR")).join("old.c");
    std::fs::write(&source, "int ncclGetVersion(int *v) { *v = 1; return 0; }\n").unwrap();
    let old = NcclFiles { nccl: Some(compiled(&source, "libold.so").into()), ..stand_in() };
    assert!(refused(&old).contains("ncclGetUniqueId"));
}
