//! Runs that are stopped, damaged and gone on with.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

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

/// Before there was a step, while the machine is measured: the first one is done and saved.
#[test]
fn a_run_that_is_told_to_stop_before_its_first_step_saves_that_one() {
    let place = Place::new();
    let endless = over(4, LAYOUT).replace("steps = 20", "steps = 100000000");
    place.write("job.toml", endless.replace("measure = false", "measure = true"));
    let mut command = place.phalanx(&["train", "job.toml"]);
    let mut launcher = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(launcher.stdout.take().unwrap()).lines();
    // It has read the text and met the others.
    assert!(lines.next().is_some());
    kill_process(Pid::from_child(&launcher), Signal::TERM).unwrap();
    lines.for_each(drop);
    let answer = Answer::new(launcher.wait_with_output().unwrap(), &place);
    assert_eq!(answer.code, Some(4), "{}", answer.stderr);
    assert_eq!(place.losses("runs/job-001", "step").len(), 1);
    assert_eq!(checkpoints(&place, "runs/job-001").len(), 1);
}

/// Runs a job undisturbed and under faults; what the second printed.
fn under(place: &Place, job: &str, chaos: &str) -> String {
    place.write("job.toml", job);
    place.succeed(&["train", "job.toml"]);
    place.succeed(&["train", "job.toml", "--chaos", chaos])
}

/// The second run recorded the losses of the first, those of steps that were done again too, and
/// left the same model.
fn assert_same(place: &Place) {
    let losses = place.losses("runs/job-001", "step");
    let mut steps = std::collections::BTreeSet::new();
    for record in place.metrics("runs/job-002", "step") {
        let step = record["step"].as_u64().unwrap();
        assert_eq!(record["loss"].as_f64().unwrap(), losses[step as usize - 1], "{record}");
        steps.insert(step);
    }
    assert_eq!(steps.len(), losses.len());
    let model = |run: &str| {
        let files = place.files(&format!("runs/{run}/model")).into_iter();
        files.map(|(path, bytes)| (path.file_name().unwrap().to_owned(), bytes)).collect::<Vec<_>>()
    };
    assert!(model("job-001") == model("job-002"));
}

#[test]
fn killed_ranks_are_replaced_and_change_no_bit() {
    for layout in [LAYOUT, "shard = \"none\"\nmicro_batch = 2", "pipeline = 4\nmicro_batch = 1"] {
        let place = Place::new();
        let stdout = under(&place, &over(4, layout), "kill:2@3,kill:0@8,kill:2@8,kill:3@15");
        assert!(stdout.contains("recovered from memory"), "{stdout}");
        assert_same(&place);
        let recovered = place.metrics("runs/job-002", "recovered");
        // Two losses at once may be made good at once.
        assert!((3..=4).contains(&recovered.len()), "{recovered:?}");
    }
}

#[test]
fn what_no_memory_holds_any_more_comes_from_a_checkpoint() {
    let place = Place::new();
    // Rank 1 keeps what rank 0 has, so that both lost at once is too much for memory.
    let job = over(4, LAYOUT) + CHECKPOINTS + "asynchronous = false\n";
    let stdout = under(&place, &job, "kill:0@7,kill:1@7");
    assert!(stdout.contains("step     5  recovered from checkpoint"), "{stdout}");
    assert_same(&place);
    let place = Place::new();
    let stdout = under(&place, &over(2, "[recovery]\nreplicate_every_steps = 0"), "kill:1@1");
    assert!(stdout.contains("step     0  recovered from start"), "{stdout}");
    assert_same(&place);
}

#[test]
fn a_halted_rank_is_replaced() {
    let place = Place::new();
    let job = over(4, LAYOUT) + "\n[recovery]\nsilence_s = 3.0\n";
    under(&place, &job, "stop:1@6");
    assert_same(&place);
    assert_eq!(place.metrics("runs/job-002", "recovered").len(), 1);
}

#[test]
fn a_rank_that_is_lost_again_and_again_ends_the_run() {
    let place = Place::new();
    place.write("job.toml", over(2, "") + "\n[recovery]\nrestarts = 2\n");
    // Each incarnation dies at the same step.
    let chaos = ["kill:1@4"; 5].join(",");
    let answer = place.run(&["train", "job.toml", "--chaos", &chaos]);
    assert_eq!(answer.code, Some(5), "{}", answer.stderr);
    let said = "rank 1: ended without a word (signal: 9 (SIGKILL)); if nobody stopped it, see whether memory ran out. Ranks were lost 3 times with no step done in between: do not start the run again as it is";
    assert!(answer.stderr.contains(said), "{}", answer.stderr);
}

#[test]
fn without_a_launcher_ranks_save_and_stop() {
    let place = Place::new();
    let endless = over(4, LAYOUT).replace("steps = 20", "steps = 100000000\nevaluate_every = 1");
    place.write("job.toml", endless + "\n[checkpoint]\nevery_steps = 0\n");
    let mut command = place.phalanx(&["train", "job.toml"]);
    let mut launcher = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(launcher.stdout.take().unwrap()).lines();
    assert!(lines.by_ref().any(|line| line.unwrap().contains("held-out loss")));
    kill_process(Pid::from_child(&launcher), Signal::KILL).unwrap();
    launcher.wait().unwrap();
    // The pipe ends with the last process that holds it.
    lines.for_each(drop);
    assert_eq!(checkpoints(&place, "runs/job-001").len(), 1);
    let done = place.losses("runs/job-001", "step").len();
    let steps = format!("training.steps={}", done + 1);
    place.succeed(&["train", "job.toml", "--resume", "runs/job-001", "--set", &steps]);
}

/// The process of a rank of the run in `place`.
fn process_of(place: &Place, rank: u32) -> Option<Pid> {
    let here = fs::canonicalize(place.path("")).unwrap();
    let is_it = |process: &std::path::Path| {
        let environment = fs::read(process.join("environ")).unwrap_or_default();
        let variable = format!("RANK={rank}");
        fs::read_link(process.join("cwd")).is_ok_and(|folder| folder == here)
            && environment.split(|byte| *byte == 0).any(|entry| entry == variable.as_bytes())
    };
    let processes = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
    let found = processes.into_iter().find(|process| is_it(process))?;
    Pid::from_raw(found.file_name()?.to_str()?.parse().ok()?)
}

#[test]
fn whoever_stands_by_takes_over_and_no_step_is_done_again() {
    let place = Place::new();
    let endless = over(4, LAYOUT).replace("steps = 20", "steps = 100000000\nevaluate_every = 1");
    place.write("job.toml", endless + "\n[recovery]\nregister = \"register\"\n");
    let (mut launcher, mut lines) = start(&place, &["train", "job.toml"]);
    await_line(&mut lines, "held-out loss");
    let twice = place.run(&["train", "job.toml"]);
    assert!(
        twice.stderr.contains("register: somebody coordinates a run there, in term 0"),
        "{}",
        twice.stderr
    );
    let (standby, mut said) = start(&place, &["train", "job.toml", "--standby"]);
    await_line(&mut said, "the coordinator of term 0 is there");
    kill_process(Pid::from_child(&launcher), Signal::KILL).unwrap();
    launcher.wait().unwrap();
    await_line(&mut said, "took over      as the coordinator of term 1");
    // What the lost launcher started is the new one's to replace, and to stop.
    kill_process(process_of(&place, 2).unwrap(), Signal::KILL).unwrap();
    await_line(&mut lines, "recovered from memory");
    kill_process(Pid::from_child(&standby), Signal::TERM).unwrap();
    lines.for_each(drop);
    let answer = Answer::new(standby.wait_with_output().unwrap(), &place);
    assert_eq!(answer.code, Some(4), "{}", answer.stderr);
    let steps = place.metrics("runs/job-001", "step");
    let steps: Vec<u64> = steps.iter().map(|record| record["step"].as_u64().unwrap()).collect();
    let again = steps.windows(2).filter(|pair| pair[1] != pair[0] + 1).count();
    assert!(again <= 1, "one loss: {steps:?}");
    assert_eq!(place.metrics("runs/job-001", "recovered").len(), 1);
}

/// Reads until a line says so.
fn await_line(lines: &mut impl Iterator<Item = String>, words: &str) {
    let mut read = Vec::new();
    for line in lines {
        if line.contains(words) {
            return;
        }
        read.push(line);
    }
    read.drain(..read.len().saturating_sub(20));
    panic!("it ended without `{words}`; at last it said\n{}", read.join("\n"));
}

/// A process of the binary, and what it prints.
fn start(place: &Place, arguments: &[&str]) -> (Child, impl Iterator<Item = String> + use<>) {
    let mut command = place.phalanx(arguments);
    let mut process = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(process.stdout.take().unwrap()).lines();
    (process, lines.map(Result::unwrap))
}

/// A job of as many steps as there is time for, all at one learning rate, so that shorter runs are the
/// beginnings of longer ones; its batch can be split among 4, 3, 2 ranks and 1.
fn endless(recovery: &str) -> String {
    let learning = "learning_rate = 1e-4\nminimum_learning_rate = 1e-4\nwarmup_steps = 0";
    let steps = "steps = 100000000\nevaluate_every = 1";
    let job = over(4, "micro_batch = 2").replace("global_batch = 8", "global_batch = 24");
    let job = job.replace("steps = 20", steps).replace("learning_rate = 1e-2", learning);
    job + "\n[checkpoint]\nevery_steps = 0\n\n[recovery]\n" + recovery
}

/// Ends a run, and compares the losses of its steps with those of one that nothing happened to.
fn stop_and_compare(place: &Place, launcher: Child, lines: impl Iterator<Item = String>) {
    kill_process(Pid::from_child(&launcher), Signal::TERM).unwrap();
    lines.for_each(drop);
    let answer = Answer::new(launcher.wait_with_output().unwrap(), place);
    assert_eq!(answer.code, Some(4), "{}", answer.stderr);
    let steps = place.metrics("runs/job-001", "step");
    let of = |record: &Value| record["step"].as_u64().unwrap();
    let done = steps.iter().map(of).max().unwrap();
    place.succeed(&["train", "job.toml", "--set", &format!("training.steps={done}")]);
    let undisturbed = place.losses("runs/job-002", "step");
    for record in &steps {
        let (found, expected) =
            (record["loss"].as_f64().unwrap(), undisturbed[of(record) as usize - 1]);
        assert!((found / expected - 1.0).abs() <= 1e-5, "{record}, not {expected}");
    }
    for pair in steps.windows(2) {
        assert!(of(&pair[1]) <= of(&pair[0]) + 1, "no step is left out: {pair:?}");
    }
}

#[test]
fn fewer_ranks_go_on_at_once_and_all_of_them_when_the_lost_one_is_back() {
    let place = Place::new();
    place.write("job.toml", endless("when_short = \"shrink\"\nreplace_within_s = 0.0\n"));
    let (launcher, mut lines) = start(&place, &["train", "job.toml"]);
    // Rank 0 is lost as others are: another becomes it, and talks on.
    for seat in [2, 0] {
        assert!(lines.by_ref().any(|line| line.contains("held-out loss")));
        kill_process(process_of(&place, seat).unwrap(), Signal::KILL).unwrap();
        // Three go on meanwhile, unless the fourth is back sooner.
        assert!(lines.by_ref().any(
            |line| line.contains("recovered from memory in") && line.contains(", 4 rank(s): ")
        ));
    }
    stop_and_compare(&place, launcher, lines);
    let ranks = place.metrics("runs/job-001", "recovered");
    let ranks: Vec<_> = ranks.iter().map(|record| record["ranks"].as_u64().unwrap()).collect();
    assert!(matches!(ranks[..], [4, 4] | [3, 4, 4] | [4, 3, 4] | [3, 4, 3, 4]), "{ranks:?}");
}

/// A run on hosts of two ranks each, played by processes of this one: the launcher, what it prints, and
/// where hosts join it.
fn listening(place: &Place) -> (Child, impl Iterator<Item = String> + use<>, String) {
    let (launcher, mut lines) = start(place, &["train", "job.toml", "--listen", "127.0.0.1:0"]);
    let said = lines.find(|line| line.contains("hosts join with --join")).unwrap();
    (launcher, lines, said.rsplit(' ').next().unwrap().to_owned())
}

/// Kills all processes of a host at once.
fn kill_host(place: &Place, mut agent: Child, seats: [u32; 2]) {
    let processes = seats.map(|seat| process_of(place, seat).unwrap());
    kill_process(Pid::from_child(&agent), Signal::KILL).unwrap();
    for process in processes {
        kill_process(process, Signal::KILL).unwrap();
    }
    agent.wait().unwrap();
}

#[test]
fn a_lost_host_is_done_without_until_it_is_back() {
    let place = Place::new();
    let job = endless("when_short = \"shrink\"\nreplace_within_s = 0.0\n");
    place.write("job.toml", job + "\n[launch]\nranks_per_host = 2\n");
    let (launcher, mut lines, address) = listening(&place);
    let join = || start(&place, &["train", "job.toml", "--join", &address]).0;
    let agent = join();
    assert!(lines.by_ref().any(|line| line.contains("held-out loss")));
    kill_host(&place, agent, [2, 3]);
    assert!(lines.by_ref().any(
        |line| line.contains("recovered from memory in") && line.contains(", 2 rank(s): rank")
    ));
    let mut again = join();
    assert!(lines.by_ref().any(|line| line.contains("recovered from memory in")
        && line.contains(", 4 rank(s): after step")));
    stop_and_compare(&place, launcher, lines);
    // It is told that the run is over.
    assert_eq!(again.wait().unwrap().code(), Some(1));
}

#[test]
fn a_spare_host_takes_the_place_of_a_lost_one() {
    let place = Place::new();
    place.write("job.toml", endless("") + "\n[launch]\nranks_per_host = 2\n");
    let (launcher, mut lines, address) = listening(&place);
    let join = || start(&place, &["train", "job.toml", "--join", &address]).0;
    let agent = join();
    assert!(lines.by_ref().any(|line| line.contains("held-out loss")));
    let mut spare = join();
    kill_host(&place, agent, [2, 3]);
    assert!(lines.by_ref().any(
        |line| line.contains("recovered from memory in") && line.contains(", 4 rank(s): rank")
    ));
    stop_and_compare(&place, launcher, lines);
    assert_eq!(spare.wait().unwrap().code(), Some(1));
}

#[test]
fn a_spare_takes_the_place_of_a_lost_rank() {
    let place = Place::new();
    under(&place, &(over(4, LAYOUT) + "\n[recovery]\nspare_ranks = 1\n"), "kill:2@7,kill:0@12");
    assert_same(&place);
    // Who is not the first to be there is the spare, and is lost unnoticed.
    assert!(!place.metrics("runs/job-002", "recovered").is_empty());
}

#[test]
fn a_flipped_bit_is_gone_back_on_and_the_rank_is_named() {
    let place = Place::new();
    let job = over(4, "shard = \"none\"\nmicro_batch = 2") + CHECKPOINTS + "asynchronous = false\n";
    let job = job + "\n[recovery]\ncompare_every_steps = 3\n";
    let stdout = under(&place, &job, "flip:2@7");
    assert!(stdout.contains("step 9: what rank 2 holds is not what the ranks hold"), "{stdout}");
    assert!(stdout.contains("step     5  recovered from checkpoint"), "{stdout}");
    let model = |run: &str| place.files(&format!("{run}/model")).into_values();
    assert!(model("runs/job-001").eq(model("runs/job-002")));
}

#[test]
fn a_run_goes_back_to_a_checkpoint_when_its_gradient_is_too_large() {
    let place = Place::new();
    let job = over(2, "").replace("steps = 20", "steps = 400");
    let settings = "steps = 400\non_divergence = \"roll-back\"\nspike = 1.0";
    place.write("job.toml", job.replace("steps = 400", settings) + CHECKPOINTS);
    // Half of all gradients are over the median, so that it goes back as often as it may, and ends.
    let answer = place.run(&["train", "job.toml"]);
    assert_eq!(answer.code, Some(1), "{}", answer.stderr);
    assert!(answer.stderr.contains("the gradient norm is"), "{}", answer.stderr);
    let back = place.metrics("runs/job-001", "rolled-back");
    assert_eq!(back.len(), 3);
    let steps = place.metrics("runs/job-001", "step");
    for record in back {
        let (step, to) = (record["step"].as_u64().unwrap(), record["to"].as_u64().unwrap());
        assert!(to < step && to % 5 == 0, "{record}");
        // It goes on behind the step whose gradient was too large, which was never applied.
        let of = |step: u64| steps.iter().filter(|record| record["step"] == step).count();
        assert_eq!((of(step), of(step + 1)), (0, 1));
    }
}

#[test]
fn who_is_told_to_stop_again_does_so_at_once() {
    let place = Place::new();
    let endless = over(4, LAYOUT).replace("steps = 20", "steps = 100000000\nevaluate_every = 1");
    place.write("job.toml", endless + "\n[recovery]\nsilence_s = 100000.0\n");
    let mut command = place.phalanx(&["train", "job.toml"]);
    let mut launcher = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(launcher.stdout.take().unwrap()).lines();
    assert!(lines.by_ref().any(|line| line.unwrap().contains("held-out loss")));
    // No step is ever done again, after which the others would stop by themselves.
    kill_process(process_of(&place, 2).unwrap(), Signal::STOP).unwrap();
    let code = loop {
        if let Some(status) = launcher.try_wait().unwrap() {
            break status.code();
        }
        kill_process(Pid::from_child(&launcher), Signal::TERM).unwrap();
        std::thread::yield_now();
    };
    assert_eq!(code, Some(4));
}

#[test]
fn two_runs_never_share_checkpoints() {
    let places = [Place::new(), Place::new()];
    let shared = places[0].path("shared");
    let job = over(1, "") + &format!("\n[checkpoint]\nfolder = \"{}\"\n", shared.display());
    places.iter().for_each(|place| place.write("job.toml", &job));
    places[0].succeed(&["train", "job.toml"]);
    // Another host has runs of its own, and would call its first one the same.
    let answer = places[1].run(&["train", "job.toml"]);
    assert_eq!(answer.code, Some(2), "{}", answer.stderr);
    assert!(answer.stderr.contains("holds the checkpoints of another run"), "{}", answer.stderr);
}
