//! The admin socket: what both server processes hold at the moment.

use crate::output::line;
use anyhow::Context;
use serde_json::Value;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

const ANSWER_BYTES_MAX: u64 = 1 << 20;

pub(super) async fn gauges(socket: &Path) -> anyhow::Result<Value> {
    tokio::time::timeout(Duration::from_secs(5), ask(socket))
        .await
        .context("the admin socket does not answer")?
        .with_context(|| format!("{} (is `holdfast serve` running, and is this its user?)", socket.display()))
}

async fn ask(socket: &Path) -> anyhow::Result<Value> {
    let mut stream = UnixStream::connect(socket).await?;
    stream.write_all(b"{\"get\":\"gauges\"}\n").await?;
    let mut answer = String::new();
    BufReader::new(stream.take(ANSWER_BYTES_MAX)).read_line(&mut answer).await?;
    Ok(serde_json::from_str(&answer)?)
}

pub(super) fn print(gauges: &Value) -> anyhow::Result<()> {
    for plane in ["control", "dataplane"] {
        match gauges[plane].as_object() {
            None => line(format_args!("{plane}: away"))?,
            Some(all) => {
                line(format_args!("{plane}:"))?;
                for (name, value) in all {
                    line(format_args!("  {name:<40} {value}"))?;
                }
            }
        }
    }
    Ok(())
}
