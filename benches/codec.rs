//! What the frames of one request cost in CPU: building, taking apart, MAC, payload protection.

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use holdfast_shared::auth::{DirectionKeys, FrameKey, MacPolicy, PayloadKey, Secret};
use holdfast_shared::types::RegionDescriptor;
use holdfast_shared::wire::data::{Frame, Io, Opcode, Reply, Writer};
use std::hint::black_box;
use std::time::Duration;

fn keys() -> DirectionKeys {
    DirectionKeys { frame: Secret::new([1; 32]), payload: Secret::new([2; 32]) }
}

fn read_request(buffer: &mut [u8], key: &FrameKey, sequence: u64) -> usize {
    let region = RegionDescriptor::new(0x7f00_0000_0000, 0x1234, 4096);
    let io = Io { offset: 4096.into(), length: 4096.into(), reserved: 0.into(), region };
    let mut w = Writer::new(buffer, Opcode::Read, 0, 1, 7, sequence).expect("room");
    w.body(&io).expect("body");
    w.finish(|covered, mac| key.sign(covered, mac))
}

fn codec(c: &mut Criterion) {
    let mut group = c.benchmark_group("codec");
    for policy in [MacPolicy::None, MacPolicy::Header] {
        let key = FrameKey::new(&keys(), policy);
        let mut buffer = [0u8; 4608];
        group.bench_function(format!("read request, build, {policy:?}"), |b| {
            b.iter(|| read_request(black_box(&mut buffer), &key, 9));
        });
        let length = read_request(&mut buffer, &key, 9);
        group.bench_function(format!("read request, parse and verify, {policy:?}"), |b| {
            b.iter(|| {
                let frame = Frame::parse(black_box(&buffer[..length])).expect("form");
                assert!(key.verify(&frame));
            });
        });
    }
    let key = FrameKey::new(&keys(), MacPolicy::Header);
    let mut buffer = [0u8; 4608];
    group.bench_function("reply, build, Header", |b| {
        b.iter(|| {
            let mut w = Writer::new(black_box(&mut buffer), Opcode::Reply, 0, 1, 7, 9).expect("room");
            w.body(&Reply { status: 0.into(), credits: 1.into(), count: 4096.into(), verifier: 5.into() })
                .expect("body");
            w.finish(|covered, mac| key.sign(covered, mac))
        });
    });
    group.finish();

    let mut group = c.benchmark_group("codec/payload");
    for size in [4096usize, 262_144] {
        group.throughput(Throughput::Bytes(size as u64));
        for policy in [MacPolicy::Payload, MacPolicy::Sealed] {
            let key = PayloadKey::new(&keys(), policy);
            group.bench_function(format!("protect {size}, {policy:?}"), |b| {
                b.iter_batched_ref(|| vec![7u8; size], |bytes| key.protect(3, bytes), BatchSize::LargeInput);
            });
        }
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    targets = codec
}
criterion_main!(benches);
