//! Reads and writes through the client library against a real server: both planes are processes of their own. 4 KiB and
//! 1 MiB, one and eight requests in flight, over tcp, local and verbs. The file is in the page cache.
//!
//! Writes of 4 KiB travel inside their request; those of 1 MiB are fetched by the server. Over verbs the file is read one-sided
//! too, out of a mapping of all of it. There 1 MiB is also moved over and over between one piece of the file and one part of the
//! region, which is what perftest measures.

mod common;

use common::deploy::{Client, Server, Span, Way};
use criterion::{Criterion, Throughput};
use holdfast_client::Transport;

const SIZES: [(&str, usize); 2] = [("4 KiB", 4096), ("1 MiB", 1 << 20)];

fn endtoend(c: &mut Criterion, server: &Server, name: &str, transport: Transport) {
    let mut client = Client::connect(server, transport);
    let mut group = c.benchmark_group(format!("endtoend/{name}"));
    for way in [Way::Read, Way::Write] {
        for (label, size) in SIZES {
            group.throughput(Throughput::Bytes(size as u64));
            for depth in [1, 8] {
                let id = format!("{way} {label} depth {depth}");
                group.bench_function(id, |b| b.iter_custom(|n| client.run(way, Span::Whole, size, depth, n)));
            }
        }
        if transport == Transport::Verbs {
            let (label, size) = SIZES[1];
            let id = format!("{way} {label} depth 8, one buffer");
            group.throughput(Throughput::Bytes(size as u64));
            group.bench_function(id, |b| b.iter_custom(|n| client.run(way, Span::OnePiece, size, 8, n)));
        }
    }
    if transport == Transport::Verbs {
        let mapping = client.map();
        for (label, size) in SIZES {
            group.throughput(Throughput::Bytes(size as u64));
            for depth in [1, 8] {
                let id = format!("one-sided read {label} depth {depth}");
                group.bench_function(id, |b| {
                    b.iter_custom(|n| client.run_mapped(&mapping, Span::Whole, size, depth, n))
                });
            }
        }
        let (label, size) = SIZES[1];
        let id = format!("one-sided read {label} depth 8, one buffer");
        group.bench_function(id, |b| {
            b.iter_custom(|n| client.run_mapped(&mapping, Span::OnePiece, size, 8, n))
        });
    }
    group.finish();
}

fn main() {
    let mut criterion = common::short();
    let server = Server::start();
    endtoend(&mut criterion, &server, "tcp", Transport::Tcp);
    endtoend(&mut criterion, &server, "local", Transport::Local);
    if common::rdma_address().is_some() {
        endtoend(&mut criterion, &server, "verbs", Transport::Verbs);
    } else {
        common::skipped("endtoend/verbs");
    }
    criterion.final_summary();
}
