//! What the operator of a server types, on the server's host.

use crate::opens::select::Prefix;
use clap::{Args, ValueEnum};
use std::net::IpAddr;
use std::path::PathBuf;

/// Make a private CA, certificates and configuration files for one server and its first client
///
/// Nothing that exists is overwritten. Keys are readable by their owner only.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  holdfast init --dir /srv/holdfast
  holdfast init --dir /srv/holdfast --volume db=/var/lib/db --address 10.0.0.7 --port 7700")]
pub(crate) struct Init {
    /// Where everything goes
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: PathBuf,
    /// A volume to serve; may be repeated [default: data=DIR/data]
    #[arg(long = "volume", value_name = "NAME=PATH")]
    pub(crate) volumes: Vec<String>,
    /// Where the server listens; may be repeated, the client is given the first
    #[arg(long = "address", value_name = "IP", default_value = "127.0.0.1")]
    pub(crate) addresses: Vec<IpAddr>,
    /// Control's port; the data plane gets the next one. 0: any free ports, told when the server is ready
    #[arg(long, default_value_t = 7700)]
    pub(crate) port: u16,
    /// The first client's principal, as its certificate names it
    #[arg(long, default_value = "client", value_name = "NAME")]
    pub(crate) principal: String,
    /// How data channels are protected: header, payload, sealed, or none (for private networks only)
    #[arg(long, default_value = "header", value_parser = ["none", "header", "payload", "sealed"])]
    pub(crate) mac_policy: String,
}

/// Issue a certificate for another client, from a CA that `init` made
#[derive(Args, Debug)]
#[command(after_help = "Example:
  holdfast cert --dir /srv/holdfast --principal backup")]
pub(crate) struct Cert {
    /// The directory given to `init`
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: PathBuf,
    /// The client's principal
    #[arg(long, value_name = "NAME")]
    pub(crate) principal: String,
}

/// Start both server processes and watch over them until SIGTERM or SIGINT
///
/// A process that dies is started again, later each time; the other keeps every open alive meanwhile.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  holdfast serve --dir /srv/holdfast
  holdfast serve --dir /srv/holdfast --json   # one JSON line from each process when it is ready, then one for all

On SIGTERM the data plane stops first, then control; what has not stopped after 10 seconds is killed. Exit code 0.")]
pub(crate) struct Serve {
    /// The directory given to `init`
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: PathBuf,
    /// Where holdfast-control and holdfast-dataplane are [default: beside this program]
    #[arg(long, value_name = "DIR")]
    pub(crate) bin_dir: Option<PathBuf>,
    /// Tell readiness as JSON lines
    #[arg(long)]
    pub(crate) json: bool,
}

/// Tell whether RDMA is in use, and if not, why
///
/// Looks at this host's RDMA devices and limits, connects to the server, binds a data channel and moves a few bytes as any
/// client would. With --dir, on the server's host, shows what both server processes hold.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  holdfast doctor
  holdfast doctor --dir /srv/holdfast --json")]
pub(crate) struct Doctor {
    /// The server's directory, as given to `init`; its client.toml is used unless --config is given
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// One JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// Show the opens of a server, all of them or one, or close them by force
///
/// On the server's host, as the server's user. An open is active while its client is connected; detached while it is kept
/// for a client that was lost; expired once its hold time is over and it is kept only until somebody else wants the file. An
/// open closed by force is told to its client as closed by the operator; what it has locked is free at once.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  holdfast opens --dir /srv/holdfast
  holdfast opens --dir /srv/holdfast --state detached --principal backup
  holdfast opens --dir /srv/holdfast 3fa2             # all about the open whose id begins with 3fa2
  holdfast opens --dir /srv/holdfast --close 3fa2 77b0  # end these two; returns when they are gone")]
pub(crate) struct Opens {
    /// Show this one alone; the first digits of its id will do
    #[arg(value_name = "OPEN_ID", conflicts_with_all = ["close", "principal", "volume", "state"])]
    pub(crate) open: Option<Prefix>,
    /// The server's directory, as given to `init` [default: where the configuration is]
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// Close these by force, and wait until they are gone
    #[arg(long, num_args = 1.., value_name = "OPEN_ID", conflicts_with_all = ["principal", "volume", "state"])]
    pub(crate) close: Vec<Prefix>,
    /// Only those of this principal
    #[arg(long, value_name = "NAME")]
    pub(crate) principal: Option<String>,
    /// Only those on this volume
    #[arg(long, value_name = "NAME")]
    pub(crate) volume: Option<String>,
    /// Only those in this state
    #[arg(long)]
    pub(crate) state: Option<State>,
    /// A JSON array; with OPEN_ID one object
    #[arg(long)]
    pub(crate) json: bool,
}

/// Where in its life an open is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum State {
    /// Its client is connected
    Active,
    /// Kept for a client that was lost
    Detached,
    /// Kept until somebody else wants the file
    Expired,
    /// On its way out: its bindings are being fenced
    Closing,
}

impl State {
    /// As the server says it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Detached => "detached",
            Self::Expired => "expired",
            Self::Closing => "closing",
        }
    }
}

/// Show the clients that are connected to a server
///
/// On the server's host, as the server's user.
#[derive(Args, Debug)]
#[command(after_help = "Example:
  holdfast sessions --dir /srv/holdfast --json")]
pub(crate) struct Sessions {
    /// The server's directory, as given to `init` [default: where the configuration is]
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// A JSON array
    #[arg(long)]
    pub(crate) json: bool,
}

/// (internal) Ask the kernel to end this process with its parent, then become PROGRAM
#[derive(Args, Debug)]
pub(crate) struct PlaneGuard {
    /// Process id of the parent
    #[arg(long)]
    pub(crate) parent: i32,
    /// What to become
    #[arg(required = true, trailing_var_arg = true)]
    pub(crate) command: Vec<std::ffi::OsString>,
}
