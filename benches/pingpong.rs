//! The yardstick of `endtoend/tcp`: plain sockets between two processes on loopback, a 100-byte request there and so many
//! bytes back, one after the other. Prints microseconds per round trip.
//!
//! ```text
//! cargo run --release -p holdfast-benches --example pingpong -- 4096 2 [--epoll]
//!                                                               bytes seconds
//! ```
//!
//! Blocking sockets need one wake-up and no poll. With `--epoll` both sides sleep as Holdfast does: in `epoll_wait`, and
//! then read from a socket that does not block.

use rustix::event::epoll;
use std::io::{BufRead, BufReader, ErrorKind, Read, Result, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// About as long as a read request.
const REQUEST: usize = 100;
const ANSWERER: &str = "HOLDFAST_BENCH_PEER";

/// A socket, and how it is waited for.
struct End {
    stream: TcpStream,
    epoll: Option<OwnedFd>,
}

impl End {
    fn new(stream: TcpStream, polled: bool) -> Result<Self> {
        stream.set_nodelay(true)?;
        let mut epoll = None;
        if polled {
            stream.set_nonblocking(true)?;
            let fd = epoll::create(epoll::CreateFlags::CLOEXEC)?;
            let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
            epoll::add(&fd, &stream, epoll::EventData::new_u64(0), flags)?;
            epoll = Some(fd);
        }
        Ok(Self { stream, epoll })
    }

    /// Fills `into`. Polled it sleeps first: an answer is never there yet.
    fn receive(&mut self, into: &mut [u8]) -> Result<()> {
        let Some(epoll) = &self.epoll else { return self.stream.read_exact(into) };
        let (mut filled, mut events) = (0, Vec::with_capacity(1));
        while filled < into.len() {
            events.clear();
            epoll::wait(epoll, rustix::buffer::spare_capacity(&mut events), None)?;
            // Edges: all that is there must be read, or more must come.
            while filled < into.len() {
                match self.stream.read(&mut into[filled..]) {
                    Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                    Ok(count) => filled += count,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    /// Sends all of it; a few KiB always fit.
    fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes)
    }
}

fn answer(bytes: usize, polled: bool) -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("{}", listener.local_addr()?);
    let mut end = End::new(listener.accept()?.0, polled)?;
    let (mut request, answer) = ([0; REQUEST], vec![1; bytes]);
    while end.receive(&mut request).is_ok() {
        end.send(&answer)?;
    }
    Ok(())
}

fn main() -> Result<()> {
    let polled = std::env::args().any(|argument| argument == "--epoll");
    let numbers: Vec<u64> = std::env::args().skip(1).filter_map(|text| text.parse().ok()).collect();
    let bytes = usize::try_from(numbers.first().copied().unwrap_or(4096)).unwrap_or(4096);
    if std::env::var_os(ANSWERER).is_some() {
        return answer(bytes, polled);
    }
    let seconds = Duration::from_secs(numbers.get(1).copied().unwrap_or(2));
    let mut peer = Command::new(std::env::current_exe()?)
        .arg(bytes.to_string())
        .args(polled.then_some("--epoll"))
        .env(ANSWERER, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut address = String::new();
    if let Some(output) = peer.stdout.take() {
        BufReader::new(output).read_line(&mut address)?;
    }
    let mut end = End::new(TcpStream::connect(address.trim())?, polled)?;
    let mut answer = vec![0; bytes];
    let (mut rounds, begun) = (0u32, Instant::now());
    while begun.elapsed() < seconds {
        for _ in 0..100 {
            end.send(&[2; REQUEST])?;
            end.receive(&mut answer)?;
        }
        rounds += 100;
    }
    println!("{:.2}", begun.elapsed().as_secs_f64() * 1e6 / f64::from(rounds));
    drop(end);
    peer.wait()?;
    Ok(())
}
