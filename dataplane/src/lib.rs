//! The data plane process: binds handles to registered memory and moves bytes; never decides policy.
