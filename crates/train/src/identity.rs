//! Which rank this process is: what torchrun, srun and mpirun put into the environment.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};

use transport::Secret;
use units::Rank;

use crate::Error;
use crate::secret::secret;

/// Who started this process as a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Launcher {
    /// `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT`, as torchrun sets them.
    Torchrun,
    /// Slurm's `srun`.
    Slurm,
    /// Open MPI's or MPICH's `mpirun`.
    Mpi,
}

/// The place of this process in a job of several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Which rank.
    pub rank: Rank,
    /// Of how many.
    pub ranks: u32,
    /// Which rank of its host.
    pub local_rank: u32,
    /// Where rank 0 listens.
    pub master: SocketAddr,
    /// What the ranks of the job know, and nobody else.
    pub secret: Secret,
    /// Who says so.
    pub launcher: Launcher,
}

/// The variables of one launcher.
struct Names {
    launcher: Launcher,
    rank: &'static str,
    ranks: &'static str,
    local_rank: &'static str,
    local_ranks: &'static str,
}

const LAUNCHERS: [Names; 4] = [
    Names {
        launcher: Launcher::Torchrun,
        rank: "RANK",
        ranks: "WORLD_SIZE",
        local_rank: "LOCAL_RANK",
        local_ranks: "LOCAL_WORLD_SIZE",
    },
    Names {
        launcher: Launcher::Mpi,
        rank: "OMPI_COMM_WORLD_RANK",
        ranks: "OMPI_COMM_WORLD_SIZE",
        local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
        local_ranks: "OMPI_COMM_WORLD_LOCAL_SIZE",
    },
    Names {
        launcher: Launcher::Slurm,
        rank: "SLURM_PROCID",
        ranks: "SLURM_NTASKS",
        local_rank: "SLURM_LOCALID",
        local_ranks: "SLURM_NTASKS_PER_NODE",
    },
    Names {
        launcher: Launcher::Mpi,
        rank: "PMI_RANK",
        ranks: "PMI_SIZE",
        local_rank: "MPI_LOCALRANKID",
        local_ranks: "MPI_LOCALNRANKS",
    },
];

/// Where rank 0 listens when a launcher on one host names no port.
const DEFAULT_PORT: u16 = 29_500;

type Environment<'a> = &'a dyn Fn(&str) -> Option<String>;

impl Identity {
    /// Reads the environment; `None` when no launcher has spoken, so that this process is to start
    /// the ranks itself.
    ///
    /// # Errors
    /// Variables that are missing beside others, are no numbers, or contradict each other.
    pub fn read(environment: Environment<'_>) -> Result<Option<Self>, Error> {
        // Inside an allocation but outside of srun, Slurm's step variables are not set.
        let slurm_step = environment("SLURM_STEP_ID").is_some();
        let names = LAUNCHERS.into_iter().find(|names| {
            let speaks = environment(names.rank).is_some() && environment(names.ranks).is_some();
            speaks && (names.launcher != Launcher::Slurm || slurm_step)
        });
        names.map(|names| Self::of(&names, environment)).transpose()
    }

    fn of(names: &Names, environment: Environment<'_>) -> Result<Self, Error> {
        let rank = number(environment, names.rank)?.unwrap_or(0);
        let ranks = number(environment, names.ranks)?.unwrap_or(1);
        if rank >= ranks {
            let reason = format!("{rank} is not below {} = {ranks}", names.ranks);
            return Err(Error::Identity { variable: names.rank, reason });
        }
        let local_rank = number(environment, names.local_rank)?.unwrap_or(rank);
        let local_ranks = number(environment, names.local_ranks)?;
        let master = master(names.launcher, local_ranks == Some(ranks), environment)?;
        let (rank, secret) = (Rank(rank), secret(environment)?);
        Ok(Self { rank, ranks, local_rank, master, secret, launcher: names.launcher })
    }
}

fn number(environment: Environment<'_>, variable: &'static str) -> Result<Option<u32>, Error> {
    let Some(text) = environment(variable) else { return Ok(None) };
    text.parse().map(Some).map_err(|_| Error::Identity {
        variable,
        reason: format!("`{text}` is not a number; start the ranks anew"),
    })
}

/// Where rank 0 listens: as told, else on this host when all ranks are here or it is Slurm's first.
fn master(
    launcher: Launcher,
    all_local: bool,
    environment: Environment<'_>,
) -> Result<SocketAddr, Error> {
    let first_host = || environment("SLURM_LAUNCH_NODE_IPADDR");
    let host = match environment("MASTER_ADDR").or_else(first_host) {
        Some(host) => host,
        None if all_local => "127.0.0.1".to_owned(),
        None => {
            let reason = "is not set; set it to the address of rank 0's host on every rank".into();
            return Err(Error::Identity { variable: "MASTER_ADDR", reason });
        }
    };
    let port = port(launcher, environment)?;
    resolve(&host, port).ok_or_else(|| Error::Identity {
        variable: "MASTER_ADDR",
        reason: format!("`{host}` has no address; name rank 0's host or its address"),
    })
}

fn port(launcher: Launcher, environment: Environment<'_>) -> Result<u16, Error> {
    let given = number(environment, "MASTER_PORT")?.map(|port| port as u16);
    // torchrun's own store listens on MASTER_PORT; the next one is ours.
    let agent = environment("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|on| on == "True");
    match given {
        Some(port) if agent => Ok(port.wrapping_add(1)),
        Some(port) => Ok(port),
        None if launcher == Launcher::Torchrun => Err(Error::Identity {
            variable: "MASTER_PORT",
            reason: "is not set beside RANK and WORLD_SIZE; set it to a free port of rank 0's host"
                .into(),
        }),
        // Jobs of one host must not meet on one port.
        None => Ok(DEFAULT_PORT + number(environment, "SLURM_JOB_ID")?.unwrap_or(0) as u16 % 1000),
    }
}

/// The first address of a host, IPv4 before IPv6.
fn resolve(host: &str, port: u16) -> Option<SocketAddr> {
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Some(SocketAddr::new(ip, port));
    }
    let mut addresses: Vec<SocketAddr> = (host, port).to_socket_addrs().ok()?.collect();
    addresses.sort_by_key(SocketAddr::is_ipv6);
    addresses.first().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Option<Identity>, Error> {
        Identity::read(&|name| {
            let secret = ("PHALANX_SECRET", "the secret of a test");
            let mut variables = variables.iter().chain([&secret]);
            let found = variables.find(|(variable, _)| *variable == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn torchrun_says_who_we_are() {
        let variables = [
            ("RANK", "3"),
            ("WORLD_SIZE", "4"),
            ("LOCAL_RANK", "1"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", "1234"),
        ];
        let identity = read(&variables).unwrap().unwrap();
        assert_eq!((identity.rank, identity.ranks, identity.local_rank), (Rank(3), 4, 1));
        assert_eq!(identity.master, "127.0.0.1:1234".parse().unwrap());
        let mut with_store = variables.to_vec();
        with_store.push(("TORCHELASTIC_USE_AGENT_STORE", "True"));
        assert_eq!(read(&with_store).unwrap().unwrap().master.port(), 1235);
    }

    #[test]
    fn mpirun_on_one_host_needs_no_address() {
        let variables = [
            ("OMPI_COMM_WORLD_RANK", "0"),
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "0"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
        ];
        let identity = read(&variables).unwrap().unwrap();
        assert_eq!(identity.launcher, Launcher::Mpi);
        assert!(identity.master.ip().is_loopback());
        let error = read(&variables[..3]).unwrap_err().to_string();
        assert_eq!(
            error,
            "MASTER_ADDR: is not set; set it to the address of rank 0's host on every rank"
        );
    }

    #[test]
    fn without_a_launcher_there_is_no_identity() {
        assert_eq!(read(&[]).unwrap(), None);
        assert_eq!(read(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4")]).unwrap(), None);
    }

    #[test]
    fn contradictions_are_named() {
        let error = read(&[("RANK", "4"), ("WORLD_SIZE", "4")]).unwrap_err();
        assert_eq!(error.to_string(), "RANK: 4 is not below WORLD_SIZE = 4");
        let error = read(&[("RANK", "x"), ("WORLD_SIZE", "4")]).unwrap_err();
        assert_eq!(error.to_string(), "RANK: `x` is not a number; start the ranks anew");
    }
}
