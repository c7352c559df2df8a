//! Streams against the real server: bytes in order, ends told truthfully, errors never lost, memory bounded.

use crate::common::{DEADLINE, Deployment, freeze, pattern, thaw, transport_of, transports};
use holdfast_client::stream::{Memory, Reader, Target, Writer};
use holdfast_client::{Config, Disposition, Error, OpenOptions, Place, Session, Status, Stripes};
use std::io::SeekFrom;
use std::os::unix::fs::FileExt;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};
use tokio::time::timeout;

const CHUNK: usize = 256 << 10;
const MEMORY: Memory = Memory { depth: 4, chunk: CHUNK };
/// How long nothing must happen to be believed.
const QUIET: Duration = Duration::from_millis(200);

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// A file through `channels` channels: written to, if it is not there.
async fn target(server: &Deployment, kind: &str, name: &str, channels: usize) -> (Session, Target) {
    let session = Session::connect(&Config::load(&server.config()).unwrap()).await.unwrap();
    let options = OpenOptions::read_write().disposition(Disposition::OpenOrCreate, 0o644);
    let open = session.open(&Place { volume: "data".into(), path: name.into() }, &options).await.unwrap();
    if channels == 1 {
        let channel = open.connect(transport_of(kind)).await.unwrap();
        return (session, open.bind(&channel).await.unwrap().into());
    }
    let stripes = Stripes::new(&open).unwrap().with_unit(CHUNK / 2);
    for _ in 0..channels {
        stripes.connect(transport_of(kind)).await.unwrap();
    }
    (session, stripes.into())
}

fn file(server: &Deployment, name: &str) -> std::fs::File {
    std::fs::File::options().read(true).write(true).open(server.volume().join(name)).unwrap()
}

#[test]
fn a_file_is_read_in_order_by_chunk_and_by_byte() {
    for (kind, channels) in transports().into_iter().flat_map(|kind| [(kind, 1), (kind, 3)]) {
        let server = Deployment::start();
        let bytes = pattern(1, 9 * CHUNK + 77);
        std::fs::write(server.volume().join("file"), &bytes).unwrap();
        runtime().block_on(async {
            let (_session, target) = target(&server, kind, "file", channels).await;
            let mut reader = Reader::new(&target, MEMORY).unwrap();
            let mut read = Vec::new();
            while let Some(chunk) = reader.next_chunk().await.unwrap() {
                assert_eq!(chunk.offset(), read.len() as u64);
                let mut part = vec![0; chunk.len()];
                chunk.copy_out(0, &mut part).unwrap();
                assert!(chunk.copy_out(1, &mut part).is_err() && !chunk.is_empty());
                read.extend(part);
            }
            assert!(read == bytes, "{kind}, {channels} channels");
            assert!(reader.next_chunk().await.unwrap().is_none(), "and stays at its end");
            // The bytes once more, in parts that fit nothing.
            reader.rewind().await.unwrap();
            read.clear();
            let mut part = [0; 1000];
            loop {
                match reader.read(&mut part).await.unwrap() {
                    0 => break,
                    count => read.extend(&part[..count]),
                }
            }
            assert!(read == bytes, "{kind}, {channels} channels");
            for (to, at) in [
                (SeekFrom::Start(5), 5),
                (SeekFrom::Current(3), 8 + 10),
                (SeekFrom::End(-7), bytes.len() as u64 - 7),
                (SeekFrom::Start(6 * CHUNK as u64), 6 * CHUNK as u64),
                (SeekFrom::Current(-1), 6 * CHUNK as u64 + 9),
                (SeekFrom::End(10), bytes.len() as u64 + 10),
            ] {
                assert_eq!(reader.seek(to).await.unwrap(), at, "{to:?}");
                let expected = bytes.get(usize::try_from(at).unwrap()..).unwrap_or_default();
                let mut ten = Vec::new();
                (&mut reader).take(10).read_to_end(&mut ten).await.unwrap();
                assert_eq!(ten, expected[..expected.len().min(10)], "{to:?}");
            }
            assert!(reader.seek(SeekFrom::Current(i64::MIN)).await.is_err(), "before the file");
        });
    }
}

#[test]
fn who_jumps_about_reads_no_more_than_he_asks_for() {
    let server = Deployment::start();
    std::fs::write(server.volume().join("file"), pattern(2, 64 * CHUNK)).unwrap();
    runtime().block_on(async {
        let (_session, target) = target(&server, "tcp", "file", 1).await;
        let read = || {
            let gauges = server.gauges();
            (gauges["dataplane.requests_read_total"], gauges["dataplane.bytes_read_total"])
        };
        let mut reader = Reader::new(&target, MEMORY).unwrap();
        // In all: what is read ahead may come at any time, also when the next place is asked for.
        let (requests, bytes) = read();
        for nth in 0..8 {
            reader.seek_to((8 * nth + 3) * CHUNK as u64);
            reader.read_u8().await.unwrap();
        }
        let (requests, bytes) = (read().0 - requests, read().1 - bytes);
        assert!(requests <= 8 * 2 && bytes <= 8 * 3 * (64 << 10), "{requests} requests for {bytes} bytes");
        // And reads on where it was read in order: so many chunks are under way that the memory is used up.
        reader.seek_to(0);
        let mut chunks = Vec::new();
        for _ in 0..8 {
            chunks.push(reader.next_chunk().await.unwrap().unwrap());
            chunks.truncate(1);
        }
        let ahead = || read().1;
        let before = ahead();
        chunks.clear();
        reader.next_chunk().await.unwrap().unwrap();
        server.until("it reads ahead", |g| g["dataplane.bytes_read_total"] > before);
    });
}

#[test]
fn memory_on_loan_is_all_there_is() {
    let server = Deployment::start();
    std::fs::write(server.volume().join("file"), pattern(3, 20 * CHUNK)).unwrap();
    runtime().block_on(async {
        let (_session, target) = target(&server, "tcp", "file", 1).await;
        let mut reader = Reader::new(&target, MEMORY).unwrap();
        let mut held = Vec::new();
        for _ in 0..MEMORY.depth {
            held.push(reader.next_chunk().await.unwrap().unwrap());
        }
        assert!(timeout(QUIET, reader.next_chunk()).await.is_err(), "no memory is left");
        let end = held.last().map(|chunk| chunk.offset() + chunk.len() as u64);
        held.remove(0);
        let next = timeout(DEADLINE, reader.next_chunk()).await.unwrap().unwrap().unwrap();
        assert_eq!(Some(next.offset()), end, "nothing was left out");
        drop((held, next));
        // A writer fills what it has while the server does nothing, and then waits.
        let mut writer = Writer::new(&target, 0, MEMORY).unwrap();
        let bytes = pattern(4, 3 * MEMORY.bytes());
        freeze(server.dataplane_pid);
        let mut taken = 0;
        while let Ok(count) =
            timeout(QUIET, tokio::io::AsyncWriteExt::write(&mut writer, &bytes[taken..])).await
        {
            taken += count.unwrap();
        }
        assert_eq!(taken, MEMORY.bytes());
        thaw(server.dataplane_pid);
        writer.write_all(&bytes[taken..]).await.unwrap();
        writer.shutdown().await.unwrap();
        assert!(std::fs::read(server.volume().join("file")).unwrap()[..bytes.len()] == bytes);
    });
}

#[test]
fn the_end_is_where_the_file_ends_by_then() {
    let server = Deployment::start();
    let bytes = pattern(5, 3 * CHUNK + 10);
    std::fs::write(server.volume().join("file"), &bytes).unwrap();
    runtime().block_on(async {
        let (_session, target) = target(&server, "tcp", "file", 2).await;
        let mut reader = Reader::new(&target, MEMORY).unwrap();
        let mut read = Vec::new();
        reader.read_to_end(&mut read).await.unwrap();
        assert!(read == bytes);
        // It grows: the next look goes on there.
        let more = pattern(6, 2 * CHUNK);
        file(&server, "file").write_all_at(&more, bytes.len() as u64).unwrap();
        read.clear();
        reader.read_to_end(&mut read).await.unwrap();
        assert!(read == more, "{} bytes more", read.len());
        // It shrinks below what was read: there is nothing, and nothing is made up.
        reader.rewind().await.unwrap();
        let first = reader.next_chunk().await.unwrap().unwrap();
        let seen = first.len();
        drop(first);
        file(&server, "file").set_len(10).unwrap();
        let mut rest = Vec::new();
        reader.read_to_end(&mut rest).await.unwrap();
        assert!(rest.len() <= MEMORY.bytes(), "no more than was read ahead: {}", rest.len());
        assert!(rest == bytes[seen..][..rest.len()]);
        reader.rewind().await.unwrap();
        rest.clear();
        reader.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, bytes[..10]);
    });
}

#[test]
fn a_file_is_written_in_order_and_durable_when_it_says_so() {
    for (kind, channels) in transports().into_iter().flat_map(|kind| [(kind, 1), (kind, 3)]) {
        let server = Deployment::start();
        let bytes = pattern(7, 9 * CHUNK + 77);
        runtime().block_on(async {
            let (_session, target) = target(&server, kind, "file", channels).await;
            let mut writer = Writer::new(&target, 5, MEMORY).unwrap();
            let flushes = || server.gauges()["dataplane.requests_flush_total"];
            let mut rest = &bytes[..];
            for length in [1, 1000, CHUNK, 3 * CHUNK + 1] {
                let (part, behind) = rest.split_at(length);
                writer.write(part).await.unwrap();
                rest = behind;
            }
            let before = flushes();
            writer.flush().await.unwrap();
            assert_eq!(flushes(), before + 1);
            let done = bytes.len() - rest.len();
            assert_eq!(writer.position(), 5 + done as u64);
            assert!(std::fs::read(server.volume().join("file")).unwrap()[5..] == bytes[..done]);
            // Chunks that are filled in place, between others.
            let chunk = writer.chunk().await.unwrap();
            let (part, behind) = rest.split_at(CHUNK - 3);
            chunk.copy_in(0, part).unwrap();
            assert!(chunk.copy_in(5, part).is_err(), "beyond its end");
            writer.write_chunk(chunk, part.len()).await.unwrap();
            AsyncWriteExt::write_all(&mut writer, behind).await.unwrap();
            AsyncWriteExt::shutdown(&mut writer).await.unwrap();
            assert!(std::fs::read(server.volume().join("file")).unwrap()[5..] == bytes);
            assert!(writer.write(b"x").await.is_err(), "it was shut down");
            target.unbind().await.unwrap();
        });
    }
}

#[test]
fn an_error_behind_the_application_is_told_at_every_later_step() {
    let server = Deployment::start();
    std::fs::write(server.volume().join("file"), b"as it is").unwrap();
    runtime().block_on(async {
        let session = Session::connect(&Config::load(&server.config()).unwrap()).await.unwrap();
        let place = Place { volume: "data".into(), path: "file".into() };
        let open = session.open(&place, &OpenOptions::read()).await.unwrap();
        let binding = open.bind(&open.connect(transport_of("tcp")).await.unwrap()).await.unwrap();
        let mut writer = Writer::new(&binding, 0, MEMORY).unwrap();
        writer.write(b"taken").await.unwrap();
        let error = writer.flush().await.unwrap_err();
        assert_eq!(error.status(), Some(Status::AccessDenied), "the first as it is: {error}");
        let words = error.to_string();
        for error in [
            writer.flush().await.unwrap_err(),
            writer.write(b"more").await.unwrap_err(),
            writer.chunk().await.unwrap_err(),
            writer.shutdown().await.unwrap_err(),
        ] {
            assert!(matches!(&error, Error::Usage(text) if text.contains(&words)), "{error}");
        }
        let error = AsyncWriteExt::shutdown(&mut writer).await.unwrap_err();
        assert!(error.to_string().contains(&words), "{error}");
        // Without a flush it is told at the latest when memory is needed.
        let mut writer = Writer::new(&binding, 0, MEMORY).unwrap();
        let error = writer.write(&pattern(8, 2 * MEMORY.bytes())).await.unwrap_err();
        assert_eq!(error.status(), Some(Status::AccessDenied));
        assert_eq!(std::fs::read(server.volume().join("file")).unwrap(), b"as it is");
    });
}

#[test]
fn a_flush_that_was_given_up_does_not_stand_for_what_came_after_it() {
    let server = Deployment::start();
    runtime().block_on(async {
        let (_session, target) = target(&server, "tcp", "file", 1).await;
        let mut writer = Writer::new(&target, 0, MEMORY).unwrap();
        writer.write(b"before ").await.unwrap();
        // Its write is answered, and the flush is under way when it is given up.
        let flushed = timeout(QUIET, async {
            while server.gauges()["dataplane.requests_write_total"] == 0 {
                let _ = timeout(Duration::from_millis(1), writer.flush()).await;
            }
        });
        let _ = flushed.await;
        freeze(server.dataplane_pid);
        writer.write(b"first ").await.unwrap();
        assert!(timeout(QUIET, writer.flush()).await.is_err());
        writer.write(b"second").await.unwrap();
        assert!(timeout(QUIET, writer.flush()).await.is_err());
        thaw(server.dataplane_pid);
        writer.flush().await.unwrap();
        assert_eq!(std::fs::read(server.volume().join("file")).unwrap(), b"before first second");
    });
}

#[test]
fn streams_go_on_over_a_data_plane_that_is_killed() {
    for kind in transports() {
        let mut server = Deployment::start();
        let bytes = pattern(9, 40 * CHUNK);
        runtime().block_on(async {
            let (_session, target) = target(&server, kind, "file", 2).await;
            let mut writer = Writer::new(&target, 0, MEMORY).unwrap();
            for (nth, part) in bytes.chunks(10 * CHUNK).enumerate() {
                writer.write(part).await.unwrap();
                if nth < 2 {
                    server.kill_dataplane();
                }
                if nth == 0 {
                    tokio::task::block_in_place(|| server.await_planes());
                }
            }
            tokio::task::block_in_place(|| server.await_planes());
            writer.shutdown().await.unwrap();
            let mut reader = Reader::new(&target, MEMORY).unwrap();
            let mut read = vec![0; 5 * CHUNK];
            reader.read_exact(&mut read).await.unwrap();
            server.kill_dataplane();
            reader.read_to_end(&mut read).await.unwrap();
            assert!(read == bytes, "{kind}");
            tokio::task::block_in_place(|| server.await_planes());
        });
    }
}
