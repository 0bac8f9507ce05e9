//! The book, held to the truth: every command in it is run and prints what the page says, every
//! link leads somewhere, and what is generated is as the code has it now.
//!
//! `PHALANX_BOOK=write cargo test -p phalanx book` writes what is generated.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::place::Place;
use crate::repository::{read, root, sources};

/// What a page leaves out of an output: any text in a line, any lines on a line of its own.
const ELISION: char = '…';

fn source() -> PathBuf {
    root().join("book/src")
}

/// The targets of the links of a page that lead to other files of the book.
fn links(text: &str) -> Vec<String> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    let local = targets.filter(|target| !target.contains("://") && !target.starts_with('#'));
    local.map(|target| target.split('#').next().unwrap().to_owned()).collect()
}

/// The pages in the order of the summary.
fn pages() -> Vec<PathBuf> {
    let links = links(&read(&source().join("SUMMARY.md")));
    links.iter().map(|target| source().join(target)).collect()
}

#[test]
fn every_link_leads_somewhere_and_every_page_is_in_the_summary() {
    let pages = pages();
    for page in &pages {
        for target in links(&read(page)) {
            let leads = page.parent().unwrap().join(&target);
            assert!(leads.exists(), "{}: nothing is at {target}", page.display());
        }
    }
    let mut folders = vec![source()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let page =
                path.extension().is_some_and(|of| of == "md") && !path.ends_with("SUMMARY.md");
            assert!(!page || pages.contains(&path), "{} is not in the summary", path.display());
            if path.is_dir() {
                folders.push(path);
            }
        }
    }
}

#[test]
fn every_fault_is_held_by_tests_that_there_are() {
    let atlas = read(&source().join("faults.md"));
    let rows = atlas.lines().skip_while(|line| !line.starts_with("| fault |")).skip(2);
    let sources: String = sources().iter().map(|(_, path)| read(path)).collect();
    for row in rows.take_while(|line| line.starts_with('|')) {
        let held_by = row.trim_end_matches(" |").rsplit(" | ").next().unwrap();
        let names: Vec<&str> = held_by.split(", ").map(|name| name.trim_matches('`')).collect();
        for name in names {
            let test = sources.contains(&format!("fn {name}(")) && !name.is_empty();
            assert!(test || root().join(name).is_file(), "no test {name}: {row}");
        }
    }
}

/// A command of a page and what the page says it prints.
struct Shown {
    command: String,
    output: Vec<String>,
}

/// The commands of the `console` blocks of a page.
fn shown(text: &str) -> Vec<Shown> {
    let mut all: Vec<Shown> = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        match (inside, line.strip_prefix("$ ")) {
            (false, _) => inside = line == "```console",
            (true, _) if line.starts_with("```") => inside = false,
            (true, Some(command)) => {
                all.push(Shown { command: command.to_owned(), output: Vec::new() });
            }
            (true, None) => match all.last_mut() {
                Some(last) => last.output.push(line.trim_end().to_owned()),
                None => panic!("`{line}` is the output of nothing"),
            },
        }
    }
    all
}

/// Whether a line is one that the page shows, its elisions being any text.
fn is_line(shown: &str, line: &str) -> bool {
    let Some((first, rest)) = shown.split_once(ELISION) else { return shown == line };
    let Some(after) = line.strip_prefix(first) else { return false };
    let starts = after.char_indices().map(|(index, _)| index).chain([after.len()]);
    starts.into_iter().any(|index| is_line(rest, &after[index..]))
}

fn is_output(shown: &[String], lines: &[&str]) -> bool {
    match shown.split_first() {
        None => lines.is_empty(),
        Some((first, rest)) if first.trim() == ELISION.to_string() => {
            (0..=lines.len()).any(|skipped| is_output(rest, &lines[skipped..]))
        }
        Some((first, rest)) => {
            lines.first().is_some_and(|line| is_line(first, line.trim_end()))
                && is_output(rest, &lines[1..])
        }
    }
}

#[test]
fn every_command_prints_what_its_page_says() {
    let mut wrong = String::new();
    for page in pages() {
        let place = Place::new();
        symlink(root().join("examples"), place.path("examples")).unwrap();
        for Shown { command, output } in shown(&read(&page)) {
            let printed = place.shell(&command);
            let lines: Vec<&str> = printed.trim_end().lines().collect();
            if !is_output(&output, &lines) {
                wrong += &format!("{}: `{command}` printed\n\n{printed}\n", page.display());
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

const START: &str = "<!-- generated: ";
const END: &str = "<!-- end -->";

/// A page with its generated parts as they are now.
fn generated(text: &str, place: &Place) -> String {
    let mut parts = text.split(START);
    let mut whole = parts.next().unwrap().to_owned();
    for part in parts {
        let (of, rest) = part.split_once(" -->").expect("a generated part is named");
        let (_, after) = rest.split_once(END).expect("a generated part ends");
        whole += &format!("{START}{of} -->\n{}\n{END}{after}", content(of, place).trim_end());
    }
    whole
}

/// What a generated part is made of: the output of a command, or a table of `measured/`.
fn content(of: &str, place: &Place) -> String {
    match of.strip_prefix('`').and_then(|of| of.strip_suffix('`')) {
        Some(command) => format!("```text\n{}```", place.shell(command)),
        None if of == "keys of a job file" => {
            keys(&serde_json::from_str(&place.shell("phalanx schema")).unwrap())
        }
        None => accuracy(of),
    }
}

/// A table for each section of the schema of a job file.
fn keys(schema: &Value) -> String {
    let mut text = String::new();
    for (name, section) in schema["properties"].as_object().unwrap() {
        let purpose = section["description"].as_str().unwrap();
        text += &format!("## \\[{name}\\]\n\n{purpose}\n\n");
        text += "| key | takes | unless given | what it is |\n| --- | --- | --- | --- |\n";
        rows(&mut text, "", section);
        text.push('\n');
    }
    text
}

/// A row for each key of a table, and for those of the tables in it.
fn rows(text: &mut String, within: &str, table: &Value) {
    let required = |key: &String| table["required"].as_array().unwrap().contains(&json!(key));
    for (key, schema) in table["properties"].as_object().unwrap() {
        let default = match &schema["default"] {
            Value::Null if required(key) => "must be given".to_owned(),
            Value::Null => String::new(),
            default => format!("`{default}`"),
        };
        let what = schema["description"].as_str().unwrap_or_default();
        *text += &format!("| `{within}{key}` | {} | {default} | {what} |\n", takes(schema));
        if schema["properties"].is_object() {
            rows(text, &format!("{within}{key}."), schema);
        }
    }
}

/// The values of a key, in words.
fn takes(schema: &Value) -> String {
    if let Some(words) = schema["enum"].as_array() {
        let words: Vec<String> = words.iter().map(|word| format!("`{word}`")).collect();
        return words.join(", ");
    }
    if let Some(any) = schema["anyOf"].as_array() {
        return any.iter().map(takes).collect::<Vec<_>>().join(", or ");
    }
    match schema["type"].as_str() {
        Some("array") => format!("list of: {}", takes(&schema["items"])),
        Some("object") => {
            let keys = schema["properties"].as_object().unwrap();
            let keys: Vec<String> = keys.keys().map(|key| format!("`{key}`")).collect();
            format!("table of {}", keys.join(", "))
        }
        Some(name) => name.to_owned(),
        // One of several types, which its text names.
        None => String::new(),
    }
}

/// The recorded errors whose names begin with `quantity`.
fn accuracy(quantity: &str) -> String {
    let recorded: Value =
        serde_json::from_str(&read(&root().join("measured/accuracy.json"))).unwrap();
    let mut table = format!("| {quantity} | mean error |\n| --- | --- |\n");
    let mut rows = 0;
    for (name, error) in recorded.as_object().unwrap() {
        if let Some(source) = name.strip_prefix(&format!("{quantity}, ")) {
            table += &format!("| {source} | {:.1} % |\n", error.as_f64().unwrap());
            rows += 1;
        }
    }
    assert!(rows > 0, "nothing is recorded of {quantity}");
    table
}

#[test]
fn what_is_generated_is_as_it_is_now() {
    let place = Place::new();
    for page in pages() {
        let text = read(&page);
        let now = generated(&text, &place);
        if std::env::var_os("PHALANX_BOOK").is_some_and(|what| what == "write") {
            fs::write(&page, now).unwrap();
        } else {
            let name = page.display();
            assert!(text == now, "{name} is out of date: PHALANX_BOOK=write cargo test book");
        }
    }
}
