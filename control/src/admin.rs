//! The admin socket: one JSON object a line, in and out.
//!
//! | asked | answered |
//! |---|---|
//! | `{"get":"gauges"}` | `{"control":{NAME:VALUE,…},"dataplane":{NAME:VALUE,…}}`; dataplane is `null` while it is away or silent |
//! | `{"get":"control"}` | control's gauges alone, without asking dataplane |
//! | `{"get":"health"}` | `{"control":"up","dataplane":"up"}` or `"down"`; control is `"recovering"` until it lets clients in |
//! | `{"get":"volumes"}` | `{"volumes":[VOLUME,…]}`, as they were when the server started |
//! | `{"get":"opens","after":ID,"max":N}` | `{"opens":[OPEN,…],"next":ID}`: at most N (default and limit 500) in the order of their ids, behind `after` (absent or `null`: from the first); `next` is `null` on the last page |
//! | `{"get":"sessions","after":ID,"max":N}` | `{"sessions":[SESSION,…],"next":ID}`, the same way |
//! | `{"force_close":ID}` | `{"closing":ID}`: the open is being closed; its owner learns `ForceClosed`. An error if there is no such open |
//! | anything else, or too early | `{"error":"…"}` |
//!
//! IDs are 32 hex digits. An OPEN has `open`, `principal`, `process`, `volume`, `path`, `access` and `share` (letters of
//! `rwd`), `state` (`active`, `detached`, `expired`, `closing`), `session` (or `null`), `hold_ms`, `hold_left_ms` (`null`
//! unless it is detached), `class` (`hold`, `yield`), `bindings`, `fencing` (those of them that are being fenced), `locks`,
//! `locks_exclusive`, `epoch`, `opened_ms` (since 1970), `marked` (somebody else may have changed the file). A SESSION has
//! `session`, `principal`, `process`, `opens`, `address`. A VOLUME has `name`, `directory`, `file_io` (`cached`, `direct`: as configured),
//! `file_system`, `direct` (`possible`, `impossible`, `untried`), `direct_blocks` (bytes that direct I/O is aligned to, or `null`).

use crate::driver::Event;
use crate::gauges::Gauges;
use holdfast_shared::types::{OpenId, SessionId};
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

/// Opens or sessions in one answer.
const PAGE_MAX: usize = 500;
/// How long the driver may take to answer.
const ANSWER_WAIT: Duration = Duration::from_secs(4);

#[derive(Deserialize)]
#[serde(untagged)]
enum Question {
    Get(Get),
    ForceClose(ForceClose),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Get {
    get: What,
    #[serde(default)]
    after: Option<String>,
    #[serde(default)]
    max: Option<usize>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ForceClose {
    force_close: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum What {
    Gauges,
    Control,
    Health,
    Opens,
    Sessions,
    Volumes,
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
pub async fn serve(
    listener: UnixListener,
    events: mpsc::Sender<Event>,
    gauges: Arc<Gauges>,
    volumes: Arc<Value>,
) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let (events, gauges, volumes) = (events.clone(), gauges.clone(), volumes.clone());
                tokio::spawn(async move {
                    let _place = place;
                    if let Err(error) = connection(stream, &events, &gauges, &volumes).await {
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
    volumes: &Value,
) -> std::io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    loop {
        let mut line = String::new();
        if (&mut reader).take(LINE_BYTES_MAX).read_line(&mut line).await? == 0 {
            return Ok(());
        }
        let answer = match serde_json::from_str::<Question>(&line) {
            Ok(question) => match answer(question, events, gauges, volumes).await {
                Ok(answer) => answer,
                Err(words) => json!({ "error": words }),
            },
            Err(error) => json!({ "error": format!("not a question that is known here: {error}") }),
        };
        writer.write_all(format!("{answer}\n").as_bytes()).await?;
        if !line.ends_with('\n') {
            return Ok(());
        }
    }
}

async fn answer(
    question: Question,
    events: &mpsc::Sender<Event>,
    gauges: &Gauges,
    volumes: &Value,
) -> Result<Value, String> {
    let Get { get, after, max } = match question {
        Question::Get(get) => get,
        Question::ForceClose(ForceClose { force_close }) => {
            let open = id(&force_close)?;
            return match ask(events, |answer| Event::ForceClose(OpenId(open), answer)).await? {
                true => Ok(json!({ "closing": OpenId(open).to_string() })),
                false => Err(format!("there is no open {force_close}")),
            };
        }
    };
    let after = after.as_deref().map(id).transpose()?;
    let max = max.unwrap_or(PAGE_MAX).clamp(1, PAGE_MAX);
    match get {
        What::Gauges => {
            let dataplane = dataplane(events).await;
            Ok(json!({ "control": gauges.snapshot(), "dataplane": dataplane }))
        }
        What::Control => Ok(json!(gauges.snapshot())),
        What::Volumes => Ok(json!({ "volumes": volumes })),
        What::Health => {
            let control = if gauges.recovering.load(Relaxed) == 1 { "recovering" } else { "up" };
            let dataplane = if gauges.link_up.load(Relaxed) == 1 { "up" } else { "down" };
            Ok(json!({ "control": control, "dataplane": dataplane }))
        }
        What::Opens => ask(events, |answer| Event::Opens(after.map(OpenId), max, answer)).await,
        What::Sessions => ask(events, |answer| Event::Sessions(after.map(SessionId), max, answer)).await,
    }
}

fn id(text: &str) -> Result<[u8; 16], String> {
    let digits = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let number = u128::from_str_radix(text, 16).ok().filter(|_| digits);
    number.map(u128::to_be_bytes).ok_or_else(|| "an id is 32 hex digits".into())
}

async fn ask<T>(
    events: &mpsc::Sender<Event>,
    question: impl FnOnce(oneshot::Sender<T>) -> Event,
) -> Result<T, String> {
    let (ask, answer) = oneshot::channel();
    let asked = async {
        events.send(question(ask)).await.ok()?;
        answer.await.ok()
    };
    let answered = tokio::time::timeout(ANSWER_WAIT, asked).await.ok().flatten();
    answered.ok_or_else(|| "the server recovers, or stops: try again".to_owned())
}

async fn dataplane(events: &mpsc::Sender<Event>) -> Option<BTreeMap<String, Value>> {
    let (ask, answer) = oneshot::channel();
    events.send(Event::Gauges(ask)).await.ok()?;
    let gauges = tokio::time::timeout(DATAPLANE_WAIT, answer).await.ok()?.ok()?;
    Some(gauges.into_iter().map(|gauge| (gauge.name, gauge.value.into())).collect())
}
