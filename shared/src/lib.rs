//! The pure core of Holdfast: types, wire formats, authentication, the authority. No I/O, clock, thread or unsafe.
