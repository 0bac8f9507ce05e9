//! `phalanx catalogue`: what is known of hardware and models, and where each number comes from.

use anyhow::{Result, bail};
use cluster::catalogue::{self, Kind};
use cluster::{Accelerator, Cluster, Fabric, Precision, Routing, Shape};
use serde_json::{Map, Value};
use units::FlopsPerSecond;

use crate::output::{columns, print_text, thousands};

/// How models are called among the kinds of entries.
const MODEL: &str = "model";

/// Lists everything, or prints the entries called `name` with the parts that they name.
pub fn show(name: Option<&str>, json: bool) -> Result<()> {
    let text = match (name, json) {
        (None, false) => lists()?,
        (None, true) => serde_json::to_string_pretty(&everything()?)? + "\n",
        (Some(name), false) => toml::to_string(&found(name)?)?,
        (Some(name), true) => serde_json::to_string_pretty(&found(name)?)? + "\n",
    };
    print_text(&text)
}

/// A table of entries for each kind that there is.
fn lists() -> Result<String> {
    let lists = [
        ("accelerators", accelerators()?),
        ("nodes", nodes()),
        ("fabrics", fabrics()?),
        ("clusters", clusters()?),
        ("models", models()?),
    ];
    let mut text = String::new();
    for (heading, rows) in lists {
        text += &format!("{heading}\n{}\n", columns(&rows));
    }
    text += "`phalanx catalogue NAME` shows an entry with its sources.\n";
    Ok(text)
}

fn header<const N: usize>(cells: [&str; N]) -> Vec<Vec<String>> {
    vec![cells.map(str::to_owned).to_vec()]
}

fn accelerators() -> Result<Vec<Vec<String>>> {
    let mut rows = header(["name", "bf16", "fp8", "memory", "bandwidth", "power"]);
    for name in Kind::Accelerator.names() {
        let Accelerator { peak, memory, memory_bandwidth, tdp, .. } = catalogue::accelerator(name)?;
        let rate = |precision| {
            let tera = |rate: &FlopsPerSecond| format!("{:.0} TFLOP/s", rate.0 / 1e12);
            peak.get(&precision).map_or("-".into(), tera)
        };
        rows.push(vec![
            name.to_owned(),
            rate(Precision::Bf16),
            rate(Precision::Fp8),
            format!("{memory:.0}"),
            format!("{:.2} TB/s", memory_bandwidth.0 / 1e12),
            tdp.map_or("-".into(), |power| format!("{:.0} W", power.0)),
        ]);
    }
    Ok(rows)
}

fn nodes() -> Vec<Vec<String>> {
    let mut rows = header(["name", "per node", "per domain"]);
    let cell = |entry: &toml::Value, key: &str| {
        entry.get(key).map_or("-".to_owned(), toml::Value::to_string)
    };
    rows.extend(Kind::Node.entries().iter().map(|(name, entry)| {
        vec![name.clone(), cell(entry, "per_node"), cell(entry, "per_domain")]
    }));
    rows
}

fn fabrics() -> Result<Vec<Vec<String>>> {
    let mut rows = header(["name", "per accelerator", "reach of its tiers", "routing"]);
    for name in Kind::Fabric.names() {
        let Fabric { nic, tiers, routing, .. } = catalogue::fabric(name)?;
        let reaches: Vec<String> = tiers
            .iter()
            .map(|tier| match tier.oversubscription {
                1.0 => tier.reach.to_string(),
                taper => format!("{} (1:{taper})", tier.reach),
            })
            .collect();
        let gbps = nic.bandwidth.0 * 8.0 / 1e9;
        rows.push(vec![
            name.to_owned(),
            format!("{gbps:.0} Gb/s"),
            reaches.join(", "),
            routing_name(routing),
        ]);
    }
    Ok(rows)
}

fn routing_name(routing: Routing) -> String {
    match routing {
        Routing::Ecmp { flows_per_pair } => format!("ECMP, {flows_per_pair} flows a pair"),
        Routing::Adaptive => "adaptive".to_owned(),
        Routing::Spray => "packet spraying".to_owned(),
    }
}

fn clusters() -> Result<Vec<Vec<String>>> {
    let mut rows = header(["name", "accelerators", "of", "domain", "fabric"]);
    for name in Kind::Cluster.names() {
        let Cluster { accelerator, accelerators, domain, fabric, .. } = catalogue::find(name)?;
        rows.push(vec![
            name.to_owned(),
            thousands(accelerators.into()),
            accelerator.name,
            shape_name(&domain.shape, domain.accelerators),
            fabric.map_or("-".into(), |fabric| fabric.name),
        ]);
    }
    Ok(rows)
}

fn shape_name(shape: &Shape, accelerators: u32) -> String {
    match shape {
        Shape::Switched(_) => format!("{accelerators} switched"),
        Shape::Mesh(_) => format!("{accelerators} meshed"),
        Shape::Torus { dims, .. } => {
            dims.iter().map(u32::to_string).collect::<Vec<_>>().join("x") + " torus"
        }
    }
}

fn models() -> Result<Vec<Vec<String>>> {
    let mut rows = header(["name", "parameters", "layers", "hidden"]);
    for name in model::catalogue::names() {
        let config = model::catalogue::find(name)?;
        rows.push(vec![
            name.to_owned(),
            thousands(config.parameter_count()),
            config.layers.to_string(),
            thousands(config.hidden),
        ]);
    }
    Ok(rows)
}

/// Every entry by its kind and name.
fn everything() -> Result<Map<String, Value>> {
    let mut all = Map::new();
    for kind in Kind::ALL {
        all.insert(kind.to_string(), serde_json::to_value(kind.entries())?);
    }
    all.insert(MODEL.to_owned(), serde_json::to_value(model_entries()?)?);
    Ok(all)
}

/// The models by name, each as it is written down.
fn model_entries() -> Result<toml::Table> {
    let entry = |name: &str| -> Result<(String, toml::Value)> {
        Ok((name.to_owned(), toml::Value::try_from(model::catalogue::entry(name)?)?))
    };
    model::catalogue::names().map(entry).collect()
}

/// The entries called `name`, and those that they name, by kind and name.
fn found(name: &str) -> Result<toml::Table> {
    let mut found = toml::Table::new();
    for kind in Kind::ALL.into_iter().rev() {
        if kind.entries().contains_key(name) {
            collect(kind, name, &mut found);
        }
    }
    if let Some(model) = model_entries()?.remove(name) {
        found.insert(MODEL.to_owned(), toml::Table::from_iter([(name.to_owned(), model)]).into());
    }
    if found.is_empty() {
        bail!(
            "the catalogue has nothing called `{name}`; did you mean `{}`? `phalanx catalogue` lists all",
            nearest(name)
        );
    }
    Ok(found)
}

fn collect(kind: Kind, name: &str, found: &mut toml::Table) {
    let Some(entry) = kind.entries().get(name) else { return };
    let named = found.entry(kind.to_string()).or_insert_with(|| toml::Table::new().into());
    let Some(named) = named.as_table_mut() else { return };
    named.insert(name.to_owned(), entry.clone());
    for part in Kind::ALL {
        if let Some(name) = entry.get(part.to_string()).and_then(toml::Value::as_str) {
            collect(part, name, found);
        }
    }
}

fn nearest(name: &str) -> &'static str {
    let names = Kind::ALL.into_iter().flat_map(Kind::names).chain(model::catalogue::names());
    let alike = |known: &&str| strsim::jaro_winkler(&name.to_lowercase(), known);
    names.max_by(|a, b| alike(a).total_cmp(&alike(b))).unwrap_or_default()
}
