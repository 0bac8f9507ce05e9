//! The coordinator at work, on the processes of this host and, through their agents, of others.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufReader};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use transport::Secret;
use units::{Rank, Seconds};

use super::lifeline::{self, hear, say};
use super::{
    Action, Answer, Control, Coordinator, End, Event, FENCE, LEASE, Loss, Lost, Meeting, Policy,
    Record, Register, Seat, Verdict, Word, host_name,
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
    /// What it said last was said before.
    Closed(Seat, u64),
    /// A host is there, perhaps again, and is spoken to so; or gone. Connections have numbers.
    Joined(u64, Option<u32>, Agent),
    /// It says that it is there.
    Nodded(u64),
    Departed(u64),
    Event(Event),
    /// A process says with which exit code it is about to end, and why.
    Leaving(Seat, u64, (i32, String)),
    Ended(Ended),
    /// Nobody had taken over at that time; or somebody has.
    Confirmed(Instant),
    Superseded,
}

/// Where a run is coordinated from.
#[derive(Debug, Clone, Copy, Default)]
pub struct Place<'a> {
    /// Where that is written, as [`Register::at`] has it, so that others can take over.
    pub register: Option<&'a str>,
    /// Where other hosts reach this one, and by which secret, so that they can join.
    pub listen: Option<(SocketAddr, &'a Secret)>,
}

/// Keeps the processes of a run going: starts by `command` those that are lost anew, here or on hosts
/// that have joined, and lets the others meet them. `tell` is told where hosts can join.
///
/// # Errors
/// The first failure, with the failed rank's own last words; [`Error::Coordinated`] when somebody
/// coordinates there already.
pub fn supervise(
    policy: Policy,
    place: Place<'_>,
    command: impl Fn() -> Command,
    tell: impl Fn(SocketAddr),
) -> Result<(), Error> {
    let office = Office::new(place)?;
    if office.is_open {
        tell(office.address);
    }
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
    let mut office = Office::new(Place { register: Some(register), listen: None })?;
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
    /// Whether hosts can join.
    is_open: bool,
    register: Option<(String, Register)>,
}

impl Office {
    fn new(Place { register, listen }: Place<'_>) -> Result<Self, Error> {
        let here = listen.map_or((Ipv4Addr::LOCALHOST, 0).into(), |(address, _)| address);
        let listener = TcpListener::bind(here).map_err(not_supervised)?;
        let address = listener.local_addr().map_err(not_supervised)?;
        let secret = listen.map_or_else(Secret::random, |(_, secret)| Ok(secret.clone()));
        let secret = secret.map_err(|error| not_supervised(io::Error::other(error)))?;
        let is_open = listen.is_some();
        let register = register.map(|place| Ok((place.to_owned(), Register::at(place)?)));
        let register = register.transpose().map_err(not_supervised)?;
        Ok(Self { listener, address, secret, is_open, register })
    }

    /// What the coordinator goes by: where nobody can take over, nobody need make sure; and here it is
    /// seen when processes end.
    fn policy(&self, policy: Policy) -> Policy {
        let time = |limit: Duration, limited| {
            Seconds(if limited { limit.as_secs_f64() } else { f64::INFINITY })
        };
        let lease = time(LEASE, self.register.is_some());
        Policy { lease, fence: time(FENCE, self.is_fenced()), ..policy }
    }

    fn is_fenced(&self) -> bool {
        self.register.is_some() || self.is_open
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

    /// What a process is told of its coordinator.
    fn invitation(&self, term: u64, seat: Seat, incarnation: u64, ranks_per_host: u32) -> Control {
        let register = self.register.as_ref().map(|(place, _)| place.clone());
        let (record, fenced) = (self.record(term), self.is_fenced());
        Control { record, seat, incarnation, register, fenced, ranks_per_host }
    }
}

fn not_supervised(error: io::Error) -> Error {
    let reason = format!("cannot be supervised: {error}");
    Error::Process { rank: Rank(0), reason, code: None }
}

/// Whoever starts processes on another host.
struct Agent {
    name: String,
    socket: TcpStream,
}

struct Supervisor {
    coordinator: Coordinator,
    seats_per_host: u32,
    /// By host: the number of the connection to its agent, and the agent.
    agents: BTreeMap<u32, (u64, Agent)>,
    /// Processes whose connection has ended.
    closed: BTreeSet<(Seat, u64)>,
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
            seats_per_host: policy.seats_per_host,
            agents: BTreeMap::new(),
            closed: BTreeSet::new(),
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
        let secret = self.office.secret.clone();
        std::thread::spawn(move || accept(&listener, &secret, &tell));
        let mut events = vec![Event::Joined { host: OWN_HOST }];
        let verdict = loop {
            let now = Seconds(self.begin.elapsed().as_secs_f64());
            let hear = |event| self.coordinator.hear(now, event);
            let actions: Vec<Action> = events.into_iter().flat_map(hear).collect();
            if actions.iter().any(|action| matches!(action, Action::Meet { .. })) {
                self.losses = self.name_losses();
            }
            for action in actions {
                self.act(action, command)?;
            }
            if let Some(verdict) = self.coordinator.verdict() {
                break verdict;
            }
            events = match self.heard.recv_timeout(TICK) {
                Err(RecvTimeoutError::Timeout) => vec![Event::Tick],
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

    /// What was heard, as events.
    fn note(&mut self, heard: Heard) -> Vec<Event> {
        match heard {
            Heard::Event(event) => vec![event],
            Heard::Superseded => vec![Event::Superseded],
            Heard::Confirmed(at) => {
                let asked = Seconds(at.duration_since(self.begin).as_secs_f64());
                vec![Event::Confirmed { asked }]
            }
            Heard::Connected(seat, incarnation, process, socket) => {
                if self.host(seat) == OWN_HOST {
                    self.children.adopt(seat, incarnation, process);
                }
                self.closed.remove(&(seat, incarnation));
                self.sockets.insert(seat, (incarnation, socket));
                vec![]
            }
            Heard::Closed(seat, incarnation) => {
                self.closed.insert((seat, incarnation));
                self.unseen(self.host(seat))
            }
            Heard::Leaving(seat, incarnation, said) => {
                self.leaving.insert((seat, incarnation), said);
                vec![]
            }
            Heard::Joined(connection, host, agent) => {
                let free = |host: &u32| !self.agents.contains_key(host);
                let new =
                    || (OWN_HOST + 1..).find(free).expect("there are fewer hosts than numbers");
                // What is left of an older connection is not heard any more.
                let host = host.filter(|host| *host != OWN_HOST).unwrap_or_else(new);
                self.agents.insert(host, (connection, agent));
                vec![Event::Joined { host }]
            }
            Heard::Nodded(connection) => {
                let nodded = self.agents.iter().find(|(_, (of, _))| *of == connection);
                if let Some(host) = nodded.map(|(host, _)| *host) {
                    self.order(host, Answer::Granted { asked: 0 });
                }
                vec![]
            }
            Heard::Departed(connection) => {
                let left = self.agents.iter().find(|(_, (of, _))| *of == connection);
                let Some(host) = left.map(|(host, _)| *host) else { return vec![] };
                self.agents.remove(&host);
                let mut events = vec![Event::Departed { host }];
                events.extend(self.unseen(host));
                events
            }
            Heard::Ended(mut ended) => {
                let Ended { seat, incarnation, .. } = ended;
                // Of a process that somebody else started only its own word is known.
                if let Some((code, words)) = self.leaving.remove(&(seat, incarnation))
                    && self.children.is_adopted(seat, incarnation)
                {
                    (ended.code, ended.reason) = (Some(code), words);
                }
                vec![self.ended(ended)]
            }
        }
    }

    fn ended(&mut self, ended: Ended) -> Event {
        let Ended { seat, incarnation, code, .. } = ended;
        let end = match code {
            Some(0) => End::Completed,
            Some(_) => End::Failed,
            None => End::Lost,
        };
        self.failures.extend((end != End::Completed).then_some(ended));
        Event::Ended { seat, incarnation, end }
    }

    fn host(&self, seat: Seat) -> u32 {
        seat.0 / self.seats_per_host
    }

    /// Of a host that is gone nobody sees processes end; but those have ended whose connections have.
    fn unseen(&mut self, host: u32) -> Vec<Event> {
        if host == OWN_HOST || self.agents.contains_key(&host) {
            return vec![];
        }
        let here = |(seat, _): &(Seat, u64)| seat.0 / self.seats_per_host == host;
        let ended: Vec<(Seat, u64)> = self.closed.iter().copied().filter(here).collect();
        let end = |(seat, incarnation)| {
            self.closed.remove(&(seat, incarnation));
            self.sockets.remove(&seat);
            let said = self.leaving.remove(&(seat, incarnation));
            let unsaid = || (None, "its host is gone".to_owned());
            let (code, reason) = said.map_or_else(unsaid, |(code, words)| (Some(code), words));
            self.ended(Ended { seat, incarnation, reason, code })
        };
        ended.into_iter().map(end).collect()
    }

    fn act(&mut self, action: Action, command: &dyn Fn() -> Command) -> Result<(), Error> {
        match action {
            Action::Start { seat, incarnation } => {
                let (term, per_host) = (self.term, self.seats_per_host);
                let mut control = self.office.invitation(term, seat, incarnation, per_host);
                if self.host(seat) == OWN_HOST {
                    return self.children.start(seat, incarnation, control.told_to(command()));
                }
                // It is known there.
                control.record.secret.clear();
                self.order(self.host(seat), Answer::Start(control));
            }
            Action::Kill { seat, incarnation } if self.host(seat) == OWN_HOST => {
                self.children.kill(seat, incarnation);
            }
            Action::Kill { seat, incarnation } => {
                self.order(self.host(seat), Answer::Kill { seat, incarnation });
            }
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

    /// Tells whoever starts processes on a host.
    fn order(&mut self, host: u32, answer: Answer) {
        if let Some((_, agent)) = self.agents.get_mut(&host) {
            // Who cannot be told any more is about to be missed.
            drop(say(&mut agent.socket, answer));
        }
    }

    /// Who was lost since the last meeting, and how they ended.
    fn name_losses(&mut self) -> Vec<Loss> {
        let (own, lost) = (host_name(), self.coordinator.take_lost());
        let name = |Lost { rank, seat, incarnation, silence, killed }| {
            let is_it = |ended: &&Ended| (ended.seat, ended.incarnation) == (seat, incarnation);
            let ended = self.failures.iter().find(is_it).map(|ended| ended.reason.clone());
            let cause = match killed {
                true => format!("killed, since it said nothing for {silence}"),
                false => ended.unwrap_or_default(),
            };
            let host = self.agents.get(&self.host(seat)).map(|(_, agent)| agent.name.clone());
            let gone = || format!("host {}", self.host(seat));
            let elsewhere = || if self.host(seat) == OWN_HOST { own.clone() } else { gone() };
            let host = host.unwrap_or_else(elsewhere);
            Loss { rank, host, cause, detection_s: silence }
        };
        lost.into_iter().map(name).collect()
    }

    /// Tells all hosts that the run is over, and why it failed, if it did.
    fn dismiss(&mut self, failure: Option<&str>) {
        let hosts: Vec<u32> = self.agents.keys().copied().collect();
        for host in hosts {
            self.order(host, Answer::Over { failure: failure.map(str::to_owned) });
        }
        let deadline = Instant::now() + FAREWELL;
        while !self.agents.is_empty()
            && let Ok(heard) =
                self.heard.recv_timeout(deadline.saturating_duration_since(Instant::now()))
        {
            self.note(heard);
        }
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
            Verdict::Completed => {
                self.dismiss(None);
                return Ok(());
            }
            Verdict::Failed(_) | Verdict::Superseded => None,
            Verdict::GaveUp(seat) => Some(seat),
        };
        let times = lost.map_or(0, |seat| self.coordinator.losses(seat));
        for (_, socket) in self.sockets.values() {
            drop(socket.shutdown(std::net::Shutdown::Both));
        }
        let deadline = Instant::now() + FAREWELL;
        let all_ended = |this: &Self| {
            let is_closed = |(seat, (incarnation, _)): (&Seat, &(u64, _))| {
                this.closed.contains(&(*seat, *incarnation))
            };
            !this.children.any_left() && this.sockets.iter().all(is_closed)
        };
        while !all_ended(self)
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
        self.dismiss(Some(&reason));
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
fn accept(listener: &TcpListener, secret: &Secret, tell: &Sender<Heard>) {
    for (connection, socket) in (0..).zip(listener.incoming().flatten()) {
        let (secret, tell) = (secret.clone(), tell.clone());
        std::thread::spawn(move || {
            if transport::demand_proof(&socket, &secret, Instant::now() + lifeline::FIRST).is_ok() {
                listen(socket, connection, &tell);
            }
        });
    }
}

/// Passes on what a process or a host says, as long as it does; answers others that it is there.
fn listen(socket: TcpStream, connection: u64, tell: &Sender<Heard>) {
    let (Ok(mut writer), _) = (socket.try_clone(), socket.set_nodelay(true)) else { return };
    let mut reader = BufReader::new(socket);
    match hear(&mut reader) {
        Some(Word::Hello { seat: Some(seat), incarnation, process }) => {
            drop(tell.send(Heard::Connected(seat, incarnation, process, writer)));
            hear_process(&mut reader, (seat, incarnation), tell);
            drop(tell.send(Heard::Closed(seat, incarnation)));
        }
        Some(Word::Hello { seat: None, .. }) => {
            while let Some(Word::Alive { asked, .. }) = hear(&mut reader)
                && say(&mut writer, Answer::Granted { asked }).is_ok()
            {}
        }
        Some(Word::Join { host, name }) => {
            drop(tell.send(Heard::Joined(connection, host, Agent { name, socket: writer })));
            hear_host(reader, connection, tell);
            drop(tell.send(Heard::Departed(connection)));
        }
        _ => {}
    }
}

fn hear_process(
    reader: &mut BufReader<TcpStream>,
    (seat, incarnation): (Seat, u64),
    tell: &Sender<Heard>,
) {
    while let Some(word) = hear(reader) {
        let heard = match word {
            Word::Hello { .. } | Word::Join { .. } | Word::Ended { .. } => return,
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

/// A host that says nothing for as long as its processes live without being granted more is gone.
fn hear_host(mut reader: BufReader<TcpStream>, connection: u64, tell: &Sender<Heard>) {
    drop(reader.get_ref().set_read_timeout(Some(FENCE)));
    loop {
        let heard = match hear(&mut reader) {
            Some(Word::Alive { .. }) => Heard::Nodded(connection),
            Some(Word::Ended { seat, incarnation, code, words: reason }) => {
                Heard::Ended(Ended { seat, incarnation, reason, code })
            }
            _ => return,
        };
        if tell.send(heard).is_err() {
            return;
        }
    }
}
