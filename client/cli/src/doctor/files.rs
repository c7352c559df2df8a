//! How the server reads and writes files: what its volumes ask for, and what its data plane has for that.

use crate::output::{line, shown};
use serde_json::Value;

/// One line for each volume. `gauges`: both planes'.
pub(super) fn print(volumes: &Value, gauges: &Value) -> anyhow::Result<()> {
    for volume in volumes["volumes"].as_array().into_iter().flatten() {
        let text = |name: &str| shown(volume[name].as_str().unwrap_or_default());
        line(format_args!("files     {} ({}): {}", text("name"), text("file_system"), said(volume, gauges)))?;
    }
    Ok(())
}

fn said(volume: &Value, gauges: &Value) -> String {
    let direct = volume["direct"].as_str().unwrap_or_default();
    match (volume["file_io"].as_str(), direct) {
        (Some("direct"), "impossible") => {
            "through the page cache: direct I/O is asked for, and this file system has none that can be relied on".to_owned()
        }
        (Some("direct"), direct) => {
            let dataplane = &gauges["dataplane"];
            let count = |name: &str| dataplane[name].as_u64();
            let how = match (count("file_rings"), count("reads_direct_total"), count("file_rings_registered")) {
                (Some(0), ..) => "reads by storage threads: no io_uring",
                (Some(_), Some(0), _) => "reads by io_uring; none yet",
                (Some(_), Some(_), Some(0)) => {
                    "reads by io_uring, into buffers that could not be registered (memlock limit)"
                }
                (Some(_), ..) => "reads by io_uring into registered buffers",
                _ => "the data plane is away",
            };
            let blocks = match volume["direct_blocks"].as_u64() {
                Some(blocks) => format!(" in blocks of {blocks} bytes"),
                None if direct == "untried" => " where the file system has it".to_owned(),
                None => String::new(),
            };
            format!("direct I/O{blocks}, {how}; what is not aligned goes through the page cache")
        }
        _ => "through the page cache".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_asked_for_and_what_is_had_are_told_apart() {
        let volume = |io: &str, direct: &str, blocks: Option<u32>| json!({ "file_io": io, "direct": direct, "direct_blocks": blocks });
        let gauges = |rings: u32, reads: u32, registered: u32| json!({ "dataplane": { "file_rings": rings, "reads_direct_total": reads, "file_rings_registered": registered } });
        for (volume, gauges, words) in [
            (volume("cached", "impossible", None), gauges(1, 0, 0), "through the page cache"),
            (
                volume("direct", "possible", Some(512)),
                gauges(1, 9, 1),
                "blocks of 512 bytes, reads by io_uring into registered",
            ),
            (volume("direct", "possible", None), gauges(1, 0, 0), "direct I/O, reads by io_uring; none yet"),
            (volume("direct", "possible", None), gauges(1, 9, 0), "could not be registered"),
            (volume("direct", "untried", None), gauges(0, 9, 0), "by storage threads"),
            (volume("direct", "possible", None), json!({ "dataplane": null }), "away"),
            (volume("direct", "impossible", None), gauges(1, 0, 0), "has none"),
        ] {
            let said = said(&volume, &gauges);
            assert!(said.contains(words), "{said}");
        }
    }
}
