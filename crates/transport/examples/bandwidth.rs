//! Measures all-reduce between two ranks: two threads in process, then two processes over shared
//! memory, then over TCP.
//!
//!     cargo run --release -p transport --example bandwidth
//!
//! Prints per buffer size the median time, the rate of each direction (both are busy), and the
//! processor time of both ranks per byte of buffer.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use collective::{Collective, Kind};
use rustix::time::{ClockId, clock_gettime};
use transport::{
    Action, Communicator, Error, Group, InProcess, Limits, Operation, Rendezvous, Secret, Transport,
};
use units::{Bytes, BytesPerSecond, Rank, Seconds};

/// Buffer sizes in bytes, and how often each is measured.
const SIZES: [(usize, usize); 4] =
    [(1 << 10, 2000), (1 << 20, 200), (12 << 20, 40), (64 << 20, 10)];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<_> = std::env::args().collect();
    if let [_, address, shared_memory] = &arguments[..] {
        let rendezvous = rendezvous(Rank(1), address.parse()?, shared_memory.parse()?);
        return Ok(measure(Box::new(rendezvous.meet(None)?)).map(drop)?);
    }
    println!("transport          buffer       time     each way CPU per byte");
    let mut mesh = InProcess::mesh(2);
    let other = mesh.pop().map(|end| std::thread::spawn(move || measure(Box::new(end))));
    let end = mesh.pop().ok_or("a mesh of two has two ends")?;
    let rows = measure(Box::new(end))?;
    drop(other.map(|thread| thread.join()));
    print("in-process", &rows, 1.0);

    measure_processes("shared memory", true)?;
    measure_processes("tcp", false)
}

/// Measures with another process of this program.
fn measure_processes(name: &str, shared_memory: bool) -> Result<(), Box<dyn std::error::Error>> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    let arguments = [address.to_string(), shared_memory.to_string()];
    let program = std::env::current_exe()?;
    let mut child = Command::new(program).args(arguments).stdout(Stdio::null()).spawn()?;
    let transport = rendezvous(Rank(0), address, shared_memory).meet(Some(listener))?;
    if shared_memory && !transport.shares_memory_with(Rank(1)) {
        println!("{name:<14} cannot be set up here");
    }
    // The other process does the same work, so both together take twice this one's time.
    print(name, &measure(Box::new(transport))?, 2.0);
    child.wait()?;
    Ok(())
}

fn rendezvous(rank: Rank, address: SocketAddr, shared_memory: bool) -> Rendezvous {
    let (identity, timeout) = ("bandwidth".into(), Duration::from_secs(10));
    let secret = Secret::new("the secret of an example").expect("it is long enough");
    Rendezvous { rank, ranks: 2, address, identity, secret, timeout, shared_memory }
}

/// Buffer size, median time, and this process's processor time per operation.
type Row = (usize, Seconds, Seconds);

fn measure(transport: Box<dyn Transport>) -> Result<Vec<Row>, Error> {
    let mut communicator = Communicator::new(transport, Limits::default())?;
    let member = communicator.rank().0;
    let part = Arc::new(Collective::ring(Kind::AllReduce, 2).part(member));
    let group = Group { id: 0, ranks: Arc::new([Rank(0), Rank(1)]) };
    let label: Arc<str> = "all-reduce".into();
    let mut rows = Vec::new();
    for (bytes, repeats) in SIZES {
        let mut buffer = vec![1.0; bytes / 4];
        let mut times = Vec::new();
        let mut cpu = 0.0;
        for repeat in 0..repeats + 2 {
            communicator.barrier(&group)?;
            let (start, cpu_start) = (Instant::now(), cpu_seconds());
            let action = Action::Collective(Arc::clone(&part));
            let (group, label) = (group.clone(), Arc::clone(&label));
            let ticket = communicator.post(Operation { group, action, buffer, label })?;
            buffer = communicator.wait(ticket)?.buffer;
            // The first two warm up: memory is touched, buffers have grown.
            if repeat >= 2 {
                times.push(start.elapsed().as_secs_f64());
                cpu += cpu_seconds() - cpu_start;
            }
        }
        times.sort_by(f64::total_cmp);
        rows.push((bytes, Seconds(times[repeats / 2]), Seconds(cpu / repeats as f64)));
    }
    Ok(rows)
}

fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// With two ranks, each sends and receives as many bytes as the buffer has.
fn print(name: &str, rows: &[Row], processes: f64) {
    for (bytes, time, cpu) in rows {
        let rate: BytesPerSecond = Bytes(*bytes as u64) / *time;
        let cpu = Seconds(cpu.0 * processes / *bytes as f64);
        let (size, time) = (Bytes(*bytes as u64).to_string(), time.to_string());
        println!("{name:<14} {size:>10} {time:>10} {:>12} {:>12.3}", rate.to_string(), cpu);
    }
}
