//! Layer `devices`: interrupt controllers, timers, the serial line and the firmware's tables of a
//! PC that Linux boots on without a BIOS.
//!
//! # Locks
//! Every device locks itself; callers come from any thread without a lock of this crate. While
//! holding its lock a device may call only downward in this list:
//!
//! 1. serial line, PIT, CMOS clock, power management, DMA probe (call the interrupt lines and their
//!    timer)
//! 2. [`pic::Pic`] and [`io_apic::IoApic`], never one while holding the other (call local APICs)
//! 3. local APICs: requests, LINT pins and registers are atomics and lock nothing; only the local
//!    timer has a lock, under which it posts to its own APIC
//! 4. the timer service's queue
//! 5. [`VcpuSignals`](trapline_monitor::interrupt::VcpuSignals), implemented above, must not call
//!    back into devices.
//!
//! The three ways up hold nothing: an EOI goes from a local APIC to the I/O APIC, the
//! acknowledgement of an external interrupt goes to the PIC, and the timer service calls its
//! targets, each without any lock. [`events::SystemEvents`] is called without a device's lock.
//!
//! DMA may wait for every VCPU, so it has a thread of its own and happens without any lock: see
//! [`dma`].

pub mod acpi;
pub mod acpi_pm;
#[cfg(test)]
mod board;
pub mod chipset;
pub mod clock;
pub mod cmos;
pub mod debug_exit;
pub mod dma;
pub mod dma_probe;
pub mod events;
pub mod io_apic;
pub mod lines;
pub mod local_apic;
pub mod mmio;
pub mod pic;
pub mod pit;
pub mod port;
pub mod reset_control;
pub mod serial;
pub mod timer;
pub mod tsc;

/// Why a device was not put on a bus.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    #[error("port {port:#x} already belongs to a device; give the new device other ports")]
    PortClaimed { port: u16 },
    #[error("the port bus holds at most 255 devices; leave one out")]
    TooManyDevices,
    #[error("{name}'s registers at {start:#x}..{end:#x} are empty or overlap another device's")]
    RangeClaimed {
        name: &'static str,
        start: u64,
        end: u64,
    },
}

/// Locks, also after a panic of another thread: a device's state is consistent between any two of
/// its statements that can panic.
pub(crate) fn lock<T: ?Sized>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
