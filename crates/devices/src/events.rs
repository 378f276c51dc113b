//! What devices ask of the machine as a whole.

/// A request of the guest that concerns the whole machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SystemEvent {
    /// ACPI S5 was entered.
    PowerOff,
    /// A reset through port 0xcf9, the keyboard controller or port 0x92.
    Reset,
    /// The guest wrote this value to the debug-exit port.
    DebugExit(u32),
}

/// Receives the requests; the machine implements it.
pub trait SystemEvents: Send + Sync {
    /// Called from a VCPU's thread inside a port access, with that device's lock not held. It must
    /// only note the request: stopping the VCPUs and calling into devices comes later, from
    /// elsewhere.
    fn raise(&self, event: SystemEvent);
}
