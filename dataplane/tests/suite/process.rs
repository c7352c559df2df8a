//! The process itself: its socket to a scripted control, its listener, its signals.

use crate::common::link::{CONFIG, Control, Process, an_open, bind, connect, gauge, receive, redeem, send};
use crate::common::{Msg, eventually};
use holdfast_shared::types::Status;
use holdfast_shared::wire::link::{
    Fence, LinkBinding, RedeemResult, Redeemed, Registered, ToControl, ToDataplane,
};
use rustix::net::SendFlags;
use rustix::process::{Resource, Rlimit, getrlimit};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::Duration;

#[test]
fn the_process_serves_outlives_control_and_stops_cleanly() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("link.sock");
    // Control comes later than the data plane.
    let mut process = Process::start(directory.path(), CONFIG);
    std::thread::sleep(Duration::from_millis(200));
    let control = Control::listen(&path);
    let (link, blob) = control.register();
    let ready = process.line();
    let [local, tcp] = &blob.endpoints[..] else { panic!("{:?}", blob.endpoints) };
    assert!(ready.contains(&format!("127.0.0.1:{}", tcp.port)), "{ready}");
    assert_eq!(tcp.address.as_deref(), Some("127.0.0.1"));
    let socket = directory.path().join("local.sock");
    assert_eq!(local.address.as_deref(), socket.to_str());
    assert!(ready.contains(socket.to_str().unwrap()), "{ready}");
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    assert_eq!(local.boot_id.as_deref(), Some(boot_id.trim()));

    let open = an_open(b"the content");
    let fds = gauge(&link, "open_fds");
    let mut client = connect(&ready);
    assert_eq!(client.hello.unwrap().instance, blob.instance);
    let binding = bind(&mut client, &link, &open, 1);
    assert_eq!(client.read(binding, 4, 100), (Status::Ok, b"content".to_vec()));
    assert_eq!(client.write_inline(binding, 0, b"THE"), (Status::Ok, 3));
    assert_eq!(client.flush(binding), Status::Ok);
    let mut three = [0; 3];
    open.file.read_exact_at(&mut three, 0).unwrap();
    assert_eq!(&three, b"THE");
    assert!(gauge(&link, "heap_allocations_total") > 0);
    assert_eq!(gauge(&link, "bytes_read_total"), 7);
    assert!(gauge(&link, "open_fds") >= fds + 2, "a socket and a descriptor");

    // A fence, confirmed on the link and told to the client.
    let fence = Fence { binding: LinkBinding(1), epoch: 1, reason: Status::Fenced };
    send(&link, &ToDataplane::Fence(fence), None);
    assert_eq!(receive(&link), ToControl::Fenced(fence));
    assert_eq!(client.next(), Some(Msg::Notice { binding, status: Status::Fenced }));

    // Control goes: bindings go on, binds are refused.
    let binding = bind(&mut client, &link, &open, 2);
    drop(link);
    drop(control);
    eventually("binds are refused", || client.bind(&open) == Err(Status::Unavailable));
    assert_eq!(client.read(binding, 0, 3), (Status::Ok, b"THE".to_vec()));
    // A new control is told of them, and they go on.
    let control = Control::listen(&path);
    let (link, again, held) = control.register_held();
    assert_eq!(again, blob);
    assert_eq!(held.len(), 1);
    assert_eq!(held[0].0.binding, LinkBinding(2));
    drop(held);
    assert_eq!(client.read(binding, 0, 3), (Status::Ok, b"THE".to_vec()));
    // Until the registration is through, binds are refused as unavailable. Who answers a question about gauges is through.
    gauge(&link, "channels");
    let another = bind(&mut client, &link, &open, 3);
    assert_eq!(client.read(another, 0, 3), (Status::Ok, b"THE".to_vec()));

    // A client that is gone leaves nothing.
    drop(client);
    let mut released = [receive(&link), receive(&link)];
    released.sort_by_key(|told| format!("{told:?}"));
    assert_eq!(released, [2, 3].map(|n| ToControl::Released(LinkBinding(n))));
    eventually("the baseline", || gauge(&link, "channels") == 0 && gauge(&link, "open_fds") == fds);
    assert_eq!(gauge(&link, "buffers_free"), gauge(&link, "buffers_total"));

    // Nothing to do: no processor.
    let before = process.cpu();
    std::thread::sleep(Duration::from_secs(1));
    assert!(process.cpu() - before <= 1, "an idle process uses the processor");

    // A clean stop tells the clients.
    let mut client = connect(&ready);
    bind(&mut client, &link, &open, 4);
    process.terminate();
    client.expect_end(Status::Unavailable);
    assert!(process.child.wait().unwrap().success());
}

#[test]
fn without_room_for_a_descriptor_only_that_bind_fails() {
    let directory = tempfile::tempdir().unwrap();
    let control = Control::listen(&directory.path().join("link.sock"));
    let mut process = Process::start(directory.path(), CONFIG);
    let (link, _) = control.register();
    let ready = process.line();
    let open = an_open(b"abc");
    let mut client = connect(&ready);
    let binding = bind(&mut client, &link, &open, 1);
    let pid = rustix::process::Pid::from_child(&process.child);
    let limit = |current: Option<u64>| {
        let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
        let wanted = Rlimit { current: current.or(maximum), maximum };
        rustix::process::prlimit(Some(pid), Resource::Nofile, wanted).unwrap()
    };
    let before = limit(Some(3));
    assert_eq!(before.current, before.maximum, "it raises its limit itself");
    let refused = std::thread::scope(|scope| {
        scope.spawn(|| redeem(&link, &open, 2));
        client.bind(&open)
    });
    assert_eq!(refused, Err(Status::TooMany));
    assert_eq!(receive(&link), ToControl::Released(LinkBinding(2)), "on the same link");
    assert_eq!(client.read(binding, 0, 3), (Status::Ok, b"abc".to_vec()), "others are served");
    limit(None);
    let again = bind(&mut client, &link, &open, 3);
    assert_eq!(client.read(again, 0, 3), (Status::Ok, b"abc".to_vec()));
}

/// Not a test: what the next one runs in a process of its own.
#[test]
#[ignore = "panics on purpose, for the test below"]
fn child_that_loses_a_thread() {
    holdfast_dataplane::fault::end_on_panic();
    let _ = std::thread::spawn(|| panic!("on purpose")).join();
    std::thread::sleep(Duration::from_secs(20));
}

#[test]
fn a_process_that_loses_a_thread_ends() {
    let out = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "process::child_that_loses_a_thread", "--ignored", "--nocapture"])
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(holdfast_dataplane::fault::EXIT_CODE), "{out:?}");
}

#[test]
fn a_control_that_talks_nonsense_is_left_and_tried_again() {
    let directory = tempfile::tempdir().unwrap();
    let control = Control::listen(&directory.path().join("link.sock"));
    let mut process = Process::start(directory.path(), CONFIG);
    // Refused, garbage before and after the registration, an answer nobody asked for, a second registration.
    let link = control.accept();
    assert!(matches!(receive(&link), ToControl::Register(_)));
    send(&link, &ToDataplane::Registered(Registered { status: Status::TooMany }), None);
    let link = control.accept();
    rustix::net::send(&link, b"\xff\xff garbage", SendFlags::NOSIGNAL).unwrap();
    let (link, _) = control.register();
    let _ready = process.line();
    rustix::net::send(&link, b"garbage", SendFlags::NOSIGNAL).unwrap();
    let (link, _) = control.register();
    let result = RedeemResult::Refused(Status::BadKey);
    send(&link, &ToDataplane::Redeemed(Redeemed { id: 12345, result }), None);
    let (link, _) = control.register();
    send(&link, &ToDataplane::Registered(Registered { status: Status::Ok }), None);
    let (link, _) = control.register();
    // A descriptor with a message that wants none is closed.
    let fds = gauge(&link, "open_fds");
    let file = tempfile::tempfile().unwrap();
    send(&link, &ToDataplane::GetGauges(1), Some(&file));
    assert!(matches!(receive(&link), ToControl::Gauges(_)));
    assert_eq!(gauge(&link, "open_fds"), fds);
    // A fence of what it does not have is confirmed: nothing of it is under way.
    let fence = Fence { binding: LinkBinding(99), epoch: 1, reason: Status::Fenced };
    send(&link, &ToDataplane::Fence(fence), None);
    assert_eq!(receive(&link), ToControl::Fenced(fence));
    process.terminate();
    assert!(process.child.wait().unwrap().success());
}

#[test]
fn a_bad_configuration_says_what_is_wrong() {
    let directory = tempfile::tempdir().unwrap();
    for (config, wanted) in [
        ("[tcp]\nlissten = 1", "lissten"),
        ("[engine]\nbuffer_bytes = 1", "buffer_bytes"),
        ("[tcp]\nenabled = false\n[verbs]\nenabled = 'off'\n[local]\nenabled = false", "nowhere to listen"),
    ] {
        let file = directory.path().join("dataplane.toml");
        std::fs::write(&file, config).unwrap();
        let out = Command::new(env!("CARGO_BIN_EXE_holdfast-dataplane"))
            .arg("--config")
            .arg(&file)
            .output()
            .unwrap();
        assert!(!out.status.success());
        assert!(String::from_utf8_lossy(&out.stderr).contains(wanted), "{out:?}");
    }
}
