//! A volume of direct I/O, with real processes: what was acknowledged is there after a kill, copies are the same, and the doctor
//! tells how the files are read.

use crate::common::{Deployment, Wish, pattern, transport_of, transports};
use holdfast_client::{Config, OpenOptions, Place, Region, Session};

fn direct() -> Deployment {
    Deployment::with(&Wish { settings: &[("file_io", "\"direct\"")], ..Wish::default() })
}

#[test]
fn the_doctor_tells_how_files_are_read() {
    for (settings, words) in [
        (&[][..], "through the page cache"),
        (&[("file_io", "\"direct\"")][..], "direct I/O"),
        (&[("file_io", "\"direct\""), ("io_uring", "false")][..], "direct I/O"),
    ] {
        let server = Deployment::with(&Wish { settings, ..Wish::default() });
        let home = server.home();
        let told = server.ok(&["doctor", "--dir", home.to_str().unwrap()]);
        let line = told.lines().find(|line| line.starts_with("files")).expect("a line on files");
        assert!(line.contains("data (") && line.contains(words), "{line}");
        let by_threads = settings.iter().any(|(name, _)| *name == "io_uring");
        if by_threads && !line.contains("has none") {
            assert!(line.contains("by storage threads"), "{line}");
        }
        let json: serde_json::Value =
            serde_json::from_str(&server.ok(&["doctor", "--json", "--dir", home.to_str().unwrap()])).unwrap();
        let volume = &json["volumes"][0];
        assert_eq!(volume["name"], "data");
        assert_eq!(volume["file_io"], if settings.is_empty() { "cached" } else { "direct" });
    }
}

fn allows_io_uring(server: &Deployment) -> bool {
    server.gauges()["dataplane.file_rings"] > 0
}

/// Acknowledged and flushed bytes survive the death of the process that wrote them past the page cache.
#[test]
fn what_was_flushed_is_there_after_a_kill() {
    for kind in transports() {
        let mut server = direct();
        let content = pattern(3, 3 << 20);
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let session = Session::connect(&Config::load(&server.config()).unwrap()).await.unwrap();
            let place = Place { volume: "data".into(), path: "f".into() };
            let open = session.open(&place, &OpenOptions::create_new(0o644)).await.unwrap();
            let binding = open.bind(&open.connect(transport_of(kind)).await.unwrap()).await.unwrap();
            let region = Region::allocate(content.len()).unwrap();
            region.copy_in(0, &content).unwrap();
            // Long and aligned; small, inline and aligned; neither.
            binding.write_all(&region, 0..2 << 20, 0).await.unwrap();
            for at in (2 << 20..3 << 20).step_by(256 << 10) {
                binding.write_all(&region, at..at + 4096, at as u64).await.unwrap();
                binding.write_all(&region, at + 4096..at + (256 << 10), at as u64 + 4096).await.unwrap();
            }
            binding.flush().await.unwrap();
            assert!(server.gauges()["dataplane.writes_direct_total"] > 4 || !is_possible(&server));
            server.kill_dataplane();
            region.copy_in(0, &vec![0; content.len()]).unwrap();
            assert_eq!(binding.read_at(&region, 0..content.len(), 0).await.unwrap(), content.len());
            let mut bytes = vec![0; content.len()];
            region.copy_out(0, &mut bytes).unwrap();
            assert!(bytes == content, "{kind}");
            // Read by its successor, past the page cache as well.
            assert!(
                server.gauges()["dataplane.reads_direct_total"] > 0
                    || !allows_io_uring(&server)
                    || !is_possible(&server)
            );
            session.close().await;
        });
        assert!(std::fs::read(server.volume().join("f")).unwrap() == content);
    }
}

fn is_possible(server: &Deployment) -> bool {
    let told = server.ok(&["doctor", "--dir", server.home().to_str().unwrap()]);
    !told.contains("has none")
}

#[test]
fn copies_in_and_out_are_the_same() {
    let server = direct();
    let (here, back) = (server.scratch("here"), server.scratch("back"));
    for length in [0, 1, 511, 4096, 5_000_000, 8 << 20] {
        std::fs::write(&here, pattern(9, length)).unwrap();
        server.ok(&["cp", here.to_str().unwrap(), "data:/copy"]);
        server.ok(&["cp", "data:/copy", back.to_str().unwrap()]);
        assert!(std::fs::read(&back).unwrap() == pattern(9, length), "{length}");
        server.ok(&["rm", "data:/copy"]);
        std::fs::remove_file(&back).unwrap();
    }
}
