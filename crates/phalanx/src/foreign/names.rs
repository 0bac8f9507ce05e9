//! What settings of other trainers are called here.
//!
//! Names are those of transformers (config.json of Llama, Mixtral and DeepSeek-V3), Megatron-LM
//! (megatron/training/arguments.py, core 0.14), NeMo, which has the same with underscores, and
//! torchtitan (torchtitan/config/job_config.py, 2025-10); all as of 2025-11.

use anyhow::{Result, bail};
use toml::{Table, Value};

use super::Foreign;

/// Takes a value over.
type Take = fn(&mut Foreign, &str) -> Result<()>;

/// Where a setting goes.
#[derive(Debug, Clone, Copy)]
enum To {
    Model(&'static str),
    Experts(&'static str),
    Latent(&'static str),
    Training(&'static str),
    Layout(&'static str),
    /// It takes more than another name.
    By(Take),
    /// It says what is so here anyway.
    Nowhere,
}

use To::{By, Experts, Latent, Layout, Model, Nowhere, Training};

/// By name: torchtitan's with its section, the others' with dashes.
const NAMES: [(&str, To); 89] = [
    ("num-layers", Model("layers")),
    ("num-hidden-layers", Model("layers")),
    ("hidden-size", Model("hidden")),
    ("num-attention-heads", Model("heads")),
    ("num-query-groups", Model("kv_heads")),
    ("num-key-value-heads", Model("kv_heads")),
    ("kv-channels", Model("head_dim")),
    ("head-dim", Model("head_dim")),
    ("ffn-hidden-size", Model("feed_forward")),
    ("intermediate-size", Model("feed_forward")),
    ("vocab-size", Model("vocabulary")),
    ("padded-vocab-size", Model("vocabulary")),
    ("tie-word-embeddings", Model("tied_embeddings")),
    ("norm-epsilon", Model("norm_epsilon")),
    ("rms-norm-eps", Model("norm_epsilon")),
    ("rotary-base", Model("rotary_theta")),
    ("rope-theta", Model("rotary_theta")),
    ("qk-layernorm", Model("query_key_norm")),
    ("mtp-num-layers", Model("prediction_layers")),
    ("num-nextn-predict-layers", Model("prediction_layers")),
    ("num-experts", Experts("count")),
    ("n-routed-experts", Experts("count")),
    ("num-local-experts", Experts("count")),
    ("moe-router-topk", Experts("per_token")),
    ("num-experts-per-tok", Experts("per_token")),
    ("moe-ffn-hidden-size", Experts("width")),
    ("moe-intermediate-size", Experts("width")),
    ("moe-shared-expert-intermediate-size", Experts("shared_width")),
    ("n-shared-experts", Experts("shared")),
    ("first-k-dense-replace", Experts("dense_layers")),
    ("n-group", Experts("groups")),
    ("topk-group", Experts("groups_per_token")),
    ("routed-scaling-factor", Experts("scale")),
    ("scoring-func", Experts("scoring")),
    ("q-lora-rank", Latent("query_rank")),
    ("kv-lora-rank", Latent("kv_rank")),
    ("qk-nope-head-dim", Latent("nope_dim")),
    ("qk-rope-head-dim", Latent("rope_dim")),
    ("v-head-dim", Latent("value_dim")),
    ("qk-head-dim", Latent("nope_dim")),
    ("qk-pos-emb-head-dim", Latent("rope_dim")),
    ("untie-embeddings-and-output-weights", By(untied)),
    ("share-embeddings-and-output-weights", Model("tied_embeddings")),
    ("group-query-attention", Nowhere),
    ("swiglu", Nowhere),
    ("disable-bias-linear", Nowhere),
    ("lr-decay-style", By(cosine)),
    ("lr-scheduler.decay-type", By(cosine)),
    ("normalization", By(|foreign, value| word(foreign, "normalization", value, "RMSNorm"))),
    ("position-embedding-type", By(|it, value| word(it, "position-embedding-type", value, "rope"))),
    ("hidden-act", By(|foreign, value| word(foreign, "hidden_act", value, "silu"))),
    ("seq-length", Training("sequence")),
    ("training.seq-len", Training("sequence")),
    ("global-batch-size", Training("global_batch")),
    ("training.global-batch-size", By(torchtitan_batch)),
    ("train-iters", Training("steps")),
    ("training.steps", Training("steps")),
    ("lr", Training("learning_rate")),
    ("optimizer.lr", Training("learning_rate")),
    ("min-lr", Training("minimum_learning_rate")),
    ("lr-warmup-iters", Training("warmup_steps")),
    ("lr-scheduler.warmup-steps", Training("warmup_steps")),
    ("weight-decay", Training("weight_decay")),
    ("adam-beta1", Training("beta1")),
    ("adam-beta2", Training("beta2")),
    ("adam-eps", Training("epsilon")),
    ("clip-grad", Training("clip_norm")),
    ("training.max-norm", Training("clip_norm")),
    ("seed", Training("seed")),
    ("bf16", By(|foreign, _| precision(foreign, "bf16"))),
    ("fp8-format", By(|foreign, _| precision(foreign, "fp8"))),
    ("micro-batch-size", Layout("micro_batch")),
    ("training.local-batch-size", By(local_batch)),
    ("parallelism.pipeline-parallel-microbatch-size", Layout("micro_batch")),
    ("tensor-model-parallel-size", Layout("tensor")),
    ("parallelism.tensor-parallel-degree", Layout("tensor")),
    ("pipeline-model-parallel-size", Layout("pipeline")),
    ("parallelism.pipeline-parallel-degree", Layout("pipeline")),
    ("context-parallel-size", Layout("context")),
    ("parallelism.context-parallel-degree", Layout("context")),
    ("num-virtual-stages-per-pipeline-rank", Layout("virtual_stages")),
    ("virtual-pipeline-model-parallel-size", Layout("virtual_stages")),
    ("expert-model-parallel-size", Layout("expert")),
    ("parallelism.expert-parallel-degree", Layout("expert")),
    ("expert-tensor-parallel-size", Layout("expert_tensor")),
    ("sequence-parallel", Layout("sequence_parallel")),
    ("account-for-embedding-in-pipeline-split", Layout("embedding_is_layer")),
    ("account-for-loss-in-pipeline-split", Layout("head_is_layer")),
    ("model.flavor", By(flavor)),
];

/// Settings whose value is turned into words of a layout.
const CHOICES: [(&str, Take); 14] = [
    ("use-distributed-optimizer", |foreign, value| shard(foreign, value, "optimizer")),
    ("data-parallel-sharding-strategy", sharding),
    ("use-megatron-fsdp", |_, _| Ok(())),
    ("overlap-grad-reduce", |foreign, value| timing(foreign, "gradient_reduction", value)),
    ("overlap-param-gather", |foreign, value| timing(foreign, "parameter_gathering", value)),
    ("tp-comm-overlap", |_, _| Ok(())),
    ("cp-comm-type", exchange),
    ("recompute-granularity", granularity),
    ("recompute-method", method),
    ("recompute-num-layers", recompute_layers),
    ("activation-checkpoint.mode", granularity),
    ("parallelism.data-parallel-shard-degree", shard_degree),
    ("parallelism.data-parallel-replicate-degree", replicas),
    ("parallelism.pipeline-parallel-schedule", schedule),
];

/// Takes a setting over, or notes that it is not known.
pub fn take(foreign: &mut Foreign, name: &str, value: &str) -> Result<()> {
    let dashed = name.replace('_', "-");
    let last = dashed.rsplit('.').next().unwrap_or(&dashed);
    foreign.is_megatron |= last == "tensor-model-parallel-size";
    // With its section first: torchtitan and NeMo use some last parts for different things.
    for name in [dashed.as_str(), last] {
        if let Some((_, choose)) = CHOICES.iter().find(|(known, _)| *known == name) {
            return choose(foreign, value);
        }
        if let Some((_, to)) = NAMES.iter().find(|(known, _)| *known == name) {
            return put(foreign, *to, value);
        }
    }
    foreign.unknown.push(name.to_owned());
    Ok(())
}

fn put(foreign: &mut Foreign, to: To, value: &str) -> Result<()> {
    if value == "null" || value == "None" {
        return Ok(());
    }
    let (table, key) = match to {
        Model(key) => (&mut foreign.model, key),
        Experts(key) => (inside(&mut foreign.model, "experts"), key),
        Latent(key) => (inside(&mut foreign.model, "latent_attention"), key),
        Training(key) => (&mut foreign.training, key),
        Layout(key) => (&mut foreign.layout, key),
        By(take) => return take(foreign, value),
        Nowhere => return Ok(()),
    };
    table.insert(key.to_owned(), parsed(value)?);
    Ok(())
}

fn inside<'a>(table: &'a mut Table, name: &str) -> &'a mut Table {
    let entry = table.entry(name).or_insert_with(|| Value::Table(Table::new()));
    entry.as_table_mut().expect("only tables are put there")
}

/// A number, a truth, or a word.
fn parsed(value: &str) -> Result<Value> {
    if value.starts_with('$') {
        bail!("the value is a variable that is set nowhere in the file; write it in");
    }
    let plain = value.replace('_', "");
    Ok(match value {
        "true" | "True" => Value::Boolean(true),
        "false" | "False" => Value::Boolean(false),
        _ => match (plain.parse::<i64>(), plain.parse::<f64>()) {
            (Ok(whole), _) => Value::Integer(whole),
            (_, Ok(number)) => Value::Float(number),
            _ => Value::String(value.to_owned()),
        },
    })
}

/// What the settings mean together.
pub fn complete(foreign: &mut Foreign) {
    if foreign.layout.contains_key("tensor") && foreign.is_megatron {
        complete_megatron(foreign);
    }
    // Shared experts are given by number or by width.
    if let Some(Value::Table(experts)) = foreign.model.get_mut("experts") {
        let width = experts.get("width").and_then(Value::as_integer);
        let shared = experts.remove("shared").and_then(|shared| shared.as_integer());
        if let Some((width, shared)) = width.zip(shared) {
            experts.insert("shared_width".into(), Value::Integer(width * shared));
        }
        // Mixtral's experts are as wide as its feed-forward block would be.
        if let (None, Some(width)) = (width, foreign.model.get("feed_forward").cloned()) {
            inside(&mut foreign.model, "experts").insert("width".into(), width);
        }
    }
}

/// Megatron's arguments that are left out are off.
fn complete_megatron(foreign: &mut Foreign) {
    let off = |table: &mut Table, key: &str, value: Value| {
        table.entry(key).or_insert(value);
    };
    if foreign.model.contains_key("layers") {
        off(&mut foreign.model, "tied_embeddings", Value::Boolean(true));
    }
    for (key, word) in [
        ("shard", "none"),
        ("gradient_reduction", "exposed"),
        ("parameter_gathering", "exposed"),
        ("recompute", "none"),
    ] {
        off(&mut foreign.layout, key, Value::String(word.to_owned()));
    }
    off(&mut foreign.layout, "sequence_parallel", Value::Boolean(false));
}

fn untied(foreign: &mut Foreign, value: &str) -> Result<()> {
    foreign.model.insert("tied_embeddings".into(), Value::Boolean(!is_on(value)));
    Ok(())
}

fn is_on(value: &str) -> bool {
    ["true", "True", "1"].contains(&value)
}

fn layout(foreign: &mut Foreign, key: &str, word: &str) -> Result<()> {
    foreign.layout.insert(key.to_owned(), Value::String(word.to_owned()));
    Ok(())
}

fn number(value: &str) -> Result<i64> {
    match parsed(value)? {
        Value::Integer(number) => Ok(number),
        _ => bail!("is no whole number"),
    }
}

/// A word of which only one is carried out here.
fn word(foreign: &mut Foreign, name: &str, value: &str, only: &str) -> Result<()> {
    if value != only {
        foreign.unknown.push(format!("{name} {value}"));
    }
    Ok(())
}

fn cosine(foreign: &mut Foreign, value: &str) -> Result<()> {
    word(foreign, "decay", value, "cosine")
}

fn precision(foreign: &mut Foreign, word: &str) -> Result<()> {
    // fp8 is said beside bf16, before it or after.
    let known = foreign.training.get("precision").and_then(Value::as_str);
    if known != Some("fp8") {
        foreign.training.insert("precision".into(), Value::String(word.to_owned()));
    }
    Ok(())
}

/// -1 is the local batch on every replica.
fn torchtitan_batch(foreign: &mut Foreign, value: &str) -> Result<()> {
    let batch = number(value)?;
    if batch > 0 {
        foreign.training.insert("global_batch".into(), Value::Integer(batch));
    }
    Ok(())
}

/// A microbatch, unless a pipeline cuts it.
fn local_batch(foreign: &mut Foreign, value: &str) -> Result<()> {
    let batch = Value::Integer(number(value)?);
    foreign.layout.entry("micro_batch").or_insert(batch);
    Ok(())
}

fn shard(foreign: &mut Foreign, value: &str, level: &str) -> Result<()> {
    layout(foreign, "shard", if is_on(value) { level } else { "none" })
}

fn sharding(foreign: &mut Foreign, value: &str) -> Result<()> {
    let level = match value {
        "no_shard" => "none",
        "optim" => "optimizer",
        "optim_grads" => "gradients",
        "optim_grads_params" => "parameters",
        _ => bail!("is no strategy of Megatron's FSDP"),
    };
    layout(foreign, "shard", level)
}

fn timing(foreign: &mut Foreign, key: &str, value: &str) -> Result<()> {
    layout(foreign, key, if is_on(value) { "overlapped" } else { "exposed" })
}

fn exchange(foreign: &mut Foreign, value: &str) -> Result<()> {
    match value {
        "p2p" => layout(foreign, "context_exchange", "ring"),
        "all_gather" => layout(foreign, "context_exchange", "all-gather"),
        _ => word(foreign, "cp-comm-type", value, "p2p"),
    }
}

fn granularity(foreign: &mut Foreign, value: &str) -> Result<()> {
    match value {
        "selective" | "full" | "none" => {
            // How many layers may have been said before.
            let layers = foreign.layout.get("recompute").is_some_and(Value::is_table);
            if layers { Ok(()) } else { layout(foreign, "recompute", value) }
        }
        _ => word(foreign, "recompute", value, "full"),
    }
}

fn method(foreign: &mut Foreign, value: &str) -> Result<()> {
    foreign.block_recompute = value == "block";
    Ok(())
}

/// With the method `block`, so many layers of each stage; with `uniform`, one by one, all of them.
fn recompute_layers(foreign: &mut Foreign, value: &str) -> Result<()> {
    let layers = number(value)?;
    if foreign.block_recompute {
        let table = [("layers".to_owned(), Value::Integer(layers))].into_iter().collect();
        foreign.layout.insert("recompute".into(), Value::Table(table));
    }
    Ok(())
}

/// -1 is whatever the launcher starts.
fn shard_degree(foreign: &mut Foreign, value: &str) -> Result<()> {
    let degree = number(value)?;
    layout(foreign, "shard", if degree == 1 { "none" } else { "parameters" })?;
    if degree > 0 {
        foreign.replicas = Some(foreign.replicas.unwrap_or(1) * degree as u64);
    }
    Ok(())
}

fn replicas(foreign: &mut Foreign, value: &str) -> Result<()> {
    let degree = number(value)?.max(1) as u64;
    if degree > 1 {
        foreign.replicas = Some(foreign.replicas.unwrap_or(1) * degree);
    }
    Ok(())
}

fn schedule(foreign: &mut Foreign, value: &str) -> Result<()> {
    match value {
        "1F1B" => layout(foreign, "schedule", "1f1b"),
        "GPipe" => layout(foreign, "schedule", "gpipe"),
        "Interleaved1F1B" => layout(foreign, "schedule", "interleaved"),
        "InterleavedZeroBubble" => layout(foreign, "schedule", "zero-bubble"),
        _ => word(foreign, "pipeline_parallel_schedule", value, "1F1B"),
    }
}

/// torchtitan's models by their name in the catalogue.
fn flavor(foreign: &mut Foreign, value: &str) -> Result<()> {
    let name = match value {
        "8B" => "llama-3.1-8b",
        "70B" => "llama-3.1-70b",
        "405B" => "llama-3.1-405b",
        "671B" => "deepseek-v3",
        _ => bail!("is no flavor that the catalogue has; give [model] by its dimensions"),
    };
    foreign.model.insert("name".into(), Value::String(name.to_owned()));
    Ok(())
}
