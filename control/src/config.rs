//! The config file: read once, checked, and then only typed values.

use holdfast_shared::auth::MacPolicy;
use holdfast_shared::state::{Limits as AuthorityLimits, rules::Right};
use holdfast_shared::types::VOLUME_NAME_BYTES_MAX;
use serde::Deserialize;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What is wrong with a config file.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not TOML, has an unknown field, or a value of the wrong kind.
    #[error("{path}: {source}")]
    Form {
        /// The file.
        path: PathBuf,
        /// Where and what.
        source: Box<toml::de::Error>,
    },
    /// A value is not possible.
    #[error("{path}: {problem}")]
    Value {
        /// The file.
        path: PathBuf,
        /// Which value, and why.
        problem: String,
    },
}

/// Control's config. Unknown fields are refused. Relative paths are relative to the file's own directory.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Addresses to listen on. Port 0 takes any free one. Default: `["127.0.0.1:7700"]`.
    pub listen: Vec<SocketAddr>,
    /// Where secrets and sockets are kept; made with mode 0700 if it is missing. Default: `state`.
    pub state_dir: PathBuf,
    /// Certificates.
    pub tls: Tls,
    /// How much there may be of everything.
    pub limits: Limits,
    /// The volumes. None by default.
    #[serde(rename = "volume")]
    pub volumes: Vec<Volume>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: vec![SocketAddr::from(([127, 0, 0, 1], 7700))],
            state_dir: "state".into(),
            tls: Tls::default(),
            limits: Limits::default(),
            volumes: Vec::new(),
        }
    }
}

/// PEM files.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tls {
    /// The server's certificate chain. Default: `pki/server.pem`.
    pub certificate: PathBuf,
    /// Its private key. Default: `pki/server.key`.
    pub key: PathBuf,
    /// The authorities whose client certificates are taken. Default: `pki/ca.pem`.
    pub client_ca: PathBuf,
}

impl Default for Tls {
    fn default() -> Self {
        Self {
            certificate: "pki/server.pem".into(),
            key: "pki/server.key".into(),
            client_ca: "pki/ca.pem".into(),
        }
    }
}

/// Limits. A request beyond one is refused with `TooMany`; a connection beyond one is closed.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Sessions in all. Default: 4096.
    pub sessions: usize,
    /// Sessions of one principal. Default: 1024.
    pub sessions_per_principal: usize,
    /// Opens in all. Default: 262144.
    pub opens: usize,
    /// Opens of one principal. Default: 131072.
    pub opens_per_principal: usize,
    /// Opens of one session. Default: 65536.
    pub opens_per_session: usize,
    /// Bindings of one open. Default: 64.
    pub bindings_per_open: usize,
    /// Operations under way in the file system. Default: 1024.
    pub operations: usize,
    /// The same, of one principal. Default: 256.
    pub operations_per_principal: usize,
    /// Threads for them. Default: 16.
    pub file_threads: usize,
    /// Requests of one session under way; the next is read when one is answered. Default: 32.
    pub requests_per_session: usize,
    /// Bind requests from dataplane under way. Default: 256.
    pub binds: usize,
    /// Connections whose handshake is not finished. The oldest is closed for a newer one. Default: 128.
    pub half_open_handshakes: usize,
    /// The same, from one IPv4 address or IPv6 /64 network; more are closed. Default: 32.
    pub half_open_per_address: usize,
    /// Time for a handshake, hello included, milliseconds. Default: 10000.
    pub handshake_ms: u64,
    /// Time for a peer to send the rest of a message it has begun, or to take an answer, milliseconds.
    /// Default: 30000.
    pub message_ms: u64,
    /// How long a connection may be silent before the kernel asks whether the peer is there, seconds. Default: 30.
    pub keepalive_s: u64,
    /// Time for dataplane to confirm a fence before the operator is told, milliseconds. Default: 10000.
    pub fence_wait_ms: u64,
    /// Time for opens to be fenced and closed at a clean stop, milliseconds. Default: 3000.
    pub stop_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        let authority = AuthorityLimits::default();
        Self {
            sessions: authority.sessions,
            sessions_per_principal: authority.sessions_per_principal,
            opens: authority.opens,
            opens_per_principal: authority.opens_per_principal,
            opens_per_session: authority.opens_per_session,
            bindings_per_open: authority.bindings_per_open,
            operations: authority.operations,
            operations_per_principal: authority.operations_per_principal,
            file_threads: 16,
            requests_per_session: 32,
            binds: 256,
            half_open_handshakes: 128,
            half_open_per_address: 32,
            handshake_ms: 10_000,
            message_ms: 30_000,
            keepalive_s: 30,
            fence_wait_ms: 10_000,
            stop_ms: 3_000,
        }
    }
}

impl Limits {
    /// Those that the authority keeps.
    pub fn authority(&self) -> AuthorityLimits {
        AuthorityLimits {
            sessions: self.sessions,
            sessions_per_principal: self.sessions_per_principal,
            opens: self.opens,
            opens_per_principal: self.opens_per_principal,
            opens_per_session: self.opens_per_session,
            bindings_per_open: self.bindings_per_open,
            operations: self.operations,
            operations_per_principal: self.operations_per_principal,
            fence_wait: Duration::from_millis(self.fence_wait_ms),
        }
    }
}

/// A directory that is served.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Volume {
    /// Its name, 1 to 64 bytes, without `/`, `:` and control characters.
    pub name: String,
    /// The directory; it must be there.
    pub directory: PathBuf,
    /// Its id, 32 hex digits. Give one to keep resume keys good when the volume is renamed. Default: made from the
    /// cluster's id and the name.
    #[serde(default)]
    pub id: Option<String>,
    /// What protects frames and payloads of its channels: `header`, `payload`, `sealed`, or `none` (private
    /// networks only). Default: `header`.
    #[serde(default)]
    pub mac_policy: Policy,
    /// Who may use it. Nobody by default.
    #[serde(default, rename = "grant")]
    pub grants: Vec<Grant>,
}

/// See [`Volume::mac_policy`].
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// Nothing.
    None,
    /// A MAC over each frame.
    #[default]
    Header,
    /// And a digest of the payload.
    Payload,
    /// And the payload encrypted.
    Sealed,
}

impl From<Policy> for MacPolicy {
    fn from(policy: Policy) -> Self {
        match policy {
            Policy::None => Self::None,
            Policy::Header => Self::Header,
            Policy::Payload => Self::Payload,
            Policy::Sealed => Self::Sealed,
        }
    }
}

/// A principal's right on a volume.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grant {
    /// As in its certificate: first DNS name, URI or e-mail address of the SAN, else the CN.
    pub principal: String,
    /// `read` or `read-write`.
    pub access: GrantAccess,
}

/// See [`Grant::access`].
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GrantAccess {
    /// Read files, list directories.
    Read,
    /// Everything.
    ReadWrite,
}

impl From<GrantAccess> for Right {
    fn from(access: GrantAccess) -> Self {
        match access {
            GrantAccess::Read => Self::Read,
            GrantAccess::ReadWrite => Self::ReadWrite,
        }
    }
}

impl Config {
    /// Reads and checks a config file.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let mut config: Self = toml::from_str(&text)
            .map_err(|source| ConfigError::Form { path: path.to_owned(), source: Box::new(source) })?;
        let base = path.parent().unwrap_or(Path::new("."));
        config.resolve(base);
        config.check().map_err(|problem| ConfigError::Value { path: path.to_owned(), problem })?;
        Ok(config)
    }

    fn resolve(&mut self, base: &Path) {
        let tls = &mut self.tls;
        let files = [&mut self.state_dir, &mut tls.certificate, &mut tls.key, &mut tls.client_ca];
        for path in files.into_iter().chain(self.volumes.iter_mut().map(|v| &mut v.directory)) {
            *path = base.join(&*path);
        }
    }

    fn check(&self) -> Result<(), String> {
        if self.listen.is_empty() {
            return Err("listen: at least one address is needed".into());
        }
        let limits = &self.limits;
        let counts = [
            ("sessions", limits.sessions),
            ("sessions_per_principal", limits.sessions_per_principal),
            ("opens", limits.opens),
            ("opens_per_principal", limits.opens_per_principal),
            ("opens_per_session", limits.opens_per_session),
            ("bindings_per_open", limits.bindings_per_open),
            ("operations", limits.operations),
            ("operations_per_principal", limits.operations_per_principal),
            ("file_threads", limits.file_threads),
            ("requests_per_session", limits.requests_per_session),
            ("binds", limits.binds),
            ("half_open_handshakes", limits.half_open_handshakes),
            ("half_open_per_address", limits.half_open_per_address),
        ];
        if let Some((name, _)) = counts.iter().find(|(_, count)| *count == 0 || *count > 1 << 24) {
            return Err(format!("limits.{name}: must be between 1 and 16777216"));
        }
        if limits.keepalive_s == 0 || limits.keepalive_s > 32_767 {
            return Err("limits.keepalive_s: must be between 1 and 32767".into());
        }
        for (name, ms) in [
            ("handshake_ms", limits.handshake_ms),
            ("message_ms", limits.message_ms),
            ("fence_wait_ms", limits.fence_wait_ms),
        ] {
            if ms == 0 || ms > 3_600_000 {
                return Err(format!("limits.{name}: must be between 1 and 3600000"));
            }
        }
        let mut names = BTreeSet::new();
        for volume in &self.volumes {
            let name = &volume.name;
            let bad = |c: char| c == '/' || c == ':' || c.is_control();
            if name.is_empty() || name.len() > VOLUME_NAME_BYTES_MAX || name.contains(bad) {
                return Err(format!(
                    "volume {name:?}: a name has 1 to {VOLUME_NAME_BYTES_MAX} bytes, none of them '/', ':' or control"
                ));
            }
            if !names.insert(name) {
                return Err(format!("volume {name:?} is there twice"));
            }
            if !volume.directory.is_dir() {
                return Err(format!("volume {name:?}: {} is not a directory", volume.directory.display()));
            }
            volume.id_bytes()?;
            let mut principals = BTreeSet::new();
            for grant in &volume.grants {
                if grant.principal.is_empty() || !principals.insert(&grant.principal) {
                    return Err(format!(
                        "volume {name:?}: principal {:?} is empty or there twice",
                        grant.principal
                    ));
                }
            }
        }
        Ok(())
    }
}

impl Volume {
    /// The id, if it is given.
    ///
    /// # Errors
    /// If it is not 32 hex digits.
    pub fn id_bytes(&self) -> Result<Option<[u8; 16]>, String> {
        let Some(text) = &self.id else { return Ok(None) };
        let problem = || format!("volume {:?}: id must be 32 hex digits", self.name);
        if text.len() != 32 || !text.is_ascii() {
            return Err(problem());
        }
        let mut id = [0; 16];
        for (i, byte) in id.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).map_err(|_| problem())?;
        }
        Ok(Some(id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Config, String> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("data")).unwrap();
        let path = dir.path().join("control.toml");
        std::fs::write(&path, text).unwrap();
        Config::load(&path).map_err(|error| error.to_string())
    }

    #[test]
    fn an_empty_file_is_the_defaults() {
        let config = load("").unwrap();
        assert_eq!(config.listen[0].port(), 7700);
        assert!(config.state_dir.ends_with("state") && config.state_dir.is_absolute());
    }

    #[test]
    fn a_volume_with_grants() {
        let text = "[[volume]]\nname='data'\ndirectory='data'\nmac_policy='sealed'\n\
                    [[volume.grant]]\nprincipal='client'\naccess='read-write'\n";
        let config = load(text).unwrap();
        assert_eq!(MacPolicy::from(config.volumes[0].mac_policy), MacPolicy::Sealed);
        assert_eq!(Right::from(config.volumes[0].grants[0].access), Right::ReadWrite);
    }

    #[test]
    fn mistakes_are_named() {
        for (text, word) in [
            ("lisen = []", "lisen"),
            ("listen = []", "listen"),
            ("[limits]\nopens = 0", "limits.opens"),
            ("[limits]\nopen = 1", "open"),
            ("[[volume]]\nname='a/b'\ndirectory='data'", "a/b"),
            ("[[volume]]\nname='a'\ndirectory='nowhere'", "nowhere"),
            ("[[volume]]\nname='a'\ndirectory='data'\nmac_policy='strong'", "strong"),
            ("[[volume]]\nname='a'\ndirectory='data'\nid='xyz'", "32 hex"),
            ("[[volume]]\nname='a'\ndirectory='data'\n[[volume]]\nname='a'\ndirectory='data'", "twice"),
        ] {
            let error = load(text).unwrap_err();
            assert!(error.contains(word), "{error}");
            assert!(error.contains("control.toml"), "{error}");
        }
    }
}
