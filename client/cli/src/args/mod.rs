//! What can be typed: by everybody here, by a server's operator in [`operator`].

mod bench;
mod operator;

use crate::remote::Remote;
use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use holdfast_client::{Config, Session, Transport};
use std::path::PathBuf;

pub(crate) use bench::{Bench, Pattern};
pub(crate) use operator::{Cert, Doctor, Init, Opens, PlaneGuard, Serve, Sessions};

/// Files over RDMA, through handles that hold.
#[derive(Parser, Debug)]
#[command(name = "holdfast", version, about, after_help = crate::exit::HELP, propagate_version = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) connection: Connection,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// How to reach the server.
#[derive(Args, Debug, Clone)]
pub(crate) struct Connection {
    /// The client's configuration; `holdfast init` makes one
    #[arg(long, global = true, env = "HOLDFAST_CONFIG", value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Another server address than the configuration's
    #[arg(long, global = true, value_name = "ADDRESS:PORT")]
    pub(crate) server: Option<String>,
}

impl Connection {
    /// Reads the configuration.
    pub(crate) fn load(&self) -> anyhow::Result<Config> {
        let path = self.config.as_ref().context(
            "no configuration: give --config D/client.toml or set HOLDFAST_CONFIG (`holdfast init --dir D` makes one)",
        )?;
        if !path.exists() {
            anyhow::bail!("there is no {} (`holdfast init --dir D` makes D/client.toml)", path.display());
        }
        let mut config = Config::load(path)?;
        if let Some(server) = &self.server {
            config.server.clone_from(server);
        }
        Ok(config)
    }

    /// Reads the configuration and connects.
    pub(crate) async fn connect(&self) -> anyhow::Result<Session> {
        Ok(Session::connect(&self.load()?).await?)
    }
}

#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    Init(Init),
    Cert(Cert),
    Serve(Serve),
    Cp(Copy),
    Cat(Cat),
    Bench(Bench),
    Doctor(Doctor),
    Opens(Opens),
    Sessions(Sessions),
    Ls(Ls),
    Stat(Stat),
    Mkdir(Mkdir),
    Rm(Rm),
    Mv(Mv),
    Df(Df),
    Volumes(Volumes),
    #[command(hide = true)]
    PlaneGuard(PlaneGuard),
}

impl Command {
    /// What is logged without HOLDFAST_LOG: a server tells what it does, a command only what goes wrong.
    pub(crate) fn default_log(&self) -> &'static str {
        match self {
            Self::Serve(_) => "info",
            _ => "warn",
        }
    }
}

impl Cli {
    /// True if errors are to be told as JSON too.
    pub(crate) fn json_errors(&self) -> bool {
        match &self.command {
            Command::Serve(a) => a.json,
            Command::Cp(a) => a.json,
            Command::Bench(a) => a.json,
            Command::Doctor(a) => a.json,
            Command::Opens(a) => a.json,
            Command::Sessions(a) => a.json,
            Command::Ls(a) => a.json,
            Command::Stat(a) => a.json,
            Command::Df(a) => a.json,
            Command::Volumes(a) => a.json,
            _ => false,
        }
    }
}

/// Copy files and trees to or from a volume
///
/// A file gets its name only when it is complete and flushed; until then it is `.holdfast-*.part` beside it, which an
/// interrupted copy removes, and only a killed one leaves behind. Permission bits and modification times are kept, symbolic
/// links copied as links (with -r), special files skipped with a warning. Into a directory that exists, a source is
/// copied under its own name.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  holdfast cp a.db data:/
  holdfast cp -r ./tree data:/tree --depth 16
  holdfast cp -r data:/tree /tmp/out --transport tcp --json")]
pub(crate) struct Copy {
    /// SRC... DST; remote ones are VOLUME:/path
    #[arg(required = true, num_args = 2.., value_name = "PATH")]
    pub(crate) paths: Vec<String>,
    /// Directories and all that is in them
    #[arg(short, long)]
    pub(crate) recursive: bool,
    /// How bytes travel: auto, local, verbs or tcp [default: the configuration's]
    #[arg(long)]
    pub(crate) transport: Option<Transport>,
    /// Chunks of one file in flight
    #[arg(long, default_value = "8", value_parser = parse_count, value_name = "N")]
    pub(crate) depth: usize,
    /// Bytes in one chunk [default: up to 1 MiB, so that all take 64 MiB]
    #[arg(long, value_parser = parse_chunk, value_name = "BYTES")]
    pub(crate) chunk: Option<usize>,
    /// Files under way at once
    #[arg(long, default_value = "4", value_parser = parse_count, value_name = "N")]
    pub(crate) parallel: usize,
    /// Data channels for files of 64 MiB and more; smaller ones use one, and so does all on the server's own host
    #[arg(long, default_value = "2", value_parser = parse_channels, value_name = "N")]
    pub(crate) channels: usize,
    /// Do not wait until each file is on the disk
    #[arg(long)]
    pub(crate) no_flush: bool,
    /// A JSON summary, and no progress bar
    #[arg(long)]
    pub(crate) json: bool,
}

fn parse_count(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|count| (1..=1024).contains(count)).ok_or_else(|| "1 to 1024".into())
}

fn parse_channels(text: &str) -> Result<usize, String> {
    let range = 1..=holdfast_client::RAILS_MAX;
    text.parse().ok().filter(|count| range.contains(count)).ok_or_else(|| format!("1 to {}", range.end()))
}

fn parse_chunk(text: &str) -> Result<usize, String> {
    let range = 4096..=64 << 20;
    text.parse().ok().filter(|bytes| range.contains(bytes)).ok_or_else(|| "4096 to 67108864 bytes".into())
}

/// Write files to standard output, one after the other
#[derive(Args, Debug)]
#[command(after_help = "Example:
  holdfast cat data:/log/a data:/log/b | less")]
pub(crate) struct Cat {
    /// VOLUME:/path
    #[arg(required = true)]
    pub(crate) paths: Vec<Remote>,
    /// How bytes travel: auto, local, verbs or tcp [default: the configuration's]
    #[arg(long)]
    pub(crate) transport: Option<Transport>,
    /// Chunks of 1 MiB read ahead
    #[arg(long, default_value = "8", value_parser = parse_count, value_name = "N")]
    pub(crate) depth: usize,
    /// Data channels; on the server's own host it is always one
    #[arg(long, default_value = "1", value_parser = parse_channels, value_name = "N")]
    pub(crate) channels: usize,
}

/// List a directory, or one file
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  holdfast ls data:/
  holdfast ls --json data:/tables")]
pub(crate) struct Ls {
    /// VOLUME:/path
    pub(crate) path: Remote,
    /// A JSON array of entries
    #[arg(long)]
    pub(crate) json: bool,
}

/// Show the attributes of a file, directory or symbolic link
#[derive(Args, Debug)]
#[command(after_help = "Example:
  holdfast stat data:/tables/a.db")]
pub(crate) struct Stat {
    /// VOLUME:/path
    pub(crate) path: Remote,
    /// One JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// Make directories
#[derive(Args, Debug)]
#[command(after_help = "Example:
  holdfast mkdir -p data:/a/b/c")]
pub(crate) struct Mkdir {
    /// VOLUME:/path
    #[arg(required = true)]
    pub(crate) paths: Vec<Remote>,
    /// Make missing parents too, and accept a directory that exists
    #[arg(short, long)]
    pub(crate) parents: bool,
    /// Permission bits, octal
    #[arg(long, default_value = "755", value_parser = parse_mode)]
    pub(crate) mode: u32,
}

fn parse_mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o1777 => Ok(mode),
        _ => Err("permission bits are octal, from 0 to 1777".into()),
    }
}

/// Remove files, symbolic links or directories
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  holdfast rm data:/old.db
  holdfast rm -r data:/old")]
pub(crate) struct Rm {
    /// VOLUME:/path
    #[arg(required = true)]
    pub(crate) paths: Vec<Remote>,
    /// Directories and all that is in them
    #[arg(short, long)]
    pub(crate) recursive: bool,
    /// What does not exist is no error
    #[arg(short, long)]
    pub(crate) force: bool,
}

/// Rename within one volume
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  holdfast mv data:/a.tmp data:/a
  holdfast mv data:/a data:/old/     # into a directory that exists")]
pub(crate) struct Mv {
    /// VOLUME:/path
    pub(crate) from: Remote,
    /// VOLUME:/path in the same volume
    pub(crate) to: Remote,
    /// Refuse to replace an existing file
    #[arg(short, long)]
    pub(crate) no_clobber: bool,
}

/// Size and room of volumes
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  holdfast df
  holdfast df data --json")]
pub(crate) struct Df {
    /// Volumes [default: all that this client may use]
    pub(crate) volumes: Vec<String>,
    /// A JSON array
    #[arg(long)]
    pub(crate) json: bool,
}

/// The volumes this client may use
#[derive(Args, Debug)]
pub(crate) struct Volumes {
    /// A JSON array
    #[arg(long)]
    pub(crate) json: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_visible_command_has_help() {
        for command in Cli::command().get_subcommands().filter(|c| !c.is_hide_set()) {
            assert!(command.get_about().is_some(), "{} has no text", command.get_name());
        }
    }

    #[test]
    fn modes_are_octal_and_without_set_id_bits() {
        assert_eq!(parse_mode("750"), Ok(0o750));
        for wrong in ["9", "4755", "-1", ""] {
            assert!(parse_mode(wrong).is_err(), "{wrong}");
        }
    }
}
