//! TODO(descriptor)
