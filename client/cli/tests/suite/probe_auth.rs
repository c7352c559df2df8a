//! Certificates, rights and keys from the outside: who is let in, what a reader may do, and which proofs are good where.

use crate::common::probe::*;
use crate::common::raw::{Claim, Raw};
use crate::common::{Deployment, Wish};
use holdfast_client::{
    Access, Changes, Config, Disposition, Error, KeyGrant, MacPolicy, OpenOptions, Session, ShareMode,
    Status, Verdict,
};
use holdfast_shared::auth::BindSecret;
use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair};

const BAD_KEY: Option<Status> = Some(Status::BadKey);

/// Signs a certificate with the server's own authority, and has the client show it.
fn config_with(server: &Deployment, name: &str, change: impl FnOnce(&mut CertificateParams)) -> Config {
    let pki = server.home().join("pki");
    let authority = KeyPair::from_pem(&std::fs::read_to_string(pki.join("ca.key")).unwrap()).unwrap();
    let mut issuer = CertificateParams::new(Vec::new()).unwrap();
    issuer.distinguished_name = Default::default();
    issuer.distinguished_name.push(DnType::CommonName, "Holdfast private CA");
    let issuer = Issuer::new(issuer, authority);
    let mut params = CertificateParams::new(vec!["client".to_owned()]).unwrap();
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    change(&mut params);
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, &issuer).unwrap();
    let mut config = Config::load(&server.config()).unwrap();
    config.tls.certificate = pki.join(format!("{name}.pem"));
    config.tls.key = pki.join(format!("{name}.key"));
    std::fs::write(&config.tls.certificate, certificate.pem()).unwrap();
    std::fs::write(&config.tls.key, key.serialize_pem()).unwrap();
    config
}

/// A certificate that is over, not yet good, for servers, without a name, or with another's key; a server of another name.
#[test]
fn aut_01_certificates_that_prove_nothing() {
    let server = Deployment::start();
    let pki = server.home().join("pki");
    let day = rcgen::date_time_ymd;
    let good = config_with(&server, "good", |_| ());
    let mut wrong = vec![
        (
            "over",
            config_with(&server, "over", |p| {
                (p.not_before, p.not_after) = (day(2019, 1, 1), day(2020, 1, 1));
            }),
        ),
        ("not yet good", config_with(&server, "early", |p| p.not_before = day(2090, 1, 1))),
        (
            "for servers",
            config_with(&server, "role", |p| {
                p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
            }),
        ),
    ];
    let mut swapped = good.clone();
    (swapped.tls.certificate, swapped.tls.key) = (pki.join("server.pem"), pki.join("server.key"));
    wrong.push(("the server's own", swapped));
    let mut mixed = good.clone();
    mixed.tls.key = pki.join("client.key");
    wrong.push(("with another's key", mixed));
    let mut elsewhere = good.clone();
    elsewhere.server_name = "elsewhere".into();
    wrong.push(("a server of another name", elsewhere));
    run(async {
        let session = Session::connect(&good).await.unwrap();
        assert_eq!(session.principal(), "client");
        for (words, config) in wrong {
            let refused = Session::connect(&config).await.err();
            let kind =
                matches!(&refused, Some(Error::Io { .. } | Error::Config { .. } | Error::Ended { .. }));
            assert!(kind, "{words}: {refused:?}");
        }
        session.ping().await.unwrap();
        assert_eq!(server.gauges()["control.sessions"], 1, "nobody else has one");
    });
}

/// Who may read may read: everything else is refused, and leaves no trace.
#[test]
fn aut_a_principal_that_may_read_changes_nothing() {
    let mut server =
        Deployment::with(&Wish { principals: &[("reader", "read"), ("guest", "read")], ..Wish::default() });
    let file = server.volume().join("file");
    std::fs::write(&file, vec![1; 100]).unwrap();
    std::fs::create_dir(server.volume().join("dir")).unwrap();
    let before = std::fs::metadata(&file).unwrap();
    run(async {
        let (reader, writer) = (connect_as(&server, "reader").await, connect(&server).await);
        let read_only = Some(Status::ReadOnly);
        for (words, options) in [
            ("to write", OpenOptions::read_write()),
            ("to delete", OpenOptions::read().access(Access::DELETE)),
            (
                "to read and delete on close",
                OpenOptions::read().access(Access::READ | Access::DELETE).delete_on_close(true),
            ),
            ("to truncate", OpenOptions::read_write().disposition(Disposition::Overwrite, 0)),
            ("to make", OpenOptions::read().disposition(Disposition::OpenOrCreate, 0o600)),
            ("to make anew", OpenOptions::read().disposition(Disposition::CreateNew, 0o600)),
        ] {
            for name in ["file", "new"] {
                assert_eq!(tried(&reader, name, &options).await, read_only, "{words}, {name}");
            }
        }
        assert_eq!(
            tried(&reader, "file", &OpenOptions::read().delete_on_close(true)).await,
            Some(Status::AccessDenied)
        );
        let one = open(&reader, "file", &OpenOptions::read()).await;
        let size = Changes { size: Some(1), ..Changes::default() };
        let mode = Changes { mode: Some(0o777), ..Changes::default() };
        assert_eq!(status(one.set_attributes(&size).await), Some(Status::AccessDenied));
        assert_eq!(status(one.set_attributes(&mode).await), read_only);
        for changes in [&size, &mode] {
            assert_eq!(status(reader.set_attributes(&place("file"), changes).await), read_only);
        }
        for (from, to) in [("file", "other"), ("dir", "other")] {
            assert_eq!(status(reader.rename(&place(from), &place(to), true).await), read_only);
            assert_eq!(status(reader.remove(&place(from)).await), read_only);
        }
        assert_eq!(status(reader.make_directory(&place("more"), 0o700).await), read_only);
        assert_eq!(status(reader.make_symlink(&place("link"), "file").await), read_only);
        let channel = one.connect(holdfast_client::Transport::Tcp).await.unwrap();
        assert_eq!(status(one.bind_with_access(&channel, RW).await), Some(Status::AccessDenied));
        assert_eq!(read(&bound(&one).await, 0, 200).await.unwrap(), 100);
        let names: Vec<_> =
            std::fs::read_dir(server.volume()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2, "{names:?}");
        let after = std::fs::metadata(&file).unwrap();
        assert_eq!((after.len(), after.modified().unwrap()), (before.len(), before.modified().unwrap()));
        // Its share mode and its locks count as anybody's.
        one.close().await.unwrap();
        let alone = open(&reader, "file", &OpenOptions::read().share(ShareMode::READ)).await;
        assert_eq!(tried(&writer, "file", &rw()).await, Some(Status::ShareConflict));
        alone.close().await.unwrap();

        // The operator takes its rights away while it is away: neither it nor its key gets in, and nobody learns more.
        let (key, held) = {
            let guest = connect_as(&server, "guest").await;
            let open = open(&guest, "file", &OpenOptions::read().share(ShareMode::READ)).await;
            let kept = (open.resume_key(), open.id());
            guest.detach().await;
            kept
        };
        until_state(&server, held, &["detached"]);
        assert_eq!(status(resume(&reader, &key).await), BAD_KEY, "another principal's");
        let path = server.home().join("control.toml");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace("principal = \"guest\"", "principal = \"nobody\"")).unwrap();
        server.kill_control();
        server.await_planes();
        let guest = connect_as(&server, "guest").await;
        let denied = Some(Status::AccessDenied);
        assert_eq!(tried(&guest, "file", &OpenOptions::read()).await, denied);
        assert_eq!(status(resume(&guest, &key).await), denied);
        assert_eq!(tried(&writer, "file", &rw()).await, Some(Status::Busy), "its open is held all the same");
        server.ok(&["opens", "--close", &held.to_string()]);
        assert_eq!(tried(&writer, "file", &rw()).await, None);
    });
}

/// A proof is for one open, one challenge, one channel and one incarnation.
#[test]
fn key_02_proofs_are_good_for_what_they_were_made_for() {
    let server = Deployment::with(&Wish { principals: &[("other", "read-write")], ..Wish::default() });
    run(async {
        let (mine, theirs) = (connect(&server).await, connect_as(&server, "other").await);
        let (one, two) = (open(&mine, "one", &rw()).await, open(&mine, "two", &rw()).await);
        let foreign = open(&theirs, "one", &OpenOptions::read()).await;
        let (grant, secret) = (one.grant(), one.bind_secret());
        let attempt = |claim: &dyn for<'a> Fn(Claim<'a>, &'a [[u8; 32]; 1]) -> Claim<'a>| {
            let mut raw = Raw::connect("tcp", &grant);
            let zero = [[0; 32]];
            let honest = raw.claim(&grant, &secret);
            let claim = claim(honest, &zero);
            raw.bind(&claim).0.err()
        };
        assert_eq!(attempt(&|claim, _| claim), None, "the honest one");
        for (words, other) in [("one's own other open", &two), ("another principal's open", &foreign)] {
            let (grant, secret) = (other.grant(), other.bind_secret());
            let bind = |key: &[u8], challenge_of: &KeyGrant, secret: &BindSecret| {
                let mut raw = Raw::connect("tcp", &grant);
                let claim = Claim { resume_key: key, ..raw.claim(challenge_of, secret) };
                raw.bind(&claim).0.err()
            };
            let mine = one.grant();
            assert_eq!(bind(&mine.resume_key, &grant, &one.bind_secret()), BAD_KEY, "{words}: its challenge");
            assert_eq!(bind(&mine.resume_key, &mine, &secret), BAD_KEY, "{words}: its secret");
            assert_eq!(bind(&grant.resume_key, &mine, &one.bind_secret()), BAD_KEY, "{words}: its key");
        }
        for nonce in [[0; 32], [0xff; 32]] {
            assert_eq!(attempt(&|claim, _| Claim { nonce, ..claim }), BAD_KEY, "a nonce of one's own");
        }
        let lower = attempt(&|claim, _| Claim { policy: MacPolicy::None, ..claim });
        assert_eq!(lower, Some(Status::Invalid), "a lower policy");
        // Asked for again: the key is another, the open the same, and both prove it.
        let again = one.query_key().await.unwrap();
        assert!(again.resume_key != grant.resume_key && again.volume == grant.volume);
        for grant in [&again, &grant] {
            let mut raw = Raw::connect("tcp", grant);
            let claim = raw.claim(grant, &secret);
            assert_eq!(raw.bind(&claim).0.err(), None);
        }
        // Taken over: what the session before it knew is worth nothing, though its key still names the open.
        let later = connect(&server).await;
        let taken = holdfast_client::ResumeOptions::default().supersede(mine.id());
        let resumed = later.resume(&grant.resume_key, &taken).await.unwrap();
        assert_eq!(resumed.verdict, Verdict::Unchanged);
        assert_eq!(attempt(&|claim, _| claim), BAD_KEY, "the secret of the session before");
        let newest = resumed.open.query_key().await.unwrap();
        let mut raw = Raw::connect("tcp", &newest);
        let new_secret = resumed.open.bind_secret();
        let claim = Claim { resume_key: &grant.resume_key, ..raw.claim(&newest, &new_secret) };
        assert_eq!(raw.bind(&claim).0.err(), None, "any key of the open, with the secret of now");
    });
}

/// Whatever is wrong with a key, the answer is the same, and the open as it was.
#[test]
fn key_06_keys_that_are_not_ones_own_say_nothing() {
    let server = Deployment::with(&Wish { principals: &[("other", "read-write")], ..Wish::default() });
    let elsewhere = Deployment::start();
    run(async {
        let (mine, theirs) = (connect(&server).await, connect_as(&server, "other").await);
        let (key, _) = detached(&server, "file", &rw().share(ShareMode::NONE)).await;
        let (foreign, _) = detached(&elsewhere, "file", &rw()).await;
        let closed = {
            let open = open(&mine, "closed", &rw()).await;
            open.close().await.unwrap();
            open.resume_key()
        };
        let mut wrong = vec![Vec::new(), vec![0], vec![0; 102], vec![0xff; 512], foreign, closed];
        for cut in [1, 10, 50, key.len() - 1] {
            wrong.push(key[..cut].to_vec());
        }
        wrong.push([&key[..], &[0]].concat());
        for at in 0..key.len() {
            let mut flipped = key.clone();
            flipped[at] ^= 1;
            wrong.push(flipped);
        }
        let words = |error: Error| format!("{error:?}");
        let first = words(resume(&mine, &wrong[2]).await.unwrap_err());
        assert!(first.contains("BadKey"), "{first}");
        for key in &wrong {
            assert_eq!(words(resume(&mine, key).await.unwrap_err()), first, "{key:?}");
        }
        assert_eq!(words(resume(&theirs, &key).await.unwrap_err()), first, "the right key of another");
        // More than a key can be.
        let long = resume(&mine, &vec![0; 4096]).await.unwrap_err();
        println!("4096 bytes: {long:?}");
        mine.ping().await.expect("the session goes on");
        let back = resume(&mine, &key).await.unwrap();
        assert_eq!((back.verdict, back.open.epoch()), (Verdict::Unchanged, 2), "as it was");
    });
}
