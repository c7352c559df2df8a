//! The real binary in a temporary directory, a TLS client, and a dataplane that is only the link's other end.

#![allow(dead_code, unreachable_pub, missing_docs, clippy::unwrap_used)]

pub mod client;
pub mod dataplane;

use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A certificate authority for one test.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub pem: String,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "test authority");
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// (certificate, key) in PEM for a name.
    pub fn issue(&self, name: &str, usage: ExtendedKeyUsagePurpose) -> (String, String) {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.extended_key_usages.push(usage);
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }

    pub fn client(&self, name: &str) -> (String, String) {
        self.issue(name, ExtendedKeyUsagePurpose::ClientAuth)
    }
}

/// A running server.
pub struct Server {
    pub dir: tempfile::TempDir,
    pub ca: Authority,
    pub address: SocketAddr,
    child: Child,
}

impl Server {
    pub fn start() -> Self {
        Self::with_limits("")
    }

    /// Volumes: `data` (writer: read-write, reader: read) and `other` (writer only).
    pub fn with_limits(limits: &str) -> Self {
        Self::in_directory(tempfile::tempdir().unwrap(), limits)
    }

    /// The same, everything in a directory that is there.
    pub fn in_directory(dir: tempfile::TempDir, limits: &str) -> Self {
        let ca = Authority::new();
        let (certificate, key) = ca.issue("localhost", ExtendedKeyUsagePurpose::ServerAuth);
        let path = |name: &str| dir.path().join(name);
        std::fs::create_dir_all(path("pki")).unwrap();
        std::fs::create_dir_all(path("data")).unwrap();
        std::fs::create_dir_all(path("other")).unwrap();
        std::fs::write(path("pki/ca.pem"), &ca.pem).unwrap();
        std::fs::write(path("pki/server.pem"), certificate).unwrap();
        std::fs::write(path("pki/server.key"), key).unwrap();
        let config = format!(
            "listen = ['127.0.0.1:0']\nstate_dir = 'state'\n[limits]\n{limits}\n\
             [[volume]]\nname = 'data'\ndirectory = 'data'\n\
             [[volume.grant]]\nprincipal = 'writer'\naccess = 'read-write'\n\
             [[volume.grant]]\nprincipal = 'reader'\naccess = 'read'\n\
             [[volume]]\nname = 'other'\ndirectory = 'other'\n\
             [[volume.grant]]\nprincipal = 'writer'\naccess = 'read-write'\n"
        );
        std::fs::write(path("control.toml"), config).unwrap();
        let (child, address) = spawn(&path("control.toml"));
        Self { dir, ca, address, child }
    }

    /// From its next start on it listens where it does now.
    pub fn stays_at_its_port(&self) {
        let file = self.dir.path().join("control.toml");
        let config = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, config.replace("127.0.0.1:0", &self.address.to_string())).unwrap();
    }

    pub fn state(&self, name: &str) -> PathBuf {
        self.dir.path().join("state").join(name)
    }

    /// The journal's files, in order.
    pub fn journal(&self) -> Vec<PathBuf> {
        let files = std::fs::read_dir(self.state("journal")).unwrap();
        let mut files: Vec<_> = files.map(|file| file.unwrap().path()).collect();
        files.retain(|file| file.extension().is_some_and(|extension| extension == "log"));
        files.sort();
        files
    }

    pub fn data(&self, name: &str) -> PathBuf {
        self.dir.path().join("data").join(name)
    }

    pub fn link(&self) -> PathBuf {
        self.dir.path().join("state/link.sock")
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn admin(&self, question: &str) -> Value {
        let mut stream = UnixStream::connect(self.dir.path().join("state/admin.sock")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.write_all(format!("{question}\n").as_bytes()).unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    pub fn gauge(&self, name: &str) -> u64 {
        self.admin(r#"{"get":"control"}"#)[name].as_u64().unwrap_or(0)
    }

    /// Waits until a gauge has a value.
    pub fn await_gauge(&self, name: &str, value: u64) {
        let end = Instant::now() + Duration::from_secs(10);
        while self.gauge(name) != value {
            assert!(Instant::now() < end, "{name} is {} and not {value}", self.gauge(name));
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Nothing is left of all the clients.
    pub fn is_at_baseline(&self) {
        for gauge in [
            "sessions",
            "opens",
            "bindings",
            "fences",
            "operations",
            "claimed_files",
            "open_files",
            "half_open_handshakes",
            "connections",
        ] {
            self.await_gauge(gauge, 0);
        }
    }

    /// Ends it with a signal; its exit code.
    pub fn terminate(&mut self) -> Option<i32> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.child.wait().unwrap().code()
    }

    /// Kills it and starts another on the same directory.
    pub fn restart(&mut self) {
        self.kill();
        self.start_again();
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Starts one where the last was, and waits until it is ready.
    pub fn start_again(&mut self) -> Value {
        self.begin(&[]).ready(self)
    }

    /// Starts one where the last was.
    pub fn begin(&self, arguments: &[&str]) -> Starting {
        let mut command = command(&self.dir.path().join("control.toml"));
        Starting(command.args(arguments).stderr(Stdio::piped()).spawn().unwrap())
    }

    /// Starts one that must refuse to: what it says.
    pub fn refuses_to_start(&self) -> String {
        let output = self.begin(&[]).0.wait_with_output().unwrap();
        let words = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{words}");
        assert!(output.stdout.is_empty());
        words
    }
}

/// A server that is not ready yet.
pub struct Starting(pub Child);

impl Starting {
    /// Waits until it is ready; its ready line.
    pub fn ready(mut self, server: &mut Server) -> Value {
        // Somebody must read what it says, or it waits for ever.
        let mut errors = self.0.stderr.take().unwrap();
        std::thread::spawn(move || std::io::copy(&mut errors, &mut std::io::stderr()));
        let ready = ready(&mut self.0);
        server.address = ready["listen"][0].as_str().unwrap().parse().unwrap();
        server.child = self.0;
        ready
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn command(config: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_holdfast-control"));
    command.arg("--config").arg(config).env_remove("NOTIFY_SOCKET").stdout(Stdio::piped());
    command
}

fn spawn(config: &Path) -> (Child, SocketAddr) {
    let mut child = command(config).spawn().unwrap();
    let ready = ready(&mut child);
    (child, ready["listen"][0].as_str().unwrap().parse().unwrap())
}

pub fn ready(child: &mut Child) -> Value {
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let ready: Value = serde_json::from_str(&line).expect("the ready line");
    assert_eq!(ready["ready"], "control");
    ready
}
