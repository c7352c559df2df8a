//! The authority against its rules. Every step of every test ends with a check of the invariants.

mod binds;
mod crashes;
mod endings;
mod lives;
mod locks;
mod model;
mod opens;
mod restarts;
mod resumes;
mod world;
