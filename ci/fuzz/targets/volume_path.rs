//! Paths: what parses is in normal form, stays so, and leads nowhere but down.
#![no_main]

use holdfast_shared::types::VolumePath;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(path) = VolumePath::parse(text) else { return };
    assert_eq!(VolumePath::parse(path.as_str()).unwrap(), path);
    assert!(path.is_root() || path.as_str().split('/').all(|n| !n.is_empty() && n != "." && n != ".."));
});
