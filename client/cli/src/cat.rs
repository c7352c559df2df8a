//! `holdfast cat`: files to standard output, read ahead through bounded memory.

use crate::args::{Cat, Connection};
use crate::remote::Remote;
use anyhow::Context;
use holdfast_client::stream::{Memory, Reader, Target};
use holdfast_client::{DataChannel, OpenOptions, Region, Session, Stripes, TransportKind};
use tokio::io::AsyncWriteExt;

/// Bytes of one chunk read ahead.
const CHUNK: usize = 1 << 20;

pub(crate) async fn run(connection: &Connection, args: &Cat) -> anyhow::Result<()> {
    let mut config = connection.load()?;
    if let Some(transport) = args.transport {
        config.transport = transport;
    }
    let session = Session::connect(&config).await?;
    let mut channels = Vec::new();
    for path in &args.paths {
        one(&session, path, args, &mut channels).await.with_context(|| path.to_string())?;
    }
    drop(channels);
    session.close().await;
    tracing::info!(region_bytes_max = Region::memory().bytes_max, "all was written");
    Ok(())
}

async fn one(
    session: &Session,
    path: &Remote,
    args: &Cat,
    channels: &mut Vec<DataChannel>,
) -> anyhow::Result<()> {
    let open = session.open(&path.place(), &OpenOptions::read()).await?;
    // On the server's host one channel is as good as many, and may read the file itself.
    let is_local = |all: &[DataChannel]| all.first().is_some_and(|c| c.transport() == TransportKind::Local);
    while channels.len() < args.channels && !is_local(channels) {
        channels.push(open.connect_nth(session.config().transport, channels.len()).await?);
    }
    let target = match channels.as_slice() {
        [channel] => Target::from(open.bind(channel).await?),
        channels => {
            let stripes = Stripes::new(&open)?;
            for channel in channels {
                stripes.add(channel).await?;
            }
            stripes.into()
        }
    };
    pour(&target, Memory { depth: args.depth, chunk: CHUNK }).await?;
    target.unbind().await?;
    open.close().await?;
    Ok(())
}

/// Reads to the file's end, wherever that is by then, and writes in order.
async fn pour(target: &Target, memory: Memory) -> anyhow::Result<()> {
    let mut reader = Reader::new(target, memory)?;
    let (mut bytes, mut stdout) = (Vec::new(), tokio::io::stdout());
    while let Some(chunk) = reader.next_chunk().await? {
        bytes.resize(chunk.len(), 0);
        chunk.copy_out(0, &mut bytes)?;
        // Its memory is for what comes next, while this is written.
        drop(chunk);
        stdout.write_all(&bytes).await?;
    }
    stdout.flush().await?;
    Ok(())
}
