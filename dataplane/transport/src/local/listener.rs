//! [`LocalListener`]: a Unix socket at a path, on a thread of its own.

use super::reach::Budget;
use super::{PEER, Sharing};
use crate::channel::{Channel, Listener, Setup};
use crate::stopper::Stopper;
use std::fs::Permissions;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Bytes of clients' regions that are mapped at once, unless it is said otherwise.
const SHARED_BYTES_MAX: u64 = 4 << 30;
/// One channel may have this part of them.
const CHANNELS_FULL: u64 = 4;

/// Accepts connections at a path. The file stays when it is dropped, and the next one there takes its place.
pub struct LocalListener {
    listener: UnixListener,
    path: PathBuf,
    stopper: Stopper,
    sharing: Sharing,
}

impl LocalListener {
    /// Listens at `path`, for whom `mode` lets write to the socket. A socket that is there already is replaced if nobody
    /// listens on it.
    ///
    /// # Errors
    /// `AddrInUse` if somebody does; `AlreadyExists` for anything else that has the name; `InvalidInput` for a path longer
    /// than 107 bytes; the kernel's.
    pub fn bind(path: &Path, mode: u32) -> io::Result<Self> {
        remove_stale(path)?;
        let listener = UnixListener::bind(path)?;
        // Until here whoever is refused goes on by another transport.
        std::fs::set_permissions(path, Permissions::from_mode(mode))?;
        listener.set_nonblocking(true)?;
        let (stopper, sharing) = (Stopper::new()?, sharing(SHARED_BYTES_MAX));
        Ok(Self { listener, path: path.to_owned(), stopper, sharing })
    }

    /// At most so many bytes of all clients' regions are mapped at once, and a quarter of them for one channel (4 GiB if this is not
    /// said). What is beyond is served by frames, with more copies.
    #[must_use]
    pub fn with_shared_bytes_max(mut self, bytes_max: u64) -> Self {
        self.sharing = sharing(bytes_max);
        self
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn sharing(bytes_max: u64) -> Sharing {
    Sharing { budget: Budget::new(bytes_max), channel_bytes_max: bytes_max / CHANNELS_FULL }
}

/// Removes a socket on which nobody listens any more.
fn remove_stale(path: &Path) -> io::Result<()> {
    let there = match path.symlink_metadata() {
        Ok(there) => there,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if !there.file_type().is_socket() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "something that is no socket has the name"));
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(io::Error::new(io::ErrorKind::AddrInUse, "somebody listens there")),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

impl Listener for LocalListener {
    fn address(&self) -> SocketAddr {
        PEER
    }

    fn accept(
        &mut self,
        prepare: &mut dyn FnMut(SocketAddr) -> Option<Setup>,
    ) -> io::Result<Box<dyn Channel>> {
        crate::stream::accept(&self.stopper, &self.listener, || {
            let (stream, _) = self.listener.accept()?;
            Ok(prepare(PEER).map(|setup| super::channel(stream, setup, Some(&self.sharing))))
        })
    }

    fn stopper(&self) -> Box<dyn Fn() + Send + Sync> {
        self.stopper.handle()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_socket_is_replaced_and_nothing_else_is() {
        let directory = std::env::temp_dir().join(format!("holdfast-local-{}", std::process::id()));
        std::fs::create_dir(&directory).unwrap();
        let path = directory.join("socket");
        let first = LocalListener::bind(&path, 0o666).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o666);
        let refused = |path: &Path| LocalListener::bind(path, 0o666).err().unwrap().kind();
        assert_eq!(refused(&path), io::ErrorKind::AddrInUse);
        drop(first);
        assert!(path.exists(), "its name stays");
        drop(LocalListener::bind(&path, 0o600).unwrap());
        let file = directory.join("file");
        std::fs::write(&file, "kept").unwrap();
        assert_eq!(refused(&file), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "kept");
        assert_eq!(refused(&directory.join("x".repeat(108))), io::ErrorKind::InvalidInput);
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
