//! Tests of the page walk.
