//! Layer `monitor`.
