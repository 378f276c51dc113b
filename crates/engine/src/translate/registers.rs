//! Where the guest's registers are while its code runs translated.

use iced_x86::Register;

use super::assembler::{Mem, reg};
use crate::frame::field;

/// Scratch registers: addresses are formed in the first; the flagless look-up needs RCX, since
/// JRCXZ is the one branch that reads no flags.
pub const ADDRESS: u8 = reg::R14;
pub const INDEX: u8 = reg::R15;
pub const COUNT: u8 = reg::RCX;

/// Guest registers by number.
pub const GUEST_RCX: usize = 1;
pub const GUEST_RSP: usize = 4;
pub const GUEST_RBP: usize = 5;

/// The host register of each guest register; `None`: it stays in the frame. Those that have to
/// stay are the ones that compilers use least.
const HOST: [Option<u8>; 16] = [
    Some(reg::RAX),
    Some(reg::R10),
    Some(reg::RDX),
    Some(reg::RBX),
    Some(reg::R11),
    Some(reg::RBP),
    Some(reg::RSI),
    Some(reg::RDI),
    Some(reg::R8),
    Some(reg::R9),
    None,
    None,
    Some(reg::R12),
    Some(reg::R13),
    None,
    None,
];

/// The host register of RSP.
pub const STACK: u8 = reg::R11;
/// The host register of RCX.
pub const GUEST_COUNT: u8 = reg::R10;

/// The host register of a guest register, if it has one.
pub fn host(guest: usize) -> Option<u8> {
    HOST.get(guest).copied().flatten()
}

/// Guest and host numbers of the registers that are in the host's.
pub fn pinned() -> impl Iterator<Item = (usize, u8)> {
    HOST.iter()
        .enumerate()
        .filter_map(|(guest, host)| host.map(|host| (guest, host)))
}

/// Where a guest register lies in the frame.
pub fn home(guest: usize) -> Mem {
    Mem::field(field::GPR + (guest as i32 & 15) * 8)
}

/// The part of host register `host` that corresponds to the part `like` of a guest register. High
/// byte registers only for hosts below 4.
pub fn part(like: Register, host: u8) -> Register {
    let number = u32::from(host & 15);
    match like.size() {
        1 if matches!(
            like,
            Register::AH | Register::CH | Register::DH | Register::BH
        ) =>
        {
            Register::AH + (number & 3)
        }
        1 => match number {
            0..=3 => Register::AL + number,
            _ => Register::SPL + (number - 4),
        },
        2 => Register::AX + number,
        4 => Register::EAX + number,
        _ => Register::RAX + number,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_host_register_serves_twice() {
        let mut hosts: Vec<u8> = pinned().map(|(_, host)| host).collect();
        hosts.extend([ADDRESS, INDEX, COUNT, reg::RSP]);
        let count = hosts.len();
        hosts.sort_unstable();
        hosts.dedup();
        assert_eq!((hosts.len(), count), (16, 16));
    }

    #[test]
    fn parts_have_the_size_asked_for() {
        assert_eq!(part(Register::CL, reg::R10), Register::R10L);
        assert_eq!(part(Register::AH, reg::RDX), Register::DH);
        assert_eq!(part(Register::SPL, reg::RDI), Register::DIL);
        assert_eq!(part(Register::R9W, reg::RBP), Register::BP);
        assert_eq!(part(Register::ESI, reg::R15), Register::R15D);
    }
}
