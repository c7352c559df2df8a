//! From this machine to a volume.

use super::{Job, Shared, Targets, check_whole, part_name, plan_job, settle};
use crate::names::make_all;
use crate::remote::Remote;
use anyhow::{Context, bail};
use holdfast_client::stream::Streamer;
use holdfast_client::{Changes, Error, FileKind, FileTime, Open, OpenOptions, Status};
use std::fs::Metadata;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;

/// Longest wait for the server after an interruption.
const CANCEL_MAX: Duration = Duration::from_secs(3);

/// A file to copy.
pub(super) struct File {
    pub(super) from: PathBuf,
    to: Remote,
}

/// A directory that was made, and what it should look like in the end.
pub(super) struct Directory {
    to: Remote,
    changes: Changes,
}

/// Permission bits that travel: without set-id bits, which mean nothing on another machine.
fn mode(metadata: &Metadata) -> u32 {
    metadata.mode() & 0o1777
}

fn changes(metadata: &Metadata) -> Changes {
    let nanos = |n: i64| u32::try_from(n).unwrap_or(0);
    Changes {
        mode: Some(mode(metadata)),
        modified: Some(FileTime { seconds: metadata.mtime(), nanos: nanos(metadata.mtime_nsec()) }),
        ..Changes::default()
    }
}

/// Walks the sources, makes directories and links, and hands files to the workers.
pub(super) async fn plan(
    shared: &Shared,
    sources: &[PathBuf],
    to: Remote,
    recursive: bool,
    jobs: mpsc::Sender<Job>,
) -> anyhow::Result<Vec<Directory>> {
    let existing = match shared.session.attributes(&to.place()).await {
        Ok(attributes) => Some(attributes.kind),
        // Only a volume can be missing where a root is.
        Err(error) if error.status() == Some(Status::NotFound) && !to.path.is_empty() => None,
        Err(error) => return Err(error).with_context(|| to.to_string()),
    };
    // A link to a directory counts as one, as with cp.
    let into = match existing {
        Some(FileKind::Directory) => true,
        Some(FileKind::Symlink) => shared.session.list(&to.place()).next_page().await.is_ok(),
        _ => false,
    };
    // As with cp, a tree may be given a new name with a slash at its end.
    let tree_only = recursive && sources.iter().all(|source| source.is_dir());
    if !into && (sources.len() > 1 || (to.directory && !tree_only)) {
        bail!("{to} is not a directory; make it first: holdfast mkdir {to}");
    }
    let (mut directories, mut targets) = (Vec::new(), Targets::new());
    for source in sources {
        let target = match (into, name_of(source)) {
            (true, Some(name)) => name.map(|name| to.join(&name)),
            _ => Ok(to.clone()),
        };
        let done = match target.and_then(|target| targets.claim(&target).map(|()| target)) {
            Ok(target) => tree(shared, source, target, recursive, &jobs, &mut directories).await,
            Err(error) => Err(error),
        };
        if let Err(error) = done {
            shared.failed(&source.display().to_string(), error)?;
        }
    }
    Ok(directories)
}

/// The name a source gets in a directory; `None` for `.`, `..` and `/`, whose contents are meant.
fn name_of(source: &Path) -> Option<anyhow::Result<String>> {
    let name = source.file_name()?;
    Some(name.to_str().map(str::to_owned).context("its name is not UTF-8, which remote names are"))
}

async fn tree(
    shared: &Shared,
    source: &Path,
    to: Remote,
    recursive: bool,
    jobs: &mpsc::Sender<Job>,
    directories: &mut Vec<Directory>,
) -> anyhow::Result<()> {
    // What is named on the command line may be a link to what is meant, as with cp; below it links stay links.
    let metadata = if recursive { std::fs::symlink_metadata(source) } else { std::fs::metadata(source) };
    let metadata = metadata.context("cannot look at it")?;
    if metadata.is_dir() && !recursive {
        bail!("it is a directory; give -r to copy it with all that is in it");
    }
    let mut stack = vec![(source.to_path_buf(), to, metadata)];
    while let Some((path, to, metadata)) = stack.pop() {
        if *shared.cancelled.borrow() {
            bail!("interrupted");
        }
        let top = path == source;
        let done = entry(shared, &path, &to, &metadata, jobs, directories, &mut stack).await;
        match done {
            Err(error) if top => return Err(error),
            Err(error) => shared.failed(&path.display().to_string(), error)?,
            Ok(()) => {}
        }
    }
    Ok(())
}

async fn entry(
    shared: &Shared,
    path: &Path,
    to: &Remote,
    metadata: &Metadata,
    jobs: &mpsc::Sender<Job>,
    directories: &mut Vec<Directory>,
    stack: &mut Vec<(PathBuf, Remote, Metadata)>,
) -> anyhow::Result<()> {
    let kind = metadata.file_type();
    if kind.is_dir() {
        let made = !to.path.is_empty() && make_all(&shared.session, to, 0o700 | mode(metadata)).await?;
        shared.tally.directory();
        let mut named = Vec::new();
        for child in std::fs::read_dir(path)? {
            let child = child?.path();
            let Some(Ok(name)) = name_of(&child) else {
                shared.tally.skipped(&child.display().to_string(), "its name is not UTF-8");
                continue;
            };
            let remote = to.join(&name);
            named.push((child, remote));
        }
        let (mut children, gone) = look_at(named);
        for (child, error) in gone {
            shared.failed(&child.display().to_string(), error)?;
        }
        // Taken from the end: in the order of their names.
        children.sort_by(|a, b| b.0.cmp(&a.0));
        stack.append(&mut children);
        // What was there before keeps its mode, as with cp.
        if made {
            directories.push(Directory { to: to.clone(), changes: changes(metadata) });
        }
    } else if kind.is_file() {
        shared.tally.planned(metadata.len());
        plan_job(jobs, Job::Up(File { from: path.into(), to: to.clone() })).await?;
    } else if kind.is_symlink() {
        symlink(shared, path, to).await?;
        shared.tally.symlink();
    } else {
        shared.tally.skipped(&path.display().to_string(), "it is neither file, directory nor symbolic link");
    }
    Ok(())
}

/// Children with their metadata, and those that cannot be looked at: one that has vanished does not keep back the others.
#[allow(clippy::type_complexity)] // two lists of what the walk's stack holds
fn look_at(
    named: Vec<(PathBuf, Remote)>,
) -> (Vec<(PathBuf, Remote, Metadata)>, Vec<(PathBuf, anyhow::Error)>) {
    let (mut found, mut gone) = (Vec::with_capacity(named.len()), Vec::new());
    for (path, to) in named {
        match std::fs::symlink_metadata(&path).context("cannot look at it") {
            Ok(metadata) => found.push((path, to, metadata)),
            Err(error) => gone.push((path, error)),
        }
    }
    (found, gone)
}

async fn symlink(shared: &Shared, path: &Path, to: &Remote) -> anyhow::Result<()> {
    let target = std::fs::read_link(path)?;
    let text = target.to_str().context("the link's text is not UTF-8")?;
    match shared.session.make_symlink(&to.place(), text).await {
        // Also one that was made, or not: it is put in its own place.
        Err(error)
            if error.status() == Some(Status::Exists) || matches!(error, Error::FateUnknown { .. }) =>
        {
            // Replaced at once, so that there is never no link.
            let part = beside(to)?;
            settle::symlink(&shared.session, &part.place(), text).await?;
            if let Err(error) = settle::rename(&shared.session, &part.place(), &to.place()).await {
                let _ = settle::remove(&shared.session, &part.place()).await;
                return Err(error.into());
            }
            Ok(())
        }
        other => Ok(other?),
    }
}

fn beside(to: &Remote) -> anyhow::Result<Remote> {
    let parent = to.parent().context("the root of a volume is not a file")?;
    Ok(parent.join(&part_name()?))
}

/// Copies one file.
pub(super) async fn file(shared: &Shared, job: &File, streamer: &mut Streamer) -> anyhow::Result<()> {
    let part = beside(&job.to)?;
    let source = source(job.from.clone()).await?;
    if *shared.cancelled.borrow() {
        bail!("interrupted");
    }
    // Never cut short: an open that is made after the removal below would leave its file behind.
    let options = OpenOptions::create_new(mode(&source.metadata) | 0o600);
    let done = match shared.session.open(&part.place(), &options).await {
        Ok(open) => {
            shared.tally.open();
            shared.unless_cancelled(transfer(shared, job, &part, &source, open, streamer)).await
        }
        Err(error) => Err(error).with_context(|| job.to.to_string()),
    };
    if done.is_err() {
        // The error that is told is the first.
        let place = part.place();
        let removal = settle::remove(&shared.session, &place);
        // Whoever interrupts does not wait for a server that is away.
        let removed = if *shared.cancelled.borrow() {
            tokio::time::timeout(CANCEL_MAX, removal).await.is_ok_and(|removed| removed.is_ok())
        } else {
            removal.await.is_ok()
        };
        if !removed {
            shared.left.lock().unwrap_or_else(PoisonError::into_inner).push(part);
        }
    }
    done
}

/// A local file, open.
struct Source {
    file: Arc<std::fs::File>,
    metadata: Metadata,
    /// True if it has bytes though its size is 0, as files of /proc do.
    unsized_bytes: bool,
}

async fn source(path: PathBuf) -> anyhow::Result<Source> {
    let opened = tokio::task::spawn_blocking(move || {
        let file = std::fs::File::open(path)?;
        let metadata = file.metadata()?;
        let unsized_bytes = metadata.len() == 0 && file.read_at(&mut [0], 0)? > 0;
        std::io::Result::Ok(Source { file: Arc::new(file), metadata, unsized_bytes })
    });
    opened.await?.context("cannot open it")
}

async fn transfer(
    shared: &Shared,
    job: &File,
    part: &Remote,
    source: &Source,
    open: Open,
    streamer: &mut Streamer,
) -> anyhow::Result<()> {
    let size = source.metadata.len();
    if size > 0 || source.unsized_bytes {
        let target = shared.target(&open, size).await?;
        let mut progress = shared.tally.progress();
        loop {
            if source.unsized_bytes {
                streamer.upload(&source.file, &target, u64::MAX, progress).await?;
            } else {
                check_whole(streamer.upload(&source.file, &target, size, progress).await?, size)?;
            }
            let flushed = if shared.flush { target.flush().await } else { Ok(()) };
            let Err(Error::WritesLost) = flushed else { break flushed? };
            // The server's host was restarted under it: all of it again, as nobody knows which bytes it had kept. They were
            // counted before.
            open.accept_lost_writes();
            if source.unsized_bytes {
                // It may be shorter this time.
                open.set_attributes(&Changes { size: Some(0), ..Changes::default() }).await?;
            }
            progress = Arc::new(|_| ());
        }
        target.unbind().await?;
    }
    open.set_attributes(&changes(&source.metadata)).await?;
    open.close().await?;
    let renamed = settle::rename(&shared.session, &part.place(), &job.to.place()).await;
    renamed.with_context(|| job.to.to_string())?;
    Ok(())
}

/// Modes and times of the directories made, the innermost first.
pub(super) async fn finish_directories(shared: &Shared, directories: Vec<Directory>) -> anyhow::Result<()> {
    for directory in directories.iter().rev() {
        if let Err(error) = shared.session.set_attributes(&directory.to.place(), &directory.changes).await {
            shared.failed(&directory.to.to_string(), error.into())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vanished_entry_keeps_no_other_back() {
        let temp = tempfile::tempdir().unwrap();
        let root: Remote = "data:/".parse().unwrap();
        for name in ["a", "c"] {
            std::fs::write(temp.path().join(name), name).unwrap();
        }
        let named = ["a", "b", "c"].map(|name| (temp.path().join(name), root.join(name)));
        let (found, gone) = look_at(named.into());
        assert_eq!(found.iter().filter_map(|f| f.1.name()).collect::<Vec<_>>(), ["a", "c"]);
        assert_eq!(gone.iter().map(|g| &g.0).collect::<Vec<_>>(), [&temp.path().join("b")]);
    }
}
