//! The config file: read once, checked, and then only typed values.

use crate::journal::Settings;
use holdfast_shared::auth::MacPolicy;
use holdfast_shared::state::lock::LockLimits;
use holdfast_shared::state::{Limits as AuthorityLimits, LockMode, Right};
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
    /// The journal: what outlives a crash.
    pub journal: Journal,
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
            journal: Journal::default(),
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

/// The journal: every open and lock is in it before its client is told.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Journal {
    /// Where it is kept; made with mode 0700 if it is missing. Put it on storage that is quick to sync: every open and lock
    /// waits for one. Default: `journal` in the state directory.
    pub directory: Option<PathBuf>,
    /// Wait for the disk before anything is promised. **Unsafe to switch off**: after a power cut or a crash of the kernel,
    /// opens, locks and closes that were answered are forgotten, and clients may read or write what they must not. It is
    /// there to measure what the waiting costs. Default: true.
    pub sync: bool,
    /// The journal is rewritten, without what is over, when it has grown beyond this, and beyond twice what the last
    /// rewriting took, MiB. Default: 64.
    pub checkpoint_mib: u32,
}

impl Default for Journal {
    fn default() -> Self {
        let Settings { sync, checkpoint_mib } = Settings::default();
        Self { directory: None, sync, checkpoint_mib }
    }
}

impl Journal {
    /// As the journal takes them.
    pub const fn settings(&self) -> Settings {
        Settings { sync: self.sync, checkpoint_mib: self.checkpoint_mib }
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
    /// Bindings of one open, at most 1024: those that outlive a resume stand in one record of the journal. Default: 64.
    pub bindings_per_open: usize,
    /// Operations under way in the file system. Default: 1024.
    pub operations: usize,
    /// The same, of one principal. Default: 256.
    pub operations_per_principal: usize,
    /// How long the bindings of a detached open go on, milliseconds: a client that is back sooner has lost no read or write.
    /// Default: 5000.
    pub linger_ms: u64,
    /// Opens that ended without their client's wish and of which it can still be told; the oldest is forgotten first.
    /// Default: 65536.
    pub tombstones: usize,
    /// How long that is, seconds; it counts anew at each start of the server, as hold times do. Default: 604800, a week.
    pub tombstone_keep_s: u64,
    /// Locks of one request, at most 1024: they stand in one record of the journal. Default: 64.
    pub locks_per_request: usize,
    /// Locks of one open, at most 1024: they stand in one record of the journal. Default: 512.
    pub locks_per_open: usize,
    /// Locks of one file, and locks waited for on it. Default: 1024.
    pub locks_per_file: usize,
    /// Requests that wait for locks of one file. Default: 256.
    pub lock_waiters_per_file: usize,
    /// The longest that a request for a lock, or for a file that is held, may ask to wait, milliseconds.
    /// Default: 600000.
    pub wait_max_ms: u64,
    /// Requests that wait for a file that is held. Default: 4096.
    pub waiting_opens: usize,
    /// The same, of one principal. Default: 1024.
    pub waiting_opens_per_principal: usize,
    /// Descriptors of volumes' files that a restart takes back. Opens beyond them are found and looked at before anybody is let
    /// in, but kept by their file's handle alone until their client resumes them. What that gives up: a file that is removed
    /// beside the server in between is lost, where a descriptor would have kept it. Default: 0, which means three
    /// quarters of what the process may have (`ulimit -Hn`, systemd's `LimitNOFILE`).
    pub reopened_files: usize,
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
    /// Time for what is under way to be journalled at a clean stop, milliseconds. Default: 3000.
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
            linger_ms: 5_000,
            tombstones: authority.tombstones,
            tombstone_keep_s: 7 * 24 * 3600,
            locks_per_request: authority.locks.batch,
            locks_per_open: authority.locks.per_open,
            locks_per_file: authority.locks.per_file,
            lock_waiters_per_file: authority.locks.waiters_per_file,
            wait_max_ms: 600_000,
            waiting_opens: authority.contenders,
            waiting_opens_per_principal: authority.contenders_per_principal,
            reopened_files: 0,
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
            linger: Duration::from_millis(self.linger_ms),
            tombstones: self.tombstones,
            tombstone_keep: Duration::from_secs(self.tombstone_keep_s),
            locks: LockLimits {
                batch: self.locks_per_request,
                per_open: self.locks_per_open,
                per_file: self.locks_per_file,
                waiters_per_file: self.lock_waiters_per_file,
            },
            lock_wait_max: Duration::from_millis(self.wait_max_ms),
            open_wait_max: Duration::from_millis(self.wait_max_ms),
            contenders: self.waiting_opens,
            contenders_per_principal: self.waiting_opens_per_principal,
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
    /// How long a detached open is held for a client that does not ask for a time, milliseconds; 0 closes it with its
    /// session. Default: 60000.
    #[serde(default = "hold_ms")]
    pub hold_ms: u64,
    /// The longest that a client may ask for, milliseconds. Default: 86400000, a day.
    #[serde(default = "hold_max_ms")]
    pub hold_max_ms: u64,
    /// `mandatory`: locks restrict every read and write. `advisory`: they exclude only each other. Default: `mandatory`.
    #[serde(default)]
    pub locks: Locks,
    /// Who may use it. Nobody by default.
    #[serde(default, rename = "grant")]
    pub grants: Vec<Grant>,
}

const fn hold_ms() -> u64 {
    60_000
}

const fn hold_max_ms() -> u64 {
    86_400_000
}

/// See [`Volume::locks`].
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Locks {
    /// They restrict every read and write.
    #[default]
    Mandatory,
    /// They exclude only each other.
    Advisory,
}

impl From<Locks> for LockMode {
    fn from(locks: Locks) -> Self {
        match locks {
            Locks::Mandatory => Self::Mandatory,
            Locks::Advisory => Self::Advisory,
        }
    }
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

    /// Where the journal is.
    pub fn journal_directory(&self) -> PathBuf {
        self.journal.directory.clone().unwrap_or_else(|| self.state_dir.join("journal"))
    }

    fn resolve(&mut self, base: &Path) {
        let tls = &mut self.tls;
        let files = [&mut self.state_dir, &mut tls.certificate, &mut tls.key, &mut tls.client_ca];
        for path in files.into_iter().chain(self.volumes.iter_mut().map(|v| &mut v.directory)) {
            *path = base.join(&*path);
        }
        if let Some(directory) = &mut self.journal.directory {
            *directory = base.join(&*directory);
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
            ("tombstones", limits.tombstones),
            ("locks_per_request", limits.locks_per_request),
            ("locks_per_open", limits.locks_per_open),
            ("locks_per_file", limits.locks_per_file),
            ("lock_waiters_per_file", limits.lock_waiters_per_file),
            ("waiting_opens", limits.waiting_opens),
            ("waiting_opens_per_principal", limits.waiting_opens_per_principal),
        ];
        if let Some((name, _)) = counts.iter().find(|(_, count)| *count == 0 || *count > 1 << 24) {
            return Err(format!("limits.{name}: must be between 1 and 16777216"));
        }
        for (name, count) in [
            ("bindings_per_open", limits.bindings_per_open),
            ("locks_per_request", limits.locks_per_request),
            ("locks_per_open", limits.locks_per_open),
        ] {
            if count > 1024 {
                return Err(format!("limits.{name}: must be at most 1024, as they stand in one record"));
            }
        }
        if limits.keepalive_s == 0 || limits.keepalive_s > 32_767 {
            return Err("limits.keepalive_s: must be between 1 and 32767".into());
        }
        for (name, ms) in [
            ("handshake_ms", limits.handshake_ms),
            ("message_ms", limits.message_ms),
            ("fence_wait_ms", limits.fence_wait_ms),
            ("wait_max_ms", limits.wait_max_ms),
        ] {
            if ms == 0 || ms > 3_600_000 {
                return Err(format!("limits.{name}: must be between 1 and 3600000"));
            }
        }
        if limits.linger_ms > 3_600_000 {
            return Err("limits.linger_ms: must be at most 3600000".into());
        }
        if self.journal.checkpoint_mib == 0 {
            return Err("journal.checkpoint_mib: must be at least 1".into());
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
            if volume.hold_ms > volume.hold_max_ms {
                return Err(format!("volume {name:?}: hold_ms must be at most hold_max_ms"));
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
        assert!(config.journal_directory().ends_with("state/journal") && config.journal.sync);
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
            ("[limits]\nwait_max_ms = 0", "limits.wait_max_ms"),
            ("[limits]\nlocks_per_open = 1025", "limits.locks_per_open"),
            ("[limits]\nbindings_per_open = 1025", "limits.bindings_per_open"),
            ("[journal]\ncheckpoint_mib = 0", "journal.checkpoint_mib"),
            ("[journal]\nsyncs = true", "syncs"),
            ("[[volume]]\nname='a'\ndirectory='data'\nhold_ms=2\nhold_max_ms=1", "hold_ms"),
            ("[[volume]]\nname='a'\ndirectory='data'\nlocks='none'", "none"),
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
