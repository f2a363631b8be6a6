//! Why a registry does not give an image.

use std::io;
use std::path::PathBuf;

use oci_client::errors::{OciDistributionError, OciErrorCode};

/// Why a registry does not give an image.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The registry cannot be reached.
    #[error("cannot pull {image}: registry {registry} cannot be reached: {problem}")]
    Unreachable {
        /// The image.
        image: String,
        /// The registry or mirror.
        registry: String,
        /// Why.
        problem: String,
    },
    /// The registry stopped answering.
    #[error("cannot pull {image}: registry {registry} sent nothing for {seconds} s")]
    Stalled {
        /// The image.
        image: String,
        /// The registry or mirror.
        registry: String,
        /// How long was waited.
        seconds: u64,
    },
    /// The registry wants to know who asks, or refuses who asks.
    #[error(
        "cannot pull {image}: registry {registry} refuses, as the image needs other credentials or does not exist; the agent looked for credentials in {files}: log in with `docker login {registry}` as the agent's user"
    )]
    Unauthorized {
        /// The image.
        image: String,
        /// The registry or mirror.
        registry: String,
        /// Where credentials were looked for.
        files: String,
    },
    /// The registry has no such image.
    #[error("cannot pull {image}: registry {registry} has no such image")]
    NotFound {
        /// The image.
        image: String,
        /// The registry or mirror.
        registry: String,
    },
    /// The registry allows no more requests for now.
    #[error("cannot pull {image}: registry {registry} allows no more requests for now: {problem}")]
    TooManyRequests {
        /// The image.
        image: String,
        /// The registry or mirror.
        registry: String,
        /// What it says.
        problem: String,
    },
    /// The registry does not send what it promised.
    #[error("cannot pull {image}: registry {registry} {problem}")]
    Broken {
        /// The image.
        image: String,
        /// The registry or mirror.
        registry: String,
        /// What it does.
        problem: String,
    },
    /// The configuration of registries makes no sense.
    #[error("{path} is not a usable configuration of registries: {problem}")]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The credentials for a registry cannot be had.
    #[error("cannot get the credentials for registry {registry}: {problem}")]
    Credentials {
        /// The registry.
        registry: String,
        /// Why.
        problem: String,
    },
}

impl RegistryError {
    /// Sorts a client's failure.
    pub(super) fn new(
        image: &str,
        registry: &str,
        files: &str,
        error: &OciDistributionError,
    ) -> Self {
        use OciDistributionError as E;
        let (image, registry) = (image.to_owned(), registry.to_owned());
        let unauthorized =
            |image, registry| Self::Unauthorized { image, registry, files: files.to_owned() };
        let broken = |image, registry, problem: String| Self::Broken { image, registry, problem };
        match error {
            E::UnauthorizedError { .. } | E::AuthenticationFailure(_) => {
                unauthorized(image, registry)
            }
            E::RegistryError { envelope, .. } => {
                let first = envelope.errors.first();
                let message = first.map(|error| error.message.clone()).unwrap_or_default();
                match first.map(|error| &error.code) {
                    Some(OciErrorCode::Unauthorized | OciErrorCode::Denied) => {
                        unauthorized(image, registry)
                    }
                    Some(
                        OciErrorCode::ManifestUnknown
                        | OciErrorCode::NameUnknown
                        | OciErrorCode::NotFound
                        | OciErrorCode::BlobUnknown
                        | OciErrorCode::ManifestBlobUnknown,
                    ) => Self::NotFound { image, registry },
                    Some(OciErrorCode::Toomanyrequests) => {
                        Self::TooManyRequests { image, registry, problem: message }
                    }
                    _ => broken(image, registry, format!("answers: {}", brief(&message))),
                }
            }
            E::ServerError { code: 404, .. } => Self::NotFound { image, registry },
            E::ServerError { code: 401 | 403, .. } => unauthorized(image, registry),
            E::ServerError { code: 429, message, .. } => {
                Self::TooManyRequests { image, registry, problem: brief(message) }
            }
            E::ServerError { code, message, .. } => {
                broken(image, registry, format!("answers with status {code}: {}", brief(message)))
            }
            E::RequestError(error) => {
                Self::Unreachable { image, registry, problem: innermost(error) }
            }
            E::DigestError(error) => broken(image, registry, format!("lies: {error}")),
            error => broken(image, registry, format!("gives a wrong answer: {error}")),
        }
    }
}

/// The first words of what a server says; some answer with whole pages.
fn brief(text: &str) -> String {
    const MOST: usize = 200;
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

/// The cause that says most, at the end of the chain.
pub(super) fn innermost(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

/// Whether it is about time that has run out.
pub(super) fn is_timeout(error: &(dyn std::error::Error + 'static)) -> bool {
    // An I/O error tells the source of what it wraps, and not that itself.
    let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    let next = match wrapped {
        Some(wrapped) => Some(wrapped as &(dyn std::error::Error + 'static)),
        None => error.source(),
    };
    error.downcast_ref::<reqwest::Error>().is_some_and(reqwest::Error::is_timeout)
        || next.is_some_and(is_timeout)
}
