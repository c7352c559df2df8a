//! [`SocketWire`]: a connected stream socket.

use super::Ending;
use super::wire::{PIECES_MAX, Piece, Room, Wire};
use crate::channel::Armed;
use holdfast_verbs::memory::{RecvSegment, SendSegment, recv_segments, send_segments};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{Shutdown, shutdown};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Over a socket that does not block.
pub(crate) struct SocketWire(pub(crate) OwnedFd);

impl SocketWire {
    /// Asks the kernel whether the socket has something, without waiting.
    fn has(&self, flags: PollFlags) -> bool {
        let mut fds = [PollFd::new(&self.0, flags)];
        let outcome = rustix::event::poll(&mut fds, Some(&Timespec::default()));
        // An error here is no reason to sleep.
        outcome.is_err() || fds[0].revents().intersects(flags | PollFlags::ERR)
    }
}

/// What came of a system call that does not wait.
fn moved(outcome: io::Result<usize>) -> Result<Option<usize>, Ending> {
    match outcome {
        Ok(count) => Ok(Some(count)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(Ending::Io(error)),
    }
}

impl Wire for SocketWire {
    const IS_CHEAP: bool = false;
    const STAGING_BYTES: usize = 16 * 1024;
    const TAKES_FILES: bool = true;

    fn send(&mut self, pieces: &[Piece<'_>]) -> Result<Option<usize>, Ending> {
        let mut segments: [SendSegment<'_>; PIECES_MAX] = std::array::from_fn(|_| SendSegment::slice(&[]));
        for (segment, piece) in segments.iter_mut().zip(pieces) {
            *segment = match piece {
                Piece::Slice(bytes) => SendSegment::slice(bytes),
                Piece::Region(region, range) => {
                    SendSegment::region(region, range.clone()).map_err(|error| Ending::Io(error.into()))?
                }
                Piece::File(file, range) => {
                    SendSegment::file(file, range.clone()).map_err(|error| Ending::Io(error.into()))?
                }
            };
        }
        let count = pieces.len().min(PIECES_MAX);
        moved(send_segments(self.0.as_fd(), segments.get(..count).unwrap_or_default()))
    }

    fn recv(&mut self, rooms: &mut [Room<'_>]) -> Result<Option<usize>, Ending> {
        let mut segments: [RecvSegment<'_>; PIECES_MAX] =
            std::array::from_fn(|_| RecvSegment::slice(&mut []));
        let count = rooms.len().min(PIECES_MAX);
        for (segment, room) in segments.iter_mut().zip(rooms) {
            *segment = match room {
                Room::Slice(bytes) => RecvSegment::slice(bytes),
                Room::Region(region, range) => {
                    RecvSegment::region(region, range.clone()).map_err(|error| Ending::Io(error.into()))?
                }
            };
        }
        match moved(recv_segments(self.0.as_fd(), segments.get_mut(..count).unwrap_or_default()))? {
            Some(0) => Err(Ending::Disconnected),
            moved => Ok(moved),
        }
    }

    fn arm(&mut self, was_empty: bool, is_stalled: bool) -> Result<Armed, Ending> {
        if is_stalled {
            // Nothing is read now, so that only this shows that the connection was reset.
            return if self.has(PollFlags::ERR) { Err(Ending::Disconnected) } else { Ok(Armed::Idle) };
        }
        // Bytes that come from now on give an edge. The end of the stream may have come with the last bytes,
        // and would give none; nor do bytes that came with the edge of the poll that left out receiving.
        let has = !was_empty && self.has(PollFlags::IN | PollFlags::RDHUP);
        Ok(if has { Armed::Pending } else { Armed::Idle })
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn cut(&mut self, how: Shutdown) {
        // It may be down already.
        let _ = shutdown(&self.0, how);
    }
}
