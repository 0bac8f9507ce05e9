//! `phalanx doctor`: whether this machine is ready to train on, and what would make it readier.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;
use rustix::process::{Resource, getrlimit};
use serde::Serialize;
use units::{Bytes, BytesPerSecond, Seconds};

use crate::output::columns;

/// What is looked at, and how it is shown.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Where runs and checkpoints will be written
    #[arg(long, value_name = "FOLDER", default_value = ".")]
    folder: PathBuf,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// Something must be fixed.
#[derive(Debug, thiserror::Error)]
#[error("{0} thing(s) must be fixed before this machine trains")]
pub struct Unfit(usize);

/// How a finding is to be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Fine,
    /// It works, but not as well as it could.
    Better,
    /// Training fails, or will.
    Must,
}

/// Something that was looked at.
#[derive(Debug, Clone, Serialize)]
struct Finding {
    what: &'static str,
    found: String,
    verdict: Verdict,
    /// What to do, and what it costs to leave it.
    fix: Option<String>,
    cost: Option<&'static str>,
}

impl Finding {
    fn fine(what: &'static str, found: impl Into<String>) -> Self {
        Self { what, found: found.into(), verdict: Verdict::Fine, fix: None, cost: None }
    }

    /// The same, to be fixed when `wrong`.
    fn when(
        self,
        wrong: bool,
        verdict: Verdict,
        fix: impl Into<String>,
        cost: &'static str,
    ) -> Self {
        if !wrong {
            return self;
        }
        Self { verdict, fix: Some(fix.into()), cost: Some(cost), ..self }
    }
}

/// Looks at everything; fails when something must be fixed.
pub fn doctor(args: &DoctorArgs) -> Result<()> {
    let mut findings = vec![open_files(), locked_memory(), shared_memory(), memory(), huge_pages()];
    findings.extend([cores(), clock()]);
    findings.extend(interfaces());
    findings.push(loopback().context("cannot use the loopback interface")?);
    findings.push(disk(&args.folder).with_context(|| format!("{}", args.folder.display()))?);
    findings.push(accelerators());
    let must = findings.iter().filter(|finding| finding.verdict == Verdict::Must).count();
    if args.json {
        let object = serde_json::json!({"findings": findings, "must_be_fixed": must});
        println!("{}", serde_json::to_string_pretty(&object)?);
    } else {
        print!("{}", text(&findings));
    }
    if must > 0 { Err(Unfit(must).into()) } else { Ok(()) }
}

fn text(findings: &[Finding]) -> String {
    let mark = |verdict| match verdict {
        Verdict::Fine => "ok",
        Verdict::Better => "better",
        Verdict::Must => "FIX",
    };
    let row =
        |it: &Finding| vec![mark(it.verdict).to_owned(), it.what.to_owned(), it.found.clone()];
    let mut text = columns(&findings.iter().map(row).collect::<Vec<_>>());
    let advice = |it: &Finding| {
        Some(format!("\n{}: {}\n  if left: {}\n", it.what, it.fix.as_ref()?, it.cost?))
    };
    text.extend(findings.iter().filter_map(advice));
    text
}

fn read(path: impl AsRef<Path>) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

fn limit(of: Resource) -> (u64, String) {
    let limit = getrlimit(of).current;
    (limit.unwrap_or(u64::MAX), limit.map_or("unlimited".to_owned(), |limit| limit.to_string()))
}

fn open_files() -> Finding {
    let (limit, found) = limit(Resource::Nofile);
    Finding::fine("open files", found)
        .when(
            limit < 65_536,
            Verdict::Better,
            "`ulimit -n 65536`, or nofile in /etc/security/limits.conf",
            "ranks that each talk to more than a few hundred others run out of sockets",
        )
        .when(
            limit < 256,
            Verdict::Must,
            "`ulimit -n 65536`, or nofile in /etc/security/limits.conf",
            "a handful of ranks run out of sockets and shared memory at the start",
        )
}

fn locked_memory() -> Finding {
    let (limit, found) = limit(Resource::Memlock);
    let found = if limit == u64::MAX { found } else { Bytes(limit).to_string() };
    let rdma = fs::read_dir("/sys/class/infiniband").is_ok_and(|mut cards| cards.next().is_some());
    let what = if rdma { "locked memory" } else { "locked memory (no RDMA card here)" };
    Finding::fine(what, found).when(
        rdma && limit < u64::MAX,
        Verdict::Better,
        "memlock unlimited in /etc/security/limits.conf, and in the resource manager's service",
        "RDMA cannot register buffers, and libraries fall back to TCP",
    )
}

/// Bytes of a file system: all, and those to be had.
fn space(path: &Path) -> Option<(Bytes, Bytes)> {
    let of = rustix::fs::statvfs(path).ok()?;
    Some((Bytes(of.f_blocks * of.f_frsize), Bytes(of.f_bavail * of.f_frsize)))
}

const MIB: u64 = 1 << 20;

fn shared_memory() -> Finding {
    let Some((all, free)) = space(Path::new("/dev/shm")) else {
        return Finding::fine("shared memory", "no /dev/shm").when(
            true,
            Verdict::Better,
            "mount a tmpfs on /dev/shm",
            "other libraries (NCCL, Gloo, PyTorch's loaders) need it; Phalanx uses memory files",
        );
    };
    Finding::fine("shared memory", format!("{free} of {all} free in /dev/shm")).when(
        free.0 < 256 * MIB,
        Verdict::Better,
        "a larger /dev/shm (containers: --shm-size=1g; Kubernetes: an emptyDir of medium Memory)",
        "NCCL and PyTorch's loaders fail with bus errors; Phalanx uses memory files instead",
    )
}

fn memory() -> Finding {
    let info = read("/proc/meminfo").unwrap_or_default();
    let kib = |name: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_start_matches(':').split_whitespace().next()?.parse::<u64>().ok()
    };
    let bytes = |name: &str| Bytes(1024 * kib(name).unwrap_or_default());
    let (all, free) = (bytes("MemTotal"), bytes("MemAvailable"));
    let allowed = read("/sys/fs/cgroup/memory.max").and_then(|max| max.parse().ok()).map(Bytes);
    let within = allowed.map_or(String::new(), |max| format!(", {max} allowed by the cgroup"));
    let swapped = bytes("SwapTotal").0 - bytes("SwapFree").0.min(bytes("SwapTotal").0);
    Finding::fine("memory", format!("{free} of {all} available{within}")).when(
        swapped > 64 * MIB,
        Verdict::Better,
        format!("{} are swapped out: end other programs, or `swapoff -a`", Bytes(swapped)),
        "a rank that is swapped out holds up all others",
    )
}

fn huge_pages() -> Finding {
    let modes = read("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    let chosen = modes.split(['[', ']']).nth(1).unwrap_or("not known").to_owned();
    let never = chosen == "never";
    Finding::fine("transparent huge pages", chosen).when(
        never,
        Verdict::Better,
        "`echo madvise > /sys/kernel/mm/transparent_hugepage/enabled`",
        "products of large matrices walk page tables more: a few percent",
    )
}

/// How long the share of a core that others take is looked for.
const SPIN: Seconds = Seconds(0.2);

fn cores() -> Finding {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let siblings = read("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list");
    let threads = siblings.map_or(1, |list| list.split([',', '-']).count());
    let (begin, busy) = (Instant::now(), own_time());
    while begin.elapsed().as_secs_f64() < SPIN.0 {}
    let lost = 1.0 - (own_time() - busy) / begin.elapsed().as_secs_f64();
    let sharing = if threads > 1 { format!(", {threads} threads a core") } else { String::new() };
    let load = read("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or("?").to_owned();
    let found = format!("{cores}{sharing}, load {load}, others take {:.0} %", 100.0 * lost);
    Finding::fine("cores", found).when(
        lost > 0.1,
        Verdict::Better,
        "end what else runs (`top`), or ask the host for cores of your own",
        "ranks wait for the slowest of them in every step, and measurements lie",
    )
}

/// Seconds that this thread has computed.
fn own_time() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// Readings of the clock that are timed.
const READINGS: u32 = 10_000;

fn clock() -> Finding {
    let source = read("/sys/devices/system/clocksource/clocksource0/current_clocksource");
    let source = source.unwrap_or_else(|| "not known".to_owned());
    let mut least = Seconds(f64::MAX);
    let (begin, mut last) = (Instant::now(), Instant::now());
    for _ in 0..READINGS {
        let now = Instant::now();
        let step = Seconds((now - last).as_secs_f64());
        if step > Seconds::ZERO && step < least {
            least = step;
        }
        last = now;
    }
    let each = Seconds(begin.elapsed().as_secs_f64() / f64::from(READINGS));
    let slow = each > Seconds(1e-6);
    Finding::fine("clock", format!("{source}, steps of {least}, {each} a reading")).when(
        slow,
        Verdict::Better,
        "a faster clock source: `clocksource=tsc` on the kernel's command line, where the CPU allows",
        "every measured span is off by that much, and small transfers are slower",
    )
}

/// What reaches other hosts.
fn interfaces() -> Vec<Finding> {
    let entries = fs::read_dir("/sys/class/net").into_iter().flatten().flatten();
    let up = entries.map(|entry| entry.path()).filter(|path| {
        let state = read(path.join("operstate")).unwrap_or_default();
        state == "up" && path.join("device").exists()
    });
    up.map(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let number = |file: &str| read(path.join(file)).and_then(|it| it.parse::<i64>().ok());
        let mtu = number("mtu").unwrap_or_default();
        let speed = number("speed").filter(|speed| *speed > 0);
        let speed = speed.map_or(String::new(), |speed| format!(", {speed} Mbit/s"));
        Finding::fine("network", format!("{name}{speed}, MTU {mtu}")).when(
            mtu < 9000,
            Verdict::Better,
            format!("`ip link set {name} mtu 9000`, where every switch on the way allows it"),
            "TCP between hosts costs more of a core: up to a third of its bandwidth at 100 Gbit/s",
        )
    })
    .collect()
}

/// What is sent to measure the loopback interface.
const SENT: usize = 64 << 20;

fn loopback() -> Result<Finding> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    let sender = std::thread::spawn(move || {
        let mut stream = TcpStream::connect(address)?;
        let piece = vec![0; 1 << 20];
        (0..SENT / piece.len()).try_for_each(|_| stream.write_all(&piece))
    });
    let (mut stream, _) = listener.accept()?;
    let (begin, mut received) = (Instant::now(), 0);
    let mut buffer = vec![0; 1 << 20];
    loop {
        match stream.read(&mut buffer)? {
            0 => break,
            count => received += count,
        }
    }
    let time = begin.elapsed().as_secs_f64();
    sender.join().expect("the sender does not panic")?;
    let rate = BytesPerSecond(received as f64 / time);
    Ok(Finding::fine("loopback", format!("{rate} over TCP")).when(
        rate.0 < 0.5e9,
        Verdict::Better,
        "look for what filters it (`nft list ruleset`), or for a busy machine",
        "ranks of one host that do not share memory (containers of their own) talk over it",
    ))
}

/// Small synced writes that are timed.
const SYNCS: usize = 8;

fn disk(folder: &Path) -> Result<Finding> {
    let free = space(folder).map_or(Bytes(0), |(_, free)| free);
    let path = folder.join(format!(".phalanx-doctor-{}", std::process::id()));
    let mut file = fs::File::create_new(&path)?;
    let mut sync = || {
        let begin = Instant::now();
        file.write_all(&[0; 4096])?;
        file.sync_all()?;
        Ok(Seconds(begin.elapsed().as_secs_f64()))
    };
    let times: std::io::Result<Vec<Seconds>> = (0..SYNCS).map(|_| sync()).collect();
    fs::remove_file(&path)?;
    let time = Seconds::median(times?);
    let found = format!("{free} free in {}, {time} to sync a write", folder.display());
    Ok(Finding::fine("disk", found)
        .when(
            time > Seconds(0.05),
            Verdict::Better,
            "a local disk for [run] folder, an object store for [checkpoint] folder",
            "each checkpoint syncs several files, and steps wait for a slow one's successor",
        )
        .when(
            free.0 < 1024 * MIB,
            Verdict::Must,
            "make room, or name another --folder",
            "a run fails at its first checkpoint",
        ))
}

fn accelerators() -> Finding {
    let there = |path: &str| Path::new(path).exists();
    let (found, feature) = match () {
        () if there("/dev/nvidiactl") => ("NVIDIA GPU", "burn-cuda"),
        () if there("/dev/kfd") => ("AMD GPU", "burn-rocm"),
        () if there("/dev/dri") => ("GPU", "burn-vulkan"),
        () => return Finding::fine("accelerators", "none; the CPU trains small models"),
    };
    let built = cfg!(feature = "burn-cuda") || cfg!(feature = "burn-rocm");
    Finding::fine("accelerators", found).when(
        !built && !cfg!(feature = "burn-vulkan"),
        Verdict::Better,
        format!("build with `--features {feature}` and set [cluster] device in the job"),
        "it stands idle: this build trains on the CPU alone",
    )
}
