//! How the processes of a job find each other, and agree that they are one job.
//!
//! Every connection begins with the handshake, in which both sides prove to know the job's secret.
//! Every other rank says hello to rank 0. Once all have, rank 0 answers everyone with the table of
//! addresses, or with the reason why the job does not start. The connection to rank 0 stays, so that
//! rank 0 sees who dies and can tell all others; any two other ranks are connected when they need it.
//! Last, the ranks of one host connect to the lowest of them and set up the memory that they share.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::Poll;
use serde::{Deserialize, Serialize};
use units::Rank;

use crate::door::{Directory, Door, INTERFACE, Link, connect};
use crate::handshake::{self, Secret};
use crate::interprocess::{Host, WAKER};
use crate::lobby::Lobby;
use crate::message::{VERSION, encode, receive, send, send_encoded};
use crate::sharing::{self, Neighbours};
use crate::{Arena, Error, Interprocess};

/// The first pause between two attempts to connect; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(10);

/// The longest pause between two attempts to connect.
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// How many differing lines of two identities are shown.
const LINES_SHOWN: usize = 20;

/// Where and as what a process joins a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendezvous {
    /// The rank of this process.
    pub rank: Rank,
    /// The number of ranks in the job.
    pub ranks: u32,
    /// Where rank 0 listens.
    pub address: SocketAddr,
    /// What must be the same on every rank, line by line: the job as resolved.
    pub identity: String,
    /// What the ranks of the job know, and nobody else.
    pub secret: Secret,
    /// How long to wait for all ranks.
    pub timeout: Duration,
    /// Whether to use memory rather than TCP with the ranks of the same host that do so too.
    pub shared_memory: bool,
    /// The network interface to use, such as `eth0`; that which leads to rank 0 if none is named.
    pub interface: Option<Arc<str>>,
}

/// What a rank says to rank 0. Later versions of the protocol keep `rank`.
#[derive(Debug, Serialize, Deserialize)]
struct Hello {
    rank: Rank,
    ranks: u32,
    identity: String,
    place: Place,
    seat: Seat,
}

/// A host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Place {
    /// What people call it.
    name: String,
    /// What tells it from others, where that can be found out.
    host: Option<String>,
}

/// How others reach a rank.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Seat {
    /// Where it accepts its higher peers.
    address: SocketAddr,
    /// Which of the roster's places it is in.
    place: u32,
    /// Whether it is willing to share memory with the ranks of its host.
    shares_memory: bool,
}

/// Where all ranks are. Every rank is told all of it, so each place is in it once.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Roster {
    places: Vec<Place>,
    /// By rank.
    seats: Vec<Seat>,
}

/// What rank 0 answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
enum Verdict {
    /// All are here, and a number that other jobs do not have.
    Start { job: u64, roster: Roster },
    /// The job does not start because of this rank.
    Refused { rank: Rank, reason: String },
}

/// What all ranks wait for events with.
struct Watch {
    poll: Poll,
    waker: Arc<mio::Waker>,
}

impl Rendezvous {
    /// Meets the other ranks. Rank 0 listens at the address, or on `listener`, which is how to use
    /// a port that the system chose.
    ///
    /// # Errors
    /// [`Error::Refused`] on every rank when they do not belong together, [`Error::Rendezvous`]
    /// when some cannot be reached within the timeout.
    ///
    /// # Panics
    /// When `rank` is not below `ranks`.
    pub fn meet(self, listener: Option<TcpListener>) -> Result<Interprocess, Error> {
        assert!(self.rank.0 < self.ranks, "{} of {} ranks", self.rank, self.ranks);
        let deadline = Instant::now() + self.timeout;
        if self.address.ip().is_unspecified() {
            return Err(self.failed("name the address of one interface, reachable by every rank"));
        }
        let watch = Watch::new().map_err(Error::system("watch sockets"))?;
        match self.rank {
            Rank(0) => self.host(listener, watch, deadline),
            _ => self.join(watch, deadline),
        }
    }

    /// Rank 0: gathers everyone's hello and answers.
    fn host(
        &self,
        listener: Option<TcpListener>,
        mut watch: Watch,
        deadline: Instant,
    ) -> Result<Interprocess, Error> {
        let (sockets, job, roster) = match (self.ranks, listener) {
            (1, _) => self.roster_of(Vec::new()),
            (_, Some(listener)) => self.receive_all(listener, &mut watch.poll, deadline)?,
            (_, None) => {
                let listener = TcpListener::bind(self.address)
                    .map_err(|e| self.failed(format!("cannot listen: {e}")))?;
                self.receive_all(listener, &mut watch.poll, deadline)?
            }
        };
        let directory = self.directory(job, &roster);
        let mut links = Vec::new();
        for (peer, socket) in (1..).map(Rank).zip(sockets) {
            let link = match directory.neighbours.ring(self.rank, peer) {
                None => (socket, None),
                Some(_) => receive(&socket, deadline)
                    .and_then(|greeting| directory.welcome(socket, &greeting, deadline))
                    .map_err(|error| self.silent(peer, &error))?,
            };
            links.push((peer, link));
        }
        let arena = self.offer_arena(&directory, &links, deadline)?;
        let door = Door::new(directory, None, Arc::clone(&watch.waker));
        Interprocess::new(watch.poll, watch.waker, roster.hosts(), door, links, arena)
    }

    /// Waits for everyone and answers; the connections from rank 1 on.
    fn receive_all(
        &self,
        listener: TcpListener,
        poll: &mut Poll,
        deadline: Instant,
    ) -> Result<(Vec<TcpStream>, u64, Roster), Error> {
        let mut arrived = Vec::new();
        let outcome = self.gather(listener, poll, deadline, &mut arrived);
        let (sockets, job, roster) = self.roster_of(arrived);
        let verdict = match &outcome {
            Ok(()) => Verdict::Start { job, roster: roster.clone() },
            Err((rank, reason)) => Verdict::Refused { rank: *rank, reason: reason.clone() },
        };
        let verdict = encode(&verdict).map_err(Error::system("write down who is where"))?;
        for socket in &sockets {
            // Whoever cannot be told any more sees the connection end.
            drop(send_encoded(socket, &verdict, deadline));
        }
        outcome.map_err(|(rank, reason)| Error::Refused { rank, reason })?;
        Ok((sockets, job, roster))
    }

    /// Waits until every other rank has arrived. After an objection it still waits for the others,
    /// so that everyone learns of it.
    fn gather(
        &self,
        listener: TcpListener,
        poll: &mut Poll,
        deadline: Instant,
        arrived: &mut Vec<(TcpStream, Hello)>,
    ) -> Result<(), (Rank, String)> {
        let system = |error: io::Error| (self.rank, format!("its sockets failed: {error}"));
        let lobby = Lobby::new(listener, self.secret.clone(), self.ranks, poll);
        let mut lobby = lobby.map_err(system)?;
        let mut objection = None;
        let mut told = 0;
        while arrived.len() + told + 1 < self.ranks as usize {
            let Some(guest) = lobby.await_next(poll, deadline).map_err(system)? else {
                return Err(objection.unwrap_or_else(|| self.missing(arrived, lobby.strangers())));
            };
            let Ok(hello) = serde_json::from_slice::<Hello>(&guest.body) else {
                continue;
            };
            let rank = hello.rank;
            objection =
                objection.or_else(|| Some((rank, self.objection(guest.version, &hello, arrived)?)));
            arrived.push((guest.socket, hello));
            if let Some((rank, reason)) = &objection {
                told += arrived.len();
                let verdict = Verdict::Refused { rank: *rank, reason: reason.clone() };
                arrived.drain(..).for_each(|(socket, _)| drop(send(&socket, &verdict, deadline)));
            }
        }
        objection.map_or(Ok(()), Err)
    }

    /// Why a rank does not fit, if it does not.
    fn objection(
        &self,
        version: u32,
        hello: &Hello,
        arrived: &[(TcpStream, Hello)],
    ) -> Option<String> {
        if version != VERSION {
            Some(format!("it speaks version {version} of the protocol, rank 0 speaks {VERSION}"))
        } else if hello.ranks != self.ranks {
            Some(format!("it was started for {} ranks, rank 0 for {}", hello.ranks, self.ranks))
        } else if hello.rank.0 >= self.ranks || hello.rank == self.rank {
            Some(format!("there are ranks 0 to {}, and 0 is taken", self.ranks - 1))
        } else if arrived.iter().any(|(_, other)| other.rank == hello.rank) {
            Some("two processes were started with this rank".into())
        } else if hello.identity != self.identity {
            Some(difference(&self.identity, &hello.identity, hello.rank))
        } else {
            None
        }
    }

    /// Who had not come when the time was over.
    fn missing(&self, arrived: &[(TcpStream, Hello)], strangers: u64) -> (Rank, String) {
        let here: BTreeSet<_> = arrived.iter().map(|(_, hello)| hello.rank).collect();
        let missing: Vec<_> = (1..self.ranks).map(Rank).filter(|r| !here.contains(r)).collect();
        let names: Vec<_> = missing.iter().map(|rank| rank.0.to_string()).collect();
        let (address, timeout) = (self.address, self.timeout);
        let mut reason =
            format!("not at {address} within {timeout:?}; ranks missing: {}", names.join(", "));
        if strangers > 0 {
            reason += &format!("; connections that were given another secret: {strangers}");
        }
        (missing[0], reason)
    }

    /// Orders who has arrived by rank: the connections, the number of the job, and how others reach its ranks.
    fn roster_of(&self, mut arrived: Vec<(TcpStream, Hello)>) -> (Vec<TcpStream>, u64, Roster) {
        arrived.sort_by_key(|(_, hello)| hello.rank);
        let (place, seat) = self.seat(self.address);
        let mut roster = Roster::default();
        let mut known = BTreeMap::new();
        roster.add(&place, seat, &mut known);
        arrived.iter().for_each(|(_, hello)| roster.add(&hello.place, hello.seat, &mut known));
        // The standard library's per-process random seed tells this job from any other.
        let job = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), self.address);
        (arrived.into_iter().map(|(socket, _)| socket).collect(), job, roster)
    }

    fn seat(&self, address: SocketAddr) -> (Place, Seat) {
        let place = Place { name: host_name(), host: sharing::host() };
        (place, Seat { address, place: 0, shares_memory: self.shared_memory })
    }

    fn directory(&self, job: u64, roster: &Roster) -> Directory {
        let shares =
            |seat: &Seat| seat.shares_memory && roster.places[seat.place as usize].host.is_some();
        let host = |seat: &Seat| Some(seat.place).filter(|_| shares(seat));
        Directory {
            rank: self.rank,
            job,
            secret: self.secret.clone(),
            addresses: roster.seats.iter().map(|seat| seat.address).collect(),
            neighbours: Neighbours(roster.seats.iter().map(host).collect()),
            interface: self.interface.clone(),
        }
    }

    /// Another rank: says hello to rank 0, then sees to the memory of its host.
    fn join(&self, mut watch: Watch, deadline: Instant) -> Result<Interprocess, Error> {
        let (host, listener, job, roster) = self.arrive(deadline)?;
        let failed = |e: io::Error| self.failed(format!("cannot accept peers: {e}"));
        let lobby = Lobby::new(listener, self.secret.clone(), self.ranks, &watch.poll);
        let mut lobby = lobby.map_err(failed)?;
        let directory = self.directory(job, &roster);
        let link = match directory.neighbours.ring(self.rank, Rank(0)) {
            None => (host, None),
            Some(_) => self.greet(&directory, host, Rank(0), deadline)?,
        };
        let mut links = Vec::from([(Rank(0), link)]);
        let arena = match directory.neighbours.arena(self.rank) {
            None => None,
            Some(ranks) if ranks[0] == self.rank => {
                let peers =
                    self.await_all(&ranks[1..], &directory, &mut lobby, &mut watch, deadline)?;
                links.extend(peers);
                self.offer_arena(&directory, &links, deadline)?
            }
            Some(ranks) => self.join_arena(&directory, ranks, &mut links, deadline)?,
        };
        let door = Door::new(directory, Some(lobby), Arc::clone(&watch.waker));
        Interprocess::new(watch.poll, watch.waker, roster.hosts(), door, links, arena)
    }

    /// Says hello to rank 0 and hears where everyone is: one message each way, however many ranks there
    /// are.
    fn arrive(&self, deadline: Instant) -> Result<(TcpStream, TcpListener, u64, Roster), Error> {
        let host = self.connect_patiently(self.address, deadline)?;
        let failed = |e: io::Error| self.failed(format!("no answer from rank 0: {e}"));
        let listener = listen_beside(&host).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let identity = self.identity.clone();
        let (place, seat) = self.seat(address);
        let hello = Hello { rank: self.rank, ranks: self.ranks, identity, place, seat };
        send(&host, &hello, deadline).map_err(failed)?;
        match receive(&host, deadline).map_err(failed)? {
            Verdict::Refused { rank, reason } => Err(Error::Refused { rank, reason }),
            Verdict::Start { job, roster } if roster.is_for(self.ranks) => {
                Ok((host, listener, job, roster))
            }
            Verdict::Start { .. } => Err(self.failed("rank 0 sent a roster that cannot be")),
        }
    }

    /// Lets in the other ranks of the host, and whoever else comes.
    fn await_all(
        &self,
        ranks: &[Rank],
        directory: &Directory,
        lobby: &mut Lobby,
        watch: &mut Watch,
        deadline: Instant,
    ) -> Result<Vec<(Rank, Link)>, Error> {
        let failed = |e: io::Error| self.failed(format!("cannot accept peers: {e}"));
        let mut links = Vec::new();
        let here = |links: &[(Rank, Link)], rank| links.iter().any(|(peer, _)| *peer == rank);
        while let Some(missing) = ranks.iter().find(|rank| !here(&links, **rank)) {
            let Some(guest) = lobby.await_next(&mut watch.poll, deadline).map_err(failed)? else {
                return Err(self.failed(format!("{missing} did not connect to {}", self.rank)));
            };
            if let Some(greeting) = directory.greeting(&guest) {
                // Who cannot be answered has gone, and is missed.
                let link = directory.welcome(guest.socket, &greeting, deadline).ok();
                links.extend(link.map(|link| (greeting.rank, link)));
            }
        }
        Ok(links)
    }

    /// The lowest rank of a host: makes the memory that all there share.
    fn offer_arena(
        &self,
        directory: &Directory,
        links: &[(Rank, Link)],
        deadline: Instant,
    ) -> Result<Option<Arena>, Error> {
        let Some(ranks) = directory.neighbours.arena(self.rank) else {
            return Ok(None);
        };
        let peers = links.iter().filter(|(peer, _)| ranks.contains(peer));
        let peers: Vec<_> = peers.map(|(peer, (socket, _))| (*peer, socket)).collect();
        sharing::offer_arena(directory.job, ranks.clone(), &peers, deadline)
            .map_err(|(peer, error)| self.silent(peer, &error))
    }

    /// Another rank of the host: connects to the lowest, and takes what that offers.
    fn join_arena(
        &self,
        directory: &Directory,
        ranks: Vec<Rank>,
        links: &mut Vec<(Rank, Link)>,
        deadline: Instant,
    ) -> Result<Option<Arena>, Error> {
        let leader = ranks[0];
        if leader != Rank(0) {
            let socket = self.connect_patiently(directory.addresses[leader.index()], deadline)?;
            links.push((leader, self.greet(directory, socket, leader, deadline)?));
        }
        let (_, (socket, _)) = links.last().expect("there is a connection to rank 0");
        sharing::join_arena(directory.job, ranks, self.rank, socket, deadline)
            .map_err(|error| self.silent(leader, &error))
    }

    fn greet(
        &self,
        directory: &Directory,
        socket: TcpStream,
        peer: Rank,
        deadline: Instant,
    ) -> Result<Link, Error> {
        let greeted = directory.greet(socket, peer, deadline);
        let link = greeted.and_then(|link| link.ok_or_else(|| ErrorKind::AlreadyExists.into()));
        link.map_err(|error| self.silent(peer, &error))
    }

    /// Connects, again and again while nobody listens yet, and shakes hands.
    fn connect_patiently(
        &self,
        address: SocketAddr,
        deadline: Instant,
    ) -> Result<TcpStream, Error> {
        let socket = self.knock(address, deadline)?;
        let failed = |e| self.failed(format!("{} cannot join {address}: {e}", self.rank));
        handshake::connect(&socket, &self.secret, deadline).map_err(failed)?;
        Ok(socket)
    }

    fn knock(&self, address: SocketAddr, deadline: Instant) -> Result<TcpStream, Error> {
        let mut pause = FIRST_PAUSE;
        loop {
            match connect(address, self.interface.as_deref(), deadline) {
                Ok(socket) => return Ok(socket),
                Err(error) if error.kind() == INTERFACE => {
                    return Err(self.failed(error.to_string()));
                }
                Err(error) if Instant::now() + pause >= deadline => {
                    let reason = format!(
                        "{} cannot connect to {address} within {:?}: {error}; is it running there?",
                        self.rank, self.timeout
                    );
                    return Err(self.failed(reason));
                }
                Err(_) => std::thread::sleep(pause),
            }
            pause = (2 * pause).min(LONGEST_PAUSE);
        }
    }

    fn silent(&self, peer: Rank, error: &io::Error) -> Error {
        self.failed(format!("no word from {peer} about shared memory: {error}"))
    }

    fn failed(&self, reason: impl Into<String>) -> Error {
        Error::Rendezvous { address: self.address, reason: reason.into() }
    }
}

impl Watch {
    fn new() -> io::Result<Self> {
        let poll = Poll::new()?;
        let waker = Arc::new(mio::Waker::new(poll.registry(), WAKER)?);
        Ok(Self { poll, waker })
    }
}

impl Roster {
    /// Seats the next rank. Who cannot tell its host is on one of its own.
    fn add(&mut self, place: &Place, seat: Seat, known: &mut BTreeMap<Place, u32>) {
        let found = known.get(place).copied().filter(|_| place.host.is_some());
        let place = found.unwrap_or_else(|| {
            let number = self.places.len() as u32;
            self.places.push(place.clone());
            known.insert(place.clone(), number);
            number
        });
        self.seats.push(Seat { place, ..seat });
    }

    /// Whether it seats so many ranks, each in a place that it has.
    fn is_for(&self, ranks: u32) -> bool {
        let known = |seat: &Seat| (seat.place as usize) < self.places.len();
        self.seats.len() == ranks as usize && self.seats.iter().all(known)
    }

    /// Every rank's host.
    fn hosts(&self) -> Vec<Host> {
        let names: Vec<Arc<str>> =
            self.places.iter().map(|place| place.name.as_str().into()).collect();
        let host = |seat: &Seat| Host {
            name: Arc::clone(&names[seat.place as usize]),
            number: seat.place,
        };
        self.seats.iter().map(host).collect()
    }
}

/// What people call this host.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().to_owned()
}

/// The lines in which two identities differ.
fn difference(ours: &str, theirs: &str, rank: Rank) -> String {
    let only = |name: String, these: &str, those: &str| {
        let those: BTreeSet<_> = those.lines().collect();
        let lines = these.lines().filter(|line| !those.contains(line));
        lines.map(|line| format!("\n  {name}: {line}")).collect::<Vec<_>>()
    };
    let mut lines = only("rank 0".into(), ours, theirs);
    lines.extend(only(rank.to_string(), theirs, ours));
    if lines.is_empty() {
        return "its job has the same lines as rank 0's in another order".into();
    }
    let omitted = lines.len().saturating_sub(LINES_SHOWN);
    lines.truncate(LINES_SHOWN);
    let more = if omitted > 0 { format!("\n  and {omitted} more") } else { String::new() };
    format!("its job differs from rank 0's:{}{more}", lines.concat())
}

/// Listens, on a port that the system chooses, on the interface that leads to rank 0.
fn listen_beside(host: &TcpStream) -> io::Result<TcpListener> {
    let interface = host.local_addr()?.ip();
    TcpListener::bind((interface, 0))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;
    use crate::Transport;
    use crate::message::SENT;

    /// More ranks than a process may have files, were it not raised.
    const RANKS: u32 = 1024;

    #[test]
    fn a_thousand_ranks_meet_with_one_message_each_way() {
        raise_file_limit();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let secret = Secret::new("the secret of a test").unwrap();
        let rendezvous = |rank| Rendezvous {
            rank: Rank(rank),
            ranks: RANKS,
            address,
            identity: "job".into(),
            secret: secret.clone(),
            timeout: Duration::from_secs(100),
            shared_memory: false,
            interface: None,
        };
        std::thread::scope(|scope| {
            let join = |rank| {
                let rendezvous = rendezvous(rank);
                let meet = move || (rendezvous.meet(None).unwrap(), SENT.get());
                std::thread::Builder::new().stack_size(256 << 10).spawn_scoped(scope, meet).unwrap()
            };
            let others: Vec<_> = (1..RANKS).map(join).collect();
            let host = rendezvous(0).meet(Some(listener)).unwrap();
            assert_eq!(SENT.get(), RANKS - 1);
            let connected = |end: &Interprocess| {
                (0..RANKS).map(Rank).filter(|peer| end.is_connected(*peer)).collect::<Vec<_>>()
            };
            assert_eq!(connected(&host).len() as u32, RANKS - 1);
            for other in others {
                let (other, sent) = other.join().unwrap();
                assert_eq!((connected(&other), sent), (vec![Rank(0)], 1));
            }
        });
    }

    /// Each rank has a listener and both ends of a connection here.
    fn raise_file_limit() {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    }

    proptest! {
        /// A roster from the wire is refused, or can be used.
        #[test]
        fn whatever_rank_0_answers_is_an_error_or_of_use(
            at in any::<prop::sample::Index>(),
            bytes in prop::collection::vec(any::<u8>(), 0..4),
        ) {
            let place = Place { name: "n".into(), host: Some("h".into()) };
            let seat = Seat {
                address: SocketAddr::from((Ipv4Addr::LOCALHOST, 1)),
                place: 0,
                shares_memory: true,
            };
            let roster = Roster { places: vec![place; 2], seats: vec![seat; 3] };
            let mut wire = serde_json::to_vec(&Verdict::Start { job: 1, roster }).unwrap();
            let at = at.index(wire.len());
            let end = (at + bytes.len()).min(wire.len());
            wire.splice(at..end, bytes);
            if let Ok(Verdict::Start { roster, .. }) = serde_json::from_slice(&wire)
                && roster.is_for(3)
            {
                prop_assert_eq!(roster.hosts().len(), 3);
            }
            let _: Result<Hello, _> = serde_json::from_slice(&wire);
        }
    }

    #[test]
    fn ranks_of_one_host_share_a_place_and_strays_have_their_own() {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
        let seat = Seat { address, place: 7, shares_memory: true };
        let place = |host: Option<&str>| Place { name: "n".into(), host: host.map(str::to_owned) };
        let (mut roster, mut known) = (Roster::default(), BTreeMap::new());
        for host in [Some("a"), Some("b"), Some("a"), None, None] {
            roster.add(&place(host), seat, &mut known);
        }
        let numbers: Vec<_> = roster.hosts().iter().map(|host| host.number).collect();
        assert_eq!(numbers, [0, 1, 0, 2, 3]);
        assert!(roster.is_for(5) && !roster.is_for(4));
        roster.seats[0].place = 4;
        assert!(!roster.is_for(5), "a place that is not there");
    }
}
