//! The supervisor's notify socket (systemd): that we are ready, and descriptors that outlive us.
//!
//! ```text
//!   open ── FDSTORE=1, FDNAME ──► systemd keeps a duplicate ── a restart ──► passed to the next control
//!   close ── FDSTOREREMOVE=1 ──►
//! ```
//!
//! With `FileDescriptorStoreMax=` in the unit, opened files survive a restart of both processes as they are: also a
//! removed one, which no handle finds again. What comes back is taken for an open only if it is the recorded file, opened as
//! the open wants it.
//!
//! A descriptor for which a slow supervisor has no time is not kept by it: the file's handle finds the file again.
//!
//! A thread of its own talks to the socket, so that a slow supervisor holds up nobody.

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType, connect, sendmsg, socket_with,
};
use std::ffi::OsStr;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{Sender, channel};

/// Descriptors that may wait to be told: each is one more that this process has open.
const WAITING_MAX: usize = 256;

/// One message.
struct Message(String, Option<OwnedFd>);

/// The notify socket, if there is one.
#[derive(Clone, Debug)]
pub struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    messages: Sender<Message>,
    generation: u64,
    last: AtomicU64,
    /// Descriptors on their way.
    waiting: Arc<AtomicUsize>,
    /// We stop: what is kept stays kept, for the next start.
    keeps_all: AtomicBool,
}

/// A descriptor that the supervisor keeps; it lets go of it when this is dropped.
#[derive(Debug)]
pub struct Stored {
    store: Store,
    name: String,
}

impl Drop for Stored {
    fn drop(&mut self) {
        if self.store.0.keeps_all.load(Relaxed) {
            return;
        }
        self.store.say(format!("FDSTOREREMOVE=1\nFDNAME={}", self.name), None);
    }
}

impl Store {
    /// Connects to the socket that `NOTIFY_SOCKET` names; `None` if it names none. Names given to descriptors hold
    /// `generation`, so that they differ from those of earlier starts.
    ///
    /// # Errors
    /// If it is named and cannot be reached.
    pub fn connect(address: Option<&OsStr>, generation: u64) -> std::io::Result<Option<Self>> {
        let Some(address) = address.filter(|address| !address.is_empty()) else { return Ok(None) };
        let to = match address.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddrUnix::new_abstract_name(name)?,
            None => SocketAddrUnix::new(address)?,
        };
        let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        connect(&socket, &to)?;
        let (messages, queue) = channel::<Message>();
        let waiting = Arc::new(AtomicUsize::new(0));
        let told = Arc::clone(&waiting);
        std::thread::Builder::new().name("notify".into()).spawn(move || {
            for Message(text, descriptor) in queue {
                if let Err(error) = send(&socket, &text, descriptor.as_ref()) {
                    tracing::debug!(%error, text, "the supervisor does not listen");
                }
                if descriptor.is_some() {
                    told.fetch_sub(1, Relaxed);
                }
            }
        })?;
        Ok(Some(Self(Arc::new(Inner {
            messages,
            generation,
            last: AtomicU64::new(0),
            waiting,
            keeps_all: AtomicBool::new(false),
        }))))
    }

    /// Tells that we serve.
    pub fn ready(&self) {
        self.say("READY=1".into(), None);
    }

    /// Tells that we stop. What is kept from now on stays kept.
    pub fn stopping(&self) {
        self.0.keeps_all.store(true, Relaxed);
        self.say("STOPPING=1".into(), None);
    }

    /// Has the supervisor keep a duplicate; `None` if there is no room for one, or too many wait already.
    pub fn keep(&self, descriptor: &OwnedFd) -> Option<Stored> {
        if self.0.waiting.load(Relaxed) >= WAITING_MAX {
            return None;
        }
        let duplicate = descriptor.try_clone().ok()?;
        self.0.waiting.fetch_add(1, Relaxed);
        let name = format!("open-{}-{}", self.0.generation, self.0.last.fetch_add(1, Relaxed));
        self.say(format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}"), Some(duplicate));
        Some(self.kept(name))
    }

    /// What the supervisor keeps already, under the name it was passed with.
    pub fn kept(&self, name: String) -> Stored {
        Stored { store: self.clone(), name }
    }

    fn say(&self, text: String, descriptor: Option<OwnedFd>) {
        // The thread ends only with the process.
        let _ = self.0.messages.send(Message(text, descriptor));
    }
}

fn send(socket: &OwnedFd, text: &str, descriptor: Option<&OwnedFd>) -> std::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = descriptor.map(|descriptor| [descriptor.as_fd()]);
    if let Some(descriptors) = &descriptors {
        control.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    sendmsg(socket, &[IoSlice::new(text.as_bytes())], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixDatagram;

    #[test]
    fn a_supervisor_that_does_not_listen_costs_a_bounded_number_of_descriptors() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let supervisor = UnixDatagram::bind(&path).unwrap();
        let store = Store::connect(Some(path.as_os_str()), 1).unwrap().unwrap();
        let file = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        // Not read yet: the socket takes some, then the thread waits.
        let kept: Vec<_> = std::iter::from_fn(|| store.keep(&file)).take(100_000).collect();
        assert!((WAITING_MAX..100_000).contains(&kept.len()), "{} were kept", kept.len());
        // Read: there is room again.
        std::thread::spawn(move || while supervisor.recv(&mut [0; 256]).is_ok() {});
        let start = std::time::Instant::now();
        while store.keep(&file).is_none() {
            assert!(start.elapsed().as_secs() < 60, "never room again");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}
