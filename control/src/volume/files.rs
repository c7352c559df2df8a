//! How the files of a volume can be read and written: looked at once, when the server starts, and told to the operator.

use super::{Volume, through_proc};
use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
use rustix::io::Errno;

/// What `statfs` says, what people say, and whether a `pwrite` past the page cache lasts until the disk has answered, whatever happens to
/// its process: what a dead process can still do is what everything here relies on. (NFS, for one, lets a killed process go.) An
/// overlay's files are on one of those, or on none that can be written. A file system that is not here is told as its number.
const KNOWN: [(i64, &str, bool); 10] = [
    (0xef53, "ext4", true),
    (0x5846_5342, "xfs", true),
    (0x9123_683e, "btrfs", true),
    (0xf2f5_2010, "f2fs", true),
    (0x794c_7630, "overlay", true),
    (0x0102_1994, "tmpfs", false),
    (0x8584_58f6, "ramfs", false),
    (0x2fc1_2fc1, "zfs", false),
    (0x6969, "nfs", false),
    (0x6573_5546, "fuse", false),
];

/// True if direct I/O of such a file system, as `statfs` calls it, can be relied on to have ended with its process.
pub(crate) fn ends_with_its_process(file_system: i64) -> bool {
    KNOWN.iter().any(|(number, _, ends)| *number == file_system && *ends)
}

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
    /// No, or none that can be relied on.
    Impossible,
    /// It was not tried: nobody asks for it, or the volume can't be written.
    Untried,
}

impl Volume {
    /// Looks at the file system. `try_direct`: makes a file without a name for that, if it may; blocks as that does.
    pub fn files(&self, try_direct: bool) -> Files {
        let kind = rustix::fs::fstatfs(&self.root).map_or(0, |fs| fs.f_type);
        let name = KNOWN.iter().find_map(|(number, name, _)| (*number == kind).then_some(*name));
        let file_system = name.map_or_else(|| format!("{kind:#x}"), str::to_owned);
        let direct = if !ends_with_its_process(kind) {
            Direct::Impossible
        } else if try_direct {
            self.direct()
        } else {
            Direct::Untried
        };
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
        let volume = Volume::open(directory.path()).unwrap();
        let files = volume.files(true);
        // On most disks; on some there is no direct I/O.
        assert!(files.file_system != "tmpfs" || files.direct == Direct::Impossible, "{files:?}");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "nothing is left");
        assert!(
            matches!(volume.files(false).direct, Direct::Untried | Direct::Impossible),
            "nobody asks for it"
        );
        let proc = Volume::open(std::path::Path::new("/proc")).unwrap().files(true);
        assert_eq!(proc, Files { file_system: "0x9fa0".into(), direct: Direct::Impossible });
    }
}
