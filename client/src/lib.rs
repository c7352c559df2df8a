//! The Holdfast client library: sessions, opens, bindings, regions, reads and writes.
