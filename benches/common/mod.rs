//! What several benchmarks share. Each compiles all of it and uses a part.
#![allow(dead_code, unreachable_pub)]

pub mod deploy;
pub mod transport;

use criterion::Criterion;
use std::net::IpAddr;
use std::time::Duration;

/// Settings short enough that all groups of one transport take about a minute. `--measurement-time` and its likes
/// still override them.
pub fn short() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args()
}

/// The address of this machine's RDMA device, if it has one. Where HOLDFAST_REQUIRE_RDMA is 1, absence is a failure.
pub fn rdma_address() -> Option<IpAddr> {
    let devices = holdfast_verbs::Device::list().unwrap_or_default();
    let found = devices.iter().filter_map(|d| d.ipv4_addresses().ok()).flatten().next().map(IpAddr::from);
    let required = std::env::var("HOLDFAST_REQUIRE_RDMA").as_deref() == Ok("1");
    assert!(found.is_some() || !required, "HOLDFAST_REQUIRE_RDMA=1, and no RDMA device");
    found
}

/// Says, where nobody overlooks it, that a group did not run.
pub fn skipped(group: &str) {
    eprintln!(
        "\n*** {group}: SKIPPED, this machine has no RDMA device (ci/rxe runs it where there is one) ***\n"
    );
}
