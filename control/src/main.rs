//! `holdfast-control --config FILE`: the control plane process.
//!
//! Prints one line on stdout when it is ready; logs go to stderr (`HOLDFAST_LOG` filters them). SIGTERM and SIGINT
//! stop it cleanly: opens are in the journal, and back at the next start.
//!
//! | exit code | why |
//! |---|---|
//! | 0 | it was stopped |
//! | 1 | it cannot start, or not go on: the last line on stderr says why |
//! | 70 | a fault of its own (a panic) |
//! | 74 | the journal's disk has failed |
//!
//! After 70 and 74 a supervisor starts it anew.

use anyhow::Context;
use clap::Parser;
use holdfast_control::config::Config;
use holdfast_control::server::{self, Options, Ready};
use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Holdfast's control plane: authenticates, opens files, issues resume keys.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The config file (TOML).
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Start anew where the journal is damaged, lost, or older than it was. Nothing of it is known then: every older
    /// resume key is BadKey. The old journal is set aside, not removed
    #[arg(long)]
    accept_journal_loss: bool,
    /// Start though a volume is missing, or not configured any more, of which opens are recorded. Files that are not
    /// found are lost then, and their clients are told so
    #[arg(long)]
    accept_lost_volumes: bool,
}

/// Exit code after a panic: our own bug, so a supervisor starts us anew.
const EXIT_PANIC: i32 = 70;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // One line with all causes; a backtrace would tell an operator nothing.
            eprintln!("holdfast-control: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    // First of all: nobody else may have opened a descriptor yet.
    let inherited = holdfast_kernel::inherited();
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_env("HOLDFAST_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours).init();
    // A task that panics must not leave a server behind that only looks alive.
    std::panic::set_hook(Box::new(|panic| {
        tracing::error!("{panic}");
        std::process::exit(EXIT_PANIC);
    }));
    let config = Config::load(&arguments.config)?;
    // Every file is made with the mode that its maker names.
    rustix::process::umask(Mode::empty());
    raise_descriptor_limit();

    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(config.limits.file_threads)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let options = Options {
        accept_journal_loss: arguments.accept_journal_loss,
        accept_lost_volumes: arguments.accept_lost_volumes,
        inherited,
        notify: std::env::var_os("NOTIFY_SOCKET"),
    };
    let result = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let stop = async {
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        };
        server::run(config, options, announce, stop).await
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

fn announce(ready: &Ready) {
    let line = serde_json::json!({
        "ready": "control",
        "listen": ready.listen,
        "admin": ready.admin,
        "link": ready.link,
        "recovered": ready.recovered,
        "lost": ready.lost,
    });
    let mut out = std::io::stdout().lock();
    // Whoever started us may have gone; we serve all the same.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// Each open holds a descriptor: take as many as the system allows.
fn raise_descriptor_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}
