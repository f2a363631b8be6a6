//! The part of HTTP that the API is spoken in: one request and its answer on a connection.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

/// The longest head of a request, in bytes.
const HEAD_LIMIT: usize = 16 << 10;
/// The longest body of a request, in bytes: Firecracker's own limit.
const BODY_LIMIT: usize = 51_200;

/// What was asked.
pub(crate) struct Asked {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) body: Vec<u8>,
}

/// Reads one request.
pub(crate) fn read(stream: &mut UnixStream) -> io::Result<Asked> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
        if head.len() > HEAD_LIMIT {
            return Err(io::Error::other("the head of a request is too long"));
        }
    }
    let head = String::from_utf8(head).map_err(io::Error::other)?;
    let mut lines = head.lines();
    let mut words = lines.next().unwrap_or_default().split(' ');
    let (method, path) = (words.next(), words.next());
    let (Some(method), Some(path)) = (method, path) else {
        return Err(io::Error::other("not a request"));
    };
    let mut headers = lines.filter_map(|line| line.split_once(':'));
    let length = headers.find(|(name, _)| name.eq_ignore_ascii_case("content-length"));
    let length = length.and_then(|(_, value)| value.trim().parse().ok()).unwrap_or(0);
    if length > BODY_LIMIT {
        return Err(io::Error::other("the body of a request is too long"));
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    Ok(Asked { method: method.to_owned(), path: path.to_owned(), body })
}

/// Writes an answer.
pub(crate) fn write(stream: &mut UnixStream, status: u16, body: &str) -> io::Result<()> {
    let mut answer = format!("HTTP/1.1 {status} \r\nServer: Firecracker API\r\n");
    if !body.is_empty() {
        answer += &format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len());
    }
    answer += &format!("Connection: keep-alive\r\n\r\n{body}");
    stream.write_all(answer.as_bytes())
}
