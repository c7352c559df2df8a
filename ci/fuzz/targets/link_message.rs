//! Link messages, both directions, and the service blob inside.
#![no_main]

use holdfast_shared::types::LINK_PACKET_BYTES_MAX;
use holdfast_shared::wire::link::{ToControl, ToDataplane};
use holdfast_shared::wire::service::ServiceBlob;
use holdfast_shared::wire::{from_cbor, to_cbor};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(message) = from_cbor::<ToControl>(bytes, LINK_PACKET_BYTES_MAX) {
        assert_eq!(from_cbor::<ToControl>(&to_cbor(&message), usize::MAX).unwrap(), message);
    }
    if let Ok(message) = from_cbor::<ToDataplane>(bytes, LINK_PACKET_BYTES_MAX) {
        assert_eq!(from_cbor::<ToDataplane>(&to_cbor(&message), usize::MAX).unwrap(), message);
    }
    if let Ok(blob) = ServiceBlob::decode(bytes) {
        assert_eq!(ServiceBlob::decode(&to_cbor(&blob)).unwrap(), blob);
    }
});
