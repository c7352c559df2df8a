//! From a volume to this machine.
//!
//! Names come from the server: each must be one plain component, and below the target nothing is written through a
//! symbolic link, so that a hostile server reaches no file outside of the target.

use super::{Job, Shared, Targets, check_whole, part_name, plan_job};
use crate::remote::Remote;
use anyhow::{Context, bail};
use holdfast_client::stream::Streamer;
use holdfast_client::{Attributes, FileKind, FileTime, OpenOptions};
use std::fs::{FileTimes, FileType, Permissions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;

/// A file to copy.
pub(super) struct File {
    pub(super) from: Remote,
    to: PathBuf,
}

/// A directory that was made, and what it should look like in the end.
pub(super) struct Directory {
    to: PathBuf,
    attributes: Attributes,
}

/// Walks the sources, makes directories and links, and hands files to the workers.
pub(super) async fn plan(
    shared: &Shared,
    sources: &[Remote],
    to: PathBuf,
    recursive: bool,
    jobs: mpsc::Sender<Job>,
) -> anyhow::Result<Vec<Directory>> {
    let into = to.is_dir();
    let slash = to.as_os_str().as_encoded_bytes().ends_with(b"/");
    // As with cp, a tree may be given a new name with a slash at its end.
    if !into && (sources.len() > 1 || (slash && !recursive)) {
        bail!("{} is not a directory; make it first: mkdir {}", to.display(), to.display());
    }
    let (mut directories, mut targets) = (Vec::new(), Targets::new());
    for source in sources {
        let target = match source.name() {
            Some(name) if into => to.join(name),
            _ => to.clone(),
        };
        let done = match targets.claim(&target) {
            Ok(()) => tree(shared, source, target, recursive, &jobs, &mut directories).await,
            Err(error) => Err(error),
        };
        if let Err(error) = done {
            shared.failed(&source.to_string(), error)?;
        }
    }
    Ok(directories)
}

async fn tree(
    shared: &Shared,
    source: &Remote,
    to: PathBuf,
    recursive: bool,
    jobs: &mpsc::Sender<Job>,
    directories: &mut Vec<Directory>,
) -> anyhow::Result<()> {
    let attributes = shared.session.attributes(&source.place()).await?;
    if attributes.kind == FileKind::Directory && !recursive {
        bail!("it is a directory; give -r to copy it with all that is in it");
    }
    let mut stack = vec![(source.clone(), to.clone(), attributes)];
    while let Some((from, path, attributes)) = stack.pop() {
        if *shared.cancelled.borrow() {
            bail!("interrupted");
        }
        let top = path == to;
        let done =
            entry(shared, &from, &path, top, recursive, attributes, jobs, directories, &mut stack).await;
        match done {
            Err(error) if top => return Err(error),
            Err(error) => shared.failed(&from.to_string(), error)?,
            Ok(()) => {}
        }
    }
    Ok(())
}

#[allow(clippy::too_many_arguments)] // one step of the walk above, which owns them all
async fn entry(
    shared: &Shared,
    from: &Remote,
    to: &Path,
    top: bool,
    recursive: bool,
    attributes: Attributes,
    jobs: &mpsc::Sender<Job>,
    directories: &mut Vec<Directory>,
    stack: &mut Vec<(Remote, PathBuf, Attributes)>,
) -> anyhow::Result<()> {
    match attributes.kind {
        FileKind::Directory => {
            let made = make_directory(to, top)?;
            shared.tally.directory();
            let mut listing = shared.session.list(&from.place());
            while let Some(page) = listing.next_page().await? {
                for child in page {
                    check_name(&child.name)?;
                    stack.push((from.join(&child.name), to.join(&child.name), child.attributes));
                }
            }
            // What was there before keeps its mode, as with cp.
            if made {
                directories.push(Directory { to: to.to_owned(), attributes });
            }
        }
        FileKind::File => {
            check_target(to)?;
            shared.tally.planned(attributes.size);
            plan_job(jobs, Job::Down(File { from: from.clone(), to: to.to_owned() })).await?;
        }
        // Named on the command line, a link stands for its file, as with cp; below, links stay links.
        FileKind::Symlink if top && !recursive => {
            check_target(to)?;
            plan_job(jobs, Job::Down(File { from: from.clone(), to: to.to_owned() })).await?;
        }
        FileKind::Symlink => {
            check_target(to)?;
            let text = shared.session.read_symlink(&from.place()).await?;
            symlink(&text, to)?;
            shared.tally.symlink();
        }
        FileKind::Other => {
            shared.tally.skipped(&from.to_string(), "it is neither file, directory nor symbolic link");
        }
    }
    Ok(())
}

/// A name from the server must be one component.
fn check_name(name: &str) -> anyhow::Result<()> {
    if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']) {
        bail!("the server lists the name {name:?}, which no file can have");
    }
    Ok(())
}

/// Refuses to put a file where a directory, or a special file such as /dev/null, is, also behind a link.
fn check_target(to: &Path) -> anyhow::Result<()> {
    let special = |kind: FileType| !(kind.is_file() || kind.is_dir() || kind.is_symlink());
    let itself = to.symlink_metadata().map(|m| m.file_type());
    if itself.as_ref().is_ok_and(FileType::is_dir) {
        bail!("{} is a directory and in the way", to.display());
    }
    if itself.is_ok_and(special) || to.metadata().is_ok_and(|m| special(m.file_type())) {
        bail!(
            "{} is a special file and would be replaced; `holdfast cat` writes to standard output",
            to.display()
        );
    }
    Ok(())
}

/// True if the directory is new.
fn make_directory(path: &Path, top: bool) -> anyhow::Result<bool> {
    match std::fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            let metadata = if top { std::fs::metadata(path)? } else { std::fs::symlink_metadata(path)? };
            if metadata.is_dir() { Ok(false) } else { bail!("{} is in the way", path.display()) }
        }
        other => other.map(|()| true).with_context(|| format!("cannot make {}", path.display())),
    }
}

fn symlink(text: &str, to: &Path) -> anyhow::Result<()> {
    let part = to.with_file_name(part_name()?);
    std::os::unix::fs::symlink(text, &part)?;
    std::fs::rename(&part, to).inspect_err(|_| drop(std::fs::remove_file(&part)))?;
    Ok(())
}

/// Removes an incomplete file, whatever happens; kept only by [`Part::complete`].
struct Part(Option<PathBuf>);

impl Part {
    fn complete(mut self, to: &Path) -> std::io::Result<()> {
        let Some(path) = &self.0 else { return Ok(()) };
        std::fs::rename(path, to)?;
        self.0 = None;
        Ok(())
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if let Some(path) = self.0.take() {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn make_part(path: PathBuf) -> std::io::Result<(Arc<std::fs::File>, Part)> {
    let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
    Ok((Arc::new(file), Part(Some(path))))
}

/// Copies one file.
pub(super) async fn file(shared: &Shared, job: &File, streamer: &mut Streamer) -> anyhow::Result<()> {
    shared.unless_cancelled(transfer(shared, job, streamer)).await
}

async fn transfer(shared: &Shared, job: &File, streamer: &mut Streamer) -> anyhow::Result<()> {
    let open = shared.session.open(&job.from.place(), &OpenOptions::read()).await?;
    shared.tally.open();
    let attributes = open.attributes().clone();
    let path = job.to.with_file_name(part_name()?);
    // Made where the file is: if nobody waits for it any more, it is dropped there, after the file was made.
    let made = tokio::task::spawn_blocking(move || make_part(path));
    let (local, part) = made.await?.with_context(|| format!("cannot write {}", job.to.display()))?;
    if attributes.size > 0 {
        let target = shared.target(&open, attributes.size).await?;
        let moved = streamer.download(&local, &target, attributes.size, shared.tally.progress()).await?;
        check_whole(moved, attributes.size)?;
        target.unbind().await?;
    }
    open.close().await?;
    let (to, flush) = (job.to.clone(), shared.flush);
    tokio::task::spawn_blocking(move || {
        local.set_times(times(&attributes))?;
        local.set_permissions(Permissions::from_mode(attributes.mode & 0o1777))?;
        if flush {
            local.sync_all()?;
        }
        part.complete(&to)
    })
    .await?
    .with_context(|| format!("cannot complete {}", job.to.display()))
}

fn times(attributes: &Attributes) -> FileTimes {
    FileTimes::new().set_modified(system_time(attributes.modified))
}

/// A time from the server; one the system cannot hold becomes 1970.
fn system_time(time: FileTime) -> SystemTime {
    let whole = Duration::from_secs(time.seconds.unsigned_abs());
    let base = if time.seconds < 0 {
        SystemTime::UNIX_EPOCH.checked_sub(whole)
    } else {
        SystemTime::UNIX_EPOCH.checked_add(whole)
    };
    base.and_then(|base| base.checked_add(Duration::from_nanos(time.nanos.into())))
        .unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Modes and times of the directories made, the innermost first.
pub(super) fn finish_directories(shared: &Shared, directories: Vec<Directory>) -> anyhow::Result<()> {
    for directory in directories.iter().rev() {
        let done = std::fs::File::open(&directory.to).and_then(|opened| {
            opened.set_times(times(&directory.attributes))?;
            opened.set_permissions(Permissions::from_mode(directory.attributes.mode & 0o1777))
        });
        if let Err(error) = done {
            shared.failed(&directory.to.display().to_string(), error.into())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_from_the_server_stay_in_their_directory() {
        for name in ["a", "..a", "a b", "ä"] {
            check_name(name).unwrap();
        }
        for name in ["", ".", "..", "../a", "/etc", "a/b", "a\0"] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn a_directory_below_the_target_is_never_a_link() {
        let temp = tempfile::tempdir().unwrap();
        let link = temp.path().join("link");
        std::os::unix::fs::symlink("/tmp", &link).unwrap();
        assert!(make_directory(&link, false).is_err());
        assert!(!make_directory(&link, true).unwrap(), "it was there before");
        assert!(make_directory(&temp.path().join("new"), false).unwrap());
    }

    #[test]
    fn special_files_are_never_replaced() {
        let temp = tempfile::tempdir().unwrap();
        let path = |name: &str| temp.path().join(name);
        let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
        std::fs::write(path("file"), "x").unwrap();
        for (link, to) in [("to-socket", "socket"), ("to-file", "file"), ("to-nothing", "nothing")] {
            std::os::unix::fs::symlink(path(to), path(link)).unwrap();
        }
        for wrong in ["socket", "to-socket", "", "/dev/null"] {
            assert!(check_target(&path(wrong)).is_err(), "{wrong}");
        }
        for well in ["file", "to-file", "to-nothing", "nothing"] {
            check_target(&path(well)).unwrap();
        }
    }

    #[test]
    fn an_incomplete_file_is_removed() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("part");
        std::fs::write(&path, "x").unwrap();
        drop(Part(Some(path.clone())));
        assert!(!path.exists());
        // A task nobody waits for drops what it returns.
        drop(make_part(path.clone()).unwrap());
        assert!(!path.exists());
        std::fs::write(&path, "x").unwrap();
        Part(Some(path.clone())).complete(&temp.path().join("whole")).unwrap();
        assert!(!path.exists() && temp.path().join("whole").exists());
    }

    #[test]
    fn times_from_the_server_never_panic() {
        for seconds in [i64::MIN, -1, 0, i64::MAX] {
            system_time(FileTime { seconds, nanos: u32::MAX });
        }
    }
}
