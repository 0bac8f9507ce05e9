//! Planning and simulating, and what the commands say of themselves.

use serde_json::Value;

use crate::place::{Place, over};

/// Data 2 x pipeline 2 with one layer a stage.
fn two_layers() -> String {
    over(4, "pipeline = 2\nmicro_batch = 2\nshard = \"parameters\"")
        .replace("layers = 4", "layers = 2")
}

/// A model and a cluster of the catalogue.
fn described(cluster: &str, accelerators: u32) -> String {
    format!(
        r#"
[model]
name = "llama-3.1-8b"

[cluster]
name = "{cluster}"
accelerators = {accelerators}

[training]
sequence = 8192
global_batch = {accelerators}
precision = "bf16"

[layout]
tensor = 1
pipeline = 1
micro_batch = 1
shard = "parameters"
"#
    )
}

/// The same with the layout left open, but for what keeps the search short.
fn open(accelerators: u32) -> String {
    let given = "tensor = 1\npipeline = 1\nmicro_batch = 1\nshard = \"parameters\"";
    described("dgx-h100-quantum2", accelerators)
        .replace(given, "context = 1\nsequence_parallel = true")
}

#[test]
fn a_program_is_shown() {
    let place = Place::new();
    place.write("job.toml", two_layers());
    insta::assert_snapshot!(place.succeed(&["plan", "job.toml", "--show-program"]));
}

#[test]
fn a_plan_needs_no_text_and_writes_nothing() {
    let place = Place::new();
    place.write("job.toml", two_layers().replace("text.txt", "nowhere.txt"));
    insta::assert_snapshot!(place.succeed(&["plan", "job.toml"]), @r"
    model          39,072 parameters: 2 layers, hidden 32, 4 heads (2 kv), feed-forward 64, vocabulary 320
    layout         data 2 x pipeline 2, shard parameters, 2 microbatch(es) of 2 x 32 tokens a rank, 256 tokens a step
    stage 0        embedding to layer0: 19,520 parameters, 8.42 MFLOP a step, 453.28 KiB handed to transfers
    stage 1        layer1 to head: 19,552 parameters, 16.55 MFLOP a step, 373.78 KiB handed to transfers
    ");
    let json: Value =
        serde_json::from_str(&place.succeed(&["plan", "job.toml", "--json"])).unwrap();
    assert_eq!((&json["ranks"], &json["program"]), (&4.into(), &Value::Null));
    assert!(!place.path("runs").exists());
}

#[test]
fn a_described_cluster_is_simulated() {
    let place = Place::new();
    place.write("job.toml", described("dgx-h100-quantum2", 16));
    let stdout = place.succeed(&["simulate", "job.toml", "--trace", "trace.json"]);
    for words in ["h100-sxm of dgx-h100-quantum2", "step time", "exposed communication, data"] {
        assert!(stdout.contains(words), "{words} is not in\n{stdout}");
    }
    assert!(place.json("trace.json")["traceEvents"].is_array());
    place.succeed(&["simulate", "job.toml", "--chakra", "one"]);
    place.succeed(&["simulate", "job.toml", "--chakra", "all", "--chakra-every-rank"]);
    let files = |folder| std::fs::read_dir(place.path(folder)).unwrap().count();
    assert_eq!((files("one"), files("all")), (1 + 1, 16 + 1), "traces and communicators");
    let json: Value =
        serde_json::from_str(&place.succeed(&["simulate", "job.toml", "--json"])).unwrap();
    for key in [
        "step_time_s",
        "tokens_per_s",
        "tokens_per_s_per_accelerator",
        "exposed_communication_s",
        "pipeline_bubble_s",
        "energy_j",
        "energy_j_per_token",
    ] {
        assert!(json[key].is_number(), "{key}: {json}");
    }
    // 16 accelerators of 700 W, their hosts and the facility, for a step.
    let watts = json["energy_j"].as_f64().unwrap() / json["step_time_s"].as_f64().unwrap();
    assert!((0.3..1.0).contains(&(watts / (16.0 * 1050.0 * 1.2))), "{watts} W");
}

#[test]
fn the_best_layouts_of_a_described_cluster_are_planned() {
    let place = Place::new();
    place.write("job.toml", open(16));
    let json: Value =
        serde_json::from_str(&place.succeed(&["plan", "job.toml", "--json", "--best", "3"]))
            .unwrap();
    let times: Vec<f64> = json["plans"]
        .as_array()
        .unwrap()
        .iter()
        .map(|plan| plan["step_time_s"].as_f64().unwrap())
        .collect();
    assert!(times.len() == 3 && times.is_sorted(), "{times:?}");
    let keys =
        |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>().join(" ");
    insta::assert_snapshot!(keys(&json), @"fitting flops_per_step front judged launch layout machine microbatches nodes parameters placements plans program ranks reasons stopped transfers why_not");
    insta::assert_snapshot!(keys(&json["plans"][0]), @"compute_s effective_share energy_j estimated_step_time_s exposed_communication_s goodput_tokens_per_s_per_accelerator layout memory_bytes_peak pipeline_bubble_s simulated step_time_s tokens_per_s_per_accelerator");
    // What is left open is planned wherever a layout is needed, and simulated alike.
    let simulated: Value =
        serde_json::from_str(&place.succeed(&["simulate", "job.toml", "--json"])).unwrap();
    assert_eq!(simulated["step_time_s"], json["plans"][0]["step_time_s"]);
    let text = place.succeed(&["plan", "job.toml"]);
    for words in [
        "best plans",
        "why the first",
        "why not others",
        "transfers of the first",
        "megatron-lm",
        "torchtitan",
        "nemo",
    ] {
        assert!(text.contains(words), "{words} is not in\n{text}");
    }
}

#[test]
fn nodes_that_are_not_to_be_had_are_planned_around() {
    let place = Place::new();
    let drained = "accelerators = 16\ndrained = [1, 2]\nspare_nodes = 1";
    place.write("job.toml", open(16).replace("accelerators = 16", drained));
    let text = place.succeed(&["plan", "job.toml", "--set", "layout.tensor=1"]);
    assert!(text.contains("nodes\n  used: "), "{text}");
    place.write(
        "job.toml",
        open(16).replace("accelerators = 16", "accelerators = 16\ndrained = [9999]"),
    );
    let answer = place.run(&["plan", "job.toml"]);
    assert_eq!(answer.code, Some(2), "{}", answer.stderr);
    assert!(answer.stderr.contains("there is no node 9999"), "{}", answer.stderr);
}

#[test]
fn where_nothing_fits_the_answer_is_no_and_what_to_change() {
    let place = Place::new();
    place.write("job.toml", open(8).replace("llama-3.1-8b", "llama-3.1-405b"));
    let answer = place.run(&["plan", "job.toml"]);
    assert_eq!((answer.code, answer.stdout.as_str()), (Some(1), ""), "{}", answer.stderr);
    for words in ["none of", "layouts fits", "of 79.65 GiB"] {
        assert!(answer.stderr.contains(words), "{words} is not in {}", answer.stderr);
    }
}

#[test]
fn a_step_that_does_not_fit_is_told_and_answered_no() {
    let place = Place::new();
    place.write("job.toml", described("dgx-h100-quantum2", 16).replace("parameters", "none"));
    let answer = place.run(&["simulate", "job.toml"]);
    assert_eq!(answer.code, Some(1), "{}", answer.stderr);
    assert!(answer.stdout.contains("step time"), "{}", answer.stdout);
    assert!(answer.stderr.contains("layout does not fit: stage 0"), "{}", answer.stderr);
}

#[test]
fn a_described_cluster_is_refused_when_unknown_or_too_small() {
    let place = Place::new();
    let refusal = |job: &str| {
        place.write("job.toml", job);
        let answer = place.run(&["simulate", "job.toml"]);
        assert_eq!((answer.code, answer.stdout.as_str()), (Some(2), ""), "{}", answer.stderr);
        answer.stderr
    };
    insta::assert_snapshot!(refusal(&described("dgx-h100-quantum", 16)), @"phalanx: job.toml: [cluster] name: the catalogue has no cluster `dgx-h100-quantum`; did you mean `dgx-h100-quantum2`? `phalanx catalogue` lists all");
    insta::assert_snapshot!(refusal(&described("dgx-h100-quantum2", 16384)), @"phalanx: job.toml: [cluster] accelerators = 16384, but dgx-h100-quantum2 has 11616; lower it, or choose a larger cluster");
    let fp8 = described("dgx-a100-hdr", 16).replace("bf16", "fp8");
    insta::assert_snapshot!(refusal(&fp8), @"phalanx: accelerator a100-sxm-80gb has no fp8; it has fp32, tf32, bf16, int8");
}

#[test]
fn this_machine_is_measured_when_no_file_says_how_fast_it_is() {
    let place = Place::new();
    place.write("job.toml", over(2, "pipeline = 2"));
    let stdout = place.succeed(&["simulate", "job.toml"]);
    for words in ["this one, measured now", "step time", "exposed communication, pipeline"] {
        assert!(stdout.contains(words), "{words} is not in\n{stdout}");
    }
    assert!(!place.path("runs/job-001").exists(), "nothing was trained");
}

#[test]
fn a_machine_file_that_does_not_fit_is_refused() {
    let place = Place::new();
    place.write("job.toml", two_layers());
    let refusal = |machine: &str| {
        place.write("machine.json", machine);
        let answer = place.run(&["simulate", "job.toml", "--machine", "machine.json"]);
        assert_eq!((answer.code, answer.stdout.as_str()), (Some(2), ""), "{}", answer.stderr);
        answer.stderr
    };
    insta::assert_snapshot!(refusal("{}"), @"phalanx: machine.json is no machine file: missing field `model` at line 1 column 2");
}

#[test]
fn every_command_says_what_it_takes() {
    let place = Place::new();
    insta::assert_snapshot!(place.succeed(&["--help"]), @r"
    Plans, simulates and trains Llama-class models over many ranks

    Usage: phalanx <COMMAND>

    Commands:
      train        Train for real: over local ranks, or as one rank of torchrun, srun or mpirun
      launch       Write what Slurm, Kubernetes, mpirun or torchrun need to start a job
      import       Make a job file from a configuration of Hugging Face, torchtitan, Megatron-LM or NeMo
      export       Print a job's settings for Megatron-LM, torchtitan or NeMo
      catalogue    List the hardware and the models that are known, or show an entry with its sources
      plan         Find the best layouts of a job on its cluster, and say why; on this machine, show its layout
      simulate     Run one step in virtual time: where the time goes
      faults       Run the code that recovers runs under simulated faults
      scale        How a job scales: efficiency, what bounds it, cost, energy and goodput at many sizes
      bench        Measure this machine: how fast ranks communicate, beside what it allows
      score        What logs of MLPerf Training, and of our own runs, show: step time, time to train, scaling efficiency
      doctor       Look whether this machine is ready to train on, and say what to fix
      schema       Print the JSON Schema of the job file, for editors
      completions  Print completions for a shell
      man          Write the manual pages
      report       Write a run, or a simulated step, as one page of HTML
      validate     Recompute published measurements: how wrong the simulator is, by source
      help         Print this message or the help of the given subcommand(s)

    Options:
      -h, --help     Print help
      -V, --version  Print version

    Exit codes: 0 done, 1 the answer is no or the run failed, 2 bad usage or input, 3 a bug, 4 stopped as asked and saved, 5 lost ranks again and again.
    ");
    insta::assert_snapshot!(place.succeed(&["train", "--help"]), @r"
    Train for real: over local ranks, or as one rank of torchrun, srun or mpirun

    Usage: phalanx train [OPTIONS] <JOB>

    Arguments:
      <JOB>  The job file

    Options:
          --set <KEY=VALUE>        Replace a key of the job file, as in --set training.steps=20; may be repeated
          --json                   Print one JSON object instead of text
          --resume <RUN>           Go on from the newest checkpoint of an earlier run, whatever its layout; in a new folder
          --chaos <SPEC>           Inject faults: kill:2@7 kills rank 2 after step 7, kill~50#1 a random rank every 50 steps (seed 1), stop halts it, flip flips a bit of its state; several with commas
          --standby                Start nothing yet: take over when the launcher that [recovery] register names is lost
          --listen <ADDRESS:PORT>  Coordinate ranks of several hosts, which reach this one here: [launch] `ranks_per_host` of each that joins
          --join <HOST:PORT>       Start ranks on this host for the launcher that listens there; more hosts than needed are spare
          --metrics <PORT>         Answer Prometheus on this port of this machine: [metrics] port
      -h, --help                   Print help
    ");
    insta::assert_snapshot!(place.succeed(&["plan", "--help"]), @r"
    Find the best layouts of a job on its cluster, and say why; on this machine, show its layout

    Usage: phalanx plan [OPTIONS] <JOB>

    Arguments:
      <JOB>  The job file

    Options:
          --set <KEY=VALUE>     Replace a key of the job file, as in --set training.steps=20; may be repeated
          --json                Print one JSON object instead of text
          --show-program        Print every rank's instructions
          --best <PLANS>        How many of the best plans are shown [default: 10]
          --efficiency <SHARE>  Share of peak that described accelerators reach, instead of what was fitted on measurements
          --software <NAME>     Software whose fitted parameters are used; the usual one of the accelerator unless given
      -h, --help                Print help
    ");
    insta::assert_snapshot!(place.succeed(&["simulate", "--help"]), @r"
    Run one step in virtual time: where the time goes

    Usage: phalanx simulate [OPTIONS] <JOB>

    Arguments:
      <JOB>  The job file

    Options:
          --set <KEY=VALUE>     Replace a key of the job file, as in --set training.steps=20; may be repeated
          --json                Print one JSON object instead of text
          --machine <FILE>      Use the measurements of an earlier run (its machine.json) instead of measuring
          --efficiency <SHARE>  Share of peak that described accelerators reach, instead of what was fitted on measurements
          --software <NAME>     Software whose fitted parameters are used; the usual one of the accelerator unless given
          --trace <FILE>        Write the predicted step for Perfetto
          --chakra <FOLDER>     Write the step as Chakra execution traces, one for each kind of rank, into a new folder
          --chakra-every-rank   Write a Chakra trace for every rank
          --faults              Play weeks of such steps under failures too, with the code that recovers runs: [goodput] says how often
      -h, --help                Print help
    ");
}
