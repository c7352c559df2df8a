//! How the files of a volume can be read and written: looked at once, when the server starts, and told to the operator.

use super::{Volume, through_proc};
use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
use rustix::io::Errno;

/// What `statfs` says, and what people say. A file system that is not here is told as its number.
const NAMES: [(i64, &str); 9] = [
    (0xef53, "ext4"),
    (0x5846_5342, "xfs"),
    (0x9123_683e, "btrfs"),
    (0x0102_1994, "tmpfs"),
    (0x8584_58f6, "ramfs"),
    (0x794c_7630, "overlay"),
    (0x2fc1_2fc1, "zfs"),
    (0x6969, "nfs"),
    (0x6573_5546, "fuse"),
];
/// Those that are memory and nothing else: direct I/O means nothing there.
const IN_MEMORY: [&str; 2] = ["tmpfs", "ramfs"];

/// See the module's text.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Files {
    /// What the directory is on.
    pub file_system: String,
    /// How direct I/O must be aligned there.
    pub direct: Direct,
}

/// Whether there is direct I/O.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direct {
    /// Yes: offsets, lengths and addresses must be multiples of so many bytes.
    Blocks(u32),
    /// Yes, and the kernel does not tell how it must be aligned.
    Possible,
    /// No.
    Impossible,
    /// No file could be made to try it: the volume can't be written.
    Untried,
}

impl Volume {
    /// Looks at the file system; makes a file without a name for that, if it may.
    pub fn files(&self) -> Files {
        let kind = rustix::fs::fstatfs(&self.root).map_or(0, |fs| fs.f_type);
        let name = NAMES.iter().find_map(|(number, name)| (*number == kind).then_some(*name));
        let file_system = name.map_or_else(|| format!("{kind:#x}"), str::to_owned);
        let direct =
            if IN_MEMORY.contains(&file_system.as_str()) { Direct::Impossible } else { self.direct() };
        Files { file_system, direct }
    }

    fn direct(&self) -> Direct {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
        let made =
            rustix::fs::openat(rustix::fs::CWD, through_proc(&self.root), flags, Mode::RUSR | Mode::WUSR);
        let file = match made {
            Ok(file) => file,
            Err(Errno::INVAL) => return Direct::Impossible,
            Err(_) => return Direct::Untried,
        };
        let stat = rustix::fs::statx(&file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
        match stat {
            Ok(stat) if stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0 => {
                match stat.stx_dio_offset_align.max(stat.stx_dio_mem_align) {
                    0 => Direct::Impossible,
                    blocks => Direct::Blocks(blocks),
                }
            }
            _ => Direct::Possible,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_on_disk_and_one_in_memory_are_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let files = Volume::open(directory.path()).unwrap().files();
        let memory = IN_MEMORY.contains(&files.file_system.as_str());
        assert_eq!(memory, files.direct == Direct::Impossible, "{files:?}");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "nothing is left");
        let shm = Volume::open(std::path::Path::new("/dev/shm")).unwrap().files();
        assert_eq!(shm, Files { file_system: "tmpfs".into(), direct: Direct::Impossible });
        let proc = Volume::open(std::path::Path::new("/proc")).unwrap().files();
        assert_eq!(proc, Files { file_system: "0x9fa0".into(), direct: Direct::Untried });
    }
}
