//! The main job, with the real programs: trees in and out over every transport and MAC policy there is.

use crate::common::{Deployment, Wish, pattern, transports};
use std::path::Path;

/// Files of every awkward size, directories, symbolic links, modes.
fn make_tree(root: &Path) {
    for (n, size) in
        [0usize, 1, 4095, 4096, 4097, 65_536, 262_144, 262_145, 3_000_001].into_iter().enumerate()
    {
        let dir = root.join(format!("d{}/e", n % 3));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join(format!("file {size}")), pattern(n as u64, size)).unwrap();
    }
    std::fs::create_dir_all(root.join("empty")).unwrap();
    std::os::unix::fs::symlink("d0/e", root.join("link")).unwrap();
    let script = root.join("d1/e/run");
    std::fs::write(&script, "#!/bin/sh\n").unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o751)).unwrap();
}

fn same_tree(a: &Path, b: &Path) {
    let list = |dir: &Path| {
        let mut names: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(list(a), list(b), "{} and {}", a.display(), b.display());
    for name in list(a) {
        let (a, b) = (a.join(&name), b.join(&name));
        let (ma, mb) = (a.symlink_metadata().unwrap(), b.symlink_metadata().unwrap());
        assert_eq!(ma.file_type(), mb.file_type(), "{}", b.display());
        if ma.is_symlink() {
            assert_eq!(std::fs::read_link(&a).unwrap(), std::fs::read_link(&b).unwrap());
        } else if ma.is_dir() {
            same_tree(&a, &b);
        } else {
            assert!(std::fs::read(&a).unwrap() == std::fs::read(&b).unwrap(), "{} differs", b.display());
            assert_eq!(ma.modified().unwrap(), mb.modified().unwrap(), "{}", b.display());
            let mode = std::os::unix::fs::PermissionsExt::mode;
            assert_eq!(mode(&ma.permissions()), mode(&mb.permissions()), "{}", b.display());
        }
    }
}

#[test]
fn trees_go_in_and_out_over_every_transport() {
    let mut server = Deployment::start();
    let source = server.scratch("source");
    make_tree(&source);
    for transport in transports() {
        let inside = format!("data:/{transport}");
        let back = server.scratch(&format!("back-{transport}"));
        let json =
            server.ok(&["cp", "-r", "--json", "--transport", transport, source.to_str().unwrap(), &inside]);
        let report: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(report["transport"], transport, "{json}");
        assert_eq!(report["files"], 10, "{json}");
        assert_eq!(
            (&report["opens"], &report["binds"]),
            (&10.into(), &9.into()),
            "the empty file needs no bind: {json}"
        );
        same_tree(&source, &server.volume().join(transport));
        server.ok(&["cp", "-r", "--transport", transport, &inside, back.to_str().unwrap()]);
        same_tree(&source, &back);
    }
    // The server hears of the end of a process's channels from the kernel, a moment later.
    server.until("nothing is left", |g| {
        (g["control.opens"], g["dataplane.bindings"], g["dataplane.channels"]) == (0, 0, 0)
    });
    assert!(server.stop().success(), "serve ends well on SIGTERM:\n{}", server.log());
}

#[test]
fn every_mac_policy_carries_the_same_bytes() {
    for policy in ["none", "payload", "sealed"] {
        let server = Deployment::with(&Wish { mac_policy: Some(policy), ..Wish::default() });
        let source = server.scratch("source");
        make_tree(&source);
        for transport in transports() {
            let inside = format!("data:/{transport}");
            let back = server.scratch(&format!("back-{transport}"));
            server.ok(&["cp", "-r", "--transport", transport, source.to_str().unwrap(), &inside]);
            server.ok(&["cp", "-r", "--transport", transport, &inside, back.to_str().unwrap()]);
            same_tree(&source, &back);
        }
    }
}

#[test]
fn names_are_listed_made_moved_and_removed() {
    let server = Deployment::start();
    let file = server.scratch("one");
    std::fs::write(&file, "hello\n").unwrap();
    server.ok(&["mkdir", "data:/dir"]);
    server.ok(&["cp", file.to_str().unwrap(), "data:/dir/one"]);
    assert_eq!(server.ok(&["cat", "data:/dir/one"]), "hello\n");
    assert!(server.ok(&["ls", "data:/dir"]).contains("one"));
    assert!(server.ok(&["stat", "data:/dir/one"]).contains('6'));
    server.ok(&["mv", "data:/dir/one", "data:/dir/two"]);
    assert!(server.fails(&["cat", "data:/dir/one"]).contains("no such file"));
    assert!(server.fails(&["rm", "data:/dir"]).to_lowercase().contains("not empty"));
    server.ok(&["rm", "-r", "data:/dir"]);
    assert!(!server.volume().join("dir").exists());
    assert!(server.ok(&["volumes"]).contains("data"));
    assert!(server.ok(&["df", "data:/"]).contains('%') || server.ok(&["df", "data:/"]).contains("data"));
}

#[test]
fn nothing_outside_the_volume_is_reached() {
    let server = Deployment::start();
    let outside = server.scratch("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("secret"), "secret\n").unwrap();
    std::os::unix::fs::symlink(&outside, server.volume().join("out")).unwrap();
    std::os::unix::fs::symlink(outside.join("secret"), server.volume().join("leak")).unwrap();
    for path in ["data:/out/secret", "data:/leak", "data:/../outside/secret", "data:/a/../../outside/secret"]
    {
        let said = server.fails(&["cat", path]);
        assert!(!said.contains("secret\n") || said.contains("error"), "{path}: {said}");
    }
    let local = server.scratch("local");
    std::fs::write(&local, "mine").unwrap();
    server.fails(&["cp", local.to_str().unwrap(), "data:/out/new"]);
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 1);
}

/// What `init` writes as comments are real settings: uncommented, both planes take them.
#[test]
fn every_setting_that_init_explains_is_one() {
    let server = Deployment::with(&Wish { uncomment: true, ..Wish::default() });
    assert!(server.ok(&["volumes"]).contains("data"));
}
