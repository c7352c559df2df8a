//! The yardstick of `endtoend/tcp`: plain blocking sockets between two processes on loopback, a 100-byte request there and
//! so many bytes back, one after the other. Prints microseconds per round trip.
//!
//! ```text
//! cargo run --release -p holdfast-benches --example pingpong -- 4096 2
//!                                                               bytes seconds
//! ```

use std::io::{BufRead, BufReader, Read, Result, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// About as long as a read request.
const REQUEST: usize = 100;
const ANSWERER: &str = "HOLDFAST_BENCH_PEER";

fn answer(bytes: usize) -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("{}", listener.local_addr()?);
    let mut stream = listener.accept()?.0;
    stream.set_nodelay(true)?;
    let (mut request, answer) = ([0; REQUEST], vec![1; bytes]);
    while stream.read_exact(&mut request).is_ok() {
        stream.write_all(&answer)?;
    }
    Ok(())
}

fn main() -> Result<()> {
    let numbers: Vec<u64> = std::env::args().skip(1).filter_map(|text| text.parse().ok()).collect();
    let bytes = usize::try_from(numbers.first().copied().unwrap_or(4096)).unwrap_or(4096);
    if std::env::var_os(ANSWERER).is_some() {
        return answer(bytes);
    }
    let seconds = Duration::from_secs(numbers.get(1).copied().unwrap_or(2));
    let mut peer = Command::new(std::env::current_exe()?)
        .arg(bytes.to_string())
        .env(ANSWERER, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut address = String::new();
    if let Some(output) = peer.stdout.take() {
        BufReader::new(output).read_line(&mut address)?;
    }
    let mut stream = TcpStream::connect(address.trim())?;
    stream.set_nodelay(true)?;
    let mut answer = vec![0; bytes];
    let (mut rounds, begun) = (0u32, Instant::now());
    while begun.elapsed() < seconds {
        for _ in 0..100 {
            stream.write_all(&[2; REQUEST])?;
            stream.read_exact(&mut answer)?;
        }
        rounds += 100;
    }
    println!("{:.2}", begun.elapsed().as_secs_f64() * 1e6 / f64::from(rounds));
    drop(stream);
    peer.wait()?;
    Ok(())
}
