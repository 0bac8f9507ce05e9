//! A rank's connection to the coordinator: says that it lives, and hears where to begin anew.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use units::Rank;

use super::{CONTROL, LINE_LIMIT, Word};

/// How often a rank says that it lives.
const HEARTBEAT: Duration = Duration::from_millis(500);

/// Where and when the ranks of a generation meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meeting {
    /// The number of the meeting; each is higher than all before.
    pub generation: u64,
    /// Where rank 0 listens.
    pub master: SocketAddr,
}

/// The connection. When it breaks, the run has lost its launcher: it saves and stops.
pub struct Lifeline {
    socket: Arc<Mutex<TcpStream>>,
    meetings: Receiver<Meeting>,
    step: Arc<AtomicU64>,
    incarnation: u64,
}

impl Lifeline {
    /// Connects to the coordinator that the environment names, if it names one; sets `stop` when
    /// the coordinator is gone.
    ///
    /// # Errors
    /// When it cannot be reached.
    pub fn connect(
        environment: &dyn Fn(&str) -> Option<String>,
        rank: Rank,
        stop: Arc<AtomicBool>,
    ) -> io::Result<Option<Self>> {
        let Some(text) = environment(CONTROL) else { return Ok(None) };
        let (address, secret, incarnation) = parse(&text).ok_or(io::ErrorKind::InvalidInput)?;
        let mut socket = TcpStream::connect(address)?;
        socket.set_nodelay(true)?;
        say(&mut socket, Word::Hello { rank, incarnation, secret })?;
        let reader = BufReader::new(socket.try_clone()?);
        let (meet, meetings) = mpsc::channel();
        std::thread::spawn(move || {
            for line in reader.lines() {
                let heard = line.ok().and_then(|line| serde_json::from_str(&line).ok());
                let Some(meeting) = heard else { break };
                // Nobody listens once the run is done.
                let _ = meet.send(meeting);
            }
            stop.store(true, Ordering::Relaxed);
        });
        let (socket, step) = (Arc::new(Mutex::new(socket)), Arc::new(AtomicU64::new(0)));
        let (speaking, steps) = (Arc::clone(&socket), Arc::clone(&step));
        std::thread::spawn(move || {
            while speak(&speaking, Word::Alive { step: steps.load(Ordering::Relaxed) }).is_ok() {
                std::thread::sleep(HEARTBEAT);
            }
        });
        Ok(Some(Self { socket, meetings, step, incarnation }))
    }

    /// The number of this process among those of its rank, from 0.
    #[must_use]
    pub fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// Whether this process takes the place of one that was lost.
    #[must_use]
    pub fn is_replacement(&self) -> bool {
        self.incarnation > 0
    }

    /// Tells of a step that is done.
    pub fn done(&self, step: u64) {
        self.step.store(step, Ordering::Relaxed);
    }

    /// Says that this rank is ready to meet the others, and waits for when and where; rank 0 then
    /// uses the listener.
    ///
    /// # Errors
    /// When the coordinator is gone.
    pub fn ready(&self) -> io::Result<(Meeting, TcpListener)> {
        let interface = self.lock().local_addr()?.ip();
        let listener = TcpListener::bind((interface, 0))?;
        let (address, step) = (listener.local_addr()?, self.step.load(Ordering::Relaxed));
        speak(&self.socket, Word::Ready { address, step })?;
        let gone = |_| io::Error::from(io::ErrorKind::ConnectionAborted);
        Ok((self.meetings.recv().map_err(gone)?, listener))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, TcpStream> {
        self.socket.lock().expect("nothing panics while it holds the socket")
    }
}

/// Address, secret and incarnation of [`CONTROL`].
fn parse(text: &str) -> Option<(SocketAddr, u64, u64)> {
    let mut words = text.split(' ');
    let mut next = || words.next();
    Some((next()?.parse().ok()?, next()?.parse().ok()?, next()?.parse().ok()?))
}

fn speak(socket: &Mutex<TcpStream>, word: Word) -> io::Result<()> {
    say(&mut socket.lock().expect("nothing panics while it holds the socket"), word)
}

/// Says a line.
pub(super) fn say(socket: &mut TcpStream, word: impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(&word)?;
    line.push(b'\n');
    socket.write_all(&line)
}

/// Hears a line; `None` at the end, or when what is said is no word.
pub(super) fn hear(reader: &mut BufReader<TcpStream>) -> Option<Word> {
    let mut line = String::new();
    reader.take(LINE_LIMIT).read_line(&mut line).ok()?;
    serde_json::from_str(&line).ok()
}
