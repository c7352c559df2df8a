//! A real server for the end-to-end benchmarks: `holdfast serve` with both planes as processes of their own, and a client
//! in this one.
//!
//! ```text
//!   this process                                  holdfast serve
//!   Client (one thread) ── TLS ──────────────────► holdfast-control ──┐ opens
//!      region ◄─ place / fetch ──────────────────► holdfast-dataplane ◄┘ descriptor ─► D/data/bench, in the page cache
//! ```

use holdfast_client::{
    Binding, Config, InFlight, Mapping, OpenOptions, Place, Region, Result, Session, Transport,
};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

/// Bytes of the file: more than any cache of the processor, little enough for a small machine's page cache.
pub const FILE_BYTES: usize = 64 << 20;

/// Where the server keeps its files: $HOLDFAST_BENCH_DIR, else a tmpfs, so that no disk is measured.
pub fn parent() -> PathBuf {
    match std::env::var_os("HOLDFAST_BENCH_DIR") {
        Some(dir) => dir.into(),
        None if Path::new("/dev/shm").is_dir() => "/dev/shm".into(),
        None => std::env::temp_dir(),
    }
}

/// A program of ours: benchmarks are in `deps/`, programs one above.
fn program(name: &str) -> PathBuf {
    let me = std::env::current_exe().expect("own path");
    let path = me.parent().and_then(Path::parent).expect("two directories above").join(name);
    assert!(path.exists(), "{} is not built: run `cargo build --release --bins` first", path.display());
    path
}

/// A running server. Dropping it stops both planes and removes its directory.
pub struct Server {
    dir: tempfile::TempDir,
    serve: Child,
}

/// What `init` writes.
const ONE_SIDED: &str = "one_sided = \"auto\"";

impl Server {
    /// Starts it, with a file of [`FILE_BYTES`] in the page cache. Each line of $HOLDFAST_BENCH_DATAPLANE takes the
    /// place of the one of `dataplane.toml` that has its key, or is added.
    pub fn start() -> Self {
        Self::with(&parent(), &|control| control)
    }

    /// The same in another place, with `control.toml` changed.
    pub fn with(parent: &Path, change: &dyn Fn(String) -> String) -> Self {
        let dir = tempfile::tempdir_in(parent).expect("a directory");
        let home = dir.path().join("home");
        let address = super::rdma_address().map_or_else(|| "127.0.0.1".to_owned(), |ip| ip.to_string());
        let mut init = Command::new(program("holdfast"));
        init.args(["init", "--port", "0", "--address", &address, "--dir"]).arg(&home).stdout(Stdio::null());
        assert!(init.status().expect("holdfast init").success(), "holdfast init failed");
        let file = home.join("data/bench");
        std::fs::write(&file, vec![0x5a; FILE_BYTES]).expect("the file");
        let path = home.join("control.toml");
        let text = std::fs::read_to_string(&path).expect("control.toml");
        std::fs::write(&path, change(text)).expect("control.toml");
        let more = std::env::var("HOLDFAST_BENCH_DATAPLANE").unwrap_or_default();
        let path = home.join("dataplane.toml");
        let mut text = std::fs::read_to_string(&path).expect("dataplane.toml");
        for line in more.lines() {
            let key = line.split_once('=').map(|(key, _)| format!("#{} = ", key.trim_end()));
            let old = key.and_then(|key| text.lines().find(|old| old.starts_with(&key)).map(str::to_owned));
            text = match old {
                Some(old) => text.replace(&old, line),
                None => format!("{text}\n{line}"),
            };
        }
        std::fs::write(&path, format!("{text}\n[map]\nenabled = true\n")).expect("dataplane.toml");
        let log = std::fs::File::create(dir.path().join("serve.log")).expect("a log");
        let mut serve = Command::new(program("holdfast"))
            .args(["serve", "--json", "--dir"])
            .arg(&home)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .expect("holdfast serve");
        let mut lines = BufReader::new(serve.stdout.take().expect("piped")).lines();
        let mut server = Self { dir, serve };
        let mut listen = None;
        for line in lines.by_ref().map_while(std::result::Result::ok) {
            let value: serde_json::Value = serde_json::from_str(&line).expect("a line of JSON");
            if value["ready"] == "control" {
                listen = value["listen"][0].as_str().map(str::to_owned);
            }
            if value["ready"] == "holdfast" {
                break;
            }
        }
        // serve goes on printing: nobody may leave its pipe full.
        std::thread::spawn(move || lines.for_each(drop));
        let Some(listen) = listen else {
            let _ = server.serve.kill();
            panic!("serve did not start:\n{}", server.log());
        };
        let path = server.config();
        let text = std::fs::read_to_string(&path).expect("client.toml");
        let old =
            text.lines().find(|line| line.starts_with("server = ")).expect("client.toml names the server");
        assert!(text.contains(ONE_SIDED), "client.toml says how hot files are read");
        std::fs::write(
            &path,
            text.replace(old, &format!("server = \"{listen}\""))
                // What is measured as served is to be served.
                .replace(ONE_SIDED, "one_sided = \"off\""),
        )
        .expect("client.toml");
        server
    }

    /// The configuration of its client.
    pub fn config(&self) -> PathBuf {
        self.dir.path().join("home/client.toml")
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("serve.log")).unwrap_or_default()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let pid = i32::try_from(self.serve.id()).ok().and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = pid {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let _ = self.serve.wait();
        if std::thread::panicking() {
            eprintln!("the server's log:\n{}", self.log());
        }
    }
}

/// Which way the bytes go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// From the file into the region: the server places.
    Read,
    /// From the region into the file: the server fetches.
    Write,
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if *self == Self::Read { "read" } else { "write" })
    }
}

/// What is moved, over and over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Span {
    /// Piece after piece of the file, each in flight with its own part of the region.
    Whole,
    /// One piece, and one part of the region: as perftest does, whose bytes stay in the processor's cache.
    OnePiece,
}

impl Span {
    /// Which piece of the file, and which part of the region, so many of each.
    fn pick(self, piece: usize, pieces: usize, part: usize) -> (usize, usize) {
        if self == Self::Whole { (piece % pieces, part) } else { (0, 0) }
    }
}

/// A client with one binding of the server's file. Its runtime has one thread, the caller's: no wake-up crosses
/// threads, as in a program that waits for its own requests.
pub struct Client {
    runtime: Runtime,
    binding: Binding,
    region: Region,
    next: usize,
}

impl Client {
    /// Connects over `transport`, opens and binds.
    pub fn connect(server: &Server, transport: Transport) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let connected = runtime.block_on(async {
            let session = Session::connect(&Config::load(&server.config())?).await?;
            let place = Place { volume: "data".into(), path: "bench".into() };
            let open = session.open(&place, &OpenOptions::read_write()).await?;
            let channel = open.connect(transport).await?;
            open.bind(&channel).await
        });
        let binding = connected.unwrap_or_else(|error| panic!("{error}\n{}", server.log()));
        let region = Region::allocate(8 << 20).expect("memory");
        Self { runtime, binding, region, next: 0 }
    }

    /// Maps the whole file, to be read one-sided.
    pub fn map(&self) -> Mapping {
        self.runtime.block_on(self.binding.map(0..FILE_BYTES as u64)).expect("a mapping")
    }

    /// As [`Client::run`], one-sided. Each of `depth` tasks reads its share, one piece after the other.
    pub fn run_mapped(
        &mut self,
        mapping: &Mapping,
        span: Span,
        size: usize,
        depth: usize,
        count: u64,
    ) -> Duration {
        assert!(size * depth <= self.region.len(), "the region is too small");
        let begun = Instant::now();
        self.runtime.block_on(async {
            let mut tasks = tokio::task::JoinSet::new();
            for lane in 0..depth {
                let (mapping, region) = (mapping.clone(), self.region.clone());
                tasks.spawn(async move {
                    for number in (lane as u64..count).step_by(depth) {
                        let number = usize::try_from(number).unwrap_or(0);
                        let (piece, part) = span.pick(number, FILE_BYTES / size, lane);
                        let (to, at) = (part * size..(part + 1) * size, (piece * size) as u64);
                        let read = mapping.read_at(&region, to, at).await;
                        assert_eq!(read.expect("no failure"), size, "a short transfer");
                    }
                });
            }
            tasks.join_all().await;
        });
        begun.elapsed()
    }

    /// Moves `count` pieces of `size` bytes, `depth` of them in flight, and says how long that took. Each lane has its
    /// own part of the region; pieces follow each other through the file, which is begun again at its end. Or it is one part and one
    /// piece, as `span` says.
    pub fn run(&mut self, way: Way, span: Span, size: usize, depth: usize, count: u64) -> Duration {
        assert!(size * depth <= self.region.len(), "the region is too small");
        let Self { runtime, binding, region, next } = self;
        let begun = Instant::now();
        let moved: Result<()> = runtime.block_on(async {
            let mut in_flight: VecDeque<InFlight> = VecDeque::with_capacity(depth);
            for number in 0..count {
                if in_flight.len() == depth {
                    if let Some(oldest) = in_flight.pop_front() {
                        assert_eq!(oldest.await?, size, "a short transfer");
                    }
                }
                let lane = usize::try_from(number).unwrap_or(0) % depth;
                let (piece, part) = span.pick(*next, FILE_BYTES / size, lane);
                let (start, offset) = (part * size, (piece * size) as u64);
                *next += 1;
                in_flight.push_back(match way {
                    Way::Read => binding.submit_read(region, start..start + size, offset).await?,
                    Way::Write => binding.submit_write(region, start..start + size, offset).await?,
                });
            }
            for request in in_flight {
                assert_eq!(request.await?, size, "a short transfer");
            }
            Ok(())
        });
        moved.expect("no failure");
        begun.elapsed()
    }
}
