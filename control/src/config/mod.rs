//! The config file: read once, checked, and then only typed values.

mod limits;
mod volume;

pub use limits::Limits;
pub use volume::{Grant, GrantAccess, Locks, Policy, Volume};

use crate::journal::Settings;
use serde::Deserialize;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

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
        self.limits.check()?;
        if self.journal.checkpoint_mib == 0 {
            return Err("journal.checkpoint_mib: must be at least 1".into());
        }
        let mut names = BTreeSet::new();
        for volume in &self.volumes {
            volume.check()?;
            let name = &volume.name;
            // Its clients could read what proves keys and certificates, or write it.
            let own = [&self.state_dir, &self.tls.key, &self.journal_directory()];
            if let Some(path) = own.into_iter().find(|path| is_beneath(path, &volume.directory)) {
                return Err(format!(
                    "volume {name:?}: {} is the server's own, and must not be in it",
                    path.display()
                ));
            }
            // Direct writes leave pages behind that a cached volume may have mapped or pinned.
            let other = self.volumes.iter().find(|other| {
                other.is_direct() != volume.is_direct() && is_beneath(&other.directory, &volume.directory)
            });
            if let Some(other) = other {
                return Err(format!(
                    "volumes {name:?} and {:?} have files in common, and only one of them file_io = \"direct\"",
                    other.name
                ));
            }
            if !names.insert(name) {
                return Err(format!("volume {name:?} is there twice"));
            }
        }
        Ok(())
    }
}

/// True if a path, as far as it exists, leads into the directory.
fn is_beneath(path: &Path, directory: &Path) -> bool {
    let there = path.ancestors().find_map(|path| path.canonicalize().ok());
    let directory = directory.canonicalize();
    there.zip(directory.ok()).is_some_and(|(there, directory)| there.starts_with(directory))
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_shared::auth::MacPolicy;
    use holdfast_shared::state::Right;

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
        assert!(!config.volumes[0].gives_descriptors());
    }

    #[test]
    fn descriptors_are_given_of_immutable_volumes_and_where_the_operator_says_so() {
        for (settings, given) in [
            ("immutable=true", true),
            ("local_descriptors=true", true),
            ("immutable=true\nlocal_descriptors=false", false),
        ] {
            let config = load(&format!("[[volume]]\nname='data'\ndirectory='data'\n{settings}\n")).unwrap();
            assert_eq!(config.volumes[0].gives_descriptors(), given, "{settings}");
        }
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
            ("[[volume]]\nname='a'\ndirectory='.'", "server's own"),
            ("state_dir = 'data/../data/state'\n[[volume]]\nname='a'\ndirectory='data'", "server's own"),
            ("[journal]\ndirectory = 'data'\n[[volume]]\nname='a'\ndirectory='data'", "server's own"),
            ("[tls]\nkey = 'data/server.key'\n[[volume]]\nname='a'\ndirectory='data'", "server's own"),
            ("[[volume]]\nname='a'\ndirectory='data'\nid='xyz'", "32 hex"),
            (
                "[[volume]]\nname='a'\ndirectory='data'\n[[volume]]\nname='b'\ndirectory='data'\nfile_io='direct'",
                "only one of them",
            ),
            ("[[volume]]\nname='a'\ndirectory='data'\nfile_io='fast'", "fast"),
            ("[[volume]]\nname='a'\ndirectory='data'\n[[volume]]\nname='a'\ndirectory='data'", "twice"),
        ] {
            let error = load(text).unwrap_err();
            assert!(error.contains(word), "{error}");
            assert!(error.contains("control.toml"), "{error}");
        }
    }
}
