//! Two that race.
