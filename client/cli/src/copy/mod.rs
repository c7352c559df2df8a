//! `holdfast cp`: files and trees between this machine and volumes.
//!
//! ```text
//!   plan: walks the sources, makes directories ──jobs (bounded)──► workers: several files at once, one channel (large
//!                                                                   │ files: several); each: temporary name, bytes, flush,
//!                                                                   │       mode and time, rename
//!                                                                   ▼
//!                                                                 tally, progress bar
//! ```
//!
//! A file appears under its name only when it is complete and flushed: until then it is
//! `.holdfast-<random>.part` beside it, and an interrupted copy removes that again.
//!
//! A server that goes away is waited for (`recovery` in client.toml), and the copy goes on where it was. What its host's
//! memory has lost is sent again; names whose fate is unknown are looked at ([`settle`]); a file that somebody else
//! changed meanwhile fails.

mod download;
mod settle;
mod tally;
mod upload;

use crate::args::{Connection, Copy};
use crate::exit::Partial;
use crate::remote::Remote;
use anyhow::{Context, bail};
use holdfast_client::stream::{Streamer, Target};
use holdfast_client::{
    Config, DataChannel, Open, Recovery, Session, Status, Stripes, Transport, TransportKind,
};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;
use tally::Tally;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Mutex, OnceCell, mpsc, watch};
use tokio::task::JoinSet;

/// Jobs planned ahead of the workers.
const PLANNED_MAX: usize = 256;
/// Memory for the chunks of all files under way, unless --chunk says otherwise.
const CHUNKS_BYTES: usize = 64 << 20;
const CHUNK_BYTES_MIN: usize = 64 << 10;
const CHUNK_BYTES_MAX: usize = 1 << 20;

/// Files of so many bytes are worth several channels.
const LARGE: u64 = 64 << 20;

/// Longest wait for a server that is away when what was left behind is removed, milliseconds.
const SWEEP_MS: u64 = 3_000;

/// What all workers share.
struct Shared {
    session: Session,
    transport: Transport,
    channel: OnceCell<DataChannel>,
    /// Those beyond the first: for large files.
    more: OnceCell<Vec<DataChannel>>,
    channels: usize,
    tally: Tally,
    flush: bool,
    cancelled: watch::Receiver<bool>,
    /// Incomplete files that could not be removed, because the session was lost.
    left: std::sync::Mutex<Vec<Remote>>,
}

impl Shared {
    /// An open of a file of `size` bytes, ready for its bytes: large ones over several channels.
    async fn target(&self, open: &Open, size: u64) -> anyhow::Result<Target> {
        let first = self.channel(open).await?;
        // On the server's host one channel is as good as many, and may read the file itself.
        let one = size < LARGE || first.transport() == TransportKind::Local;
        let more = if one { &[] } else { self.more(open).await };
        if more.is_empty() {
            let binding = open.bind(first).await?;
            self.tally.bind();
            return Ok(binding.into());
        }
        let stripes = Stripes::new(open)?;
        for channel in std::iter::once(first).chain(more) {
            stripes.add(channel).await?;
            self.tally.bind();
        }
        Ok(stripes.into())
    }

    /// The channels beyond the first; connected when the first large file needs them. It is copied without those that cannot
    /// be had.
    async fn more(&self, open: &Open) -> &[DataChannel] {
        let connect = async || {
            let mut more = Vec::new();
            for nth in 1..self.channels {
                match open.connect_nth(self.transport, nth).await {
                    Ok(channel) => more.push(channel),
                    Err(error) => {
                        let wanted = self.channels;
                        tracing::warn!(%error, nth, wanted, "fewer data channels than wanted");
                        break;
                    }
                }
            }
            more
        };
        self.more.get_or_init(connect).await
    }

    /// The first data channel; connected when the first file needs it.
    async fn channel(&self, open: &Open) -> anyhow::Result<&DataChannel> {
        let connected = self.channel.get_or_try_init(|| open.connect(self.transport)).await;
        connected.map_err(|error| {
            let hint = match self.transport {
                Transport::Verbs => {
                    "; `holdfast doctor` says what is missing, and --transport auto does without"
                }
                _ => "",
            };
            anyhow::Error::new(error).context(NoChannel(hint))
        })
    }

    /// Runs a transfer unless the copy is interrupted; then its temporary file can be removed at once.
    async fn unless_cancelled<T>(&self, work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
        let mut cancelled = self.cancelled.clone();
        tokio::select! {
            done = work => done,
            _ = cancelled.wait_for(|yes| *yes) => bail!("interrupted"),
        }
    }

    /// Reports what could not be copied and goes on, unless nothing more can be.
    fn failed(&self, what: &str, error: anyhow::Error) -> anyhow::Result<()> {
        // A channel that breaks is connected again by whoever needs it next.
        let given_up =
            *self.cancelled.borrow() || error.is::<NoChannel>() || crate::exit::is_connection(&error);
        if given_up {
            return Err(error.context(format!("the copy was given up at {what}")));
        }
        self.tally.failed(what, error);
        Ok(())
    }
}

/// There is no data channel, and there will be none for the other files either.
#[derive(Debug, thiserror::Error)]
#[error("no data channel{0}")]
struct NoChannel(&'static str);

/// One file to copy.
enum Job {
    Up(upload::File),
    Down(download::File),
}

pub(crate) async fn run(connection: &Connection, args: &Copy) -> anyhow::Result<()> {
    let way = direction(args)?;
    let mut config = connection.load()?;
    if let Some(transport) = args.transport {
        config.transport = transport;
    }
    let session = Session::connect(&config).await?;
    let (cancel, cancelled) = watch::channel(false);
    let shared = Arc::new(Shared {
        session,
        transport: config.transport,
        channel: OnceCell::new(),
        more: OnceCell::new(),
        channels: args.channels,
        tally: Tally::new(args.json),
        flush: !args.no_flush,
        cancelled,
        left: std::sync::Mutex::default(),
    });
    let start = Instant::now();
    let watch = tokio::spawn(on_interrupt(cancel));
    let result = copy(&shared, args, way).await;
    watch.abort();
    shared.tally.finish();
    let (failed, total) = shared.tally.failures();
    // With nothing copied there is nothing to tell people; programs get their summary always.
    if result.is_ok() && (args.json || failed == 0 || failed < total) {
        let channels = usize::from(shared.channel.initialized()) + shared.more.get().map_or(0, Vec::len);
        shared.tally.report(args.json, shared.channel.get(), channels, start.elapsed())?;
    }
    let session = shared.session.clone();
    session.close().await;
    sweep(&shared, &config).await;
    result?;
    match shared.tally.take_first() {
        Some(first) if failed == total => {
            Err(first.context(format!("nothing was copied, {failed} of {total} failed; the first")))
        }
        Some(_) => Err(Partial { failed, total }.into()),
        None => Ok(()),
    }
}

/// Removes incomplete files on the server that a lost session has left behind, or at least names them.
async fn sweep(shared: &Shared, config: &Config) {
    let left = std::mem::take(&mut *shared.left.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
    if left.is_empty() {
        return;
    }
    let mut config = config.clone();
    (config.recovery, config.soft_ms) = (Recovery::Soft, SWEEP_MS);
    let session = Session::connect(&config).await.ok();
    for part in left {
        let removed = match &session {
            Some(session) => match session.remove(&part.place()).await {
                Err(error) => error.status() == Some(Status::NotFound),
                Ok(()) => true,
            },
            None => false,
        };
        if !removed {
            shared.tally.say(&format!(
                "holdfast: an incomplete file was left behind; remove it with: holdfast rm {part}"
            ));
        }
    }
    if let Some(session) = session {
        session.close().await;
    }
}

async fn on_interrupt(cancel: watch::Sender<bool>) {
    let (Ok(mut interrupt), Ok(mut terminate)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return;
    };
    tokio::select! { _ = interrupt.recv() => (), _ = terminate.recv() => () }
    let _ = cancel.send(true);
    // A second one does not wait for anything.
    tokio::select! { _ = interrupt.recv() => (), _ = terminate.recv() => () }
    std::process::exit(130);
}

enum Way {
    Up { from: Vec<PathBuf>, to: Remote },
    Down { from: Vec<Remote>, to: PathBuf },
}

/// Which way the bytes go.
fn direction(args: &Copy) -> anyhow::Result<Way> {
    let Some((to, from)) = args.paths.split_last() else { bail!("nothing to copy") };
    let remote = |text: &String| text.parse::<Remote>().map_err(anyhow::Error::msg);
    let remotes = from.iter().filter(|path| Remote::looks_remote(path)).count();
    match (remotes == from.len(), remotes == 0, Remote::looks_remote(to)) {
        (_, true, true) => Ok(Way::Up { from: from.iter().map(PathBuf::from).collect(), to: remote(to)? }),
        (true, _, false) => {
            Ok(Way::Down { from: from.iter().map(remote).collect::<Result<_, _>>()?, to: PathBuf::from(to) })
        }
        (true, _, true) => {
            bail!("copies from volume to volume are not made here; copy to this machine first")
        }
        (_, true, false) => {
            bail!(
                "none of the paths is remote: write VOLUME:/path, and copy local files with the system's cp"
            )
        }
        _ => bail!("some sources are local and some remote; copy them one kind after the other"),
    }
}

async fn copy(shared: &Arc<Shared>, args: &Copy, way: Way) -> anyhow::Result<()> {
    let chunk = match args.chunk {
        Some(chunk) => chunk,
        None => (CHUNKS_BYTES / (args.parallel * args.depth)).clamp(CHUNK_BYTES_MIN, CHUNK_BYTES_MAX),
    };
    let (sender, receiver) = mpsc::channel(PLANNED_MAX);
    let receiver = Arc::new(Mutex::new(receiver));
    let mut workers = JoinSet::new();
    for _ in 0..args.parallel {
        let streamer = Streamer::new(args.depth, chunk)?;
        workers.spawn(worker(Arc::clone(shared), Arc::clone(&receiver), streamer));
    }
    // When all workers have given up, the plan's next send fails.
    drop(receiver);
    let directories = match way {
        Way::Up { from, to } => {
            upload::plan(shared, &from, to, args.recursive, sender).await.map(Directories::Up)
        }
        Way::Down { from, to } => {
            download::plan(shared, &from, to, args.recursive, sender).await.map(Directories::Down)
        }
    };
    let mut result = Ok(());
    while let Some(ended) = workers.join_next().await {
        let ended = ended.unwrap_or_else(|_| bail!("a copy worker panicked"));
        if result.is_ok() {
            result = ended;
        }
    }
    result?;
    // Modes and times of directories come last: files made in them would change the times again, and a read-only
    // directory takes none.
    match directories? {
        Directories::Up(all) => upload::finish_directories(shared, all).await,
        Directories::Down(all) => download::finish_directories(shared, all),
    }
}

enum Directories {
    Up(Vec<upload::Directory>),
    Down(Vec<download::Directory>),
}

async fn worker(
    shared: Arc<Shared>,
    jobs: Arc<Mutex<mpsc::Receiver<Job>>>,
    mut streamer: Streamer,
) -> anyhow::Result<()> {
    loop {
        let Some(job) = jobs.lock().await.recv().await else { return Ok(()) };
        let (name, done) = match &job {
            Job::Up(file) => {
                (file.from.display().to_string(), upload::file(&shared, file, &mut streamer).await)
            }
            Job::Down(file) => (file.from.to_string(), download::file(&shared, file, &mut streamer).await),
        };
        match done {
            Ok(()) => shared.tally.file(),
            Err(error) => shared.failed(&name, error)?,
        }
    }
}

/// Sends a job to the workers; fails when they have all given up.
async fn plan_job(sender: &mpsc::Sender<Job>, job: Job) -> anyhow::Result<()> {
    sender.send(job).await.ok().context("the copy was given up")
}

/// A name that no other file has, for one that is not complete.
fn part_name() -> anyhow::Result<String> {
    let bytes = holdfast_client::random_bytes::<8>()?;
    Ok(format!(".holdfast-{:016x}.part", u64::from_le_bytes(bytes)))
}

/// The targets of the sources named on the command line. Two of the same name would overwrite each other.
struct Targets<T>(BTreeSet<T>);

impl<T: Ord + Clone> Targets<T> {
    fn new() -> Self {
        Self(BTreeSet::new())
    }

    fn claim(&mut self, target: &T) -> anyhow::Result<()> {
        if self.0.insert(target.clone()) {
            return Ok(());
        }
        bail!(
            "another source has the same name and would be overwritten; copy this one by itself, under a name of its own"
        )
    }
}

/// A copy must be as long as its source was said to be: what is shorter must not take the place of what is there.
fn check_whole(moved: u64, expected: u64) -> anyhow::Result<()> {
    if moved == expected {
        return Ok(());
    }
    bail!(
        "only {moved} of its {expected} bytes could be read: it changed size while it was copied, or is no ordinary file; nothing was replaced, copy it again"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn way(paths: &[&str]) -> anyhow::Result<Way> {
        direction(&Copy {
            paths: paths.iter().map(|p| (*p).to_owned()).collect(),
            recursive: false,
            transport: None,
            depth: 1,
            chunk: None,
            parallel: 1,
            channels: 1,
            no_flush: false,
            json: false,
        })
    }

    #[test]
    fn two_sources_never_get_one_target() {
        let mut targets = Targets::new();
        for path in ["/to/a", "/to/b"] {
            targets.claim(&PathBuf::from(path)).unwrap();
        }
        assert!(targets.claim(&PathBuf::from("/to/a")).is_err());
    }

    #[test]
    fn a_short_copy_is_none() {
        check_whole(7, 7).unwrap();
        assert!(check_whole(6, 7).unwrap_err().to_string().contains("6 of its 7"));
    }

    #[test]
    fn the_direction_is_told_from_the_paths() {
        assert!(matches!(way(&["a", "b", "data:/"]), Ok(Way::Up { .. })));
        assert!(matches!(way(&["data:/a", "."]), Ok(Way::Down { .. })));
        for wrong in
            [&["a", "b"][..], &["data:/a", "data:/b"], &["a", "data:/b", "c"], &["a", "data:/b", "data:/c"]]
        {
            assert!(way(wrong).is_err(), "{wrong:?}");
        }
    }
}
