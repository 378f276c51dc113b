//! TODO(paging)
