//! `local [--rounds N] [--ms M] [--dir D]`: reads on the server's own host beside the same reads of the same file opened
//! directly, 4 KiB and 1 MiB, one after the other, from the page cache.
//!
//! ```text
//!   direct       pread of the file, opened here                    into the same region
//!   descriptor   Binding::read_at, through the open's descriptor   (local_descriptors = true, open for reading)
//!   socket       Binding::read_at, over the local channel: shared memory, and a socket for who sleeps (open for reading and writing)
//! ```
//!
//! The three take turns, `--rounds` times (default 15) for `--ms` each (default 200), each going on in the file. Told are the medians,
//! and the median of the rounds' ratios to `direct` of the same round. `--dir` says where the file lies (default: a tmpfs, where
//! the client too makes that very system call; on a disk's file system it is `preadv2` with `RWF_NOWAIT`).
//!
//!     cargo build --release --workspace --bins && cargo run --release -p holdfast-benches --example local

mod common;

use common::deploy::{FILE_BYTES, Server};
use holdfast_client::{Binding, Config, OpenOptions, Place, Region, Session, Transport};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

struct Arguments {
    rounds: usize,
    time: Duration,
    dir: Option<PathBuf>,
}

fn arguments() -> Arguments {
    let mut told = Arguments { rounds: 15, time: Duration::from_millis(200), dir: None };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words.next().unwrap_or_else(|| panic!("{word} needs a value"));
        let number = || value.parse().unwrap_or_else(|_| panic!("{word}: {value} is no number"));
        match word.as_str() {
            "--rounds" => told.rounds = usize::try_from(number()).expect("a small number"),
            "--ms" => told.time = Duration::from_millis(number()),
            "--dir" => told.dir = Some(value.into()),
            _ => panic!("unknown option {word}"),
        }
    }
    told
}

/// Offsets that follow each other through the file.
struct Offsets {
    next: usize,
    size: usize,
}

impl Offsets {
    fn take(&mut self) -> u64 {
        let at = self.next % (FILE_BYTES / self.size) * self.size;
        self.next += 1;
        at as u64
    }
}

/// Reads for that long, and says how many nanoseconds one read took. Looks at the clock every 64 reads.
macro_rules! timed {
    ($time:expr, $offsets:expr, $at:ident => $read:expr) => {{
        let (begun, mut count) = (Instant::now(), 0u32);
        while begun.elapsed() < $time {
            for _ in 0..64 {
                let $at = $offsets.take();
                assert_eq!($read, $offsets.size, "a short read");
                count += 1;
            }
        }
        begun.elapsed().as_secs_f64() * 1e9 / f64::from(count)
    }};
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

async fn bound(config: &Config, options: &OpenOptions) -> Binding {
    let session = Session::connect(config).await.expect("a session");
    let place = Place { volume: "data".into(), path: "bench".into() };
    let open = session.open(&place, options).await.expect("an open");
    let channel = open.connect(Transport::Local).await.expect("a channel");
    open.bind(&channel).await.expect("a binding")
}

fn main() {
    let arguments = arguments();
    let trusting =
        |control: String| control.replace("#local_descriptors = false", "local_descriptors = true");
    let server = match &arguments.dir {
        Some(dir) => Server::with(dir, &trusting),
        None => Server::with(&common::deploy::parent(), &trusting),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let config = Config::load(&server.config()).expect("client.toml");
    let file = std::fs::File::open(server.config().with_file_name("data").join("bench")).expect("the file");
    runtime.block_on(async {
        let descriptor = bound(&config, &OpenOptions::read()).await;
        let socket = bound(&config, &OpenOptions::read_write()).await;
        // Only now: made before, it could not be given to the server.
        let region = Region::allocate(1 << 20).expect("memory");
        let warmed = descriptor.read_at(&region, 0..4096, 0).await.expect("a read");
        assert_eq!(warmed, 4096);
        for (label, size) in [("4 KiB", 4096), ("1 MiB", 1 << 20)] {
            let mut all: [Vec<f64>; 3] = Default::default();
            for round in 0..arguments.rounds {
                let mut offsets = Offsets { next: round * 1000, size };
                // Another order in each round: whoever comes first has the coldest caches.
                for turn in 0..3 {
                    let time = arguments.time;
                    let who = (round + turn) % 3;
                    let took = match who {
                        0 => timed!(time, offsets, at => {
                            region.read_file(file.as_fd(), at, 0..size).expect("a read")
                        }),
                        1 => timed!(time, offsets, at => {
                            descriptor.read_at(&region, 0..size, at).await.expect("a read")
                        }),
                        _ => timed!(time, offsets, at => {
                            socket.read_at(&region, 0..size, at).await.expect("a read")
                        }),
                    };
                    all[who].push(took);
                }
            }
            let [direct, through, over] = &all;
            let ratio = |of: &[f64]| median(direct.iter().zip(of).map(|(direct, it)| direct / it).collect());
            println!(
                "read {label}: direct {:.0} ns; descriptor {:.0} ns, ratio {:.3}; socket {:.0} ns, ratio {:.3}",
                median(direct.clone()),
                median(through.clone()),
                ratio(through),
                median(over.clone()),
                ratio(over),
            );
        }
    });
}
