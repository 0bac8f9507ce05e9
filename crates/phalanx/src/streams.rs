//! Over what the ranks of a job reach each other.

use std::net::TcpListener;

use anyhow::{Result, bail};
use transport::{Communicator, Error, Limits, Rendezvous};
#[cfg(feature = "mpi")]
use transport::{Group, Mpi, Transport};
#[cfg(feature = "mpi")]
use units::Rank;

/// Names the way.
const VARIABLE: &str = "PHALANX_TRANSPORT";

/// What carries the streams between ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Shared memory within a host, TCP between hosts.
    Fitting,
    /// TCP, within a host too.
    Tcp,
    /// What MPI, which started the ranks, runs on.
    Mpi,
    /// The same, and MPI's own collectives for what is waited for at once.
    MpiNative,
    /// As fitting, and NCCL for what is waited for at once.
    Nccl,
}

impl Way {
    /// The way that the environment asks for.
    ///
    /// # Errors
    /// A word that is none of them.
    pub fn read(environment: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        Ok(match environment(VARIABLE).as_deref() {
            None | Some("") => Self::Fitting,
            Some("tcp") => Self::Tcp,
            Some("mpi") => Self::Mpi,
            Some("mpi-native") => Self::MpiNative,
            Some("nccl") => Self::Nccl,
            Some(other) => {
                bail!("{VARIABLE}: `{other}` is none of `tcp`, `mpi`, `mpi-native`, `nccl`")
            }
        })
    }

    /// Whether ranks of one host use memory between them: [`Rendezvous::shared_memory`].
    #[must_use]
    pub fn shares_memory(self) -> bool {
        matches!(self, Self::Fitting | Self::Nccl)
    }

    /// Connects to the other ranks, which were given the same job.
    ///
    /// # Errors
    /// As [`Rendezvous::meet`]; for MPI, when this program was built without it, or was not started by it; for NCCL,
    /// when this program was built without it, or it cannot be loaded, or there is no GPU.
    pub fn connect(
        self,
        rendezvous: Rendezvous,
        listener: Option<TcpListener>,
        limits: Limits,
    ) -> Result<Communicator, Error> {
        match self {
            Self::Mpi => over_mpi(&rendezvous, limits, false),
            Self::MpiNative => over_mpi(&rendezvous, limits, true),
            Self::Fitting | Self::Tcp => {
                Communicator::new(Box::new(rendezvous.meet(listener)?), limits)
            }
            Self::Nccl => {
                let met = Communicator::new(Box::new(rendezvous.meet(listener)?), limits)?;
                with_nccl(met, limits)
            }
        }
    }
}

/// As a rank that MPI started; the ranks compare their jobs, which a rendezvous does elsewhere.
#[cfg(feature = "mpi")]
fn over_mpi(rendezvous: &Rendezvous, limits: Limits, native: bool) -> Result<Communicator, Error> {
    let Rendezvous { rank, ranks, identity, .. } = rendezvous;
    let streams = Mpi::world()?;
    let refused = |rank: Rank, reason| Err(Error::Refused { rank, reason });
    if (streams.rank(), streams.ranks()) != (*rank, *ranks) {
        let reason = format!(
            "to MPI it is {} of {}, to its job {rank} of {ranks}: start all ranks by mpirun or srun",
            streams.rank(),
            streams.ranks()
        );
        return refused(*rank, reason);
    }
    let streams = if native { streams.with_native_collectives()? } else { streams };
    let mut communicator = Communicator::new(Box::new(streams), limits)?;
    let world = Group::world(*ranks);
    let identities = communicator.all_gather_bytes(&world, identity.as_bytes())?;
    match identities.iter().position(|other| other != identity.as_bytes()) {
        Some(other) => refused(Rank(other as u32), format!("its job is not that of {rank}")),
        None => Ok(communicator),
    }
}

/// With the engine that the loader finds, or the files that the environment names.
#[cfg(feature = "nccl")]
fn with_nccl(communicator: Communicator, limits: Limits) -> Result<Communicator, Error> {
    let (nccl, cuda_runtime) =
        (std::env::var_os("PHALANX_NCCL"), std::env::var_os("PHALANX_CUDART"));
    let files = transport::NcclFiles { nccl, cuda_runtime };
    let (rank, place) = (communicator.rank(), communicator.place_on_host());
    let engine = transport::Nccl::load(&files, rank, place, limits.wait)?;
    Ok(communicator.with_native(std::sync::Arc::new(engine)))
}

#[cfg(not(feature = "nccl"))]
fn with_nccl(_: Communicator, _: Limits) -> Result<Communicator, Error> {
    let reason = "this program was built without it; build it with `--features nccl`".into();
    Err(Error::System { action: "use NCCL", reason })
}

#[cfg(not(feature = "mpi"))]
fn over_mpi(_: &Rendezvous, _: Limits, _: bool) -> Result<Communicator, Error> {
    let reason = "this program was built without it; build it with `--features mpi`".into();
    Err(Error::System { action: "use MPI", reason })
}

#[cfg(test)]
mod tests {
    use super::Way;

    #[test]
    fn a_way_that_does_not_exist_is_refused() {
        let read = |word: &'static str| Way::read(&move |_: &str| Some(word.to_owned()));
        assert_eq!(read("tcp").unwrap(), Way::Tcp);
        assert!(read("infiniband").unwrap_err().to_string().contains("`infiniband`"));
    }
}
