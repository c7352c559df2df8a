//! A real deployment for the process tests: `holdfast init`, `holdfast serve`, both planes as processes of their own.
//!
//! Every test file compiles this module and uses a part of it.
#![allow(dead_code, unreachable_pub)]

pub mod raw;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// How long anything may take before the test fails instead of hanging.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// A program of ours, beside the one under test.
pub fn program(name: &str) -> PathBuf {
    let here = Path::new(env!("CARGO_BIN_EXE_holdfast")).with_file_name(name);
    assert!(
        here.exists(),
        "{} is not built: run ci/test, or `cargo build --workspace --bins` first",
        here.display()
    );
    here
}

/// The address of an RDMA device, if there is one. Absence is a failure where HOLDFAST_REQUIRE_RDMA is 1.
pub fn rdma_address() -> Option<String> {
    let found = holdfast_verbs::Device::list().ok().and_then(|devices| {
        devices.iter().filter_map(|d| d.ipv4_addresses().ok()).flatten().next().map(|a| a.to_string())
    });
    if found.is_none() {
        assert!(
            std::env::var("HOLDFAST_REQUIRE_RDMA").as_deref() != Ok("1"),
            "HOLDFAST_REQUIRE_RDMA=1, and no RDMA device"
        );
        eprintln!("skipped over verbs: no RDMA device");
    }
    found
}

/// The transports that can be tested here.
pub fn transports() -> Vec<&'static str> {
    if rdma_address().is_some() { vec!["tcp", "verbs"] } else { vec!["tcp"] }
}

/// What a deployment is made with.
#[derive(Default)]
pub struct Wish {
    /// Replaces `mac_policy = "header"`.
    pub mac_policy: Option<&'static str>,
    /// Settings of dataplane.toml's `[limits]`.
    pub dataplane: &'static str,
    /// Uncomment every setting that `init` has written as a comment.
    pub uncomment: bool,
    /// Where `serve` is started from [default: beside the program under test].
    pub programs: Option<PathBuf>,
    /// Close the reading end of `serve`'s standard output once it is ready.
    pub deaf: bool,
}

/// A running server in a directory of its own. Dropping it stops both planes and removes the directory.
pub struct Deployment {
    dir: tempfile::TempDir,
    serve: Option<Child>,
    /// Process id of control.
    pub control_pid: u32,
    /// Process id of dataplane.
    pub dataplane_pid: u32,
}

impl Deployment {
    /// Starts with the defaults.
    pub fn start() -> Self {
        Self::with(&Wish::default())
    }

    /// Starts with some settings changed.
    pub fn with(wish: &Wish) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join("home");
        let address = rdma_address().unwrap_or_else(|| "127.0.0.1".into());
        run(Command::new(program("holdfast"))
            .args(["init", "--port", "0", "--address", &address, "--dir"])
            .arg(&home));
        let edit = |file: &str, change: &dyn Fn(String) -> String| {
            let path = home.join(file);
            let text = std::fs::read_to_string(&path).unwrap();
            std::fs::write(&path, change(text)).unwrap();
        };
        // The limits are the file's last table.
        edit("dataplane.toml", &|text| text + wish.dataplane);
        if wish.uncomment {
            for file in ["control.toml", "dataplane.toml"] {
                edit(file, &|text| text.lines().map(|l| setting(l).to_owned() + "\n").collect());
            }
        }
        if let Some(policy) = wish.mac_policy {
            edit("control.toml", &|text| {
                assert!(text.contains("mac_policy = \"header\""), "{text}");
                text.replace("mac_policy = \"header\"", &format!("mac_policy = \"{policy}\""))
            });
        }
        program("holdfast-control");
        program("holdfast-dataplane");
        let serving = wish.programs.as_ref().map_or_else(|| program("holdfast"), |d| d.join("holdfast"));
        let mut serve = Command::new(serving)
            .args(["serve", "--json", "--dir"])
            .arg(&home)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(dir.path().join("serve.log")).unwrap())
            .spawn()
            .unwrap();
        let pid = serve.id();
        let mut lines = BufReader::new(serve.stdout.take().unwrap()).lines();
        let mut deployment = Self { dir, serve: Some(serve), control_pid: 0, dataplane_pid: 0 };
        let mut listen = None;
        for line in lines.by_ref() {
            let line = line.unwrap();
            let value: serde_json::Value =
                serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line}: {e}"));
            if value["ready"] == "control" {
                listen = value["listen"][0].as_str().map(str::to_owned);
            }
            if value["ready"] == "holdfast" {
                break;
            }
        }
        if wish.deaf {
            drop(lines);
        } else {
            // serve goes on printing; nobody may leave its pipe full.
            std::thread::spawn(move || lines.for_each(drop));
        }
        let Some(listen) = listen else { panic!("serve said nothing of control:\n{}", deployment.log()) };
        deployment.control_pid = deployment.child_of(pid, "holdfast-contro");
        deployment.dataplane_pid = deployment.child_of(pid, "holdfast-datapl");
        let client = deployment.home().join("client.toml");
        let text = std::fs::read_to_string(&client).unwrap();
        let text: Vec<String> = text
            .lines()
            .map(|l| if l.starts_with("server = ") { format!("server = \"{listen}\"") } else { l.to_owned() })
            .collect();
        std::fs::write(&client, text.join("\n")).unwrap();
        deployment
    }

    /// The directory that `init` made.
    pub fn home(&self) -> PathBuf {
        self.dir.path().join("home")
    }

    /// The directory behind the volume `data`.
    pub fn volume(&self) -> PathBuf {
        self.home().join("data")
    }

    /// A place for files of the test.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The client's configuration.
    pub fn config(&self) -> PathBuf {
        self.home().join("client.toml")
    }

    /// What serve and both planes logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("serve.log")).unwrap_or_default()
    }

    /// `holdfast --config client.toml ARGS`, not run yet.
    pub fn holdfast(&self, args: &[&str]) -> Command {
        let mut command = Command::new(program("holdfast"));
        command.arg("--config").arg(self.config()).args(args).stdin(Stdio::null());
        command
    }

    /// Runs `holdfast ARGS`, which must succeed, and gives its standard output.
    pub fn ok(&self, args: &[&str]) -> String {
        let output =
            finish(self.holdfast(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
        assert!(
            output.status.success(),
            "holdfast {args:?}: {}\n{}\n---- server:\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr),
            self.log()
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs `holdfast ARGS`, which must fail, and gives its standard error.
    pub fn fails(&self, args: &[&str]) -> String {
        let output =
            finish(self.holdfast(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
        assert!(!output.status.success(), "holdfast {args:?} should have failed");
        String::from_utf8(output.stderr).unwrap()
    }

    /// All gauges, `control.NAME` and `dataplane.NAME`, from the admin socket.
    pub fn gauges(&self) -> std::collections::BTreeMap<String, u64> {
        let mut stream =
            std::os::unix::net::UnixStream::connect(self.home().join("state/admin.sock")).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        std::io::Write::write_all(&mut stream, b"{\"get\":\"gauges\"}\n").unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        let value: serde_json::Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line}: {e}"));
        let mut all = std::collections::BTreeMap::new();
        for plane in ["control", "dataplane"] {
            for (name, number) in value[plane].as_object().unwrap_or_else(|| panic!("no {plane} in {line}")) {
                all.insert(format!("{plane}.{name}"), number.as_u64().unwrap_or(0));
            }
        }
        all
    }

    /// Waits until `condition` holds of the gauges.
    pub fn until(&self, what: &str, condition: impl Fn(&std::collections::BTreeMap<String, u64>) -> bool) {
        let start = Instant::now();
        loop {
            let gauges = self.gauges();
            if condition(&gauges) {
                return;
            }
            assert!(start.elapsed() < DEADLINE, "never: {what}\n{gauges:#?}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Stops with SIGTERM, and says how `serve` ended.
    pub fn stop(&mut self) -> std::process::ExitStatus {
        let child = self.serve.take().expect("running");
        signal(child.id(), rustix::process::Signal::TERM);
        finish(child).status
    }

    /// Kills the data plane, does `meanwhile`, and waits until `serve` has started it again.
    pub fn restart_dataplane(&mut self, meanwhile: impl FnOnce(&Self)) {
        let serve = self.serve.as_ref().expect("running").id();
        signal(self.dataplane_pid, rustix::process::Signal::KILL);
        meanwhile(self);
        let start = Instant::now();
        loop {
            let now = self.child_of(serve, "holdfast-datapl");
            if now != self.dataplane_pid {
                self.dataplane_pid = now;
                return;
            }
            assert!(start.elapsed() < DEADLINE, "the data plane is not started again:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Runs `holdfast ARGS`: its exit code, standard output and standard error.
    pub fn ends(&self, args: &[&str]) -> (i32, String, String) {
        let output =
            finish(self.holdfast(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
    }

    fn child_of(&self, parent: u32, name: &str) -> u32 {
        let start = Instant::now();
        loop {
            for entry in std::fs::read_dir("/proc").unwrap().flatten() {
                let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else {
                    continue;
                };
                let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
                // pid (comm) state ppid ...
                let Some((head, tail)) = stat.rsplit_once(") ") else { continue };
                let ppid = tail.split(' ').nth(1).and_then(|p| p.parse::<u32>().ok());
                if ppid == Some(parent) && head.ends_with(&format!("({name}")) {
                    return pid;
                }
            }
            assert!(start.elapsed() < DEADLINE, "no child '{name}' of serve:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Deployment {
    fn drop(&mut self) {
        if let Some(child) = self.serve.take() {
            signal(child.id(), rustix::process::Signal::TERM);
            let output = finish(child);
            if std::thread::panicking() {
                eprintln!("serve ended with {}; its log:\n{}", output.status, self.log());
            }
        }
    }
}

/// Sends a signal to a process that this test started.
pub fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    let _ = rustix::process::kill_process(pid, signal);
}

/// Waits for a child, killing it at the deadline.
pub fn finish(child: Child) -> Output {
    let pid = child.id();
    let (done, over) = std::sync::mpsc::channel::<()>();
    let guard = std::thread::spawn(move || {
        if over.recv_timeout(DEADLINE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            signal(pid, rustix::process::Signal::KILL);
        }
    });
    let output = child.wait_with_output().unwrap();
    let _ = done.send(());
    guard.join().unwrap();
    output
}

/// A line of a configuration file; uncommented if it is a setting.
fn setting(line: &str) -> &str {
    match line.strip_prefix('#') {
        Some(rest) if rest.starts_with(|c: char| c.is_ascii_lowercase()) && rest.contains(" = ") => rest,
        _ => line,
    }
}

fn run(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Bytes that differ everywhere and are the same in each run.
pub fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
