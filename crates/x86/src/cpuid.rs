//! TODO(cpuid)
