//! `holdfast bench` with the real binaries: what it measures is read and written, checked, and gone afterwards.

use crate::common::{Deployment, transports};

fn json(server: &Deployment, words: &[&str]) -> serde_json::Value {
    serde_json::from_str(
        &server.ok(&[&["bench", "--json", "--runtime", "1", "--size", "2m"], words].concat()),
    )
    .unwrap()
}

#[test]
fn each_pattern_is_measured_and_checked_and_the_file_is_gone_afterwards() {
    let server = Deployment::start();
    for kind in transports() {
        for (rw, checked) in [("read", 1), ("write", 512), ("randread", 1), ("randwrite", 512)] {
            let before = server.gauges();
            let (way, channels) =
                (["data:/b", "--transport", kind], ["--channels", if rw == "write" { "3" } else { "1" }]);
            let what = ["--rw", rw, "--verify", "--jobs", "2", "--depth", "4"];
            let told = json(&server, &[&way[..], &channels, &what].concat());
            assert_eq!((told["transport"].as_str(), told["rw"].as_str()), (Some(kind), Some(rw)));
            assert_eq!(told["channels"].to_string(), channels[1]);
            let binds =
                server.gauges()["dataplane.requests_bind_total"] - before["dataplane.requests_bind_total"];
            assert!(binds >= 2 * told["channels"].as_u64().unwrap(), "{binds} binds");
            let operations = told["operations"].as_u64().unwrap();
            assert!(
                operations > 0 && told["blocks_verified"].as_u64().unwrap() >= checked.min(operations),
                "{told}"
            );
            let moved = |name: &str| server.gauges()[name] - before[name];
            let bytes = moved(if rw.ends_with("read") {
                "dataplane.bytes_read_total"
            } else {
                "dataplane.bytes_written_total"
            });
            assert!(bytes >= operations * 4096, "{kind} {rw}: {operations} operations moved {bytes} bytes");
            assert!(!server.volume().join("b").exists(), "{kind} {rw}");
        }
    }
}

#[test]
fn what_was_there_is_not_destroyed_and_damage_is_seen() {
    let server = Deployment::start();
    let path = server.volume().join("kept");
    json(&server, &["data:/kept", "--rw", "randwrite", "--keep", "--verify"]);
    let told = json(&server, &["data:/kept", "--verify"]);
    assert_eq!(told["operations"], told["blocks_verified"]);
    let before = std::fs::read(&path).unwrap();
    let refused = server.fails(&["bench", "data:/kept", "--rw", "write"]);
    assert!(refused.contains("--overwrite"), "{refused}");
    assert_eq!(std::fs::read(&path).unwrap(), before);
    let mut damaged = before;
    for block in damaged.chunks_mut(4096) {
        block[2000] ^= 1;
    }
    std::fs::write(&path, &damaged).unwrap();
    let found = server.fails(&["bench", "data:/kept", "--verify", "--runtime", "1"]);
    assert!(found.contains("torn"), "{found}");
}
