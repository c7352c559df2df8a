//! `holdfast-dataplane`: the data plane process.
//!
//! ```text
//!  read the config ─► listen ─► start the engine ─► register with control ─► one "ready" line on stdout
//!                                                                              │ SIGTERM, SIGINT
//!                          exit 0 ◄─ end channels, finish I/O ◄─ stop accepting ◄┘
//! ```

use anyhow::Context;
use clap::Parser;
use holdfast_dataplane::config::Config;
use holdfast_dataplane::engine::{Engine, KernelFile, Settings};
use holdfast_dataplane::fault;
use holdfast_dataplane::link::{self, LinkPort};
use holdfast_dataplane::listeners::Listeners;
use holdfast_shared::wire::data;
use holdfast_shared::wire::service::ServiceBlob;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::io::{IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

// Counts every allocation, so that the steady state can be seen to make none.
#[global_allocator]
static HEAP: &stats_alloc::StatsAlloc<std::alloc::System> = &stats_alloc::INSTRUMENTED_SYSTEM;

/// The data plane of Holdfast: moves bytes between files and clients' registered memory.
#[derive(Parser)]
#[command(name = "holdfast-dataplane", version)]
struct Arguments {
    /// The configuration, `dataplane.toml`.
    #[arg(long)]
    config: PathBuf,
}

fn heap() -> (u64, u64) {
    let stats = HEAP.stats();
    let now = stats.bytes_allocated.saturating_sub(stats.bytes_deallocated);
    ((stats.allocations + stats.reallocations) as u64, now as u64)
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // One line with all causes; a backtrace would tell an operator nothing.
            eprintln!("holdfast-dataplane: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_from_env("HOLDFAST_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr).init();
    fault::end_on_panic();
    raise_descriptor_limit();
    // Before any thread is there: all of them inherit it.
    let mut signals = signals()?;
    let config = Config::load(&Arguments::parse().config)?;
    let port = LinkPort::new().context("cannot make the link's queue")?;
    let engine = Engine::start(settings(&config)?, Arc::clone(&port) as _, KernelFile::opener())
        .context("cannot start the engine")?;
    engine.gauges().set_heap_source(heap);
    let mut listeners = Listeners::bind(&config, engine.pools(), engine.lanes())?;
    let blob = ServiceBlob {
        instance: engine.settings().instance,
        boot_ms: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .ok()
            .and_then(|since| u64::try_from(since.as_millis()).ok())
            .unwrap_or(0),
        version_min: data::VERSION,
        version_max: data::VERSION,
        endpoints: listeners.endpoints(),
        transfer_max: engine.settings().limits.transfer_bytes_max,
    };
    listeners.start(&engine)?;
    let ready = ready_line(&listeners);
    let serving = {
        let (port, engine, path) = (Arc::clone(&port), Arc::clone(&engine), config.link.0.clone());
        std::thread::Builder::new().name("link".to_owned()).spawn(move || {
            link::run(&port, &engine, path, blob.encode(), || say(&ready));
        })?
    };
    // Any byte means: stop. An error would mean the same.
    let _ = signals.read(&mut [0]);
    tracing::info!("stopping");
    listeners.stop();
    engine.stop();
    port.stop();
    if serving.join().is_err() {
        tracing::error!("the link's thread had panicked");
    }
    Ok(())
}

/// Each channel and each binding holds a descriptor; the usual soft limit of 1024 is for programs that use select.
fn raise_descriptor_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

/// Becomes readable when the process is asked to end.
fn signals() -> anyhow::Result<UnixStream> {
    let (ours, theirs) = UnixStream::pair()?;
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::low_level::pipe::register(signal, theirs.try_clone()?)
            .context("cannot watch for signals")?;
    }
    Ok(ours)
}

fn settings(config: &Config) -> anyhow::Result<Settings> {
    let mut instance = [0; 16];
    aws_lc_rs::rand::fill(&mut instance).ok().context("no randomness")?;
    Ok(Settings {
        engine: config.engine.clone(),
        limits: config.limits.clone(),
        map: config.map.clone(),
        instance,
        verifier: verifier()?,
    })
}

/// Stands for the page cache, where written and unflushed bytes are: it is lost when the host is started again, and not
/// when a process is. So it is made of the kernel's boot id, and is the same for every data plane of one boot.
fn verifier() -> anyhow::Result<u64> {
    let path = "/proc/sys/kernel/random/boot_id";
    let mut bytes = [0; 8];
    match std::fs::read(path) {
        Ok(boot_id) => {
            let seed = [b"holdfast write verifier ", boot_id.as_slice()].concat();
            let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &seed);
            bytes.iter_mut().zip(digest.as_ref()).for_each(|(to, from)| *to = *from);
        }
        // Then every restart looks like one of the host: clients repeat more than they need to.
        Err(error) => {
            tracing::warn!(%error, path, "no boot id");
            aws_lc_rs::rand::fill(&mut bytes).ok().context("no randomness")?;
        }
    }
    Ok(u64::from_le_bytes(bytes))
}

fn ready_line(listeners: &Listeners) -> String {
    let verbs: Vec<String> = listeners.verbs.iter().map(|address| format!("\"{address}\"")).collect();
    let tcp = listeners.tcp.map_or("null".to_owned(), |address| format!("\"{address}\""));
    let local = serde_json::Value::from(listeners.local.as_ref().and_then(|path| path.to_str()));
    format!("{{\"ready\":\"dataplane\",\"tcp\":{tcp},\"verbs\":[{}],\"local\":{local}}}\n", verbs.join(","))
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    // Who started us may have closed its end; that is no reason to stop serving.
    let _ = out.write_all(line.as_bytes()).and_then(|()| out.flush());
}
