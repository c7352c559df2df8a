//! `holdfast serve` keeps both planes up whatever happens around it.

use crate::common::{Deployment, Wish, program};
use std::time::Duration;

fn copies_still_work(server: &Deployment) {
    let file = server.scratch("file");
    std::fs::write(&file, "still here\n").unwrap();
    server.ok(&["cp", file.to_str().unwrap(), "data:/file"]);
    assert_eq!(server.ok(&["cat", "data:/file"]), "still here\n");
}

#[test]
fn a_replaced_program_does_not_end_the_server() {
    let programs = tempfile::tempdir().unwrap();
    let inside = |name: &str| programs.path().join(name);
    for name in ["holdfast", "holdfast-control", "holdfast-dataplane"] {
        std::fs::copy(program(name), inside(name)).unwrap();
    }
    let wish = Wish { programs: Some(programs.path().to_owned()), any_port: true, ..Wish::default() };
    let mut server = Deployment::with(&wish);
    // An upgrade: for a while there is no program, then another file of the same name.
    std::fs::copy(inside("holdfast"), inside("new")).unwrap();
    std::fs::remove_file(inside("holdfast")).unwrap();
    server.restart_dataplane(|_| {
        std::thread::sleep(Duration::from_millis(700));
        std::fs::rename(inside("new"), inside("holdfast")).unwrap();
    });
    copies_still_work(&server);
    assert!(server.stop().success(), "{}", server.log());
}

#[test]
fn a_reader_that_went_away_does_not_end_the_server() {
    let mut server = Deployment::with(&Wish { deaf: true, ..Wish::default() });
    // Its second ready line finds nobody.
    server.restart_dataplane(|_| ());
    copies_still_work(&server);
    assert!(server.stop().success(), "{}", server.log());
}
