//! `phalanx schema`: the JSON Schema of the job file, for editors.
//!
//! Nothing is written down twice: the structure that reads a job file is asked for one key after
//! the other what it would take there ([`trace`]), and what a key is for is the comment on its field.

mod trace;

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
pub fn schema() -> Value {
    let mut schema = at::<File>(&mut Vec::new());
    let head = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Job file of Phalanx",
    });
    if let (Value::Object(schema), Value::Object(head)) = (&mut schema, head) {
        schema.extend(head);
    }
    schema
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
        // Dimensions in a job file are those of the model that it makes.
        let text = comment(name, field).or_else(|| comment("Config", field));
        if let (Some(schema), Some(text)) = (schema.as_object_mut(), text) {
            schema.insert("description".to_owned(), json!(text));
        }
        properties.insert((*field).to_owned(), schema);
    }
    json!({
        "type": "object",
        "properties": properties,
        "required": trace::required::<T>(path),
        "additionalProperties": false,
    })
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

/// The comment on a field of a structure.
fn comment(structure: &str, field: &str) -> Option<String> {
    let head = format!("struct {structure} {{");
    let body = SOURCES.iter().find_map(|source| source.split_once(&head))?.1;
    let mut text: Vec<&str> = Vec::new();
    for line in body.lines().map(str::trim).take_while(|line| *line != "}") {
        let name = line.strip_prefix("pub ").unwrap_or(line).split(':').next();
        match line.strip_prefix("///") {
            Some(words) => text.push(words.trim()),
            None if line.starts_with('#') => {}
            None if name == Some(field) => break,
            None => text.clear(),
        }
    }
    // In the words of the job file, without marks of Rust's documentation.
    (!text.is_empty()).then(|| text.join(" ").replace(['`', '[', ']'], ""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schema_knows_types_words_and_what_must_be_there() {
        let schema = schema();
        let section = |name: &str| schema["properties"][name].clone();
        assert_eq!(schema["required"], json!(["training"]));
        assert_eq!(section("training")["required"], json!(["sequence", "global_batch"]));
        assert_eq!(
            section("training")["properties"]["sequence"],
            json!({"type": "integer", "minimum": 0, "description": "Tokens in a sequence."})
        );
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
        let schema = schema();
        for section in ["training", "data", "run", "checkpoint", "recovery", "cluster", "layout"] {
            let keys = schema["properties"][section]["properties"].as_object().unwrap();
            for (key, value) in keys {
                assert!(value["description"].is_string(), "[{section}] {key}");
            }
        }
    }
}
