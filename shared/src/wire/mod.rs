//! What travels: data-plane frames, control messages, link messages, the service blob.
//!
//! * [`data`]: fixed little-endian layouts (zerocopy), one frame per transport message.
//! * [`control`], [`link`], [`service`]: CBOR (RFC 8949) arrays whose places have explicit numbers, so that a field may be
//!   added at the end without breaking the other side. The numbers are part of the protocol.
//!
//! Decoders never allocate more than the input's own length, and check lengths before they look inside.

pub mod control;
pub mod data;
pub mod link;
pub mod service;

/// Why bytes are not a message.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// Shorter than its own layout says, or than the smallest message.
    #[error("the message is {got} bytes; {wanted} are needed")]
    Short {
        /// Bytes needed at least.
        wanted: usize,
        /// Bytes there.
        got: usize,
    },
    /// Longer than allowed, or with bytes after its end.
    #[error("the message is {got} bytes; at most {max} are allowed")]
    Long {
        /// Bytes allowed.
        max: usize,
        /// Bytes there.
        got: usize,
    },
    /// A version this side does not speak.
    #[error("protocol version {0} is not spoken here")]
    Version(u8),
    /// An opcode this side does not know.
    #[error("unknown opcode {0:#04x}")]
    Opcode(u8),
    /// A field holds what it must not.
    #[error("field '{0}' is not valid")]
    Field(&'static str),
    /// The CBOR is not what was expected.
    #[error("not a valid message: {0}")]
    Cbor(#[from] minicbor::decode::Error),
}

/// Encodes a CBOR message. Encoding into memory cannot fail; the empty vector never is a valid message.
pub fn to_cbor<T: minicbor::Encode<()>>(message: &T) -> Vec<u8> {
    minicbor::to_vec(message).unwrap_or_default()
}

/// Decodes a CBOR message that fills `bytes` exactly.
///
/// # Errors
/// [`WireError::Long`] if there are more than `max` bytes, or bytes after the message; [`WireError::Cbor`].
pub fn from_cbor<'b, T: minicbor::Decode<'b, ()>>(bytes: &'b [u8], max: usize) -> Result<T, WireError> {
    if bytes.len() > max {
        return Err(WireError::Long { max, got: bytes.len() });
    }
    let mut decoder = minicbor::Decoder::new(bytes);
    let message = decoder.decode()?;
    if decoder.position() != bytes.len() {
        return Err(WireError::Long { max: decoder.position(), got: bytes.len() });
    }
    Ok(message)
}
