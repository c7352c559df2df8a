//! One server process under watch: started, its ready line read, started again when it dies, stopped on request.

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};

/// First wait before a plane that crashed soon after its start is started again; doubles with each such crash.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// The same for one that had become ready: what killed it may come from outside, and its clients wait.
const BACKOFF_READY_MAX: Duration = Duration::from_secs(1);
/// A plane that ran so long is taken to be well: if it dies it is started again at once, for its clients wait.
const WELL_AFTER: Duration = Duration::from_secs(1);
/// From SIGTERM to SIGKILL.
const STOP_MAX: Duration = Duration::from_secs(10);

/// How long to wait before a plane is started again.
struct Backoff(Duration);

impl Backoff {
    /// After a run of `ran` which did or did not become ready: nothing if the plane was well, else longer each time.
    fn after(&mut self, ran: Duration, ready: bool) -> Duration {
        if ready && ran >= WELL_AFTER {
            self.0 = BACKOFF_MIN;
            return Duration::ZERO;
        }
        let wait = if ready { self.0.min(BACKOFF_READY_MAX) } else { self.0 };
        self.0 = (wait * 2).min(BACKOFF_MAX);
        wait
    }
}

/// A plane's ready line.
pub(super) struct Ready(pub(super) Value);

/// How a plane is started.
pub(super) struct Plane {
    pub(super) name: &'static str,
    /// This program, as it was found at the start: once it is replaced, the system does not tell its path any more.
    pub(super) own: PathBuf,
    pub(super) program: PathBuf,
    pub(super) config: PathBuf,
}

impl Plane {
    fn spawn(&self) -> anyhow::Result<Child> {
        Command::new(&self.own)
            .arg("plane-guard")
            .arg(format!("--parent={}", std::process::id()))
            .arg("--")
            .arg(&self.program)
            .arg("--config")
            .arg(&self.config)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            // A terminal's Ctrl-C must reach the planes through us, in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {}", self.program.display()))
    }

    /// Keeps the plane running until told to stop. An error if it never became ready.
    pub(super) async fn watch(
        self,
        ready: mpsc::Sender<Ready>,
        mut stop: watch::Receiver<bool>,
    ) -> anyhow::Result<()> {
        let (mut backoff, mut was_ready) = (Backoff(BACKOFF_MIN), false);
        loop {
            let started = Instant::now();
            let mut child = match self.spawn() {
                Ok(child) => child,
                Err(error) if !was_ready => return Err(error),
                Err(error) => {
                    // A program that is just being replaced, or a system short of processes, comes back.
                    tracing::error!(plane = self.name, "{error:#}; it will be tried again");
                    tokio::select! {
                        () = sleep(backoff.after(Duration::ZERO, false)) => {}
                        _ = stop.changed() => return Ok(()),
                    }
                    continue;
                }
            };
            let stdout = child.stdout.take().context("the plane has no stdout")?;
            let mut lines = BufReader::new(stdout).lines();
            let (mut open, mut ready_now) = (true, false);
            let status = loop {
                tokio::select! {
                    line = lines.next_line(), if open => match line {
                        Ok(Some(line)) => match self.parse(&line) {
                            Some(value) => {
                                (was_ready, ready_now) = (true, true);
                                let _ = ready.send(Ready(value)).await;
                            }
                            None => tracing::debug!(plane = self.name, "{line}"),
                        },
                        _ => open = false,
                    },
                    status = child.wait() => break status?,
                    _ = stop.changed() => return self.stop(child).await,
                }
            };
            if !was_ready {
                bail!("holdfast-{} ended before it was ready ({status}); its log above says why", self.name);
            }
            let wait = backoff.after(started.elapsed(), ready_now);
            tracing::error!(
                plane = self.name,
                %status,
                again_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
                "the plane died; it will be started again"
            );
            tokio::select! {
                () = sleep(wait) => {}
                _ = stop.changed() => return Ok(()),
            }
        }
    }

    fn parse(&self, line: &str) -> Option<Value> {
        let value: Value = serde_json::from_str(line).ok()?;
        (value["ready"] == self.name).then_some(value)
    }

    async fn stop(&self, mut child: Child) -> anyhow::Result<()> {
        if let Some(pid) = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw) {
            // Gone meanwhile is as good.
            let _ = kill_process(pid, Signal::TERM);
        }
        match timeout(STOP_MAX, child.wait()).await {
            Ok(status) => {
                let status = status?;
                if !status.success() {
                    tracing::warn!(plane = self.name, %status, "the plane did not stop cleanly");
                }
            }
            Err(_) => {
                tracing::error!(plane = self.name, "the plane did not stop within {STOP_MAX:?}; killing it");
                child.kill().await?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plane_that_was_well_is_started_at_once_and_one_that_was_not_waits_longer_each_time() {
        let mut backoff = Backoff(BACKOFF_MIN);
        let short = WELL_AFTER / 2;
        assert_eq!(backoff.after(WELL_AFTER, true), Duration::ZERO);
        assert_eq!([backoff.after(short, true), backoff.after(short, false)], [BACKOFF_MIN, BACKOFF_MIN * 2]);
        assert!((0..20).all(|_| backoff.after(short, true) <= BACKOFF_READY_MAX));
        let tries = [(); 20].map(|()| backoff.after(WELL_AFTER, false));
        assert_eq!(tries.last(), Some(&BACKOFF_MAX), "it never became ready, however long it tried");
        assert_eq!(backoff.after(WELL_AFTER, true), Duration::ZERO);
        assert_eq!(backoff.after(short, true), BACKOFF_MIN, "one good run, and all is forgotten");
    }

    #[test]
    fn only_its_own_ready_line_counts() {
        let plane =
            Plane { name: "control", own: PathBuf::new(), program: PathBuf::new(), config: PathBuf::new() };
        assert!(plane.parse(r#"{"ready":"control","listen":["127.0.0.1:1"]}"#).is_some());
        assert!(plane.parse(r#"{"ready":"dataplane"}"#).is_none());
        assert!(plane.parse("hello").is_none());
    }
}
