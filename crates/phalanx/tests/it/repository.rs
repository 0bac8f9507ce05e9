//! The walls between crates and the shape of the sources, held to ARCHITECTURE.md.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Only these have `unsafe` in them.
const UNSAFE: [&str; 3] = ["transport", "compute", "python"];
/// No function is longer.
const LONGEST: usize = 90;
/// Functions longer than this are the exception:
const LONG: usize = 70;
/// no more than this share of all.
const LONG_SHARE: f64 = 0.02;

pub fn root() -> PathBuf {
    fs::canonicalize(Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")).unwrap()
}

pub fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The folders of the crates, by name.
fn crates() -> BTreeMap<String, PathBuf> {
    let entries = fs::read_dir(root().join("crates")).unwrap().map(|entry| entry.unwrap().path());
    let named = |path: PathBuf| (path.file_name().unwrap().to_str().unwrap().to_owned(), path);
    entries.filter(|path| path.is_dir()).map(named).collect()
}

fn manifest(folder: &Path) -> toml::Table {
    read(&folder.join("Cargo.toml")).parse().unwrap()
}

/// Which crates each may depend on, by the table of ARCHITECTURE.md.
fn walls() -> BTreeMap<String, BTreeSet<String>> {
    let text = read(&root().join("ARCHITECTURE.md"));
    let rows = text.lines().skip_while(|line| !line.starts_with("| crate |")).skip(2);
    let rows: Vec<Vec<String>> = rows.take_while(|line| line.starts_with('|')).map(cells).collect();
    let all: BTreeSet<String> = rows.iter().map(|row| row[0].clone()).collect();
    let allowed = |cell: &str| match cell {
        "-" => BTreeSet::new(),
        names => names.split(", ").map(str::to_owned).collect(),
    };
    let walls: BTreeMap<_, _> = rows.iter().map(|row| (row[0].clone(), allowed(&row[2]))).collect();
    for (name, allowed) in &walls {
        assert!(allowed.is_subset(&all), "{name} may depend on what is no crate: {allowed:?}");
    }
    walls
}

/// The cells of a row, without the marks around names.
fn cells(row: &str) -> Vec<String> {
    let cells: Vec<_> = row.split('|').map(|cell| cell.trim().replace('`', "")).collect();
    assert_eq!(cells.len(), 6, "crate, one line, may depend on, must never know: {row}");
    cells[1..5].to_vec()
}

#[test]
fn the_architecture_names_every_crate_and_no_other() {
    let named: Vec<String> = walls().into_keys().collect();
    let there: Vec<String> = crates().into_keys().collect();
    assert_eq!(named, there);
}

#[test]
fn no_crate_looks_over_its_wall() {
    let walls = walls();
    for (name, folder) in crates() {
        let manifest = manifest(&folder);
        let Some(dependencies) = manifest.get("dependencies").and_then(toml::Value::as_table)
        else {
            continue;
        };
        for dependency in dependencies.keys().filter(|dependency| walls.contains_key(*dependency)) {
            assert!(
                walls[&name].contains(dependency),
                "{name} depends on {dependency}, which ARCHITECTURE.md does not allow"
            );
        }
    }
}

#[test]
fn a_crate_is_called_like_its_folder_and_keeps_the_common_lints() {
    for (name, folder) in crates() {
        let manifest = manifest(&folder);
        assert_eq!(manifest["package"]["name"].as_str(), Some(name.as_str()));
        assert_eq!(manifest["lints"]["workspace"].as_bool(), Some(true), "{name}");
    }
}

/// Every Rust source of the repository, with its crate.
pub fn sources() -> Vec<(String, PathBuf)> {
    let pattern = root().join("crates/*/**/*.rs");
    let paths = glob::glob(pattern.to_str().unwrap()).unwrap().map(Result::unwrap);
    let folder = root().join("crates");
    let name = |path: &Path| {
        let inside = path.strip_prefix(&folder).unwrap();
        inside.components().next().unwrap().as_os_str().to_str().unwrap().to_owned()
    };
    paths.map(|path| (name(&path), path)).collect()
}

#[test]
fn unsafe_code_stays_where_it_belongs() {
    // In two parts, so that the search does not find itself.
    let word = concat!("un", "safe");
    for (name, path) in sources() {
        let text = read(&path);
        let code = text.lines().map(|line| line.split("//").next().unwrap_or_default());
        let found = code.flat_map(|line| line.split(|c: char| !c.is_alphanumeric() && c != '_'));
        let found = found.filter(|found| *found == word).count();
        assert!(found == 0 || UNSAFE.contains(&name.as_str()), "{}", path.display());
    }
}

#[test]
fn what_decides_reads_no_wall_clock() {
    for (name, path) in sources() {
        let decides = ["train", "transport", "checkpoint", "sim"].contains(&name.as_str());
        assert!(!decides || !read(&path).contains("SystemTime"), "{}", path.display());
    }
}

/// The functions of a source, formatted by rustfmt, with the lines each has: from the first to the
/// one that closes it at the same depth.
fn functions(text: &str) -> Vec<(&str, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let starts = (0..lines.len()).filter(|start| is_function(lines[*start].trim_start()));
    starts.filter_map(|start| Some((lines[start], length(&lines[start..])?))).collect()
}

fn is_function(line: &str) -> bool {
    let modifiers = ["pub ", "pub(crate) ", "pub(super) ", "const "];
    let strip = |rest: &str, word| rest.strip_prefix(word).unwrap_or(rest).to_owned();
    modifiers.iter().fold(line.to_owned(), |rest, word| strip(&rest, word)).starts_with("fn ")
}

/// The lines of the function that begins on the first; `None` when it has no body.
fn length(lines: &[&str]) -> Option<usize> {
    let signature = lines.iter().find(|line| line.ends_with(['{', '}', ';']))?;
    if !signature.ends_with('{') {
        return signature.ends_with('}').then_some(1);
    }
    let depth = lines[0].len() - lines[0].trim_start().len();
    let close = format!("{}}}", &lines[0][..depth]);
    lines.iter().position(|line| *line == close).map(|last| last + 1)
}

#[test]
fn functions_are_short() {
    let (mut count, mut long) = (0, Vec::new());
    for (_, path) in sources() {
        for (name, lines) in functions(&read(&path)) {
            assert!(lines <= LONGEST, "{}: {lines} lines: {name}", path.display());
            count += 1;
            long.extend((lines > LONG).then(|| format!("{}: {name}: {lines}", path.display())));
        }
    }
    assert!(count > 500, "found only {count} functions");
    assert!(long.len() as f64 <= LONG_SHARE * f64::from(count), "{long:#?}");
}

#[test]
fn every_figure_of_the_catalogue_has_a_source_and_a_date() {
    let files = glob::glob(root().join("catalogue/*.toml").to_str().unwrap()).unwrap();
    let mut entries = 0;
    for path in files.map(Result::unwrap) {
        for (name, entry) in read(&path).parse::<toml::Table>().unwrap() {
            for key in ["source", "date"] {
                let text = entry.get(key).and_then(toml::Value::as_str).unwrap_or_default();
                assert!(!text.is_empty(), "{}: {name} has no {key}", path.display());
            }
            entries += 1;
        }
    }
    assert!(entries > 10, "found only {entries} entries");
}

/// What the readme says of the simulator's error is what was recorded last.
#[test]
fn the_readme_tells_the_recorded_errors() {
    let readme = read(&root().join("README.md"));
    let accuracy: serde_json::Value =
        serde_json::from_str(&read(&root().join("measured/accuracy.json"))).unwrap();
    let error = |of: &str| accuracy[format!("step time, {of}")].as_f64().unwrap();
    let (all, held_out) = (error("all"), error("held out"));
    let told = format!("error is {all:.1} % ({held_out:.1} % on those that nothing was fitted on)");
    assert!(readme.contains(&told), "the readme should say: {told}");
}

/// The readme's two commands are the ones that are run on every change, and it stays a page.
#[test]
fn the_readme_is_short_and_its_commands_are_run() {
    let readme = read(&root().join("README.md"));
    assert!(readme.lines().count() < 120);
    let checks = read(&root().join(".ci/run"));
    let train = "cargo run --release -- train examples/tiny.toml";
    for command in [train, "cargo test --release --workspace"] {
        assert!(readme.contains(&format!("\n    {command}\n")), "the readme lacks `{command}`");
        assert!(checks.contains(command), "`{command}` is not run");
    }
}
