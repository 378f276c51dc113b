//! Layer `machine`.
