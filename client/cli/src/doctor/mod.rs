//! `holdfast doctor`: is RDMA in use, and if not, why.
//!
//! ```text
//!   host      RDMA devices, memlock limit         server    reachable? which transport, and why; a few bytes moved
//!   gauges    with --dir: what both planes hold
//! ```

mod host;
mod server;

use crate::admin::Admin;
use crate::args::{Connection, Doctor};
use crate::output::{line, shown};
use serde_json::{Value, json};
use std::path::Path;

pub(crate) async fn run(connection: &Connection, args: &Doctor) -> anyhow::Result<()> {
    let mut connection = connection.clone();
    if let (None, Some(dir)) = (&connection.config, &args.dir) {
        connection.config = Some(dir.join("client.toml"));
    }
    let host = host::look();
    let probe = match connection.config {
        Some(_) => Some(server::probe(&connection).await),
        None => None,
    };
    let (server, trial) = match probe {
        Some(Ok(probe)) => (Some(Ok(probe.facts)), probe.trial),
        Some(Err(error)) => (Some(Err(error)), Ok(())),
        None => (None, Ok(())),
    };
    let admin = match &args.dir {
        Some(dir) => Some(gauges(dir).await),
        None => None,
    };
    if args.json {
        let text = |result: &anyhow::Result<Value>| match result {
            Ok(value) => value.clone(),
            Err(error) => json!({ "error": format!("{error:#}") }),
        };
        line(json!({
            "host": host.json(),
            "server": server.as_ref().map(text),
            "gauges": admin.as_ref().map(text),
        }))?;
    } else {
        host.print()?;
        match &server {
            None => line("server    not looked at: give --config D/client.toml, or set HOLDFAST_CONFIG")?,
            Some(Ok(facts)) => server::print(facts, host.software())?,
            Some(Err(error)) => line(format_args!("server    {}", shown(&format!("{error:#}"))))?,
        }
        match &admin {
            Some(Ok(gauges)) => print_gauges(gauges)?,
            Some(Err(error)) => line(format_args!("planes    {error:#}"))?,
            None => {}
        }
    }
    // What was asked for and could not be looked at makes the command fail; it has been told above.
    match (server, admin) {
        (Some(Err(error)), _) | (_, Some(Err(error))) => Err(error),
        _ => trial,
    }
}

/// What both server processes hold at the moment.
async fn gauges(dir: &Path) -> anyhow::Result<Value> {
    Admin::connect(dir).await?.gauges().await
}

fn print_gauges(gauges: &Value) -> anyhow::Result<()> {
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
