//! A large file through little memory: everything the library has registered is counted, so this is the only test of its
//! program. `ci/stream` does the same with 24 GiB.

#![allow(clippy::unwrap_used)] // helpers of tests stand outside of #[test] functions

mod common;

use common::{Deployment, finish, pattern, rdma_address, transport_of};
use holdfast_client::stream::{Memory, Reader, Writer};
use holdfast_client::{Config, OpenOptions, Place, Region, Session};
use std::os::unix::fs::FileExt;
use std::process::Stdio;

const MEMORY: Memory = Memory { depth: 16, chunk: 1 << 20 };
const LENGTH: u64 = 2 << 30;
/// What is not zero, and where: at the ends, and across chunks.
const MARKS: [u64; 4] = [0, (1 << 20) - 7, (1 << 30) + 5, LENGTH - 16];

#[test]
fn a_large_file_streams_through_little_memory() {
    let server = Deployment::start();
    let path = server.volume().join("large");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(LENGTH).unwrap();
    for (nth, mark) in MARKS.into_iter().enumerate() {
        file.write_all_at(&pattern(nth as u64 + 1, 16), mark).unwrap();
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let transport = transport_of(if rdma_address().is_some() { "verbs" } else { "tcp" });
    runtime.block_on(async {
        let session = Session::connect(&Config::load(&server.config()).unwrap()).await.unwrap();
        let place = |path: &str| Place { volume: "data".into(), path: path.into() };
        let open = session.open(&place("large"), &OpenOptions::read()).await.unwrap();
        let stripes = open.stripes(transport, 3).await.unwrap();
        let mut reader = Reader::new(&stripes, MEMORY).unwrap();
        let (mut length, mut marks) = (0, Vec::new());
        let (mut bytes, zeros) = (vec![1; MEMORY.chunk], vec![0; MEMORY.chunk]);
        while let Some(chunk) = reader.next_chunk().await.unwrap() {
            let bytes = &mut bytes[..chunk.len()];
            chunk.copy_out(0, bytes).unwrap();
            if bytes != &zeros[..bytes.len()] {
                marks.extend(
                    bytes.iter().zip(length..).filter(|(byte, _)| **byte != 0).map(|(b, at)| (at, *b)),
                );
            }
            length += chunk.len() as u64;
        }
        assert_eq!(length, LENGTH);
        let expected = MARKS
            .into_iter()
            .zip(1..)
            .flat_map(|(mark, nth)| (mark..).zip(pattern(nth, 16)).filter(|(_, byte)| *byte != 0));
        assert_eq!(marks, expected.collect::<Vec<_>>());
        drop(reader);
        let most = Region::memory().bytes_max;
        assert!(most <= MEMORY.bytes() as u64, "{most} bytes were registered");
        assert!(most > MEMORY.bytes() as u64 / 2, "it did not read ahead: {most} bytes");
        stripes.unbind().await.unwrap();
        drop(stripes);
        // The other way, with what is left: all of it goes back before.
        let since = std::time::Instant::now();
        while Region::memory().bytes > 0 {
            // A task that was cut off lets go of its chunk a moment later.
            assert!(since.elapsed() < common::DEADLINE, "{} bytes are left", Region::memory().bytes);
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        let open = session.open(&place("copy"), &OpenOptions::create_new(0o644)).await.unwrap();
        let stripes = open.stripes(transport, 2).await.unwrap();
        let mut writer = Writer::new(&stripes, 0, MEMORY).unwrap();
        let part = pattern(9, 3_000_001);
        for _ in 0..64 {
            writer.write(&part).await.unwrap();
        }
        writer.shutdown().await.unwrap();
        let most = Region::memory().bytes_max;
        assert!(most <= MEMORY.bytes() as u64, "{most} bytes were registered");
        let copy = std::fs::File::open(server.volume().join("copy")).unwrap();
        assert_eq!(copy.metadata().unwrap().len(), 64 * part.len() as u64);
        let mut last = vec![0; part.len()];
        copy.read_exact_at(&mut last, 63 * part.len() as u64).unwrap();
        assert!(last == part);
    });
    // The command says how much it had.
    let cat = server
        .holdfast(&["cat", "--depth", "4", "--channels", "2", "data:/copy"])
        .env("HOLDFAST_LOG", "info")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let output = finish(cat);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && said.contains(&format!("region_bytes_max={}", 4 << 20)), "{said}");
}
