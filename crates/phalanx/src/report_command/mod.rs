//! `phalanx report`: a run, or the step of a job on a described cluster, as one page of HTML.

mod links;
mod run;
mod simulated;

use std::ffi::OsStr;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use report::page::{Held, Origin, Page, ScalingCurve, ScalingPoint};
use serde::Deserialize;
use units::Bytes;

use crate::dashboards::http::{self, Content};
use crate::described::Costing;
use crate::job::Job;

/// What a report is made of.
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// A run's folder; or a job file, whose step is simulated on the cluster that it describes
    of: PathBuf,
    /// Where the page is written: report.html in the run's folder unless given, or beside the job
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// What `phalanx scale JOB --json` printed: its curves go on the page
    #[arg(long, value_name = "FILE")]
    scale: Option<PathBuf>,
    /// Replace a key of the job file, as in --set cluster.accelerators=64; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    #[command(flatten)]
    costing: Costing,
    /// Serve the page to browsers of this machine instead, up to date while the job runs
    #[arg(long, conflicts_with = "out")]
    live: bool,
    /// The port that it is served on; any that is free unless given
    #[arg(long, value_name = "PORT", requires = "live", default_value_t = 0)]
    port: u16,
    /// Show the page in a browser: the one that $BROWSER names, or the desktop's
    #[arg(long)]
    open: bool,
}

/// Seconds between updates of a live page.
const REFRESH_S: u32 = 2;

/// Writes or serves the page, and says where.
pub fn report(args: &ReportArgs) -> Result<()> {
    if args.live {
        return live(args);
    }
    let out = match &args.out {
        Some(out) => out.clone(),
        None if args.of.is_dir() => args.of.join("report.html"),
        None => args.of.with_extension("html"),
    };
    let page = page(args)?;
    std::fs::write(&out, page.html()).with_context(|| format!("cannot write {}", out.display()))?;
    println!("{}", out.display());
    if args.open { open(std::path::absolute(&out)?.as_os_str()) } else { Ok(()) }
}

/// Starts a browser on the page, and does not wait for it.
fn open(page: &OsStr) -> Result<()> {
    let named = std::env::var_os("BROWSER").filter(|name| !name.is_empty());
    let browser = named.unwrap_or_else(|| "xdg-open".into());
    let quiet = Command::new(&browser)
        .arg(page)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    quiet.with_context(|| {
        format!("--open: cannot start {}; BROWSER names another", browser.display())
    })?;
    Ok(())
}

/// Serves the page until the process is ended; every request reads the run anew.
fn live(args: &ReportArgs) -> Result<()> {
    let fresh = || {
        let page = Page { refresh_s: Some(REFRESH_S), ..page(args)? };
        Ok(Content { kind: "text/html", body: page.html() })
    };
    // What cannot be shown at all is told here, not in the browser.
    fresh()?;
    let listener = http::listen(IpAddr::V4(Ipv4Addr::LOCALHOST), args.port)?;
    let address = format!("http://{}/", listener.local_addr()?);
    println!("{address}");
    if args.open {
        open(address.as_ref())?;
    }
    http::serve(&listener, |path| (path == "/").then(fresh));
    Ok(())
}

fn page(args: &ReportArgs) -> Result<Page> {
    let curves = args.scale.as_deref().map(curves).transpose()?.unwrap_or_default();
    if args.of.is_dir() {
        ensure!(args.set.is_empty(), "--set: {} is a run, and has been", args.of.display());
        return run::page(&args.of, curves);
    }
    if !args.of.exists() {
        bail!("{} is neither a run's folder nor a job file", args.of.display());
    }
    simulated::page(&args.of, &args.set, &args.costing, curves)
}

/// What is read of `phalanx scale --json`.
#[derive(Deserialize)]
struct Scaled {
    curves: Vec<Curve>,
}

#[derive(Deserialize)]
struct Curve {
    alternative: String,
    points: Vec<Point>,
}

#[derive(Deserialize)]
struct Point {
    accelerators: u32,
    tokens_per_s: f64,
    scaling_efficiency: f64,
    bound_in_words: String,
}

fn curves(path: &Path) -> Result<Vec<ScalingCurve>> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("--scale: cannot read {}", path.display()))?;
    let scaled: Scaled = serde_json::from_str(&text).with_context(|| {
        format!("--scale: {} is not what `phalanx scale JOB --json` prints", path.display())
    })?;
    let point = |point: Point| ScalingPoint {
        accelerators: point.accelerators,
        tokens_per_s: point.tokens_per_s,
        efficiency: point.scaling_efficiency,
        bound: point.bound_in_words,
    };
    let curve = |curve: Curve| ScalingCurve {
        name: curve.alternative,
        origin: Origin::Predicted,
        points: curve.points.into_iter().map(point).collect(),
    };
    Ok(scaled.curves.into_iter().map(curve).collect())
}

/// What each stage is planned to hold.
fn planned_memory(job: &Job) -> Vec<Held> {
    use plan::memory::{Footprint, Item, Options};
    let options = Options::new(job.training.precision, &job.layout);
    let stages = Footprint::new(&job.model).stages(&job.layout, &job.batch(), &options);
    let item = |stage: &plan::memory::StageMemory| -> Vec<(&'static str, Bytes)> {
        Item::ALL.into_iter().map(|item| (item.name(), stage.item(item))).collect()
    };
    stages
        .iter()
        .map(|stage| Held { by: format!("stage {}", stage.stage), items: item(stage) })
        .collect()
}
