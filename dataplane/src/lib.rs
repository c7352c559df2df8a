//! The data plane: binds handles to registered memory and moves bytes between files and clients. It decides no
//! policy and knows no user: who may do what comes from control, with the descriptor and the channel keys.
//!
//! ```text
//!  config ─► main ─► link (control's socket) ◄──► engine ◄── listeners (verbs, tcp)
//!                                                  │
//!                                                  └─► gauges, last_write
//! ```

pub mod config;
pub mod engine;
pub mod fault;
pub mod gauges;
pub mod last_write;
pub mod limiter;
pub mod link;
pub mod listeners;
