//! Ending opens by force: control fences their bindings first, so an open is gone only some time after the order.

use super::select::id;
use super::table::text;
use crate::admin::Admin;
use crate::args::Opens;
use crate::output::line;
use anyhow::{Context, bail};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// How long to wait for one open to be gone.
const GONE_MAX: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Force-closes what is named. All names are looked up before the first is closed.
pub(super) async fn run(admin: &mut Admin, args: &Opens) -> anyhow::Result<()> {
    let mut opens: Vec<Value> = Vec::new();
    for prefix in &args.close {
        let open = prefix.find(admin).await?;
        if opens.iter().all(|other| id(other) != id(&open)) {
            opens.push(open);
        }
    }
    let mut closed = Vec::new();
    for open in &opens {
        let what = || format!("open {}", id(open));
        admin.ask(&json!({ "force_close": id(open) })).await.with_context(what)?;
        gone(admin, id(open)).await.with_context(what)?;
        closed.push(json!({ "open": id(open), "closed": true }));
        if !args.json {
            let (principal, volume, path) = (&open["principal"], &open["volume"], text(&open["path"]));
            let path = path.trim_start_matches('/');
            line(format_args!("closed {} of '{}': {}:/{path}", id(open), text(principal), text(volume)))?;
        }
    }
    if args.json { line(Value::Array(closed)) } else { Ok(()) }
}

/// Waits until the open is not listed any more.
async fn gone(admin: &mut Admin, open: &str) -> anyhow::Result<()> {
    let prefix: super::select::Prefix = open.parse().map_err(anyhow::Error::msg)?;
    let start = Instant::now();
    while prefix.find_any(admin).await?.is_some() {
        if start.elapsed() > GONE_MAX {
            bail!(
                "it is being closed, but is still there after {} s: its bindings are not fenced yet; \
                 see the server's log, and `holdfast opens {open}`",
                GONE_MAX.as_secs()
            );
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    Ok(())
}
