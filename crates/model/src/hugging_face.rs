//! A model's dimensions as Hugging Face transformers writes them: `config.json` of each
//! [`Architecture`].

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{
    Architecture, Config, Error, Experts, LatentAttention, Llama3Scaling, Rotary, Scoring,
};

/// Reads the text of a `config.json`. Keys that may be left out have the defaults of transformers.
///
/// # Errors
/// [`Error::Json`] if `text` is not a JSON object; [`Error::Key`] names a key that is missing,
/// malformed, or asks for something that is not part of the architecture here; [`Error::Config`] if
/// the dimensions contradict each other.
pub fn from_json(text: &str) -> Result<Config, Error> {
    let object = serde_json::from_str(text).map_err(|error| Error::Json(error.to_string()))?;
    let json = Object { name: "", object };
    let architecture = architecture(&json)?;
    let hidden = json.required("hidden_size")?;
    let heads = json.required("num_attention_heads")?;
    let context = json.or("max_position_embeddings", 2048)?;
    let latent_attention = latent_attention(&json, architecture)?;
    let config = Config {
        layers: json.required("num_hidden_layers")?,
        hidden,
        heads,
        kv_heads: json.or("num_key_value_heads", heads)?,
        head_dim: match latent_attention {
            Some(latent) => latent.nope_dim,
            None => head_dim(&json, hidden, heads)?,
        },
        feed_forward: json.required("intermediate_size")?,
        vocabulary: json.required("vocab_size")?,
        tied_embeddings: json.or("tie_word_embeddings", false)?,
        norm_epsilon: json.or("rms_norm_eps", 1e-6)?,
        rotary: rotary(&json, architecture)?,
        context,
        latent_attention,
        experts: experts(&json, architecture)?,
        ..Config::default()
    };
    config.check()?;
    Ok(config)
}

/// The text of a `config.json` that transformers opens.
///
/// # Panics
/// When the model is none that is stored ([`Config::architecture`]).
#[must_use]
pub fn to_json(config: &Config) -> String {
    let architecture = config.architecture().unwrap_or_else(|error| panic!("{error}"));
    let [class, model_type] = architecture.names();
    let json = ConfigJson {
        architectures: [class],
        model_type,
        hidden_act: "silu",
        attention_bias: false,
        mlp_bias: false,
        num_hidden_layers: config.layers,
        hidden_size: config.hidden,
        num_attention_heads: config.heads,
        num_key_value_heads: config.kv_heads,
        head_dim: config.latent_attention.is_none().then_some(config.head_dim),
        intermediate_size: config.feed_forward,
        vocab_size: config.vocabulary,
        max_position_embeddings: config.context,
        tie_word_embeddings: config.tied_embeddings,
        rms_norm_eps: config.norm_epsilon,
        rope_theta: config.rotary.theta,
        rope_scaling: config.rotary.scaling.map(RopeScaling::from),
        bos_token_id: None,
        eos_token_id: None,
        mixtral: config.experts.filter(|_| architecture == Architecture::Mixtral).map(Into::into),
        glm4_moe: config.experts.filter(|_| architecture == Architecture::Glm4Moe).map(Into::into),
        deepseek_v3: config.latent_attention.map(|latent| DeepseekV3Json::new(config, latent)),
    };
    let text = serde_json::to_string_pretty(&json);
    text.unwrap_or_else(|error| panic!("numbers and fixed text always serialize: {error}")) + "\n"
}

/// What [`to_json`] writes. The rotary keys are those of transformers 4, which version 5 reads as
/// well as the `rope_parameters` that it writes itself; so every version opens the file.
#[derive(Serialize)]
struct ConfigJson {
    architectures: [&'static str; 1],
    model_type: &'static str,
    hidden_act: &'static str,
    attention_bias: bool,
    mlp_bias: bool,
    num_hidden_layers: u32,
    hidden_size: u64,
    num_attention_heads: u64,
    num_key_value_heads: u64,
    /// Nothing with latent attention, which has widths of its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    head_dim: Option<u64>,
    intermediate_size: u64,
    vocab_size: u64,
    max_position_embeddings: u64,
    tie_word_embeddings: bool,
    rms_norm_eps: f32,
    rope_theta: f64,
    rope_scaling: Option<RopeScaling>,
    /// Null, since a key that is left out would mean words 1 and 2 of Llama 2's vocabulary.
    bos_token_id: Option<u64>,
    eos_token_id: Option<u64>,
    #[serde(flatten)]
    mixtral: Option<MixtralJson>,
    #[serde(flatten)]
    glm4_moe: Option<Glm4MoeJson>,
    #[serde(flatten)]
    deepseek_v3: Option<DeepseekV3Json>,
}

/// What a Mixtral has besides; its experts have the width `intermediate_size`.
#[derive(Serialize)]
struct MixtralJson {
    num_local_experts: u64,
    num_experts_per_tok: u64,
    sliding_window: Option<u64>,
}

/// What a GLM-4 mixture of experts has besides.
#[derive(Serialize)]
struct Glm4MoeJson {
    #[serde(flatten)]
    experts: DeepseekExpertsJson,
    use_qk_norm: bool,
    partial_rotary_factor: f64,
}

/// What a DeepSeek-V3 has besides.
#[derive(Serialize)]
struct DeepseekV3Json {
    #[serde(flatten)]
    experts: DeepseekExpertsJson,
    q_lora_rank: Option<u64>,
    kv_lora_rank: u64,
    qk_nope_head_dim: u64,
    qk_rope_head_dim: u64,
    v_head_dim: u64,
    rope_interleave: bool,
    num_nextn_predict_layers: u32,
}

/// DeepSeek-V3's experts.
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

impl From<Experts> for MixtralJson {
    fn from(experts: Experts) -> Self {
        Self {
            num_local_experts: experts.count,
            num_experts_per_tok: experts.per_token,
            sliding_window: None,
        }
    }
}

impl From<Experts> for Glm4MoeJson {
    fn from(experts: Experts) -> Self {
        Self { experts: experts.into(), use_qk_norm: false, partial_rotary_factor: 1.0 }
    }
}

impl DeepseekV3Json {
    /// Without experts, all layers are dense, and the keys of experts say nothing.
    fn new(config: &Config, latent: LatentAttention) -> Self {
        let width = config.feed_forward;
        let none = Experts { shared_width: width, ..Experts::new(1, 1, width) };
        let none = Experts { dense_layers: config.layers, ..none };
        Self {
            experts: config.experts.unwrap_or(none).into(),
            q_lora_rank: latent.query_rank,
            kv_lora_rank: latent.kv_rank,
            qk_nope_head_dim: latent.nope_dim,
            qk_rope_head_dim: latent.rope_dim,
            v_head_dim: latent.value_dim,
            rope_interleave: true,
            num_nextn_predict_layers: 0,
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
            norm_topk_prob: true,
        }
    }
}

#[derive(Serialize)]
struct RopeScaling {
    rope_type: &'static str,
    factor: f64,
    low_freq_factor: f64,
    high_freq_factor: f64,
    original_max_position_embeddings: u64,
}

impl From<Llama3Scaling> for RopeScaling {
    fn from(scaling: Llama3Scaling) -> Self {
        Self {
            rope_type: "llama3",
            factor: scaling.factor,
            low_freq_factor: scaling.low_frequency_factor,
            high_freq_factor: scaling.high_frequency_factor,
            original_max_position_embeddings: scaling.original_context,
        }
    }
}

/// A JSON object that knows its name, so that an error can say where a key stands.
struct Object {
    name: &'static str,
    object: Map<String, Value>,
}

impl Object {
    /// The value of `key`; a null is the same as no value, as in transformers.
    fn optional<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, Error> {
        let value = self.object.get(key).unwrap_or(&Value::Null);
        Option::deserialize(value)
            .map_err(|error| self.error(key, format!("is malformed: {error}")))
    }

    fn required<T: DeserializeOwned>(&self, key: &str) -> Result<T, Error> {
        self.optional(key)?.ok_or_else(|| self.error(key, "is missing"))
    }

    fn or<T: DeserializeOwned>(&self, key: &str, default: T) -> Result<T, Error> {
        Ok(self.optional(key)?.unwrap_or(default))
    }

    /// Refuses any value of `key` but `only`, which is also the default.
    fn only<T>(&self, key: &str, only: T) -> Result<(), Error>
    where
        T: DeserializeOwned + PartialEq + std::fmt::Debug,
    {
        match self.optional::<T>(key)? {
            Some(other) if other != only => Err(self.error(
                key,
                format!("is {other:?}; only {only:?} is supported, as in every Llama"),
            )),
            _ => Ok(()),
        }
    }

    fn error(&self, key: &str, problem: impl Into<String>) -> Error {
        Error::Key { key: format!("{}{key}", self.name), problem: problem.into() }
    }
}

fn architecture(json: &Object) -> Result<Architecture, Error> {
    let name = json.required::<String>("model_type")?;
    let all = [
        Architecture::Llama,
        Architecture::Mixtral,
        Architecture::Glm4Moe,
        Architecture::DeepseekV3,
    ];
    let found = all.into_iter().find(|architecture| architecture.names()[1] == name);
    json.only("hidden_act", "silu".to_owned())?;
    json.only("attention_bias", false)?;
    json.only("mlp_bias", false)?;
    found.ok_or_else(|| {
        let known: Vec<_> = all.iter().map(|architecture| architecture.names()[1]).collect();
        json.error("model_type", format!("is {name:?}; only {} are read", known.join(", ")))
    })
}

fn experts(json: &Object, architecture: Architecture) -> Result<Option<Experts>, Error> {
    match architecture {
        Architecture::Llama => Ok(None),
        Architecture::Mixtral => {
            if json.optional::<u64>("sliding_window")?.is_some() {
                return Err(json.error("sliding_window", "is not carried out"));
            }
            Ok(Some(Experts::new(
                json.or("num_local_experts", 8)?,
                json.or("num_experts_per_tok", 2)?,
                json.required("intermediate_size")?,
            )))
        }
        Architecture::Glm4Moe => {
            json.only("use_qk_norm", false)?;
            Ok(Some(deepseek_experts(json)?))
        }
        Architecture::DeepseekV3 => {
            json.only("num_nextn_predict_layers", 0)?;
            let experts = deepseek_experts(json)?;
            let layers = json.required::<u32>("num_hidden_layers")?;
            Ok(Some(experts).filter(|experts| experts.dense_layers < layers))
        }
    }
}

fn deepseek_experts(json: &Object) -> Result<Experts, Error> {
    json.only("norm_topk_prob", true)?;
    let width = json.required("moe_intermediate_size")?;
    let (count, visited) = ("n_routed_experts", "num_experts_per_tok");
    Ok(Experts {
        shared_width: json.required::<u64>("n_shared_experts")? * width,
        dense_layers: json.required("first_k_dense_replace")?,
        scoring: Scoring::Sigmoid,
        groups: json.or("n_group", 1)?,
        groups_per_token: json.or("topk_group", 1)?,
        scale: json.or("routed_scaling_factor", 1.0)?,
        ..Experts::new(json.required(count)?, json.required(visited)?, width)
    })
}

fn latent_attention(
    json: &Object,
    architecture: Architecture,
) -> Result<Option<LatentAttention>, Error> {
    if architecture != Architecture::DeepseekV3 {
        return Ok(None);
    }
    json.only("rope_interleave", true)?;
    Ok(Some(LatentAttention {
        query_rank: json.optional("q_lora_rank")?,
        kv_rank: json.required("kv_lora_rank")?,
        nope_dim: json.required("qk_nope_head_dim")?,
        rope_dim: json.required("qk_rope_head_dim")?,
        value_dim: json.required("v_head_dim")?,
    }))
}

fn head_dim(json: &Object, hidden: u64, heads: u64) -> Result<u64, Error> {
    match json.optional("head_dim")? {
        Some(head_dim) => Ok(head_dim),
        // No heads at all is for `Config::check` to refuse.
        None if heads == 0 || hidden.is_multiple_of(heads) => {
            Ok(hidden.checked_div(heads).unwrap_or(0))
        }
        None => Err(json.error(
            "head_dim",
            format!("is missing, and hidden_size = {hidden} does not divide into {heads} heads"),
        )),
    }
}

/// Version 5 of transformers writes one object `rope_parameters`; before, `rope_theta` stood at the
/// top and the rest in `rope_scaling`, whose `rope_type` was once called `type`.
fn rotary(json: &Object, architecture: Architecture) -> Result<Rotary, Error> {
    let (name, object) = match json.optional("rope_parameters")? {
        Some(object) => ("rope_parameters.", object),
        None => ("rope_scaling.", json.or("rope_scaling", Map::new())?),
    };
    let rope = Object { name, object };
    let theta = match rope.optional("rope_theta")? {
        Some(theta) => theta,
        None => json.or("rope_theta", 10_000.0)?,
    };
    rope.only("partial_rotary_factor", 1.0)?;
    json.only("partial_rotary_factor", 1.0)?;
    let stated = [&rope, json].iter().any(|of| of.object.contains_key("partial_rotary_factor"));
    if architecture == Architecture::Glm4Moe && !stated {
        return Err(
            json.error("partial_rotary_factor", "is missing, which means 0.5; only 1 is supported")
        );
    }
    Ok(Rotary { theta, scaling: scaling(&rope)? })
}

fn scaling(rope: &Object) -> Result<Option<Llama3Scaling>, Error> {
    let old_name = rope.or("type", "default".to_owned())?;
    match rope.or("rope_type", old_name)?.as_str() {
        "default" => Ok(None),
        "llama3" => Ok(Some(Llama3Scaling {
            factor: rope.required("factor")?,
            low_frequency_factor: rope.required("low_freq_factor")?,
            high_frequency_factor: rope.required("high_freq_factor")?,
            original_context: rope.required("original_max_position_embeddings")?,
        })),
        other => Err(rope.error(
            "rope_type",
            format!("is {other:?}; only \"default\" and \"llama3\" are supported"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue;

    const GOLDEN: &str = include_str!("../../../golden/tiny-llama/config.json");

    /// The golden file with some of its top-level keys replaced.
    fn golden_with(changes: &Value) -> String {
        let mut json: Map<String, Value> = serde_json::from_str(GOLDEN).unwrap();
        json.extend(changes.as_object().unwrap().clone());
        Value::Object(json).to_string()
    }

    fn refusal(changes: &Value) -> String {
        from_json(&golden_with(changes)).unwrap_err().to_string()
    }

    #[test]
    fn reads_what_transformers_wrote() {
        let config = from_json(GOLDEN).unwrap();
        let expected = Config {
            layers: 2,
            hidden: 64,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            feed_forward: 96,
            vocabulary: 128,
            tied_embeddings: false,
            norm_epsilon: 1e-5,
            rotary: Rotary {
                theta: 500_000.0,
                scaling: Some(Llama3Scaling {
                    factor: 8.0,
                    low_frequency_factor: 1.0,
                    high_frequency_factor: 4.0,
                    original_context: 16,
                }),
            },
            context: 128,
            ..Config::default()
        };
        assert_eq!(config, expected);
        let tied = include_str!("../../../golden/tiny-llama-tied/config.json");
        assert!(from_json(tied).unwrap().tied_embeddings);
    }

    #[test]
    fn what_is_written_reads_back_the_same() {
        let catalogue = catalogue::names().map(|name| catalogue::find(name).unwrap().clone());
        let stored = catalogue.filter(|config| config.architecture().is_ok());
        for config in stored.chain([from_json(GOLDEN).unwrap()]) {
            assert_eq!(from_json(&to_json(&config)), Ok(config));
        }
    }

    #[test]
    fn writes_the_values_that_transformers_wrote() {
        let config = from_json(GOLDEN).unwrap();
        let mut ours: Map<String, Value> = serde_json::from_str(&to_json(&config)).unwrap();
        let theirs: Map<String, Value> = serde_json::from_str(GOLDEN).unwrap();
        let mut rotary = ours.remove("rope_scaling").unwrap();
        rotary["rope_theta"] = ours.remove("rope_theta").unwrap();
        assert_eq!(rotary, theirs["rope_parameters"]);
        for (key, value) in ours {
            assert_eq!(value, theirs[&key], "{key}");
        }
    }

    #[test]
    fn mixtures_of_experts_are_read_and_written_as_transformers_does() {
        for theirs in [
            include_str!("../../../golden/tiny-mixtral/config.json"),
            include_str!("../../../golden/tiny-glm4-moe/config.json"),
            include_str!("../../../golden/tiny-deepseek-v3/config.json"),
        ] {
            let config = from_json(theirs).unwrap();
            let experts = config.experts.unwrap();
            assert_eq!(experts.dense_layers > 0, experts.scoring == Scoring::Sigmoid);
            let mut ours: Map<String, Value> = serde_json::from_str(&to_json(&config)).unwrap();
            assert_eq!(from_json(&Value::Object(ours.clone()).to_string()), Ok(config));
            let theirs: Map<String, Value> = serde_json::from_str(theirs).unwrap();
            let theta = ours.remove("rope_theta").unwrap();
            assert_eq!(theta, theirs["rope_parameters"]["rope_theta"]);
            let partial = ours.remove("partial_rotary_factor");
            assert_eq!(partial.as_ref(), theirs["rope_parameters"].get("partial_rotary_factor"));
            let missing: Vec<_> = ours
                .iter()
                .filter(|(key, value)| theirs.get(*key).unwrap_or(&Value::Null) != *value)
                .map(|(key, _)| key.as_str())
                .collect();
            // Biases, which these architectures have no key for.
            let allowed = ["attention_bias", "mlp_bias"];
            assert!(missing.iter().all(|key| allowed.contains(key)), "{missing:?}");
        }
    }

    #[test]
    fn reads_the_rotary_keys_of_older_versions() {
        let scaling = |name: &str| {
            serde_json::json!({
                "rope_parameters": null,
                "rope_theta": 500_000.0,
                "rope_scaling": {
                    name: "llama3", "factor": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
            })
        };
        for name in ["rope_type", "type"] {
            assert_eq!(from_json(&golden_with(&scaling(name))), from_json(GOLDEN));
        }
    }

    #[test]
    fn keys_left_out_have_the_defaults_of_transformers() {
        let text = r#"{"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64,
            "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 128}"#;
        let config = from_json(text).unwrap();
        assert_eq!((config.kv_heads, config.head_dim), (4, 16));
        assert_eq!((config.norm_epsilon, config.context), (1e-6, 2048));
        assert_eq!(config.rotary.theta, 10_000.0);
        assert_eq!(config.rotary.scaling, None);
        assert!(!config.tied_embeddings);
    }

    #[test]
    fn refuses_what_is_no_llama_and_names_the_key() {
        let refusals = [
            (serde_json::json!({"attention_bias": true}), "`attention_bias` is true"),
            (serde_json::json!({"mlp_bias": true}), "`mlp_bias` is true"),
            (serde_json::json!({"hidden_act": "gelu"}), "`hidden_act` is \"gelu\""),
            (serde_json::json!({"model_type": "qwen3"}), "`model_type` is \"qwen3\""),
            (serde_json::json!({"model_type": null}), "`model_type` is missing"),
            (
                serde_json::json!({"rope_parameters": {"rope_type": "yarn"}}),
                "`rope_parameters.rope_type` is \"yarn\"",
            ),
            (
                serde_json::json!({"rope_parameters": {"partial_rotary_factor": 0.5}}),
                "`rope_parameters.partial_rotary_factor` is 0.5",
            ),
            (
                serde_json::json!({"rope_parameters": {"rope_type": "llama3"}}),
                "`rope_parameters.factor` is missing",
            ),
        ];
        for (changes, message) in refusals {
            assert!(refusal(&changes).starts_with(message), "{}", refusal(&changes));
        }
    }

    #[test]
    fn malformed_values_are_errors() {
        let missing = refusal(&serde_json::json!({"hidden_size": null}));
        assert_eq!(missing, "`hidden_size` is missing");
        let text = refusal(&serde_json::json!({"hidden_size": "64"}));
        assert!(text.starts_with("`hidden_size` is malformed: invalid type: string"), "{text}");
        let negative = refusal(&serde_json::json!({"num_hidden_layers": -1}));
        assert!(negative.starts_with("`num_hidden_layers` is malformed"), "{negative}");
        let uneven = refusal(&serde_json::json!({"head_dim": null, "hidden_size": 65}));
        assert!(uneven.starts_with("`head_dim` is missing, and hidden_size = 65"), "{uneven}");
        let none = refusal(&serde_json::json!({"head_dim": null, "num_attention_heads": 0}));
        assert!(none.starts_with("`heads` is 0"), "{none}");
        assert!(matches!(from_json("[]"), Err(Error::Json(_))));
        for end in 0..GOLDEN.trim_end().len() {
            assert!(matches!(from_json(&GOLDEN[..end]), Err(Error::Json(_))));
        }
    }
}
