//! The `holdfast` command.
//!
//! ```text
//!   args      what can be typed                        init, cert    make a private CA, certificates, configs
//!   remote    VOLUME:/path                             serve         start and supervise both planes
//!   names     ls stat mkdir rm mv df volumes           copy, cat     move bytes
//!   output    tables, sizes, times                     doctor        is RDMA in use, and if not, why
//!   admin     the server's admin socket                opens         what the operator sees and ends
//!   exit      exit codes                               bench         how fast a file is read and written
//! ```

mod admin;
mod args;
mod bench;
mod cat;
mod cert;
mod copy;
mod doctor;
mod exit;
mod init;
mod names;
mod opens;
mod output;
mod pki;
mod remote;
mod serve;

use args::{Cli, Command};
use clap::Parser;
use std::io::IsTerminal;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Command::PlaneGuard(guard) = &cli.command {
        return exit::report(serve::guard::run(guard), false);
    }
    let filter = tracing_subscriber::EnvFilter::try_from_env("HOLDFAST_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(cli.command.default_log()));
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours).init();
    // `serve` must spawn its children from a thread that lives as long as it does (see serve::guard).
    let mut builder = match cli.command {
        Command::Serve(_) => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    let json = cli.json_errors();
    let runtime = match builder.enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return exit::report(Err(error.into()), json),
    };
    let result = runtime.block_on(run(cli));
    // Blocking work that hangs (a dead disk) must not keep the command from ending.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    exit::report(result, json)
}

async fn run(cli: Cli) -> anyhow::Result<()> {
    let connection = cli.connection;
    match cli.command {
        Command::Init(init) => init::run(&init),
        Command::Cert(cert) => cert::run(&cert),
        Command::Serve(serve) => serve::run(&serve).await,
        Command::Cp(copy) => copy::run(&connection, &copy).await,
        Command::Bench(bench) => bench::run(&connection, &bench).await,
        Command::Cat(cat) => cat::run(&connection, &cat).await,
        Command::Doctor(doctor) => doctor::run(&connection, &doctor).await,
        Command::Opens(args) => opens::run(&connection, &args).await,
        Command::Sessions(args) => opens::sessions(&connection, &args).await,
        Command::Ls(ls) => names::ls(&connection, &ls).await,
        Command::Stat(stat) => names::stat(&connection, &stat).await,
        Command::Mkdir(mkdir) => names::mkdir(&connection, &mkdir).await,
        Command::Rm(rm) => names::rm(&connection, &rm).await,
        Command::Mv(mv) => names::mv(&connection, &mv).await,
        Command::Df(df) => names::df(&connection, &df).await,
        Command::Volumes(volumes) => names::volumes(&connection, &volumes).await,
        Command::PlaneGuard(guard) => serve::guard::run(&guard),
    }
}
