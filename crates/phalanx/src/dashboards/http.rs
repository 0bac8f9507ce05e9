//! The little of HTTP that a dashboard asks for: one page a connection, read only.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};

/// The longest request that is read.
const REQUEST_MAX: u64 = 8192;
/// A client that is silent for so long is given up.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is answered to a request.
pub struct Content {
    /// The media type.
    pub kind: &'static str,
    pub body: String,
}

/// Listens; port 0 is any that is free.
pub fn listen(address: IpAddr, port: u16) -> Result<TcpListener> {
    let address = SocketAddr::new(address, port);
    TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))
}

/// Answers GET requests one after another, until the process ends. A page that cannot be had is an
/// error to its client, and nothing to the server.
pub fn serve(listener: &TcpListener, answer: impl Fn(&str) -> Option<Result<Content>>) {
    for connection in listener.incoming().flatten() {
        // Whoever hangs up early does not want the answer.
        let _ = respond(connection, &answer);
    }
}

fn respond(
    mut connection: TcpStream,
    answer: &impl Fn(&str) -> Option<Result<Content>>,
) -> io::Result<()> {
    connection.set_read_timeout(Some(PATIENCE))?;
    connection.set_write_timeout(Some(PATIENCE))?;
    let request = head(&mut connection)?;
    let local = connection.local_addr()?.ip().is_loopback();
    let (status, Content { kind, body }) = match asked(&request, local) {
        Err(status) => (status, plain(status)),
        Ok(path) => match answer(path) {
            None => ("404 Not Found", plain("nothing is here")),
            Some(Ok(content)) => ("200 OK", content),
            Some(Err(error)) => ("503 Service Unavailable", plain(&format!("{error:#}"))),
        },
    };
    let length = body.len();
    write!(
        connection,
        "HTTP/1.1 {status}\r\nContent-Type: {kind}; charset=utf-8\r\nContent-Length: {length}\r\nCache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n{body}"
    )
}

fn plain(text: &str) -> Content {
    Content { kind: "text/plain", body: format!("{text}\n") }
}

/// A request up to its empty line.
fn head(connection: &mut TcpStream) -> io::Result<String> {
    let mut request = Vec::new();
    let mut part = [0; 1024];
    let mut rest = connection.take(REQUEST_MAX);
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        match rest.read(&mut part)? {
            0 => break,
            count => request.extend(&part[..count]),
        }
    }
    Ok(String::from_utf8_lossy(&request).into_owned())
}

/// The path that is asked for, or the status that refuses. What listens on the loopback address
/// answers only to its names, so that no page from elsewhere reads it under a name of its own.
fn asked(request: &str, local: bool) -> Result<&str, &'static str> {
    let mut lines = request.lines();
    let mut words = lines.next().unwrap_or_default().split(' ');
    let (Some("GET"), Some(path)) = (words.next(), words.next()) else {
        return Err("405 Method Not Allowed");
    };
    let named = lines.filter_map(|line| line.split_once(':'));
    let host =
        named.filter(|(name, _)| name.eq_ignore_ascii_case("host")).map(|(_, host)| host.trim());
    let name = |host: &str| match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|digit| digit.is_ascii_digit()) => name.to_owned(),
        _ => host.to_owned(),
    };
    let ours = |host: &str| matches!(name(host).as_str(), "localhost" | "127.0.0.1" | "[::1]");
    if local && !host.into_iter().all(ours) {
        return Err("421 Misdirected Request");
    }
    Ok(path.split('?').next().unwrap_or(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_answered_under_names_of_this_machine_alone() {
        let request = |host: &str| format!("GET /metrics?x=1 HTTP/1.1\r\nHost: {host}\r\n\r\n");
        for host in ["localhost", "localhost:80", "127.0.0.1:9400", "[::1]:9400", "[::1]"] {
            assert_eq!(asked(&request(host), true), Ok("/metrics"), "{host}");
        }
        assert!(asked(&request("evil.example:9400"), true).is_err());
        assert_eq!(asked(&request("node7.example:9400"), false), Ok("/metrics"));
        assert_eq!(asked("POST / HTTP/1.1\r\n\r\n", true), Err("405 Method Not Allowed"));
        assert!(asked("", true).is_err());
    }
}
