//! `opens [--seconds S] [--rounds N] [--dir D]`: opens per second through a real control, each answered only when it is
//! durable, with 1 client and with 64; beside the same without fsync (`journal.sync = false`).
//!
//! Each client has a session of its own and opens and closes one file for reading, one after the other: two records of the
//! journal. With one client each of them waits for a sync of its own; with many, one sync is for all that came meanwhile. The
//! four kinds take turns in each round; told is the median of the rounds, and the times one open (without its close) took.
//! `--dir` says on which file system the journal lies (default: the directory for temporary files).
//!
//!     cargo build --release --bins && cargo run --release -p holdfast-benches --example opens

mod common;

use common::deploy::Server;
use holdfast_client::{Config, OpenOptions, Place, Session};
use std::path::PathBuf;
use std::time::{Duration, Instant};

struct Arguments {
    seconds: u64,
    rounds: usize,
    dir: PathBuf,
}

fn arguments() -> Arguments {
    let mut told = Arguments { seconds: 5, rounds: 3, dir: std::env::temp_dir() };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words.next().unwrap_or_else(|| panic!("{word} needs a value"));
        let number = || value.parse().unwrap_or_else(|_| panic!("{word}: {value} is no number"));
        match word.as_str() {
            "--seconds" => told.seconds = number(),
            "--rounds" => told.rounds = usize::try_from(number()).expect("a small number"),
            "--dir" => told.dir = value.into(),
            _ => panic!("unknown option {word}"),
        }
    }
    told
}

/// Opens and closes until the time is over; how long each open took.
async fn client(session: Session, until: Instant) -> Vec<Duration> {
    let place = Place { volume: "data".into(), path: "bench".into() };
    let mut took = Vec::new();
    while Instant::now() < until {
        let begin = Instant::now();
        let open = session.open(&place, &OpenOptions::read()).await.expect("an open");
        took.push(begin.elapsed());
        open.close().await.expect("a close");
    }
    took
}

fn run(server: &Server, clients: usize, seconds: u64) -> (f64, Vec<Duration>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let config = Config::load(&server.config()).expect("client.toml");
    runtime.block_on(async {
        // One after the other: the server bounds how many of one address may be at its door at once.
        let mut sessions = Vec::new();
        for _ in 0..clients {
            sessions.push(Session::connect(&config).await.expect("a session"));
        }
        let begin = Instant::now();
        let until = begin + Duration::from_secs(seconds);
        let tasks: Vec<_> =
            sessions.into_iter().map(|session| tokio::spawn(client(session, until))).collect();
        let mut took = Vec::new();
        for task in tasks {
            took.extend(task.await.expect("a client"));
        }
        (took.len() as f64 / begin.elapsed().as_secs_f64(), took)
    })
}

fn main() {
    let told = arguments();
    let start = |sync: bool| {
        Server::with(&told.dir, &|control| {
            let text: Vec<&str> = control.lines().filter(|line| !line.starts_with("[journal]")).collect();
            format!("{}\n\n[journal]\nsync = {sync}\n", text.join("\n"))
        })
    };
    let servers = [("durable", start(true)), ("no fsync", start(false))];
    let mut results: Vec<(&str, usize, Vec<f64>, Vec<Duration>)> = Vec::new();
    for _ in 0..told.rounds {
        for clients in [1, 64] {
            for (name, server) in &servers {
                let (rate, took) = run(server, clients, told.seconds);
                match results.iter_mut().find(|(n, c, ..)| n == name && *c == clients) {
                    Some((_, _, rates, all)) => {
                        rates.push(rate);
                        all.extend(took);
                    }
                    None => results.push((name, clients, vec![rate], took)),
                }
            }
        }
    }
    println!("{:<10} {:>8} {:>14} {:>12} {:>12}", "journal", "clients", "opens/s", "open p50", "open p99");
    for (name, clients, rates, took) in &mut results {
        rates.sort_by(f64::total_cmp);
        took.sort_unstable();
        let at = |percent: usize| took.get(took.len() * percent / 100).copied().unwrap_or_default();
        let rate = rates.get(rates.len() / 2).copied().unwrap_or_default();
        println!("{name:<10} {clients:>8} {rate:>14.0} {:>9.2?} {:>9.2?}", at(50), at(99));
    }
}
