//! Layer `devices`.
