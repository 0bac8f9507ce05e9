//! What it takes to generate one member's own part, to walk it, and to verify all members.
//!
//!     cargo bench -p collective

use collective::{Algorithm, Collective, Kind, Level};

fn main() {
    divan::main();
}

/// The algorithms at 64 and at 8,192 ranks.
#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    ranks: u32,
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.name, self.ranks)
    }
}

impl Case {
    const NAMES: [&'static str; 7] =
        ["ring", "direct", "halving-doubling", "bruck", "double-tree", "torus", "hierarchy"];

    fn all(ranks: u32) -> impl Iterator<Item = Self> {
        Self::NAMES.into_iter().map(move |name| Self { name, ranks })
    }

    fn collective(self) -> Collective {
        let rows = if self.ranks == 64 { 8 } else { 64 };
        let algorithm = match self.name {
            "ring" => Algorithm::Ring,
            "direct" => Algorithm::Direct,
            "halving-doubling" => Algorithm::HalvingDoubling,
            "bruck" => Algorithm::Bruck,
            "double-tree" => Algorithm::DoubleTree,
            "torus" => Algorithm::Torus { dims: vec![rows, self.ranks / rows] },
            _ => {
                let inside = Level { algorithm: Algorithm::Direct, ranks: 8 };
                let across = Level { algorithm: Algorithm::Ring, ranks: self.ranks / 8 };
                Algorithm::Hierarchy { levels: vec![inside, across] }
            }
        };
        let collective = Collective::new(Kind::AllReduce, algorithm, self.ranks);
        collective.unwrap_or_else(|error| panic!("{error}"))
    }
}

fn small_and_large() -> impl Iterator<Item = Case> {
    Case::all(64).chain(Case::all(8192))
}

/// One member's steps of an all-reduce.
#[divan::bench(args = small_and_large())]
fn part(bencher: divan::Bencher, case: Case) {
    let collective = case.collective();
    bencher.bench(|| collective.part(divan::black_box(case.ranks / 3)));
}

/// One member's executor, from its first step to its last.
#[divan::bench(args = small_and_large())]
fn execute(bencher: divan::Bencher, case: Case) {
    let part = case.collective().part(case.ranks / 3);
    bencher.bench(|| {
        let mut executor = part.executor();
        while let Some(step) = executor.start_next() {
            executor.complete(step);
        }
        assert!(executor.is_done());
    });
}

/// All members' steps of an all-reduce, verified.
#[divan::bench(args = Case::all(64), sample_count = 10)]
fn verify(bencher: divan::Bencher, case: Case) {
    let schedule = case.collective().schedule();
    bencher.bench(|| schedule.verify());
}
