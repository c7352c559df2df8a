//! A disk in memory that does what disks do: it loses, tears and reorders what was not synced, fails, fills up and
//! flips bits. What it does is decided by a seed, so every run can be repeated.
//!
//! ```text
//!  write ─► now ──sync──► durable          power cut: of each block that is not synced, the old, the new, or some
//!           (what reads see)               sectors of each; of each name not synced, either
//! ```

use super::disk::{Disk, DiskError};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes that are lost or kept together, unless they are torn.
pub const BLOCK_BYTES: usize = 4096;
/// Bytes that are never torn.
pub const SECTOR_BYTES: usize = 512;

/// A small generator of numbers that follow from a seed (splitmix64).
#[derive(Clone, Debug)]
pub struct Seeded(u64);

impl Seeded {
    /// Begins at a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `limit`; 0 if that is 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.number().checked_rem(limit).unwrap_or(0)
    }
}

/// What happens to one operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is half done, and nothing after it is done, until [`MemoryDisk::power_on`] or [`MemoryDisk::restart`].
    PowerCut,
    /// It fails. A failed sync forgets what it should have written, and reads do not show it.
    Failed,
    /// It fails for want of space, in the same way.
    NoSpace,
}

#[derive(Clone, Debug, Default)]
struct Inode {
    now: Vec<u8>,
    durable: Vec<u8>,
    dirty: BTreeSet<usize>,
}

#[derive(Debug)]
struct State {
    inodes: BTreeMap<u64, Inode>,
    names: BTreeMap<String, u64>,
    durable_names: BTreeMap<String, u64>,
    next_inode: u64,
    capacity: u64,
    operations: u64,
    syncs: u64,
    faults: BTreeMap<u64, Fault>,
    off: bool,
    random: Seeded,
}

/// The disk. Clones are the same disk.
#[derive(Clone, Debug)]
pub struct MemoryDisk(Arc<Mutex<State>>);

fn blocks(bytes: usize) -> usize {
    bytes.div_ceil(BLOCK_BYTES)
}

fn place(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

fn failed(what: &str) -> DiskError {
    DiskError::Failed(what.to_owned())
}

impl Inode {
    fn change(&mut self, from: usize, bytes: &[u8]) {
        let to = from + bytes.len();
        if self.now.len() < to {
            self.now.resize(to, 0);
        }
        self.now[from..to].copy_from_slice(bytes);
        self.dirty.extend(from / BLOCK_BYTES..blocks(to));
    }

    fn sync(&mut self) {
        self.durable.resize(self.now.len(), 0);
        for block in std::mem::take(&mut self.dirty) {
            let from = (block * BLOCK_BYTES).min(self.now.len());
            let to = (from + BLOCK_BYTES).min(self.now.len());
            self.durable[from..to].copy_from_slice(&self.now[from..to]);
        }
    }

    fn power_cut(&mut self, random: &mut Seeded) {
        let lengths = [self.durable.len(), self.now.len()];
        let mut after = self.durable.clone();
        after.resize(lengths[place(random.below(2))], 0);
        for block in std::mem::take(&mut self.dirty) {
            // All sectors, none, or each by chance.
            let fate = random.below(3);
            for sector in 0..BLOCK_BYTES / SECTOR_BYTES {
                let from = block * BLOCK_BYTES + sector * SECTOR_BYTES;
                if fate == 0 || (fate == 1 && random.below(2) == 0) {
                    continue;
                }
                for (at, byte) in after.iter_mut().enumerate().skip(from).take(SECTOR_BYTES) {
                    *byte = self.now.get(at).copied().unwrap_or(0);
                }
            }
        }
        self.now.clone_from(&after);
        self.durable = after;
    }
}

impl State {
    fn used(&self) -> u64 {
        let inodes = self.names.values().filter_map(|inode| self.inodes.get(inode));
        inodes.map(|inode| (blocks(inode.now.len()) * BLOCK_BYTES) as u64).sum()
    }

    /// Counts an operation that changes something, and says what is to happen to it.
    fn operation(&mut self) -> Result<Option<Fault>, DiskError> {
        if self.off {
            return Err(failed("the power is off"));
        }
        self.operations += 1;
        let fault = self.faults.remove(&self.operations);
        self.off = fault == Some(Fault::PowerCut);
        Ok(fault)
    }

    fn inode(&mut self, file: u64) -> Result<&mut Inode, DiskError> {
        self.inodes.get_mut(&file).ok_or_else(|| failed("no such file"))
    }

    /// Whether a file may become so long.
    fn grow(&mut self, file: u64, length: usize) -> Result<(), DiskError> {
        let before = blocks(self.inode(file)?.now.len());
        let more = (blocks(length).saturating_sub(before) * BLOCK_BYTES) as u64;
        if more > 0 && self.used() + more > self.capacity { Err(DiskError::NoSpace) } else { Ok(()) }
    }
}

fn outcome(fault: Option<Fault>) -> Result<(), DiskError> {
    match fault {
        None => Ok(()),
        Some(Fault::NoSpace) => Err(DiskError::NoSpace),
        Some(Fault::Failed) => Err(failed("input/output error")),
        Some(Fault::PowerCut) => Err(failed("the power is off")),
    }
}

impl MemoryDisk {
    /// An empty disk of endless size.
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(State {
            inodes: BTreeMap::new(),
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            next_inode: 0,
            capacity: u64::MAX,
            operations: 0,
            syncs: 0,
            faults: BTreeMap::new(),
            off: false,
            random: Seeded::new(seed),
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Operations so far that change something or make it durable.
    pub fn operations(&self) -> u64 {
        self.state().operations
    }

    /// Syncs of data so far.
    pub fn syncs(&self) -> u64 {
        self.state().syncs
    }

    /// Bytes of space in use.
    pub fn used(&self) -> u64 {
        self.state().used()
    }

    /// Sets how much space there is, bytes.
    pub fn set_capacity(&self, bytes: u64) {
        self.state().capacity = bytes;
    }

    /// Lets something happen to the operation of this number, counted as [`MemoryDisk::operations`] does.
    pub fn fault_at(&self, operation: u64, fault: Fault) {
        self.state().faults.insert(operation, fault);
    }

    /// The machine loses its power now, and has it again: of what was not synced, some is lost.
    pub fn power_on(&self) {
        let mut state = self.state();
        let state = &mut *state;
        for inode in state.inodes.values_mut() {
            inode.power_cut(&mut state.random);
        }
        let names: BTreeSet<String> = state.names.keys().chain(state.durable_names.keys()).cloned().collect();
        let mut after = BTreeMap::new();
        for name in names {
            let [kept, other] = [state.durable_names.get(&name), state.names.get(&name)];
            let chosen = if state.random.below(2) == 0 { kept } else { other };
            if let Some(inode) = chosen {
                after.insert(name, *inode);
            }
        }
        state.inodes.retain(|inode, _| after.values().any(|named| named == inode));
        state.names.clone_from(&after);
        state.durable_names = after;
        state.faults.clear();
        state.off = false;
    }

    /// Only the process died: all that was written still reads well, synced or not.
    pub fn restart(&self) {
        let mut state = self.state();
        state.faults.clear();
        state.off = false;
    }

    /// A file's bytes as read now; none if there is no such file.
    pub fn bytes(&self, name: &str) -> Option<Vec<u8>> {
        let state = self.state();
        state.inodes.get(state.names.get(name)?).map(|inode| inode.now.clone())
    }

    /// Makes a file have these bytes, durably, as if it had always been so.
    pub fn put(&self, name: &str, bytes: &[u8]) {
        let mut state = self.state();
        let inode = match state.names.get(name) {
            Some(inode) => *inode,
            None => {
                state.next_inode += 1;
                state.next_inode
            }
        };
        state.names.insert(name.to_owned(), inode);
        state.durable_names.insert(name.to_owned(), inode);
        let file = Inode { now: bytes.to_vec(), durable: bytes.to_vec(), dirty: BTreeSet::new() };
        state.inodes.insert(inode, file);
    }

    /// Flips one bit of a file, durably. Nothing happens beyond its end.
    pub fn flip(&self, name: &str, bit: u64) {
        if let Some(mut bytes) = self.bytes(name) {
            if let Some(byte) = bytes.get_mut(place(bit / 8)) {
                *byte ^= 1 << (bit % 8);
            }
            self.put(name, &bytes);
        }
    }

    /// Removes a file, durably, as if it had never been.
    pub fn lose(&self, name: &str) {
        let mut state = self.state();
        state.names.remove(name);
        state.durable_names.remove(name);
    }
}

impl Disk for MemoryDisk {
    type File = u64;

    fn list(&self) -> Result<Vec<String>, DiskError> {
        Ok(self.state().names.keys().cloned().collect())
    }

    fn create(&self, name: &str) -> Result<u64, DiskError> {
        let mut state = self.state();
        let fault = state.operation()?;
        if state.names.contains_key(name) {
            return Err(failed("the file exists"));
        }
        if matches!(fault, None | Some(Fault::PowerCut)) {
            state.next_inode += 1;
            let inode = state.next_inode;
            state.inodes.insert(inode, Inode::default());
            state.names.insert(name.to_owned(), inode);
        }
        outcome(fault).map(|()| state.next_inode)
    }

    fn open(&self, name: &str) -> Result<u64, DiskError> {
        self.state().names.get(name).copied().ok_or_else(|| failed("no such file"))
    }

    fn length(&self, file: &u64) -> Result<u64, DiskError> {
        Ok(self.state().inode(*file)?.now.len() as u64)
    }

    fn read_at(&self, file: &u64, offset: u64, into: &mut [u8]) -> Result<usize, DiskError> {
        let mut state = self.state();
        let bytes = state.inode(*file)?.now.get(place(offset)..).unwrap_or(&[]);
        let got = bytes.len().min(into.len());
        into[..got].copy_from_slice(&bytes[..got]);
        Ok(got)
    }

    fn write_at(&self, file: &u64, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        let mut state = self.state();
        let fault = state.operation()?;
        state.grow(*file, place(offset) + bytes.len())?;
        let some = match fault {
            None | Some(Fault::PowerCut) => bytes.len(),
            Some(_) => place(state.random.below(bytes.len() as u64)),
        };
        state.inode(*file)?.change(place(offset), &bytes[..some]);
        outcome(fault)
    }

    fn allocate(&self, file: &u64, offset: u64, length: u64) -> Result<(), DiskError> {
        let mut state = self.state();
        let fault = state.operation()?;
        let length = place(offset) + place(length);
        state.grow(*file, length)?;
        outcome(fault)?;
        let inode = state.inode(*file)?;
        let longer = inode.now.len().max(length);
        inode.now.resize(longer, 0);
        Ok(())
    }

    fn truncate(&self, file: &u64, length: u64) -> Result<(), DiskError> {
        let mut state = self.state();
        let fault = state.operation()?;
        if matches!(fault, None | Some(Fault::PowerCut)) {
            let inode = state.inode(*file)?;
            let gone = place(length) / BLOCK_BYTES..blocks(inode.now.len());
            inode.now.truncate(place(length));
            inode.dirty.extend(gone);
        }
        outcome(fault)
    }

    fn sync_data(&self, file: &u64) -> Result<(), DiskError> {
        let mut state = self.state();
        let fault = state.operation()?;
        state.syncs += 1;
        let inode = state.inode(*file)?;
        match fault {
            None => inode.sync(),
            Some(Fault::PowerCut) => {}
            Some(Fault::Failed | Fault::NoSpace) => inode.dirty.clear(),
        }
        outcome(fault)
    }

    fn sync_directory(&self) -> Result<(), DiskError> {
        let mut state = self.state();
        let fault = state.operation()?;
        if fault.is_none() {
            state.durable_names = state.names.clone();
        }
        outcome(fault)
    }

    fn remove(&self, name: &str) -> Result<(), DiskError> {
        let mut state = self.state();
        let fault = state.operation()?;
        if !state.names.contains_key(name) {
            return Err(failed("no such file"));
        }
        if matches!(fault, None | Some(Fault::PowerCut)) {
            state.names.remove(name);
        }
        outcome(fault)
    }
}
