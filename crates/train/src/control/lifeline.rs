//! A rank's connection to the coordinator: says that it lives, hears how long it may go on and where
//! to begin anew, and turns to the next coordinator when that one is lost.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::process::{Signal, getpid, kill_process};
use serde::Serialize;
use serde::de::DeserializeOwned;
use transport::Secret;

use super::{Answer, CONTROL, Control, FENCE, LINE_LIMIT, Meeting, Record, Register, Seat, Word};

/// How often a rank says that it lives.
pub(super) const HEARTBEAT: Duration = Duration::from_millis(500);
/// How often a rank whose coordinator is lost looks for another.
const LOOK: Duration = Duration::from_millis(50);
/// The most characters of its last words that a process passes on.
const WORDS: usize = 1000;
/// How long a coordinator may take to answer when somebody turns to it.
const LIMIT: Duration = Duration::from_secs(1);
/// And when a process has just started, as many may at once on a busy host.
pub(super) const FIRST: Duration = Duration::from_secs(30);

/// The connection. When it breaks and nobody takes over, the run saves and stops.
pub struct Lifeline {
    shared: Arc<Shared>,
    meetings: Receiver<Meeting>,
}

/// What the threads of a lifeline share.
struct Shared {
    seat: Seat,
    incarnation: u64,
    begin: Instant,
    step: AtomicU64,
    /// Until when this process may go on, in milliseconds since its beginning.
    granted: AtomicU64,
    ranks_per_host: u32,
    /// Set when the ranks are called together, since there could be more of them.
    called: Arc<AtomicBool>,
    link: Mutex<Link>,
}

/// The way to the coordinator of the moment.
struct Link {
    socket: TcpStream,
    /// What a new coordinator must hear too: that this rank waits for the others.
    ready: Option<Word>,
}

impl Lifeline {
    /// Connects to the coordinator that the environment names, if it names one. When that is lost
    /// and nobody takes over, sets `stop`; when time is up, ends this process as if it were killed.
    ///
    /// # Errors
    /// When it cannot be reached.
    pub fn connect(
        environment: &dyn Fn(&str) -> Option<String>,
        stop: Arc<AtomicBool>,
    ) -> io::Result<Option<Self>> {
        let Some(text) = environment(CONTROL) else { return Ok(None) };
        let control: Control = serde_json::from_str(&text)?;
        let Control { record, seat, incarnation, register, fenced, ranks_per_host } = control;
        let register = register.as_deref().map(Register::at).transpose()?;
        let fence = if fenced { FENCE.as_millis() as u64 } else { u64::MAX };
        let socket = greet(&record, Some((seat, incarnation)), FIRST)?;
        let reader = socket.try_clone()?;
        let link = Mutex::new(Link { socket, ready: None });
        let (step, granted) = (AtomicU64::new(0), AtomicU64::new(fence));
        let (begin, called) = (Instant::now(), Arc::default());
        let shared = Arc::new(Shared {
            seat,
            incarnation,
            begin,
            step,
            granted,
            ranks_per_host,
            called,
            link,
        });
        let (meet, meetings) = mpsc::channel();
        let tending = Arc::clone(&shared);
        std::thread::spawn(move || {
            tending.tend(reader, record.term, register.as_ref(), &meet);
            stop.store(true, Ordering::Relaxed);
            let newest = register.map(|register| register.newest());
            let over = matches!(newest, Some(Ok(Some(Record { address: None, .. }))));
            if fenced && !over {
                // Not over: there may be another coordinator that does not find this process.
                while tending.may_go_on() {
                    std::thread::sleep(LOOK);
                }
                // Nothing keeps a process from this.
                let _ = kill_process(getpid(), Signal::KILL);
            }
            // Whoever waits for a meeting waits in vain.
            drop(meet);
        });
        Ok(Some(Self { shared, meetings }))
    }

    /// The seat of this process.
    #[must_use]
    pub fn seat(&self) -> Seat {
        self.shared.seat
    }

    /// How many ranks each host has, so that ranks so far apart are on different ones.
    #[must_use]
    pub fn ranks_per_host(&self) -> u32 {
        self.shared.ranks_per_host
    }

    /// The number of this process among those of its seat, from 0.
    #[must_use]
    pub fn incarnation(&self) -> u64 {
        self.shared.incarnation
    }

    /// Whether this process takes the place of one that was lost.
    #[must_use]
    pub fn is_replacement(&self) -> bool {
        super::is_replacement(self.shared.incarnation)
    }

    /// Whether this process may still change what others see: not once its coordinator has been
    /// silent for so long that another may have started a process in its place.
    #[must_use]
    pub fn permission(&self) -> Arc<dyn Fn() -> bool + Send + Sync> {
        let shared = Arc::clone(&self.shared);
        Arc::new(move || shared.may_go_on())
    }

    /// Set when this rank is to leave its generation after the step at hand, as all are: there could be
    /// more ranks.
    #[must_use]
    pub fn called(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.shared.called)
    }

    /// Tells of a step that is done.
    pub fn done(&self, step: u64) {
        self.shared.step.store(step, Ordering::Relaxed);
    }

    /// Says that this process is ready to meet the others, and waits for when and where; rank 0 then
    /// uses the listener.
    ///
    /// # Errors
    /// When the coordinator is gone.
    pub fn ready(&self) -> io::Result<(Meeting, TcpListener)> {
        // Of meetings that this rank was called to before, nothing came.
        self.meetings.try_iter().for_each(drop);
        let interface = self.shared.lock().socket.local_addr()?.ip();
        let listener = TcpListener::bind((interface, 0))?;
        let (address, step) = (listener.local_addr()?, self.shared.step.load(Ordering::Relaxed));
        self.shared.say_to_all(Word::Ready { address, step });
        let gone = |_| io::Error::from(io::ErrorKind::ConnectionAborted);
        let meeting = self.meetings.recv().map_err(gone)?;
        self.shared.lock().ready = None;
        Ok((meeting, listener))
    }

    /// Says how this process is about to end, for coordinators that did not start it.
    pub fn leave(&self, code: i32, words: &str) {
        let words = words.chars().take(WORDS).collect();
        self.shared.say(Word::Leaving { code, words });
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Link> {
        self.link.lock().expect("nothing panics while it holds the link")
    }

    /// Milliseconds since the beginning.
    fn clock(&self) -> u64 {
        self.begin.elapsed().as_millis() as u64
    }

    fn may_go_on(&self) -> bool {
        self.clock() < self.granted.load(Ordering::Relaxed)
    }

    /// Says something to the coordinator of the moment, which may be lost.
    fn say(&self, word: Word) -> bool {
        say(&mut self.lock().socket, word).is_ok()
    }

    /// Says what the next coordinator is to hear too.
    fn say_to_all(&self, ready: Word) {
        let mut link = self.lock();
        // Whoever does not hear it now hears it from the next connection, if there is any.
        drop(say(&mut link.socket, &ready));
        link.ready = Some(ready);
    }

    /// Talks to one coordinator after the other, as long as there is one.
    fn tend(
        self: &Arc<Self>,
        mut reader: TcpStream,
        mut term: u64,
        register: Option<&Register>,
        meet: &Sender<Meeting>,
    ) {
        loop {
            self.talk(reader, meet, register.is_some());
            let Some(register) = register else { return };
            let Some(next) = self.find(register, term) else { return };
            (term, reader) = next;
        }
    }

    /// Says that it lives, until the coordinator is lost: at once when the connection breaks, and,
    /// if there may be another, when nothing has been granted for long.
    fn talk(self: &Arc<Self>, reader: TcpStream, meet: &Sender<Meeting>, replaceable: bool) {
        let (alive, ended) = mpsc::channel::<()>();
        let (shared, meet) = (Arc::clone(self), meet.clone());
        std::thread::spawn(move || {
            let _alive = alive;
            shared.listen(reader, &meet);
        });
        let patience = FENCE.mul_f64(0.75).as_millis() as u64;
        loop {
            let asked = self.clock();
            let granted = self.granted.load(Ordering::Relaxed);
            let silent = if replaceable { asked + patience > granted } else { asked > granted };
            let step = self.step.load(Ordering::Relaxed);
            if silent || !self.say(Word::Alive { step, asked }) {
                return self.lock().socket.shutdown(Shutdown::Both).unwrap_or_default();
            }
            if ended.recv_timeout(HEARTBEAT) == Err(RecvTimeoutError::Disconnected) {
                return;
            }
        }
    }

    fn listen(&self, reader: TcpStream, meet: &Sender<Meeting>) {
        for line in BufReader::new(reader).lines() {
            let heard = line.ok().and_then(|line| serde_json::from_str(&line).ok());
            match heard {
                Some(Answer::Granted { asked }) => {
                    let until = asked.saturating_add(FENCE.as_millis() as u64);
                    self.granted.fetch_max(until, Ordering::Relaxed);
                }
                Some(Answer::Called) => self.called.store(true, Ordering::Relaxed),
                Some(Answer::Meet(meeting)) => {
                    self.called.store(false, Ordering::Relaxed);
                    // Nobody listens once the run is done.
                    drop(meet.send(meeting));
                }
                // Those are for hosts.
                Some(Answer::Start(_) | Answer::Kill { .. } | Answer::Over { .. }) => {}
                None => return,
            }
        }
    }

    /// The coordinator of the newest term, which may be the same as before if that can be reached
    /// again; looked for as long as there will be time to save afterwards.
    fn find(&self, register: &Register, term: u64) -> Option<(u64, TcpStream)> {
        let needed = FENCE.as_millis() as u64 / 2;
        while self.clock() + needed < self.granted.load(Ordering::Relaxed) {
            // What cannot be read now may be later.
            if let Ok(Some(record)) = register.newest() {
                record.address?;
                if record.term >= term
                    && let Ok(reader) = self.turn_to(&record)
                {
                    return Some((record.term, reader));
                }
            }
            std::thread::sleep(LOOK);
        }
        None
    }

    fn turn_to(&self, record: &Record) -> io::Result<TcpStream> {
        let mut socket = greet(record, Some((self.seat, self.incarnation)), LIMIT)?;
        let reader = socket.try_clone()?;
        let mut link = self.lock();
        if let Some(ready) = &link.ready {
            say(&mut socket, ready)?;
        }
        link.socket = socket;
        Ok(reader)
    }
}

/// Connects to a coordinator and says who this is: a process of a seat, or somebody who only watches.
fn greet(record: &Record, who: Option<(Seat, u64)>, limit: Duration) -> io::Result<TcpStream> {
    let mut socket = prove(record, limit)?;
    let (seat, incarnation) = who.unzip();
    let incarnation = incarnation.unwrap_or_default();
    say(&mut socket, Word::Hello { seat, incarnation, process: std::process::id() })?;
    Ok(socket)
}

/// Connects to a coordinator; both prove to know the run's secret.
pub(super) fn prove(record: &Record, limit: Duration) -> io::Result<TcpStream> {
    let nowhere = || io::Error::from(io::ErrorKind::NotFound);
    let address = record.address.ok_or_else(nowhere)?;
    let secret = Secret::new(&record.secret).ok_or_else(nowhere)?;
    let socket = TcpStream::connect_timeout(&address, limit)?;
    socket.set_nodelay(true)?;
    transport::prove(&socket, &secret, Instant::now() + limit)?;
    socket.set_read_timeout(None)?;
    socket.set_write_timeout(None)?;
    Ok(socket)
}

/// Waits until a coordinator is lost: it has ended, or says nothing for `silence`.
pub(super) fn watch(record: &Record, silence: Duration) {
    // Whoever cannot be reached is lost.
    drop(listen_to(record, silence));
}

/// Whether a coordinator answers.
pub(super) fn answers(record: &Record) -> bool {
    greet(record, None, LIMIT).and_then(|mut socket| ask(&mut socket, LIMIT)).is_ok()
}

fn listen_to(record: &Record, silence: Duration) -> io::Result<()> {
    let mut socket = greet(record, None, silence)?;
    loop {
        ask(&mut socket, silence)?;
        std::thread::sleep(HEARTBEAT);
    }
}

/// Hears whether it is there.
fn ask(socket: &mut TcpStream, limit: Duration) -> io::Result<()> {
    socket.set_read_timeout(Some(limit))?;
    say(socket, Word::Alive { step: 0, asked: 0 })?;
    let mut line = String::new();
    BufReader::new(&*socket).take(LINE_LIMIT).read_line(&mut line)?;
    let answer: Answer = serde_json::from_str(&line)?;
    if answer == (Answer::Granted { asked: 0 }) { Ok(()) } else { Err(io::ErrorKind::Other.into()) }
}

/// Says a line.
pub(super) fn say(socket: &mut TcpStream, word: impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(&word)?;
    line.push(b'\n');
    socket.write_all(&line)
}

/// Hears a line; `None` at the end, or when what is said is no word.
pub(super) fn hear<T: DeserializeOwned>(reader: &mut BufReader<TcpStream>) -> Option<T> {
    let mut line = String::new();
    reader.take(LINE_LIMIT).read_line(&mut line).ok()?;
    serde_json::from_str(&line).ok()
}
