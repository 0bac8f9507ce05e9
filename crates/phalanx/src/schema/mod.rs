//! `phalanx schema`: the JSON Schema of the job file, for editors.
//!
//! Nothing is written down twice: the structure that reads a job file is asked for one key after
//! the other what it would take there ([`trace`]), and what a key is for is the comment on its field.

mod trace;

use std::collections::BTreeMap;

use anyhow::Result;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::job::File;
use trace::{Kind, Step, kind};

/// Where the structures of the job file are, with a comment on every field.
const SOURCES: [&str; 8] = [
    include_str!("../job.rs"),
    include_str!("../launch_command/mod.rs"),
    include_str!("../cluster_section.rs"),
    include_str!("../dashboards/mod.rs"),
    include_str!("../scale/section.rs"),
    include_str!("../../../plan/src/partial.rs"),
    include_str!("../../../model/src/config.rs"),
    include_str!("../../../model/src/variants.rs"),
];

/// The schema of a job file.
pub fn schema() -> Result<Value> {
    let mut schema = at::<File>(&mut Vec::new());
    schema["$schema"] = json!("https://json-schema.org/draft/2020-12/schema");
    schema["title"] = json!("Job file of Phalanx");
    for (section, keys) in defaults()? {
        let schema = &mut schema["properties"][&section];
        for (key, value) in keys {
            let required =
                schema["required"].as_array().is_some_and(|all| all.contains(&json!(key)));
            if !required && !value.is_null() {
                schema["properties"][&key]["default"] = value;
            }
        }
    }
    Ok(schema)
}

/// The keys of a job file that says no more than it must, as they are read: those defaults that do
/// not hang on other keys.
fn defaults() -> Result<BTreeMap<String, Map<String, Value>>> {
    let job: File = toml::from_str("training = { sequence = 1, global_batch = 1 }")?;
    // Through text, so that 0.9 stays 0.9 whatever its precision.
    Ok(serde_json::from_str(&serde_json::to_string(&job)?)?)
}

/// The schema of what stands at `path` in a `T`.
fn at<'de, T: Deserialize<'de>>(path: &mut Vec<Step>) -> Value {
    match kind::<T>(path) {
        Kind::Anything => json!({}),
        Kind::Boolean => json!({"type": "boolean"}),
        Kind::Integer { least } => match least {
            Some(least) => json!({"type": "integer", "minimum": least}),
            None => json!({"type": "integer"}),
        },
        Kind::Number => json!({"type": "number"}),
        Kind::Text => json!({"type": "string"}),
        Kind::List => json!({"type": "array", "items": inside::<T>(path, Step::Element)}),
        Kind::Map => {
            json!({"type": "object", "additionalProperties": inside::<T>(path, Step::Key("a"))})
        }
        Kind::Struct { name, fields } => structure::<T>(path, name, fields),
        Kind::Enum(variants) => enumeration::<T>(path, variants),
    }
}

fn inside<'de, T: Deserialize<'de>>(path: &mut Vec<Step>, step: Step) -> Value {
    path.push(step);
    let schema = at::<T>(path);
    path.pop();
    schema
}

fn structure<'de, T: Deserialize<'de>>(
    path: &mut Vec<Step>,
    name: &str,
    fields: &'static [&'static str],
) -> Value {
    let mut properties = Map::new();
    for field in fields {
        let mut schema = inside::<T>(path, Step::Key(field));
        // Dimensions in a job file are those of the model that it makes, and what a section is for
        // stands at its structure.
        let text = comment(name, field).or_else(|| comment("Config", field));
        if let (Some(schema), Some(text)) = (schema.as_object_mut(), text) {
            schema.insert("description".to_owned(), json!(text));
        }
        properties.insert((*field).to_owned(), schema);
    }
    let mut schema = json!({
        "type": "object",
        "properties": properties,
        "required": trace::required::<T>(path),
        "additionalProperties": false,
    });
    if let Some(text) = purpose(name) {
        schema["description"] = json!(text);
    }
    schema
}

/// Variants without a value are words; the others are tables of one key.
fn enumeration<'de, T: Deserialize<'de>>(
    path: &mut Vec<Step>,
    variants: &'static [&'static str],
) -> Value {
    let (mut words, mut tables) = (Vec::new(), Vec::new());
    for variant in variants {
        path.push(Step::Variant(variant));
        if trace::is_word::<T>(path) {
            words.push(*variant);
        } else {
            let value = at::<T>(path);
            tables.push(json!({
                "type": "object",
                "properties": {*variant: value},
                "required": [variant],
                "additionalProperties": false,
            }));
        }
        path.pop();
    }
    let words = json!({"enum": words});
    if tables.is_empty() {
        return words;
    }
    tables.insert(0, words);
    json!({"anyOf": tables})
}

/// The comment on a structure.
fn purpose(structure: &str) -> Option<String> {
    let head = format!("struct {structure} {{");
    let before = SOURCES.iter().find_map(|source| source.split_once(&head))?.0;
    let lines = before.lines().rev().skip(1).skip_while(|line| line.starts_with('#'));
    let mut text: Vec<&str> = lines.map_while(|line| line.strip_prefix("///")).collect();
    text.reverse();
    in_words(&text)
}

/// The comment on a field of a structure.
fn comment(structure: &str, field: &str) -> Option<String> {
    let head = format!("struct {structure} {{");
    let body = SOURCES.iter().find_map(|source| source.split_once(&head))?.1;
    let mut text: Vec<&str> = Vec::new();
    for line in body.lines().map(str::trim).take_while(|line| *line != "}") {
        let name = line.strip_prefix("pub ").unwrap_or(line).split(':').next();
        match line.strip_prefix("///") {
            Some(words) => text.push(words),
            None if line.starts_with('#') => {}
            None if name == Some(field) => break,
            None => text.clear(),
        }
    }
    in_words(&text)
}

/// The lines of a comment in the words of the job file, without marks of Rust's documentation.
fn in_words(lines: &[&str]) -> Option<String> {
    let lines: Vec<&str> = lines.iter().map(|line| line.trim()).collect();
    (!lines.is_empty()).then(|| lines.join(" ").replace(['`', '[', ']'], ""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schema_knows_types_words_and_what_must_be_there() {
        let schema = schema().unwrap();
        let section = |name: &str| schema["properties"][name].clone();
        assert_eq!(schema["required"], json!(["training"]));
        assert_eq!(section("training")["required"], json!(["sequence", "global_batch"]));
        assert_eq!(
            section("training")["properties"]["sequence"],
            json!({"type": "integer", "minimum": 0, "description": "Tokens in a sequence."})
        );
        assert_eq!(section("training")["properties"]["beta1"]["default"], 0.9);
        assert_eq!(section("recovery")["description"], "What happens when a local rank is lost.");
        let layout = section("layout")["properties"].clone();
        assert_eq!(
            layout["shard"]["enum"],
            json!(["none", "optimizer", "gradients", "parameters"])
        );
        let recompute = &layout["recompute"]["anyOf"];
        assert_eq!(recompute[0]["enum"], json!(["none", "selective", "full"]));
        assert_eq!(recompute[1]["properties"]["layers"]["type"], "integer");
        assert_eq!(recompute[2]["properties"]["segments"]["items"]["enum"][0], "embed");
        assert_eq!(section("data")["properties"]["text"]["items"]["type"], "string");
    }

    #[test]
    fn keys_of_a_job_say_what_they_are_for() {
        let schema = schema().unwrap();
        for (section, keys) in schema["properties"].as_object().unwrap() {
            assert!(keys["description"].is_string(), "[{section}]");
            for (key, value) in keys["properties"].as_object().unwrap() {
                assert!(value["description"].is_string(), "[{section}] {key}");
            }
        }
    }
}
