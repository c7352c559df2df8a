//! `holdfast cat`: files to standard output, read ahead through one region.

use crate::args::{Cat, Connection};
use crate::remote::Remote;
use anyhow::Context;
use holdfast_client::{Binding, DataChannel, OpenOptions, Region, Session};
use std::collections::VecDeque;
use tokio::io::AsyncWriteExt;

/// Pieces read ahead.
const AHEAD: usize = 8;
const PIECE_BYTES_MAX: usize = 1 << 20;

pub(crate) async fn run(connection: &Connection, args: &Cat) -> anyhow::Result<()> {
    let mut config = connection.load()?;
    if let Some(transport) = args.transport {
        config.transport = transport;
    }
    let session = Session::connect(&config).await?;
    let mut channel = None;
    for path in &args.paths {
        one(&session, path, &mut channel).await.with_context(|| path.to_string())?;
    }
    drop(channel);
    session.close().await;
    Ok(())
}

async fn one(session: &Session, path: &Remote, channel: &mut Option<DataChannel>) -> anyhow::Result<()> {
    let open = session.open(&path.place(), &OpenOptions::read()).await?;
    let channel = match channel {
        Some(channel) => channel,
        none => none.insert(open.connect(session.config().transport).await?),
    };
    let binding = open.bind(channel).await?;
    pour(&binding).await?;
    binding.unbind().await?;
    open.close().await?;
    Ok(())
}

/// Reads to the file's end, wherever that is by then, and writes in order.
async fn pour(binding: &Binding) -> anyhow::Result<()> {
    let piece = binding.piece_max().min(PIECE_BYTES_MAX);
    let region = Region::allocate(AHEAD * piece)?;
    let (mut bytes, mut stdout) = (vec![0; piece], tokio::io::stdout());
    let (mut asked, mut wanted) = (VecDeque::with_capacity(AHEAD), 0u64);
    let mut lanes: VecDeque<usize> = (0..AHEAD).collect();
    let mut offset = 0u64;
    loop {
        while let Some(lane) = lanes.pop_front() {
            let start = lane * piece;
            asked.push_back((lane, binding.submit_read(&region, start..start + piece, wanted).await?));
            wanted += piece as u64;
        }
        let Some((lane, request)) = asked.pop_front() else { return Ok(()) };
        let mut count = request.await?;
        let start = lane * piece;
        // A short read need not be the end.
        while count < piece {
            match binding.read_at(&region, start + count..start + piece, offset + count as u64).await? {
                0 => break,
                more => count += more,
            }
        }
        region.copy_out(start, &mut bytes[..count])?;
        stdout.write_all(&bytes[..count]).await?;
        offset += count as u64;
        if count < piece {
            for (_, request) in asked {
                let _ = request.await;
            }
            stdout.flush().await?;
            return Ok(());
        }
        lanes.push_back(lane);
    }
}
