//! `holdfast serve`: both planes, started, watched and stopped together.
//!
//! ```text
//!   serve ── guard ─exec─► holdfast-control      ready line on stdout, logs on stderr
//!     │                         ▲ link
//!     └───── guard ─exec─► holdfast-dataplane
//!
//!   SIGTERM: data plane first (its clients' bytes are placed), then control; what hangs is killed.
//! ```

pub(crate) mod guard;
mod plane;

use crate::args::Serve;
use anyhow::{Context, bail};
use plane::{Plane, Ready};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

/// How long both planes may take to be ready at the first start.
const READY_MAX: Duration = Duration::from_secs(60);

/// A plane under watch.
struct Watched {
    stop: watch::Sender<bool>,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Watched {
    fn start(plane: Plane, ready: mpsc::Sender<Ready>) -> Self {
        let (stop, stopped) = watch::channel(false);
        Self { stop, task: tokio::spawn(plane.watch(ready, stopped)) }
    }

    async fn stop(self) -> anyhow::Result<()> {
        let _ = self.stop.send(true);
        self.task.await?
    }
}

pub(crate) async fn run(args: &Serve) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let asked_to_stop = async {
        tokio::select! { _ = terminate.recv() => (), _ = interrupt.recv() => () }
    };
    tokio::pin!(asked_to_stop);

    let (ready_sender, mut ready) = mpsc::channel(8);
    let mut control = Watched::start(plane(args, "control")?, ready_sender.clone());
    let started = tokio::select! {
        first = wait_ready(&mut ready, &mut control, args.json) => first,
        () = &mut asked_to_stop => return control.stop().await,
    };
    // A plane that could not start has said why; nothing else runs yet.
    let control_ready = started?;
    let mut dataplane = Watched::start(plane(args, "dataplane")?, ready_sender);
    let started = tokio::select! {
        first = wait_ready(&mut ready, &mut dataplane, args.json) => Some(first),
        () = &mut asked_to_stop => None,
    };
    let result = match started {
        Some(Ok(dataplane_ready)) => {
            announce(args, &control_ready, &dataplane_ready);
            tokio::select! {
                () = &mut asked_to_stop => Ok(()),
                // Planes that are ready once are restarted for ever: an end is a fault of ours or of the system.
                end = &mut control.task => { let _ = dataplane.stop().await; return end?; }
                end = &mut dataplane.task => { let _ = control.stop().await; return end?; }
                () = pass_on(&mut ready, args.json) => Ok(()),
            }
        }
        Some(Err(error)) => {
            let _ = control.stop().await;
            return Err(error);
        }
        None => Ok(()),
    };
    tracing::info!("stopping");
    let (data, control) = (dataplane.stop().await, control.stop().await);
    result.and(data).and(control)
}

/// The first ready line of a plane, or why it will not come.
async fn wait_ready(
    ready: &mut mpsc::Receiver<Ready>,
    plane: &mut Watched,
    json: bool,
) -> anyhow::Result<Value> {
    tokio::select! {
        line = ready.recv() => {
            let line = line.context("a plane ended at once")?;
            if json {
                println!("{}", line.0);
            }
            Ok(line.0)
        }
        end = &mut plane.task => match end? {
            Err(error) => Err(error),
            Ok(()) => bail!("a plane stopped before it was ready"),
        },
        () = tokio::time::sleep(READY_MAX) => {
            bail!("a plane was not ready within {} s; see its log above", READY_MAX.as_secs())
        }
    }
}

/// Ready lines of planes that were started again.
async fn pass_on(ready: &mut mpsc::Receiver<Ready>, json: bool) {
    while let Some(Ready(line)) = ready.recv().await {
        if json {
            println!("{line}");
        }
    }
}

fn announce(args: &Serve, control: &Value, dataplane: &Value) {
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Array(all) => all.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", "),
        _ => String::new(),
    };
    if args.json {
        let line = json!({
            "ready": "holdfast",
            "listen": control["listen"],
            "admin": control["admin"],
            "tcp": dataplane["tcp"],
            "verbs": dataplane["verbs"],
        });
        println!("{line}");
        return;
    }
    let (tcp, verbs) = (text(&dataplane["tcp"]), text(&dataplane["verbs"]));
    println!("ready: clients connect to {}", text(&control["listen"]));
    println!("data channels over tcp:   {}", if tcp.is_empty() { "off" } else { &tcp });
    println!(
        "data channels over verbs: {}",
        if verbs.is_empty() { "none (`holdfast doctor` says why)" } else { &verbs }
    );
    println!("try: holdfast --config {} volumes", args.dir.join("client.toml").display());
}

fn plane(args: &Serve, name: &'static str) -> anyhow::Result<Plane> {
    let config = args.dir.join(format!("{name}.toml"));
    if !config.is_file() {
        bail!("there is no {}; make it with: holdfast init --dir {}", config.display(), args.dir.display());
    }
    let program = find(args.bin_dir.as_deref(), &format!("holdfast-{name}"))?;
    Ok(Plane { name, program, config })
}

fn find(bin_dir: Option<&Path>, program: &str) -> anyhow::Result<PathBuf> {
    let directory = match bin_dir {
        Some(directory) => directory.to_path_buf(),
        None => {
            let own = std::env::current_exe().context("cannot tell where this program is; give --bin-dir")?;
            own.parent().context("this program has no directory; give --bin-dir")?.to_path_buf()
        }
    };
    let path = directory.join(program);
    if path.is_file() {
        return Ok(path);
    }
    bail!(
        "{program} is not in {}: build it (cargo build -p {program}), or say where it is with --bin-dir",
        directory.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_says_what_to_do() {
        let temp = tempfile::tempdir().unwrap();
        let error = find(Some(temp.path()), "holdfast-control").unwrap_err().to_string();
        assert!(error.contains("cargo build -p holdfast-control") && error.contains("--bin-dir"), "{error}");
    }
}
