//! `holdfast bench`: how fast one file is read or written, after the manner of fio.
//!
//! ```text
//!   open (made, filled) ─► jobs: a thread, channels, `depth` lanes each ─► all ready ─► start ─► histograms ─► report
//! ```

mod fill;
mod histogram;
mod job;
mod pattern;
mod report;

use crate::args::{Bench, Connection};
use anyhow::{Context, bail};
use holdfast_client::{Access, Disposition, Open, OpenOptions, Session, Status};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use job::{Job, Seen};
use report::Report;
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};

/// How often the progress is shown.
const SHOW: Duration = Duration::from_millis(200);

pub(crate) async fn run(connection: &Connection, args: &Bench) -> anyhow::Result<()> {
    let mut config = connection.load()?;
    if let Some(transport) = args.transport {
        config.transport = transport;
    }
    if let Some(one_sided) = args.one_sided {
        config.one_sided = one_sided;
    }
    let session = Session::connect(&config).await?;
    let (open, made) = open(&session, args).await.with_context(|| args.file.to_string())?;
    let measured = measure(&open, made, args).await;
    // Also after a failure: a file that was made goes with its open.
    let closed = open.close().await;
    session.close().await;
    let report = measured?;
    closed?;
    report.print(args.json)
}

/// Opens the file, or makes it; true if it was made.
async fn open(session: &Session, args: &Bench) -> anyhow::Result<(Open, bool)> {
    let place = args.file.place();
    let existing = if args.rw.writes() { OpenOptions::read_write() } else { OpenOptions::read() };
    match session.open(&place, &existing).await {
        Ok(open) if args.rw.writes() && !args.overwrite => {
            open.close().await?;
            bail!(
                "it is there already, and would be destroyed: give --overwrite to allow that, or another name"
            );
        }
        Ok(open) => return Ok((open, false)),
        Err(error) if error.status() == Some(Status::NotFound) => {}
        Err(error) => return Err(error.into()),
    }
    let mut options = OpenOptions::create_new(0o600).disposition(Disposition::CreateNew, 0o600);
    if !args.keep {
        // Gone with the open, whatever becomes of this process.
        options = options
            .access(Access::READ | Access::WRITE | Access::DELETE)
            .delete_on_close(true)
            .hold(Duration::ZERO);
    }
    Ok((session.open(&place, &options).await?, true))
}

async fn measure(open: &Open, made: bool, args: &Bench) -> anyhow::Result<Report> {
    let block = args.bs as u64;
    let there = open.attributes_now().await?.size;
    let size = if made || args.rw.writes() { args.size } else { args.size.min(there) };
    let (all, jobs) = (size / block, args.jobs as u64);
    let least = jobs * args.depth as u64;
    if all < least {
        bail!(
            "{} are {all} blocks; {} jobs with {} in flight each need {least} at least: see --size, --bs",
            crate::output::size(size),
            args.jobs,
            args.depth
        );
    }
    let transport = open.session().config().transport;
    // Blocks that nobody has written yet are no measure of reading, nor of writing to any of them.
    let filled = made && args.rw != crate::args::Pattern::Write;
    if filled {
        fill::fill(open, transport, args.bs, all, &bar(args.json, all, "filling")).await?;
    }
    let (completed, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let (ready, mut is_ready) = mpsc::channel(args.jobs);
    let (start, started) = watch::channel(None);
    let mut running = tokio::task::JoinSet::new();
    for n in 0..jobs {
        let job = Job {
            open: open.clone(),
            transport,
            channels: args.channels,
            pattern: args.rw,
            verify: args.verify,
            filled,
            block: args.bs,
            all,
            own: all * n / jobs..all * (n + 1) / jobs,
            depth: args.depth,
            completed: Arc::clone(&completed),
            stop: Arc::clone(&stop),
        };
        let (ready, started) = (ready.clone(), started.clone());
        running.spawn_blocking(move || job::run(job, &ready, started));
    }
    drop(ready);
    for _ in 0..jobs {
        if is_ready.recv().await.is_none() {
            break;
        }
    }
    let (begin, cpu) = (Instant::now(), report::cpu_time());
    let runtime = Duration::from_secs(args.runtime);
    // Nobody listens if all have failed; then they say why below.
    let _ = start.send(Some(begin + runtime));
    let shown = show(&completed, block, begin, runtime, args.json);
    let all_ended = async {
        let (mut seen, mut shares) = (Seen::default(), Vec::new());
        while let Some(ended) = running.join_next().await {
            match ended? {
                Ok(job) => {
                    shares.push(job.latencies.total());
                    seen.merge(&job);
                }
                Err(error) => {
                    stop.store(true, Relaxed);
                    return Err(error);
                }
            }
        }
        anyhow::Ok((seen, shares))
    };
    tokio::pin!(all_ended);
    let (mut seen, shares) = tokio::select! {
        ended = &mut all_ended => ended?,
        never = shown => match never {},
        // What was measured so far is told.
        _ = tokio::signal::ctrl_c() => {
            stop.store(true, Relaxed);
            all_ended.await?
        }
    };
    let cpu = report::cpu_time().saturating_sub(cpu);
    let elapsed = seen.ended.map_or(Duration::ZERO, |ended| ended - begin);
    Ok(Report {
        file: args.file.to_string(),
        pattern: args.rw,
        transport: seen.transport,
        fallback: seen.fallback.take(),
        block: args.bs,
        depth: args.depth,
        jobs: args.jobs,
        channels: args.channels,
        size: all * block,
        elapsed,
        cpu,
        shares,
        seen,
    })
}

fn bar(json: bool, length: u64, what: &'static str) -> ProgressBar {
    let hidden = json || !std::io::stderr().is_terminal();
    let target = if hidden { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr_with_hz(10) };
    let bar = ProgressBar::with_draw_target(Some(length), target).with_prefix(what);
    if let Ok(style) = ProgressStyle::with_template("{prefix} {bar:30} {percent}% {msg}") {
        bar.set_style(style);
    }
    bar
}

/// Shows how far it is, for ever.
async fn show(
    completed: &AtomicU64,
    block: u64,
    begin: Instant,
    runtime: Duration,
    json: bool,
) -> std::convert::Infallible {
    let bar = bar(json, u64::try_from(runtime.as_millis()).unwrap_or(u64::MAX), "measuring");
    let (mut before, mut at) = (0, begin);
    loop {
        tokio::time::sleep(SHOW).await;
        let (now, count) = (Instant::now(), completed.load(Relaxed));
        let rate = report::per_second(count - before, now - at);
        (before, at) = (count, now);
        bar.set_message(format!("{rate} IOPS, {}/s", crate::output::size(rate * block)));
        bar.set_position(u64::try_from((now - begin).as_millis()).unwrap_or(u64::MAX));
    }
}
