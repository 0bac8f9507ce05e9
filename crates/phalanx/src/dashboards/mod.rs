//! A run for those who have dashboards already: a Prometheus endpoint and `TensorBoard` files.

pub mod http;
mod prometheus;
mod tensorboard;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use prometheus::Endpoint;
use tensorboard::EventFile;

/// Where a run's figures go besides its folder.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MetricsSection {
    /// Rank 0 answers Prometheus on this port; not at all unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// On this address.
    pub address: IpAddr,
    /// Event files for `TensorBoard` are written into the run's folder.
    pub tensorboard: bool,
}

impl Default for MetricsSection {
    fn default() -> Self {
        Self { port: None, address: IpAddr::V4(Ipv4Addr::LOCALHOST), tensorboard: false }
    }
}

/// The dashboards of a run, on the rank that records it.
pub struct Dashboards {
    endpoint: Option<Endpoint>,
    events: Option<EventFile>,
}

impl Dashboards {
    /// Opens what the job asks for; `folder` is that of the run.
    pub fn open(section: &MetricsSection, folder: &Path, tokens_per_step: u64) -> Result<Self> {
        let endpoint = section
            .port
            .map(|port| Endpoint::open(section.address, port, tokens_per_step))
            .transpose()?;
        let events = section.tensorboard.then(|| EventFile::create(folder)).transpose()?;
        Ok(Self { endpoint, events })
    }

    /// Where Prometheus is answered.
    pub fn address(&self) -> Option<SocketAddr> {
        self.endpoint.as_ref().map(|endpoint| endpoint.address)
    }

    /// Shows a record of the run.
    pub fn see(&mut self, record: &Value) -> Result<()> {
        if let Some(endpoint) = &self.endpoint {
            endpoint.see(record);
        }
        self.events.as_mut().map_or(Ok(()), |events| events.see(record))
    }
}
