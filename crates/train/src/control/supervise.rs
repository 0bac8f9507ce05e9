//! The coordinator at work, on the processes of this host.

use std::collections::BTreeMap;
use std::io::{self, BufReader};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use transport::Secret;
use units::{Rank, Seconds};

use super::lifeline::{self, hear, say};
use super::{
    Action, Answer, CONTROL, Control, Coordinator, End, Event, FENCE, LEASE, Loss, Lost, Meeting,
    Policy, Record, Register, Seat, Verdict, Word,
};
use crate::Error;
use crate::launch::{Children, Ended};

/// How often the coordinator looks at the clock.
const TICK: Duration = Duration::from_millis(50);

/// How long ranks have to end by themselves once a run has failed.
const FAREWELL: Duration = Duration::from_secs(2);

/// How often the coordinator looks whether another has taken over.
const CONFIRM: Duration = Duration::from_secs(1);

/// What the threads that listen tell the one that decides.
enum Heard {
    Connected(Seat, u64, u32, TcpStream),
    Event(Event),
    /// A process says with which exit code it is about to end, and why.
    Leaving(Seat, u64, (i32, String)),
    Ended(Ended),
    /// Nobody had taken over at that time; or somebody has.
    Confirmed(Instant),
    Superseded,
}

/// Keeps the processes of a run going: starts by `command` those that are lost anew, and lets the
/// others meet them. With a register, at a place as [`Register::at`] has it, others can take over.
///
/// # Errors
/// The first failure, with the failed rank's own last words; [`Error::Coordinated`] when somebody
/// coordinates there already.
pub fn supervise(
    policy: Policy,
    register: Option<&str>,
    command: impl Fn() -> Command,
) -> Result<(), Error> {
    let office = Office::new(register)?;
    let newest = office.newest()?;
    if let Some(record) = newest.clone().filter(lifeline::answers) {
        return Err(Error::Coordinated { place: office.place(), term: record.term });
    }
    let term = newest.map_or(0, |record| record.term + 1);
    if !office.take(term)? {
        return Err(Error::Coordinated { place: office.place(), term });
    }
    Supervisor::new(Coordinator::new, office, policy, term)?.run(&command)
}

/// Waits until whoever coordinates a run is lost, and then keeps its processes going as
/// [`supervise`] does. `tell` is told that it waits, and whom it replaces; both by their terms.
///
/// # Errors
/// As [`supervise`].
pub fn stand_by(
    policy: Policy,
    register: &str,
    command: impl Fn() -> Command,
    tell: impl Fn(Standing),
) -> Result<(), Error> {
    let mut office = Office::new(Some(register))?;
    let mut watched = None;
    let term = loop {
        // Before there is a run there is nothing to take over.
        let Some(record) = office.newest()? else {
            std::thread::sleep(CONFIRM);
            continue;
        };
        if record.address.is_none() {
            tell(Standing::Over);
            return Ok(());
        }
        if watched != Some(record.term) {
            tell(Standing::By(record.term));
            watched = Some(record.term);
        }
        lifeline::watch(&record, LEASE);
        // The ranks go on, and know each other by what they were told.
        office.secret = Secret::new(&record.secret).unwrap_or(office.secret);
        if office.newest()?.is_some_and(|newest| newest.term == record.term)
            && office.take(record.term + 1)?
        {
            break record.term + 1;
        }
    };
    tell(Standing::In(term));
    Supervisor::new(Coordinator::succeed, office, policy, term)?.run(&command)
}

/// What somebody who stands by does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Waits, while the coordinator of a term does its work.
    By(u64),
    /// Coordinates, in a term of its own.
    In(u64),
    /// Nothing, since the run is over.
    Over,
}

/// Where a coordinator listens, and where that is written.
struct Office {
    listener: TcpListener,
    address: SocketAddr,
    secret: Secret,
    register: Option<(String, Register)>,
}

impl Office {
    fn new(register: Option<&str>) -> Result<Self, Error> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(not_supervised)?;
        let address = listener.local_addr().map_err(not_supervised)?;
        let secret = Secret::random().map_err(|error| not_supervised(io::Error::other(error)))?;
        let register = register.map(|place| Ok((place.to_owned(), Register::at(place)?)));
        let register = register.transpose().map_err(not_supervised)?;
        Ok(Self { listener, address, secret, register })
    }

    /// What the coordinator goes by: where nobody can take over, nobody need make sure.
    fn policy(&self, policy: Policy) -> Policy {
        let time = |limit: Duration| match self.register {
            Some(_) => Seconds(limit.as_secs_f64()),
            None => Seconds(f64::INFINITY),
        };
        Policy { lease: time(LEASE), fence: time(FENCE), ..policy }
    }

    fn place(&self) -> String {
        self.register.as_ref().map(|(place, _)| place.clone()).unwrap_or_default()
    }

    fn newest(&self) -> Result<Option<Record>, Error> {
        let newest = self.register.as_ref().map(|(_, register)| register.newest());
        newest.transpose().map(Option::flatten).map_err(not_supervised)
    }

    fn record(&self, term: u64) -> Record {
        Record { term, address: Some(self.address), secret: self.secret.reveal().to_owned() }
    }

    /// Takes a term, if there is anybody to take it from.
    fn take(&self, term: u64) -> Result<bool, Error> {
        let taken = self.register.as_ref().map(|(_, register)| register.take(&self.record(term)));
        taken.unwrap_or(Ok(true)).map_err(not_supervised)
    }

    /// Tells a process where its coordinator is.
    fn invite(
        &self,
        mut command: Command,
        term: u64,
        (seat, incarnation): (Seat, u64),
    ) -> Command {
        let (record, register) = (self.record(term), self.register.as_ref());
        let register = register.map(|(place, _)| place.clone());
        let control = Control { record, seat, incarnation, register };
        command.env(CONTROL, serde_json::to_string(&control).expect("it has a JSON form"));
        command
    }
}

fn not_supervised(error: io::Error) -> Error {
    let reason = format!("cannot be supervised: {error}");
    Error::Process { rank: Rank(0), reason, code: None }
}

struct Supervisor {
    coordinator: Coordinator,
    office: Office,
    children: Children,
    heard: Receiver<Heard>,
    tell: Sender<Heard>,
    /// By seat: the process it leads to, and the connection.
    sockets: BTreeMap<Seat, (u64, TcpStream)>,
    failures: Vec<Ended>,
    /// How processes said that they would end.
    leaving: BTreeMap<(Seat, u64), (i32, String)>,
    /// What was lost before the last meeting.
    losses: Vec<Loss>,
    term: u64,
    begin: Instant,
}

/// The host of the coordinator.
const OWN_HOST: u32 = 0;

impl Supervisor {
    fn new(
        coordinator: fn(Policy, u64, Seconds) -> Coordinator,
        office: Office,
        policy: Policy,
        term: u64,
    ) -> Result<Self, Error> {
        let (tell, heard) = mpsc::channel();
        let (ended, seats) = (tell.clone(), (policy.ranks, policy.seats_per_host));
        let ended = move |end| drop(ended.send(Heard::Ended(end)));
        let children = Children::none(seats, office.secret.clone(), ended);
        Ok(Self {
            coordinator: coordinator(office.policy(policy), term, Seconds::ZERO),
            children: children.map_err(not_supervised)?,
            office,
            heard,
            tell,
            sockets: BTreeMap::new(),
            failures: vec![],
            leaving: BTreeMap::new(),
            losses: vec![],
            term,
            begin: Instant::now(),
        })
    }

    fn run(mut self, command: &dyn Fn() -> Command) -> Result<(), Error> {
        let (term, tell) = (self.term, self.tell.clone());
        if let Some((_, register)) = self.office.register.clone() {
            let tell = tell.clone();
            std::thread::spawn(move || confirm(&register, term, &tell));
        }
        let listener = self.office.listener.try_clone().map_err(not_supervised)?;
        let secret = self.office.secret.reveal().to_owned();
        std::thread::spawn(move || accept(&listener, &secret, &tell));
        let mut event = Some(Event::Joined { host: OWN_HOST });
        let verdict = loop {
            let now = Seconds(self.begin.elapsed().as_secs_f64());
            let actions = event.map(|event| self.coordinator.hear(now, event)).unwrap_or_default();
            if actions.iter().any(|action| matches!(action, Action::Meet { .. })) {
                self.losses = self.name_losses();
            }
            for action in actions {
                self.act(action, command)?;
            }
            if let Some(verdict) = self.coordinator.verdict() {
                break verdict;
            }
            event = match self.heard.recv_timeout(TICK) {
                Err(RecvTimeoutError::Timeout) => Some(Event::Tick),
                Err(RecvTimeoutError::Disconnected) => unreachable!("it has a sender itself"),
                Ok(heard) => self.note(heard),
            };
        };
        if verdict == Verdict::Superseded {
            self.children.release();
            return Err(Error::Superseded { place: self.office.place(), term });
        }
        if let Some((_, register)) = &self.office.register {
            // If it cannot be written, whoever stands by finds the ranks gone.
            drop(register.take(&Record { address: None, ..self.office.record(term + 1) }));
        }
        self.see_off(verdict)
    }

    /// What was heard, as an event.
    fn note(&mut self, heard: Heard) -> Option<Event> {
        match heard {
            Heard::Event(event) => Some(event),
            Heard::Superseded => Some(Event::Superseded),
            Heard::Confirmed(at) => {
                let asked = Seconds(at.duration_since(self.begin).as_secs_f64());
                Some(Event::Confirmed { asked })
            }
            Heard::Connected(seat, incarnation, process, socket) => {
                self.children.adopt(seat, incarnation, process);
                self.sockets.insert(seat, (incarnation, socket));
                None
            }
            Heard::Leaving(seat, incarnation, said) => {
                self.leaving.insert((seat, incarnation), said);
                None
            }
            Heard::Ended(mut ended) => {
                let Ended { seat, incarnation, .. } = ended;
                // Of a process that somebody else started only its own word is known.
                if let Some((code, words)) = self.leaving.remove(&(seat, incarnation))
                    && self.children.is_adopted(seat, incarnation)
                {
                    (ended.code, ended.reason) = (Some(code), words);
                }
                let end = match ended.code {
                    Some(0) => End::Completed,
                    Some(_) => End::Failed,
                    None => End::Lost,
                };
                self.failures.extend((end != End::Completed).then_some(ended));
                Some(Event::Ended { seat, incarnation, end })
            }
        }
    }

    fn act(&mut self, action: Action, command: &dyn Fn() -> Command) -> Result<(), Error> {
        match action {
            Action::Start { seat, incarnation } => {
                let command = self.office.invite(command(), self.term, (seat, incarnation));
                return self.children.start(seat, incarnation, command);
            }
            Action::Kill { seat, incarnation } => self.children.kill(seat, incarnation),
            Action::Call { seat, incarnation } => self.tell(seat, incarnation, Answer::Called),
            Action::Meet { seat, incarnation, rank, ranks, generation, master } => {
                let (furthest, losses) = (self.coordinator.furthest(), self.losses.clone());
                let meeting = Meeting { generation, rank, ranks, master, furthest, losses };
                self.tell(seat, incarnation, Answer::Meet(meeting));
            }
            Action::Grant { seat, incarnation, asked } => {
                let asked = (1e3 * asked.0).round() as u64;
                self.tell(seat, incarnation, Answer::Granted { asked });
            }
            Action::Finish(_) => {}
        }
        Ok(())
    }

    /// Who was lost since the last meeting, and how they ended.
    fn name_losses(&mut self) -> Vec<Loss> {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let name = |Lost { rank, seat, incarnation, silence, killed }| {
            let is_it = |ended: &&Ended| (ended.seat, ended.incarnation) == (seat, incarnation);
            let ended = self.failures.iter().find(is_it).map(|ended| ended.reason.clone());
            let cause = match killed {
                true => format!("killed, since it said nothing for {silence}"),
                false => ended.unwrap_or_default(),
            };
            Loss { rank, host: host.trim().to_owned(), cause, detection_s: silence }
        };
        self.coordinator.take_lost().into_iter().map(name).collect()
    }

    fn tell(&mut self, seat: Seat, incarnation: u64, answer: Answer) {
        if let Some((of, socket)) = self.sockets.get_mut(&seat)
            && *of == incarnation
        {
            // Who cannot be told any more is about to be missed.
            drop(say(socket, answer));
        }
    }

    /// The end: who waits for the others is told that they do not come, and the cause is found.
    fn see_off(&mut self, verdict: Verdict) -> Result<(), Error> {
        let lost = match verdict {
            Verdict::Completed => return Ok(()),
            Verdict::Failed(_) | Verdict::Superseded => None,
            Verdict::GaveUp(seat) => Some(seat),
        };
        let times = lost.map_or(0, |seat| self.coordinator.losses(seat));
        for (_, socket) in self.sockets.values() {
            drop(socket.shutdown(std::net::Shutdown::Both));
        }
        let deadline = Instant::now() + FAREWELL;
        while self.children.any_left()
            && let Ok(heard) =
                self.heard.recv_timeout(deadline.saturating_duration_since(Instant::now()))
        {
            self.note(heard);
        }
        // A rank that lost another ends with 1; what ended otherwise is the cause.
        let last = self.failures.iter().rev().find(|ended| Some(ended.seat) == lost);
        let other = self.failures.iter().find(|ended| ended.code.is_some_and(|code| code != 1));
        let cause = last.or(other).or(self.failures.first()).cloned();
        let Some(Ended { seat, reason, code, .. }) = cause else {
            unreachable!("a run fails because of a rank that ended")
        };
        let rank = Rank(seat.0);
        if times > 1 {
            return Err(Error::CrashLoop { rank, times, reason });
        }
        Err(Error::Process { rank, reason, code })
    }
}

/// Looks again and again whether another has taken over, until one has.
fn confirm(register: &Register, term: u64, tell: &Sender<Heard>) {
    loop {
        let asked = Instant::now();
        let heard = match register.newest() {
            Ok(Some(record)) if record.term > term => Heard::Superseded,
            Ok(Some(_)) => Heard::Confirmed(asked),
            // Perhaps the next time.
            Ok(None) | Err(_) => {
                std::thread::sleep(CONFIRM);
                continue;
            }
        };
        let last = matches!(heard, Heard::Superseded);
        if tell.send(heard).is_err() || last {
            return;
        }
        std::thread::sleep(CONFIRM);
    }
}

/// Hears everyone who connects and knows the secret.
fn accept(listener: &TcpListener, secret: &str, tell: &Sender<Heard>) {
    for socket in listener.incoming().flatten() {
        let (secret, tell) = (secret.to_owned(), tell.clone());
        std::thread::spawn(move || listen(socket, &secret, &tell));
    }
}

/// Passes on what a rank says, as long as it does; answers others that it is there.
fn listen(socket: TcpStream, secret: &str, tell: &Sender<Heard>) {
    let (Ok(mut writer), _) = (socket.try_clone(), socket.set_nodelay(true)) else { return };
    let mut reader = BufReader::new(socket);
    let Some(Word::Hello { seat, incarnation, process, secret: said }) = hear(&mut reader) else {
        return;
    };
    if said != secret {
        return;
    }
    let Some(seat) = seat else {
        while let Some(Word::Alive { asked, .. }) = hear(&mut reader)
            && say(&mut writer, Answer::Granted { asked }).is_ok()
        {}
        return;
    };
    if tell.send(Heard::Connected(seat, incarnation, process, writer)).is_err() {
        return;
    }
    while let Some(word) = hear(&mut reader) {
        let heard = match word {
            Word::Hello { .. } => return,
            Word::Alive { step, asked } => {
                let asked = Seconds(asked as f64 * 1e-3);
                Heard::Event(Event::Alive { seat, incarnation, step, asked })
            }
            Word::Ready { address, step } => {
                Heard::Event(Event::Ready { seat, incarnation, address, step })
            }
            Word::Leaving { code, words } => Heard::Leaving(seat, incarnation, (code, words)),
        };
        if tell.send(heard).is_err() {
            return;
        }
    }
}
