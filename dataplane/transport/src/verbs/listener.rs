//! [`VerbsListener`]: takes connections, on a thread of its own; handshakes that drag on hold up nobody.
//!
//! ```text
//!   connection manager ──► requests ──prepare──► half-open ──established──► Channel
//!                             │                      │
//!                             └── too old: refused   └── too slow, or gone: dropped
//! ```

use super::channel::{VerbsChannel, accept};
use super::home::Home;
use super::lane::{self, Lanes};
use super::wake::{Note, clear, event, ring};
use super::{io_error, require_device};
use crate::channel::{Channel, Listener, Setup};
use crate::stopper::Stopper;
use holdfast_verbs::memory::Pool;
use holdfast_verbs::{ConnectRequest, Device, ListenerLimits};
use parking_lot::Mutex;
use rustix::event::PollFlags;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a connect request may wait, and how long a handshake may take.
const HANDSHAKE_TIME: Duration = Duration::from_secs(5);
/// Requests and handshakes at a time; more are refused.
const HALF_OPEN_MAX: usize = 64;

/// What the connection manager's thread writes and the listener's reads.
struct Inbox {
    requests: Mutex<VecDeque<ConnectRequest>>,
    event: Arc<OwnedFd>,
}

struct HalfOpen {
    channel: VerbsChannel,
    deadline: Instant,
}

/// Accepts RDMA connections. The pools of the setups are registered once per device, and stay so as long as this.
pub struct VerbsListener {
    // Dropped first: no request comes after it.
    _listener: holdfast_verbs::Listener,
    address: SocketAddr,
    inbox: Arc<Inbox>,
    half_open: Vec<HalfOpen>,
    /// By device name.
    homes: HashMap<String, Home>,
    /// Where lanes wait; `None`: there are none here.
    lanes: Option<Arc<Lanes>>,
    stopper: Stopper,
}

impl VerbsListener {
    /// Listens on `address`, which must be one of an RDMA device's, or unspecified; port 0 picks a free one.
    ///
    /// # Errors
    /// `NotFound` if there is no RDMA device; else the connection manager's.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        require_device()?;
        let inbox = Arc::new(Inbox { requests: Mutex::default(), event: Arc::new(event()?) });
        let limits = ListenerLimits { half_open: HALF_OPEN_MAX, ..ListenerLimits::default() };
        let writer = Arc::clone(&inbox);
        let listener = holdfast_verbs::Listener::bind(address, limits, move |request| {
            writer.requests.lock().push_back(request);
            ring(&writer.event);
        })
        .map_err(io_error)?;
        let address = listener.local_address().unwrap_or(address);
        let (half_open, homes) = (Vec::with_capacity(HALF_OPEN_MAX), HashMap::new());
        let stopper = Stopper::new()?;
        Ok(Self { _listener: listener, address, inbox, half_open, homes, lanes: None, stopper })
    }

    /// Takes lanes too, and leaves them there. Without this whoever asks for one is refused.
    pub fn serve_lanes(&mut self, lanes: Arc<Lanes>) {
        self.lanes = Some(lanes);
    }

    /// Registers pools with every device now, so that the first peers need not wait for it.
    ///
    /// # Errors
    /// The device's; for want of lockable memory the text says how to raise the limit.
    pub fn register(&mut self, pools: &[Pool]) -> io::Result<()> {
        for device in Device::list().map_err(io_error)? {
            self.home(&device, pools)?;
        }
        Ok(())
    }

    /// The domain of a device, with these pools in it.
    fn home(&mut self, device: &Arc<Device>, pools: &[Pool]) -> io::Result<Home> {
        if !self.homes.contains_key(device.name()) {
            self.homes.insert(device.name().to_owned(), Home::new(device).map_err(io_error)?);
        }
        let home = self.homes.get_mut(device.name()).ok_or(io::ErrorKind::NotFound)?;
        home.add(pools).map_err(io_error)?;
        Ok(home.clone())
    }

    /// Answers one connect request; it is half-open then, if all went well.
    fn answer(
        &mut self,
        request: ConnectRequest,
        prepare: &mut dyn FnMut(SocketAddr) -> Option<Setup>,
    ) -> io::Result<()> {
        if request.received().elapsed() > HANDSHAKE_TIME {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the request waited too long"));
        }
        if lane::is_wanted(&request) {
            // Dropping a request refuses it.
            return self.lanes.as_ref().map_or(Ok(()), |lanes| lanes.answer(request, &self.inbox.event));
        }
        let Some(setup) = prepare(request.peer_address()) else { return Ok(()) };
        let home = self.home(&Arc::clone(request.device()), &setup.pools)?;
        let note = Note::new(Some(Arc::clone(&self.inbox.event)))?;
        let domain = Arc::clone(&home.domain);
        let channel = accept(|config| request.connection(&domain, config), home, setup, note)?;
        self.half_open.push(HalfOpen { channel, deadline: Instant::now() + HANDSHAKE_TIME });
        Ok(())
    }

    /// Takes a channel whose handshake is complete, and drops those that will never be.
    fn established(&mut self) -> Option<VerbsChannel> {
        let now = Instant::now();
        self.half_open.retain(|half| {
            let connection = half.channel.connection();
            let is_alive =
                connection.is_established() || (!connection.is_disconnected() && now < half.deadline);
            if !is_alive {
                tracing::debug!(peer = %connection.peer_address(), "RDMA handshake not completed: dropped");
            }
            is_alive
        });
        let ready = self.half_open.iter().position(|half| half.channel.connection().is_established())?;
        let channel = self.half_open.swap_remove(ready).channel;
        channel.note().release();
        Some(channel)
    }
}

impl Listener for VerbsListener {
    fn address(&self) -> SocketAddr {
        self.address
    }

    fn accept(
        &mut self,
        prepare: &mut dyn FnMut(SocketAddr) -> Option<Setup>,
    ) -> io::Result<Box<dyn Channel>> {
        loop {
            clear(&self.inbox.event);
            if let Some(channel) = self.established() {
                // There may be more than one; the event has been cleared for all.
                ring(&self.inbox.event);
                return Ok(Box::new(channel));
            }
            let request = self.inbox.requests.lock().pop_front();
            if let Some(request) = request {
                let peer = request.peer_address();
                if let Err(error) = self.answer(request, prepare) {
                    tracing::warn!(%peer, %error, "RDMA connection not taken");
                }
                ring(&self.inbox.event);
            }
            let lane_due = self.lanes.as_ref().and_then(|lanes| lanes.sweep());
            let now = Instant::now();
            let nearest =
                self.half_open.iter().map(|half| half.deadline.saturating_duration_since(now)).min();
            let nearest = nearest.into_iter().chain(lane_due).min();
            self.stopper.wait(&*self.inbox.event, PollFlags::IN, nearest)?;
        }
    }

    fn stopper(&self) -> Box<dyn Fn() + Send + Sync> {
        self.stopper.handle()
    }
}
