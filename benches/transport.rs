//! The transports alone, without frames or files: ping (a 64-byte message there and back) and bulk (1 MiB Places and
//! Fetches, eight in flight), over memory, tcp and verbs.
//!
//! Over tcp and verbs the peer is a process of its own: this program, started again with PEER set.

mod common;

use common::transport::{BULK_BYTES, Driver, peer_main, start_peer};
use criterion::{Criterion, Throughput, criterion_group};

const KINDS: [&str; 3] = ["mem", "tcp", "verbs"];

fn transport(c: &mut Criterion) {
    for kind in KINDS {
        let Some(mut peer) = start_peer(kind) else {
            eprintln!("transport/{kind}: skipped, no such device here");
            continue;
        };
        let mut group = c.benchmark_group(format!("transport/{kind}"));
        group.bench_function("ping", |b| b.iter_custom(|n| peer.ping(n)));
        group.throughput(Throughput::Bytes(BULK_BYTES as u64));
        group.sample_size(20);
        group.bench_function("bulk place 1 MiB depth 8", |b| b.iter_custom(|n| peer.bulk(Driver::PLACE, n)));
        group.bench_function("bulk fetch 1 MiB depth 8", |b| b.iter_custom(|n| peer.bulk(Driver::FETCH, n)));
        group.finish();
    }
}

criterion_group!(benches, transport);

fn main() {
    if peer_main() {
        return;
    }
    benches();
    Criterion::default().configure_from_args().final_summary();
}
