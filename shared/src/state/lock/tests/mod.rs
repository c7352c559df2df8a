//! The lock table against its rules.
