//! The transports alone, without frames or files: ping (a 64-byte message there and back) and bulk (1 MiB Places and
//! Fetches, eight in flight), over memory, tcp and verbs.
//!
//! Over tcp and verbs the peer is a process of its own: this program, started again with HOLDFAST_BENCH_PEER set.

mod common;

use common::transport::{BULK_BYTES, Driver, peer_main, start_peer};
use criterion::{Criterion, Throughput};

const KINDS: [&str; 3] = ["mem", "tcp", "verbs"];

fn transport(c: &mut Criterion, kind: &str) {
    let Some(mut peer) = start_peer(kind) else {
        return common::skipped("transport/verbs");
    };
    let mut group = c.benchmark_group(format!("transport/{kind}"));
    group.bench_function("ping", |b| b.iter_custom(|n| peer.ping(n)));
    group.throughput(Throughput::Bytes(BULK_BYTES as u64));
    group.bench_function("place 1 MiB depth 8", |b| b.iter_custom(|n| peer.bulk(Driver::PLACE, n)));
    group.bench_function("fetch 1 MiB depth 8", |b| b.iter_custom(|n| peer.bulk(Driver::FETCH, n)));
    group.finish();
}

fn main() {
    if peer_main() {
        return;
    }
    let mut criterion = common::short();
    KINDS.iter().for_each(|kind| transport(&mut criterion, kind));
    criterion.final_summary();
}
