//! The processes of a run on a host that is not its coordinator's.

use std::io::{self, BufReader};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use transport::Secret;

use super::lifeline::{HEARTBEAT, hear, prove, say};
use super::{Answer, FENCE, Record, Word, host_name};
use crate::Error;
use crate::launch::{Children, Ended};

/// How long whoever coordinates is looked for at the start: the hosts of a run do not start at once.
const PATIENCE: Duration = Duration::from_secs(120);
/// Between two attempts to reach it.
const PAUSE: Duration = Duration::from_millis(100);

/// What happens on this host.
enum Heard {
    Told(Answer),
    Ended(Ended),
    /// The connection has ended.
    Alone,
}

/// Starts and watches processes on this host as whoever coordinates a run at `address` says, until it
/// is over. When the coordinator is lost they save what they can and end, as ever.
///
/// # Errors
/// When nobody coordinates there, or the run failed; [`Error::Host`] says why.
pub fn join(
    address: SocketAddr,
    secret: &Secret,
    sizes: (u32, u32),
    command: impl Fn() -> Command,
) -> Result<(), Error> {
    let (tell, heard) = mpsc::channel();
    let ended = tell.clone();
    let ended = move |end| drop(ended.send(Heard::Ended(end)));
    let children = Children::none(sizes, secret.clone(), ended).map_err(failed)?;
    let record = Record { term: 0, address: Some(address), secret: secret.reveal().to_owned() };
    let mut host = None;
    let mut socket = connect(&record, host, PATIENCE, &tell).map_err(failed)?;
    loop {
        let answer = match heard.recv_timeout(HEARTBEAT) {
            Err(RecvTimeoutError::Disconnected) => unreachable!("it has a sender itself"),
            Err(RecvTimeoutError::Timeout) => {
                // When it is gone, that is heard.
                drop(say(&mut socket, Word::Alive { step: 0, asked: 0 }));
                continue;
            }
            Ok(Heard::Ended(Ended { seat, incarnation, reason, code })) => {
                drop(say(&mut socket, Word::Ended { seat, incarnation, code, words: reason }));
                continue;
            }
            Ok(Heard::Alone) => {
                // Its processes have as long.
                socket = connect(&record, host, FENCE, &tell).map_err(|error| {
                    children.wait();
                    failed(error)
                })?;
                continue;
            }
            Ok(Heard::Told(answer)) => answer,
        };
        match answer {
            Answer::Start(mut control) => {
                let (seat, incarnation) = (control.seat, control.incarnation);
                host = Some(seat.0 / sizes.1);
                control.record.secret = secret.reveal().to_owned();
                children.start(seat, incarnation, control.told_to(command()))?;
            }
            Answer::Kill { seat, incarnation } => children.kill(seat, incarnation),
            Answer::Over { failure: None } => return Ok(()),
            Answer::Over { failure: Some(reason) } => {
                return Err(Error::Host { reason: format!("the run is over: {reason}") });
            }
            Answer::Granted { .. } | Answer::Called | Answer::Meet(_) => {}
        }
    }
}

fn failed(error: io::Error) -> Error {
    Error::Host { reason: format!("cannot join whoever coordinates the run: {error}") }
}

/// Connects, and passes on what is said there.
fn connect(
    record: &Record,
    host: Option<u32>,
    patience: Duration,
    tell: &Sender<Heard>,
) -> io::Result<TcpStream> {
    let deadline = Instant::now() + patience;
    let mut socket = loop {
        match prove(record, patience) {
            Ok(socket) => break socket,
            // It would say so again.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Err(error),
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => std::thread::sleep(PAUSE),
        }
    };
    say(&mut socket, Word::Join { host, name: host_name() })?;
    let mut reader = BufReader::new(socket.try_clone()?);
    // It answers every heartbeat.
    socket.set_read_timeout(Some(FENCE))?;
    let tell = tell.clone();
    std::thread::spawn(move || {
        while let Some(answer) = hear(&mut reader) {
            if tell.send(Heard::Told(answer)).is_err() {
                return;
            }
        }
        drop(tell.send(Heard::Alone));
    });
    Ok(socket)
}
