//! The one TLS provider of the process, for whoever talks to registries and mirrors.

use std::sync::Once;

/// Sets it, unless it is set: whoever comes first sets the same one.
pub(crate) fn ensure_provider() {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| drop(rustls::crypto::ring::default_provider().install_default()));
}
