//! Layer `memory`.
