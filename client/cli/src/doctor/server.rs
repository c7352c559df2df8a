//! Is the server there, and which transport does a client get?
//!
//! That is not asked but tried: a small file is opened, bound and read, a new one where the client may write.

use crate::args::Connection;
use crate::output::{line, shown};
use crate::remote::Remote;
use anyhow::Context;
use holdfast_client::{FileKind, Open, OpenOptions, Region, Session};
use serde_json::{Value, json};
use std::time::Instant;

/// What was found out, and why the data plane could not be tried, if so.
pub(super) struct Probe {
    pub(super) facts: Value,
    pub(super) trial: anyhow::Result<()>,
}

pub(super) async fn probe(connection: &Connection) -> anyhow::Result<Probe> {
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
    let mut tried = Ok(());
    facts["data"] = match trial(&session).await {
        Ok(data) => data,
        Err(error) => {
            let text = format!("{error:#}");
            tried = Err(error.context("no data could be moved"));
            json!({ "error": text })
        }
    };
    session.close().await;
    Ok(Probe { facts, trial: tried })
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
    Ok(json!({ "untried": "there is no file that this client may open, so no data channel was tried" }))
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

/// How verbs move bytes on this host: `software` is true if all its RDMA devices are drivers only, `None` if some are.
fn in_use(software: Option<bool>) -> &'static str {
    match software {
        Some(true) => "in use, by a device in software: its driver copies the bytes, on the processor",
        Some(false) => "in use: the device places bytes, no processor copies them",
        None => "in use (this host also has a device in software, whose driver copies the bytes)",
    }
}

pub(super) fn print(facts: &Value, software: Option<bool>) -> anyhow::Result<()> {
    let text = |value: &Value| shown(value.as_str().unwrap_or_default());
    line(format_args!(
        "server    {} answers in {} us; it knows this client as '{}'",
        text(&facts["address"]),
        facts["ping_us"],
        text(&facts["principal"])
    ))?;
    let data = &facts["data"];
    if let Some(error) = data["error"].as_str() {
        return line(format_args!("transport none: {}", shown(error)));
    }
    if let Some(why) = data["untried"].as_str() {
        return line(format_args!("transport not tried: {why}"));
    }
    let to = match data["transport"].as_str() {
        Some("local") => "in shared memory on this host".to_owned(),
        _ => format!("to {}", text(&data["peer"])),
    };
    line(format_args!(
        "transport {} {to}: {} credits, pieces of {} bytes, a read in {} us, protection '{}'",
        text(&data["transport"]),
        data["credits"],
        data["transfer_bytes_max"],
        data["read_us"],
        text(&data["mac_policy"])
    ))?;
    match (data["transport"].as_str(), data["reason"].as_str(), facts["transport_wanted"].as_str()) {
        (Some("verbs"), ..) => line(format_args!("RDMA      {}", in_use(software))),
        (Some("local"), ..) => line(format_args!("RDMA      not needed: the server is on this host")),
        (_, Some(reason), _) => line(format_args!("RDMA      not in use: {}", shown(reason))),
        (_, None, Some(wanted)) => {
            line(format_args!("RDMA      not in use: the configuration says transport = \"{wanted}\""))
        }
        _ => Ok(()),
    }
}
