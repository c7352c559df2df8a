//! A volume of which opens are recorded, and which is not there any more.

use crate::common::Server;
use crate::common::client::{Client, held};
use holdfast_shared::types::Verdict;
use holdfast_shared::wire::control::{Open, Place};

#[tokio::test(flavor = "multi_thread")]
async fn crs_08_a_volume_that_is_not_there_stops_the_start() {
    let mut server = Server::start();
    let mut client = Client::connect(&server, "writer").await;
    let opens = [client.open(held("file0")).await, client.open(held("file1")).await];
    drop(client);
    server.kill();
    // As when it is not mounted: a directory stands there, and it is empty.
    let (data, away) = (server.dir.path().join("data"), server.dir.path().join("away"));
    std::fs::rename(&data, &away).unwrap();
    std::fs::create_dir(&data).unwrap();
    if rustix::fs::getxattr(&away, "user.holdfast.generation", &mut [0; 64]).is_err() {
        println!("the file system of {} has no extended attributes", away.display());
        return;
    }
    // Its files can still be reached by handle: nothing is lost.
    assert_eq!(server.start_again()["recovered"], 2);
    server.kill();
    std::fs::remove_dir(&data).unwrap();
    std::fs::rename(&away, &data).unwrap();
    assert_eq!(server.start_again()["recovered"], 2);
    let mut client = Client::connect(&server, "writer").await;
    assert_eq!(client.resumed(&opens[0]).await.verdict, Verdict::Unchanged);
    drop(client);
    server.kill();

    // Another file system stands there.
    let shm = tempfile::tempdir_in("/dev/shm").unwrap();
    std::fs::remove_dir_all(&data).unwrap();
    std::os::unix::fs::symlink(shm.path(), &data).unwrap();
    for _ in 0..2 {
        let words = server.refuses_to_start();
        assert!(words.contains("volume \"data\"") && words.contains("2 opens"), "{words}");
        assert!(words.contains("mount it") && words.contains("--accept-lost-volumes"), "{words}");
    }

    // Not configured any more.
    let config = server.dir.path().join("control.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    let (begin, end) = (text.find("[[volume]]").unwrap(), text.rfind("[[volume]]").unwrap());
    std::fs::write(&config, format!("{}{}", &text[..begin], &text[end..])).unwrap();
    let words = server.refuses_to_start();
    assert!(words.contains("configure it again") && words.contains("--accept-lost-volumes"), "{words}");
    let ready = server.begin(&["--accept-lost-volumes"]).ready(&mut server);
    assert_eq!((ready["recovered"].as_u64(), ready["lost"].as_u64()), (Some(0), Some(2)));
    // What is lost is lost, as soon as the journal says so: nothing stops the next start.
    let mut client = Client::connect(&server, "writer").await;
    let place = Place { volume: "other".into(), path: "new".into() };
    client.open(Open { place, ..held("new") }).await;
    drop(client);
    server.restart();
}
