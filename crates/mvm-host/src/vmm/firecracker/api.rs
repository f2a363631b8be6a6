//! A client of Firecracker's API: HTTP over a Unix socket, one connection per request, every
//! answer checked. The driver uses it; it knows nothing about microVMs.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::http::method::InvalidMethod;
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use mvm_core::firecracker::Change;
use serde::Deserialize;
use tokio::time::{Instant, sleep, timeout};

use super::super::VmmError;
use super::with_source;
use crate::unix_socket;

/// The longest answer that is read, in bytes: Firecracker's own limit for requests.
const ANSWER_LIMIT: usize = 64 * 1024;
/// How often a socket that is not there yet is tried again.
const CONNECT_INTERVAL: Duration = Duration::from_millis(2);

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
pub(super) enum ApiError {
    /// Nobody answers on the socket, or not in HTTP.
    #[error("cannot talk to Firecracker: {0}")]
    Unreachable(String),
    /// Firecracker took longer than it may.
    #[error("Firecracker did not answer within {} s", .0.as_secs())]
    Timeout(Duration),
    /// Firecracker refused.
    #[error("Firecracker refused with status {status}: {fault}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// Why, in its own words.
        fault: String,
    },
}

impl ApiError {
    /// The error of the seam, for this request.
    fn of(self, request: &str) -> VmmError {
        VmmError::Control { operation: request.to_owned(), message: self.to_string() }
    }
}

/// The API of one Firecracker.
#[derive(Debug, Clone)]
pub(super) struct Api {
    socket: PathBuf,
    limit: Duration,
}

impl Api {
    /// The API on this socket; each request has this much time.
    pub(super) fn new(socket: PathBuf, limit: Duration) -> Self {
        Self { socket, limit }
    }

    /// Waits until somebody listens.
    pub(super) async fn wait_until_up(&self, limit: Duration) -> Result<(), VmmError> {
        let deadline = Instant::now() + limit;
        loop {
            match unix_socket::connect(&self.socket).await {
                Ok(_) => return Ok(()),
                Err(_) if Instant::now() < deadline => sleep(CONNECT_INTERVAL).await,
                Err(error) => {
                    return Err(ApiError::Unreachable(with_source(&error)).of("start Firecracker"));
                }
            }
        }
    }

    /// Has something changed, set or started.
    pub(super) async fn make(&self, change: &Change) -> Result<(), VmmError> {
        let (method, path) = (change.method(), change.path());
        let made = async {
            let unsendable =
                |error: &dyn std::error::Error| ApiError::Unreachable(with_source(error));
            let body = serde_json::to_vec(change).map_err(|error| unsendable(&error))?;
            let verb = method.parse().map_err(|error: InvalidMethod| unsendable(&error))?;
            self.send(verb, &path, body.into()).await
        };
        made.await.map(drop).map_err(|error| error.of(&format!("{method} {path}")))
    }

    /// Reads something.
    pub(super) async fn get<T: for<'a> Deserialize<'a>>(&self, path: &str) -> Result<T, VmmError> {
        self.try_get(path).await.map_err(|error| error.of(&format!("GET {path}")))
    }

    /// Reads what not every microVM has; `None` if Firecracker says that this one does not.
    pub(super) async fn get_if_any<T: for<'a> Deserialize<'a>>(
        &self,
        path: &str,
    ) -> Result<Option<T>, VmmError> {
        match self.try_get(path).await {
            Ok(answer) => Ok(Some(answer)),
            Err(ApiError::Refused { .. }) => Ok(None),
            Err(error) => Err(error.of(&format!("GET {path}"))),
        }
    }

    async fn try_get<T: for<'a> Deserialize<'a>>(&self, path: &str) -> Result<T, ApiError> {
        let bytes = self.send(Method::GET, path, Bytes::new()).await?;
        serde_json::from_slice(&bytes).map_err(|error| ApiError::Unreachable(error.to_string()))
    }

    async fn send(&self, method: Method, path: &str, body: Bytes) -> Result<Bytes, ApiError> {
        timeout(self.limit, exchange(&self.socket, method, path, body))
            .await
            .map_err(|_| ApiError::Timeout(self.limit))?
    }
}

async fn exchange(
    socket: &Path,
    method: Method,
    path: &str,
    body: Bytes,
) -> Result<Bytes, ApiError> {
    let unreachable = |error: &dyn std::error::Error| ApiError::Unreachable(with_source(error));
    let stream = unix_socket::connect(socket).await.map_err(|error| unreachable(&error))?;
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|error| unreachable(&error))?;
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, "localhost")
        .header(header::ACCEPT, "application/json")
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(body))
        .map_err(|error| unreachable(&error))?;
    let answer = async {
        let response = sender.send_request(request).await.map_err(|error| unreachable(&error))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_LIMIT).collect().await;
        let body = body.map_err(|error| ApiError::Unreachable(error.to_string()))?;
        Ok((status, body.to_bytes()))
    };
    tokio::pin!(answer);
    // The connection is driven until the answer is complete, and closed then. If it ends first, the
    // answer has come with its end, or knows why there is none.
    let (status, body) = tokio::select! {
        biased;
        answer = &mut answer => answer?,
        _ = connection => answer.await?,
    };
    match status {
        StatusCode::OK | StatusCode::NO_CONTENT => Ok(body),
        status => Err(ApiError::Refused { status: status.as_u16(), fault: fault_of(&body) }),
    }
}

/// What Firecracker says about a refusal.
fn fault_of(body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Fault {
        fault_message: String,
    }
    match serde_json::from_slice::<Fault>(body) {
        Ok(fault) => fault.fault_message,
        Err(_) => String::from_utf8_lossy(body).trim().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mvm_core::firecracker::{VmState, WantedState};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// Answers one request with these bytes, and returns what was asked.
    async fn answered(answer: &'static [u8]) -> (Result<(), VmmError>, String) {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("api.sock");
        let listener = unix_socket::bind(&socket).unwrap();
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = Vec::new();
            while !asked.ends_with(b"}") {
                let mut buffer = [0; 512];
                let read = stream.read(&mut buffer).await.unwrap();
                asked.extend_from_slice(&buffer[..read]);
            }
            stream.write_all(answer).await.unwrap();
            String::from_utf8(asked).unwrap()
        };
        let api = Api::new(socket, Duration::from_secs(5));
        let pause = Change::State(VmState { state: WantedState::Paused });
        tokio::join!(api.make(&pause), server)
    }

    #[tokio::test]
    async fn a_request_is_complete_and_its_success_is_seen() {
        let (result, asked) = answered(b"HTTP/1.1 204 \r\nServer: Firecracker API\r\n\r\n").await;
        result.unwrap();
        assert!(asked.starts_with("PATCH /vm HTTP/1.1\r\n"), "{asked}");
        assert!(asked.to_lowercase().contains("content-length: 18\r\n"), "{asked}");
        assert!(asked.ends_with("\r\n\r\n{\"state\":\"Paused\"}"), "{asked}");
    }

    #[tokio::test]
    async fn a_refusal_is_told_in_firecracker_s_own_words() {
        let (result, _) = answered(
            b"HTTP/1.1 400 \r\nContent-Length: 33\r\n\r\n{\"fault_message\":\"no such state\"}",
        )
        .await;
        let error = result.unwrap_err().to_string();
        assert_eq!(error, "PATCH /vm: Firecracker refused with status 400: no such state");
    }

    #[tokio::test]
    async fn an_answer_that_is_cut_or_no_http_is_an_error() {
        for answer in [&b""[..], b"HTTP/1.1 200 \r\nContent-Length: 9\r\n\r\n{", b"hello\r\n\r\n"] {
            let (result, _) = answered(answer).await;
            let error = result.unwrap_err().to_string();
            assert!(error.starts_with("PATCH /vm: cannot talk to Firecracker"), "{error}");
        }
    }
}
