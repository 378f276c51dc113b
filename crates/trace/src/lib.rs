//! Layer `trace`.
