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
fn losses_are_on_the_page_with_what_they_cost() {
    let (place, _) = &*MEASURED;
    place.write("lost/job.toml", place.read("runs/job-001/job.toml"));
    let step = r#"{"event":"step","step":1,"loss":5.0,"tokens_per_s":100.0,"step_time_s":3.0}"#;
    let loss = r#"{"rank":2,"host":"one","cause":"ended without a word","detection_s":0.25}"#;
    let recovered =
        r#""event":"recovered","step":1,"source":"memory","steps_redone":1,"time_s":0.75"#;
    let metrics = format!("{step}\n{{{recovered},\"losses\":[{loss}]}}\n");
    place.write("lost/metrics.jsonl", metrics);
    place.succeed(&["report", "lost", "--out", "lost.html"]);
    let page = place.read("lost.html");
    for text in [
        "Rank 2 on one ended without a word; noticed after 250.00 ms.",
        "All go on after 750.00 ms, with state from memory; 1 step(s) done again.",
        "75.0 % was training that counts",
    ] {
        assert!(page.contains(text), "{text} is not on the page");
    }
}

#[test]
fn a_browser_is_shown_the_page() {
    let (place, _) = &*MEASURED;
    place.write("browser", "#!/bin/sh\necho \"$1\" > shown\n");
    let shown = place.shell(&format!(
        "mkfifo shown; chmod +x browser; BROWSER=./browser phalanx report {RUN} --open > told; cat shown"
    ));
    assert_eq!(shown.trim(), "DIR/runs/job-001/report.html");
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
        "402,699,272,192 parameters on 8,192",
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
