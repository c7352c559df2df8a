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
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

/// How long the data plane may take to be ready once control is. Control has no such limit: it brings back every open of
/// before, however many, and says how far it is.
const DATAPLANE_READY_MAX: Duration = Duration::from_secs(60);

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
    let own = std::env::current_exe().context("cannot tell where this program is")?;
    let mut latest = Latest::default();

    let (ready_sender, mut ready) = mpsc::channel(8);
    let mut control = Watched::start(plane(args, &own, "control")?, ready_sender.clone());
    let started = tokio::select! {
        first = wait_ready(&mut ready, &mut control, "control", &mut latest, args.json) => first,
        () = &mut asked_to_stop => return control.stop().await,
    };
    // A plane that could not start has said why; nothing else runs yet.
    started?;
    let mut dataplane = Watched::start(plane(args, &own, "dataplane")?, ready_sender);
    let started = tokio::select! {
        first = wait_ready(&mut ready, &mut dataplane, "dataplane", &mut latest, args.json) => Some(first),
        () = tokio::time::sleep(DATAPLANE_READY_MAX) => Some(Err(anyhow::anyhow!(
            "the data plane was not ready within {} s; see its log above", DATAPLANE_READY_MAX.as_secs()
        ))),
        () = &mut asked_to_stop => None,
    };
    let result = match started {
        Some(Ok(())) => {
            announce(args, &latest);
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

/// The newest ready line of each plane.
#[derive(Default)]
struct Latest {
    control: Value,
    dataplane: Value,
}

/// Waits for the first ready line of the plane `name`, or tells why it will not come. Another plane may be started again
/// meanwhile: its line is kept, but is not the one.
async fn wait_ready(
    ready: &mut mpsc::Receiver<Ready>,
    plane: &mut Watched,
    name: &str,
    latest: &mut Latest,
    json: bool,
) -> anyhow::Result<()> {
    let come = async {
        loop {
            let Ready(line) = ready.recv().await.context("a plane ended at once")?;
            if json {
                say(&line);
            }
            let whose = line["ready"].as_str().unwrap_or_default().to_owned();
            *(if whose == "control" { &mut latest.control } else { &mut latest.dataplane }) = line;
            if whose == name {
                return Ok(());
            }
        }
    };
    tokio::select! {
        done = come => done,
        end = &mut plane.task => match end? {
            Err(error) => Err(error),
            Ok(()) => bail!("a plane stopped before it was ready"),
        },
    }
}

/// Ready lines of planes that were started again.
async fn pass_on(ready: &mut mpsc::Receiver<Ready>, json: bool) {
    while let Some(Ready(line)) = ready.recv().await {
        if json {
            say(&line);
        }
    }
}

/// A line on standard output. That nobody reads it (any more) is no reason to stop serving.
fn say(text: impl std::fmt::Display) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

fn announce(args: &Serve, latest: &Latest) {
    let Latest { control, dataplane } = latest;
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
            "local": dataplane["local"],
        });
        say(line);
        return;
    }
    let (tcp, verbs) = (text(&dataplane["tcp"]), text(&dataplane["verbs"]));
    say(format_args!("ready: clients connect to {}", text(&control["listen"])));
    say(format_args!("data channels over tcp:   {}", if tcp.is_empty() { "off" } else { &tcp }));
    say(format_args!(
        "data channels over verbs: {}",
        if verbs.is_empty() { "none (`holdfast doctor` says why)" } else { &verbs }
    ));
    let local = text(&dataplane["local"]);
    say(format_args!("data channels over local: {}", if local.is_empty() { "none" } else { &local }));
    say(format_args!("try: holdfast --config {} volumes", args.dir.join("client.toml").display()));
}

fn plane(args: &Serve, own: &Path, name: &'static str) -> anyhow::Result<Plane> {
    let config = args.dir.join(format!("{name}.toml"));
    if !config.is_file() {
        bail!("there is no {}; make it with: holdfast init --dir {}", config.display(), args.dir.display());
    }
    let beside = own.parent().context("this program has no directory; give --bin-dir")?;
    let program = find(args.bin_dir.as_deref().unwrap_or(beside), &format!("holdfast-{name}"))?;
    Ok(Plane { name, own: own.to_path_buf(), program, config })
}

fn find(directory: &Path, program: &str) -> anyhow::Result<PathBuf> {
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

    #[tokio::test]
    async fn a_ready_line_of_another_plane_does_not_count() {
        let (sender, mut ready) = mpsc::channel(8);
        for line in
            [json!({ "ready": "control", "listen": ["new"] }), json!({ "ready": "dataplane", "tcp": "x" })]
        {
            sender.send(Ready(line)).await.unwrap();
        }
        let mut dataplane =
            Watched { stop: watch::channel(false).0, task: tokio::spawn(std::future::pending()) };
        let mut latest = Latest::default();
        wait_ready(&mut ready, &mut dataplane, "dataplane", &mut latest, false).await.unwrap();
        assert_eq!((&latest.dataplane["tcp"], &latest.control["listen"][0]), (&json!("x"), &json!("new")));
        dataplane.task.abort();
    }

    #[test]
    fn a_missing_program_says_what_to_do() {
        let temp = tempfile::tempdir().unwrap();
        let error = find(temp.path(), "holdfast-control").unwrap_err().to_string();
        assert!(error.contains("cargo build -p holdfast-control") && error.contains("--bin-dir"), "{error}");
    }
}
