//! A run of instructions, the world that it starts from, and what became of it.

use iced_x86::{Instruction, Mnemonic};
use trapline_engine::env::Backing;

use crate::case::{Registers, STATUS};

/// Linear address of the run. The rest of its page is breakpoints.
pub const CODE: u64 = 0x1234_5000;
/// Linear address of the first page of data. There is nothing before it.
pub const DATA: u64 = 0x2345_6000;
/// What each page from [`DATA`] on is; nothing follows.
pub const PAGES: [Page; 5] = [
    Page::Writable,
    Page::Writable,
    Page::ReadOnly,
    Page::Hole,
    Page::Writable,
];
pub const PAGE: usize = 4096;
/// Bytes of a run at most.
pub const CODE_BYTES: usize = 112;
/// The direction flag, which is compared as well.
pub const DIRECTION: u64 = 0x400;
/// Has misaligned accesses raise #AC.
pub const ALIGNMENT_CHECK: u64 = 1 << 18;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Page {
    Writable,
    ReadOnly,
    Hole,
}

/// All pages, holes included.
#[derive(Clone, PartialEq, Eq)]
#[repr(C, align(4096))]
pub struct Memory(pub [[u8; PAGE]; PAGES.len()]);

impl Default for Memory {
    fn default() -> Self {
        Self([[0; PAGE]; PAGES.len()])
    }
}

#[derive(Clone)]
#[repr(C, align(4096))]
pub struct Case {
    pub memory: Memory,
    pub registers: Registers,
    pub code: [u8; CODE_BYTES],
    pub len: u32,
    /// The code segment's default operand size: 16, 32 or 64.
    pub bits: u32,
    /// Which of [`CODE_16`] a 16-bit run is in.
    pub segment: u32,
}

/// A 16-bit code segment.
pub struct Code16 {
    /// The offset of the run.
    pub start: u32,
    pub limit: u32,
}

/// The 16-bit code segments that runs are in: in the middle, where data has no offsets; across
/// 64 KiB, which code passes but no 16-bit branch; and before the limit.
pub const CODE_16: [Code16; 3] = [
    Code16 {
        start: 0x9000,
        limit: 0xffff,
    },
    Code16 {
        start: 0xfff0,
        limit: 0x1_ffff,
    },
    Code16 {
        start: 0xfff0,
        limit: 0xffff,
    },
];

impl Case {
    /// The base and the limit of the code segment.
    pub fn code_segment(&self) -> (u64, u32) {
        if self.bits != 16 {
            return (0, u32::MAX);
        }
        let segment = &CODE_16[self.segment as usize % CODE_16.len()];
        (CODE - u64::from(segment.start), segment.limit)
    }

    /// The instruction pointer of the run.
    pub fn ip(&self) -> u64 {
        CODE - self.code_segment().0
    }
}

impl Default for Case {
    fn default() -> Self {
        Self {
            memory: Memory::default(),
            registers: Registers::default(),
            code: [0xcc; CODE_BYTES],
            len: 0,
            bits: 64,
            segment: 0,
        }
    }
}

/// The linear address of offset 0 in data segments.
pub fn data_base(bits: u32) -> u64 {
    if bits == 16 { DATA } else { 0 }
}

/// In the place of a vector: the run does not end, or went into the middle of an instruction.
pub const ASTRAY: u32 = 0x100;

/// A case with what it was generated from.
pub struct Run {
    pub case: Case,
    pub instructions: Vec<Instruction>,
}

/// The world at the exception that ended a run.
#[derive(Clone, Default)]
#[repr(C, align(4096))]
pub struct Outcome {
    pub memory: Memory,
    pub registers: Registers,
    pub rip: u64,
    pub vector: u32,
    /// The error code of a page fault, as far as it is compared.
    pub error: u32,
    /// CR2 of a page fault.
    pub address: u64,
}

/// Where the host's user addresses end.
const USER_END: u64 = 0x7fff_ffff_f000;

/// The bits of a page fault's error code that are compared: present, write, fetch.
pub const ERROR_BITS: u32 = 0x13;

/// Status flags that an instruction leaves undefined and that this engine computes itself.
fn undefined_flags(run: &Run) -> u64 {
    use iced_x86::Mnemonic as M;
    run.instructions
        .iter()
        .fold(0, |flags, i| match i.mnemonic() {
            M::Aaa | M::Aas => flags | 0x8c4,
            M::Aad | M::Aam => flags | 0x811,
            M::Daa | M::Das => flags | 0x800,
            M::Bt | M::Bts | M::Btr | M::Btc => flags,
            _ => flags,
        })
}

/// MXCSR.MM.
const MISALIGNED_MASK: u32 = 1 << 17;

/// #SS, #GP, #PF or #AC.
fn faulty(vector: u32) -> bool {
    matches!(vector, 12..=14 | 17)
}

fn contains(run: &Run, is: impl Fn(Mnemonic) -> bool) -> bool {
    run.instructions.iter().any(|i| is(i.mnemonic()))
}

/// The names of what differs.
pub fn differences(
    run: &Run,
    reference: &Outcome,
    subject: &Outcome,
    translated: bool,
) -> Vec<String> {
    let mut names = Vec::new();
    // Where the engine gave up, the processor may have come to an end still.
    if subject.vector == ASTRAY {
        return names;
    }
    // AMD's misaligned exception mask is not shown to guests, so to load it is #GP here.
    if reference.registers.vector.mxcsr & MISALIGNED_MASK != 0 && subject.vector == 13 {
        return names;
    }
    // The processor reads ten bytes in two parts, and wraps the second's offset at 64 KiB even in a
    // segment that goes on behind it; the engine, like others, takes them from there.
    let ten_bytes = contains(run, |m| {
        matches!(
            m,
            Mnemonic::Fbld | Mnemonic::Fbstp | Mnemonic::Fld | Mnemonic::Fstp
        )
    });
    let from_start = reference.address.wrapping_sub(run.case.code_segment().0);
    if run.case.bits == 16 && ten_bytes && reference.vector == 14 && from_start < 10 {
        return names;
    }
    let mut check = |name: &str, x: u64, y: u64| {
        if x != y {
            names.push(format!("{name} {x:#x} {y:#x}"));
        }
    };
    // Which of two bad operands is told depends on the processor and on the prefix; whether an
    // operand may wrap at 4 GiB does too.
    let two = contains(run, |m| {
        use Mnemonic as M;
        matches!(m, M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq)
            // In two parts, one of which is past the limit.
            || run.case.bits == 16
                && matches!(
                    m,
                    M::Fbld | M::Fbstp | M::Fld | M::Fstp | M::Maskmovdqu | M::Vmaskmovdqu
                )
    });
    // Stores of 64 bytes too are in two parts (AMD Zen 4).
    let wide = run
        .instructions
        .iter()
        .any(|i| i.memory_size().size() == 64);
    let two = two || run.case.bits == 16 && wide;
    let edge = |address| !(0x40..0xffff_ffc0).contains(&address);
    let wraps = run.case.bits == 32 && edge(reference.address) && edge(subject.address);
    let either = faulty(reference.vector) && faulty(subject.vector) && (two || wraps);
    // How much of an instruction that is undefined must lie within the limit, processors decide.
    let undefined = contains(run, |m| matches!(m, Mnemonic::Ud0 | Mnemonic::Ud1));
    let limited = run.case.code_segment().1 == 0xffff;
    let either = either || undefined && limited && [reference.vector, subject.vector] == [6, 13];
    if !either {
        check("vector", reference.vector.into(), subject.vector.into());
    }
    check("rip", reference.rip, subject.rip);
    if reference.vector == 14 && !either {
        // Of addresses that are the host kernel's, it tells nothing.
        let bits = if reference.address >= USER_END {
            !1
        } else {
            !0
        };
        let (x, y) = (reference.error & bits, subject.error & bits);
        check("error", x.into(), y.into());
        check("cr2", reference.address, subject.address);
    }
    let (a, b) = (&reference.registers, &subject.registers);
    // Outside 64-bit mode nothing can be said of the upper halves and of R8 to R15.
    let (registers, mask) = if run.case.bits == 64 {
        (16, u64::MAX)
    } else {
        (8, 0xffff_ffff)
    };
    // POPA that faults may have loaded some.
    let popped = faulty(reference.vector)
        && contains(run, |m| matches!(m, Mnemonic::Popa | Mnemonic::Popad));
    for i in (0..registers).filter(|i| !popped || *i == 4) {
        check(&format!("gpr{i}"), a.gpr[i] & mask, b.gpr[i] & mask);
    }
    // At a fault the translator may have lost flags that the instruction, or the rest of the block,
    // sets anew.
    let lost = translated && reference.vector != 3;
    let status = if lost { 0 } else { STATUS };
    let flags = (status | DIRECTION) & !undefined_flags(run);
    check("flags", a.rflags & flags, b.rflags & flags);
    for i in 0..8 {
        check(&format!("k{i}"), a.vector.k[i], b.vector.k[i]);
    }
    check("mxcsr", a.vector.mxcsr.into(), b.vector.mxcsr.into());
    let gathered = faulty(reference.vector) && run.instructions.iter().any(Instruction::is_vsib);
    for i in 0..32 {
        // A gather that faults may have cleared what lies above its destination.
        let upper = if gathered { 16 } else { 64 };
        if a.vector.zmm[i].0[..upper] != b.vector.zmm[i].0[..upper] {
            names.push(format!(
                "zmm{i}\n  {:02x?}\n  {:02x?}",
                a.vector.zmm[i].0, b.vector.zmm[i].0
            ));
        }
    }
    // Control, status and tag words, and the registers. The pointers of the last instruction are
    // compared where thunks are.
    // The processor enters MMX mode even if MASKMOVQ then faults.
    let entered = faulty(reference.vector) && contains(run, |m| m == Mnemonic::Maskmovq);
    let registers = (0..8).map(|i| (32 + 16 * i, 10));
    for (at, len) in std::iter::once((0, 5)).chain(registers) {
        let (x, y) = (&a.vector.x87.0[at..at + len], &b.vector.x87.0[at..at + len]);
        if x != y && !entered {
            names.push(format!("x87 at {at}: {x:02x?} {y:02x?}"));
        }
    }
    if reference.memory != subject.memory {
        let pairs = reference.memory.0.as_flattened().iter();
        let pairs = pairs.zip(subject.memory.0.as_flattened()).enumerate();
        for (i, (x, y)) in pairs.filter(|(_, (x, y))| x != y).take(8) {
            names.push(format!("[{:#x}] {x:#x} {y:#x}", DATA + i as u64));
        }
    }
    names
}

/// How the engine sees a page.
pub fn backing(how: super::engine::Backed, page: usize, host: *mut u8) -> Backing {
    use super::engine::Backed;
    match how {
        Backed::Direct | Backed::Untracked => Backing::Ram(host),
        Backed::Sensed => Backing::Sensed(host),
        Backed::Mixed if page == 1 => Backing::Device,
        Backed::Mixed => Backing::Sensed(host),
    }
}
