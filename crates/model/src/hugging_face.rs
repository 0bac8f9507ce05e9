//! A model's dimensions as Hugging Face transformers writes them: `config.json` of each
//! [`Architecture`].

mod besides;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{Architecture, Config, Error, Llama3Scaling, Rotary};
use besides::Besides;

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
    let mut config = Config {
        layers: json.required("num_hidden_layers")?,
        hidden,
        heads,
        kv_heads: json.or("num_key_value_heads", heads)?,
        head_dim: head_dim(&json, hidden, heads)?,
        feed_forward: json.required("intermediate_size")?,
        vocabulary: json.required("vocab_size")?,
        tied_embeddings: json.or("tie_word_embeddings", false)?,
        norm_epsilon: json.or("rms_norm_eps", 1e-6)?,
        rotary: rotary(&json, architecture)?,
        context,
        ..Config::default()
    };
    besides::read(&json, architecture, &mut config)?;
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
        besides: Besides::new(config, architecture),
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
    besides: Besides,
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
    let all = Architecture::ALL;
    let found = all.into_iter().find(|architecture| architecture.names()[1] == name);
    json.only("hidden_act", "silu".to_owned())?;
    json.only("attention_bias", false)?;
    json.only("mlp_bias", false)?;
    found.ok_or_else(|| {
        let known: Vec<_> = all.iter().map(|architecture| architecture.names()[1]).collect();
        json.error("model_type", format!("is {name:?}; only {} are read", known.join(", ")))
    })
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
    use crate::{SlidingWindow, catalogue};

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
    fn architectures_are_read_and_written_as_transformers_does() {
        for theirs in [
            include_str!("../../../golden/tiny-mixtral/config.json"),
            include_str!("../../../golden/tiny-glm4-moe/config.json"),
            include_str!("../../../golden/tiny-deepseek-v2/config.json"),
            include_str!("../../../golden/tiny-deepseek-v3/config.json"),
            include_str!("../../../golden/tiny-mistral/config.json"),
            include_str!("../../../golden/tiny-qwen3/config.json"),
            include_str!("../../../golden/tiny-qwen3-moe/config.json"),
        ] {
            let config = from_json(theirs).unwrap();
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
            // Biases, which not all have a key for, and the name that experts had before version 5.
            let allowed = ["attention_bias", "mlp_bias", "num_experts"];
            assert!(missing.iter().all(|key| allowed.contains(key)), "{missing:?}");
        }
    }

    #[test]
    fn layers_that_see_a_window_are_listed_or_counted() {
        let window = |changes: Value| {
            let mut json = serde_json::json!({
                "model_type": "qwen3", "use_sliding_window": true, "sliding_window": 4,
            });
            json.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
            from_json(&golden_with(&json)).unwrap().sliding_window
        };
        let (sliding, full) = ("sliding_attention", "full_attention");
        let every = |full_every| Some(SlidingWindow { length: 4, full_every });
        assert_eq!(window(serde_json::json!({"layer_types": [sliding, full]})), every(Some(2)));
        assert_eq!(window(serde_json::json!({"layer_types": [sliding, sliding]})), every(None));
        assert_eq!(window(serde_json::json!({"layer_types": [full, full]})), None);
        assert_eq!(window(serde_json::json!({"max_window_layers": 0})), every(None));
        assert_eq!(window(serde_json::json!({})), None);
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
            (serde_json::json!({"model_type": "gemma3"}), "`model_type` is \"gemma3\""),
            (
                serde_json::json!({"model_type": "deepseek_v2", "norm_topk_prob": true}),
                "`kv_lora_rank` is missing",
            ),
            (
                serde_json::json!({
                    "model_type": "qwen3", "use_sliding_window": true, "sliding_window": 4,
                    "layer_types": ["full_attention", "sliding_attention"],
                }),
                "`layer_types` is supported where every",
            ),
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
