//! As much of etcd as a register needs, through its HTTP gateway (`/v3`, etcd 3.4 and later).

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_secs(2);
/// The longest answer, in bytes.
const LIMIT: u64 = 1 << 20;

/// Keys below a name in etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Etcd {
    address: String,
    prefix: String,
}

impl Etcd {
    /// At `HOST:PORT/NAME`.
    ///
    /// # Errors
    /// When it is written otherwise.
    pub fn at(place: &str) -> io::Result<Self> {
        let parts = place
            .split_once('/')
            .filter(|(address, name)| address.contains(':') && !name.is_empty());
        let Some((address, name)) = parts else {
            let what = format!("etcd://{place}: write etcd://HOST:PORT/NAME");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        };
        Ok(Self { address: address.to_owned(), prefix: format!("/phalanx/{name}/") })
    }

    /// The value of the last key, if there is any.
    ///
    /// # Errors
    /// When etcd does not answer, or not in its own words.
    pub fn last(&self) -> io::Result<Option<Vec<u8>>> {
        // Of all keys with the prefix: those before the string that follows them all.
        let mut end = self.prefix.clone().into_bytes();
        *end.last_mut().expect("it ends with a slash") += 1;
        let found = self.ask(
            "kv/range",
            &json!({
                "key": BASE64.encode(&self.prefix), "range_end": BASE64.encode(end),
                "sort_order": "DESCEND", "sort_target": "KEY", "limit": 1,
            }),
        )?;
        let Some(value) = found["kvs"][0]["value"].as_str() else { return Ok(None) };
        BASE64.decode(value).map(Some).map_err(|error| unexpected(&error.to_string()))
    }

    /// Writes a key unless it is there; whether it did.
    ///
    /// # Errors
    /// When etcd does not answer, or not in its own words.
    pub fn put_once(&self, name: &str, value: &[u8]) -> io::Result<bool> {
        let key = BASE64.encode(format!("{}{name}", self.prefix));
        let answer = self.ask(
            "kv/txn",
            &json!({
                "compare": [{ "key": key, "target": "VERSION", "version": "0" }],
                "success": [{ "requestPut": { "key": key, "value": BASE64.encode(value) } }],
            }),
        )?;
        if answer["header"].is_null() {
            return Err(unexpected(&answer.to_string()));
        }
        // What is false is left out.
        Ok(answer["succeeded"] == true)
    }

    /// Asks; HTTP/1.0, so that the answer ends with the connection and comes in one piece.
    fn ask(&self, method: &str, question: &Value) -> io::Result<Value> {
        let place = |error: io::Error| {
            io::Error::new(error.kind(), format!("etcd at {}: {error}", self.address))
        };
        let answer = self.exchange(method, question).map_err(place)?;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        let status = head.lines().next().unwrap_or_default();
        if status.split(' ').nth(1) != Some("200") {
            return Err(place(unexpected(&format!("{status}: {body}"))));
        }
        serde_json::from_str(body).map_err(|error| place(unexpected(&error.to_string())))
    }

    fn exchange(&self, method: &str, question: &Value) -> io::Result<String> {
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        let connect = |address: SocketAddr| TcpStream::connect_timeout(&address, TIMEOUT);
        for address in self.address.to_socket_addrs()? {
            let mut socket = match connect(address) {
                Ok(socket) => socket,
                Err(error) => {
                    last = error;
                    continue;
                }
            };
            socket.set_read_timeout(Some(TIMEOUT))?;
            let body = question.to_string();
            write!(
                socket,
                "POST /v3/{method} HTTP/1.0\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
                self.address,
                body.len()
            )?;
            let mut answer = String::new();
            socket.take(LIMIT).read_to_string(&mut answer)?;
            return Ok(answer);
        }
        Err(last)
    }
}

fn unexpected(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("answered {what}"))
}
