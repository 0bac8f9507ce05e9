use super::*;

/// The job of a job file's text, on a described cluster, so that its layout is free.
fn job(text: &str) -> Job {
    let draft = Draft::parse(text, "job").unwrap();
    let layout = draft.simplest().unwrap();
    draft.laid_out(layout)
}

fn imported(text: &str) -> (String, Vec<String>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("source.txt");
    std::fs::write(&path, text).unwrap();
    let foreign = Foreign::read(&path).unwrap();
    let unknown = foreign.unknown.clone();
    (foreign.job_file(&path, None).unwrap(), unknown)
}

const JOB: &str = r#"
[model]
layers = 32
hidden = 4096
heads = 32
kv_heads = 8
feed_forward = 14336
vocabulary = 128256
[cluster]
accelerators = 16
[training]
sequence = 8192
global_batch = 64
steps = 500
precision = "bf16"
learning_rate = 2e-4
warmup_steps = 20
[layout]
tensor = 2
pipeline = 4
virtual_stages = 2
context = 2
micro_batch = 1
shard = "optimizer"
sequence_parallel = true
context_exchange = "ring"
recompute = { layers = 1 }
"#;

#[test]
fn megatrons_words_for_a_job_make_the_same_job() {
    let before = job(JOB);
    let settings = launches(&before.layout, &before.batch());
    let megatron = settings.into_iter().find(|it| it.trainer == "megatron-lm").unwrap();
    let words = [megatron.settings, megatron_model(&before), megatron_training(&before)].concat();
    let (text, unknown) = imported(&words.join("\n"));
    assert_eq!(unknown, ["max-position-embeddings"], "{text}");
    let after = job(&text);
    assert_eq!(after.layout, before.layout, "{text}");
    assert_eq!(after.model, before.model, "{text}");
    assert_eq!(after.resolved().split("[data]").next(), before.resolved().split("[data]").next());
}

#[test]
fn torchtitans_and_nemos_words_keep_the_layout() {
    let before = job(JOB);
    for launch in launches(&before.layout, &before.batch()) {
        if launch.trainer == "megatron-lm" {
            continue;
        }
        let model = megatron_model(&before).join("\n");
        let (text, _) = imported(&format!("{}\n{model}", launch.settings.join("\n")));
        let after = job(&text).layout;
        assert_eq!(after.mesh, before.layout.mesh, "{text}");
        assert_eq!(after.micro_batch, before.layout.micro_batch, "{text}");
        assert_eq!(after.recompute == plan::Recompute::Full, launch.trainer == "torchtitan");
    }
}

#[test]
fn a_script_of_megatron_is_read_with_its_variables() {
    let script = r#"
#!/bin/bash
TP=8
NUM_LAYERS=${NUM_LAYERS:-126}
MODEL_ARGS=(
    --num-layers $NUM_LAYERS
    --hidden-size 16384 --num-attention-heads 128
    --group-query-attention --num-query-groups 8 \
    --ffn-hidden-size 53248
    --vocab-size 128256
    --swiglu
    --no-masked-softmax-fusion
)
torchrun pretrain_gpt.py ${MODEL_ARGS[@]} \
    --tensor-model-parallel-size ${TP} --pipeline-model-parallel-size=9 --sequence-parallel \
    --micro-batch-size 1 --global-batch-size 504 --seq-length 8192 --bf16
"#;
    let (text, unknown) = imported(script);
    insta::assert_snapshot!(text);
    assert_eq!(unknown, ["no-masked-softmax-fusion"]);
}

#[test]
fn a_torchtitan_file_names_what_is_not_taken_over() {
    let config = r#"
[job]
dump_folder = "./outputs"
[model]
name = "llama3"
flavor = "8B"
[training]
local_batch_size = 1
seq_len = 8192
steps = 1000
[parallelism]
data_parallel_shard_degree = 4
tensor_parallel_degree = 2
[activation_checkpoint]
mode = "selective"
[optimizer]
lr = 3e-4
"#;
    let (text, unknown) = imported(config);
    insta::assert_snapshot!(text);
    assert_eq!(unknown, ["job.dump_folder", "model.name"]);
}

#[test]
fn hugging_face_dimensions_are_those_of_the_catalogue() {
    let config = r#"{"model_type": "deepseek_v3", "num_hidden_layers": 61, "hidden_size": 7168,
        "num_attention_heads": 128, "num_key_value_heads": 128, "intermediate_size": 18432,
        "vocab_size": 129280, "tie_word_embeddings": false, "rms_norm_eps": 1e-06,
        "rope_theta": 10000, "n_routed_experts": 256, "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048, "n_shared_experts": 1, "first_k_dense_replace": 3,
        "scoring_func": "sigmoid", "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}"#;
    let (text, unknown) = imported(config);
    assert_eq!(unknown, ["model_type"]);
    let (model, known) = (job(&text).model, model::catalogue::find("deepseek-v3").unwrap());
    assert_eq!(model.parameter_count(), known.parameter_count(), "{text}");
    assert_eq!((model.experts, model.latent_attention), (known.experts, known.latent_attention));
}

#[test]
fn what_is_no_configuration_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("poem.txt");
    std::fs::write(&path, "Tyger Tyger, burning bright").unwrap();
    let refused = Foreign::read(&path).unwrap_err().to_string();
    assert!(refused.starts_with("nothing in it is known"), "{refused}");
}
