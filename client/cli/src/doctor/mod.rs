//! `holdfast doctor`: is RDMA in use, and if not, why.
//!
//! ```text
//!   host      RDMA devices, memlock limit         server    reachable? which transport, and why; a few bytes moved
//!   files     with --dir: how each volume is read and written      gauges    with --dir: what both planes hold
//! ```

mod files;
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
    let operator = match &args.dir {
        Some(dir) => Some(ask(dir).await),
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
            "volumes": operator.as_ref().map(|told| told.as_ref().map_or(Value::Null, |told| told.volumes["volumes"].clone())),
            "gauges": operator.as_ref().map(|told| match told {
                Ok(told) => told.gauges.clone(),
                Err(error) => json!({ "error": format!("{error:#}") }),
            }),
        }))?;
    } else {
        host.print()?;
        match &server {
            None => line("server    not looked at: give --config D/client.toml, or set HOLDFAST_CONFIG")?,
            Some(Ok(facts)) => server::print(facts, host.software())?,
            Some(Err(error)) => line(format_args!("server    {}", shown(&format!("{error:#}"))))?,
        }
        match &operator {
            Some(Ok(told)) => {
                files::print(&told.volumes, &told.gauges)?;
                print_gauges(&told.gauges)?;
            }
            Some(Err(error)) => line(format_args!("planes    {error:#}"))?,
            None => {}
        }
    }
    // What was asked for and could not be looked at makes the command fail; it has been told above.
    match (server, operator) {
        (Some(Err(error)), _) | (_, Some(Err(error))) => Err(error),
        _ => trial,
    }
}

/// What only the server's own user is told.
struct Told {
    volumes: Value,
    /// What both processes hold at the moment.
    gauges: Value,
}

async fn ask(dir: &Path) -> anyhow::Result<Told> {
    let mut admin = Admin::connect(dir).await?;
    let volumes = admin.ask(&json!({ "get": "volumes" })).await?;
    Ok(Told { volumes, gauges: admin.gauges().await? })
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
