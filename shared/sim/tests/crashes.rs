//! Cases of the group CRS, by their ids.

use holdfast_sim::races;

#[test]
fn crs_05_a_change_between_two_reboots_is_never_called_unchanged() {
    for seed in 0..1000 {
        races::changed_between_reboots(seed).unwrap_or_else(|words| panic!("seed {seed}: {words}"));
    }
}

#[test]
fn crs_06_a_crash_after_every_disk_operation_breaks_no_promise() {
    for seed in 0..20 {
        let mut cuts = 0;
        for cut in 1.. {
            match races::cut_at(seed, cut) {
                Ok(true) => cuts += 1,
                Ok(false) => break,
                Err(words) => panic!("seed {seed}, cut at {cut}: {words}"),
            }
        }
        assert!(cuts >= 10, "only {cuts} disk operations in the life of an open");
    }
}

#[test]
fn crs_09_an_unflushed_write_is_known_to_be_lost_perhaps_and_written_again() {
    for seed in 0..1000 {
        races::unflushed_write(seed).unwrap_or_else(|words| panic!("seed {seed}: {words}"));
    }
}
