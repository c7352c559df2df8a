//! The authority: the open table and its rules, as a deterministic state machine.
