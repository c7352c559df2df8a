//! The journal: what must be known again after a crash.

pub mod record;
