//! Names and values, from whatever form a configuration has.

use anyhow::{Context, Result};

/// The settings of a text in the order in which they stand: of JSON and TOML, each value's path
/// (`training.seq_len`); of scripts, arguments (`--seq-length 8192`); of YAML, lines `key: value`.
pub fn settings(text: &str) -> Result<Vec<(String, String)>> {
    let mut settings = Vec::new();
    if text.trim_start().starts_with('{') {
        let json = serde_json::from_str(text).context("it is no JSON")?;
        flatten_json("", &json, &mut settings);
    } else if let Ok(table) = text.parse::<toml::Table>() {
        flatten("", &toml::Value::Table(table), &mut settings);
    } else {
        settings = lines(text);
    }
    Ok(settings)
}

fn path(above: &str, key: &str) -> String {
    if above.is_empty() { key.to_owned() } else { format!("{above}.{key}") }
}

fn flatten(above: &str, value: &toml::Value, settings: &mut Vec<(String, String)>) {
    match value {
        toml::Value::Table(table) => {
            table.iter().for_each(|(key, value)| flatten(&path(above, key), value, settings));
        }
        toml::Value::String(text) => settings.push((above.to_owned(), text.clone())),
        other => settings.push((above.to_owned(), other.to_string())),
    }
}

fn flatten_json(above: &str, value: &serde_json::Value, settings: &mut Vec<(String, String)>) {
    match value {
        serde_json::Value::Object(object) => {
            object.iter().for_each(|(key, value)| flatten_json(&path(above, key), value, settings));
        }
        serde_json::Value::String(text) => settings.push((above.to_owned(), text.clone())),
        other => settings.push((above.to_owned(), other.to_string())),
    }
}

/// Arguments and lines. Variables of the shell that are set in the text are replaced.
fn lines(text: &str) -> Vec<(String, String)> {
    let mut settings: Vec<(String, String)> = Vec::new();
    let mut variables: Vec<(String, String)> = Vec::new();
    for line in text.lines().map(|line| line.split(" #").next().unwrap_or_default().trim()) {
        if line.starts_with('#') {
            continue;
        }
        if let Some((name, value)) = assignment(line) {
            variables.push((name.to_owned(), substitute(unquoted(value), &variables)));
        }
        if line.contains("--") {
            arguments(line, &variables, &mut settings);
            continue;
        }
        let yaml =
            line.split_once(": ").map(|(name, value)| (name.trim_start_matches("- "), value));
        let overrides = line.split_whitespace().filter_map(override_of);
        for (name, value) in yaml.into_iter().chain(overrides) {
            settings.push((name.to_owned(), substitute(unquoted(value.trim()), &variables)));
        }
    }
    settings
}

fn unquoted(word: &str) -> &str {
    word.trim_matches(['"', '\'', ')', '('])
}

/// `NAME=value`, of a shell.
fn assignment(line: &str) -> Option<(&str, &str)> {
    let (name, value) = line.strip_prefix("export ").unwrap_or(line).split_once('=')?;
    let word = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_';
    (!name.is_empty() && name.chars().all(word)).then_some((name, value))
}

/// `model.tensor_model_parallel_size=8`, of Hydra.
fn override_of(word: &str) -> Option<(&str, &str)> {
    word.split_once('=').filter(|(name, _)| name.contains('.'))
}

/// The value of a variable, or what is used when it is not set (`${TP:-8}`).
fn substitute(word: &str, variables: &[(String, String)]) -> String {
    let Some(inside) = word.strip_prefix('$') else { return word.to_owned() };
    let inside = inside.trim_start_matches('{').trim_end_matches('}');
    let (name, default) = inside.split_once(":-").unwrap_or((inside, word));
    let set = variables.iter().rev().find(|(variable, _)| variable == name);
    set.map_or_else(|| default.to_owned(), |(_, value)| value.clone())
}

/// `--name value`, `--name=value`, `--name: value`, and `--name` alone, which is true.
fn arguments(line: &str, variables: &[(String, String)], settings: &mut Vec<(String, String)>) {
    let mut open = false;
    for word in line.split_whitespace().map(unquoted).filter(|word| !["\\", ""].contains(word)) {
        if let Some(name) = word.strip_prefix("--").filter(|name| !name.is_empty()) {
            let (name, value) = name.split_once('=').unwrap_or((name, ""));
            open = value.is_empty();
            let value = substitute(unquoted(value), variables);
            settings.push((name.trim_end_matches(':').to_owned(), value));
        } else if let Some((_, value)) = settings.last_mut().filter(|_| open) {
            if value.is_empty() {
                *value = substitute(word, variables);
            } else {
                open = false;
            }
        }
    }
    settings.iter_mut().filter(|(_, value)| value.is_empty()).for_each(|(_, value)| {
        *value = "true".to_owned();
    });
}
