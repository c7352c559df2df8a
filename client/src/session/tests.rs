//! Sessions against a scripted server: real TLS on loopback, answers by script.

use super::connection::REQUESTS_MAX;
use super::*;
use crate::scripted::{Pki, Stream, file, give, opened, take, welcome};
use crate::{OpenOptions, Place, Recovery, Status};
use holdfast_shared::auth::{EXPORTER_LABEL, Secret, SessionKey};
use holdfast_shared::types::CONTROL_MESSAGE_BYTES_MAX;
use holdfast_shared::wire::control::{Refusal, ReplyMessage, RequestMessage, VERSION};
use holdfast_shared::wire::to_cbor;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio::time::timeout;

/// Starts a server that says welcome and then follows the script.
async fn serve<F, Fut>(pki: &Pki, version: u8, script: F) -> Config
where
    F: FnOnce(Stream) -> Fut + Send + 'static,
    Fut: Future<Output = ()> + Send,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (acceptor, config) = (pki.acceptor(), pki.config(listener.local_addr().unwrap()));
    tokio::spawn(async move {
        let (socket, _) = listener.accept().await.unwrap();
        // A client that does not trust us, or whom we do not trust, is not served.
        let Ok(mut stream) = acceptor.accept(socket).await else { return };
        let hello = take(&mut stream).await.unwrap();
        assert!(matches!(hello.request, Request::Hello(_)) && hello.id == 0);
        give(&mut stream, 0, welcome(version, 1)).await;
        script(stream).await;
    });
    config
}

fn refusal(status: Status) -> Reply {
    Reply::Refused(Refusal { status, detail: "why".into(), retry_ms: Some(7) })
}

#[tokio::test]
async fn replies_find_their_requests_in_any_order() {
    let pki = Pki::new();
    let config = serve(&pki, VERSION, |mut stream| async move {
        let first = take(&mut stream).await.unwrap();
        let second = take(&mut stream).await.unwrap();
        let text = |message: &RequestMessage| match &message.request {
            Request::ReadSymlink(place) => Reply::Symlink(place.path.clone()),
            other => panic!("{other:?}"),
        };
        give(&mut stream, second.id, text(&second)).await;
        give(&mut stream, first.id, text(&first)).await;
        let third = take(&mut stream).await.unwrap();
        give(&mut stream, third.id, refusal(Status::Busy)).await;
        assert!(take(&mut stream).await.is_none(), "the client said goodbye");
    })
    .await;
    let session = Session::connect(&config).await.unwrap();
    assert_eq!((session.principal(), session.opens_max()), ("me", 5));
    let place = |path: &str| Place { volume: "v".into(), path: path.into() };
    let (a, b) = (place("a"), place("b"));
    let (a, b) = tokio::join!(session.read_symlink(&a), session.read_symlink(&b));
    assert_eq!((a.unwrap(), b.unwrap()), ("a".into(), "b".into()));
    let error = session.ping().await.unwrap_err();
    assert!(matches!(&error, Error::Refused(r) if r.retry == Some(Duration::from_millis(7))), "{error}");
    session.close().await;
}

#[tokio::test]
async fn both_ends_export_the_same_session_key() {
    let pki = Pki::new();
    let (sender, receiver) = oneshot::channel();
    let config = serve(&pki, VERSION, |mut stream| async move {
        let key = stream.get_ref().1.export_keying_material([0; 32], EXPORTER_LABEL, None).unwrap();
        sender.send(SessionKey::new(Secret::new(key))).unwrap();
        take(&mut stream).await;
    })
    .await;
    let session = Session::connect(&config).await.unwrap();
    let open = crate::OpenId([3; 16]);
    let connection = session.connection(None, &mut Patience::new(session.config())).await.unwrap();
    assert_eq!(connection.key().bind_secret(open), receiver.await.unwrap().bind_secret(open));
}

#[tokio::test]
async fn a_server_that_breaks_the_protocol_ends_the_session() {
    for (what, bytes) in [
        ("an answer to nothing", to_cbor(&ReplyMessage { id: 99, reply: Reply::Done })),
        ("no message", vec![0xff; 5]),
        ("more than the limit", vec![0; CONTROL_MESSAGE_BYTES_MAX + 1]),
    ] {
        let pki = Pki::new();
        let config = serve(&pki, VERSION, |mut stream| async move {
            take(&mut stream).await.unwrap();
            stream.write_u32_le(u32::try_from(bytes.len()).unwrap()).await.unwrap();
            // The client may hang up before it has read all.
            let _ = stream.write_all(&bytes).await;
            let _ = stream.flush().await;
            take(&mut stream).await;
        })
        .await;
        let session = Session::connect(&config).await.unwrap();
        let error = session.ping().await.unwrap_err();
        assert!(matches!(error, Error::Ended { why: Ended::Misbehaved(_), .. }), "{what}: {error}");
        assert!(session.ping().await.is_err(), "and stays ended");
    }
}

#[tokio::test]
async fn a_vanished_server_is_an_error_for_all_who_wait() {
    let pki = Pki::new();
    let config = serve(&pki, VERSION, |mut stream| async move {
        take(&mut stream).await.unwrap();
        take(&mut stream).await.unwrap();
    })
    .await;
    let config = Config { recovery: Recovery::Soft, soft_ms: 300, ..config };
    let session = Session::connect(&config).await.unwrap();
    let (a, b) = tokio::join!(session.ping(), session.ping());
    for error in [a.unwrap_err(), b.unwrap_err()] {
        assert!(matches!(error, Error::TimedOut { .. }), "{error}");
    }
}

#[tokio::test]
async fn strangers_are_not_trusted() {
    let (ours, theirs) = (Pki::new(), Pki::new());
    // The server's certificate is of a CA we do not know.
    let mut config = serve(&theirs, VERSION, |_| async {}).await;
    config.tls = ours.config(([127, 0, 0, 1], 1).into()).tls;
    let error = Session::connect(&config).await.unwrap_err().to_string();
    assert!(error.contains("not trusted"), "{error}");
    // The server does not know the CA of ours.
    let mut config = serve(&theirs, VERSION, |_| async {}).await;
    config.tls.certificate = ours.path("cert");
    config.tls.key = ours.path("key");
    let error = Session::connect(&config).await.unwrap_err().to_string();
    assert!(error.contains("did not accept this client's certificate"), "{error}");
    // The name is another.
    let mut config = serve(&theirs, VERSION, |_| async {}).await;
    config.server_name = "elsewhere".into();
    assert!(Session::connect(&config).await.unwrap_err().to_string().contains("not trusted"));
}

#[tokio::test]
async fn another_version_is_incompatible() {
    let pki = Pki::new();
    let config = serve(&pki, VERSION + 1, |_| async {}).await;
    assert!(matches!(Session::connect(&config).await, Err(Error::Incompatible(_))));
}

#[tokio::test]
async fn an_open_nobody_waits_for_any_more_is_closed() {
    let pki = Pki::new();
    let (asked, is_asked) = oneshot::channel();
    let (gone, is_gone) = oneshot::channel::<()>();
    let (sender, receiver) = oneshot::channel();
    let config = serve(&pki, VERSION, |mut stream| async move {
        let request = take(&mut stream).await.unwrap();
        assert!(matches!(request.request, Request::Open(_)));
        asked.send(()).unwrap();
        is_gone.await.unwrap();
        give(&mut stream, request.id, opened(crate::OpenId([8; 16]))).await;
        sender.send(take(&mut stream).await.unwrap().request).unwrap();
    })
    .await;
    let session = Session::connect(&config).await.unwrap();
    let place = file();
    let options = OpenOptions::read();
    tokio::select! {
        _ = session.open(&place, &options) => panic!("it was not answered"),
        _ = is_asked => {}
    }
    gone.send(()).unwrap();
    let next = timeout(Duration::from_secs(10), receiver).await.expect("nothing was asked").unwrap();
    assert!(matches!(next, Request::Close(id) if id == crate::OpenId([8; 16])), "{next:?}");
}

#[tokio::test]
async fn a_reply_that_is_not_taken_closes_its_open() {
    let pki = Pki::new();
    let (sender, receiver) = oneshot::channel();
    let config = serve(&pki, VERSION, |mut stream| async move {
        let request = take(&mut stream).await.unwrap();
        give(&mut stream, request.id, opened(crate::OpenId([8; 16]))).await;
        // The answer to this one comes after the other's.
        let ping = take(&mut stream).await.unwrap();
        give(&mut stream, ping.id, Reply::Done).await;
        sender.send(take(&mut stream).await.unwrap().request).unwrap();
    })
    .await;
    let session = Session::connect(&config).await.unwrap();
    let (place, options) = (file(), OpenOptions::read());
    {
        let mut open = Box::pin(session.open(&place, &options));
        assert!(std::future::poll_fn(|cx| std::task::Poll::Ready(open.as_mut().poll(cx).is_pending())).await);
        session.ping().await.unwrap();
    }
    let next = timeout(Duration::from_secs(10), receiver).await.expect("nothing was asked").unwrap();
    assert!(matches!(next, Request::Close(id) if id == crate::OpenId([8; 16])), "{next:?}");
}

#[tokio::test]
async fn a_resume_that_nobody_waits_for_any_more_is_found_by_the_next() {
    let mut control = crate::scripted::Control::start().await;
    let config = control.config();
    let (session, mut peer) = tokio::join!(Session::connect(&config), control.accept());
    let (session, id) = (session.unwrap(), crate::OpenId([8; 16]));
    let options = crate::ResumeOptions::default();
    let asked = tokio::select! {
        _ = session.resume(b"key", &options) => panic!("it was not answered"),
        (asked, _) = peer.resume() => asked,
    };
    peer.resumed_unheard(asked, id, crate::Verdict::Unchanged, &[]).await;
    let (ping, ()) = tokio::join!(session.ping(), async {
        let asked = peer.next().await.unwrap();
        assert!(matches!(asked.request, Request::Ping), "{:?}", asked.request);
        peer.give(asked.id, Reply::Done).await;
    });
    ping.unwrap();
    let again = timeout(Duration::from_secs(10), session.resume(b"key", &options)).await;
    assert_eq!(again.expect("the answer is lost").unwrap().open.id(), id);
}

#[tokio::test]
async fn a_request_without_a_place_times_out_and_a_close_is_made_up_for() {
    let pki = Pki::new();
    let (release, released) = oneshot::channel::<()>();
    let (sender, receiver) = oneshot::channel();
    let mut config = serve(&pki, VERSION, |mut stream| async move {
        let request = take(&mut stream).await.unwrap();
        give(&mut stream, request.id, opened(crate::OpenId([8; 16]))).await;
        let mut held = Vec::new();
        while held.len() < REQUESTS_MAX {
            held.push(take(&mut stream).await.unwrap().id);
        }
        released.await.unwrap();
        for id in held {
            give(&mut stream, id, Reply::Done).await;
        }
        loop {
            let request = take(&mut stream).await.unwrap();
            if !matches!(request.request, Request::Ping) {
                sender.send(request.request).unwrap();
                return;
            }
            give(&mut stream, request.id, Reply::Done).await;
        }
    })
    .await;
    config.request_ms_max = 800;
    let session = Session::connect(&config).await.unwrap();
    let open = session.open(&file(), &OpenOptions::read()).await.unwrap();
    let mut pings = tokio::task::JoinSet::new();
    for _ in 0..REQUESTS_MAX {
        let session = session.clone();
        pings.spawn(async move { session.ping().await });
    }
    while let Some(ping) = pings.join_next().await {
        assert!(matches!(ping.unwrap(), Err(Error::TimedOut { .. })));
    }
    // Their places are the server's until it answers.
    let late = timeout(Duration::from_secs(10), session.ping()).await.expect("it waits for ever");
    assert!(matches!(late, Err(Error::TimedOut { .. })));
    let close = timeout(Duration::from_secs(10), open.close()).await.expect("it waits for ever");
    assert!(matches!(close, Err(Error::TimedOut { .. })));
    release.send(()).unwrap();
    while session.ping().await.is_err() {}
    // The close was never sent: now it is.
    drop(open);
    let next = timeout(Duration::from_secs(10), receiver).await.expect("nothing was asked").unwrap();
    assert!(matches!(next, Request::Close(id) if id == crate::OpenId([8; 16])), "{next:?}");
}
