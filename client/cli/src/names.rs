//! Commands that speak with control alone: ls, stat, mkdir, rm, mv, df, volumes.

use crate::args::{Connection, Df, Ls, Mkdir, Mv, Rm, Stat, Volumes};
use crate::output::{self, line};
use crate::remote::Remote;
use anyhow::{Context, bail};
use holdfast_client::{Entry, Error, FileKind, Session, Status};
use serde_json::json;

pub(crate) async fn ls(connection: &Connection, args: &Ls) -> anyhow::Result<()> {
    let session = connection.connect().await?;
    let place = args.path.place();
    let attributes = session.attributes(&place).await.with_context(|| args.path.to_string())?;
    let mut all = Vec::new();
    if attributes.kind == FileKind::Directory {
        let mut listing = session.list(&place);
        while let Some(page) = listing.next_page().await.with_context(|| args.path.to_string())? {
            if args.json {
                all.extend(page);
            } else {
                page.iter().try_for_each(show)?;
            }
        }
    } else {
        let entry = Entry { name: args.path.name().unwrap_or("/").to_owned(), attributes };
        if args.json { all.push(entry) } else { show(&entry)? }
    }
    if args.json {
        let entries: Vec<_> = all
            .iter()
            .map(|e| {
                let mut value = output::attributes(&e.attributes);
                value["name"] = json!(e.name);
                value
            })
            .collect();
        line(serde_json::to_string(&entries)?)?;
    }
    session.close().await;
    Ok(())
}

fn show(entry: &Entry) -> anyhow::Result<()> {
    let a = &entry.attributes;
    let slash = if a.kind == FileKind::Directory { "/" } else { "" };
    let name = output::shown(&entry.name);
    line(format_args!(
        "{}  {:>14}  {}  {name}{slash}",
        output::permissions(a),
        a.size,
        output::time(a.modified)
    ))
}

pub(crate) async fn stat(connection: &Connection, args: &Stat) -> anyhow::Result<()> {
    let session = connection.connect().await?;
    let place = args.path.place();
    let a = session.attributes(&place).await.with_context(|| args.path.to_string())?;
    let target = if a.kind == FileKind::Symlink { Some(session.read_symlink(&place).await?) } else { None };
    if args.json {
        let mut value = output::attributes(&a);
        value["path"] = json!(args.path.to_string());
        value["target"] = json!(target);
        line(value)?;
    } else {
        line(format_args!("path      {}", args.path))?;
        line(format_args!("kind      {}", output::kind(a.kind)))?;
        if let Some(target) = target {
            line(format_args!("target    {}", output::shown(&target)))?;
        }
        line(format_args!(
            "size      {} ({}), {} on disk",
            a.size,
            output::size(a.size),
            output::size(a.allocated)
        ))?;
        line(format_args!("mode      {} ({:04o})", output::permissions(&a), a.mode & 0o7777))?;
        line(format_args!("inode     {}, {} links, owner {}:{}", a.inode, a.links, a.uid, a.gid))?;
        line(format_args!("modified  {} UTC", output::time(a.modified)))?;
        line(format_args!("changed   {} UTC", output::time(a.changed)))?;
        line(format_args!("accessed  {} UTC", output::time(a.accessed)))?;
    }
    session.close().await;
    Ok(())
}

pub(crate) async fn mkdir(connection: &Connection, args: &Mkdir) -> anyhow::Result<()> {
    let session = connection.connect().await?;
    for path in &args.paths {
        let made = if args.parents {
            make_all(&session, path, args.mode).await.map(drop)
        } else {
            session.make_directory(&path.place(), args.mode).await
        };
        made.with_context(|| path.to_string())?;
    }
    session.close().await;
    Ok(())
}

/// Repetitions of a request whose answers were lost: more is no accident.
const TIMES_MAX: u32 = 100;

/// Makes a directory and its missing parents; one that exists is well. True if the directory is new.
pub(crate) async fn make_all(session: &Session, path: &Remote, mode: u32) -> holdfast_client::Result<bool> {
    let (mut made, mut lost) = (false, 0);
    let mut missing = vec![path.clone()];
    while let Some(next) = missing.last() {
        if next.path.is_empty() {
            missing.pop();
            continue;
        }
        match session.make_directory(&next.place(), mode).await {
            Ok(()) => {
                missing.pop();
                // The last one made is the directory itself, its parents came before.
                made = missing.is_empty();
            }
            Err(error) if error.status() == Some(Status::Exists) => {
                // A link to a directory will do; a file will not.
                let probe = session.attributes(&next.place()).await?;
                if matches!(probe.kind, FileKind::Directory | FileKind::Symlink) {
                    missing.pop();
                } else {
                    return Err(error);
                }
            }
            // Made or not: asked again, it is there or is made.
            Err(Error::FateUnknown { .. }) if lost < TIMES_MAX => lost += 1,
            Err(error) if error.status() == Some(Status::NotFound) => match next.parent() {
                Some(parent) if !parent.path.is_empty() => missing.push(parent),
                _ => return Err(error),
            },
            Err(error) => return Err(error),
        }
    }
    Ok(made)
}

pub(crate) async fn rm(connection: &Connection, args: &Rm) -> anyhow::Result<()> {
    let session = connection.connect().await?;
    for path in &args.paths {
        if path.path.is_empty() {
            bail!("{path}: the root of a volume cannot be removed");
        }
        let removed = if args.recursive {
            remove_all(&session, path).await
        } else {
            session.remove(&path.place()).await
        };
        match removed {
            Err(error) if args.force && error.status() == Some(Status::NotFound) => {}
            Err(error) if !args.recursive && error.status() == Some(Status::NotEmpty) => {
                return Err(error).with_context(|| format!("{path}: give -r to remove all that is in it"));
            }
            Err(error) if error.status() == Some(Status::NotEmpty) => {
                return Err(error).with_context(|| {
                    format!("{path}: what is left in it cannot be named from here (its name is not UTF-8) or is being made anew; remove it on the server")
                });
            }
            other => other.with_context(|| path.to_string())?,
        }
    }
    session.close().await;
    Ok(())
}

/// Passes over a directory that remove nothing before it is given up; some are due to others removing the same tree.
const IDLE_PASSES_MAX: u32 = 32;

/// A directory under way, and how many passes over it have removed nothing since one last did.
#[derive(Clone)]
struct Emptying {
    path: Remote,
    idle: u32,
}

/// Removes a tree, leaves first. The stack holds directories under way, so its length is the tree's depth.
///
/// Ends with the server's refusal where a directory is not empty and nothing more of it can be removed: what has a name
/// that is not UTF-8 cannot even be named.
async fn remove_all(session: &Session, root: &Remote) -> holdfast_client::Result<()> {
    let new = |path: Remote| Emptying { path, idle: 0 };
    let mut stack = vec![new(root.clone())];
    while let Some(Emptying { path, idle }) = stack.last().cloned() {
        match session.remove(&path.place()).await {
            Ok(()) => {
                stack.pop();
                stack.iter_mut().for_each(|above| above.idle = 0);
            }
            // Somebody else was faster, below the root: what was wanted is done.
            Err(error) if error.status() == Some(Status::NotFound) && stack.len() > 1 => drop(stack.pop()),
            Err(error) if error.status() == Some(Status::NotEmpty) && idle < IDLE_PASSES_MAX => {
                let mut removed = false;
                let mut directory = None;
                if let Some(page) = session.list(&path.place()).next_page().await? {
                    for entry in page {
                        let child = path.join(&entry.name);
                        if entry.attributes.kind == FileKind::Directory {
                            directory = Some(child);
                            break;
                        }
                        match session.remove(&child.place()).await {
                            Ok(()) => removed = true,
                            Err(error) if error.status() == Some(Status::NotFound) => {}
                            Err(error) => return Err(error),
                        }
                    }
                }
                if let Some(top) = stack.last_mut() {
                    top.idle = if removed { 0 } else { idle + 1 };
                }
                stack.extend(directory.map(new));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

pub(crate) async fn mv(connection: &Connection, args: &Mv) -> anyhow::Result<()> {
    if args.from.volume != args.to.volume {
        bail!(
            "{} and {} are in different volumes; copy with `holdfast cp` and remove the original",
            args.from,
            args.to
        );
    }
    let session = connection.connect().await?;
    let mut to = args.to.clone();
    let into = match session.attributes(&to.place()).await {
        Ok(attributes) => attributes.kind == FileKind::Directory,
        Err(error) if error.status() == Some(Status::NotFound) => false,
        Err(error) => return Err(error).with_context(|| to.to_string()),
    };
    if into {
        to = to.join(args.from.name().context("the root of a volume cannot be renamed")?);
    } else if args.to.directory {
        bail!("{}/ is not a directory", args.to);
    }
    session
        .rename(&args.from.place(), &to.place(), args.no_clobber)
        .await
        .with_context(|| format!("{} to {to}", args.from))?;
    session.close().await;
    Ok(())
}

pub(crate) async fn df(connection: &Connection, args: &Df) -> anyhow::Result<()> {
    let session = connection.connect().await?;
    let names = if args.volumes.is_empty() {
        session.volumes().await?.into_iter().map(|v| v.name).collect()
    } else {
        // `data:` and `data:/` are forgiven.
        args.volumes.iter().map(|v| v.split(':').next().unwrap_or(v).to_owned()).collect::<Vec<_>>()
    };
    let mut rows = Vec::new();
    for name in names {
        let s = session.volume_status(&name).await.with_context(|| name.clone())?;
        rows.push(json!({
            "volume": name, "bytes_total": s.bytes_total, "bytes_available": s.bytes_available,
            "files_total": s.files_total, "files_available": s.files_available, "block_size": s.block_size,
        }));
    }
    if args.json {
        line(serde_json::to_string(&rows)?)?;
    } else {
        line(format_args!("{:<20}  {:>12}  {:>12}  {:>14}", "volume", "size", "available", "files left"))?;
        for row in &rows {
            let number = |field: &str| row[field].as_u64().unwrap_or(0);
            line(format_args!(
                "{:<20}  {:>12}  {:>12}  {:>14}",
                output::shown(row["volume"].as_str().unwrap_or_default()),
                output::size(number("bytes_total")),
                output::size(number("bytes_available")),
                number("files_available")
            ))?;
        }
    }
    session.close().await;
    Ok(())
}

pub(crate) async fn volumes(connection: &Connection, args: &Volumes) -> anyhow::Result<()> {
    let session = connection.connect().await?;
    let volumes = session.volumes().await?;
    let policy = |p: holdfast_client::MacPolicy| format!("{p:?}").to_lowercase();
    if args.json {
        let rows: Vec<_> = volumes
            .iter()
            .map(|v| json!({ "name": v.name, "writable": v.writable, "mac_policy": policy(v.policy) }))
            .collect();
        line(serde_json::to_string(&rows)?)?;
    } else if volumes.is_empty() {
        eprintln!(
            "no volume is open to '{}'; ask the operator for a [[volume.grant]] in control.toml",
            output::shown(session.principal())
        );
    } else {
        line(format_args!("{:<20}  {:<10}  {}", "volume", "access", "protection"))?;
        for v in &volumes {
            let access = if v.writable { "read-write" } else { "read" };
            line(format_args!("{:<20}  {access:<10}  {}", output::shown(&v.name), policy(v.policy)))?;
        }
    }
    session.close().await;
    Ok(())
}
