//! The control plane process: authenticates, opens files, issues resume keys, decides every conflict.

fn main() {}
