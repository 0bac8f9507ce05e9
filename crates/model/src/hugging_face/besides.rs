//! What each architecture has besides a Llama's dimensions: the keys of its `config.json`.

use serde::Serialize;

use super::Object;
use crate::{Architecture, Config, Error, Experts, LatentAttention, Scoring, SlidingWindow};

/// Fills in what the architecture has besides.
pub(super) fn read(
    json: &Object,
    architecture: Architecture,
    config: &mut Config,
) -> Result<(), Error> {
    match architecture {
        Architecture::Llama => {}
        Architecture::Mistral => {
            let stated = json.object.contains_key("sliding_window");
            let length = if stated { json.optional("sliding_window")? } else { Some(4096) };
            config.sliding_window = length.map(everywhere);
        }
        Architecture::Qwen3 => {
            config.query_key_norm = true;
            config.sliding_window = qwen_window(json, config.layers)?;
        }
        Architecture::Mixtral => {
            config.sliding_window = json.optional("sliding_window")?.map(everywhere);
            config.experts = Some(Experts::new(
                json.or("num_local_experts", 8)?,
                json.or("num_experts_per_tok", 2)?,
                config.feed_forward,
            ));
        }
        Architecture::Qwen3Moe => {
            config.query_key_norm = true;
            config.sliding_window = window_used(json)?.map(everywhere);
            config.experts = Some(qwen_experts(json)?);
        }
        Architecture::Glm4Moe => {
            config.query_key_norm = json.or("use_qk_norm", false)?;
            config.experts = Some(sigmoid_experts(json)?);
        }
        Architecture::DeepseekV2 => {
            config.latent_attention = Some(latent_attention(json)?);
            config.experts = Some(softmax_experts(json)?);
        }
        Architecture::DeepseekV3 => {
            json.only("num_nextn_predict_layers", 0)?;
            json.only("rope_interleave", true)?;
            config.latent_attention = Some(latent_attention(json)?);
            config.experts = Some(sigmoid_experts(json)?);
        }
    }
    // Where all layers are dense, the keys of experts say nothing.
    config.experts = config.experts.filter(|experts| experts.dense_layers < config.layers);
    config.head_dim = config.latent_attention.map_or(config.head_dim, |latent| latent.nope_dim);
    Ok(())
}

fn everywhere(length: u64) -> SlidingWindow {
    SlidingWindow { length, full_every: None }
}

fn window_used(json: &Object) -> Result<Option<u64>, Error> {
    let length = json.or("sliding_window", 4096)?;
    Ok(json.or("use_sliding_window", false)?.then_some(length))
}

/// The window of a Qwen3, whose layers are listed by what they see.
fn qwen_window(json: &Object, layers: u32) -> Result<Option<SlidingWindow>, Error> {
    let Some(length) = window_used(json)? else { return Ok(None) };
    let first: u32 = json.or("max_window_layers", 28)?;
    let kind = |layer| if layer >= first { SLIDING } else { FULL }.to_owned();
    let types: Vec<String> = json.or("layer_types", (0..layers).map(kind).collect())?;
    let ways = std::iter::once(None).chain((2..=layers).map(Some));
    let mut ways = ways.map(|full_every| SlidingWindow { length, full_every });
    if types.iter().all(|kind| kind == FULL) {
        return Ok(None);
    }
    let found = ways.find(|window| layer_types(*window, layers) == types);
    let problem =
        "is supported where every so many-th layer sees all tokens, and the others a window";
    found.map(Some).ok_or_else(|| json.error("layer_types", problem))
}

const SLIDING: &str = "sliding_attention";
const FULL: &str = "full_attention";

fn layer_types(window: SlidingWindow, layers: u32) -> Vec<&'static str> {
    let config = Config { sliding_window: Some(window), ..Config::default() };
    (0..layers).map(|layer| if config.is_windowed(layer) { SLIDING } else { FULL }).collect()
}

fn qwen_experts(json: &Object) -> Result<Experts, Error> {
    if !json.or("norm_topk_prob", false)? {
        return Err(json.error("norm_topk_prob", "is false; only true is supported"));
    }
    let dense: Vec<u32> = json.or("mlp_only_layers", vec![])?;
    if !dense.iter().copied().eq(0..dense.len() as u32) {
        return Err(json.error("mlp_only_layers", "is supported where it lists the first layers"));
    }
    let width = json.required("moe_intermediate_size")?;
    Ok(Experts {
        dense_layers: dense.len() as u32,
        every: json.or("decoder_sparse_step", 1)?,
        ..Experts::new(experts_count(json)?, json.or("num_experts_per_tok", 8)?, width)
    })
}

/// Routed experts go by two names.
fn experts_count(json: &Object) -> Result<u64, Error> {
    match json.optional("num_local_experts")? {
        Some(count) => Ok(count),
        None => json.or("num_experts", 128),
    }
}

fn sigmoid_experts(json: &Object) -> Result<Experts, Error> {
    json.only("norm_topk_prob", true)?;
    Ok(Experts { scoring: Scoring::Sigmoid, ..deepseek_experts(json)? })
}

fn softmax_experts(json: &Object) -> Result<Experts, Error> {
    json.only("norm_topk_prob", false)?;
    let experts = Experts { scoring: Scoring::SoftmaxOfAll, ..deepseek_experts(json)? };
    match json.or("topk_method", GREEDY.to_owned())?.as_str() {
        GREEDY => Ok(Experts { groups: 1, groups_per_token: 1, ..experts }),
        LIMITED => Ok(experts),
        _ => Err(json.error("topk_method", format!("is neither {GREEDY:?} nor {LIMITED:?}"))),
    }
}

const GREEDY: &str = "greedy";
const LIMITED: &str = "group_limited_greedy";

fn deepseek_experts(json: &Object) -> Result<Experts, Error> {
    let width = json.required("moe_intermediate_size")?;
    let (count, visited) = ("n_routed_experts", "num_experts_per_tok");
    Ok(Experts {
        shared_width: json.required::<u64>("n_shared_experts")? * width,
        dense_layers: json.required("first_k_dense_replace")?,
        groups: json.or("n_group", 1)?,
        groups_per_token: json.or("topk_group", 1)?,
        scale: json.or("routed_scaling_factor", 1.0)?,
        ..Experts::new(json.required(count)?, json.required(visited)?, width)
    })
}

fn latent_attention(json: &Object) -> Result<LatentAttention, Error> {
    Ok(LatentAttention {
        query_rank: json.optional("q_lora_rank")?,
        kv_rank: json.required("kv_lora_rank")?,
        nope_dim: json.required("qk_nope_head_dim")?,
        rope_dim: json.required("qk_rope_head_dim")?,
        value_dim: json.required("v_head_dim")?,
    })
}

/// What is written besides.
#[derive(Serialize)]
#[serde(untagged)]
pub(super) enum Besides {
    Llama {},
    Mistral { sliding_window: Option<u64> },
    Qwen3(Window),
    Mixtral(MixtralJson),
    Qwen3Moe(Qwen3MoeJson),
    Glm4Moe(Glm4MoeJson),
    DeepseekV2(DeepseekV2Json),
    DeepseekV3(DeepseekV3Json),
}

#[derive(Serialize)]
pub(super) struct Window {
    use_sliding_window: bool,
    sliding_window: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    layer_types: Option<Vec<&'static str>>,
}

/// The experts of a Mixtral have the width `intermediate_size`.
#[derive(Serialize)]
pub(super) struct MixtralJson {
    num_local_experts: u64,
    num_experts_per_tok: u64,
    sliding_window: Option<u64>,
}

#[derive(Serialize)]
pub(super) struct Qwen3MoeJson {
    num_experts: u64,
    num_experts_per_tok: u64,
    moe_intermediate_size: u64,
    norm_topk_prob: bool,
    decoder_sparse_step: u32,
    mlp_only_layers: Vec<u32>,
    #[serde(flatten)]
    window: Window,
}

#[derive(Serialize)]
pub(super) struct Glm4MoeJson {
    #[serde(flatten)]
    experts: DeepseekExpertsJson,
    use_qk_norm: bool,
    partial_rotary_factor: f64,
}

#[derive(Serialize)]
pub(super) struct DeepseekV2Json {
    #[serde(flatten)]
    experts: DeepseekExpertsJson,
    #[serde(flatten)]
    latent: LatentJson,
    topk_method: &'static str,
}

#[derive(Serialize)]
pub(super) struct DeepseekV3Json {
    #[serde(flatten)]
    experts: DeepseekExpertsJson,
    #[serde(flatten)]
    latent: LatentJson,
    rope_interleave: bool,
    num_nextn_predict_layers: u32,
}

#[derive(Serialize)]
struct LatentJson {
    q_lora_rank: Option<u64>,
    kv_lora_rank: u64,
    qk_nope_head_dim: u64,
    qk_rope_head_dim: u64,
    v_head_dim: u64,
}

#[derive(Serialize)]
struct DeepseekExpertsJson {
    n_routed_experts: u64,
    num_experts_per_tok: u64,
    moe_intermediate_size: u64,
    n_shared_experts: u64,
    first_k_dense_replace: u32,
    n_group: u64,
    topk_group: u64,
    routed_scaling_factor: f32,
    norm_topk_prob: bool,
}

impl Besides {
    pub(super) fn new(config: &Config, architecture: Architecture) -> Self {
        let sliding_window = config.sliding_window.map(|window| window.length);
        let use_sliding_window = sliding_window.is_some();
        let experts = config.experts.unwrap_or_else(|| no_experts(config));
        match architecture {
            Architecture::Llama => Self::Llama {},
            Architecture::Mistral => Self::Mistral { sliding_window },
            Architecture::Qwen3 => {
                let types = |window| layer_types(window, config.layers);
                let layer_types = config.sliding_window.map(types);
                Self::Qwen3(Window { use_sliding_window, sliding_window, layer_types })
            }
            Architecture::Mixtral => Self::Mixtral(MixtralJson {
                num_local_experts: experts.count,
                num_experts_per_tok: experts.per_token,
                sliding_window,
            }),
            Architecture::Qwen3Moe => Self::Qwen3Moe(Qwen3MoeJson {
                num_experts: experts.count,
                num_experts_per_tok: experts.per_token,
                moe_intermediate_size: experts.width,
                norm_topk_prob: true,
                decoder_sparse_step: experts.every,
                mlp_only_layers: (0..experts.dense_layers).collect(),
                window: Window { use_sliding_window, sliding_window, layer_types: None },
            }),
            Architecture::Glm4Moe => Self::Glm4Moe(Glm4MoeJson {
                experts: experts.into(),
                use_qk_norm: config.query_key_norm,
                partial_rotary_factor: 1.0,
            }),
            Architecture::DeepseekV2 => Self::DeepseekV2(DeepseekV2Json {
                experts: experts.into(),
                latent: LatentJson::new(config),
                topk_method: if experts.groups > 1 { LIMITED } else { GREEDY },
            }),
            Architecture::DeepseekV3 => Self::DeepseekV3(DeepseekV3Json {
                experts: experts.into(),
                latent: LatentJson::new(config),
                rope_interleave: true,
                num_nextn_predict_layers: 0,
            }),
        }
    }
}

/// What stands for experts where all layers are dense.
fn no_experts(config: &Config) -> Experts {
    let width = config.feed_forward;
    Experts { shared_width: width, dense_layers: config.layers, ..Experts::new(1, 1, width) }
}

impl LatentJson {
    fn new(config: &Config) -> Self {
        let latent = config.latent_attention.expect("the architecture has latent attention");
        Self {
            q_lora_rank: latent.query_rank,
            kv_lora_rank: latent.kv_rank,
            qk_nope_head_dim: latent.nope_dim,
            qk_rope_head_dim: latent.rope_dim,
            v_head_dim: latent.value_dim,
        }
    }
}

impl From<Experts> for DeepseekExpertsJson {
    fn from(experts: Experts) -> Self {
        Self {
            n_routed_experts: experts.count,
            num_experts_per_tok: experts.per_token,
            moe_intermediate_size: experts.width,
            n_shared_experts: experts.shared_width / experts.width,
            first_k_dense_replace: experts.dense_layers,
            n_group: experts.groups,
            topk_group: experts.groups_per_token,
            routed_scaling_factor: experts.scale,
            norm_topk_prob: experts.scoring != Scoring::SoftmaxOfAll,
        }
    }
}
