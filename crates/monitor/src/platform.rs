//! What a sub-VMM asks of the machine around it.

/// Ports and memory-mapped devices. Called on VCPU threads; implementers lock for themselves.
pub trait Platform: Send + Sync {
    /// IN of `size` (1, 2 or 4) bytes.
    fn port_read(&self, vcpu: u8, port: u16, size: u8) -> u32;
    /// OUT of `size` (1, 2 or 4) bytes.
    fn port_write(&self, vcpu: u8, port: u16, size: u8, value: u32);
    /// Reads registers of the device whose trace carries `cookie`, `offset` bytes into its range.
    fn device_read(&self, vcpu: u8, cookie: u64, offset: u64, data: &mut [u8]);
    /// Writes registers of a device.
    fn device_write(&self, vcpu: u8, cookie: u64, offset: u64, data: &[u8]);
}
