//! The tcp transport's frame headers: what is accepted encodes to the same bytes again. The module itself is compiled in: the
//! crate round it needs the RDMA libraries, which have no business in a fuzzer.
#![no_main]

#[path = "../../../dataplane/transport/src/stream/framing.rs"]
#[allow(dead_code, unreachable_pub)]
mod framing;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    for header in bytes.as_chunks::<{ framing::HEADER_BYTES }>().0 {
        if let Ok(frame) = framing::Frame::decode(header) {
            assert_eq!(&frame.encode(), header);
        }
    }
});
