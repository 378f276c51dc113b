//! IA32_APIC_BASE: the modes of a local APIC and the ways between them.

use std::sync::atomic::Ordering;

use super::{Apic, PAGE};

pub(super) const BOOTSTRAP: u64 = 1 << 8;
pub(super) const EXTENDED: u64 = 1 << 10;
pub(super) const ENABLED: u64 = 1 << 11;
const ADDRESS: u64 = !0xfff;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Disabled,
    XApic,
    X2Apic,
}

impl Apic {
    pub(super) fn mode(&self) -> Mode {
        mode(self.base.load(Ordering::SeqCst))
    }

    /// WRMSR of IA32_APIC_BASE. `None` is #GP(0): reserved bits, the invalid mode, a way between
    /// modes that does not exist, or another address than 0xfee00000. (Other addresses exist on
    /// processors; here the page is where the machine put it.)
    pub(super) fn set_base(&self, value: u64) -> Option<()> {
        let reserved = !(ADDRESS | BOOTSTRAP | EXTENDED | ENABLED);
        if value & reserved != 0 || value & ADDRESS != PAGE {
            return None;
        }
        if value & EXTENDED != 0 && value & ENABLED == 0 {
            return None;
        }
        match (self.mode(), mode(value)) {
            (Mode::Disabled, Mode::X2Apic) | (Mode::X2Apic, Mode::XApic) => return None,
            (_, Mode::Disabled) => self.reset(),
            _ => {}
        }
        self.base.store(value, Ordering::SeqCst);
        Some(())
    }
}

fn mode(base: u64) -> Mode {
    match (base & ENABLED != 0, base & EXTENDED != 0) {
        (false, _) => Mode::Disabled,
        (true, false) => Mode::XApic,
        (true, true) => Mode::X2Apic,
    }
}
