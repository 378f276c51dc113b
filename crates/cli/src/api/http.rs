//! As much of HTTP/1.1 as the API needs: requests with a body of known length, one answer each.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Bytes of a request's first line and headers at most.
const LARGEST_HEAD: usize = 16 << 10;
const LARGEST_BODY: usize = 64 << 10;
const MOST_HEADERS: usize = 64;
/// How long a request may take to arrive, and an answer to be taken.
const TRANSFER: Duration = Duration::from_secs(10);

/// A request.
#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub body: Vec<u8>,
    /// The client wants to ask more.
    pub keep_alive: bool,
}

/// An answer: a status and perhaps an object.
#[derive(Debug, PartialEq)]
pub struct Answer {
    pub status: u16,
    /// Methods that the path knows, with status 405.
    pub allow: Option<&'static str>,
    pub body: Option<Value>,
}

impl Answer {
    pub fn ok(body: Option<Value>) -> Self {
        Self {
            status: if body.is_some() { 200 } else { 204 },
            allow: None,
            body,
        }
    }

    pub fn error(status: u16, sentence: impl Into<String>) -> Self {
        Self {
            status,
            allow: None,
            body: Some(json!({ "error": sentence.into() })),
        }
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        204 => "No Content",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        413 => "Content Too Large",
        431 => "Request Header Fields Too Large",
        503 => "Service Unavailable",
        _ => "Internal Server Error",
    }
}

fn bad(sentence: impl Into<String>) -> Answer {
    Answer::error(400, sentence)
}

/// What a head says.
#[derive(Debug)]
struct Head {
    method: String,
    path: String,
    keep_alive: bool,
    body: usize,
    /// The client waits to be told that its body is welcome.
    expects: bool,
    /// Its own length.
    len: usize,
}

/// Reads a head; `None` if it is not complete yet.
fn head(bytes: &[u8]) -> Result<Option<Head>, Answer> {
    let mut headers = [httparse::EMPTY_HEADER; MOST_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let len = match request.parse(bytes) {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => return Err(bad(format!("this is no HTTP/1.1 request: {error}"))),
    };
    let mut head = Head {
        method: request.method.unwrap_or_default().into(),
        path: request.path.unwrap_or_default().into(),
        keep_alive: request.version == Some(1),
        body: 0,
        expects: false,
        len,
    };
    let mut body = None;
    for header in request.headers.iter() {
        let value = std::str::from_utf8(header.value).unwrap_or_default().trim();
        let is = |name| header.name.eq_ignore_ascii_case(name);
        if is("content-length") {
            // A sign is no digit.
            let plain = !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit());
            let length = plain.then(|| value.parse::<usize>().ok()).flatten();
            let length = length.ok_or_else(|| bad(format!("'{value}' is no Content-Length")))?;
            if body.replace(length).is_some_and(|other| other != length) {
                return Err(bad("there are two different Content-Lengths"));
            }
        } else if is("transfer-encoding") {
            return Err(bad(
                "a Transfer-Encoding is not understood: give a Content-Length",
            ));
        } else if is("connection") {
            head.keep_alive = head.keep_alive && !value.eq_ignore_ascii_case("close");
        } else if is("expect") {
            head.expects = value.eq_ignore_ascii_case("100-continue");
        }
    }
    head.body = body.unwrap_or(0);
    Ok(Some(head))
}

/// One client.
pub struct Connection {
    stream: UnixStream,
    idle: Duration,
    /// Bytes that have come and are not used yet.
    bytes: Vec<u8>,
}

impl Connection {
    pub fn new(stream: UnixStream, idle: Duration) -> Self {
        // Without a time limit a client could only hold its own thread.
        let _ = stream.set_write_timeout(Some(TRANSFER));
        let bytes = Vec::new();
        Self {
            stream,
            idle,
            bytes,
        }
    }

    /// Reads what there is, for at most this long; whether there was something.
    fn more(&mut self, patience: Duration) -> io::Result<bool> {
        let mut piece = [0; 4096];
        // Zero would mean for ever.
        let patience = patience.max(Duration::from_millis(1));
        self.stream.set_read_timeout(Some(patience))?;
        loop {
            match self.stream.read(&mut piece) {
                Ok(n) => {
                    self.bytes.extend_from_slice(&piece[..n]);
                    return Ok(n > 0);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// The next request; `None` when the client has gone, or says nothing for long.
    ///
    /// # Errors
    /// What the client has to be told before it is let go.
    pub fn request(&mut self) -> Result<Option<Request>, Answer> {
        if self.bytes.is_empty() && !matches!(self.more(self.idle), Ok(true)) {
            return Ok(None);
        }
        let until = Instant::now() + TRANSFER;
        let head = loop {
            if let Some(head) = head(&self.bytes)? {
                break head;
            }
            if self.bytes.len() > LARGEST_HEAD {
                let sentence = "the request's headers are longer than 16 KiB";
                return Err(Answer::error(431, sentence));
            }
            if !self.arrives(until)? {
                return Ok(None);
            }
        };
        if head.body > LARGEST_BODY {
            return Err(Answer::error(
                413,
                "the request's body is longer than 64 KiB",
            ));
        }
        if head.expects
            && self
                .stream
                .write_all(b"HTTP/1.1 100 Continue\r\n\r\n")
                .is_err()
        {
            return Ok(None);
        }
        let end = head.len + head.body;
        while self.bytes.len() < end {
            if !self.arrives(until)? {
                return Ok(None);
            }
        }
        let body = self.bytes[head.len..end].to_vec();
        self.bytes.drain(..end);
        Ok(Some(Request {
            method: head.method,
            path: head.path,
            body,
            keep_alive: head.keep_alive,
        }))
    }

    /// Waits for more of a request; whether the client is still there.
    fn arrives(&mut self, until: Instant) -> Result<bool, Answer> {
        let late = || Answer::error(408, "the request did not arrive within 10 seconds");
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(late());
        }
        match self.more(left) {
            Ok(came) => Ok(came),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(late()),
            Err(_) => Ok(false),
        }
    }

    /// Sends an answer; whether the client took it.
    pub fn answer(&mut self, answer: &Answer, keep_alive: bool) -> bool {
        let body = answer.body.as_ref().map(|body| format!("{body}\n"));
        let body = body.unwrap_or_default();
        let mut text = format!("HTTP/1.1 {} {}\r\n", answer.status, reason(answer.status));
        text.push_str("Server: trapline\r\n");
        if let Some(allow) = answer.allow {
            text.push_str(&format!("Allow: {allow}\r\n"));
        }
        if answer.status != 204 {
            text.push_str("Content-Type: application/json\r\n");
            text.push_str(&format!("Content-Length: {}\r\n", body.len()));
        }
        let connection = if keep_alive { "keep-alive" } else { "close" };
        text.push_str(&format!("Connection: {connection}\r\n\r\n{body}"));
        self.stream.write_all(text.as_bytes()).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What becomes of these bytes, when the client then sends nothing more.
    fn read(bytes: &[u8]) -> Result<Option<Request>, u16> {
        let (mut client, server) = UnixStream::pair().unwrap();
        client.write_all(bytes).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let mut connection = Connection::new(server, Duration::from_secs(10));
        connection.request().map_err(|answer| answer.status)
    }

    #[test]
    fn a_request_with_a_body() {
        let text = b"PUT /x HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}GET";
        let request = read(text).unwrap().unwrap();
        assert_eq!((&*request.method, &*request.path), ("PUT", "/x"));
        assert_eq!(request.body, b"{}");
        assert!(request.keep_alive);
    }

    #[test]
    fn several_requests_on_one_connection() {
        let (mut client, server) = UnixStream::pair().unwrap();
        let first = b"GET /a HTTP/1.1\r\n\r\nGET /b HTTP/1.1\r\nConnection: close\r\n\r\n";
        client.write_all(first).unwrap();
        let mut connection = Connection::new(server, Duration::from_secs(10));
        let request = connection.request().unwrap().unwrap();
        assert!(request.path == "/a" && request.keep_alive);
        let request = connection.request().unwrap().unwrap();
        assert!(request.path == "/b" && !request.keep_alive);
        drop(client);
        assert_eq!(connection.request(), Ok(None));
    }

    #[test]
    fn clients_that_vanish() {
        assert_eq!(read(b""), Ok(None));
        assert_eq!(read(b"GET / HT"), Ok(None));
        assert_eq!(
            read(b"PUT / HTTP/1.1\r\nContent-Length: 9\r\n\r\nx"),
            Ok(None)
        );
    }

    #[test]
    fn nonsense_is_refused() {
        for (text, status) in [
            (&b"\0\0\0\0"[..], 400),
            (b"GET / HTTP/3.0\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
            (
                b"GET / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
                400,
            ),
            (
                b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
                400,
            ),
            (b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
            (b"PUT / HTTP/1.1\r\nContent-Length: 70000\r\n\r\n", 413),
        ] {
            assert_eq!(read(text), Err(status), "{}", text.escape_ascii());
        }
        let long = format!("GET / HTTP/1.1\r\nX: {}\r\n", "y".repeat(20_000));
        assert_eq!(read(long.as_bytes()), Err(431));
        let many = "a: b\r\n".repeat(100);
        assert_eq!(
            read(format!("GET / HTTP/1.1\r\n{many}\r\n").as_bytes()),
            Err(400)
        );
    }

    proptest! {
        #[test]
        fn no_head_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = head(&bytes);
            let mut request = b"PUT /api/v1/x HTTP/1.1\r\n".to_vec();
            request.extend(bytes);
            let _ = head(&request);
        }
    }
}
