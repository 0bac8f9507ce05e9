//! Pages of HTML: what they show is what the run left and what the simulator says.

use std::path::Path;

use crate::place::Place;
use crate::train::{MEASURED, RUN};

#[test]
fn the_page_of_a_run_shows_its_record() {
    let (place, _) = &*MEASURED;
    let out = place.succeed(&["report", RUN, "--out", "run.html"]);
    assert_eq!(out.trim(), "run.html");
    let page = place.read("run.html");
    let last = place.losses(RUN, "step")[19];
    let held_out = place.losses(RUN, "evaluation")[9];
    for text in [
        "<h1>job-001</h1>",
        &format!("<strong>{last:.3}</strong>"),
        &format!("<strong>{held_out:.3}</strong>"),
        "measured, step 20 of 20",
        "Each rank as predicted, and below it as measured",
        "exposed, data",
        "No rank was lost",
    ] {
        assert!(page.contains(text), "{text} is not on the page");
    }
    assert_eq!(page.matches("translate(0 ").count(), 2 * 4, "two lanes of each of four ranks");
}

#[test]
fn a_run_that_is_under_way_has_a_page() {
    let (place, _) = &*MEASURED;
    place.write("early/job.toml", place.read("runs/job-001/job.toml"));
    place.succeed(&["report", "early", "--out", "early.html"]);
    assert!(place.read("early.html").contains("No step is done yet."));
    let metrics = place.read("runs/job-001/metrics.jsonl");
    let half = &metrics[..metrics.len() / 2];
    place.write("early/metrics.jsonl", half);
    place.succeed(&["report", "early", "--out", "early.html"]);
    let steps = half.matches("\"event\":\"step\"").count() - usize::from(!half.ends_with('\n'));
    let page = place.read("early.html");
    let told =
        (steps..=steps + 1).any(|step| page.contains(&format!("measured, step {step} of 20")));
    assert!(told, "{steps} steps");
}

#[test]
fn a_job_on_a_described_cluster_has_a_page_with_its_curve() {
    let place = Place::new();
    let job = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/llama-3.1-405b-8192.toml");
    let job = job.to_str().unwrap();
    let curve = place.succeed(&["scale", job, "--accelerators", "1024,8192", "--json"]);
    place.write("curve.json", curve);
    place.succeed(&["report", job, "--scale", "curve.json", "--out", "405b.html"]);
    let page = place.read("405b.html");
    for text in [
        "405,853,388,800 parameters on 8,192",
        "stage 7",
        "at the wall",
        "quantum2-ndr",
        "as described",
    ] {
        assert!(page.contains(text), "{text} is not on the page");
    }
}

#[test]
fn what_is_no_run_is_told() {
    let place = Place::new();
    place.write("folder/empty.txt", "");
    for (of, why) in [
        ("folder", "not the folder of a run"),
        ("nowhere", "neither a run's folder nor a job file"),
    ] {
        let answer = place.run(&["report", of]);
        assert_eq!(answer.code, Some(2), "{answer:?}");
        assert!(answer.stderr.contains(why), "{answer:?}");
    }
}
