//! Control messages, both directions: decoding never panics; what decodes survives encode and decode.
#![no_main]

use holdfast_shared::wire::control::{CONTROL_MESSAGE_BYTES_MAX, ReplyMessage, RequestMessage};
use holdfast_shared::wire::{from_cbor, to_cbor};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(request) = from_cbor::<RequestMessage>(bytes, CONTROL_MESSAGE_BYTES_MAX) {
        assert_eq!(from_cbor::<RequestMessage>(&to_cbor(&request), usize::MAX).unwrap(), request);
    }
    if let Ok(reply) = from_cbor::<ReplyMessage>(bytes, CONTROL_MESSAGE_BYTES_MAX) {
        assert_eq!(from_cbor::<ReplyMessage>(&to_cbor(&reply), usize::MAX).unwrap(), reply);
    }
});
