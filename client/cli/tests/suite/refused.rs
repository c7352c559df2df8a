//! What must be refused, tried against the real server over every transport there is: with the documented status, no
//! panic, and the server unharmed.

use crate::common::raw::{Bound, Claim, Raw};
use crate::common::{Deployment, Wish, transports};
use holdfast_client::{
    Config, Disposition, Error, KeyGrant, Open, OpenOptions, Place, Region, Session, Status, Transport,
};
use holdfast_shared::auth::{BindSecret, ChannelIdentity, FrameKey, MacPolicy, Secret, SessionKey};
use holdfast_shared::types::{Access, RegionDescriptor};
use holdfast_shared::wire::data::{Flush, Io, Opcode};

fn place(path: &str) -> Place {
    Place { volume: "data".into(), path: path.into() }
}

/// A server, an open of a file of 100,000 bytes, and a runtime for what is async.
struct Bench {
    runtime: tokio::runtime::Runtime,
    server: Deployment,
    open: Open,
}

impl Bench {
    fn new() -> Self {
        Self::with(&Wish::default())
    }

    fn with(wish: &Wish) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let server = Deployment::with(wish);
        std::fs::write(server.volume().join("file"), vec![7; 100_000]).unwrap();
        let open = runtime.block_on(async {
            let session = Session::connect(&Config::load(&server.config()).unwrap()).await.unwrap();
            session.open(&place("file"), &OpenOptions::read_write()).await.unwrap()
        });
        Self { runtime, server, open }
    }

    fn grant(&self) -> KeyGrant {
        self.open.grant()
    }

    fn secret(&self) -> BindSecret {
        self.open.bind_secret().clone()
    }

    fn bound(&self, kind: &str) -> (Raw, Bound) {
        let mut raw = Raw::connect(kind, &self.grant());
        let (grant, secret) = (self.grant(), self.secret());
        let claim = raw.claim(&grant, &secret);
        let (bound, _) = raw.bind(&Claim { access: Access::READ | Access::WRITE, ..claim });
        (raw, bound.unwrap())
    }

    /// The server still does its work, and nothing of the misbehaving peers is left.
    fn unharmed(&self) {
        self.runtime.block_on(async {
            for kind in transports() {
                let transport: Transport = kind.parse().unwrap();
                let channel = self.open.connect(transport).await.unwrap();
                let binding = self.open.bind(&channel).await.unwrap();
                assert_eq!(binding.read_vec(0, 200_000).await.unwrap(), vec![7; 100_000]);
                binding.unbind().await.unwrap();
                channel.close();
            }
        });
        self.server.until("all channels gone", |g| {
            (g["dataplane.channels"], g["dataplane.bindings"], g["control.bindings"]) == (0, 0, 0)
                && g["dataplane.message_buffers_free"] == g["dataplane.message_buffers_total"]
                && g["dataplane.buffers_free"] == g["dataplane.buffers_total"]
        });
        let log = self.server.log();
        assert!(!log.contains("panicked"), "{log}");
    }
}

/// What is false about a bind; empty and `None` are honest.
#[derive(Default)]
struct False {
    key: Vec<u8>,
    secret: Option<BindSecret>,
    identity: Option<ChannelIdentity>,
    nonce: Option<[u8; 32]>,
}

/// KEY-01, KEY-05, KEY-09, KEY-10, AUT-01: every bind that is not the real one is BadKey, with the same bytes.
#[test]
fn key_01_false_keys_and_proofs_are_all_alike() {
    let bench = Bench::new();
    let stranger = Bench::new();
    let (grant, secret) = (bench.grant(), bench.secret());
    for kind in transports() {
        let key = grant.resume_key.clone();
        let flipped: Vec<u8> =
            key.iter().enumerate().map(|(n, b)| if n == 40 { b ^ 1 } else { *b }).collect();
        let wrong = SessionKey::new(Secret::new([1; 32])).bind_secret(bench.open.id());
        let elsewhere = Raw::connect(kind, &grant);
        let attempts = [
            ("truncated", False { key: key[..key.len() - 1].to_vec(), ..False::default() }),
            ("cut to one byte", False { key: key[..1].to_vec(), ..False::default() }),
            ("a bit flipped", False { key: flipped, ..False::default() }),
            ("a byte appended", False { key: [key.as_slice(), &[0]].concat(), ..False::default() }),
            ("from another server", False { key: stranger.grant().resume_key, ..False::default() }),
            ("the wrong secret", False { secret: Some(wrong), ..False::default() }),
            (
                "a proof for another channel",
                False { identity: Some(elsewhere.identity()), ..False::default() },
            ),
            ("a proof over another nonce", False { nonce: Some(elsewhere.nonce), ..False::default() }),
        ];
        let mut answers = Vec::new();
        for (what, wrong) in &attempts {
            let mut raw = Raw::connect(kind, &grant);
            let claim = raw.claim(&grant, wrong.secret.as_ref().unwrap_or(&secret));
            let claim = Claim {
                resume_key: if wrong.key.is_empty() { &grant.resume_key } else { &wrong.key },
                identity: wrong.identity.as_ref(),
                nonce: wrong.nonce.unwrap_or(claim.nonce),
                ..claim
            };
            let (result, bytes) = raw.bind(&claim);
            assert_eq!(result.err(), Some(Status::BadKey), "{kind}: {what}");
            answers.push(bytes);
        }
        answers.dedup();
        assert_eq!(answers.len(), 1, "{kind}: all refusals are the same bytes");
    }
    bench.unharmed();
}

/// KEY-02: a bind that was good once is worth nothing a second time, here or elsewhere.
#[test]
fn key_02_binds_cannot_be_replayed() {
    let bench = Bench::new();
    let (grant, secret) = (bench.grant(), bench.secret());
    for kind in transports() {
        let mut raw = Raw::connect(kind, &grant);
        let claim = raw.claim(&grant, &secret);
        assert!(raw.bind(&claim).0.is_ok(), "{kind}");
        assert_eq!(raw.bind(&claim).0.err(), Some(Status::BadKey), "{kind}: replayed on the same channel");
        let identity = raw.identity();
        let mut other = Raw::connect(kind, &grant);
        let replayed = Claim { identity: Some(&identity), ..claim };
        assert_eq!(
            other.bind(&replayed).0.err(),
            Some(Status::BadKey),
            "{kind}: replayed on another channel"
        );
    }
    bench.unharmed();
}

#[test]
fn neither_access_nor_policy_can_be_talked_down() {
    let bench = Bench::new();
    let (grant, secret) = (bench.grant(), bench.secret());
    for kind in transports() {
        let mut raw = Raw::connect(kind, &grant);
        let claim = raw.claim(&grant, &secret);
        let (result, _) = raw.bind(&Claim { policy: MacPolicy::None, ..claim });
        assert_eq!(result.err(), Some(Status::Invalid), "{kind}");
        let mut raw = Raw::connect(kind, &grant);
        let claim = raw.claim(&grant, &secret);
        let (result, _) = raw.bind(&Claim { access: Access::ALL, ..claim });
        assert!(matches!(result.err(), Some(Status::AccessDenied | Status::Invalid)), "{kind}");
        // Bound for reading: a write is refused.
        let mut raw = Raw::connect(kind, &grant);
        let claim = raw.claim(&grant, &secret);
        let bound = raw.bind(&claim).0.unwrap();
        let io =
            Io { offset: 0.into(), length: 1.into(), reserved: 0.into(), region: RegionDescriptor::NONE };
        raw.frame(Opcode::Write, bound.binding, &io, b"x", &bound.key);
        assert_eq!(raw.reply().status.get(), Status::AccessDenied.number(), "{kind}");
    }
    bench.unharmed();
}

#[test]
fn requests_beyond_the_limits_are_refused_and_the_channel_lives() {
    let bench = Bench::new();
    for kind in transports() {
        let (mut raw, bound) = bench.bound(kind);
        let region = raw.region();
        let max = raw.hello.transfer_max.get();
        let mut refused = |offset: u64, length: u32, region: RegionDescriptor, status: Status| {
            raw.read(&bound, offset, length, region);
            assert_eq!(raw.reply().status.get(), status.number(), "{kind}: {offset} {length}");
        };
        refused(
            0,
            max + 1,
            RegionDescriptor::new(region.address(), region.rkey(), u32::MAX),
            Status::TooLong,
        );
        refused(
            0,
            u32::MAX,
            RegionDescriptor::new(region.address(), region.rkey(), u32::MAX),
            Status::TooLong,
        );
        refused(u64::MAX, 1, region, Status::BadRange);
        refused(i64::MAX as u64, 1, region, Status::BadRange);
        refused(0, 4096, region.part(0, 4095).unwrap(), Status::BadRegion);
        refused(0, 4096, RegionDescriptor::NONE, Status::BadRegion);
        refused(200_000, 4096, region, Status::Ok);
        raw.read(&bound, 0, 4096, region);
        assert_eq!(raw.reply().count.get(), 4096, "{kind}: still at work");
    }
    bench.unharmed();
}

#[test]
fn regions_that_are_not_there_end_the_channel() {
    let bench = Bench::new();
    for kind in transports() {
        let wild = [
            ("unknown rkey", RegionDescriptor::new(0x1000, 0xdead_beef, 4096)),
            ("beyond its end", RegionDescriptor::new(0, 0, 0)),
        ];
        for (what, mut descriptor) in wild {
            let (mut raw, bound) = bench.bound(kind);
            if what == "beyond its end" {
                let region = raw.region();
                descriptor = RegionDescriptor::new(region.address() + (1 << 20) - 100, region.rkey(), 4096);
            }
            raw.read(&bound, 0, 4096, descriptor);
            raw.end();
        }
    }
    bench.unharmed();
}

#[test]
fn protocol_violations_end_the_channel_with_the_reason() {
    let bench = Bench::new();
    for kind in transports() {
        let violate = |what: &str, wanted: Status, act: &dyn Fn(&mut Raw, &Bound)| {
            let (mut raw, bound) = bench.bound(kind);
            act(&mut raw, &bound);
            let told = raw.end();
            assert_eq!(told, Some(wanted), "{kind}: {what}");
        };
        violate("a bad MAC", Status::BadMac, &|raw, bound| {
            let wrong = FrameKey::new(&bound.keys.to_client, MacPolicy::Header);
            raw.frame(Opcode::Flush, bound.binding, &Flush { reserved: 0.into() }, b"", &wrong);
        });
        violate("no MAC", Status::BadMac, &|raw, bound| {
            raw.frame(Opcode::Flush, bound.binding, &Flush { reserved: 0.into() }, b"", &FrameKey::unkeyed());
        });
        violate("a gap in the sequence", Status::BadMac, &|raw, bound| {
            raw.sequence += 1;
            raw.frame(Opcode::Flush, bound.binding, &Flush { reserved: 0.into() }, b"", &bound.key);
        });
        violate("a frame sent again", Status::BadMac, &|raw, bound| {
            raw.frame(Opcode::Flush, bound.binding, &Flush { reserved: 0.into() }, b"", &bound.key);
            raw.sequence -= 1;
            raw.frame(Opcode::Flush, bound.binding, &Flush { reserved: 0.into() }, b"", &bound.key);
        });
        violate("an unknown opcode", Status::Protocol, &|raw, _| {
            let mut bytes = [0; 40];
            (bytes[0], bytes[1], bytes[4]) = (1, 0x66, 40);
            bytes[16..24].copy_from_slice(&raw.sequence.to_le_bytes());
            raw.send(&bytes);
        });
        violate("another version", Status::Version, &|raw, _| raw.send(&[9; 40]));
        violate("noise", Status::Protocol, &|raw, _| raw.send(&[1; 17]));
        violate("past its credits", Status::OverCredit, &|raw, bound| {
            let region = raw.region();
            for _ in 0..200 {
                raw.read(bound, 0, 1 << 20, region);
            }
        });
    }
    bench.unharmed();
}

#[test]
fn requests_before_a_bind_do_nothing() {
    let bench = Bench::new();
    for kind in transports() {
        let mut raw = Raw::connect(kind, &bench.grant());
        let io =
            Io { offset: 0.into(), length: 1.into(), reserved: 0.into(), region: RegionDescriptor::NONE };
        raw.frame(Opcode::Write, 1, &io, b"x", &FrameKey::unkeyed());
        assert_eq!(raw.reply().status.get(), Status::NotBound.number(), "{kind}");
    }
    assert_eq!(std::fs::read(bench.server.volume().join("file")).unwrap(), vec![7; 100_000]);
    bench.unharmed();
}

/// Half-open data channels are bounded in number and time; who has a key still gets in.
#[test]
fn half_open_channels_are_bounded_and_end() {
    let bench = Bench::with(&Wish { dataplane: "bind_deadline_ms = 6000\n", ..Wish::default() });
    for kind in transports() {
        let mut idle: Vec<Raw> = (0..20).map(|_| Raw::connect(kind, &bench.grant())).collect();
        assert!(bench.server.gauges()["dataplane.half_open_channels"] >= 20);
        let (mut raw, bound) = bench.bound(kind);
        let region = raw.region();
        raw.read(&bound, 0, 10, region);
        assert_eq!(raw.reply().count.get(), 10);
        for raw in &mut idle {
            assert!(matches!(raw.end(), Some(Status::TimedOut) | None));
        }
    }
    bench.unharmed();
}

#[test]
fn strangers_and_guests_are_kept_out() {
    let bench = Bench::new();
    // A certificate of another authority.
    let stranger = Deployment::start();
    let mut config = Config::load(&bench.server.config()).unwrap();
    let theirs = Config::load(&stranger.config()).unwrap();
    config.tls.certificate = theirs.tls.certificate.clone();
    config.tls.key = theirs.tls.key.clone();
    assert!(bench.runtime.block_on(Session::connect(&config)).is_err(), "another authority's client");
    // A server of another authority, as the client sees it.
    config = Config::load(&bench.server.config()).unwrap();
    config.tls.ca = theirs.tls.ca;
    assert!(bench.runtime.block_on(Session::connect(&config)).is_err(), "another authority's server");
    // A known principal without any grant.
    let home = bench.server.home();
    let output = std::process::Command::new(crate::common::program("holdfast"))
        .args(["cert", "--principal", "guest", "--dir"])
        .arg(&home)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut config = Config::load(&bench.server.config()).unwrap();
    config.tls.certificate = home.join("pki/guest.pem");
    config.tls.key = home.join("pki/guest.key");
    bench.runtime.block_on(async {
        let session = Session::connect(&config).await.unwrap();
        assert_eq!(session.principal(), "guest");
        for options in
            [OpenOptions::read(), OpenOptions::read_write().disposition(Disposition::OpenOrCreate, 0o600)]
        {
            let refused = session.open(&place("file"), &options).await.err().and_then(|e: Error| e.status());
            assert_eq!(refused, Some(Status::AccessDenied));
        }
    });
    bench.unharmed();
}

/// The honest client library after all this: a dropped future parks its region, and the channel goes on.
#[test]
fn a_dropped_request_harms_nobody() {
    let bench = Bench::new();
    bench.runtime.block_on(async {
        let channel = bench.open.connect(Transport::Auto).await.unwrap();
        let binding = bench.open.bind(&channel).await.unwrap();
        for _ in 0..100 {
            let region = Region::allocate(65_536).unwrap();
            drop(binding.submit_read(&region, 0..65_536, 0).await.unwrap());
            drop(region);
        }
        assert_eq!(binding.read_vec(0, 10).await.unwrap(), [7; 10]);
        binding.unbind().await.unwrap();
        channel.close();
    });
    bench.unharmed();
}
