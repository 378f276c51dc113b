//! TODO(msr)
