//! Storage that waits, or fails, when a test wants it to.

use super::Rig;
use holdfast_dataplane::engine::{DirectIo, FileIo, KernelFile, Opener};
use holdfast_verbs::memory::Nowait;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};

/// A file whose storage waits for a gate, and can be told to fail.
pub struct Gated {
    file: KernelFile,
    gate: Arc<Gate>,
}

#[derive(Default)]
pub struct Gate {
    closed: Mutex<bool>,
    opened: Condvar,
    pub waiting: AtomicU64,
    pub fail: AtomicU64,
    pub synced: AtomicBool,
}

impl Gate {
    /// Makes files that wait for it.
    pub fn opener(self: &Arc<Self>) -> Opener {
        let gate = Arc::clone(self);
        Arc::new(move |fd: OwnedFd, direct| -> Arc<dyn FileIo> {
            Arc::new(Gated { file: KernelFile::with_direct(fd, direct), gate: Arc::clone(&gate) })
        })
    }

    pub fn set(&self, closed: bool) {
        *self.closed.lock().unwrap() = closed;
        self.opened.notify_all();
    }

    fn pass(&self) -> io::Result<()> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let mut closed = self.closed.lock().unwrap();
        while *closed {
            closed = self.opened.wait(closed).unwrap();
        }
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        match self.fail.load(Ordering::SeqCst) {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(i32::try_from(errno).unwrap())),
        }
    }
}

impl FileIo for Gated {
    fn read_now(&self, _: &mut [u8], _: u64) -> io::Result<Nowait> {
        Ok(Nowait::WouldBlock)
    }
    fn write_now(&self, _: &[u8], _: u64) -> io::Result<Nowait> {
        Ok(Nowait::Unsupported)
    }
    fn read(&self, data: &mut [u8], at: u64) -> io::Result<usize> {
        self.gate.pass()?;
        // A page at a time: partial reads and writes are put together.
        let length = data.len().min(4096);
        self.file.read(&mut data[..length], at)
    }
    fn write(&self, data: &[u8], at: u64) -> io::Result<usize> {
        self.gate.pass()?;
        self.file.write(&data[..data.len().min(4096)], at)
    }
    fn sync(&self, data_only: bool) -> io::Result<()> {
        self.gate.pass()?;
        self.file.sync(data_only)?;
        self.gate.synced.store(true, Ordering::SeqCst);
        Ok(())
    }
    fn direct(&self) -> Option<&DirectIo> {
        self.file.direct()
    }
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.descriptor()
    }
}

/// An engine all of whose storage waits for the gate.
pub fn gated() -> (Rig, Arc<Gate>) {
    let gate = Arc::new(Gate::default());
    (Rig::with_files(|_| {}, gate.opener()), gate)
}
