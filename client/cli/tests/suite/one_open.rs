//! Two handles of one open, over two transports at once: the same bytes, and the same open file description.

use crate::common::{Deployment, rdma_address};
use holdfast_client::{
    Access, Config, Disposition, OpenOptions, Place, Region, Session, ShareMode, Transport,
};

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn place(path: &str) -> Place {
    Place { volume: "data".into(), path: path.into() }
}

/// The number of the descriptor by which a process has the file open.
fn descriptor_of(pid: u32, file: &std::path::Path) -> i32 {
    let found = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten().find_map(|entry| {
        let number = entry.file_name().to_str()?.parse().ok()?;
        (std::fs::read_link(entry.path()).ok()? == file).then_some(number)
    });
    found.unwrap_or_else(|| panic!("process {pid} does not have {} open", file.display()))
}

fn offset_of(pid: u32, descriptor: i32) -> u64 {
    let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{descriptor}")).unwrap();
    info.lines().find_map(|l| l.strip_prefix("pos:")).unwrap().trim().parse().unwrap()
}

#[test]
fn two_handles_read_each_others_bytes_and_share_one_description() {
    let server = Deployment::start();
    runtime().block_on(async {
        let session = Session::connect(&Config::load(&server.config()).unwrap()).await.unwrap();
        let options =
            OpenOptions::read_write().disposition(Disposition::CreateNew, 0o644).share(ShareMode::NONE);
        let open = session.open(&place("shared"), &options).await.unwrap();
        let tcp = open.connect(Transport::Tcp).await.unwrap();
        let second = if rdma_address().is_some() { Transport::Verbs } else { Transport::Tcp };
        let other = open.connect(second).await.unwrap();
        let (a, b) = (open.bind(&tcp).await.unwrap(), open.bind(&other).await.unwrap());
        assert_ne!(a.handle(), b.handle());

        // At once: each writes its own half block by block, small ones inline and large ones fetched, then reads the other's.
        const BLOCK: usize = 100_000;
        let regions = [Region::allocate(BLOCK).unwrap(), Region::allocate(BLOCK).unwrap()];
        let fill = |region: &Region, mark: u8, n: u8| region.copy_in(0, &vec![mark ^ n; BLOCK]).unwrap();
        for n in 0..20u8 {
            let length = if n % 2 == 0 { BLOCK } else { 4096 };
            fill(&regions[0], 0x55, n);
            fill(&regions[1], 0xaa, n);
            let at = u64::from(n) * 2 * BLOCK as u64;
            let (x, y) = tokio::join!(
                a.write_at(&regions[0], 0..length, at),
                b.write_at(&regions[1], 0..length, at + BLOCK as u64)
            );
            assert_eq!((x.unwrap(), y.unwrap()), (length, length));
            let (x, y) = tokio::join!(
                a.read_at(&regions[0], 0..length, at + BLOCK as u64),
                b.read_at(&regions[1], 0..length, at)
            );
            assert_eq!((x.unwrap(), y.unwrap()), (length, length));
            let mut seen = vec![0; length];
            regions[0].copy_out(0, &mut seen).unwrap();
            assert!(seen.iter().all(|&byte| byte == 0xaa ^ n), "round {n}: what b wrote, read by a");
            regions[1].copy_out(0, &mut seen).unwrap();
            assert!(seen.iter().all(|&byte| byte == 0x55 ^ n), "round {n}: what a wrote, read by b");
        }
        a.flush().await.unwrap();

        // One description: dataplane's descriptor, moved, moves control's. I/O itself is offset free.
        let file = server.volume().join("shared").canonicalize().unwrap();
        let in_control = descriptor_of(server.control_pid, &file);
        let in_dataplane = descriptor_of(server.dataplane_pid, &file);
        assert_eq!(offset_of(server.control_pid, in_control), 0, "reads and writes name their offset");
        let pid = rustix::process::Pid::from_raw(i32::try_from(server.dataplane_pid).unwrap()).unwrap();
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
        let ours =
            rustix::process::pidfd_getfd(&pidfd, in_dataplane, rustix::process::PidfdGetfdFlags::empty())
                .unwrap();
        rustix::fs::seek(&ours, rustix::fs::SeekFrom::Start(12_345)).unwrap();
        assert_eq!(
            offset_of(server.control_pid, in_control),
            12_345,
            "control and dataplane share one description"
        );

        // Closing one handle closes that handle; closing the open closes the rest.
        a.unbind().await.unwrap();
        assert_eq!(b.read_at(&regions[1], 0..10, 0).await.unwrap(), 10);
        drop(ours);
        open.close().await.unwrap();
        assert!(b.read_at(&regions[1], 0..10, 0).await.is_err());
    });
    server.until("everything closed", |g| g["control.opens"] == 0 && g["dataplane.bindings"] == 0);
}

#[test]
fn many_bindings_of_one_open_on_one_channel() {
    let server = Deployment::start();
    runtime().block_on(async {
        let session = Session::connect(&Config::load(&server.config()).unwrap()).await.unwrap();
        let options = OpenOptions::read_write().disposition(Disposition::CreateNew, 0o644);
        let open = session.open(&place("f"), &options).await.unwrap();
        let channel = open.connect(Transport::Auto).await.unwrap();
        let mut bindings = Vec::new();
        for _ in 0..16 {
            bindings.push(open.bind(&channel).await.unwrap());
        }
        let reader = open.bind_with_access(&channel, Access::READ).await.unwrap();
        let region = Region::allocate(4096).unwrap();
        for (n, binding) in bindings.iter().enumerate() {
            region.copy_in(0, &[u8::try_from(n).unwrap(); 4096]).unwrap();
            binding.write_all(&region, 0..4096, n as u64 * 4096).await.unwrap();
        }
        let all = reader.read_vec(0, 16 * 4096 + 100).await.unwrap();
        assert_eq!(all.len(), 16 * 4096, "short at the end of the file");
        assert!(all.chunks(4096).enumerate().all(|(n, block)| block.iter().all(|&b| usize::from(b) == n)));
        assert!(reader.write_at(&region, 0..4096, 0).await.is_err(), "bound for reading alone");
        open.close().await.unwrap();
    });
}
