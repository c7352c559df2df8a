//! Data-plane frames: parsing never panics, and what is parsed accounts for every byte.
#![no_main]

use holdfast_shared::auth::{DirectionKeys, FrameKey, MacPolicy, Secret};
use holdfast_shared::wire::data::{Frame, TAG_BYTES};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(frame) = Frame::parse(bytes) else { return };
    assert_eq!(frame.covered.len() + TAG_BYTES + frame.payload.len(), bytes.len());
    let keys = DirectionKeys { frame: Secret::new([1; 32]), payload: Secret::new([2; 32]) };
    // A fuzzer cannot forge 128 bits.
    assert!(!FrameKey::new(&keys, MacPolicy::Header).verify(&frame));
});
