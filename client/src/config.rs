//! `client.toml`, typed: parsed once, unknown fields refused, everything defaulted.

use crate::error::{Error, Result};
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How data channels are carried.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// The server's Unix socket where the client runs on its host, else RDMA verbs where both sides have it, else TCP.
    #[default]
    Auto,
    /// The server's Unix socket, on its host, or an error.
    Local,
    /// RDMA verbs or an error.
    Verbs,
    /// TCP.
    Tcp,
}

impl std::str::FromStr for Transport {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "local" => Ok(Self::Local),
            "verbs" => Ok(Self::Verbs),
            "tcp" => Ok(Self::Tcp),
            other => Err(format!("'{other}' is not a transport; choose auto, local, verbs or tcp")),
        }
    }
}

/// What happens when the server goes away.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recovery {
    /// Whoever needs the server waits until it is back, however long that takes.
    #[default]
    Hard,
    /// Whoever needs the server waits for `soft_ms` and then gets [`Error::TimedOut`]. The session goes on trying.
    Soft,
}

/// Whether reads of a file that is hot become one-sided by themselves.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OneSided {
    /// Over verbs, where the server allows it (`[map]` in its `dataplane.toml`): what is read several times over, and hardly
    /// written, is mapped in the background and then read with no work for the server. See [`crate::Mapping`] for what is seen.
    #[default]
    Auto,
    /// Only what [`crate::Binding::map`] maps.
    Off,
}

impl std::str::FromStr for OneSided {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            other => Err(format!("'{other}' is neither auto nor off")),
        }
    }
}

/// The files that prove who the client is, and tell it whom to trust.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// Certificates (PEM) of the authorities that may have signed the server's.
    pub ca: PathBuf,
    /// The client's certificate chain (PEM), its own first.
    pub certificate: PathBuf,
    /// The client's private key (PEM).
    pub key: PathBuf,
}

/// Everything a client needs to reach a server.
///
/// ```
/// let config = holdfast_client::Config::parse(
///     r#"
///     server = "10.0.0.7:7700"
///     server_name = "files.example"
///     transport = "tcp"
///     [tls]
///     ca = "pki/ca.pem"
///     certificate = "pki/client.pem"
///     key = "pki/client.key"
///     "#,
///     "/etc/holdfast/client.toml".as_ref(),
/// )
/// .unwrap();
/// assert_eq!(config.tls.ca, std::path::Path::new("/etc/holdfast/pki/ca.pem"));
/// ```
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where control listens: `address:port` or `host:port`.
    #[serde(default = "default_server")]
    pub server: String,
    /// The name that the server's certificate must carry.
    #[serde(default = "default_server_name")]
    pub server_name: String,
    /// How data channels are carried.
    #[serde(default)]
    pub transport: Transport,
    /// Whether reads of a file that is hot become one-sided by themselves.
    #[serde(default)]
    pub one_sided: OneSided,
    /// Longest wait for a connection, milliseconds.
    #[serde(default = "default_connect_ms_max")]
    pub connect_ms_max: u64,
    /// Longest wait for the answer to one request on the control connection, milliseconds.
    #[serde(default = "default_request_ms_max")]
    pub request_ms_max: u64,
    /// What happens when the server goes away.
    #[serde(default)]
    pub recovery: Recovery,
    /// With `recovery = "soft"`: longest wait for a server that is away, milliseconds.
    #[serde(default = "default_soft_ms")]
    pub soft_ms: u64,
    /// Requests this client has in flight on one channel at most; the server may grant fewer.
    #[serde(default = "default_in_flight_max")]
    pub in_flight_max: u16,
    /// Who we are, and whom to trust.
    pub tls: Tls,
}

fn default_server() -> String {
    "127.0.0.1:7700".into()
}
fn default_server_name() -> String {
    "localhost".into()
}
fn default_connect_ms_max() -> u64 {
    5_000
}
fn default_request_ms_max() -> u64 {
    30_000
}
fn default_soft_ms() -> u64 {
    30_000
}
fn default_in_flight_max() -> u16 {
    256
}

impl Config {
    /// Reads `client.toml`. Relative paths in it count from its own directory.
    ///
    /// # Errors
    /// [`Error::Config`] names the file and what is wrong in it.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| Error::Config { path: path.into(), reason: error.to_string() })?;
        Self::parse(&text, path)
    }

    /// Parses the text of a `client.toml` that stands at `path`.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        let refuse = |reason: String| Error::Config { path: path.into(), reason };
        let mut config: Self = toml::from_str(text).map_err(|error| refuse(error.to_string()))?;
        if config.in_flight_max == 0 {
            return Err(refuse("in_flight_max must be at least 1".into()));
        }
        if config.connect_ms_max == 0 || config.request_ms_max == 0 {
            return Err(refuse("a wait of 0 ms never succeeds; write at least 1".into()));
        }
        let base = path.parent().unwrap_or(Path::new(""));
        for file in [&mut config.tls.ca, &mut config.tls.certificate, &mut config.tls.key] {
            *file = base.join(&*file);
        }
        Ok(config)
    }

    pub(crate) fn connect_max(&self) -> Duration {
        Duration::from_millis(self.connect_ms_max)
    }

    /// How long to wait for a server that is away; `None` for ever.
    pub(crate) fn away_max(&self) -> Option<Duration> {
        (self.recovery == Recovery::Soft).then(|| Duration::from_millis(self.soft_ms))
    }

    pub(crate) fn request_max(&self) -> Duration {
        Duration::from_millis(self.request_ms_max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TLS: &str = "[tls]\nca='a'\ncertificate='/b'\nkey='c'\n";

    #[test]
    fn defaults_fill_what_is_absent() {
        let config = Config::parse(TLS, Path::new("dir/client.toml")).unwrap();
        assert_eq!((config.server.as_str(), config.transport), ("127.0.0.1:7700", Transport::Auto));
        assert_eq!(config.tls.ca, Path::new("dir/a"));
        assert_eq!(config.tls.certificate, Path::new("/b"));
        assert_eq!((config.recovery, config.away_max()), (Recovery::Hard, None));
        assert_eq!(config.one_sided, OneSided::Auto);
        let off = Config::parse(&format!("one_sided='off'\n{TLS}"), Path::new("client.toml")).unwrap();
        assert_eq!(off.one_sided, OneSided::Off);
        let soft = format!("recovery='soft'\nsoft_ms=70\n{TLS}");
        let soft = Config::parse(&soft, Path::new("client.toml")).unwrap();
        assert_eq!(soft.away_max(), Some(Duration::from_millis(70)));
    }

    #[test]
    fn mistakes_are_named() {
        for (text, wanted) in [
            (format!("sever='x'\n{TLS}"), "sever"),
            (format!("transport='ib'\n{TLS}"), "ib"),
            (format!("recovery='medium'\n{TLS}"), "medium"),
            (format!("one_sided='on'\n{TLS}"), "one_sided"),
            (format!("in_flight_max=0\n{TLS}"), "in_flight_max"),
            (format!("connect_ms_max=0\n{TLS}"), "0 ms"),
            (String::new(), "tls"),
        ] {
            let error = Config::parse(&text, Path::new("client.toml")).unwrap_err().to_string();
            assert!(error.contains(wanted) && error.contains("client.toml"), "{error}");
        }
    }
}
