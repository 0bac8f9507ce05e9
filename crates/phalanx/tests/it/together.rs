//! Ranks that are started by hand, and ranks that are lost.

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};

use rustix::net::{self, AddressFamily, SocketType, sockopt};
use rustix::process::{Pid, Signal, kill_process};

use crate::place::{Answer, Place, over};

/// A port that nobody else is given while this lives, and that rank 0 can nevertheless listen on:
/// a socket that is bound and does not listen keeps the port, and gives way to one that does.
struct Port {
    number: u16,
    _socket: OwnedFd,
}

impl Port {
    fn reserve() -> Self {
        let socket = net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        sockopt::set_socket_reuseaddr(&socket, true).unwrap();
        net::bind(&socket, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = SocketAddr::try_from(net::getsockname(&socket).unwrap()).unwrap();
        Self { number: address.port(), _socket: socket }
    }
}

/// Makes a command one rank of several, as torchrun would.
fn as_rank<'a>(command: &'a mut Command, rank: u32, ranks: u32, port: &Port) -> &'a mut Command {
    command
        .env("RANK", rank.to_string())
        .env("WORLD_SIZE", ranks.to_string())
        .env("LOCAL_RANK", rank.to_string())
        .env("MASTER_ADDR", "127.0.0.1")
        .env("MASTER_PORT", port.number.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
}

/// Starts one rank for each job file and waits for all.
fn by_hand<const RANKS: usize>(place: &Place, jobs: [&str; RANKS]) -> [Answer; RANKS] {
    let port = Port::reserve();
    let mut rank = 0;
    let children = jobs.map(|job| {
        let mut command = place.phalanx(&["train", job]);
        as_rank(&mut command, rank, RANKS as u32, &port);
        rank += 1;
        command.spawn().unwrap()
    });
    children.map(|child| Answer::new(child.wait_with_output().unwrap(), place))
}

#[test]
fn ranks_started_by_hand_train_like_local_ones() {
    let place = Place::new();
    place.write("job.toml", over(2, ""));
    let [first, second] = by_hand(&place, ["job.toml", "job.toml"]);
    assert_eq!((first.code, first.stderr.as_str()), (Some(0), ""));
    assert_eq!((second.code, second.stderr.as_str()), (Some(0), ""));
    assert!(first.stdout.contains("held out") && second.stdout.is_empty(), "{}", second.stdout);
    place.write("job.toml", over(1, ""));
    place.succeed(&["train", "job.toml", "--set", "cluster.accelerators=2"]);
    assert_eq!(place.losses("runs/job-001", "step"), place.losses("runs/job-002", "step"));
}

#[test]
fn ranks_with_different_jobs_are_refused_with_the_difference() {
    let place = Place::new();
    place.write("job.toml", over(2, ""));
    place.write("other/job.toml", over(2, "").replace("1e-2", "2e-2"));
    let [first, second] = by_hand(&place, ["job.toml", "other/job.toml"]);
    for answer in [&first, &second] {
        assert_eq!((answer.code, answer.stdout.as_str()), (Some(2), ""), "{}", answer.stderr);
    }
    insta::assert_snapshot!(first.stderr, @r"
    phalanx: rank 0: the job does not start because of rank 1: its job differs from rank 0's:
      rank 0: learning_rate = 0.01
      rank 0: minimum_learning_rate = 0.001
      rank 1: learning_rate = 0.02
      rank 1: minimum_learning_rate = 0.002
    ");
    assert_eq!(second.stderr, first.stderr.replacen("rank 0", "rank 1", 1));
    assert!(!place.path("runs").exists(), "refused before anything is written");
}

#[test]
fn a_launcher_with_another_number_of_ranks_is_refused() {
    let place = Place::new();
    place.write("job.toml", over(2, ""));
    let [answer] = by_hand(&place, ["job.toml"]);
    assert_eq!((answer.code, answer.stdout.as_str()), (Some(2), ""));
    insta::assert_snapshot!(answer.stderr, @"phalanx: [cluster] accelerators = 2, but the launcher started 1 rank(s); make them equal");
}

#[test]
fn a_rank_that_diverges_says_so_once() {
    let place = Place::new();
    place.write("job.toml", over(2, "").replace("1e-2", "1e30\nwarmup_steps = 0"));
    let answer = place.run(&["train", "job.toml"]);
    assert_eq!(answer.code, Some(1), "{}", answer.stdout);
    // Both stop at the same step; either may be the first to end.
    let message = answer.stderr.replace("rank 1", "rank 0");
    assert!(message.starts_with("phalanx: rank 0: step 2: the loss is "), "{message}");
    assert!(
        message.ends_with("Lower [training] learning_rate or raise warmup_steps\n"),
        "{message}"
    );
    assert_eq!(message.lines().count(), 1, "{message}");
}

/// The process of a local rank.
fn process_of(launcher: &Child, rank: u32) -> Pid {
    let id = launcher.id();
    let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
    let is_rank = |child: &&str| {
        let environment = std::fs::read(format!("/proc/{child}/environ")).unwrap();
        let wanted = format!("RANK={rank}");
        environment.split(|byte| *byte == 0).any(|variable| variable == wanted.as_bytes())
    };
    let child = children.split_whitespace().find(is_rank).unwrap();
    Pid::from_raw(child.parse().unwrap()).unwrap()
}

#[test]
fn a_lost_rank_ends_the_run_and_is_named() {
    let place = Place::new();
    // More steps than any machine does before the rank is lost, each of which is heard of.
    let endless = over(4, "pipeline = 2\nmicro_batch = 2")
        .replace("steps = 20", "steps = 100000000\nevaluate_every = 1")
        + "\n[recovery]\nrestarts = 0\n";
    place.write("job.toml", endless);
    let mut command = place.phalanx(&["train", "job.toml"]);
    let mut launcher = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(launcher.stdout.take().unwrap()).lines();
    assert!(lines.by_ref().any(|line| line.unwrap().contains("held-out loss")));
    kill_process(process_of(&launcher, 2), Signal::KILL).unwrap();
    lines.for_each(drop);
    let answer = Answer::new(launcher.wait_with_output().unwrap(), &place);
    assert_eq!(answer.code, Some(1), "{}", answer.stderr);
    insta::assert_snapshot!(answer.stderr, @"phalanx: rank 2: ended without a word (signal: 9 (SIGKILL)); if nobody stopped it, see whether memory ran out");
}
