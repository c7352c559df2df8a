//! What was copied: counts, the progress bar, the report.

use holdfast_client::DataChannel;
use holdfast_client::stream::Progress;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

pub(super) struct Tally {
    bar: ProgressBar,
    bytes: Arc<AtomicU64>,
    files: AtomicU64,
    directories: AtomicU64,
    symlinks: AtomicU64,
    skipped: AtomicU64,
    failed: AtomicU64,
    first: Mutex<Option<anyhow::Error>>,
    opens: AtomicU64,
    binds: AtomicU64,
}

impl Tally {
    /// The bar is drawn on a terminal only.
    pub(super) fn new(json: bool) -> Self {
        let target = if json || !std::io::stderr().is_terminal() {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stderr_with_hz(10)
        };
        let bar = ProgressBar::with_draw_target(Some(0), target);
        let template = "{bar:30} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left {msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Self {
            bar,
            bytes: Arc::default(),
            files: AtomicU64::new(0),
            directories: AtomicU64::new(0),
            symlinks: AtomicU64::new(0),
            skipped: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            first: Mutex::new(None),
            opens: AtomicU64::new(0),
            binds: AtomicU64::new(0),
        }
    }

    /// What streams call for each piece.
    pub(super) fn progress(&self) -> Progress {
        let (bytes, bar) = (Arc::clone(&self.bytes), self.bar.clone());
        Arc::new(move |count| {
            bytes.fetch_add(count, Relaxed);
            bar.inc(count);
        })
    }

    pub(super) fn planned(&self, bytes: u64) {
        self.bar.inc_length(bytes);
    }

    pub(super) fn file(&self) {
        self.files.fetch_add(1, Relaxed);
    }

    pub(super) fn directory(&self) {
        self.directories.fetch_add(1, Relaxed);
    }

    pub(super) fn symlink(&self) {
        self.symlinks.fetch_add(1, Relaxed);
    }

    pub(super) fn open(&self) {
        self.opens.fetch_add(1, Relaxed);
    }

    pub(super) fn bind(&self) {
        self.binds.fetch_add(1, Relaxed);
    }

    pub(super) fn skipped(&self, what: &str, why: &str) {
        self.skipped.fetch_add(1, Relaxed);
        self.say(&format!("holdfast: skipped {what}: {why}"));
    }

    pub(super) fn failed(&self, what: &str, error: anyhow::Error) {
        self.failed.fetch_add(1, Relaxed);
        self.say(&format!("holdfast: {what}: {error:#}"));
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert(error);
    }

    /// The first failure; once.
    pub(super) fn take_first(&self) -> Option<anyhow::Error> {
        self.first.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// A line for people. Names and refusals are the server's: they must not drive the terminal.
    pub(super) fn say(&self, text: &str) {
        let text = crate::output::shown(text);
        self.bar.suspend(|| drop(writeln!(std::io::stderr(), "{text}")));
    }

    /// How many failed, of how many.
    pub(super) fn failures(&self) -> (u64, u64) {
        let failed = self.failed.load(Relaxed);
        (
            failed,
            failed + self.files.load(Relaxed) + self.symlinks.load(Relaxed) + self.directories.load(Relaxed),
        )
    }

    pub(super) fn finish(&self) {
        self.bar.finish_and_clear();
    }

    pub(super) fn report(
        &self,
        as_json: bool,
        channel: Option<&DataChannel>,
        channels: usize,
        elapsed: Duration,
    ) -> anyhow::Result<()> {
        let get = |counter: &AtomicU64| counter.load(Relaxed);
        let transport = channel.map(|c| c.transport().name());
        let (bytes, seconds) = (get(&self.bytes), elapsed.as_secs_f64());
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        // a rate
        let rate = (bytes as f64 / seconds.max(1e-9)) as u64;
        if as_json {
            return crate::output::line(json!({
                "transport": transport,
                "channels": channels,
                "transport_reason": channel.and_then(DataChannel::fallback_reason),
                "files": get(&self.files),
                "directories": get(&self.directories),
                "symlinks": get(&self.symlinks),
                "skipped": get(&self.skipped),
                "failed": get(&self.failed),
                "bytes": bytes,
                "seconds": seconds,
                "bytes_per_second": rate,
                "opens": get(&self.opens),
                "binds": get(&self.binds),
            }));
        }
        crate::output::line(format_args!(
            "{} files, {} directories, {} symlinks: {} in {seconds:.2} s, {}/s over {} ({} opens, {} binds)",
            get(&self.files),
            get(&self.directories),
            get(&self.symlinks),
            crate::output::size(bytes),
            crate::output::size(rate),
            transport.unwrap_or("no data channel"),
            get(&self.opens),
            get(&self.binds),
        ))
    }
}
