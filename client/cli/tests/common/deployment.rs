//! A real server in a directory of its own, made by `holdfast init` and run by `holdfast serve`.

use super::{DEADLINE, finish, program, rdma_address, signal};
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// What a deployment is made with.
#[derive(Default)]
pub struct Wish {
    /// Replaces `mac_policy = "header"`.
    pub mac_policy: Option<&'static str>,
    /// Settings of dataplane.toml's `[limits]`.
    pub dataplane: &'static str,
    /// Settings that `init` has written into control.toml or dataplane.toml, and their values instead.
    pub settings: &'static [(&'static str, &'static str)],
    /// More principals, and their access to the volume; see [`Deployment::config_of`].
    pub principals: &'static [(&'static str, &'static str)],
    /// Uncomment every setting that `init` has written as a comment.
    pub uncomment: bool,
    /// Where `serve` is started from [default: beside the program under test].
    pub programs: Option<PathBuf>,
    /// Close the reading end of `serve`'s standard output once it is ready.
    pub deaf: bool,
    /// Let each start take any free ports; else a plane comes back where it was.
    pub any_port: bool,
}

/// A running server in a directory of its own. Dropping it stops both planes and removes the directory.
pub struct Deployment {
    dir: tempfile::TempDir,
    serve: Option<Child>,
    /// Process id of control.
    pub control_pid: u32,
    /// Process id of dataplane.
    pub dataplane_pid: u32,
    port: u16,
    ready: Arc<ReadyLines>,
    /// Ready lines of each plane that have been waited for.
    seen: [usize; 2],
}

/// The planes' ready lines as they come.
#[derive(Default)]
struct ReadyLines {
    lines: Mutex<Vec<serde_json::Value>>,
    news: Condvar,
}

impl ReadyLines {
    fn add(&self, line: serde_json::Value) {
        self.lines.lock().unwrap().push(line);
        self.news.notify_all();
    }

    /// Waits until `plane` has said so often that it is ready.
    fn wait(&self, plane: &str, times: usize) -> bool {
        let lines = self.lines.lock().unwrap();
        let few =
            |lines: &mut Vec<serde_json::Value>| lines.iter().filter(|l| l["ready"] == plane).count() < times;
        !self.news.wait_timeout_while(lines, DEADLINE, few).unwrap().1.timed_out()
    }
}

/// The planes, as indices of what is kept for each.
const PLANES: [&str; 2] = ["control", "dataplane"];

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
        let port = if wish.any_port { 0 } else { free_ports(&address) };
        run(Command::new(program("holdfast"))
            .args(["init", "--port", &port.to_string(), "--address", &address, "--dir"])
            .arg(&home));
        let edit = |file: &str, change: &dyn Fn(String) -> String| {
            let path = home.join(file);
            let text = std::fs::read_to_string(&path).unwrap();
            std::fs::write(&path, change(text)).unwrap();
        };
        for (principal, access) in wish.principals {
            run(Command::new(program("holdfast"))
                .args(["cert", "--principal", principal, "--dir"])
                .arg(&home));
            // The volume is the file's last table.
            let grant = format!("\n[[volume.grant]]\nprincipal = \"{principal}\"\naccess = \"{access}\"\n");
            edit("control.toml", &|text| text + &grant);
        }
        // The limits are the file's last table.
        edit("dataplane.toml", &|text| text + wish.dataplane);
        if wish.uncomment {
            for file in ["control.toml", "dataplane.toml", "client.toml"] {
                edit(file, &|text| text.lines().map(|l| setting(l).to_owned() + "\n").collect());
            }
        }
        for (name, value) in wish.settings {
            let named = |line: &str| {
                line.trim_start_matches('#').strip_prefix(name).is_some_and(|l| l.starts_with(" = "))
            };
            let found = std::cell::Cell::new(false);
            for file in ["control.toml", "dataplane.toml"] {
                edit(file, &|text| {
                    let set = |line: &str| {
                        if named(line) {
                            found.set(true);
                            return format!("{name} = {value}\n");
                        }
                        line.to_owned() + "\n"
                    };
                    text.lines().map(set).collect()
                });
            }
            assert!(found.get(), "init does not write {name}");
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
        let ready = Arc::new(ReadyLines::default());
        let mut deployment = Self {
            dir,
            serve: Some(serve),
            control_pid: 0,
            dataplane_pid: 0,
            port,
            ready: Arc::clone(&ready),
            seen: [1, 1],
        };
        let mut listen = None;
        for line in lines.by_ref() {
            let line = line.unwrap();
            let value: serde_json::Value =
                serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line}: {e}"));
            if value["ready"] == "control" {
                listen = value["listen"][0].as_str().map(str::to_owned);
            }
            let all = value["ready"] == "holdfast";
            ready.add(value);
            if all {
                break;
            }
        }
        if wish.deaf {
            drop(lines);
        } else {
            // serve goes on printing: each plane that was started again says when it is ready.
            std::thread::spawn(move || {
                lines
                    .map_while(Result::ok)
                    .filter_map(|l| serde_json::from_str(&l).ok())
                    .for_each(|l| ready.add(l))
            });
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

    /// Control's port; the data plane's is the next one.
    pub fn port(&self) -> u16 {
        assert!(self.port != 0, "any port");
        self.port
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

    /// The configuration of one of the other principals.
    pub fn config_of(&self, principal: &str) -> holdfast_client::Config {
        let mut config = holdfast_client::Config::load(&self.config()).unwrap();
        let pki = self.home().join("pki");
        config.tls.certificate = pki.join(format!("{principal}.pem"));
        config.tls.key = pki.join(format!("{principal}.key"));
        config
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

    /// Ids of the opens that `holdfast opens FILTER...` lists.
    pub fn ids(&self, filter: &[&str]) -> Vec<String> {
        let opens = self.ok(&[&["opens", "--json"], filter].concat());
        let opens: Vec<serde_json::Value> = serde_json::from_str(&opens).unwrap();
        opens.iter().map(|open| open["open"].as_str().unwrap().to_owned()).collect()
    }

    /// Stops with SIGTERM, and says how `serve` ended.
    pub fn stop(&mut self) -> std::process::ExitStatus {
        let child = self.serve.take().expect("running");
        signal(child.id(), rustix::process::Signal::TERM);
        finish(child).status
    }

    /// Kills planes at once with SIGKILL: `[true, false]` is control alone. `serve` starts them again; see
    /// [`Deployment::await_planes`].
    pub fn kill(&mut self, planes: [bool; 2]) {
        for (plane, killed) in planes.into_iter().enumerate() {
            if killed {
                signal(self.pid(plane), rustix::process::Signal::KILL);
                self.seen[plane] += 1;
            }
        }
    }

    /// Kills control alone.
    pub fn kill_control(&mut self) {
        self.kill([true, false]);
    }

    /// Kills the data plane alone.
    pub fn kill_dataplane(&mut self) {
        self.kill([false, true]);
    }

    /// Kills both planes.
    pub fn kill_both(&mut self) {
        self.kill([true, true]);
    }

    /// Stops `serve`: a plane that is killed now stays away until [`Deployment::thaw_serve`].
    pub fn freeze_serve(&self) {
        super::freeze(self.serve.as_ref().expect("running").id());
    }

    /// Lets `serve` go on.
    pub fn thaw_serve(&self) {
        super::thaw(self.serve.as_ref().expect("running").id());
    }

    /// Waits until every plane that was killed is ready again.
    pub fn await_planes(&mut self) {
        for (plane, name) in PLANES.into_iter().enumerate() {
            assert!(self.ready.wait(name, self.seen[plane]), "{name} is not ready again:\n{}", self.log());
        }
        self.find_planes();
    }

    /// Kills the data plane, does `meanwhile`, and waits until `serve` has started it again.
    pub fn restart_dataplane(&mut self, meanwhile: impl FnOnce(&Self)) {
        self.kill_dataplane();
        meanwhile(self);
        self.find_planes();
    }

    fn pid(&self, plane: usize) -> u32 {
        [self.control_pid, self.dataplane_pid][plane]
    }

    /// Looks up the process ids of planes that were started again; waits for those that were killed.
    fn find_planes(&mut self) {
        let serve = self.serve.as_ref().expect("running").id();
        let alive = |pid: u32| {
            std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
                !stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(['Z', 'X']))
            })
        };
        for plane in 0..PLANES.len() {
            let start = Instant::now();
            while !alive(self.pid(plane)) {
                let now = self.child_of(serve, ["holdfast-contro", "holdfast-datapl"][plane]);
                *[&mut self.control_pid, &mut self.dataplane_pid][plane] = now;
                assert!(
                    start.elapsed() < DEADLINE,
                    "{} is not started again:\n{}",
                    PLANES[plane],
                    self.log()
                );
                std::thread::sleep(Duration::from_millis(5));
            }
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
            super::thaw(child.id());
            signal(child.id(), rustix::process::Signal::TERM);
            let output = finish(child);
            if std::thread::panicking() {
                eprintln!("serve ended with {}; its log:\n{}", output.status, self.log());
            }
        }
    }
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

/// Two neighbouring ports that are free at the moment, below those which the system gives to outgoing connections.
fn free_ports(address: &str) -> u16 {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let first = std::process::id().wrapping_mul(37);
    for _ in 0..1000 {
        let step = NEXT.fetch_add(2, std::sync::atomic::Ordering::Relaxed);
        let port = u16::try_from(10_000 + first.wrapping_add(step) % 11_000 * 2).unwrap();
        let free = |port| std::net::TcpListener::bind((address, port)).is_ok();
        if free(port) && free(port + 1) {
            return port;
        }
    }
    panic!("no free ports on {address}");
}
