//! Runs that are stopped, damaged and gone on with.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};

use crate::place::{Answer, Place, over};

const LAYOUT: &str = "pipeline = 2\nmicro_batch = 2\nshard = \"optimizer\"";
const CHECKPOINTS: &str = "\n[checkpoint]\nevery_steps = 5\nkeep = 4\n";

/// The checkpoints of a run, newest first.
fn checkpoints(place: &Place, run: &str) -> Vec<String> {
    let entries = fs::read_dir(place.path(&format!("{run}/checkpoints"))).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort_by(|one, other| other.cmp(one));
    names
}

/// A run of 20 steps that looks as if it had ended after step 10, with its newest checkpoint
/// damaged; the losses it had.
fn interrupted(place: &Place) -> Vec<f64> {
    place.write("job.toml", over(4, LAYOUT) + CHECKPOINTS);
    place.succeed(&["train", "job.toml"]);
    let names = checkpoints(place, "runs/job-001");
    assert_eq!(names.len(), 4, "{names:?}");
    fs::remove_dir_all(place.path(&format!("runs/job-001/checkpoints/{}", names[0]))).unwrap();
    let shard = format!("runs/job-001/checkpoints/{}/rank-00002.safetensors", names[1]);
    let mut bytes = fs::read(place.path(&shard)).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    place.write(&shard, bytes);
    place.losses("runs/job-001", "step")
}

#[test]
fn a_run_goes_on_to_the_bit_where_it_was_damaged() {
    let place = Place::new();
    let losses = interrupted(&place);
    let stdout = place.succeed(&["train", "job.toml", "--resume", "runs/job-001"]);
    assert!(stdout.contains("rank-00002.safetensors is damaged: the checksum of"), "{stdout}");
    assert!(stdout.contains("runs/job-001 after step 10"), "{stdout}");
    assert_eq!(place.losses("runs/job-002", "step"), losses[10..]);
    let model = "runs/job-001/model/model-00001-of-00002.safetensors";
    let again = model.replace("001/", "002/");
    assert!(fs::read(place.path(model)).unwrap() == fs::read(place.path(&again)).unwrap());
}

#[test]
fn a_run_goes_on_over_any_other_number_of_ranks() {
    let place = Place::new();
    let losses = interrupted(&place);
    for (name, ranks, layout) in [("one", 1, "micro_batch = 8"), ("two", 2, "shard = \"none\"")] {
        place.write(&format!("{name}.toml"), over(ranks, layout));
        place.succeed(&["train", &format!("{name}.toml"), "--resume", "runs/job-001"]);
        let resumed = place.losses(&format!("runs/{name}-001"), "step");
        assert_eq!(resumed.len(), 10);
        for (found, expected) in resumed.iter().zip(&losses[10..]) {
            assert!((found / expected - 1.0).abs() <= 1e-5, "{name}: {found}, not {expected}");
        }
    }
}

#[test]
fn a_run_that_would_go_on_otherwise_is_refused() {
    let place = Place::new();
    interrupted(&place);
    let refused = |settings: &[&str]| {
        let arguments = [&["train", "job.toml", "--resume", "runs/job-001"], settings].concat();
        let answer = place.run(&arguments);
        assert_eq!((answer.code, answer.stdout.contains("resumed")), (Some(2), false));
        // Every rank says it; any may be the first.
        answer.stderr
    };
    let said = refused(&["--set", "training.seed=5"]);
    assert!(said.contains("runs/job-001 is of a run on other seed (0, the job has 5)"), "{said}");
    let said = refused(&["--set", "training.steps=10"]);
    assert!(said.contains("is done: 10 of [training] steps = 10; raise steps"), "{said}");
    let said = refused(&["--set", "model.hidden=64"]);
    assert!(said.contains("is of another model"), "{said}");
    let answer = place.run(&["train", "job.toml", "--resume", "runs/job-077"]);
    assert_eq!(answer.code, Some(2));
    assert!(
        answer.stderr.contains("runs/job-077: there is no such run folder"),
        "{}",
        answer.stderr
    );
    assert!(!place.path("runs/job-002").exists(), "nothing was begun");
}

#[test]
fn a_run_that_is_told_to_stop_saves_first_and_says_how_to_go_on() {
    let place = Place::new();
    // More steps than any machine does before the signal, each of which is heard of.
    let endless = over(4, LAYOUT).replace("steps = 20", "steps = 100000000\nevaluate_every = 1");
    place.write("job.toml", endless + "\n[checkpoint]\nevery_steps = 0\n");
    let mut command = place.phalanx(&["train", "job.toml"]);
    let mut launcher = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(launcher.stdout.take().unwrap()).lines();
    assert!(lines.by_ref().any(|line| line.unwrap().contains("held-out loss")));
    kill_process(Pid::from_child(&launcher), Signal::TERM).unwrap();
    lines.for_each(drop);
    let answer = Answer::new(launcher.wait_with_output().unwrap(), &place);
    assert_eq!(answer.code, Some(4), "{}", answer.stderr);
    let said = "as asked; its state is saved; go on with `--resume runs/job-001`\n";
    assert!(answer.stderr.ends_with(said), "{}", answer.stderr);
    let done = place.losses("runs/job-001", "step").len();
    let steps = format!("training.steps={}", done + 2);
    place.succeed(&["train", "job.toml", "--resume", "runs/job-001", "--set", &steps]);
    assert_eq!(place.metrics("runs/job-002", "step")[0]["step"], done + 1);
}
