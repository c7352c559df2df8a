//! Is the server there, and which transport does a client get?
//!
//! That is not asked but tried: a small file is opened, bound and read, a new one where the client may write.

use crate::args::Connection;
use crate::output::line;
use crate::remote::Remote;
use anyhow::Context;
use holdfast_client::{FileKind, Open, OpenOptions, Region, Session};
use serde_json::{Value, json};
use std::time::Instant;

pub(super) async fn probe(connection: &Connection) -> anyhow::Result<Value> {
    let config = connection.load()?;
    let session = Session::connect(&config).await?;
    let ping = session.ping().await?;
    let volumes = session.volumes().await?;
    let mut facts = json!({
        "address": session.server().to_string(),
        "principal": session.principal(),
        "ping_us": u64::try_from(ping.as_micros()).unwrap_or(u64::MAX),
        "volumes": volumes.iter().map(|v| v.name.as_str()).collect::<Vec<_>>(),
        "transport_wanted": format!("{:?}", config.transport).to_lowercase(),
    });
    facts["data"] = match trial(&session).await {
        Ok(data) => data,
        Err(error) => json!({ "error": format!("{error:#}") }),
    };
    session.close().await;
    Ok(facts)
}

/// Opens, binds and moves a few bytes.
async fn trial(session: &Session) -> anyhow::Result<Value> {
    for volume in session.volumes().await? {
        let root = Remote { volume: volume.name, path: String::new(), directory: true };
        if volume.writable {
            let name =
                format!(".holdfast-doctor-{:016x}", u64::from_le_bytes(holdfast_client::random_bytes()?));
            let place = root.join(&name).place();
            let open = session
                .open(&place, &OpenOptions::create_new(0o600))
                .await
                .context("cannot make a trial file")?;
            let moved = move_bytes(&open, true).await;
            let _ = open.close().await;
            session.remove(&place).await?;
            return moved;
        }
        let mut listing = session.list(&root.place());
        while let Some(page) = listing.next_page().await? {
            if let Some(file) = page.iter().find(|entry| entry.attributes.kind == FileKind::File) {
                let open = session.open(&root.join(&file.name).place(), &OpenOptions::read()).await?;
                let moved = move_bytes(&open, false).await;
                let _ = open.close().await;
                return moved;
            }
        }
    }
    anyhow::bail!("there is no file that this client may open, so no data channel was tried")
}

async fn move_bytes(open: &Open, write: bool) -> anyhow::Result<Value> {
    const LENGTH: usize = 64 << 10;
    let channel = open.connect(open.session().config().transport).await?;
    let binding = open.bind(&channel).await?;
    let region = Region::allocate(LENGTH)?;
    if write {
        binding.write_all(&region, 0..LENGTH, 0).await?;
    }
    binding.read_at(&region, 0..LENGTH, 0).await?;
    let start = Instant::now();
    binding.read_at(&region, 0..1, 0).await?;
    let latency = start.elapsed();
    binding.unbind().await?;
    Ok(json!({
        "transport": channel.transport().name(),
        "reason": channel.fallback_reason(),
        "peer": channel.peer().to_string(),
        "zero_copy": channel.capabilities().zero_copy,
        "credits": channel.credits(),
        "transfer_bytes_max": channel.transfer_max(),
        "mac_policy": format!("{:?}", binding.policy()).to_lowercase(),
        "read_us": u64::try_from(latency.as_micros()).unwrap_or(u64::MAX),
    }))
}

pub(super) fn print(facts: &Value) -> anyhow::Result<()> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    line(format_args!(
        "server    {} answers in {} us; it knows this client as '{}'",
        text(&facts["address"]),
        facts["ping_us"],
        text(&facts["principal"])
    ))?;
    let data = &facts["data"];
    if let Some(error) = data["error"].as_str() {
        return line(format_args!("transport none: {error}"));
    }
    line(format_args!(
        "transport {} to {}: {} credits, pieces of {} bytes, a read in {} us, protection '{}'",
        text(&data["transport"]),
        text(&data["peer"]),
        data["credits"],
        data["transfer_bytes_max"],
        data["read_us"],
        text(&data["mac_policy"])
    ))?;
    match (data["transport"].as_str(), data["reason"].as_str(), facts["transport_wanted"].as_str()) {
        (Some("verbs"), ..) => line("RDMA      in use: the device places bytes, no processor copies them"),
        (_, Some(reason), _) => line(format_args!("RDMA      not in use: {reason}")),
        (_, None, Some(wanted)) => {
            line(format_args!("RDMA      not in use: the configuration says transport = \"{wanted}\""))
        }
        _ => Ok(()),
    }
}
