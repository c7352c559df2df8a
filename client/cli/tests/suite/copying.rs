//! What `holdfast cp`, `rm` and `doctor` do when something is not as it should be: nothing good is replaced, nothing is
//! left behind, and the exit code tells.

use crate::common::{DEADLINE, Deployment, finish, freeze, pattern, signal, thaw};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant, SystemTime};

/// So small that a copy with slow settings is under way for seconds.
const LONG: usize = 64 << 20;
const SLOW: [&str; 6] = ["--depth", "1", "--parallel", "1", "--chunk", "4096"];

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Starts a slow copy, waits until its bytes move, and stops it there: [`thaw`] lets it go on.
fn under_way(server: &Deployment, from: &str, to: &str) -> Child {
    let moved = || {
        let gauges = server.gauges();
        gauges["dataplane.bytes_read_total"] + gauges["dataplane.bytes_written_total"]
    };
    let before = moved();
    let mut args = vec!["cp"];
    args.extend(SLOW);
    args.extend([from, to]);
    let child = server.holdfast(&args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    while moved() < before + (256 << 10) {
        assert!(start.elapsed() < DEADLINE, "the copy does not move");
        std::thread::sleep(Duration::from_millis(1));
    }
    freeze(child.id());
    assert!(moved() < before + LONG as u64, "the copy was over before it could be stopped");
    child
}

fn parts(directory: &Path) -> usize {
    let names = std::fs::read_dir(directory).unwrap().map(|e| e.unwrap().file_name());
    names.filter(|name| name.to_string_lossy().ends_with(".part")).count()
}

#[test]
fn a_source_cut_meanwhile_replaces_nothing() {
    let server = Deployment::start();
    let (local, remote) = (server.scratch("local"), server.volume().join("remote"));
    let into = server.scratch("into");
    std::fs::create_dir(&into).unwrap();
    for (source, from, to, target) in [
        (&local, text(&local), "data:/good", server.volume().join("good")),
        (&remote, "data:/remote", text(&into.join("good")), into.join("good")),
    ] {
        std::fs::write(&target, "good").unwrap();
        std::fs::write(source, pattern(1, LONG)).unwrap();
        let child = under_way(&server, from, to);
        std::fs::File::options().write(true).open(source).unwrap().set_len(0).unwrap();
        thaw(child.id());
        let output = finish(child);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains("changed size"), "{said}");
        assert_eq!(std::fs::read_to_string(&target).unwrap(), "good");
        assert_eq!(parts(target.parent().unwrap()), 0);
    }
}

#[test]
fn a_file_that_hides_its_size_is_copied_whole() {
    let server = Deployment::start();
    server.ok(&["cp", "/proc/version", "data:/version"]);
    let copied = std::fs::read_to_string(server.volume().join("version")).unwrap();
    assert_eq!(copied, std::fs::read_to_string("/proc/version").unwrap());
    assert!(!copied.is_empty());
}

#[test]
fn directories_that_were_there_keep_their_mode_and_time() {
    let server = Deployment::start();
    let (source, back) = (server.scratch("source"), server.scratch("back"));
    std::fs::create_dir(&source).unwrap();
    std::fs::write(source.join("file"), "x").unwrap();
    std::fs::create_dir(&back).unwrap();
    server.ok(&["mkdir", "data:/in"]);
    for directory in [server.volume().join("in/source"), back.join("source")] {
        std::fs::create_dir(&directory).unwrap();
        std::fs::set_permissions(&directory, PermissionsExt::from_mode(0o2771)).unwrap();
    }
    server.ok(&["cp", "-r", text(&source), "data:/in"]);
    server.ok(&["cp", "-r", "data:/in/source", text(&back)]);
    for directory in [server.volume().join("in/source"), back.join("source")] {
        assert!(directory.join("file").exists());
        assert_eq!(directory.metadata().unwrap().permissions().mode() & 0o7777, 0o2771, "{directory:?}");
    }
    // New ones get the source's.
    std::fs::set_permissions(&source, PermissionsExt::from_mode(0o750)).unwrap();
    let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    std::fs::File::open(&source).unwrap().set_modified(old).unwrap();
    server.ok(&["cp", "-r", text(&source), "data:/new"]);
    let made = server.volume().join("new").metadata().unwrap();
    assert_eq!((made.permissions().mode() & 0o777, made.modified().unwrap()), (0o750, old));
}

#[test]
fn two_sources_of_one_name_do_not_overwrite_each_other() {
    let server = Deployment::start();
    let (a, b, back) = (server.scratch("a"), server.scratch("b"), server.scratch("back"));
    for (directory, content) in [(&a, "first"), (&b, "second")] {
        std::fs::create_dir(directory).unwrap();
        std::fs::write(directory.join("same"), content).unwrap();
    }
    std::fs::create_dir(&back).unwrap();
    let (code, _, said) = server.ends(&["cp", text(&a.join("same")), text(&b.join("same")), "data:/"]);
    assert!(code == 5 && said.contains("same name"), "{code}: {said}");
    assert_eq!(server.ok(&["cat", "data:/same"]), "first");
    server.ok(&["cp", "-r", text(&b), "data:/b"]);
    let (code, _, said) = server.ends(&["cp", "data:/same", "data:/b/same", text(&back)]);
    assert!(code == 5 && said.contains("same name"), "{code}: {said}");
    assert_eq!(std::fs::read_to_string(back.join("same")).unwrap(), "first");
}

#[test]
fn special_files_are_refused_not_replaced() {
    let server = Deployment::start();
    std::fs::write(server.volume().join("file"), "x").unwrap();
    let path = server.scratch("socket");
    let _socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
    assert!(server.fails(&["cp", "data:/file", text(&path)]).contains("special file"));
    assert!(std::os::unix::fs::FileTypeExt::is_socket(&path.symlink_metadata().unwrap().file_type()));
}

#[test]
fn exit_codes_tell_all_from_some() {
    let server = Deployment::start();
    std::fs::write(server.volume().join("file"), "x").unwrap();
    let into = server.scratch("into");
    std::fs::create_dir(&into).unwrap();
    let (code, _, said) = server.ends(&["cp", "data:/missing", text(&into)]);
    assert!(code == 3 && said.contains("nothing was copied"), "{code}: {said}");
    assert_eq!(server.ends(&["cp", "/no/such/file", "data:/"]).0, 1);
    assert_eq!(server.ends(&["cp", "data:/missing", "data:/file", text(&into)]).0, 5);
    assert_eq!(server.ends(&["cp", "data:/file", text(&into)]).0, 0);
    // A volume that is not there is no directory to make.
    let (code, _, said) = server.ends(&["cp", text(&into.join("file")), "nope:/"]);
    assert!(code == 3 && said.contains("no such volume") && !said.contains("mkdir"), "{code}: {said}");
}

#[test]
fn a_doctor_who_could_move_no_data_says_so_with_the_exit_code() {
    let server = Deployment::start();
    assert_eq!(server.ends(&["doctor"]).0, 0);
    std::fs::remove_dir_all(server.volume()).unwrap();
    let (code, told, said) = server.ends(&["doctor"]);
    assert!(code != 0 && told.contains("transport none"), "{code}: {told}{said}");
}

#[test]
fn removing_ends_where_a_name_cannot_be_told() {
    let server = Deployment::start();
    let tree = server.volume().join("tree");
    std::fs::create_dir_all(tree.join("deep")).unwrap();
    std::fs::write(tree.join("plain"), "x").unwrap();
    let odd: &std::ffi::OsStr = std::os::unix::ffi::OsStrExt::from_bytes(b"odd\xff");
    std::fs::write(tree.join("deep").join(odd), "x").unwrap();
    let (code, _, said) = server.ends(&["rm", "-r", "data:/tree"]);
    assert!(code == 3 && said.contains("not UTF-8"), "{code}: {said}");
    assert!(tree.join("deep").join(odd).exists());
    std::fs::remove_file(tree.join("deep").join(odd)).unwrap();
    server.ok(&["rm", "-r", "data:/tree"]);
    assert!(!tree.exists());
}

#[test]
fn large_files_go_by_as_many_channels_as_wanted() {
    let server = Deployment::start();
    let (local, back) = (server.scratch("local"), server.scratch("back"));
    let bytes = pattern(6, LONG + 77);
    std::fs::write(&local, &bytes).unwrap();
    std::fs::write(server.scratch("small"), "small").unwrap();
    let copy = |from: &str, to: &str| {
        let told = server.ok(&["cp", "--json", "--transport", "tcp", "--channels", "3", from, to]);
        let told: serde_json::Value = serde_json::from_str(&told).unwrap();
        (told["channels"].as_u64().unwrap(), told["binds"].as_u64().unwrap())
    };
    assert_eq!(copy(text(&local), "data:/copy"), (3, 3));
    assert!(std::fs::read(server.volume().join("copy")).unwrap() == bytes);
    assert_eq!(copy("data:/copy", text(&back)), (3, 3));
    assert!(std::fs::read(&back).unwrap() == bytes);
    assert_eq!(copy(text(&server.scratch("small")), "data:/small"), (1, 1), "not worth it");
}

#[test]
fn a_copy_survives_planes_that_are_killed() {
    let mut server = Deployment::start();
    let (local, back) = (server.scratch("local"), server.scratch("back"));
    let bytes = pattern(4, LONG);
    std::fs::write(&local, &bytes).unwrap();
    for planes in [[true, false], [false, true], [true, true]] {
        for (from, to, copy) in [
            (text(&local), "data:/copy", server.volume().join("copy")),
            ("data:/copy", text(&back), back.clone()),
        ] {
            let _ = std::fs::remove_file(&copy);
            let child = under_way(&server, from, to);
            server.kill(planes);
            thaw(child.id());
            server.await_planes();
            let output = finish(child);
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{planes:?} killed, {from} to {to}: {said}");
            assert!(std::fs::read(&copy).unwrap() == bytes, "{planes:?} killed, {from} to {to}: other bytes");
            assert_eq!(parts(&server.volume()), 0);
        }
    }
    server.until("nothing is left", |g| g["control.opens"] == 0 && g["dataplane.bindings"] == 0);
}

#[test]
fn what_a_server_that_stays_away_leaves_behind_is_named() {
    let mut server = Deployment::start();
    let config = std::fs::read_to_string(server.config()).unwrap();
    let soft = config
        .replace("#recovery = \"hard\"", "recovery = \"soft\"")
        .replace("#soft_ms = 30000", "soft_ms = 500");
    assert_ne!(soft, config);
    std::fs::write(server.config(), soft).unwrap();
    let local = server.scratch("local");
    std::fs::write(&local, pattern(2, LONG)).unwrap();
    let child = under_way(&server, text(&local), "data:/copy");
    server.stop();
    thaw(child.id());
    let output = finish(child);
    let said = String::from_utf8_lossy(&output.stderr);
    // 6 if a write was under way, whose fate is unknown then; else 4.
    assert!(matches!(output.status.code(), Some(4 | 6)), "{said}");
    assert!(said.contains("remove it with: holdfast rm data:/.holdfast-"), "{said}");
    assert!(!server.volume().join("copy").exists());
}

#[test]
fn an_interrupted_copy_leaves_nothing_behind() {
    let server = Deployment::start();
    let (local, into) = (server.scratch("local"), server.scratch("into"));
    std::fs::write(&local, pattern(3, LONG)).unwrap();
    std::fs::create_dir(&into).unwrap();
    server.ok(&["cp", text(&local), "data:/whole"]);
    for (from, to) in [(text(&local), "data:/copy"), ("data:/whole", text(&into.join("copy")))] {
        let child = under_way(&server, from, to);
        signal(child.id(), rustix::process::Signal::TERM);
        thaw(child.id());
        let output = finish(child);
        assert!(!output.status.success());
        assert_eq!((parts(&server.volume()), parts(&into)), (0, 0));
        assert!(!server.volume().join("copy").exists() && !into.join("copy").exists());
    }
}
