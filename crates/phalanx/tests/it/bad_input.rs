//! Bad input: exit code 2, one message, nothing on standard output, earlier runs untouched.

use std::fs;

use crate::place::{JOB, Place, over};

/// Trains a job that must be refused; the one message it gets.
fn refusal(place: &Place, job: &str) -> String {
    place.write("runs/earlier-001/metrics.jsonl", "{}\n");
    place.write("runs/earlier-001/model/config.json", "{}\n");
    // What the text became is kept for the next try; it belongs to no run.
    let runs = || {
        let mut files = place.files("runs");
        files.retain(|path, _| !path.starts_with(place.path("runs/cache")));
        files
    };
    let before = runs();
    place.write("job.toml", job);
    let answer = place.run(&["train", "job.toml"]);
    assert_eq!((answer.code, answer.stdout.as_str()), (Some(2), ""), "{}", answer.stderr);
    assert_eq!(answer.stderr.matches("phalanx: ").count(), 1, "{}", answer.stderr);
    assert_eq!(runs(), before);
    answer.stderr
}

/// The job of the tests on other text.
fn on(text: &str) -> String {
    JOB.replace("text.txt", text)
}

/// The job of the tests with other words for its model.
fn with_model(model: &str) -> String {
    let (_, rest) = JOB.split_once("[data]").unwrap();
    format!("[model]\n{model}\n\n[data]{rest}")
}

#[test]
fn text_that_is_missing() {
    let place = Place::new();
    insta::assert_snapshot!(refusal(&place, &on("nowhere/*.txt")), @"phalanx: no file matches `nowhere/*.txt` (expanded to `nowhere/*.txt`); name a file, a folder or a glob that exists");
    insta::assert_snapshot!(refusal(&place, &on("${PHALANX_TEST_NOWHERE}/text.txt")), @"phalanx: `${PHALANX_TEST_NOWHERE}/text.txt` uses the environment variable PHALANX_TEST_NOWHERE, which is not set; set it, or give a default: ${PHALANX_TEST_NOWHERE:-...}");
    insta::assert_snapshot!(refusal(&place, &JOB.replace("text = [\"text.txt\"]", "")), @"phalanx: [data] text is missing; name files, folders or globs of text");
}

#[test]
fn text_that_cannot_be_read() {
    let place = Place::new();
    place.write("binary.txt", [0xff, 0xfe, 0x00]);
    insta::assert_snapshot!(refusal(&place, &on("binary.txt")), @"phalanx: binary.txt is not UTF-8 text; convert it, or leave it out");
    place.write("lines.jsonl", "{\"text\": \"one\"}\n{\"txt\": \"two\"}\n");
    insta::assert_snapshot!(refusal(&place, &on("lines.jsonl")), @r#"phalanx: lines.jsonl, line 2: missing field `text`, column 14; each line must be {"text": "..."}"#);
}

#[test]
fn text_that_is_too_short() {
    let place = Place::new();
    let job = JOB.replace("global_batch = 8", "global_batch = 100000");
    insta::assert_snapshot!(refusal(&place, &job), @"phalanx: the text is too short for one batch: 113323 tokens, and 3265282 are needed for 100000 sequences of 32 tokens beside the held-out ones; give more text, or lower `global_batch` or `sequence`");
    place.write("few.txt", "Few words.");
    insta::assert_snapshot!(refusal(&place, &on("few.txt")), @"phalanx: the text fills a vocabulary of 264 only, 320 were asked for; ask for 264 or fewer, or give more text");
}

#[test]
fn an_unknown_key_or_name() {
    let place = Place::new();
    insta::assert_snapshot!(refusal(&place, &JOB.replace("global_batch", "globel_batch")), @r"
    phalanx: job.toml: TOML parse error at line 15, column 1
       |
    15 | globel_batch = 8
       | ^^^^^^^^^^^^
    unknown field `globel_batch`, expected one of `sequence`, `global_batch`, `precision`, `steps`, `tokens`, `learning_rate`, `minimum_learning_rate`, `warmup_steps`, `weight_decay`, `compress`, `beta1`, `beta2`, `epsilon`, `clip_norm`, `outer_learning_rate`, `outer_momentum`, `seed`, `evaluate_every`, `evaluation_sequences`, `on_divergence`, `spike`
    did you mean `global_batch` instead of `globel_batch`?
    ");
    insta::assert_snapshot!(refusal(&place, &format!("{JOB}[lay_out]\n")), @r"
    phalanx: job.toml: TOML parse error at line 22, column 2
       |
    22 | [lay_out]
       |  ^^^^^^^
    unknown field `lay_out`, expected one of `model`, `cluster`, `training`, `layout`, `data`, `checkpoint`, `recovery`, `run`, `launch`, `metrics`, `scale`, `goodput`, `islands`, `scenario`
    did you mean `layout` instead of `lay_out`?
    ");
    insta::assert_snapshot!(refusal(&place, &with_model("name = \"tinny\"")), @"phalanx: job.toml: the catalogue has no model `tinny`; the nearest is `tiny`");
    insta::assert_snapshot!(refusal(&place, &over(2, "shard = \"gradient\"")), @r#"
    phalanx: job.toml: TOML parse error at line 27, column 9
       |
    27 | shard = "gradient"
       |         ^^^^^^^^^^
    unknown variant `gradient`, expected one of `none`, `optimizer`, `gradients`, `parameters`
    did you mean `gradients` instead of `gradient`?
    "#);
}

#[test]
fn a_layout_that_does_not_divide() {
    let place = Place::new();
    insta::assert_snapshot!(refusal(&place, &over(4, "pipeline = 3")), @"phalanx: job.toml: layout: tensor 1 x context 1 x pipeline 3 does not divide 4 ranks; choose degrees whose product does, or change [cluster] accelerators");
    insta::assert_snapshot!(refusal(&place, &over(3, "pipeline = 3")), @"phalanx: job.toml: layout: pipeline 3 does not divide the model's 4 layers; choose one of [1, 2, 4], or set embedding_is_layer, head_is_layer, first_layers, last_layers or stage_layers");
    insta::assert_snapshot!(refusal(&place, &over(2, "micro_batch = 3")), @"phalanx: job.toml: layout: data 2 x micro_batch 3 does not divide global_batch 8; each data-parallel rank needs a whole number of microbatches");
    insta::assert_snapshot!(refusal(&place, &over(2, "attention = \"unfused\"")), @"phalanx: layout: `attention` is planned and simulated, but cannot be trained with yet; leave it out");
}

#[test]
fn a_model_that_cannot_be_trained_yet() {
    let place = Place::new();
    insta::assert_snapshot!(refusal(&place, &with_model("name = \"gpt-3-175b\"")), @"phalanx: [model]: `activation`: such a model is planned and simulated, but cannot be trained or stored yet");
}

#[test]
fn weights_that_are_truncated() {
    let place = Place::new();
    place.write_model("model");
    let path = place.path("model/model.safetensors");
    let whole = fs::read(&path).unwrap();
    let cut_to = |length: usize| {
        place.write("model/model.safetensors", &whole[..length]);
        refusal(&place, &with_model("weights = \"model\""))
    };
    insta::assert_snapshot!(cut_to(whole.len() - 1), @"phalanx: job.toml: model/model.safetensors is not a whole safetensors file: its tensors take 230528 bytes and it has 230527 for them; download or write it again");
    insta::assert_snapshot!(cut_to(100), @"phalanx: job.toml: model/model.safetensors is not a whole safetensors file: it has 100 bytes and claims a header of 3952; download or write it again");
    insta::assert_snapshot!(cut_to(0), @"phalanx: job.toml: model/model.safetensors is not a whole safetensors file: it has 0 bytes, not even a header; download or write it again");
}

#[test]
fn weights_of_another_model() {
    let place = Place::new();
    place.write_model("model");
    let config = place.read("model/config.json");
    place.write("model/config.json", config.replace("\"hidden_size\": 32", "\"hidden_size\": 64"));
    insta::assert_snapshot!(refusal(&place, &with_model("weights = \"model\"")), @"phalanx: job.toml: model/model.safetensors: tensor `model.embed_tokens.weight` has shape [320, 32], the config gives it [320, 64]; are config.json and weights of the same model?");
    let fewer = config.replace("\"num_hidden_layers\": 4", "\"num_hidden_layers\": 3");
    place.write("model/config.json", fewer);
    insta::assert_snapshot!(refusal(&place, &with_model("weights = \"model\"")), @"phalanx: job.toml: model: the config has no place for model.layers.3.input_layernorm.weight, model.layers.3.mlp.down_proj.weight, model.layers.3.mlp.gate_proj.weight, model.layers.3.mlp.up_proj.weight, model.layers.3.post_attention_layernorm.weight, model.layers.3.self_attn.k_proj.weight, model.layers.3.self_attn.o_proj.weight, model.layers.3.self_attn.q_proj.weight, model.layers.3.self_attn.v_proj.weight; are config.json and weights of the same model?");
    place.write("model/config.json", &config);
    fs::remove_file(place.path("model/model.safetensors")).unwrap();
    insta::assert_snapshot!(refusal(&place, &with_model("weights = \"model\"")), @"phalanx: job.toml: no model.safetensors and no model.safetensors.index.json in model; name the folder that holds the downloaded model");
}

#[test]
fn a_cluster_that_is_not_here() {
    let place = Place::new();
    let described = format!("{JOB}\n[cluster]\nname = \"dgx-h100-quantum2\"\n");
    insta::assert_snapshot!(refusal(&place, &described), @r#"phalanx: [cluster] name = "dgx-h100-quantum2" is described, not here: `simulate` it, or train with name = "local""#);
    let unknown = format!("{JOB}\n[cluster]\nname = \"dgx-h100-quantum\"\n");
    insta::assert_snapshot!(refusal(&place, &unknown), @"phalanx: job.toml: [cluster] name: the catalogue has no cluster `dgx-h100-quantum`; did you mean `dgx-h100-quantum2`? `phalanx catalogue` lists all");
}

#[test]
fn a_run_to_go_on_from_that_is_not_there() {
    let place = Place::new();
    place.write("job.toml", JOB);
    let answer = place.run(&["train", "job.toml", "--resume", "runs/nowhere"]);
    assert_eq!((answer.code, answer.stdout.as_str()), (Some(2), ""), "before anything is prepared");
    insta::assert_snapshot!(answer.stderr, @"phalanx: --resume runs/nowhere: there is no such run folder");
}

#[test]
fn settings_out_of_range() {
    let place = Place::new();
    insta::assert_snapshot!(refusal(&place, &JOB.replace("steps = 20", "steps = 0")), @"phalanx: job.toml: [training] steps is 0; it must be at least 1");
    insta::assert_snapshot!(refusal(&place, &JOB.replace("sequence = 32", "sequence = 0")), @"phalanx: job.toml: `sequence` is 0; it must be at least 1");
    insta::assert_snapshot!(refusal(&place, &JOB.replace("1e-2", "-1.0")), @"phalanx: job.toml: [training] learning_rate = -1 is no rate; it must be at least 0");
    let few = JOB.replace("vocabulary = 320", "vocabulary = 100");
    insta::assert_snapshot!(refusal(&place, &few), @"phalanx: a vocabulary of 100 is too small; a byte-level one needs at least 257");
    let many = JOB.replace("vocabulary = 320", "vocabulary = 100000");
    insta::assert_snapshot!(refusal(&place, &many), @"phalanx: the text fills a vocabulary of 362 only, 100000 were asked for; ask for 362 or fewer, or give more text");
}

#[test]
fn a_key_set_on_the_command_line() {
    let place = Place::new();
    place.write("job.toml", JOB);
    let refusal = |setting: &str| {
        let answer = place.run(&["train", "job.toml", "--set", setting]);
        assert_eq!((answer.code, answer.stdout.as_str()), (Some(2), ""), "{}", answer.stderr);
        assert!(!place.path("runs").exists());
        answer.stderr
    };
    insta::assert_snapshot!(refusal("steps=3"), @"phalanx: job.toml: --set steps=3: write it as section.key=value");
    insta::assert_snapshot!(refusal("training.step=3"), @r"
    phalanx: job.toml: TOML parse error at line 20, column 1
       |
    20 | step = 3
       | ^^^^
    unknown field `step`, expected one of `sequence`, `global_batch`, `precision`, `steps`, `tokens`, `learning_rate`, `minimum_learning_rate`, `warmup_steps`, `weight_decay`, `compress`, `beta1`, `beta2`, `epsilon`, `clip_norm`, `outer_learning_rate`, `outer_momentum`, `seed`, `evaluate_every`, `evaluation_sequences`, `on_divergence`, `spike`
    did you mean `steps` instead of `step`?
    ");
    insta::assert_snapshot!(refusal("training.steps=few"), @r#"
    phalanx: job.toml: TOML parse error at line 20, column 9
       |
    20 | steps = "few"
       |         ^^^^^
    invalid type: string "few", expected u64
    "#);
}

#[test]
fn a_job_file_that_is_none() {
    let place = Place::new();
    insta::assert_snapshot!(refusal(&place, "[training\n"), @r"
    phalanx: job.toml: TOML parse error at line 1, column 10
      |
    1 | [training
      |          ^
    unclosed table, expected `]`
    ");
    let answer = place.run(&["train", "nowhere.toml"]);
    assert_eq!((answer.code, answer.stdout.as_str()), (Some(2), ""));
    insta::assert_snapshot!(answer.stderr, @"phalanx: cannot read the job file nowhere.toml: No such file or directory (os error 2)");
    let answer = place.run(&["trian", "job.toml"]);
    assert_eq!((answer.code, answer.stdout.as_str()), (Some(2), ""));
    insta::assert_snapshot!(answer.stderr, @r"
    error: unrecognized subcommand 'trian'

      tip: a similar subcommand exists: 'train'

    Usage: phalanx <COMMAND>

    For more information, try '--help'.
    ");
}

#[test]
#[cfg(not(feature = "burn-cuda"))]
fn a_device_that_the_build_lacks() {
    let place = Place::new();
    let job = format!("{JOB}\n[cluster]\ndevice = \"cuda\"\n");
    insta::assert_snapshot!(refusal(&place, &job), @"phalanx: [cluster] device: this build has no such device; build it with `cargo build --release --features burn-cuda`");
}
