//! Long reads over tcp, which the server sends straight from the mapped file, with real processes: the file may be cut short under
//! them, and the server killed.

use crate::common::{Deployment, pattern};
use holdfast_client::{Config, OpenOptions, Place, Region, Session, Transport};
use std::os::unix::fs::FileExt;

const LENGTH: usize = 4 << 20;
const KEPT: usize = 1 << 20;
const VIEWED: &str = "dataplane.pieces_viewed_total";

async fn bound(server: &Deployment) -> holdfast_client::Binding {
    let session = Session::connect(&Config::load(&server.config()).unwrap()).await.unwrap();
    let place = Place { volume: "data".into(), path: "f".into() };
    let open = session.open(&place, &OpenOptions::read()).await.unwrap();
    open.bind(&open.connect(Transport::Tcp).await.unwrap()).await.unwrap()
}

/// True if the file system is one that a mapping is right for: overlays and the like are read the usual way.
fn is_known(server: &Deployment) -> bool {
    let kind = rustix::fs::statfs(server.volume()).unwrap().f_type;
    [0x0102_1994, 0xef53, 0x5846_5342].contains(&kind)
}

fn bytes(region: &Region, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    region.copy_out(0, &mut bytes).unwrap();
    bytes
}

#[test]
fn a_reader_sees_no_more_of_a_file_that_is_cut_and_grown_beside_it_than_the_file_has() {
    let server = Deployment::start();
    let path = server.volume().join("f");
    std::fs::write(&path, vec![b'a'; LENGTH]).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let binding = bound(&server).await;
        let region = Region::allocate(LENGTH).unwrap();
        assert_eq!(binding.read_at(&region, 0..LENGTH, 0).await.unwrap(), LENGTH);
        assert!(bytes(&region, LENGTH).iter().all(|byte| *byte == b'a'));
        assert_eq!(server.gauges()[VIEWED] > 0, is_known(&server));
        let cutter = std::thread::spawn(move || {
            let file = std::fs::File::options().write(true).open(&path).unwrap();
            for _ in 0..300 {
                file.set_len(KEPT as u64).unwrap();
                file.write_all_at(&[b'a'; LENGTH - KEPT], KEPT as u64).unwrap();
            }
        });
        let mut readers = tokio::task::JoinSet::new();
        let cutter = std::sync::Arc::new(cutter);
        for _ in 0..4 {
            let (binding, cutter) = (binding.clone(), std::sync::Arc::clone(&cutter));
            readers.spawn(async move {
                let region = Region::allocate(LENGTH).unwrap();
                loop {
                    let last = cutter.is_finished();
                    let count = binding.read_at(&region, 0..LENGTH, 0).await.unwrap();
                    assert!((KEPT..=LENGTH).contains(&count), "{count} bytes");
                    let bytes = bytes(&region, count);
                    assert!(bytes[..KEPT].iter().all(|byte| *byte == b'a'));
                    // What is being cut off the kernel may have cleared already.
                    assert!(bytes[KEPT..].iter().all(|byte| *byte == b'a' || *byte == 0));
                    if last {
                        assert_eq!(count, LENGTH);
                        return;
                    }
                }
            });
        }
        readers.join_all().await;
    });
}

#[test]
fn what_is_read_across_a_kill_is_the_file() {
    let mut server = Deployment::start();
    let content = pattern(5, LENGTH);
    std::fs::write(server.volume().join("f"), &content).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let binding = bound(&server).await;
        let region = Region::allocate(LENGTH).unwrap();
        for _ in 0..3 {
            assert_eq!(binding.read_at(&region, 0..LENGTH, 0).await.unwrap(), LENGTH);
            assert!(bytes(&region, LENGTH) == content);
            let again = binding.clone();
            let reading = tokio::spawn(async move {
                let region = Region::allocate(LENGTH).unwrap();
                let count = again.read_at(&region, 0..LENGTH, 0).await.unwrap();
                bytes(&region, count)
            });
            server.kill_dataplane();
            assert!(reading.await.unwrap() == content);
        }
        assert_eq!(server.gauges()[VIEWED] > 0, is_known(&server));
    });
}
