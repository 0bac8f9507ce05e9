//! `phalanx scale`: curves, pages, and what is left of them after Ctrl-C.

use std::fs;
use std::path::{Path, PathBuf};

use crate::place::Place;

fn scenarios() -> PathBuf {
    fs::canonicalize(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/scenarios"))
        .unwrap()
}

/// The job of a scenario, in a place of its own.
fn bring(place: &Place, name: &str) -> String {
    let job = format!("{name}.toml");
    place.write(&job, fs::read(scenarios().join(&job)).unwrap());
    job
}

/// The pages say what the tool says: `bench/scenarios` makes them anew.
#[test]
fn pages_are_as_the_tool_makes_them() {
    for name in ["llama-405b-h100-8192", "loosely-coupled", "llama-7b-tpu-v3-1024"] {
        let place = Place::new();
        let job = bring(&place, name);
        let page = fs::read_to_string(scenarios().join(format!("{name}.md"))).unwrap();
        let made = place.succeed(&["scale", &job, "--page"]);
        assert!(made == page, "{name}.md is old; make it anew with bench/scenarios\n{made}");
    }
}

#[test]
fn every_scenario_has_its_page() {
    let files = fs::read_dir(scenarios()).unwrap().map(|entry| entry.unwrap().path());
    let (jobs, pages): (Vec<_>, Vec<_>) =
        files.partition(|path| path.extension().is_some_and(|ending| ending == "toml"));
    assert!(jobs.len() >= 12, "{jobs:?}");
    for job in jobs {
        assert!(pages.contains(&job.with_extension("md")), "{} has no page", job.display());
    }
}

#[test]
fn alternatives_stand_side_by_side() {
    let place = Place::new();
    let job = bring(&place, "llama-405b-h100-8192");
    let asked = [
        "scale",
        &job,
        "--accelerators",
        "1024,2048",
        "--batch",
        "fixed",
        "--fabric",
        "roce-400g",
        "--csv",
        "points.csv",
    ];
    let text = place.succeed(&asked);
    for words in [
        "strong scaling",
        "as described",
        "fabric roce-400g",
        "SHARP on",
        "bound by",
        "█",
        "efficiency stays above",
    ] {
        assert!(text.contains(words), "{words} is not in\n{text}");
    }
    let points = place.read("points.csv");
    assert_eq!(points.lines().count(), 1 + 3 * 2, "{points}");
    let json: serde_json::Value =
        serde_json::from_str(&place.succeed(&["scale", &job, "--json"])).unwrap();
    let efficiency = |curve: usize, point: usize| {
        json["curves"][curve]["points"][point]["scaling_efficiency"].as_f64().unwrap()
    };
    assert!((0.8..1.0).contains(&efficiency(0, 2)), "{json}");
    assert!(efficiency(1, 2) >= efficiency(0, 2) * 0.999, "SHARP does no harm");
}

#[test]
fn what_cannot_be_is_told() {
    let place = Place::new();
    let refused = |text: &str, asked: &[&str]| {
        place.write("job.toml", text);
        let all: Vec<&str> = ["scale", "job.toml"].iter().chain(asked).copied().collect();
        let answer = place.run(&all);
        assert_eq!((answer.code, answer.stdout.as_str()), (Some(2), ""), "{}", answer.stderr);
        answer.stderr
    };
    let local = crate::place::over(2, "");
    insta::assert_snapshot!(refused(&local, &[]), @"phalanx: [cluster] is this machine; give the `name` of a described cluster, or an `accelerator`: `phalanx catalogue` lists them");
    let job = fs::read_to_string(scenarios().join("llama-405b-h100-8192.toml")).unwrap();
    insta::assert_snapshot!(refused(&job, &["--batch", "some"]), @"phalanx: --batch takes fixed, grows, or whole numbers: invalid digit found in string");
    insta::assert_snapshot!(refused(&job, &["--fabric", "roce"]), @"phalanx: the catalogue has no fabric `roce`; did you mean `roce-400g`? `phalanx catalogue` lists all");
    let unknown = format!("{job}\n[goodput]\nfailures = 'llama'\n");
    insta::assert_snapshot!(refused(&unknown, &[]), @"phalanx: job.toml: [goodput] failures: there is no record `llama`; there is llama-3, rsc-1, rsc-1024, rsc-2");
    let plain = job.split("[scenario]").next().unwrap();
    insta::assert_snapshot!(refused(plain, &["--page"]), @"phalanx: job: a page needs a [scenario] with title, claim and verdict");
}
