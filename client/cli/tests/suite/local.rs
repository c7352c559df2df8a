//! A client on the server's own host, with real processes: the Unix socket, and the descriptor itself where the volume gives it.

use crate::common::{DEADLINE, Deployment, Wish, pattern, rdma_address};
use holdfast_client::{
    Access, Binding, Config, Disposition, Error, Open, OpenOptions, Place, Region, Session, ShareMode,
    Status, Transport, TransportKind,
};
use std::fs::File;
use std::time::Instant;

const SIZE: usize = 3 << 20;
const GIVEN: &str = "dataplane.descriptors_given_total";
const READS: &str = "dataplane.requests_read_total";

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn place() -> Place {
    Place { volume: "data".into(), path: "f".into() }
}

/// A server with such a volume, and a file of it with that content.
fn server(settings: &'static [(&'static str, &'static str)]) -> (Deployment, Vec<u8>) {
    let server = Deployment::with(&Wish { settings, ..Wish::default() });
    let content = pattern(9, SIZE);
    std::fs::write(server.volume().join("f"), &content).unwrap();
    (server, content)
}

async fn open(server: &Deployment, options: OpenOptions) -> Open {
    let session = Session::connect(&Config::load(&server.config()).unwrap()).await.unwrap();
    session.open(&place(), &options.disposition(Disposition::Open, 0)).await.unwrap()
}

async fn bound(open: &Open, transport: Transport) -> Binding {
    open.bind(&open.connect(transport).await.unwrap()).await.unwrap()
}

/// Reads a range, and holds it against what is there.
async fn reads_right(binding: &Binding, content: &[u8], at: usize, length: usize) {
    let region = Region::allocate(length.max(1)).unwrap();
    let count = binding.read_at(&region, 0..length, at as u64).await.unwrap();
    let wanted = content.get(at..).unwrap_or_default();
    let wanted = &wanted[..wanted.len().min(length)];
    let mut bytes = vec![0; count];
    region.copy_out(0, &mut bytes).unwrap();
    assert!(bytes == wanted, "{count} bytes from {at} on, of {}", wanted.len());
}

async fn reads_everything(binding: &Binding, content: &[u8]) {
    for (at, length) in
        [(0, 4096), (5, 1), (SIZE - 10, 4096), (SIZE, 100), (SIZE + 9, 100), (0, 2 * SIZE), (7, 0)]
    {
        reads_right(binding, content, at, length).await;
    }
    let region = Region::allocate(64 << 10).unwrap();
    let mut in_flight = Vec::new();
    for n in 0..8usize {
        in_flight
            .push(binding.submit_read(&region, n * 8192..(n + 1) * 8192, n as u64 * 70_000).await.unwrap());
    }
    for (n, request) in in_flight.into_iter().enumerate() {
        assert_eq!(request.await.unwrap(), 8192);
        let mut bytes = vec![0; 8192];
        region.copy_out(n * 8192, &mut bytes).unwrap();
        assert!(bytes == content[n * 70_000..n * 70_000 + 8192], "request {n}");
    }
}

#[test]
fn auto_takes_the_socket_and_goes_on_without_it() {
    let (server, content) = server(&[]);
    runtime().block_on(async {
        let open = open(&server, OpenOptions::read_write()).await;
        let channel = open.connect(Transport::Auto).await.unwrap();
        assert_eq!((channel.transport(), channel.fallback_reason()), (TransportKind::Local, None));
        let binding = open.bind(&channel).await.unwrap();
        reads_everything(&binding, &content).await;
        let region = Region::allocate(SIZE).unwrap();
        region.copy_in(0, &content).unwrap();
        binding.write_all(&region, 0..SIZE, SIZE as u64).await.unwrap();
        binding.flush().await.unwrap();
        assert!(std::fs::read(server.volume().join("f")).unwrap() == [&content[..], &content[..]].concat());
        // A client that cannot reach the socket has the other ways.
        std::fs::remove_file(server.home().join("state/local.sock")).unwrap();
        let other = open.connect(Transport::Auto).await.unwrap();
        let wanted = if rdma_address().is_some() { TransportKind::Verbs } else { TransportKind::Tcp };
        assert_eq!(other.transport(), wanted);
        reads_right(&open.bind(&other).await.unwrap(), &content, 0, 4096).await;
        // The channel over it lives.
        reads_right(&binding, &content, 0, 4096).await;
    });
}

#[test]
fn an_immutable_volume_gives_descriptors_and_reads_go_past_the_server() {
    let (server, content) = server(&[("immutable", "true")]);
    runtime().block_on(async {
        let open = open(&server, OpenOptions::read()).await;
        let direct = bound(&open, Transport::Auto).await;
        reads_everything(&direct, &content).await;
        // Out of the page cache, as far as the file system lets go: then a thread waits for the disk.
        let file = File::open(server.volume().join("f")).unwrap();
        file.sync_all().unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        reads_everything(&direct, &content).await;
        let gauges = server.gauges();
        assert_eq!((gauges[GIVEN], gauges[READS]), (1, 0), "no read was the data plane's");
        // The same open over tcp: read by the server, and the same bytes.
        let served = bound(&open, Transport::Tcp).await;
        reads_everything(&served, &content).await;
        assert_eq!(server.gauges()[GIVEN], 1);
        assert!(server.gauges()[READS] > 0);
        // What is open for reading writes nothing, and nobody opens it for more.
        let region = Region::allocate(10).unwrap();
        let refused = direct.write_at(&region, 0..10, 0).await.unwrap_err();
        assert_eq!(refused.status(), Some(Status::AccessDenied), "{refused}");
        let options = OpenOptions::read_write().disposition(Disposition::Open, 0);
        let refused = open.session().open(&place(), &options).await.err().unwrap();
        assert_eq!(refused.status(), Some(Status::ReadOnly), "{refused}");
        let refused = open.session().remove(&place()).await.unwrap_err();
        assert_eq!(refused.status(), Some(Status::ReadOnly), "{refused}");
        // Given back, it is not read any more, though a descriptor is there.
        direct.unbind().await.unwrap();
        let over = direct.read_at(&region, 0..10, 0).await.unwrap_err();
        assert_eq!(over.status(), Some(Status::NotBound), "{over}");
    });
}

#[test]
fn no_descriptor_is_given_unless_the_volume_says_so_and_the_open_only_reads() {
    let (plain, content) = server(&[]);
    let (trusting, _) = server(&[("local_descriptors", "true")]);
    runtime().block_on(async {
        let open_plain = open(&plain, OpenOptions::read()).await;
        reads_everything(&bound(&open_plain, Transport::Local).await, &content).await;
        assert_eq!(plain.gauges()[GIVEN], 0);
        assert!(plain.gauges()[READS] > 0);

        let both = open(&trusting, OpenOptions::read_write()).await;
        reads_everything(&bound(&both, Transport::Local).await, &content).await;
        let channel = both.connect(Transport::Local).await.unwrap();
        let less = both.bind_with_access(&channel, Access::READ).await.unwrap();
        reads_everything(&less, &content).await;
        assert_eq!(trusting.gauges()[GIVEN], 0, "that descriptor could write");
        let before = trusting.gauges()[READS];
        assert!(before > 0);
        let reads = open(&trusting, OpenOptions::read()).await;
        reads_everything(&bound(&reads, Transport::Local).await, &content).await;
        assert_eq!((trusting.gauges()[GIVEN], trusting.gauges()[READS]), (1, before));
    });
}

#[test]
fn what_became_of_the_open_ends_the_reading_too() {
    let (server, content) = server(&[("local_descriptors", "true")]);
    runtime().block_on(async {
        let reader = open(&server, OpenOptions::read().share(ShareMode::READ)).await;
        let binding = bound(&reader, Transport::Local).await;
        reads_right(&binding, &content, 0, 4096).await;
        assert_eq!(server.gauges()[GIVEN], 1);
        // It shares no writing, and holds that up until it is closed.
        let session = Session::connect(&Config::load(&server.config()).unwrap()).await.unwrap();
        let writes = OpenOptions::read_write().disposition(Disposition::Open, 0);
        let refused = session.open(&place(), &writes).await.err().and_then(|e: Error| e.status());
        assert_eq!(refused, Some(Status::ShareConflict));
        reader.close().await.unwrap();
        let region = Region::allocate(4096).unwrap();
        assert!(binding.read_at(&region, 0..4096, 0).await.is_err(), "it was closed");
        session.open(&place(), &writes).await.unwrap().close().await.unwrap();

        // Closed by force, which its client did not ask for.
        let reader = open(&server, OpenOptions::read()).await;
        let binding = bound(&reader, Transport::Local).await;
        reads_right(&binding, &content, 0, 4096).await;
        server.ok(&["opens", "--close", &reader.id().to_string()]);
        let since = Instant::now();
        while binding.read_at(&region, 0..4096, 0).await.is_ok() {
            assert!(since.elapsed() < DEADLINE, "a fenced binding reads on");
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    });
}

#[test]
fn a_file_that_is_cut_short_gives_short_reads() {
    let (server, content) = server(&[("local_descriptors", "true")]);
    runtime().block_on(async {
        let reader = open(&server, OpenOptions::read()).await;
        let binding = bound(&reader, Transport::Local).await;
        reads_right(&binding, &content, 0, SIZE).await;
        let file = std::fs::OpenOptions::new().write(true).open(server.volume().join("f")).unwrap();
        for size in [SIZE - 1, 10_000, 1, 0] {
            file.set_len(size as u64).unwrap();
            for (at, length) in [(0, SIZE), (4096, 8192), (size.saturating_sub(1), 100)] {
                reads_right(&binding, &content[..size], at, length).await;
            }
        }
        assert_eq!((server.gauges()[GIVEN], server.gauges()[READS]), (1, 0));
    });
}

#[test]
fn a_killed_data_plane_is_found_again_over_the_socket() {
    for (settings, given) in [(&[] as &[_], 0), (&[("local_descriptors", "true")] as &[_], 1)] {
        let (mut server, content) = server(settings);
        runtime().block_on(async {
            let reader = open(&server, OpenOptions::read()).await;
            let binding = bound(&reader, Transport::Local).await;
            let first = binding.handle();
            reads_everything(&binding, &content).await;
            server.kill_dataplane();
            server.await_planes();
            // Once it has heard of the end it binds again: until then a descriptor reads what is there.
            let since = Instant::now();
            while binding.handle() == first {
                reads_right(&binding, &content, 4096, 4096).await;
                assert!(since.elapsed() < DEADLINE, "not bound again");
            }
            let before = server.gauges();
            reads_everything(&binding, &content).await;
            let after = server.gauges();
            assert_eq!(after[GIVEN], given);
            assert_eq!(after[READS] == before[READS], given == 1, "{after:?}");
        });
    }
}

/// With ever fewer descriptors allowed to the client: it reads the right bytes, by itself or served, or says that it has too few.
#[test]
fn a_client_without_room_for_the_descriptor_is_served_and_nothing_leaks() {
    let (server, content) = server(&[("local_descriptors", "true")]);
    let open_at_server = || std::fs::read_dir(format!("/proc/{}/fd", server.dataplane_pid)).unwrap().count();
    let (mut direct, mut failed) = (0, 0);
    let mut before = None;
    for limit in (6..64).rev() {
        let reads = server.gauges()[READS];
        let mut cat = std::process::Command::new("prlimit");
        cat.arg(format!("--nofile={limit}:{limit}")).arg(crate::common::program("holdfast"));
        cat.arg("--config").arg(server.config()).args(["cat", "data:/f"]);
        let output = cat.output().unwrap();
        if !output.status.success() {
            failed += 1;
            if failed > 3 {
                break;
            }
            continue;
        }
        assert!(output.stdout == content, "limit {limit}");
        if server.gauges()[READS] == reads {
            direct += 1;
        }
        before.get_or_insert_with(open_at_server);
    }
    assert!(direct > 0, "none was given one");
    assert!(failed > 0, "none had too little room");
    let since = Instant::now();
    while open_at_server() > before.unwrap() {
        assert!(since.elapsed() < DEADLINE, "the server keeps what its clients had");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}
