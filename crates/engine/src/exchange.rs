//! Atomic replacement of a byte of guest memory, as the processor does it on its own account.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU8, Ordering::SeqCst};

use crate::access::{Core, Fault};
use crate::env::{Backing, Environment, Span};
use crate::tlb::{Access, Privilege};

impl<E: Environment> Core<'_, E> {
    /// Replaces the byte at `linear`, with [`Privilege::Supervisor`], by a locked access: `old` by
    /// `new`, unless another byte is there by now. A write like any other to traces.
    ///
    /// # Errors
    /// Page faults; restart, also when the byte is not `old`.
    pub fn exchange_byte(&mut self, linear: u64, old: u8, new: u8) -> Result<(), Fault> {
        let linear = self.wrap(linear);
        let found = self.translate(linear, Privilege::Supervisor, Access::Write)?;
        let exchange = |host: *mut u8| {
            // SAFETY: the translation leads to a byte of guest RAM that may be written; everyone
            // who shares it accesses it as memory that others change.
            let byte = unsafe { AtomicU8::from_ptr(host) };
            // Sequentially consistent: a locked access orders all others of its processor.
            byte.compare_exchange(old, new, SeqCst, SeqCst).is_ok()
        };
        let mut done = true;
        match found.backing {
            Backing::Ram(host) => done = exchange(host),
            Backing::Sensed(host) => {
                self.leave_block = true;
                let span = Span {
                    gpa: found.gpa,
                    len: 1,
                };
                let rip = self.cpu.rip;
                self.env
                    .sensed(self.tlb, rip, &[span], Access::Write, &mut || {
                        done = exchange(host);
                    })?;
            }
            Backing::Device => self.env.device_write(found.gpa, &[new]),
        }
        if done {
            self.note_breakpoints(linear, 1, Access::Write);
            Ok(())
        } else {
            Err(Fault::Restart)
        }
    }
}
