//! Building frames and taking them apart.

use super::body::{Bind, BindReply, Flush, Hello, Io, Map, Mapped, Notice, Reply, Unmap};
use super::{Flags, Header, Opcode, TAG_BYTES, VERSION};
use crate::types::FRAME_BYTES_MAX;
use crate::wire::WireError;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// A fixed body, borrowed from the frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Body<'a> {
    /// See [`Bind`].
    Bind(&'a Bind),
    /// Close the handle.
    Unbind,
    /// See [`Io`].
    Read(&'a Io),
    /// See [`Io`].
    Write(&'a Io),
    /// See [`Flush`].
    Flush(&'a Flush),
    /// See [`Map`].
    Map(&'a Map),
    /// See [`Unmap`].
    Unmap(&'a Unmap),
    /// Give the open's descriptor.
    Descriptor,
    /// See [`Hello`].
    Hello(&'a Hello),
    /// See [`BindReply`].
    BindReply(&'a BindReply),
    /// See [`Reply`].
    Reply(&'a Reply),
    /// See [`Notice`].
    Notice(&'a Notice),
    /// See [`Mapped`].
    Mapped(&'a Mapped),
}

/// A frame whose form is right; whether its MAC is, [`crate::auth::FrameKey::verify`] says.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    /// The header.
    pub header: &'a Header,
    /// The opcode, parsed.
    pub opcode: Opcode,
    /// The fixed body.
    pub body: Body<'a>,
    /// The payload digest, if the frame carries one.
    pub digest: Option<&'a [u8; TAG_BYTES]>,
    /// The bytes the MAC covers: everything before it.
    pub covered: &'a [u8],
    /// The MAC.
    pub mac: &'a [u8; TAG_BYTES],
    /// The inline payload; empty if there is none.
    pub payload: &'a [u8],
}

fn split<T: FromBytes + Immutable + KnownLayout + Unaligned>(bytes: &[u8]) -> Result<(&T, &[u8]), WireError> {
    T::ref_from_prefix(bytes).map_err(|_| WireError::Short { wanted: size_of::<T>(), got: bytes.len() })
}

impl<'a> Frame<'a> {
    /// Takes a received message apart. Nothing is copied or allocated.
    ///
    /// # Errors
    /// The version is looked at before anything else; then length, opcode, flags and reserved bytes.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, WireError> {
        match bytes.first() {
            Some(&VERSION) => {}
            Some(&other) => return Err(WireError::Version(other)),
            None => return Err(WireError::Short { wanted: Header::SIZE, got: 0 }),
        }
        if bytes.len() > FRAME_BYTES_MAX {
            return Err(WireError::Long { max: FRAME_BYTES_MAX, got: bytes.len() });
        }
        let (header, rest) = split::<Header>(bytes)?;
        match usize::try_from(header.length.get()) {
            Ok(length) if length == bytes.len() => {}
            Ok(length) if length > bytes.len() => {
                return Err(WireError::Short { wanted: length, got: bytes.len() });
            }
            _ => return Err(WireError::Field("length")),
        }
        let opcode = Opcode::from_u8(header.opcode).ok_or(WireError::Opcode(header.opcode))?;
        let flags = header.flags.get();
        if flags & !Flags::KNOWN != 0 {
            return Err(WireError::Field("flags"));
        }
        let fixed = opcode.body_len() + if flags & Flags::DIGEST != 0 { TAG_BYTES } else { 0 };
        let wanted = Header::SIZE + fixed + TAG_BYTES;
        if bytes.len() < wanted {
            return Err(WireError::Short { wanted, got: bytes.len() });
        }
        let (body, rest) = rest.split_at(opcode.body_len());
        let (digest, rest) = if flags & Flags::DIGEST != 0 {
            let (digest, rest) = split::<[u8; TAG_BYTES]>(rest)?;
            (Some(digest), rest)
        } else {
            (None, rest)
        };
        let (mac, payload) = split::<[u8; TAG_BYTES]>(rest)?;
        if flags & Flags::INLINE == 0 && !payload.is_empty() {
            return Err(WireError::Field("length"));
        }
        Ok(Self {
            header,
            opcode,
            body: parse_body(opcode, body)?,
            digest,
            covered: &bytes[..Header::SIZE + fixed],
            mac,
            payload,
        })
    }
}

fn parse_body(opcode: Opcode, bytes: &[u8]) -> Result<Body<'_>, WireError> {
    let zero = |ok: bool| if ok { Ok(()) } else { Err(WireError::Field("reserved")) };
    Ok(match opcode {
        Opcode::Bind => {
            let (body, _) = split::<Bind>(bytes)?;
            zero(body.reserved == [0; 6])?;
            Body::Bind(body)
        }
        Opcode::Unbind => Body::Unbind,
        Opcode::Read | Opcode::Write => {
            let (body, _) = split::<Io>(bytes)?;
            zero(body.reserved.get() == 0)?;
            if opcode == Opcode::Read { Body::Read(body) } else { Body::Write(body) }
        }
        Opcode::Flush => {
            let (body, _) = split::<Flush>(bytes)?;
            zero(body.reserved.get() == 0)?;
            Body::Flush(body)
        }
        Opcode::Map => {
            let (body, _) = split::<Map>(bytes)?;
            zero(body.reserved == [0; 4])?;
            Body::Map(body)
        }
        Opcode::Unmap => {
            let (body, _) = split::<Unmap>(bytes)?;
            zero(body.reserved.get() == 0)?;
            Body::Unmap(body)
        }
        Opcode::Descriptor => Body::Descriptor,
        Opcode::Hello => Body::Hello(split::<Hello>(bytes)?.0),
        Opcode::BindReply => Body::BindReply(split::<BindReply>(bytes)?.0),
        Opcode::Reply => Body::Reply(split::<Reply>(bytes)?.0),
        Opcode::Notice => Body::Notice(split::<Notice>(bytes)?.0),
        Opcode::Mapped => Body::Mapped(split::<Mapped>(bytes)?.0),
    })
}

/// Builds one frame in a caller's buffer, front to back: header, body, digest, room for the MAC, payload.
///
/// ```
/// use holdfast_shared::wire::data::{Flush, Frame, Opcode, Writer};
/// let mut buffer = [0u8; 128];
/// let mut frame = Writer::new(&mut buffer, Opcode::Flush, 0, 7, 1, 42).unwrap();
/// frame.body(&Flush { reserved: 0.into() }).unwrap();
/// let length = frame.finish(|covered, mac| { /* MAC over `covered` into `mac` */ });
/// assert_eq!(Frame::parse(&buffer[..length]).unwrap().header.sequence.get(), 42);
/// ```
pub struct Writer<'a> {
    bytes: &'a mut [u8],
    opcode: Opcode,
    digest: bool,
    at: usize,
    payload: usize,
}

impl<'a> Writer<'a> {
    /// Begins a frame. The frame carries neither digest nor payload until those are given.
    ///
    /// # Errors
    /// [`WireError::Short`] if the buffer cannot hold the fixed part with a digest.
    pub fn new(
        bytes: &'a mut [u8],
        opcode: Opcode,
        flags: u16,
        binding: u32,
        request: u32,
        sequence: u64,
    ) -> Result<Self, WireError> {
        let wanted = Header::SIZE + opcode.body_len() + 2 * TAG_BYTES;
        if bytes.len() < wanted {
            return Err(WireError::Short { wanted, got: bytes.len() });
        }
        let header = Header {
            version: VERSION,
            opcode: opcode as u8,
            flags: flags.into(),
            length: 0.into(),
            binding: binding.into(),
            request: request.into(),
            sequence: sequence.into(),
        };
        bytes[..Header::SIZE].copy_from_slice(header.as_bytes());
        Ok(Self { bytes, opcode, digest: false, at: Header::SIZE, payload: 0 })
    }

    /// Writes the fixed body.
    ///
    /// # Errors
    /// [`WireError::Field`] if the body is not the opcode's.
    pub fn body<T: IntoBytes + Immutable>(&mut self, body: &T) -> Result<&mut Self, WireError> {
        let body = body.as_bytes();
        if body.len() != self.opcode.body_len() || self.at != Header::SIZE {
            return Err(WireError::Field("body"));
        }
        self.bytes[self.at..self.at + body.len()].copy_from_slice(body);
        self.at += body.len();
        Ok(self)
    }

    /// Adds the payload digest.
    ///
    /// # Errors
    /// [`WireError::Field`] if the body is not written yet, or a digest or payload already is.
    pub fn digest(&mut self, digest: &[u8; TAG_BYTES]) -> Result<&mut Self, WireError> {
        if self.at != Header::SIZE + self.opcode.body_len() || self.digest || self.payload > 0 {
            return Err(WireError::Field("digest"));
        }
        self.bytes[self.at..self.at + TAG_BYTES].copy_from_slice(digest);
        self.at += TAG_BYTES;
        self.digest = true;
        Ok(self)
    }

    /// Adds `length` bytes of inline payload, and gives the place to write them to. Last before `finish`.
    ///
    /// # Errors
    /// [`WireError::Long`] if the buffer or a frame cannot hold it.
    pub fn payload(&mut self, length: usize) -> Result<&mut [u8], WireError> {
        let start = self.at + TAG_BYTES;
        let max = self.bytes.len().min(FRAME_BYTES_MAX) - start;
        if length > max {
            return Err(WireError::Long { max, got: length });
        }
        self.payload = length;
        Ok(&mut self.bytes[start..start + length])
    }

    /// Completes flags and length, lets `mac` fill the MAC, and returns the frame's length in bytes.
    pub fn finish(self, mac: impl FnOnce(&[u8], &mut [u8; TAG_BYTES])) -> usize {
        let length = self.at + TAG_BYTES + self.payload;
        let mut added = 0;
        if self.digest {
            added |= Flags::DIGEST;
        }
        if self.payload > 0 {
            added |= Flags::INLINE;
        }
        if let Ok((header, _)) = Header::mut_from_prefix(self.bytes) {
            header.flags.set(header.flags.get() | added);
            header.length.set(u32::try_from(length).unwrap_or(u32::MAX));
        }
        let (covered, rest) = self.bytes.split_at_mut(self.at);
        let mut tag = [0; TAG_BYTES];
        mac(covered, &mut tag);
        rest[..TAG_BYTES].copy_from_slice(&tag);
        length
    }
}

#[cfg(test)]
mod tests {
    use super::super::LANE_END_BYTES;
    use super::*;
    use crate::types::RegionDescriptor;
    use proptest::prelude::*;

    fn write_frame(buffer: &mut [u8], payload: &[u8]) -> usize {
        let mut w = Writer::new(buffer, Opcode::Write, 0, 3, 9, 0x0102_0304_0506_0708).unwrap();
        let region = if payload.is_empty() {
            RegionDescriptor::new(0x1000, 0xbeef, 8192)
        } else {
            RegionDescriptor::NONE
        };
        let length = u32::try_from(payload.len()).unwrap();
        w.body(&Io { offset: 4096.into(), length: length.into(), reserved: 0.into(), region }).unwrap();
        w.payload(payload.len()).unwrap().copy_from_slice(payload);
        w.finish(|_, mac| *mac = [0xcc; 16])
    }

    /// Golden bytes: a change here is a new protocol version.
    #[test]
    fn layout_of_version_1() {
        let mut buffer = [0; 256];
        let n = write_frame(&mut buffer, b"");
        let mut wanted = vec![1, 4, 0, 0, 72, 0, 0, 0, 3, 0, 0, 0, 9, 0, 0, 0, 8, 7, 6, 5, 4, 3, 2, 1];
        wanted.extend([0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        wanted.extend([0, 16, 0, 0, 0, 0, 0, 0, 0xef, 0xbe, 0, 0, 0, 32, 0, 0]);
        wanted.extend([0xcc; 16]);
        assert_eq!(&buffer[..n], &wanted[..]);
        let sizes = [
            Opcode::Bind,
            Opcode::Read,
            Opcode::Flush,
            Opcode::Hello,
            Opcode::BindReply,
            Opcode::Reply,
            Opcode::Notice,
            Opcode::Map,
            Opcode::Unmap,
            Opcode::Mapped,
            Opcode::Descriptor,
        ]
        .map(Opcode::body_len);
        assert_eq!(sizes, [72, 32, 8, 80, 112, 16, 8, 40, 8, 32, 0]);
        assert_eq!(Opcode::Descriptor as u8, 8);
    }

    #[test]
    fn layout_of_mappings() {
        let mut buffer = [0; 256];
        let lane: [u8; LANE_END_BYTES] = std::array::from_fn(|n| 0xa0 + u8::try_from(n).unwrap());
        let mut w = Writer::new(&mut buffer, Opcode::Map, 0, 3, 9, 0).unwrap();
        w.body(&Map { offset: 0x1122.into(), length: 0x3344.into(), lane, reserved: [0; 4] }).unwrap();
        let n = w.finish(|_, _| ());
        let mut wanted = vec![0x22, 0x11, 0, 0, 0, 0, 0, 0, 0x44, 0x33, 0, 0, 0, 0, 0, 0];
        wanted.extend(lane);
        wanted.extend([0; 4]);
        assert_eq!(&buffer[24..n - TAG_BYTES], &wanted[..]);
        buffer[24 + 39] = 1;
        assert!(matches!(Frame::parse(&buffer[..n]), Err(WireError::Field("reserved"))));

        let mut w = Writer::new(&mut buffer, Opcode::Mapped, 0, 3, 9, 0).unwrap();
        w.body(&Mapped {
            credits: 1.into(),
            reserved: [0; 2],
            mapping: 5.into(),
            address: 0x7f00_0000_1000.into(),
            length: 0x10_0000.into(),
            rkey: 0xbeef.into(),
            reserved2: [0; 4],
        })
        .unwrap();
        let n = w.finish(|_, _| ());
        let wanted = [
            1, 0, 0, 0, 5, 0, 0, 0, 0, 0x10, 0, 0, 0, 0x7f, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0xef, 0xbe, 0,
            0, 0, 0, 0, 0,
        ];
        assert_eq!(&buffer[24..n - TAG_BYTES], &wanted[..]);
    }

    #[test]
    fn one_hash_block_covers_a_read() {
        assert!(
            Header::SIZE + Opcode::Read.body_len() <= 64,
            "the MAC of a request without digest is one BLAKE3 block"
        );
    }

    #[test]
    fn what_is_written_is_parsed() {
        let mut buffer = [0; 256];
        let n = write_frame(&mut buffer, b"hello");
        let frame = Frame::parse(&buffer[..n]).unwrap();
        assert_eq!((frame.opcode, frame.payload), (Opcode::Write, &b"hello"[..]));
        assert_eq!(frame.covered.len() + 16 + 5, n);
        assert_eq!(frame.mac, &[0xcc; 16]);
        let Body::Write(io) = frame.body else { panic!("{:?}", frame.body) };
        assert_eq!((io.offset.get(), io.length.get()), (4096, 5));
    }

    #[test]
    fn malformed_frames_are_refused() {
        let mut buffer = [0; 256];
        let n = write_frame(&mut buffer, b"hello");
        for cut in 0..n {
            assert!(Frame::parse(&buffer[..cut]).is_err(), "cut at {cut}");
        }
        let changed = |at: usize, to: u8| {
            let mut copy = buffer;
            copy[at] = to;
            Frame::parse(&copy[..n]).err()
        };
        assert!(matches!(changed(0, 0), Some(WireError::Version(0))));
        assert!(matches!(changed(0, 2), Some(WireError::Version(2))));
        assert!(matches!(changed(1, 0x7f), Some(WireError::Opcode(0x7f))));
        assert!(matches!(changed(3, 0x80), Some(WireError::Field("flags"))));
        assert!(matches!(changed(2, 0), Some(WireError::Field("length"))), "payload without INLINE");
        assert!(matches!(changed(24 + 12, 1), Some(WireError::Field("reserved"))));
        assert!(Frame::parse(&[1; FRAME_BYTES_MAX + 1]).is_err());
    }

    proptest! {
        #[test]
        fn parse_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Frame::parse(&bytes);
        }

        #[test]
        fn parse_never_panics_behind_a_good_header(op in 0u8..=255, flags in 0u16..8, tail in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut bytes = vec![VERSION, op];
            bytes.extend(flags.to_le_bytes());
            bytes.extend(u32::try_from(tail.len() + 24).unwrap().to_le_bytes());
            bytes.extend([0; 16]);
            bytes.extend(tail);
            if let Ok(frame) = Frame::parse(&bytes) {
                prop_assert_eq!(frame.covered.len() + TAG_BYTES + frame.payload.len(), bytes.len());
            }
        }
    }
}
