//! Paths that try to get out, files that are not files, races.

use super::*;
use holdfast_shared::types::{Access, Disposition};
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};

fn path(text: &str) -> VolumePath {
    VolumePath::parse(text).unwrap()
}

struct Place {
    dir: tempfile::TempDir,
    volume: Volume,
}

/// `outside/secret` beside the volume's root `root`.
fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(dir.path().join("root/inside")).unwrap();
    std::fs::create_dir_all(dir.path().join("outside")).unwrap();
    std::fs::write(dir.path().join("outside/secret"), b"secret").unwrap();
    std::fs::write(dir.path().join("root/inside/file"), b"inside").unwrap();
    let volume = Volume::open(&dir.path().join("root")).unwrap();
    Place { dir, volume }
}

fn read(volume: &Volume, at: &str) -> Result<Vec<u8>, Status> {
    let (_, fd) =
        volume.open_file(&path(at), Access::READ, Disposition::Open, 0, true).map_err(|r| r.status)?;
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut std::fs::File::from(fd), &mut bytes).unwrap();
    Ok(bytes)
}

#[test]
fn links_lead_inside_only() {
    let Place { dir, volume } = place();
    let root = dir.path().join("root");
    symlink(dir.path().join("outside/secret"), root.join("absolute")).unwrap();
    symlink("../outside/secret", root.join("relative")).unwrap();
    symlink("../outside", root.join("directory")).unwrap();
    symlink("inside/../../outside/secret", root.join("winding")).unwrap();
    symlink("/proc/self/root/etc", root.join("magic")).unwrap();
    symlink("inside/file", root.join("good")).unwrap();
    symlink("loop", root.join("loop")).unwrap();
    for name in ["absolute", "relative", "directory/secret", "winding", "magic/passwd"] {
        assert_eq!(read(&volume, name), Err(Status::PathEscape), "{name}");
    }
    assert_eq!(read(&volume, "good").unwrap(), b"inside");
    assert_eq!(read(&volume, "loop"), Err(Status::SymlinkLoop));
    let status = |result: Result<(), Refusal>| result.unwrap_err().status;
    assert_eq!(status(volume.make_directory(&path("directory/new"), 0o755)), Status::PathEscape);
    assert_eq!(status(volume.make_symlink(&path("directory/new"), "x")), Status::PathEscape);
    assert_eq!(volume.identify(&path("directory/secret")).unwrap_err().status, Status::PathEscape);
    assert_eq!(volume.list(&path("directory"), "").unwrap_err().status, Status::PathEscape);
    assert_eq!(volume.attributes(&path("directory/secret")).unwrap_err().status, Status::PathEscape);
    let created =
        volume.open_file(&path("directory/new"), Access::WRITE, Disposition::CreateNew, 0o644, true);
    assert_eq!(created.unwrap_err().status, Status::PathEscape);
    // A link at the end is created through by nobody, and the link itself is what a name stands for.
    symlink("../outside/new", root.join("dangling")).unwrap();
    let created = volume.open_file(&path("dangling"), Access::WRITE, Disposition::OpenOrCreate, 0o644, true);
    assert!(created.is_err() && !dir.path().join("outside/new").exists());
    assert_eq!(volume.read_symlink(&path("relative")).unwrap(), "../outside/secret");
    let link = volume.identify(&path("relative")).unwrap().unwrap();
    volume.remove(&path("relative"), link).unwrap();
    assert!(dir.path().join("outside/secret").exists());
}

/// A directory is swapped for a link that leads out, over and over, while it is resolved.
#[test]
fn a_swapped_directory_never_leads_out() {
    let Place { dir, volume } = place();
    let root = dir.path().join("root");
    std::fs::write(dir.path().join("outside/file"), b"secret").unwrap();
    symlink(dir.path().join("outside"), root.join("link")).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let flags = rustix::fs::RenameFlags::EXCHANGE;
                let (a, b) = (root.join("inside"), root.join("link"));
                rustix::fs::renameat_with(rustix::fs::CWD, &a, rustix::fs::CWD, &b, flags).unwrap();
            }
        });
        let (mut good, mut refused) = (0, 0);
        let start = std::time::Instant::now();
        let elapsed = |ms| start.elapsed() >= std::time::Duration::from_millis(ms);
        while !elapsed(500) || ((good == 0 || refused == 0) && !elapsed(20_000)) {
            match read(&volume, "inside/file") {
                Ok(bytes) => {
                    assert_eq!(bytes, b"inside");
                    good += 1;
                }
                Err(status) => {
                    assert!(matches!(status, Status::PathEscape | Status::Busy), "{status:?}");
                    refused += 1;
                }
            }
            let made = volume.make_directory(&path("inside/made"), 0o755);
            assert!(!dir.path().join("outside/made").exists(), "{made:?}");
        }
        stop.store(true, Ordering::Relaxed);
        assert!(good > 0 && refused > 0, "{good} read, {refused} refused: no race was tried");
    });
}

#[test]
fn only_regular_files_are_opened() {
    let Place { dir, volume } = place();
    let root = dir.path().join("root");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        root.join("fifo"),
        rustix::fs::FileType::Fifo,
        Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap();
    // Would block for ever if the fifo were opened.
    assert_eq!(read(&volume, "fifo"), Err(Status::Unsupported));
    assert_eq!(read(&volume, "socket"), Err(Status::Unsupported));
    assert_eq!(read(&volume, "inside"), Err(Status::IsDirectory));
    assert_eq!(read(&volume, "inside/file/x"), Err(Status::NotDirectory));
    assert_eq!(read(&volume, "nothing"), Err(Status::NotFound));
}

#[test]
fn the_descriptor_allows_what_was_wanted() {
    let Place { dir: _dir, volume } = place();
    let open = |access| volume.open_file(&path("inside/file"), access, Disposition::Open, 0, true).unwrap().1;
    assert!(rustix::io::write(open(Access::READ), b"x").is_err());
    assert!(rustix::io::read(open(Access::WRITE), &mut [0; 1][..]).is_err());
    assert_eq!(rustix::io::read(open(Access::READ | Access::WRITE), &mut [0; 1][..]).unwrap(), 1);
    assert!(rustix::io::fcntl_getfd(open(Access::READ)).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
    let (opened, _) =
        volume.open_file(&path("new"), Access::WRITE, Disposition::OpenOrCreate, 0o7700, true).unwrap();
    assert!(opened.created);
    assert_eq!(opened.attributes.mode & !0o700, 0, "no set-id bits");
    let again = volume.open_file(&path("new"), Access::WRITE, Disposition::CreateNew, 0o600, true);
    assert_eq!(again.unwrap_err().status, Status::Exists);
}

#[test]
fn pages_are_ordered_complete_and_fit() {
    let Place { dir, volume } = place();
    let many = dir.path().join("root/many");
    std::fs::create_dir(&many).unwrap();
    let mut wanted: Vec<String> = (0..1500).map(|n| format!("{n:04}{}", "x".repeat(n % 250))).collect();
    for name in &wanted {
        std::fs::write(many.join(name), b"").unwrap();
    }
    wanted.sort();
    let (mut got, mut after, mut pages) = (Vec::new(), String::new(), 0);
    loop {
        let page = volume.list(&path("many"), &after).unwrap();
        assert!(holdfast_shared::wire::to_cbor(&page).len() < 60_000);
        got.extend(page.entries.into_iter().map(|entry| entry.name));
        pages += 1;
        match page.next {
            Some(next) => after = next,
            None => break,
        }
    }
    assert_eq!(got, wanted);
    assert!(pages > 3);
}

#[test]
fn names_are_changed_only_if_they_still_stand_for_the_same() {
    let Place { dir, volume } = place();
    let root = dir.path().join("root");
    for name in ["a", "b"] {
        std::fs::write(root.join(name), name).unwrap();
    }
    let id = |name: &str| volume.identify(&path(name)).unwrap();
    let (a, b) = (id("a").unwrap(), id("b").unwrap());
    let status = |result: Result<(), Refusal>| result.unwrap_err().status;
    assert_eq!(status(volume.remove(&path("a"), b)), Status::Busy);
    assert_eq!(status(volume.rename((&path("a"), a), (&path("b"), None))), Status::Busy);
    assert_eq!(status(volume.rename((&path("a"), b), (&path("c"), None))), Status::Busy);
    volume.rename((&path("a"), a), (&path("b"), Some(b))).unwrap();
    assert_eq!((id("a"), id("b")), (None, Some(a)));
    let inside = id("inside").unwrap();
    assert_eq!(status(volume.remove(&path("inside"), inside)), Status::NotEmpty);
}

/// A removal and a renaming onto the same name, both admitted for the file that stood there: one of them comes first, and
/// the other finds that out.
#[test]
fn a_removal_never_takes_the_file_that_a_renaming_put_there() {
    let Place { dir, volume } = place();
    let root = dir.path().join("root");
    for round in 0..500 {
        std::fs::write(root.join("name"), b"old").unwrap();
        std::fs::write(root.join("new"), b"new").unwrap();
        let old = volume.identify(&path("name")).unwrap().unwrap();
        let new = volume.identify(&path("new")).unwrap().unwrap();
        let begin = std::sync::Barrier::new(2);
        let (removed, renamed) = std::thread::scope(|scope| {
            let removal = scope.spawn(|| {
                begin.wait();
                volume.remove(&path("name"), old)
            });
            begin.wait();
            let renamed = volume.rename((&path("new"), new), (&path("name"), Some(old)));
            (removal.join().unwrap(), renamed)
        });
        assert!(removed.is_ok() != renamed.is_ok(), "round {round}: {removed:?} {renamed:?}");
        let left = if renamed.is_ok() { "name" } else { "new" };
        assert_eq!(std::fs::read(root.join(left)).unwrap(), b"new");
    }
}
