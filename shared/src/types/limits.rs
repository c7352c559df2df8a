//! Limits that the protocol itself fixes. Those an operator may choose are in control's and dataplane's config.

/// Longest control message, bytes, without its length prefix.
pub const CONTROL_MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// Longest packet on the link, bytes.
pub const LINK_PACKET_BYTES_MAX: usize = 64 * 1024;
/// Longest resume key, bytes. Clients treat it as opaque and must accept any length up to this.
pub const RESUME_KEY_BYTES_MAX: usize = 512;
/// Longest service blob, bytes.
pub const SERVICE_BLOB_BYTES_MAX: usize = 4096;
/// Longest payload that travels inside a data frame, bytes.
pub const INLINE_BYTES_MAX: usize = 4096;
/// Longest data frame, bytes: the largest request header and an inline payload, rounded up.
pub const FRAME_BYTES_MAX: usize = 4608;
/// Longest path inside a volume, bytes.
pub const PATH_BYTES_MAX: usize = 4095;
/// Longest name of one path component, bytes.
pub const NAME_BYTES_MAX: usize = 255;
/// Longest volume name, bytes.
pub const VOLUME_NAME_BYTES_MAX: usize = 64;
