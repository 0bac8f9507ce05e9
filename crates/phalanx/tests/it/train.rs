//! Training, as a user sees it.

use std::sync::LazyLock;

use checkpoint::hugging_face::Weights;
use serde_json::Value;

use crate::place::{Place, config, over};

/// A measured run of data 2 x pipeline 2, which several tests look at.
pub static MEASURED: LazyLock<(Place, String)> = LazyLock::new(|| {
    let place = Place::new();
    let job = over(4, "pipeline = 2\nmicro_batch = 2\nshard = \"parameters\"");
    place.write("job.toml", job.replace("measure = false", "measure = true"));
    let stdout = place.succeed(&["train", "job.toml"]);
    (place, stdout)
});

/// Where it left its record.
pub const RUN: &str = "runs/job-001";

#[test]
fn four_ranks_learn_the_text() {
    let (place, _) = &*MEASURED;
    let losses = place.losses(RUN, "step");
    assert_eq!(losses.len(), 20);
    let uniform = 320_f64.ln();
    assert!((losses[0] - uniform).abs() < 0.2, "a fresh model knows nothing: {}", losses[0]);
    assert!(losses[19] < losses[0] - 1.0, "{losses:?}");
    let held_out = place.losses(RUN, "evaluation");
    assert_eq!(held_out.len(), 10);
    assert!(held_out[9] < uniform - 1.0 && held_out[9] < held_out[0], "{held_out:?}");
}

#[test]
fn a_run_leaves_its_record() {
    let (place, stdout) = &*MEASURED;
    let job = place.read("runs/job-001/job.toml");
    for line in ["accelerators = 4", "data = 2", "pipeline = 2", "shard = \"parameters\""] {
        assert!(job.contains(line), "{line} is not in\n{job}");
    }
    assert!(place.read("runs/job-001/program.txt").contains("reduce-scatter"));
    for record in place.metrics(RUN, "step") {
        assert!(record["tokens_per_s"].as_f64().unwrap() > 0.0, "{record}");
        assert!(record["model_flops_utilization"].as_f64().unwrap() > 0.0, "{record}");
    }
    let events = place.json("runs/job-001/trace.json");
    assert!(events["traceEvents"].as_array().is_some_and(|events| events.len() > 100));
    let summary = place.json("runs/job-001/summary.json");
    let number = |key: &str| summary[key].as_f64().unwrap_or_else(|| panic!("{key}: {summary}"));
    assert!(number("predicted_step_time_s") > 0.0 && number("scaling_efficiency") > 0.0);
    assert!(number("loss") < number("first_loss"));
    for word in ["prediction ", "predicted", "measured", "efficiency", "held out", RUN] {
        assert!(stdout.contains(word), "{word} is not in\n{stdout}");
    }
}

#[test]
fn algorithms_are_measured_once_and_stay_with_the_run() {
    let place = Place::new();
    let job = over(2, "shard = \"parameters\"").replace("measure = false", "measure = true");
    let job = job.replace("[cluster]\n", "[cluster]\ncollectives = \"measured\"\n");
    place.write("job.toml", job.replace("steps = 20", "steps = 4"));
    place.succeed(&["train", "job.toml"]);
    let choices =
        |run: &str| place.json(&format!("{run}/machine.json"))["profile"]["choices"].clone();
    let first = choices(RUN);
    let kinds: Vec<_> = first.as_array().unwrap().iter().map(|of| of["kind"].clone()).collect();
    for kind in ["all-gather", "reduce-scatter"] {
        assert!(kinds.contains(&kind.into()), "{first}");
    }
    // Another run on this host knows them, a run that goes on has its own.
    place.succeed(&["train", "job.toml"]);
    assert_eq!(choices("runs/job-002"), first);
    assert_eq!(place.losses("runs/job-002", "step"), place.losses(RUN, "step"));
    place.write("cache/phalanx/collectives.json", "lost");
    place.succeed(&["train", "job.toml", "--resume", RUN, "--set", "training.steps=6"]);
    assert_eq!(choices("runs/job-003"), first);
}

#[test]
fn algorithms_are_measured_only_where_ranks_are() {
    let place = Place::new();
    place.write("job.toml", over(2, ""));
    let cases = [
        (&["cluster.name=dgx-h100-quantum2"][..], "on a described cluster"),
        (&["run.measure=false"], "needs [run] measure = true"),
        (&["run.measure=true", "training.compress=int8"], "knows nothing of [training] compress"),
    ];
    for (settings, reason) in cases {
        let mut arguments = vec!["train", "job.toml", "--set", "cluster.collectives=measured"];
        settings.iter().for_each(|setting| arguments.extend(["--set", setting]));
        let answer = place.run(&arguments);
        assert!(answer.code == Some(2) && answer.stderr.contains(reason), "{}", answer.stderr);
    }
}

#[test]
fn a_run_leaves_a_model_that_reads_back() {
    let (place, _) = &*MEASURED;
    let folder = place.path("runs/job-001/model");
    let config = checkpoint::hugging_face::read_config(&folder).unwrap();
    let expected =
        model::Config { rotary: config.rotary, context: config.context, ..self::config() };
    assert_eq!(config, expected);
    let weights = Weights::open(&folder).unwrap();
    weights.check(&config).unwrap();
    assert!(data::Tokenizer::from_file(&folder.join("tokenizer.json")).is_ok());
}

#[test]
fn a_run_is_simulated_again_from_its_machine_file() {
    let (place, _) = &*MEASURED;
    let arguments = ["simulate", "job.toml", "--machine", "runs/job-001/machine.json"];
    let stdout = place.succeed(&arguments);
    assert!(stdout.contains("as measured in runs/job-001/machine.json"), "{stdout}");
    assert!(stdout.contains("tokens/s"), "{stdout}");
    let again = place.succeed(&arguments);
    assert_eq!(stdout, again, "virtual time is the same every time");
    let summary = place.json("runs/job-001/summary.json");
    let json: Value =
        serde_json::from_str(&place.succeed(&[&arguments[..], &["--json"]].concat())).unwrap();
    assert_eq!(json["step_time_s"], summary["predicted_step_time_s"]);
}

#[test]
fn json_is_one_object_and_the_same_run_to_the_bit() {
    let place = Place::new();
    place.write("job.toml", over(4, "pipeline = 2\nmicro_batch = 2"));
    let stdout = place.succeed(&["train", "job.toml", "--json"]);
    let summary: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(summary, place.json("runs/job-001/summary.json"));
    for key in [
        "step_time_s",
        "tokens_per_s",
        "tokens_per_s_per_accelerator",
        "exposed_communication_s",
        "pipeline_bubble_s",
        "held_out_loss",
        "first_loss",
        "loss",
    ] {
        assert!(summary[key].is_number(), "{key}: {summary}");
    }
    for key in ["predicted_step_time_s", "model_flops_utilization", "scaling_efficiency"] {
        assert_eq!(summary[key], Value::Null, "nothing was measured: {key}");
    }
    assert_eq!(summary["run_folder"], "runs/job-001");
    place.succeed(&["train", "job.toml"]);
    for event in ["step", "evaluation"] {
        assert_eq!(place.losses(RUN, event), place.losses("runs/job-002", event));
    }
}

#[test]
fn one_rank_and_four_train_the_same() {
    let place = Place::new();
    place.write("one.toml", over(1, "micro_batch = 4"));
    place.write("four.toml", over(4, "pipeline = 2\nmicro_batch = 1\nshard = \"parameters\""));
    place.succeed(&["train", "one.toml"]);
    place.succeed(&["train", "four.toml"]);
    for event in ["step", "evaluation"] {
        let one = place.losses("runs/one-001", event);
        let four = place.losses("runs/four-001", event);
        assert_eq!(one.len(), four.len());
        for (one, four) in one.iter().zip(four) {
            assert!((four / one - 1.0).abs() <= 1e-5, "{event}: {four}, not {one}");
        }
    }
}

#[test]
fn a_model_is_trained_further_from_its_folder() {
    let place = Place::new();
    let first = over(2, "pipeline = 2");
    place.write("first.toml", &first);
    place.succeed(&["train", "first.toml"]);
    let (_, rest) = first.split_once("[data]").unwrap();
    let model = "[model]\nweights = \"runs/first-001/model\"\n\n[data]\n";
    let tokenizer = "tokenizer = \"runs/first-001/model/tokenizer.json\"\n";
    place.write("further.toml", format!("{model}{tokenizer}{rest}"));
    place.succeed(&["train", "further.toml"]);
    let (before, after) =
        (place.losses("runs/first-001", "step"), place.losses("runs/further-001", "step"));
    let (fresh, last, next) = (before[0], before[19], after[0]);
    assert!((next - last).abs() < 0.1 * (fresh - last), "{fresh} -> {last}, then {next}");
    assert!(after[19] < next, "{after:?}");
}

#[test]
fn eight_processes_that_split_layers_and_sequences_train_like_one() {
    let place = Place::new();
    let layout = "tensor = 2\nsequence_parallel = true\ncontext = 2\ncontext_exchange = \"ring\"\n\
                  pipeline = 2\nvirtual_stages = 2\nmicro_batch = 1";
    let measured = over(8, layout).replace("measure = false", "measure = true");
    place.write("one.toml", over(1, "micro_batch = 2"));
    place.write("eight.toml", measured);
    place.succeed(&["train", "one.toml"]);
    place.succeed(&["train", "eight.toml"]);
    let one = place.losses("runs/one-001", "step");
    let eight = place.losses("runs/eight-001", "step");
    assert_eq!(one.len(), eight.len());
    for (one, eight) in one.iter().zip(&eight) {
        assert!((eight / one - 1.0).abs() < 1e-5, "{eight}, not {one}");
    }
    let summary = place.json("runs/eight-001/summary.json");
    assert!(summary["predicted_step_time_s"].as_f64().unwrap() > 0.0, "{summary}");
    let weights = Weights::open(&place.path("runs/eight-001/model")).unwrap();
    weights.check(&config()).unwrap();
}
