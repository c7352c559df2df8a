//! The holdfast command: init, serve, ls, stat, cat, cp, doctor.

fn main() {}
