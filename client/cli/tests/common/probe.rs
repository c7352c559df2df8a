//! What the probes share: clients of several principals, and short words for opening, locking and judging.

use super::{DEADLINE, Deployment};
use holdfast_client::{
    Access, Binding, Config, Disposition, Error, LockItem, LockKind, LockOptions, LockRange, Open, OpenId,
    OpenOptions, Place, Region, ResumeOptions, Resumed, Session, Status, Transport,
};
use std::time::{Duration, Instant};

pub const RW: Access = Access::READ.union(Access::WRITE);
pub const RWD: Access = Access::ALL;

pub fn place(path: &str) -> Place {
    Place { volume: "data".into(), path: path.into() }
}

/// Runs a probe to its end.
pub fn run(probe: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(4 * DEADLINE, probe).await.expect("the probe hangs") });
}

pub async fn connect(server: &Deployment) -> Session {
    Session::connect(&Config::load(&server.config()).unwrap()).await.unwrap()
}

pub async fn connect_as(server: &Deployment, principal: &str) -> Session {
    Session::connect(&server.config_of(principal)).await.unwrap()
}

/// To read and write, made if it is not there.
pub fn rw() -> OpenOptions {
    OpenOptions::read_write().disposition(Disposition::OpenOrCreate, 0o644)
}

pub async fn open(session: &Session, name: &str, options: &OpenOptions) -> Open {
    session.open(&place(name), options).await.unwrap()
}

/// The status that refused an open, `None` if it was granted: it is closed again then.
pub async fn tried(session: &Session, name: &str, options: &OpenOptions) -> Option<Status> {
    match session.open(&place(name), options).await {
        Ok(open) => {
            open.close().await.unwrap();
            None
        }
        Err(error) => status(Err::<(), _>(error)),
    }
}

pub fn status<T>(result: Result<T, Error>) -> Option<Status> {
    result.err().map(|error| error.status().unwrap_or_else(|| panic!("no status: {error:?}")))
}

pub async fn bound(open: &Open) -> Binding {
    open.bind(&open.connect(Transport::Tcp).await.unwrap()).await.unwrap()
}

/// Writes `length` bytes at `offset`.
pub async fn write(binding: &Binding, offset: u64, length: usize) -> Result<usize, Error> {
    let region = Region::allocate(length.max(1)).unwrap();
    region.copy_in(0, &vec![0x5a; length]).unwrap();
    binding.write_at(&region, 0..length, offset).await
}

/// Reads `length` bytes at `offset` and gives how many came.
pub async fn read(binding: &Binding, offset: u64, length: usize) -> Result<usize, Error> {
    let region = Region::allocate(length.max(1)).unwrap();
    binding.read_at(&region, 0..length, offset).await
}

pub fn range(offset: u64, length: u64) -> LockRange {
    LockRange::new(offset, length).unwrap()
}

pub fn exclusive(offset: u64, length: u64) -> LockItem {
    LockItem { range: range(offset, length), kind: LockKind::Exclusive }
}

pub fn shared(offset: u64, length: u64) -> LockItem {
    LockItem { range: range(offset, length), kind: LockKind::Shared }
}

/// Locks without waiting, as owner 0; `None` if it was granted.
pub async fn lock(open: &Open, item: LockItem) -> Option<Status> {
    lock_by(open, 0, item).await
}

pub async fn lock_by(open: &Open, owner: u64, item: LockItem) -> Option<Status> {
    status(open.lock(&[item], LockOptions { owner, wait: None }).await)
}

pub async fn unlock(open: &Open, item: LockItem) -> Option<Status> {
    status(open.unlock(0, &[item.range]).await)
}

/// A lock request that waits, in a task of its own.
pub fn wait_for_lock(open: &Open, item: LockItem, wait: Duration) -> tokio::task::JoinHandle<Option<Status>> {
    let open = open.clone();
    tokio::spawn(async move { status(open.lock(&[item], LockOptions { owner: 0, wait: Some(wait) }).await) })
}

/// Waits until so many lock requests wait.
pub fn until_waiting(server: &Deployment, requests: u64) {
    server.until("the lock requests wait", |gauges| gauges["control.lock_waiters"] == requests);
}

/// An open as the operator sees it.
pub fn seen(server: &Deployment, open: OpenId) -> serde_json::Value {
    serde_json::from_str(&server.ok(&["opens", "--json", &open.to_string()])).unwrap()
}

/// Waits until an open is in one of these states, and the server has looked at what it wanted to look at then.
pub fn until_state(server: &Deployment, open: OpenId, states: &[&str]) {
    let start = Instant::now();
    loop {
        let now = seen(server, open);
        if now["state"].as_str().is_some_and(|state| states.contains(&state)) {
            break;
        }
        assert!(start.elapsed() < DEADLINE, "never {states:?}: {now}");
        std::thread::sleep(Duration::from_millis(10));
    }
    settled(server);
}

/// Waits until nothing is under way at control.
pub fn settled(server: &Deployment) {
    server.until("nothing is under way", |gauges| {
        (gauges["control.operations"], gauges["control.waiting_for_journal"]) == (0, 0)
    });
}

/// Opens in a session of its own which is lost at once: the open is detached. Its key, and its id.
pub async fn detached(server: &Deployment, name: &str, options: &OpenOptions) -> (Vec<u8>, OpenId) {
    detached_with(server, name, options, &[]).await
}

/// The same, with locks.
pub async fn detached_with(
    server: &Deployment,
    name: &str,
    options: &OpenOptions,
    locks: &[LockItem],
) -> (Vec<u8>, OpenId) {
    let session = connect(server).await;
    let open = open(&session, name, options).await;
    if !locks.is_empty() {
        open.lock(locks, LockOptions::default()).await.unwrap();
    }
    let (key, id) = (open.resume_key(), open.id());
    session.detach().await;
    until_state(server, id, &["detached", "expired"]);
    (key, id)
}

pub async fn resume(session: &Session, key: &[u8]) -> Result<Resumed, Error> {
    session.resume(key, &ResumeOptions::default()).await
}
