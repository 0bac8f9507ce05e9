//! The coordinator at work, on the processes of this host.

use std::collections::BTreeMap;
use std::io::{self, BufReader};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use units::{Rank, Seconds};

use super::lifeline::{Meeting, hear, say};
use super::{Action, CONTROL, Coordinator, End, Event, Policy, Verdict, Word};
use crate::Error;
use crate::launch::{Children, Ended};

/// How often the coordinator looks at the clock.
const TICK: Duration = Duration::from_millis(50);

/// How long ranks have to end by themselves once a run has failed.
const FAREWELL: Duration = Duration::from_secs(2);

/// What the threads that listen tell the one that decides.
enum Heard {
    Connected(Rank, u64, TcpStream),
    Event(Event),
    Ended(Ended),
}

/// Keeps the processes of a run going: starts by `command` those that are lost anew, and lets the
/// others meet them.
///
/// # Errors
/// The first failure, with the failed rank's own last words.
pub fn supervise(policy: Policy, command: impl Fn() -> Command) -> Result<(), Error> {
    let failed = |error: io::Error| Error::Process {
        rank: Rank(0),
        reason: format!("cannot be supervised: {error}"),
        code: None,
    };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    // The standard library's random seed is what no other process knows.
    let secret = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), address);
    let (tell, heard) = mpsc::channel();
    let ended = tell.clone();
    std::thread::spawn(move || accept(&listener, secret, &tell));
    let command = |incarnation: u64| {
        let mut command = command();
        command.env(CONTROL, format!("{address} {secret} {incarnation}"));
        command
    };
    let mut children = Children::start(policy.ranks, || command(0))?;
    children.watch(move |end| drop(ended.send(Heard::Ended(end))));
    let coordinator = Coordinator::new(policy, Seconds::ZERO);
    let begin = Instant::now();
    let mut supervisor =
        Supervisor { coordinator, children, sockets: BTreeMap::new(), failures: vec![], begin };
    supervisor.run(&heard, &command)
}

struct Supervisor {
    coordinator: Coordinator,
    children: Children,
    /// By rank: the process it leads to, and the connection.
    sockets: BTreeMap<Rank, (u64, TcpStream)>,
    failures: Vec<Ended>,
    begin: Instant,
}

impl Supervisor {
    fn run(
        &mut self,
        heard: &Receiver<Heard>,
        command: &dyn Fn(u64) -> Command,
    ) -> Result<(), Error> {
        let verdict = loop {
            let event = match heard.recv_timeout(TICK) {
                Err(RecvTimeoutError::Timeout) => Some(Event::Tick),
                Err(RecvTimeoutError::Disconnected) => unreachable!("the listener never ends"),
                Ok(heard) => self.note(heard),
            };
            let now = Seconds(self.begin.elapsed().as_secs_f64());
            let actions = event.map(|event| self.coordinator.hear(now, event));
            for action in actions.unwrap_or_default() {
                self.act(action, command)?;
            }
            if let Some(verdict) = self.coordinator.verdict() {
                break verdict;
            }
        };
        self.see_off(heard, verdict)
    }

    /// What was heard, as an event.
    fn note(&mut self, heard: Heard) -> Option<Event> {
        match heard {
            Heard::Event(event) => Some(event),
            Heard::Connected(rank, incarnation, socket) => {
                self.sockets.insert(rank, (incarnation, socket));
                None
            }
            Heard::Ended(ended) => {
                let Ended { rank, incarnation, code, .. } = ended;
                let end = match code {
                    Some(0) => End::Completed,
                    Some(_) => End::Failed,
                    None => End::Lost,
                };
                self.failures.extend((end != End::Completed).then_some(ended));
                Some(Event::Ended { rank, incarnation, end })
            }
        }
    }

    fn act(&mut self, action: Action, command: &dyn Fn(u64) -> Command) -> Result<(), Error> {
        match action {
            Action::Start { rank, incarnation } => {
                self.children.restart(rank, incarnation, command(incarnation))
            }
            Action::Kill { rank, incarnation } => {
                self.children.kill(rank, incarnation);
                Ok(())
            }
            Action::Meet { rank, incarnation, generation, master } => {
                if let Some((of, socket)) = self.sockets.get_mut(&rank)
                    && *of == incarnation
                {
                    // Who cannot be told any more is about to be missed.
                    drop(say(socket, Meeting { generation, master }));
                }
                Ok(())
            }
            Action::Finish(_) => Ok(()),
        }
    }

    /// The end: who waits for the others is told that they do not come, and the cause is found.
    fn see_off(&mut self, heard: &Receiver<Heard>, verdict: Verdict) -> Result<(), Error> {
        let lost = match verdict {
            Verdict::Completed => return Ok(()),
            Verdict::Failed(_) => None,
            Verdict::GaveUp(rank) => Some(rank),
        };
        let times = self.coordinator.losses();
        for (_, socket) in self.sockets.values() {
            drop(socket.shutdown(std::net::Shutdown::Both));
        }
        let deadline = Instant::now() + FAREWELL;
        while self.children.any_left()
            && let Ok(heard) =
                heard.recv_timeout(deadline.saturating_duration_since(Instant::now()))
        {
            self.note(heard);
        }
        // A rank that lost another ends with 1; what ended otherwise is the cause.
        let last = self.failures.iter().rev().find(|ended| Some(ended.rank) == lost);
        let other = self.failures.iter().find(|ended| ended.code.is_some_and(|code| code != 1));
        let cause = last.or(other).or(self.failures.first()).cloned();
        let Some(Ended { rank, reason, code, .. }) = cause else {
            unreachable!("a run fails because of a rank that ended")
        };
        if lost.is_some() && times > 1 {
            return Err(Error::CrashLoop { rank, times, reason });
        }
        Err(Error::Process { rank, reason, code })
    }
}

/// Hears everyone who connects and knows the secret.
fn accept(listener: &TcpListener, secret: u64, tell: &Sender<Heard>) {
    for socket in listener.incoming().flatten() {
        let tell = tell.clone();
        std::thread::spawn(move || listen(socket, secret, &tell));
    }
}

/// Passes on what a rank says, as long as it does.
fn listen(socket: TcpStream, secret: u64, tell: &Sender<Heard>) {
    let (Ok(writer), _) = (socket.try_clone(), socket.set_nodelay(true)) else { return };
    let mut reader = BufReader::new(socket);
    let Some(Word::Hello { rank, incarnation, secret: said }) = hear(&mut reader) else { return };
    if said != secret || tell.send(Heard::Connected(rank, incarnation, writer)).is_err() {
        return;
    }
    while let Some(word) = hear(&mut reader) {
        let event = match word {
            Word::Hello { .. } => return,
            Word::Alive { step } => Event::Alive { rank, incarnation, step },
            Word::Ready { address, step } => Event::Ready { rank, incarnation, address, step },
        };
        if tell.send(Heard::Event(event)).is_err() {
            return;
        }
    }
}
