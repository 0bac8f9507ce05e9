//! A run for those who have dashboards, and its page while it is under way.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Stdio};

use crate::place::{Place, over};
use crate::train::{MEASURED, RUN};

/// A process that serves, and where.
struct Server {
    process: Child,
    address: String,
}

impl Server {
    /// Starts it, and waits for the line that says where it listens.
    fn start(place: &Place, arguments: &[&str]) -> Self {
        let mut process = place.phalanx(arguments).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let mut addresses = lines.filter_map(|line| {
            let (_, rest) =
                line.ok()?.split_once("http://").map(|(a, b)| (a.to_owned(), b.to_owned()))?;
            rest.split('/').next().map(str::to_owned)
        });
        let address = addresses.next().expect("it says where it listens");
        // What it prints from now on is read, so that it is not held up.
        std::thread::spawn(move || addresses.count());
        Self { process, address }
    }

    /// What it answers, head and all, to who calls it by this name.
    fn get(&self, path: &str, host: &str) -> String {
        let mut connection = TcpStream::connect(&self.address).unwrap();
        write!(connection, "GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n").unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).unwrap();
        answer
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn prometheus_is_answered_while_the_job_runs() {
    let place = Place::new();
    place.write("job.toml", over(1, ""));
    let long = ["train", "job.toml", "--set", "training.steps=1000000", "--metrics", "0"];
    let server = Server::start(&place, &long);
    let text = loop {
        let text = server.get("/metrics", "localhost");
        if text.contains("\nphalanx_loss ") {
            break text;
        }
    };
    assert!(
        text.starts_with("HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4"),
        "{text}"
    );
    let body = text.split("\r\n\r\n").nth(1).unwrap();
    for line in body.lines().filter(|line| !line.starts_with('#')) {
        let (name, value) = line.split_once(' ').unwrap();
        assert!(name.starts_with("phalanx_") && value.parse::<f64>().is_ok(), "{line}");
    }
    assert!(server.get("/", "localhost").starts_with("HTTP/1.1 404"));
}

#[test]
fn tensorboard_files_lie_in_the_run_folder() {
    let place = Place::new();
    place.write("job.toml", over(2, "pipeline = 2") + "\n[metrics]\ntensorboard = true\n");
    place.succeed(&["train", "job.toml"]);
    let files = place.files(RUN);
    let named = |name: &str| name.starts_with("events.out.tfevents.");
    let mut written = files
        .iter()
        .filter(|(path, _)| path.file_name().is_some_and(|name| named(name.to_str().unwrap())));
    let (_, bytes) = written.next().expect("an event file");
    assert!(written.next().is_none(), "rank 0 alone writes");
    let tags = |tag: &str| bytes.windows(tag.len()).filter(|part| *part == tag.as_bytes()).count();
    assert_eq!(tags("loss/training"), 20);
    assert_eq!(tags("loss/held out"), 10);
}

#[test]
fn a_live_page_is_for_browsers_of_this_machine() {
    let (place, _) = &*MEASURED;
    let server = Server::start(place, &["report", RUN, "--live"]);
    let page = server.get("/", "localhost");
    assert!(page.starts_with("HTTP/1.1 200 OK\r\nContent-Type: text/html"), "{page}");
    assert!(page.contains("data-refresh=\"2\"") && page.contains("<h1>job-001</h1>"));
    assert!(server.get("/elsewhere", "localhost").starts_with("HTTP/1.1 404"));
    assert!(server.get("/", "evil.example").starts_with("HTTP/1.1 421"));
}
