//! Peers that are nobody, talk nonsense, or nothing at all; start and stop.

use crate::common::client::{Client, hello, open, receive, send_frame};
use crate::common::{Authority, Server};
use holdfast_shared::types::Status;
use holdfast_shared::wire::control::{Hello, Reply, Request, RequestMessage};
use holdfast_shared::wire::to_cbor;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The server hangs up before it says anything.
async fn is_dropped(server: &Server, identity: Option<&(String, String)>) {
    match Client::handshake(server, identity).await {
        Err(_) => {}
        // In TLS 1.3 the client is done before the server has looked at its certificate.
        Ok(mut stream) => {
            send_frame(&mut stream, &to_cbor(&RequestMessage { id: 1, request: hello() })).await;
            assert!(receive(&mut stream).await.is_none());
        }
    }
}

async fn serves(server: &Server) {
    let mut client = Client::connect(server, "writer").await;
    let opened = client.open(open("probe")).await;
    client.close(opened.open).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_gets_in_without_a_certificate_of_our_authority() {
    let server = Server::start();
    is_dropped(&server, None).await;
    is_dropped(&server, Some(&Authority::new().client("writer"))).await;
    // A server's certificate is not a client's.
    let wrong_use = server.ca.issue("writer", rcgen::ExtendedKeyUsagePurpose::ServerAuth);
    is_dropped(&server, Some(&wrong_use)).await;
    assert_eq!(server.gauge("handshakes_failed_total"), 3);
    serves(&server).await;
    server.is_at_baseline();
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_is_told_so_and_dropped() {
    let server = Server::start();
    let told = |reply: Option<holdfast_shared::wire::control::ReplyMessage>| match reply.unwrap().reply {
        Reply::Refused(refusal) => refusal.status,
        other => panic!("not refused: {other:?}"),
    };
    let identity = server.ca.client("writer");
    // Before hello.
    let ping = to_cbor(&RequestMessage { id: 1, request: Request::Ping });
    let old = Hello { version_min: 7, version_max: 9, client: String::new(), process: Default::default() };
    let old = to_cbor(&RequestMessage { id: 1, request: Request::Hello(old) });
    let cases: [(&[u8], Status); 5] = [
        (b"", Status::Protocol),
        (b"garbage", Status::Protocol),
        (&[0x9f; 60_000], Status::Protocol),
        (&ping, Status::Protocol),
        (&old, Status::Version),
    ];
    for (bytes, status) in cases {
        let mut stream = Client::handshake(&server, Some(&identity)).await.unwrap();
        send_frame(&mut stream, bytes).await;
        assert_eq!(told(receive(&mut stream).await), status);
        assert!(receive(&mut stream).await.is_none());
    }
    // After it: a length beyond the limit is refused without waiting for the bytes.
    let mut client = Client::connect(&server, "writer").await;
    client.open(open("file")).await;
    client.stream.write_all(&u32::MAX.to_le_bytes()).await.unwrap();
    client.stream.flush().await.unwrap();
    assert_eq!(told(client.receive().await), Status::Protocol);
    assert!(client.receive().await.is_none());
    // A second hello is refused, and nothing more.
    let mut client = Client::connect(&server, "writer").await;
    assert_eq!(client.refused(hello()).await, Status::Protocol);
    assert_eq!(client.ask(Request::Ping).await, Reply::Done);
    drop(client);
    // Not even TLS.
    let mut plain = TcpStream::connect(server.address).await.unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut rest = Vec::new();
    let _ = plain.read_to_end(&mut rest).await;
    serves(&server).await;
    server.is_at_baseline();
}

#[tokio::test(flavor = "multi_thread")]
async fn half_open_handshakes_are_bounded_and_end() {
    let server =
        Server::with_limits("half_open_handshakes = 6\nhalf_open_per_address = 4\nhandshake_ms = 1500");
    let start = Instant::now();
    let mut idle = Vec::new();
    for _ in 0..20 {
        idle.push(TcpStream::connect(server.address).await.unwrap());
    }
    server.await_gauge("connections_dropped_total", 16);
    assert_eq!((server.gauge("half_open_handshakes"), server.gauge("connections")), (4, 4));
    server.await_gauge("half_open_handshakes", 0);
    assert!(start.elapsed() >= Duration::from_millis(1000), "they had their time");
    assert_eq!(server.gauge("handshakes_failed_total"), 4);
    // TLS without a hello is half-open too.
    let identity = server.ca.client("writer");
    let mut silent = Client::handshake(&server, Some(&identity)).await.unwrap();
    let reply = receive(&mut silent).await.unwrap();
    assert!(matches!(reply.reply, Reply::Refused(refusal) if refusal.status == Status::TimedOut));
    serves(&server).await;
    drop((idle, silent));
    server.is_at_baseline();
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_keep_nobody_out() {
    let server = Server::with_limits("half_open_handshakes = 6\nhalf_open_per_address = 6");
    let mut idle = Vec::new();
    // From other addresses, as many as there are places; one of them TLS without a hello, the oldest.
    idle.push(Client::handshake(&server, Some(&server.ca.client("writer"))).await.unwrap());
    let mut plain = Vec::new();
    for n in 2..7u8 {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind(std::net::SocketAddr::from(([127, 0, 0, n], 0))).unwrap();
        plain.push(socket.connect(server.address).await.unwrap());
    }
    server.await_gauge("half_open_handshakes", 6);
    let start = Instant::now();
    serves(&server).await;
    serves(&server).await;
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    server.await_gauge("half_open_evicted_total", 1);
    assert!(receive(&mut idle[0]).await.is_none(), "the oldest went first");
    drop((idle, plain));
    server.is_at_baseline();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_never_ends_ends_the_session() {
    let server = Server::with_limits("message_ms = 300");
    let mut client = Client::connect(&server, "writer").await;
    client.open(open("file")).await;
    // Silence between messages is all right.
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(client.ask(Request::Ping).await, Reply::Done);
    client.stream.write_all(&[100, 0, 0, 0, 1]).await.unwrap();
    client.stream.flush().await.unwrap();
    assert!(client.receive().await.is_none());
    server.is_at_baseline();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_takes_no_answers_loses_its_session() {
    let server = Server::with_limits("message_ms = 500");
    for n in 0..400 {
        std::fs::write(server.data(&format!("{n:04}{}", "x".repeat(200))), b"").unwrap();
    }
    let mut client = Client::connect(&server, "writer").await;
    let place = crate::common::client::at("");
    let list = holdfast_shared::wire::control::List { place, after: String::new() };
    let flood = async {
        for _ in 0..2_000 {
            client.send(Request::List(list.clone())).await;
        }
    };
    let _ = tokio::time::timeout(Duration::from_secs(5), flood).await;
    server.await_gauge("sessions", 0);
    drop(client);
    serves(&server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_stops_cleanly_and_starts_again() {
    let mut server = Server::start();
    let mut client = Client::connect(&server, "writer").await;
    client.open(open("file")).await;
    assert_eq!(server.terminate(), Some(0));
    assert!(client.receive().await.is_none());
    server.restart();
    serves(&server).await;
    // While nobody asks, nothing runs.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let ticks = |server: &Server| {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", server.pid())).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    let before = ticks(&server);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(ticks(&server) - before <= 1, "an idle server uses no CPU");
}
