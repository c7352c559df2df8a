//! `holdfast init`: private CA, certificates, configuration files.
//!
//! ```text
//!   DIR/pki/      ca.pem ca.key server.pem server.key client.pem client.key      keys 0600
//!   DIR/          control.toml dataplane.toml client.toml
//!   DIR/state/    what the server keeps; mode 0700
//!   DIR/data/     the default volume
//! ```

use crate::args::Init;
use crate::pki::{Authority, check_principal};
use crate::remote::check_volume_name;
use anyhow::{Context, bail};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::{DirBuilder, OpenOptions};
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

pub(crate) fn run(args: &Init) -> anyhow::Result<()> {
    let volumes = volumes(args)?;
    check_principal(&args.principal)?;
    if args.port == u16::MAX {
        bail!("--port {} leaves no port for the data plane; choose a smaller one", args.port);
    }
    let dir = &args.dir;
    for name in ["control.toml", "dataplane.toml", "client.toml", "pki", "state"] {
        let path = dir.join(name);
        if path.symlink_metadata().is_ok() {
            bail!(
                "{} exists already, and nothing is overwritten; choose another --dir, or remove it",
                path.display()
            );
        }
    }
    make_directory(dir, 0o755)?;
    make_directory(&dir.join("pki"), 0o700)?;
    make_directory(&dir.join("state"), 0o700)?;
    for (_, directory) in &volumes {
        make_directory(directory, 0o755)?;
    }
    write_pki(args)?;
    write_new(&dir.join("control.toml"), &control_toml(args, &volumes), 0o644)?;
    write_new(&dir.join("dataplane.toml"), &dataplane_toml(args), 0o644)?;
    write_new(&dir.join("client.toml"), &client_toml(args), 0o644)?;
    tell(args, &volumes);
    Ok(())
}

/// The volumes asked for: names checked, directories absolute.
fn volumes(args: &Init) -> anyhow::Result<Vec<(String, PathBuf)>> {
    let mut volumes = Vec::new();
    for text in &args.volumes {
        let (name, directory) = text
            .split_once('=')
            .with_context(|| format!("--volume {text}: write NAME=PATH, such as data=/srv/data"))?;
        check_volume_name(name).map_err(anyhow::Error::msg)?;
        if directory.is_empty() {
            bail!("--volume {text}: the path is missing");
        }
        volumes.push((name.to_owned(), std::path::absolute(directory)?));
    }
    if volumes.is_empty() {
        volumes.push(("data".to_owned(), std::path::absolute(args.dir.join("data"))?));
    }
    let names: BTreeSet<&str> = volumes.iter().map(|(name, _)| name.as_str()).collect();
    if names.len() != volumes.len() {
        bail!("two volumes have the same name");
    }
    Ok(volumes)
}

fn make_directory(path: &Path, mode: u32) -> anyhow::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .with_context(|| format!("cannot make {}", path.display()))
}

/// Writes a file that must not exist yet.
pub(crate) fn write_new(path: &Path, text: &str, mode: u32) -> anyhow::Result<()> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("cannot write {}", path.display()))
}

fn write_pki(args: &Init) -> anyhow::Result<()> {
    let pki = args.dir.join("pki");
    let (authority, ca) = Authority::new()?;
    let mut names: BTreeSet<String> = ["localhost", "127.0.0.1", "::1"].map(str::to_owned).into();
    names.extend(args.addresses.iter().filter(|ip| !ip.is_unspecified()).map(IpAddr::to_string));
    let server = authority.server(names.into_iter().collect())?;
    let client = authority.client(&args.principal)?;
    for (name, identity) in [("ca", ca), ("server", server), ("client", client)] {
        write_new(&pki.join(format!("{name}.pem")), &identity.certificate, 0o644)?;
        write_new(&pki.join(format!("{name}.key")), &identity.key, 0o600)?;
    }
    Ok(())
}

/// A TOML string.
fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// Every setting of control's journal and limits with its default, to be uncommented.
const CONTROL_TUNING: &str = "
[journal]
# Where opens and locks are recorded, so that they survive a crash of both processes; default: journal in state_dir. Its disk
# decides how long an open, a lock and a close take.
#directory = \"state/journal\"
# Wait until records are on the disk before answering; without, a crash of the host can forget what was answered.
#sync = true
# The journal is rewritten once it has grown by so much, MiB.
#checkpoint_mib = 64

[limits]
# Beyond a count, a request is refused with TooMany, and a connection is closed. The values shown are the defaults.
#sessions = 4096
#sessions_per_principal = 1024
#opens = 262144
#opens_per_principal = 131072
#opens_per_session = 65536
#bindings_per_open = 64
# File operations under way, and threads for them.
#operations = 1024
#operations_per_principal = 256
#file_threads = 16
#requests_per_session = 32
# Bind requests under way.
#binds = 256
# How long the bindings of a lost client go on, milliseconds: one that is back sooner has lost no read or write.
#linger_ms = 5000
# Opens that ended without their client's wish, and of which it can still be told; for how long, seconds.
#tombstones = 65536
#tombstone_keep_s = 604800
# Locks of one request, one open, one file; requests that wait for locks of one file.
#locks_per_request = 64
#locks_per_open = 512
#locks_per_file = 1024
#lock_waiters_per_file = 256
# Longest wait for a lock or a held file, milliseconds; requests that wait for held files, in all and of one principal.
#wait_max_ms = 600000
#waiting_opens = 4096
#waiting_opens_per_principal = 1024
# Files that a restart keeps open; more are kept by name. 0: three quarters of what the process may have open.
#reopened_files = 0
# Connections whose handshake is not finished, in all and from one address, and the time they have, milliseconds.
#half_open_handshakes = 128
#half_open_per_address = 32
#handshake_ms = 10000
# Time for a peer to finish a message or take an answer, milliseconds; silence before the kernel asks for it, seconds.
#message_ms = 30000
#keepalive_s = 30
# Time for a fence before it is logged as overdue, and for a clean stop, milliseconds.
#fence_wait_ms = 10000
#stop_ms = 3000
";

/// The same for dataplane's engine and limits.
const DATAPLANE_TUNING: &str = "
[engine]
# Worker threads; 0: one for each processor, 8 at most. A channel stays on one of them.
#workers = 0
# Threads that may wait for storage.
#storage_threads = 4
# Jobs that may wait for them.
#storage_queue = 4096
# Bytes of bulk buffers in all, of one, and of all message buffers. On RDMA devices they are pinned.
#pool_bytes = 134217728
#buffer_bytes = 262144
#message_pool_bytes = 67108864
# Take the bulk buffers from the huge pages that are set aside (sysctl vm.nr_hugepages).
#huge_pages = false
# Direct reads (file_io in control.toml) by io_uring; else by the threads that may wait.
#io_uring = true
# Bytes of hot files that may be pinned beside them, for long reads over verbs without a copy; 0: none.
#pinned_bytes_max = 67108864
# Bytes of files that may be mapped, for long reads over tcp with one copy less; 0: none.
#viewed_bytes_max = 1073741824
# Requests one channel may have in flight.
#credits = 64
# Rounds without work before a worker sleeps; 0 sleeps at once.
#spin_rounds = 32
# Longest time it looks for work before that over verbs, microseconds, as long as that pays off; 0: not at all.
#spin_us_max = 100
# Fetches of one write that are under way together.
#fetches = 4

[limits]
# Channels in all, channels without a binding yet, and the bindings of one channel.
#channels_max = 1024
#half_open_max = 64
#half_open_per_address = 32
#bindings_max = 64
# Time from a channel's start to its first binding, and without any after it had one, milliseconds.
#bind_deadline_ms = 5000
#unbound_ms = 60000
# Refused binds before a channel ends.
#failed_binds_max = 3
# Longest read or write, bytes.
#transfer_bytes_max = 16777216
# Time a peer may leave operations without progress, a fence waits before it cuts a channel off, and a peer has to read
# why its channel ends, milliseconds.
#stuck_ms = 30000
#fence_ms = 2000
#linger_ms = 500
";

fn control_toml(args: &Init, volumes: &[(String, PathBuf)]) -> String {
    let listen: Vec<String> =
        args.addresses.iter().map(|ip| quoted(&SocketAddr::new(*ip, args.port).to_string())).collect();
    let mut text = format!(
        "# The control process: authenticates clients, opens files, issues resume keys.
# Relative paths count from this file's directory.

# Where clients connect (TCP, TLS 1.3). Port 0: any free one.
listen = [{}]

# Secrets, the link and admin sockets. Readable by the server's user only.
state_dir = \"state\"

[tls]
# The server's certificate chain and key (PEM).
certificate = \"pki/server.pem\"
key = \"pki/server.key\"
# Clients' certificates must be signed by one of these.
client_ca = \"pki/ca.pem\"
{CONTROL_TUNING}",
        listen.join(", ")
    );
    for (name, directory) in volumes {
        let _ = write!(
            text,
            "
[[volume]]
name = {}
directory = {}
# What protects the data channels: \"header\" (each frame has a MAC), \"payload\" (file bytes have a digest too),
# \"sealed\" (file bytes are encrypted), or \"none\" (private networks only).
mac_policy = {}
# How long an open is kept against others while its client is away, milliseconds: unless the client asks for something
# else, and at most.
#hold_ms = 60000
#hold_max_ms = 86400000
# \"mandatory\": byte-range locks restrict every read and write; \"advisory\": they exclude only each other.
#locks = \"mandatory\"
# Nobody changes the volume through this server: every grant is for reading.
#immutable = false
# Clients on this host are given the descriptors of opens for reading, and read past the server. What they have can't be
# taken back by locks, shares or fences: for hosts whose users you trust. Unless it is set, an immutable volume does so.
#local_descriptors = false
# \"cached\": files are read and written through the page cache. \"direct\": past it, straight between disk and buffers, what is
# aligned (databases, files much larger than memory); on a local disk. Stop the server before you change it.
#file_io = \"cached\"

# Who may use the volume. The principal is the client certificate's SAN (or its CN); access is \"read\" or \"read-write\".
[[volume.grant]]
principal = {}
access = \"read-write\"
",
            quoted(name),
            quoted(&directory.to_string_lossy()),
            quoted(&args.mac_policy),
            quoted(&args.principal)
        );
    }
    text
}

fn dataplane_toml(args: &Init) -> String {
    let port = if args.port == 0 { 0 } else { args.port + 1 };
    let address = args.addresses.first().copied().unwrap_or(IpAddr::from([127, 0, 0, 1]));
    format!(
        "# The dataplane process: moves bytes between files and clients' memory.
# Relative paths count from this file's directory.

# Control's link socket: state_dir of control.toml, then link.sock.
link = \"state/link.sock\"

[tcp]
# Data channels over TCP. Port 0: any free one.
listen = {}

[verbs]
# Data channels over RDMA: \"auto\" (if there is a device), \"on\" (fail without one) or \"off\".
enabled = \"auto\"
# In rdmacm's TCP port space.
port = {port}
# Where to listen; empty: every IPv4 address of every RDMA device.
addresses = []

[local]
# Data channels over a Unix socket and shared memory, for clients on this host. Those of other users must be able to reach its directory.
# Default: local.sock beside the link socket.
#enabled = true
#listen = \"state/local.sock\"
# Who may connect, as permissions of the socket; each proves a resume key all the same.
#mode = \"0666\"
# Bytes of clients' regions that may be mapped at once, a quarter of them for one channel. What is beyond is copied more often.
#shared_bytes_max = 4294967296
{DATAPLANE_TUNING}",
        quoted(&SocketAddr::new(address, port).to_string())
    )
}

fn client_toml(args: &Init) -> String {
    let address = match args.addresses.first() {
        Some(ip) if !ip.is_unspecified() => *ip,
        _ => IpAddr::from([127, 0, 0, 1]),
    };
    format!(
        "# A client. Copy this file, pki/ca.pem, pki/client.pem and pki/client.key (keep it secret) to the client's host.
# Relative paths count from this file's directory.

# Where control listens.
server = {}
# The name that the server's certificate must carry.
server_name = \"localhost\"
# How data channels are carried: \"auto\" (shared memory on the server's own host, else RDMA where both sides have it, else
# TCP), \"local\", \"verbs\" or \"tcp\".
transport = \"auto\"
# Over RDMA, with a server that grants mappings: \"auto\" has what is read over and over read without the server's processors;
# \"off\" leaves that to what an application maps.
one_sided = \"auto\"
# Longest wait for a connection, and for the answer to a request, milliseconds.
connect_ms_max = 5000
request_ms_max = 30000
# When the server goes away: \"hard\" waits until it is back, however long that takes; \"soft\" gives up after soft_ms.
#recovery = \"hard\"
#soft_ms = 30000
# Requests in flight on one channel at most; the server may grant fewer.
in_flight_max = 256

[tls]
ca = \"pki/ca.pem\"
certificate = \"pki/client.pem\"
key = \"pki/client.key\"
",
        quoted(&SocketAddr::new(address, args.port).to_string())
    )
}

fn tell(args: &Init, volumes: &[(String, PathBuf)]) {
    let dir = args.dir.display();
    println!(
        "made a private CA, certificates for the server and for '{}', and three configuration files in {dir}",
        args.principal
    );
    for (name, directory) in volumes {
        println!("volume {name}: {}", directory.display());
    }
    println!();
    println!("next:");
    println!("  holdfast serve --dir {dir}");
    println!("  export HOLDFAST_CONFIG={dir}/client.toml");
    if let Some((name, _)) = volumes.first() {
        println!("  holdfast ls {name}:/");
        println!("  holdfast cp FILE {name}:/");
    }
    println!("  holdfast doctor");
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn args(dir: &Path) -> Init {
        Init {
            dir: dir.into(),
            volumes: vec![format!("a={}", dir.join("we\"ird").display()), "b=/tmp".into()],
            addresses: vec!["127.0.0.1".parse().unwrap(), "::1".parse().unwrap()],
            port: 7700,
            principal: "client".into(),
            mac_policy: "header".into(),
        }
    }

    #[test]
    fn everything_is_made_once_and_keys_are_private() {
        let temp = tempfile::tempdir().unwrap();
        let args = args(&temp.path().join("d"));
        run(&args).unwrap();
        for key in ["ca.key", "server.key", "client.key"] {
            let mode = std::fs::metadata(args.dir.join("pki").join(key)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{key}");
        }
        assert_eq!(std::fs::metadata(args.dir.join("state")).unwrap().permissions().mode() & 0o777, 0o700);
        for file in ["control.toml", "dataplane.toml", "client.toml"] {
            let text = std::fs::read_to_string(args.dir.join(file)).unwrap();
            toml::from_str::<toml::Table>(&text).unwrap_or_else(|e| panic!("{file}: {e}"));
        }
        holdfast_client::Config::load(&args.dir.join("client.toml")).unwrap();
        let again = run(&args).unwrap_err().to_string();
        assert!(again.contains("nothing is overwritten"), "{again}");
    }

    #[test]
    fn volumes_are_checked() {
        let temp = tempfile::tempdir().unwrap();
        for wrong in ["data", "=x", "a b=/x", "a="] {
            let mut args = args(temp.path());
            args.volumes = vec![wrong.into()];
            assert!(volumes(&args).is_err(), "{wrong}");
        }
        let mut args = args(temp.path());
        args.volumes = vec!["a=/x".into(), "a=/y".into()];
        assert!(volumes(&args).is_err());
        args.volumes.clear();
        assert_eq!(volumes(&args).unwrap()[0].0, "data");
    }
}
