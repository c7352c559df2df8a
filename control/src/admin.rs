//! The admin socket: one JSON object a line, in and out.
//!
//! | asked | answered |
//! |---|---|
//! | `{"get":"gauges"}` | `{"control":{NAME:VALUE,…},"dataplane":{NAME:VALUE,…}}`; dataplane is `null` while it is away or silent |
//! | `{"get":"control"}` | control's gauges alone, without asking dataplane |
//! | `{"get":"health"}` | `{"control":"up","dataplane":"up"}` or `"down"` |
//! | anything else | `{"error":"…"}` |

use crate::driver::Event;
use crate::gauges::Gauges;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};

const LINE_BYTES_MAX: u64 = 4096;
const CONNECTIONS_MAX: usize = 16;
const DATAPLANE_WAIT: Duration = Duration::from_secs(1);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Question {
    get: What,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum What {
    Gauges,
    Control,
    Health,
}

/// Listens for the operator.
///
/// # Errors
/// If the socket cannot be made.
pub fn listener(path: &Path) -> std::io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o600))?;
    Ok(listener)
}

/// Answers for ever.
pub async fn serve(listener: UnixListener, events: mpsc::Sender<Event>, gauges: Arc<Gauges>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let (events, gauges) = (events.clone(), gauges.clone());
                tokio::spawn(async move {
                    let _place = place;
                    if let Err(error) = connection(stream, &events, &gauges).await {
                        tracing::debug!(%error, "admin connection ended");
                    }
                });
            }
            Err(error) => {
                tracing::error!(%error, "cannot accept on the admin socket");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection(
    stream: UnixStream,
    events: &mpsc::Sender<Event>,
    gauges: &Gauges,
) -> std::io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    loop {
        let mut line = String::new();
        if (&mut reader).take(LINE_BYTES_MAX).read_line(&mut line).await? == 0 {
            return Ok(());
        }
        let answer = match serde_json::from_str::<Question>(&line) {
            Ok(Question { get: What::Gauges }) => {
                let dataplane = dataplane(events).await;
                json!({ "control": gauges.snapshot(), "dataplane": dataplane })
            }
            Ok(Question { get: What::Control }) => json!(gauges.snapshot()),
            Ok(Question { get: What::Health }) => {
                let linked = gauges.link_up.load(Relaxed) == 1;
                json!({ "control": "up", "dataplane": if linked { "up" } else { "down" } })
            }
            Err(error) => json!({ "error": error.to_string() }),
        };
        writer.write_all(format!("{answer}\n").as_bytes()).await?;
        if !line.ends_with('\n') {
            return Ok(());
        }
    }
}

async fn dataplane(events: &mpsc::Sender<Event>) -> Option<BTreeMap<String, Value>> {
    let (ask, answer) = oneshot::channel();
    events.send(Event::Gauges(ask)).await.ok()?;
    let gauges = tokio::time::timeout(DATAPLANE_WAIT, answer).await.ok()?.ok()?;
    Some(gauges.into_iter().map(|gauge| (gauge.name, gauge.value.into())).collect())
}
