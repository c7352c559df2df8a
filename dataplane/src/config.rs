//! `dataplane.toml`: what an operator may choose. Parsed once; unknown fields are refused, everything has a default.
//!
//! ```toml
//! link = "state/link.sock"        # control's socket; relative paths are relative to this file's directory
//!
//! [tcp]
//! enabled = true
//! listen = "127.0.0.1:7701"       # port 0: any free one
//!
//! [verbs]
//! enabled = "auto"                # auto: if there is a device; on: fail without one; off
//! port = 7701
//! addresses = []                  # empty: every IPv4 GID of every RDMA device
//!
//! [local]
//! enabled = true                  # a Unix socket, and shared memory, for clients on this host
//! listen = "state/local.sock"     # default: beside the link socket; at most 107 bytes with its directory
//! mode = "0666"                   # who may connect; each proves a resume key all the same
//! shared_bytes_max = 4294967296   # of all clients' regions, mapped at once; a quarter of it for one channel
//!
//! [engine]                        # see [`EngineConfig`]
//! [limits]                        # see [`Limits`]
//!
//! [map]                           # one-sided reads, see [`MapConfig`]
//! enabled = false
//! ```

use serde::Deserialize;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

/// Why a configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not TOML, or a field is unknown or of the wrong type.
    #[error("{path}: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// A value is outside of what works.
    #[error("'{field}' must be {wanted}")]
    Value {
        /// Which.
        field: &'static str,
        /// What it must be.
        wanted: &'static str,
    },
}

/// The whole file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Control's link socket. Default `state/link.sock`.
    pub link: LinkPath,
    /// The tcp listener.
    pub tcp: TcpConfig,
    /// The verbs listeners.
    pub verbs: VerbsConfig,
    /// The listener for clients on this host.
    pub local: LocalConfig,
    /// Threads and memory.
    pub engine: EngineConfig,
    /// What one peer, and all peers, may use.
    pub limits: Limits,
    /// One-sided reads.
    pub map: MapConfig,
}

/// A path with its own default.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct LinkPath(pub PathBuf);

impl Default for LinkPath {
    fn default() -> Self {
        Self(PathBuf::from("state/link.sock"))
    }
}

/// `[tcp]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TcpConfig {
    /// Listen at all. Default true.
    pub enabled: bool,
    /// Where. Default `127.0.0.1:7701`; with `0.0.0.0` clients are told to use the address at which they reach control.
    pub listen: SocketAddr,
}

impl Default for TcpConfig {
    fn default() -> Self {
        Self { enabled: true, listen: SocketAddr::from(([127, 0, 0, 1], 7701)) }
    }
}

/// `[local]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LocalConfig {
    /// Listen at all. Default true. Without the socket the process serves by its other transports, and says so.
    pub enabled: bool,
    /// The socket. Default: `local.sock` beside control's link socket. Clients of other users must be able to reach its
    /// directory.
    pub listen: Option<PathBuf>,
    /// Its permissions, octal. Default `0666`: whoever connects has still to prove a resume key.
    pub mode: Mode,
    /// Bytes of all clients' regions that may be mapped at once, and a quarter of them for one channel; what is beyond is copied
    /// more often. Default 4 GiB; 0: none.
    pub shared_bytes_max: u64,
}

impl Default for LocalConfig {
    fn default() -> Self {
        Self { enabled: true, listen: None, mode: Mode(0o666), shared_bytes_max: 4 << 30 }
    }
}

/// Permission bits, written in octal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Mode(pub u32);

impl TryFrom<String> for Mode {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let mode = u32::from_str_radix(&text, 8).ok().filter(|mode| *mode <= 0o777);
        mode.map(Self).ok_or("permissions are octal, such as \"0660\"")
    }
}

/// When to listen on RDMA devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Enabled {
    /// If there is a usable one.
    #[default]
    Auto,
    /// Always: without one the process does not start.
    On,
    /// Never.
    Off,
}

/// `[verbs]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VerbsConfig {
    /// Default `auto`.
    pub enabled: Enabled,
    /// Port of the RDMA connection manager. Default 7701.
    pub port: u16,
    /// Addresses to listen on. Default: every IPv4 GID of every RDMA device.
    pub addresses: Vec<Ipv4Addr>,
}

impl Default for VerbsConfig {
    fn default() -> Self {
        Self { enabled: Enabled::Auto, port: 7701, addresses: Vec::new() }
    }
}

/// `[engine]`: threads and memory.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EngineConfig {
    /// Worker threads; a channel stays on one of them. Default 0: one for each processor, 8 at most.
    pub workers: usize,
    /// Threads that may wait for storage. Default 4.
    pub storage_threads: usize,
    /// Bytes of bulk buffers in all, divided among the workers. Default 128 MiB. On RDMA devices they are pinned.
    pub pool_bytes: usize,
    /// Take the bulk buffers from the huge pages that are set aside (`vm.nr_hugepages`, 2 MiB each), not from ordinary memory.
    /// Default false: the kernel is only advised to use huge ones. Without enough of them the process says so, and goes on.
    pub huge_pages: bool,
    /// Use io_uring for the reads of volumes with direct I/O. Default true; where the kernel does not allow it storage
    /// threads do the same.
    pub io_uring: bool,
    /// Bytes of one bulk buffer, which is the largest single transfer. Default 256 KiB.
    pub buffer_bytes: usize,
    /// Bytes of files that may be pinned, divided among the workers: long reads of files that are read again and again and do
    /// not change are placed straight from the page cache. Default 64 MiB; 0: none. Verbs only.
    pub pinned_bytes_max: usize,
    /// Bytes of files that may be mapped, divided among the workers: long reads over tcp of what is in memory are sent straight from
    /// there. Default 1 GiB; 0: none. They are the page cache's, whatever tools say of this process's memory; page tables take 2 MiB for
    /// each GiB.
    pub viewed_bytes_max: usize,
    /// Bytes of message buffers in all. Default 64 MiB. Each of `channels_max` channels needs 36 KiB to begin with, and
    /// 9 KiB more for each credit beyond the first two; a channel gets fewer credits when they run short.
    pub message_pool_bytes: usize,
    /// Requests one channel may have in flight once it is bound. Default 64.
    pub credits: u16,
    /// Rounds without work before a worker sleeps. Default 32; 0 sleeps at once. Bounds the spinning, so that an idle
    /// server uses no processor.
    pub spin_rounds: u32,
    /// Longest time a worker looks for work before it sleeps where looking is cheap (verbs), microseconds. Default 100. It
    /// looks only as long as that has paid off lately: an idle server uses no processor all the same. 0: not at all.
    pub spin_us_max: u64,
    /// Jobs that may wait for a storage thread before they wait at their workers. Default 4096.
    pub storage_queue: usize,
    /// Fetches of one write that are under way together. Default 4.
    pub fetches: u16,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            workers: 0,
            storage_threads: 4,
            pool_bytes: 128 << 20,
            huge_pages: false,
            io_uring: true,
            buffer_bytes: 256 << 10,
            pinned_bytes_max: 64 << 20,
            viewed_bytes_max: 1 << 30,
            message_pool_bytes: 64 << 20,
            credits: 64,
            spin_rounds: 32,
            spin_us_max: 100,
            storage_queue: 4096,
            fetches: 4,
        }
    }
}

impl EngineConfig {
    /// The number of workers, with the default resolved.
    pub fn worker_count(&self) -> usize {
        match self.workers {
            0 => std::thread::available_parallelism().map_or(1, usize::from).min(8),
            n => n,
        }
    }
}

/// `[limits]`: what one peer, and all peers, may use.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Channels in all. Default 1024.
    pub channels_max: usize,
    /// Channels that have not been granted a binding yet. Default 64. For one more, the oldest of the address that has
    /// the most of them ends.
    pub half_open_max: usize,
    /// Those of one address; of IPv6, of one /64 network. Default 32. For one more, the oldest of them ends.
    pub half_open_per_address: usize,
    /// Bindings of one channel. Default 64.
    pub bindings_max: u16,
    /// Time from a channel's start to its first granted bind. Default 5000.
    pub bind_deadline_ms: u64,
    /// Time a channel may stay without any binding after it had one. Default 60000.
    pub unbound_ms: u64,
    /// Refused binds, and requests without any binding, before a channel ends. Default 3.
    pub failed_binds_max: u32,
    /// Longest read or write. Default 16 MiB.
    pub transfer_bytes_max: u32,
    /// Time a peer may leave operations without progress. Default 30000.
    pub stuck_ms: u64,
    /// Time a fence waits for the operations of its binding before it cuts the channel off. Default 2000.
    pub fence_ms: u64,
    /// Time a peer gets to read the notice that its channel ends. Default 500.
    pub linger_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            channels_max: 1024,
            half_open_max: 64,
            half_open_per_address: 32,
            bindings_max: 64,
            bind_deadline_ms: 5000,
            unbound_ms: 60_000,
            failed_binds_max: 3,
            transfer_bytes_max: 16 << 20,
            stuck_ms: 30_000,
            fence_ms: 2000,
            linger_ms: 500,
        }
    }
}

/// `[map]`: ranges of files that clients of verbs channels may read one-sided, with no work for this process. The client library
/// maps what is hot by itself. What is mapped
/// is pinned in memory, whole pages, until its client unmaps it or it is fenced.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MapConfig {
    /// Grant it at all. Default false.
    pub enabled: bool,
    /// Mappings of one channel. Default 16. Each has a queue pair of its own.
    pub channel_mappings_max: usize,
    /// Bytes that the mappings of one channel pin. Default 256 MiB.
    pub channel_bytes_max: u64,
    /// Mappings in all. Default 256.
    pub mappings_max: usize,
    /// Bytes that all mappings pin. Default 1 GiB. The locked-memory limit of the process (`ulimit -l`) counts them too.
    pub bytes_max: u64,
}

impl Default for MapConfig {
    fn default() -> Self {
        Self {
            enabled: false,
            channel_mappings_max: 16,
            channel_bytes_max: 256 << 20,
            mappings_max: 256,
            bytes_max: 1 << 30,
        }
    }
}

impl Config {
    /// Reads a file; paths in it become relative to its directory.
    ///
    /// # Errors
    /// [`ConfigError`], with the file, the place and what is wrong.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let mut config: Self = toml::from_str(&text)
            .map_err(|source| ConfigError::Parse { path: path.to_owned(), source: Box::new(source) })?;
        if let Some(directory) = path.parent() {
            config.link.0 = directory.join(&config.link.0);
            config.local.listen = config.local.listen.map(|path| directory.join(path));
        }
        config.check()?;
        Ok(config)
    }

    /// Where clients on this host connect, if `local` is enabled.
    pub fn local_socket(&self) -> PathBuf {
        self.local.listen.clone().unwrap_or_else(|| self.link.0.with_file_name("local.sock"))
    }

    /// Checks every value against what works.
    ///
    /// # Errors
    /// [`ConfigError::Value`] names the first that does not.
    pub fn check(&self) -> Result<(), ConfigError> {
        let value =
            |ok: bool, field, wanted| if ok { Ok(()) } else { Err(ConfigError::Value { field, wanted }) };
        let (e, l) = (&self.engine, &self.limits);
        let workers = e.worker_count();
        value(workers <= 64, "engine.workers", "at most 64")?;
        value((1..=256).contains(&e.storage_threads), "engine.storage_threads", "1 to 256")?;
        let pages = (4096..=64 << 20).contains(&e.buffer_bytes) && e.buffer_bytes % 4096 == 0;
        value(pages, "engine.buffer_bytes", "a multiple of 4096, 4 KiB to 64 MiB")?;
        value(
            e.pool_bytes / workers >= e.buffer_bytes,
            "engine.pool_bytes",
            "room for a buffer for each worker",
        )?;
        value(
            (64 << 10..=1 << 40).contains(&e.message_pool_bytes),
            "engine.message_pool_bytes",
            "64 KiB or more",
        )?;
        value(e.pinned_bytes_max <= 1 << 40, "engine.pinned_bytes_max", "at most 1 TiB")?;
        value(e.viewed_bytes_max <= 1 << 38, "engine.viewed_bytes_max", "at most 256 GiB")?;
        value((1..=1024).contains(&e.credits), "engine.credits", "1 to 1024")?;
        value((1..=65_536).contains(&e.storage_queue), "engine.storage_queue", "1 to 65536")?;
        value((1..=64).contains(&e.fetches), "engine.fetches", "1 to 64")?;
        value((1..=65_536).contains(&l.channels_max), "limits.channels_max", "1 to 65536")?;
        value(l.half_open_max >= 1, "limits.half_open_max", "at least 1")?;
        value(l.half_open_per_address >= 1, "limits.half_open_per_address", "at least 1")?;
        value((1..=255).contains(&l.bindings_max), "limits.bindings_max", "1 to 255")?;
        value((1..=1 << 30).contains(&l.transfer_bytes_max), "limits.transfer_bytes_max", "1 byte to 1 GiB")?;
        let m = &self.map;
        value((1..=4096).contains(&m.channel_mappings_max), "map.channel_mappings_max", "1 to 4096")?;
        value((1..=65_536).contains(&m.mappings_max), "map.mappings_max", "1 to 65536")?;
        value((4096..=1 << 50).contains(&m.channel_bytes_max), "map.channel_bytes_max", "4 KiB or more")?;
        value((4096..=1 << 50).contains(&m.bytes_max), "map.bytes_max", "4 KiB or more")?;
        for (ms, field) in [
            (l.bind_deadline_ms, "limits.bind_deadline_ms"),
            (l.unbound_ms, "limits.unbound_ms"),
            (l.stuck_ms, "limits.stuck_ms"),
            (l.fence_ms, "limits.fence_ms"),
            (l.linger_ms, "limits.linger_ms"),
        ] {
            value((1..=86_400_000).contains(&ms), field, "1 to 86400000 (a day)")?;
        }
        Ok(())
    }
}

/// What clients are told of a listening address: nothing if it is the wildcard.
pub fn advertised(address: IpAddr) -> Option<String> {
    (!address.is_unspecified()).then(|| address.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_has_a_default_that_works() {
        let config: Config = toml::from_str("").unwrap();
        assert_eq!(config, Config::default());
        config.check().unwrap();
    }

    #[test]
    fn unknown_fields_and_bad_values_are_refused() {
        assert!(toml::from_str::<Config>("[tcp]\nlisen = '127.0.0.1:1'").is_err());
        assert!(toml::from_str::<Config>("[limits]\nchannels = 1").is_err());
        assert!(toml::from_str::<Config>("[local]\nmode = '0888'").is_err());
        let config: Config = toml::from_str("[engine]\nbuffer_bytes = 5000").unwrap();
        assert!(config.check().unwrap_err().to_string().contains("buffer_bytes"));
        let config: Config = toml::from_str("[engine]\nworkers = 4\npool_bytes = 262144").unwrap();
        assert!(config.check().is_err(), "a worker would have no buffer");
        let config: Config = toml::from_str("[map]\nenabled = true\nbytes_max = 100").unwrap();
        assert!(config.check().unwrap_err().to_string().contains("map.bytes_max"));
    }

    #[test]
    fn paths_are_relative_to_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("dataplane.toml");
        std::fs::write(&file, "link = 'state/l.sock'\n[verbs]\nenabled = 'off'\n[local]\nmode = '0660'")
            .unwrap();
        let config = Config::load(&file).unwrap();
        assert_eq!(config.link.0, directory.path().join("state/l.sock"));
        assert_eq!(config.verbs.enabled, Enabled::Off);
        assert_eq!(config.local_socket(), directory.path().join("state/local.sock"));
        assert_eq!(config.local.mode, Mode(0o660));
    }
}
