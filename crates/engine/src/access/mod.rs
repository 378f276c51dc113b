//! Memory accesses of guest instructions: from a linear address to a host pointer.
//!
//! The fast way is a TLB hit within one page. Everything else is one of: a miss (the environment
//! walks), two pages, a sensed page (the environment brackets the access), device registers, an
//! armed debug register. An access that faults has had no effect on memory.
#![allow(unsafe_code)]

mod bytes;
mod operand;

use trapline_x86::control::{cr0, dr6, dr7, rflags};
use trapline_x86::{CpuState, Exception};

pub use self::operand::OperandAccess;

pub(crate) use self::bytes::copy_from_guest;
use self::bytes::{copy_to_guest, load, store};
use crate::env::{Backing, Environment, Restart, Span, Translation};
use crate::tlb::{Access, Privilege, Tlb};

const PAGE: u64 = 4096;

/// Why an instruction did not complete. Its registers are as before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    Exception(Exception),
    /// Start the instruction again.
    Restart,
}

impl From<Exception> for Fault {
    fn from(e: Exception) -> Self {
        Self::Exception(e)
    }
}
impl From<Restart> for Fault {
    fn from(_: Restart) -> Self {
        Self::Restart
    }
}

/// One VCPU's processor while it executes: its registers, its TLB and what lies around it.
pub struct Core<'a, E: Environment> {
    pub cpu: &'a mut CpuState,
    pub tlb: &'a mut Tlb,
    pub env: &'a mut E,
    /// The block must not go on after this instruction: a sensed write may have changed it.
    pub leave_block: bool,
    /// Data breakpoints that accesses of this instruction have hit, as DR6 bits.
    pub data_breakpoints: u64,
    /// Accesses need more than a look-up: breakpoints are armed or alignment is checked.
    careful: bool,
    /// Alignment is checked: CPL 3 with CR0.AM and RFLAGS.AC set (SDM vol. 3, 6.15, "#AC").
    checks_alignment: bool,
}

/// One page's part of an access.
#[derive(Clone, Copy)]
struct Piece {
    translation: Translation,
    len: usize,
}

impl Piece {
    fn span(&self) -> Span {
        Span {
            gpa: self.translation.gpa,
            len: self.len as u32,
        }
    }
    fn host(&self) -> Option<*mut u8> {
        match self.translation.backing {
            Backing::Ram(p) | Backing::Sensed(p) => Some(p),
            Backing::Device => None,
        }
    }
    fn is_sensed(&self) -> bool {
        matches!(self.translation.backing, Backing::Sensed(_))
    }
}

/// The one or two pages of an access.
struct Pieces {
    first: Piece,
    second: Option<Piece>,
}

impl<'a, E: Environment> Core<'a, E> {
    pub fn new(cpu: &'a mut CpuState, tlb: &'a mut Tlb, env: &'a mut E) -> Self {
        let mut core = Self {
            cpu,
            tlb,
            env,
            leave_block: false,
            data_breakpoints: 0,
            careful: false,
            checks_alignment: false,
        };
        core.look_at_checks();
        core
    }

    /// Finds out which checks the registers ask of every access. What changes these registers ends
    /// its block.
    pub(crate) fn look_at_checks(&mut self) {
        let cpu = &*self.cpu;
        self.checks_alignment =
            cpu.cpl() == 3 && cpu.rflags & rflags::AC != 0 && cpu.cr0 & cr0::AM != 0;
        self.careful = self.checks_alignment || cpu.dr7 & dr7::ENABLES != 0;
    }

    /// #AC for a misaligned user-mode access to data that should lie at a multiple of `alignment`
    /// bytes, a power of two (SDM vol. 3, table 6-7).
    pub(crate) fn check_alignment(
        &self,
        linear: u64,
        alignment: usize,
        privilege: Privilege,
    ) -> Result<(), Exception> {
        let misaligned = linear & (alignment as u64).wrapping_sub(1) != 0;
        if misaligned && self.checks_alignment && privilege == Privilege::User {
            return Err(Exception::alignment_check());
        }
        Ok(())
    }

    /// The host address of `linear` if the TLB allows `access` directly and `len` bytes stay on
    /// the page.
    #[inline(always)]
    pub fn fast(
        &self,
        linear: u64,
        len: usize,
        privilege: Privilege,
        access: Access,
    ) -> Option<*mut u8> {
        if (linear & (PAGE - 1)) as usize + len > PAGE as usize {
            return None;
        }
        if self.careful {
            return None;
        }
        self.tlb.host(linear, privilege, access == Access::Write)
    }

    /// Translates one address: TLB, then the environment.
    pub fn translate(
        &mut self,
        linear: u64,
        privilege: Privilege,
        access: Access,
    ) -> Result<Translation, Fault> {
        if let Some(hit) = self.tlb.lookup(linear, privilege, access) {
            return Ok(Translation {
                gpa: hit.gpa,
                backing: Backing::Ram(hit.host),
            });
        }
        self.env
            .translate(self.cpu, self.tlb, linear, privilege, access)
    }

    fn pieces(
        &mut self,
        linear: u64,
        len: usize,
        privilege: Privilege,
        access: Access,
    ) -> Result<Pieces, Fault> {
        let room = (PAGE - (linear & (PAGE - 1))) as usize;
        let first_len = len.min(room);
        if len <= room {
            let translation = self.translate(linear, privilege, access)?;
            return Ok(Pieces {
                first: Piece { translation, len },
                second: None,
            });
        }
        let next = self.wrap(linear.wrapping_add(first_len as u64));
        let first = self.translate(linear, privilege, access)?;
        let second = self.translate(next, privilege, access)?;
        Ok(Pieces {
            first: Piece {
                translation: first,
                len: first_len,
            },
            second: Some(Piece {
                translation: second,
                len: len - first_len,
            }),
        })
    }

    /// Linear addresses are 32 bits wide outside long mode.
    #[inline]
    pub fn wrap(&self, linear: u64) -> u64 {
        if self.cpu.long_mode() {
            linear
        } else {
            linear & 0xffff_ffff
        }
    }

    /// Notes the data breakpoints (DR7) that an access hits; reported after the instruction.
    pub(crate) fn note_breakpoints(&mut self, linear: u64, len: usize, access: Access) {
        let control = self.cpu.dr7;
        if control & dr7::ENABLES == 0 {
            return;
        }
        for i in 0..4 {
            if control >> (2 * i) & 3 == 0 {
                continue;
            }
            let kind = control >> (16 + 4 * i) & 3;
            let hit_kind = match access {
                Access::Read => kind == 3,
                Access::Write => kind == 1 || kind == 3,
                Access::Fetch => false,
            };
            let size = [1, 2, 8, 4][(control >> (18 + 4 * i) & 3) as usize];
            let lo = self.cpu.dr[i] & !(size - 1);
            if hit_kind && linear < lo.wrapping_add(size) && lo < linear.wrapping_add(len as u64) {
                self.data_breakpoints |= (1 << i) & dr6::B;
            }
        }
    }

    fn read_piece(&mut self, piece: Piece, data: &mut [u8]) -> Result<(), Fault> {
        match piece.translation.backing {
            Backing::Ram(host) => {
                // SAFETY: the translation covers `piece.len` bytes of guest RAM, which stays
                // mapped while VCPUs run; other VCPUs may write it, as on hardware.
                unsafe { copy_from_guest(host, data) };
                Ok(())
            }
            Backing::Sensed(host) => {
                let rip = self.cpu.rip;
                self.env
                    .sensed(self.tlb, rip, &[piece.span()], Access::Read, &mut || {
                        // SAFETY: as above.
                        unsafe { copy_from_guest(host, data) };
                    })?;
                Ok(())
            }
            Backing::Device => {
                self.env.device_read(piece.translation.gpa, data);
                Ok(())
            }
        }
    }

    /// Reads `data.len()` bytes (at most a page), wherever they lie.
    pub fn read_bytes(
        &mut self,
        linear: u64,
        data: &mut [u8],
        privilege: Privilege,
    ) -> Result<(), Fault> {
        let linear = self.wrap(linear);
        let pieces = self.pieces(linear, data.len(), privilege, Access::Read)?;
        self.note_breakpoints(linear, data.len(), Access::Read);
        let (head, tail) = data.split_at_mut(pieces.first.len);
        self.read_piece(pieces.first, head)?;
        match pieces.second {
            Some(piece) => self.read_piece(piece, tail),
            None => Ok(()),
        }
    }

    /// Writes `data` (at most a page), wherever it goes: all of it or, on a fault, nothing.
    pub fn write_bytes(
        &mut self,
        linear: u64,
        data: &[u8],
        privilege: Privilege,
    ) -> Result<(), Fault> {
        let linear = self.wrap(linear);
        let pieces = self.pieces(linear, data.len(), privilege, Access::Write)?;
        self.commit(linear, &pieces, data)
    }

    /// As [`Self::write_bytes`] for an instruction that cannot be started again, because it has
    /// already had an effect elsewhere (a port was read): the write itself is repeated.
    pub fn write_bytes_committed(
        &mut self,
        linear: u64,
        data: &[u8],
        privilege: Privilege,
    ) -> Result<(), Exception> {
        loop {
            match self.write_bytes(linear, data, privilege) {
                Ok(()) => return Ok(()),
                Err(Fault::Exception(e)) => return Err(e),
                Err(Fault::Restart) => {}
            }
        }
    }

    /// Whether a write of `len` bytes would be permitted; sets accessed and dirty bits.
    pub fn probe_write(
        &mut self,
        linear: u64,
        len: usize,
        privilege: Privilege,
    ) -> Result<(), Fault> {
        let linear = self.wrap(linear);
        self.pieces(linear, len, privilege, Access::Write)
            .map(|_| ())
    }

    fn commit(&mut self, linear: u64, pieces: &Pieces, data: &[u8]) -> Result<(), Fault> {
        let (head, tail) = data.split_at(pieces.first.len);
        let parts = [Some((pieces.first, head)), pieces.second.map(|p| (p, tail))];
        let mut spans = [pieces.first.span(); 2];
        let mut sensed = 0;
        for (piece, bytes) in parts.iter().flatten() {
            if piece.is_sensed() {
                spans[sensed] = piece.span();
                sensed += 1;
                self.env.announce(bytes);
            }
        }
        let mut write_ram = || {
            for (piece, bytes) in parts.iter().flatten() {
                if let Some(host) = piece.host() {
                    // SAFETY: as in `read_piece`, for a page that may be written.
                    unsafe { copy_to_guest(host, bytes) };
                }
            }
        };
        if sensed == 0 {
            write_ram();
        } else {
            self.leave_block = true;
            let rip = self.cpu.rip;
            self.env.sensed(
                self.tlb,
                rip,
                &spans[..sensed],
                Access::Write,
                &mut write_ram,
            )?;
        }
        for (piece, bytes) in parts.iter().flatten() {
            if piece.host().is_none() {
                self.env.device_write(piece.translation.gpa, bytes);
            }
        }
        self.note_breakpoints(linear, data.len(), Access::Write);
        Ok(())
    }

    /// Reads a little-endian value of `N` bytes.
    #[inline(always)]
    pub fn read<const N: usize>(
        &mut self,
        linear: u64,
        privilege: Privilege,
    ) -> Result<u64, Fault> {
        let linear = self.wrap(linear);
        if let Some(host) = self.fast(linear, N, privilege, Access::Read) {
            // SAFETY: a TLB hit within a page is readable guest RAM.
            return Ok(unsafe { load::<N>(host) });
        }
        self.check_alignment(linear, N, privilege)?;
        let mut bytes = [0; 8];
        self.read_bytes(linear, &mut bytes[..N], privilege)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Writes the low `N` bytes of `value`.
    #[inline(always)]
    pub fn write<const N: usize>(
        &mut self,
        linear: u64,
        value: u64,
        privilege: Privilege,
    ) -> Result<(), Fault> {
        let linear = self.wrap(linear);
        if let Some(host) = self.fast(linear, N, privilege, Access::Write) {
            // SAFETY: a TLB hit within a page is writable guest RAM.
            unsafe { store::<N>(host, value) };
            return Ok(());
        }
        self.check_alignment(linear, N, privilege)?;
        self.write_bytes(linear, &value.to_le_bytes()[..N], privilege)
    }

    /// Reads `size` (1, 2, 4 or 8) bytes.
    pub fn read_sized(
        &mut self,
        linear: u64,
        size: usize,
        privilege: Privilege,
    ) -> Result<u64, Fault> {
        match size {
            1 => self.read::<1>(linear, privilege),
            2 => self.read::<2>(linear, privilege),
            4 => self.read::<4>(linear, privilege),
            _ => self.read::<8>(linear, privilege),
        }
    }

    /// Writes `size` (1, 2, 4 or 8) bytes.
    pub fn write_sized(
        &mut self,
        linear: u64,
        size: usize,
        value: u64,
        privilege: Privilege,
    ) -> Result<(), Fault> {
        match size {
            1 => self.write::<1>(linear, value, privilege),
            2 => self.write::<2>(linear, value, privilege),
            4 => self.write::<4>(linear, value, privilege),
            _ => self.write::<8>(linear, value, privilege),
        }
    }
}

/// The guest's exception for a vector that the host raised in an instruction of the guest.
pub(crate) fn host_fault(vector: u8) -> Fault {
    Fault::Exception(
        Exception::from_host_vector(vector).unwrap_or(Exception::general_protection(0)),
    )
}
