//! Bytes of guest RAM that the guest's other processors may access at the same time.
#![allow(unsafe_code)]

/// Loads that the guest's other processors may race with: volatile and, where aligned, one access
/// of the full size, as the processor guarantees.
///
/// # Safety
/// `host` must point to `N` readable bytes.
#[inline(always)]
pub(super) unsafe fn load<const N: usize>(host: *const u8) -> u64 {
    // SAFETY: the caller vouches for the bytes; x86 allows unaligned loads, and the packed
    // wrapper tells the compiler.
    unsafe {
        match N {
            1 => u64::from(host.read_volatile()),
            2 => u64::from((host as *const Unaligned<u16>).read_volatile().0),
            4 => u64::from((host as *const Unaligned<u32>).read_volatile().0),
            _ => (host as *const Unaligned<u64>).read_volatile().0,
        }
    }
}

/// Stores, as [`load`] loads.
///
/// # Safety
/// `host` must point to `N` writable bytes.
#[inline(always)]
pub(super) unsafe fn store<const N: usize>(host: *mut u8, value: u64) {
    // SAFETY: as in `load`.
    unsafe {
        match N {
            1 => host.write_volatile(value as u8),
            2 => (host as *mut Unaligned<u16>).write_volatile(Unaligned(value as u16)),
            4 => (host as *mut Unaligned<u32>).write_volatile(Unaligned(value as u32)),
            _ => (host as *mut Unaligned<u64>).write_volatile(Unaligned(value)),
        }
    }
}

#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Unaligned<T>(T);

/// Copies from guest RAM. Sizes that the processor accesses at once are read at once.
///
/// # Safety
/// `host` must point to `data.len()` readable bytes of guest RAM.
pub(crate) unsafe fn copy_from_guest(host: *const u8, data: &mut [u8]) {
    // SAFETY: the caller vouches for the bytes; `data` is host memory, so they do not overlap.
    unsafe {
        match data.len() {
            1 | 2 | 4 | 8 => {
                let value = match data.len() {
                    1 => load::<1>(host),
                    2 => load::<2>(host),
                    4 => load::<4>(host),
                    _ => load::<8>(host),
                };
                let n = data.len();
                data.copy_from_slice(&value.to_le_bytes()[..n]);
            }
            n => std::ptr::copy_nonoverlapping(host, data.as_mut_ptr(), n),
        }
    }
}

/// Copies to guest RAM.
///
/// # Safety
/// `host` must point to `data.len()` writable bytes of guest RAM.
pub(super) unsafe fn copy_to_guest(host: *mut u8, data: &[u8]) {
    let mut value = [0; 8];
    // SAFETY: the caller vouches for the bytes; `data` is host memory, so they do not overlap.
    unsafe {
        match data.len() {
            n @ (1 | 2 | 4 | 8) => {
                value[..n].copy_from_slice(data);
                let value = u64::from_le_bytes(value);
                match n {
                    1 => store::<1>(host, value),
                    2 => store::<2>(host, value),
                    4 => store::<4>(host, value),
                    _ => store::<8>(host, value),
                }
            }
            n => std::ptr::copy_nonoverlapping(data.as_ptr(), host, n),
        }
    }
}
