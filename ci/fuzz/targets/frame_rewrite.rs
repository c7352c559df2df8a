//! Data-plane frames: a parsed frame that is written again gives the same bytes.
#![no_main]

use holdfast_shared::wire::data::{Body, Frame, Writer};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(frame) = Frame::parse(bytes) else { return };
    let h = frame.header;
    let mut out = [0u8; 8192];
    let Ok(mut w) =
        Writer::new(&mut out, frame.opcode, h.flags.get(), h.binding.get(), h.request.get(), h.sequence.get())
    else {
        return;
    };
    let written = match frame.body {
        Body::Bind(b) => w.body(b).is_ok(),
        Body::Unbind | Body::Descriptor => true,
        Body::Read(b) | Body::Write(b) => w.body(b).is_ok(),
        Body::Flush(b) => w.body(b).is_ok(),
        Body::Hello(b) => w.body(b).is_ok(),
        Body::BindReply(b) => w.body(b).is_ok(),
        Body::Reply(b) => w.body(b).is_ok(),
        Body::Notice(b) => w.body(b).is_ok(),
        Body::Map(b) => w.body(b).is_ok(),
        Body::Unmap(b) => w.body(b).is_ok(),
        Body::Mapped(b) => w.body(b).is_ok(),
    };
    assert!(written);
    if let Some(digest) = frame.digest {
        w.digest(digest).unwrap();
    }
    w.payload(frame.payload.len()).unwrap().copy_from_slice(frame.payload);
    let mac = *frame.mac;
    let length = w.finish(|_, out| *out = mac);
    assert_eq!(&out[..length], bytes);
});
