//! `recovery [--count N] [--files N] [--descriptors N] [--dir D]`: a crash with N journalled opens (default 1,000,000), and
//! how long the next start takes until it lets the first client in.
//!
//! The journal is written by the code that ships, a record for each open, as a server leaves it that was killed; then the real
//! `holdfast-control` is started on it. Each open has a file of its own unless `--files` says fewer. `--descriptors` is
//! `limits.reopened_files`: opens beyond it are looked at, and kept by handle. Not measured: the page cache is warm, as
//! after a crash of the process; after one of the machine every file's inode comes from the disk first.
//!
//!     cargo build --release --bins && cargo run --release -p holdfast-benches --example recovery -- --count 100000

use holdfast_control::journal::FileDisk;
use holdfast_control::secrets::StateDir;
use holdfast_control::volume::Volume;
use holdfast_shared::auth::{Keyring, MacPolicy, Secret, SessionKey};
use holdfast_shared::journal::record::{OpenRecord, Record, Started};
use holdfast_shared::journal::{Options, WriteError, recover};
use holdfast_shared::state::FileOpened;
use holdfast_shared::types::{
    Access, CreateId, Disposition, HoldClass, OpenId, ProcessId, ShareMode, VolumeId, VolumePath,
};
use holdfast_shared::wire::control::{Open, Place};
use holdfast_shared::wire::to_cbor;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

const VOLUME: VolumeId = VolumeId([7; 16]);
const WALL_MS: u64 = 1_700_000_000_000;

struct Arguments {
    count: u64,
    files: u64,
    descriptors: u64,
    dir: PathBuf,
}

fn arguments() -> Arguments {
    let mut told = Arguments { count: 1_000_000, files: u64::MAX, descriptors: 0, dir: std::env::temp_dir() };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words.next().unwrap_or_else(|| panic!("{word} needs a value"));
        let number = || value.parse().unwrap_or_else(|_| panic!("{word}: {value} is no number"));
        match word.as_str() {
            "--count" => told.count = number(),
            "--files" => told.files = number(),
            "--descriptors" => told.descriptors = number(),
            "--dir" => told.dir = value.into(),
            _ => panic!("unknown option {word}"),
        }
    }
    told.files = told.files.clamp(1, told.count.max(1));
    told
}

fn main() {
    let told = arguments();
    let dir = tempfile::tempdir_in(&told.dir).expect("a directory");
    let begin = Instant::now();
    let bytes = prepare(dir.path(), &told);
    println!("{:<34} {:.1} s", "prepared in", begin.elapsed().as_secs_f64());
    println!("{:<34} {:.1}", "journal, bytes a record", bytes as f64 / told.count as f64);
    println!("{:<34} {:.1}", "journal, MiB", bytes as f64 / f64::from(1 << 20));

    let begin = Instant::now();
    let mut control = start(dir.path());
    let mut line = String::new();
    let out = control.stdout.take().expect("its output");
    BufReader::new(out).read_line(&mut line).expect("the ready line");
    let took = begin.elapsed();
    let busy = processor_seconds(control.id());
    let ready: serde_json::Value = serde_json::from_str(&line).expect("control is ready");
    assert_eq!(ready["recovered"], told.count, "{ready}");
    let address = ready["listen"][0].as_str().expect("an address");
    std::net::TcpStream::connect(address).expect("it accepts");
    println!("{:<34} {:.2} s", "start to first accept", took.as_secs_f64());
    println!("{:<34} {:.2} s", "processor time until then", busy);
    println!("{:<34} {:.1}", "an open, microseconds", took.as_secs_f64() * 1e6 / told.count as f64);
    let resident = memory(control.id(), "VmRSS");
    println!("{:<34} {:.0}", "memory, MiB", resident as f64 / 1024.0);
    println!("{:<34} {:.0}", "memory at most, MiB", memory(control.id(), "VmHWM") as f64 / 1024.0);
    println!("{:<34} {:.0}", "memory, bytes an open", resident as f64 * 1024.0 / told.count as f64);
    let descriptors =
        std::fs::read_dir(format!("/proc/{}/fd", control.id())).expect("its descriptors").count();
    println!("{:<34} {descriptors}", "descriptors");
    let _ = control.kill();
    let _ = control.wait();
}

fn start(dir: &Path) -> Child {
    let me = std::env::current_exe().expect("own path");
    let program = me.parent().and_then(Path::parent).expect("two directories above").join("holdfast-control");
    assert!(program.exists(), "{} is not built: run `cargo build --release --bins` first", program.display());
    let mut command = Command::new(program);
    command.arg("--config").arg(dir.join("control.toml")).stdout(Stdio::piped());
    command.env("HOLDFAST_LOG", std::env::var("HOLDFAST_LOG").unwrap_or_else(|_| "warn".into()));
    command.spawn().expect("control starts")
}

/// What all threads of a process have used, in user mode and in the kernel.
fn processor_seconds(process: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).expect("its times");
    let (_, behind) = stat.rsplit_once(')').expect("its name in parentheses");
    let ticks = behind.split_whitespace().skip(11).take(2);
    // Linux tells all programs of a hundred ticks a second.
    ticks.map(|ticks| ticks.parse::<f64>().expect("a number")).sum::<f64>() / 100.0
}

/// A line of the process's status, KiB.
fn memory(process: u32, name: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).expect("its status");
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok()).expect("a number")
}

/// Files, config and journal. Bytes of the journal.
fn prepare(dir: &Path, told: &Arguments) -> u64 {
    let data = dir.join("data");
    std::fs::create_dir(&data).expect("data");
    certificates(dir);
    let config = format!(
        "listen = ['127.0.0.1:0']\nstate_dir = 'state'\n[limits]\nopens = {}\nopens_per_principal = {}\n\
         reopened_files = {}\n[[volume]]\nname = 'data'\ndirectory = 'data'\nid = '{VOLUME}'\n\
         [[volume.grant]]\nprincipal = 'bench'\naccess = 'read-write'\n",
        told.count.max(1) + 1,
        told.count.max(1) + 1,
        told.descriptors
    );
    std::fs::write(dir.join("control.toml"), config).expect("the config");

    let state = StateDir::open(&dir.join("state")).expect("the state directory");
    state.write("generation", b"1 1\n").expect("the generation");
    let keyring = state.keyring().expect("keys");
    let volume = Volume::open(&data).expect("the volume");
    let disk = FileDisk::open(&dir.join("state/journal"), false).expect("the journal");
    let empty = recover(disk, keyring.cluster(), &mut |_| Ok(())).expect("an empty journal");
    let options = Options { step_bytes: 64 << 20, ..Options::default() };
    let mut journal = empty.start(1, options).expect("a journal");
    let mut append = |sequence: u64, record: &Record| {
        let payload = to_cbor(record);
        loop {
            match journal.append(sequence, &payload) {
                Err(WriteError::CommitFirst) => drop(journal.commit().expect("room on the disk")),
                done => return done.expect("a record"),
            }
        }
    };
    append(1, &Record::Started(Started { generation: 1, wall_ms: WALL_MS }));
    let mut file = None;
    let each = told.count.div_ceil(told.files);
    for n in 0..told.count {
        let path = format!("d{:03}/file{:07}", n / each / 4096, n / each);
        if n % each == 0 {
            if n / each % 4096 == 0 {
                std::fs::create_dir(data.join(format!("d{:03}", n / each / 4096))).expect("a directory");
            }
            let at = VolumePath::parse(&path).expect("a path");
            let access = Access::READ | Access::WRITE;
            file = volume.open_file(&at, access, Disposition::CreateNew, 0o644, false).ok();
        }
        let (opened, _) = file.as_ref().expect("a file");
        append(n + 2, &Record::Opened(Box::new(open(n, path, opened, &keyring))));
    }
    let _ = append;
    journal.commit().expect("room on the disk");
    journal.live_bytes()
}

fn open(n: u64, path: String, file: &FileOpened, keyring: &Keyring) -> OpenRecord {
    // Ids are random in life; here they are spread as well.
    let spread = u128::from(n).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835);
    let open = OpenId(spread.to_be_bytes());
    let secret = SessionKey::new(Secret::new([3; 32])).bind_secret(open);
    let mut nonce = [0; 12];
    nonce[..8].copy_from_slice(&n.to_le_bytes());
    OpenRecord {
        open,
        principal: "bench".into(),
        process: ProcessId(7),
        request: Open {
            create_id: CreateId((!spread).to_be_bytes()),
            place: Place { volume: "data".into(), path },
            access: Access::READ | Access::WRITE,
            share: ShareMode::ALL,
            disposition: Disposition::OpenOrCreate,
            mode: 0o644,
            hold_ms: None,
            class: HoldClass::Hold,
            wait_ms: None,
            delete_on_close: false,
            process: None,
        },
        volume: VOLUME,
        policy: MacPolicy::Header,
        identity: file.identity,
        file_handle: file.file_handle.clone(),
        created: true,
        opened_ms: WALL_MS,
        challenge: [9; 32],
        sealed_secret: keyring.seal_secret(open, &secret, nonce),
        epoch: 1,
        hold_ms: 60_000,
        class: HoldClass::Hold,
        evidence: file.evidence,
        detached: false,
        baseline: false,
        marked: false,
        kept: Vec::new(),
        unheard: false,
        truncating: false,
        lock_mode: None,
        remove: None,
        lapsed: false,
        locks: Vec::new(),
        sequences: Vec::new(),
    }
}

/// Whatever `holdfast init` makes: control does not start without, and nobody connects.
fn certificates(dir: &Path) {
    let me = std::env::current_exe().expect("own path");
    let program = me.parent().and_then(Path::parent).expect("two directories above").join("holdfast");
    let home = dir.join("home");
    let mut init = Command::new(program);
    init.args(["init", "--port", "0", "--dir"]).arg(&home).stdout(Stdio::null());
    assert!(init.status().expect("holdfast init").success(), "holdfast init failed");
    std::fs::rename(home.join("pki"), dir.join("pki")).expect("the certificates");
}
