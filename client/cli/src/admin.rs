//! The admin socket: what the server's operator may see and do. One JSON object a line, in and out.
//!
//! ```text
//!   doctor ── gauges ─┐
//!   opens ── opens, ──┼──► DIR/state/admin.sock ──► control
//!   sessions  close   ┘
//! ```

use anyhow::{Context, bail};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;

/// Longest answer: a page of opens with paths as long as they can be.
const ANSWER_BYTES_MAX: u64 = 16 << 20;
const ANSWER_WAIT: Duration = Duration::from_secs(5);
/// Entries asked for at once.
const PAGE: usize = 500;

/// A conversation with control.
pub(crate) struct Admin {
    socket: PathBuf,
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
}

impl Admin {
    /// Connects to the server whose directory `dir` is.
    pub(crate) async fn connect(dir: &Path) -> anyhow::Result<Self> {
        let socket = dir.join("state/admin.sock");
        let stream = timeout(ANSWER_WAIT, UnixStream::connect(&socket))
            .await
            .map_err(anyhow::Error::from)
            .and_then(|connected| Ok(connected?))
            .with_context(|| {
                format!(
                    "cannot reach the server at {} (is `holdfast serve` running, and is this its user?)",
                    socket.display()
                )
            })?;
        let (reader, writer) = stream.into_split();
        Ok(Self { socket, reader: BufReader::new(reader), writer })
    }

    /// One question and its answer; an answer that is an error is one.
    pub(crate) async fn ask(&mut self, question: &Value) -> anyhow::Result<Value> {
        let answer = timeout(ANSWER_WAIT, self.exchange(question))
            .await
            .map_err(anyhow::Error::from)
            .and_then(|answered| answered)
            .with_context(|| format!("the server does not answer at {}", self.socket.display()))?;
        match answer["error"].as_str() {
            Some(error) => bail!("the server says: {}", crate::output::shown(error)),
            None => Ok(answer),
        }
    }

    async fn exchange(&mut self, question: &Value) -> anyhow::Result<Value> {
        self.writer.write_all(format!("{question}\n").as_bytes()).await?;
        let mut answer = String::new();
        (&mut self.reader).take(ANSWER_BYTES_MAX).read_line(&mut answer).await?;
        if !answer.ends_with('\n') {
            bail!("the connection ended within an answer");
        }
        Ok(serde_json::from_str(&answer)?)
    }

    /// All gauges of both planes.
    pub(crate) async fn gauges(&mut self) -> anyhow::Result<Value> {
        self.ask(&json!({ "get": "gauges" })).await
    }

    /// A page of what `what` names (`opens`, `sessions`), from behind the id `after` on, and where the next one begins.
    pub(crate) async fn page(
        &mut self,
        what: &str,
        after: Option<&str>,
        max: usize,
    ) -> anyhow::Result<(Vec<Value>, Option<String>)> {
        let mut answer = self.ask(&json!({ "get": what, "after": after, "max": max })).await?;
        let next = answer["next"].as_str().map(str::to_owned);
        match answer[what].take() {
            Value::Array(all) => Ok((all, next)),
            _ => bail!("the server does not tell its {what}; is it older than this program?"),
        }
    }

    /// Gives every entry of what `what` names to `each`, in the order of their ids.
    pub(crate) async fn all(
        &mut self,
        what: &str,
        mut each: impl FnMut(Value) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let mut after: Option<String> = None;
        loop {
            let (page, next) = self.page(what, after.as_deref(), PAGE).await?;
            page.into_iter().try_for_each(&mut each)?;
            match next {
                // A server whose pages do not move on must not keep us for ever.
                Some(next) if after.as_ref().is_none_or(|before| *before < next) => after = Some(next),
                Some(_) => bail!("the server repeats a page of its {what}"),
                None => return Ok(()),
            }
        }
    }
}

/// Where the server is: the directory given, or the one that the client's configuration stands in.
pub(crate) fn directory(dir: Option<&Path>, config: Option<&Path>) -> anyhow::Result<PathBuf> {
    match (dir, config.and_then(Path::parent)) {
        (Some(dir), _) => Ok(dir.to_path_buf()),
        (None, Some(parent)) => Ok(parent.to_path_buf()),
        (None, None) => bail!("say which server: give --dir D, the directory given to `holdfast init`"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    /// A server that gives these answers, whatever it is asked, and tells what it was asked.
    fn server(answers: &'static [&'static str]) -> (tempfile::TempDir, tokio::task::JoinHandle<Vec<Value>>) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("state")).unwrap();
        let listener = UnixListener::bind(dir.path().join("state/admin.sock")).unwrap();
        let task = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let (reader, mut writer) = stream.into_split();
            let mut lines = BufReader::new(reader).lines();
            let mut asked = Vec::new();
            for answer in answers {
                let Ok(Some(line)) = lines.next_line().await else { break };
                asked.push(serde_json::from_str(&line).unwrap());
                writer.write_all(answer.as_bytes()).await.unwrap();
            }
            asked
        });
        (dir, task)
    }

    #[tokio::test]
    async fn pages_are_read_to_the_end() {
        let (dir, task) = server(&[
            "{\"opens\":[{\"open\":\"01\"},{\"open\":\"02\"}],\"next\":\"02\"}\n",
            "{\"opens\":[{\"open\":\"03\"}],\"next\":null}\n",
        ]);
        let mut seen = Vec::new();
        let mut admin = Admin::connect(dir.path()).await.unwrap();
        let mut note = |open: Value| seen.push(open["open"].as_str().unwrap().to_owned());
        admin
            .all("opens", |open| {
                note(open);
                Ok(())
            })
            .await
            .unwrap();
        assert_eq!(seen, ["01", "02", "03"]);
        drop(admin);
        let asked = task.await.unwrap();
        assert_eq!(asked[0], json!({ "get": "opens", "after": null, "max": PAGE }));
        assert_eq!(asked[1]["after"], "02");
    }

    #[tokio::test]
    async fn a_server_that_repeats_itself_is_left() {
        let page = "{\"opens\":[],\"next\":\"02\"}\n";
        let (dir, _task) = server(Box::leak(vec![page; 9].into_boxed_slice()));
        let mut admin = Admin::connect(dir.path()).await.unwrap();
        assert!(admin.all("opens", |_| Ok(())).await.unwrap_err().to_string().contains("repeats"));
    }

    #[tokio::test]
    async fn errors_say_what_is_wrong() {
        let (dir, _task) = server(&["{\"error\":\"no such open\"}\n", "{\"cut"]);
        let mut admin = Admin::connect(dir.path()).await.unwrap();
        let said = admin.gauges().await.unwrap_err().to_string();
        assert!(said.contains("no such open"), "{said}");
        let said = format!("{:#}", admin.gauges().await.unwrap_err());
        assert!(said.contains("within an answer"), "{said}");
        let nobody = tempfile::tempdir().unwrap();
        let said = format!("{:#}", Admin::connect(nobody.path()).await.err().unwrap());
        assert!(said.contains("holdfast serve") && said.contains("admin.sock"), "{said}");
    }

    #[test]
    fn the_configuration_says_where_the_server_is() {
        let (dir, config) = (Path::new("/d"), Path::new("/c/client.toml"));
        assert_eq!(directory(Some(dir), Some(config)).unwrap(), dir);
        assert_eq!(directory(None, Some(config)).unwrap(), Path::new("/c"));
        assert!(directory(None, None).unwrap_err().to_string().contains("--dir"));
    }
}
