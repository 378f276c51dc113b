//! One instruction with the state that it starts from, and what became of that state.

use trapline_x86::vector::VectorState;

/// Linear address of the instruction.
pub const CODE: u64 = 0x1000_0000;
/// Linear address of the data that memory operands reach.
pub const DATA: u64 = 0x2000_0000;
/// Bytes of data compared.
pub const DATA_BYTES: usize = 320;
/// Status flags in RFLAGS.
pub const STATUS: u64 = 0x8d5;

/// The registers that unprivileged instructions compute with.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
#[repr(C, align(64))]
pub struct Registers {
    pub gpr: [u64; 16],
    pub rflags: u64,
    pub vector: VectorState,
}

/// The bytes that memory operands reach, at an address that is a multiple of 64.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C, align(64))]
pub struct Data(pub [u8; DATA_BYTES]);

/// Registers and memory before or after the instruction.
#[derive(Clone, PartialEq, Eq, Debug)]
#[repr(C, align(64))]
pub struct World {
    pub registers: Registers,
    pub data: Data,
}

impl Default for World {
    fn default() -> Self {
        Self {
            registers: Registers::default(),
            data: Data([0; DATA_BYTES]),
        }
    }
}

/// An instruction and the world before it.
#[derive(Clone, Debug, Default)]
#[repr(C, align(64))]
pub struct Case {
    pub before: World,
    pub bytes: [u8; 16],
    pub len: u32,
    /// The code segment's default operand size: 16, 32 or 64.
    pub bits: u32,
}

impl Case {
    pub fn code(&self) -> &[u8] {
        &self.bytes[..self.len as usize]
    }

    pub fn ip(&self) -> u64 {
        ip(self.bits)
    }
}

/// The instruction pointer at [`CODE`]. The 16-bit code segment begins there, the others at 0.
pub fn ip(bits: u32) -> u64 {
    if bits == 16 { 0 } else { CODE }
}

/// The world after an instruction, and the vector of the exception that it raised.
#[derive(Clone, Debug, Default)]
#[repr(C, align(64))]
pub struct Outcome {
    pub after: World,
    /// A vector, or [`NO_FAULT`].
    pub fault: u32,
}

/// The value of [`Outcome::fault`] after an instruction that completed.
pub const NO_FAULT: u32 = u32::MAX;

/// The names of what differs.
pub fn differences(
    case: &Case,
    reference: &Outcome,
    subject: &Outcome,
    address: u64,
) -> Vec<String> {
    let mut names = Vec::new();
    if reference.fault != subject.fault {
        names.push(format!("fault {:#x} {:#x}", reference.fault, subject.fault));
    }
    let (a, b) = (&reference.after.registers, &subject.after.registers);
    // Outside 64-bit mode nothing can be said of the upper halves and of R8 to R15.
    let (registers, mask) = if case.bits == 64 {
        (16, u64::MAX)
    } else {
        (8, 0xffff_ffff)
    };
    for i in 0..registers {
        if (a.gpr[i] ^ b.gpr[i]) & mask != 0 {
            names.push(format!("gpr{i} {:#x} {:#x}", a.gpr[i], b.gpr[i]));
        }
    }
    if (a.rflags ^ b.rflags) & STATUS != 0 {
        names.push(format!(
            "flags {:#x} {:#x}",
            a.rflags & STATUS,
            b.rflags & STATUS
        ));
    }
    for i in 0..32 {
        if a.vector.zmm[i] != b.vector.zmm[i] {
            names.push(format!(
                "zmm{i}\n  {:02x?}\n  {:02x?}",
                a.vector.zmm[i].0, b.vector.zmm[i].0
            ));
        }
    }
    for i in 0..8 {
        if a.vector.k[i] != b.vector.k[i] {
            names.push(format!("k{i} {:#x} {:#x}", a.vector.k[i], b.vector.k[i]));
        }
    }
    if a.vector.mxcsr != b.vector.mxcsr {
        names.push(format!("mxcsr {:#x} {:#x}", a.vector.mxcsr, b.vector.mxcsr));
    }
    x87_differences(&a.vector.x87.0, &b.vector.x87.0, address, &mut names);
    if reference.after.data != subject.after.data {
        for (i, (x, y)) in reference
            .after
            .data
            .0
            .iter()
            .zip(&subject.after.data.0)
            .enumerate()
        {
            if x != y {
                names.push(format!("[{:#x}] {x:#x} {y:#x}", DATA + i as u64));
            }
        }
    }
    names
}

fn x87_differences(a: &[u8; 512], b: &[u8; 512], address: u64, names: &mut Vec<String>) {
    let field = |image: &[u8; 512], at: usize, len: usize| {
        image[at..at + len]
            .iter()
            .rev()
            .fold(0u64, |value, byte| value << 8 | u64::from(*byte))
    };
    for (name, at, len) in [
        ("fcw", 0, 2),
        ("fsw", 2, 2),
        ("ftw", 4, 1),
        ("fop", 6, 2),
        ("fip", 8, 8),
    ] {
        let (mut x, mut y) = (field(a, at, len), field(b, at, len));
        if name == "fop" && address != 0 {
            // The last opcode tells how its memory operand was addressed. That differs in thunks.
            (x, y) = (x & 0x738, y & 0x738);
        }
        if x != y {
            names.push(format!("{name} {x:#x} {y:#x}"));
        }
    }
    // The pointer to data just accessed is hidden by thunks.
    let (x, y) = (field(a, 16, 8), field(b, 16, 8));
    if x != y && !(x == address && y == 0) {
        names.push(format!("fdp {x:#x} {y:#x}"));
    }
    for i in 0..8 {
        let at = 32 + i * 16;
        if a[at..at + 10] != b[at..at + 10] {
            names.push(format!(
                "st{i} {:02x?} {:02x?}",
                &a[at..at + 10],
                &b[at..at + 10]
            ));
        }
    }
}
