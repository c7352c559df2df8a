//! Scatter/gather on stream sockets, straight from and to slices and regions, and from files: no copy, no allocation, no waiting.
//!
//! A segment *is* an `iovec` (as `std::io::IoSlice` is), with a lifetime that keeps what it names alive and borrowed:
//! an array of them on the stack goes to the kernel as it stands.

use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::nowait::once;
use super::{FileMapping, OutOfRange, Region};

/// Most segments one call looks at; what comes after them is for the next call.
pub const MAX_SEGMENTS: usize = 16;

/// Bytes to send: of a slice (a [`super::Buffer`] is one), of a [`Region`] or of a [`FileMapping`].
#[repr(transparent)]
pub struct SendSegment<'a> {
    iov: libc::iovec,
    source: PhantomData<&'a [u8]>,
}

/// Room for bytes to receive: a slice (a [`super::Buffer`] is one) or part of a [`Region`].
#[repr(transparent)]
pub struct RecvSegment<'a> {
    iov: libc::iovec,
    target: PhantomData<&'a mut [u8]>,
}

impl<'a> SendSegment<'a> {
    /// The bytes of a slice.
    pub fn slice(bytes: &'a [u8]) -> Self {
        let iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        Self { iov, source: PhantomData }
    }

    /// Part of a region.
    pub fn region(region: &'a Region, range: Range<usize>) -> Result<Self, OutOfRange> {
        let (start, len) = region.raw(range)?;
        Ok(Self { iov: libc::iovec { iov_base: start.cast(), iov_len: len }, source: PhantomData })
    }

    /// Part of a file. What the file has lost since ends what is sent: then nothing is sent but `EFAULT` told, if it is at the
    /// beginning. May wait for what is not [in memory](FileMapping::is_resident).
    pub fn file(mapping: &'a FileMapping, range: Range<usize>) -> Result<Self, OutOfRange> {
        let (start, len) = mapping.raw(range)?;
        let iov = libc::iovec { iov_base: start.cast_mut().cast(), iov_len: len };
        Ok(Self { iov, source: PhantomData })
    }
}

impl<'a> RecvSegment<'a> {
    /// The room of a slice.
    pub fn slice(bytes: &'a mut [u8]) -> Self {
        let iov = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        Self { iov, target: PhantomData }
    }

    /// Part of a region.
    pub fn region(region: &'a Region, range: Range<usize>) -> Result<Self, OutOfRange> {
        let (start, len) = region.raw(range)?;
        Ok(Self { iov: libc::iovec { iov_base: start.cast(), iov_len: len }, target: PhantomData })
    }
}

// SAFETY: a segment stands for the slice, the region or the file it was made from, all of which may go to other threads.
unsafe impl Send for SendSegment<'_> {}
// SAFETY: as above.
unsafe impl Send for RecvSegment<'_> {}

macro_rules! common {
    ($segment:ident, $advance:ident) => {
        impl $segment<'_> {
            /// Bytes it names.
            pub fn len(&self) -> usize {
                self.iov.iov_len
            }

            /// True if it names no bytes.
            pub fn is_empty(&self) -> bool {
                self.iov.iov_len == 0
            }

            /// Forgets the first `count` bytes, or all if there are fewer. Returns how many it forgot.
            pub fn advance(&mut self, count: usize) -> usize {
                let step = count.min(self.iov.iov_len);
                self.iov.iov_base = self.iov.iov_base.wrapping_byte_add(step);
                self.iov.iov_len -= step;
                step
            }
        }

        impl std::fmt::Debug for $segment<'_> {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct(stringify!($segment)).field("len", &self.len()).finish()
            }
        }

        /// Forgets the first `count` bytes of a list of segments, after that many have been moved. Returns the number
        /// of segments at its head that are now used up.
        pub fn $advance(segments: &mut [$segment<'_>], mut count: usize) -> usize {
            for segment in segments.iter_mut() {
                count -= segment.advance(count);
                if count == 0 {
                    break;
                }
            }
            segments.iter().take_while(|segment| segment.is_empty()).count()
        }
    };
}

common!(SendSegment, advance_send);
common!(RecvSegment, advance_recv);

/// Sends from the first [`MAX_SEGMENTS`] segments, as much as the socket takes now. Returns the number of bytes sent;
/// `WouldBlock` if it takes none. Never raises SIGPIPE: a closed peer is `BrokenPipe`.
pub fn send_segments(fd: BorrowedFd<'_>, segments: &[SendSegment<'_>]) -> io::Result<usize> {
    // SAFETY: msghdr is a plain C structure for which all zeroes is "nothing given".
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    // Transparent over iovec, so a list of segments is a list of iovecs. The kernel only reads it.
    message.msg_iov = segments.as_ptr().cast_mut().cast();
    message.msg_iovlen = segments.len().min(MAX_SEGMENTS);
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: each iovec names memory that its segment's lifetime keeps alive and mapped; a file's page that is gone is an error
    // for the kernel, which alone reads it. `message` lives across the call.
    once(|| unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, flags) })
}

/// Receives into the first [`MAX_SEGMENTS`] segments, as much as the socket has now. Returns the number of bytes
/// received; 0 is the end of the stream (if there was room at all); `WouldBlock` if there is nothing yet.
pub fn recv_segments(fd: BorrowedFd<'_>, segments: &mut [RecvSegment<'_>]) -> io::Result<usize> {
    // SAFETY: msghdr is a plain C structure for which all zeroes is "nothing given".
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = segments.as_mut_ptr().cast();
    message.msg_iovlen = segments.len().min(MAX_SEGMENTS);
    // SAFETY: each iovec names memory that its segment keeps alive and either exclusively borrowed (a slice) or meant
    // to change at any time (a region); `message` lives across the call.
    once(|| unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) })
}

/// Room for one descriptor beside a message, aligned as the kernel's headers are.
#[repr(C, align(8))]
struct Control([u8; CONTROL_BYTES]);

/// A header and one descriptor. The same on all 64-bit Linux.
const CONTROL_BYTES: usize = 24;
/// A descriptor's number.
const DESCRIPTOR_BYTES: u32 = 4;

/// As [`send_segments`] over a Unix socket, and sends a duplicate of `descriptor` with the first byte.
pub fn send_segments_and_descriptor(
    fd: BorrowedFd<'_>,
    segments: &[SendSegment<'_>],
    descriptor: BorrowedFd<'_>,
) -> io::Result<usize> {
    let mut control = Control([0; CONTROL_BYTES]);
    // SAFETY: msghdr is a plain C structure for which all zeroes is "nothing given".
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = segments.as_ptr().cast_mut().cast();
    message.msg_iovlen = segments.len().min(MAX_SEGMENTS);
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = CONTROL_BYTES;
    let number = descriptor.as_raw_fd();
    // SAFETY: `message` names a control buffer that lives across these calls, is aligned for a header and has room for one
    // with one descriptor: the first header lies within it, and so do the bytes written behind it.
    unsafe {
        debug_assert_eq!(libc::CMSG_SPACE(DESCRIPTOR_BYTES) as usize, CONTROL_BYTES);
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        if header.is_null() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(DESCRIPTOR_BYTES) as usize;
        libc::CMSG_DATA(header).cast::<i32>().write_unaligned(number);
    }
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: as for `send_segments`; the control buffer lives across the call too, and the kernel only reads it.
    once(|| unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, flags) })
}

/// As [`recv_segments`] over a Unix socket, and the descriptor that came with the bytes, if one did. More than one that
/// came with them, and one for which the process has no room, are closed by the kernel.
pub fn recv_segments_and_descriptor(
    fd: BorrowedFd<'_>,
    segments: &mut [RecvSegment<'_>],
) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut control = Control([0; CONTROL_BYTES]);
    // SAFETY: msghdr is a plain C structure for which all zeroes is "nothing given".
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = segments.as_mut_ptr().cast();
    message.msg_iovlen = segments.len().min(MAX_SEGMENTS);
    message.msg_control = control.0.as_mut_ptr().cast();
    // Exactly one header with one descriptor: not the padding behind it, into which a second one would fit.
    // SAFETY: a computation with no memory behind it.
    message.msg_controllen = unsafe { libc::CMSG_LEN(DESCRIPTOR_BYTES) } as usize;
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: as for `recv_segments`; the kernel writes at most `msg_controllen` bytes of the control buffer, which lives
    // across the call.
    let count = once(|| unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, flags) })?;
    // SAFETY: the kernel has filled in `msg_controllen` and that many bytes of the control buffer; a header is only read if
    // it lies within them, and the number behind it only if the header says that there is one. The kernel has made
    // that descriptor for this process just now, so nobody else owns it.
    let descriptor = unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        let is_one = !header.is_null()
            && (*header).cmsg_level == libc::SOL_SOCKET
            && (*header).cmsg_type == libc::SCM_RIGHTS
            && (*header).cmsg_len == libc::CMSG_LEN(DESCRIPTOR_BYTES) as usize;
        is_one.then(|| OwnedFd::from_raw_fd(libc::CMSG_DATA(header).cast::<i32>().read_unaligned()))
    };
    Ok((count, descriptor))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Pool;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn header_and_payload_go_out_and_land_in_place() {
        let (left, right) = UnixStream::pair().unwrap();
        let pool = Pool::new(64, 1).unwrap();
        let mut payload = pool.take().unwrap();
        payload.fill(9);
        let sent =
            send_segments(left.as_fd(), &[SendSegment::slice(b"head"), SendSegment::slice(&payload[..10])])
                .unwrap();
        assert_eq!(sent, 14);

        let region = Region::new(32).unwrap();
        let mut header = [0; 4];
        let mut room = [RecvSegment::slice(&mut header), RecvSegment::region(&region, 5..32).unwrap()];
        assert_eq!(recv_segments(right.as_fd(), &mut room).unwrap(), 14);
        assert_eq!(advance_recv(&mut room, 14), 1);
        assert_eq!(room[1].len(), 17);
        assert_eq!(&header, b"head");
        let mut landed = [0; 12];
        region.copy_out(4, &mut landed).unwrap();
        assert_eq!(landed, [0, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 0]);

        let again = send_segments(right.as_fd(), &[SendSegment::region(&region, 5..15).unwrap()]).unwrap();
        assert_eq!(again, 10);
    }

    #[test]
    fn a_descriptor_comes_with_the_bytes_it_was_sent_with() {
        let (left, right) = UnixStream::pair().unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        send_segments(left.as_fd(), &[SendSegment::slice(b"before")]).unwrap();
        send_segments_and_descriptor(left.as_fd(), &[SendSegment::slice(b"with")], writer.as_fd()).unwrap();
        send_segments(left.as_fd(), &[SendSegment::slice(b"behind")]).unwrap();
        drop(writer);
        let mut bytes = [0; 64];
        let (mut all, mut found) = (Vec::new(), None);
        while all.len() < 16 {
            let room = &mut [RecvSegment::slice(&mut bytes)];
            let (count, descriptor) = recv_segments_and_descriptor(right.as_fd(), room).unwrap();
            all.extend_from_slice(&bytes[..count]);
            if let Some(descriptor) = descriptor {
                assert!(all.ends_with(b"with"), "the bytes behind it come with another call");
                found = Some(descriptor);
            }
        }
        assert_eq!(all, b"beforewithbehind");
        rustix::io::write(found.unwrap(), b"through it").unwrap();
        let count = rustix::io::read(&reader, &mut bytes).unwrap();
        assert_eq!(&bytes[..count], b"through it");
        // Who takes bytes alone leaves none behind.
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        send_segments_and_descriptor(left.as_fd(), &[SendSegment::slice(b"x")], writer.as_fd()).unwrap();
        drop(writer);
        recv_segments(right.as_fd(), &mut [RecvSegment::slice(&mut bytes)]).unwrap();
        assert_eq!(rustix::io::read(&reader, &mut [0; 1]).unwrap(), 0, "it is closed");
    }

    #[test]
    fn empty_full_and_closed_sockets_are_told_apart() {
        let (left, right) = UnixStream::pair().unwrap();
        let mut byte = [0];
        let nothing = recv_segments(right.as_fd(), &mut [RecvSegment::slice(&mut byte)]).unwrap_err();
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
        let block = vec![0; 1 << 16];
        let full = loop {
            if let Err(error) = send_segments(left.as_fd(), &[SendSegment::slice(&block)]) {
                break error;
            }
        };
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        drop(right);
        let closed = send_segments(left.as_fd(), &[SendSegment::slice(b"x")]).unwrap_err();
        assert!(
            matches!(closed.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset),
            "{closed}"
        );
        let (left, right) = UnixStream::pair().unwrap();
        drop(left);
        assert_eq!(recv_segments(right.as_fd(), &mut [RecvSegment::slice(&mut byte)]).unwrap(), 0);
    }

    #[test]
    fn segments_outside_a_region_can_not_be_made() {
        let region = Region::new(8).unwrap();
        assert!(SendSegment::region(&region, 0..9).is_err());
        assert!(RecvSegment::region(&region, 9..9).is_err());
    }

    #[test]
    fn a_file_is_sent_as_far_as_it_goes() {
        let (left, right) = UnixStream::pair().unwrap();
        let file = rustix::fs::memfd_create("sent", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::io::pwrite(&file, &[7; 3 * 4096], 0).unwrap();
        let mapping = FileMapping::new(file.as_fd(), 0, 3 * 4096).unwrap();
        let sent = [SendSegment::slice(b"head"), SendSegment::file(&mapping, 4095..4097).unwrap()];
        assert_eq!(send_segments(left.as_fd(), &sent).unwrap(), 6);
        let mut bytes = [0; 16];
        assert_eq!(recv_segments(right.as_fd(), &mut [RecvSegment::slice(&mut bytes)]).unwrap(), 6);
        assert_eq!(&bytes[..6], b"head\x07\x07");
        assert!(SendSegment::file(&mapping, 0..3 * 4096 + 1).is_err());
        // No SIGBUS: an error.
        rustix::fs::ftruncate(&file, 4096).unwrap();
        let cut =
            send_segments(left.as_fd(), &[SendSegment::file(&mapping, 4096..8192).unwrap()]).unwrap_err();
        assert_eq!(cut.raw_os_error(), Some(libc::EFAULT));
    }

    #[test]
    fn more_segments_than_the_limit_are_sent_in_part() {
        let (left, _right) = UnixStream::pair().unwrap();
        let segments: Vec<_> = (0..MAX_SEGMENTS + 4).map(|_| SendSegment::slice(b"ab")).collect();
        assert_eq!(send_segments(left.as_fd(), &segments).unwrap(), 2 * MAX_SEGMENTS);
    }

    #[test]
    fn advance_walks_over_segment_borders() {
        let mut list = [SendSegment::slice(b"abc"), SendSegment::slice(b""), SendSegment::slice(b"defg")];
        assert_eq!(advance_send(&mut list, 5), 2);
        assert_eq!(list[2].len(), 2);
        assert_eq!(advance_send(&mut list, 100), 3);
    }
}
