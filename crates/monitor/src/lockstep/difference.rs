//! What the two engines made of the same instructions, and where that differs.

use std::fmt::{self, Display, Formatter};

use iced_x86::Instruction;
use trapline_engine::step::run::Turn;
use trapline_x86::state::InterruptShadow;
use trapline_x86::{CpuState, Exception, SegmentRegister};

use super::rehearsal::MemoryDifference;

/// The status flags.
pub const STATUS: u64 = 0x8d5;
/// Bytes of an FXSAVE image that belong to the x87 state: the others are scratch.
const X87: [std::ops::Range<usize>; 2] = [0..24, 32..160];

/// Two engines disagree.
#[derive(Clone, Debug)]
pub struct Difference {
    /// Before the instructions.
    pub before: CpuState,
    pub translated: CpuState,
    pub stepped: CpuState,
    /// How translated code ended, if by an exception.
    pub translated_raises: Option<Exception>,
    /// How stepping ended.
    pub stepped_ends: Turn,
    /// What was stepped.
    pub instructions: Vec<Instruction>,
    pub memory: Vec<MemoryDifference>,
}

/// Whether registers are the same as far as the guest can tell. `ignored`: bits of RFLAGS that do
/// not count.
pub fn same(a: &CpuState, b: &CpuState, ignored: u64) -> bool {
    if (a.rflags ^ b.rflags) & !ignored != 0 || a.gpr != b.gpr || a.rip != b.rip {
        return false;
    }
    let x87 = X87
        .into_iter()
        .all(|range| a.vector.x87.0[range.clone()] == b.vector.x87.0[range]);
    x87 && a.vector.zmm == b.vector.zmm
        && a.vector.k == b.vector.k
        && a.vector.mxcsr == b.vector.mxcsr
        && a.seg == b.seg
        && a.cpl == b.cpl
        && a.gdtr == b.gdtr
        && a.idtr == b.idtr
        && a.ldtr == b.ldtr
        && a.tr == b.tr
        && (a.cr0, a.cr2, a.cr3, a.cr4) == (b.cr0, b.cr2, b.cr3, b.cr4)
        && (a.efer, a.xcr0) == (b.efer, b.xcr0)
        && (a.dr, a.dr6, a.dr7) == (b.dr, b.dr6, b.dr7)
        && a.msr == b.msr
        && a.activity == b.activity
        && a.nmi_blocked == b.nmi_blocked
        && same_shadow(a.shadow, b.shadow)
}

/// Translated code does not tell that STI has just been executed: its next instruction follows
/// before anything can be delivered.
fn same_shadow(a: InterruptShadow, b: InterruptShadow) -> bool {
    let of_move = |shadow| shadow == InterruptShadow::MovSs;
    of_move(a) == of_move(b)
}

const GPR: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];

/// Every register with a name, as text.
fn registers(cpu: &CpuState) -> Vec<(String, String)> {
    let hex = |value: u64| format!("{value:#x}");
    let mut all: Vec<(String, String)> = GPR
        .iter()
        .zip(cpu.gpr)
        .map(|(name, value)| (name.to_string(), hex(value)))
        .collect();
    let mut add = |name: &str, value: String| all.push((name.to_string(), value));
    add("rip", hex(cpu.rip));
    add("rflags", hex(cpu.rflags));
    let segments = [
        ("es", SegmentRegister::Es),
        ("cs", SegmentRegister::Cs),
        ("ss", SegmentRegister::Ss),
        ("ds", SegmentRegister::Ds),
        ("fs", SegmentRegister::Fs),
        ("gs", SegmentRegister::Gs),
    ];
    for (name, register) in segments {
        add(name, format!("{:x?}", cpu.segment(register)));
    }
    add("ldtr", format!("{:x?}", cpu.ldtr));
    add("tr", format!("{:x?}", cpu.tr));
    add("gdtr", format!("{:x?}", cpu.gdtr));
    add("idtr", format!("{:x?}", cpu.idtr));
    add("cpl", cpu.cpl.to_string());
    for (name, value) in [
        ("cr0", cpu.cr0),
        ("cr2", cpu.cr2),
        ("cr3", cpu.cr3),
        ("cr4", cpu.cr4),
        ("efer", cpu.efer),
        ("xcr0", cpu.xcr0),
        ("dr6", cpu.dr6),
        ("dr7", cpu.dr7),
        ("mxcsr", u64::from(cpu.vector.mxcsr)),
    ] {
        add(name, hex(value));
    }
    for (n, value) in cpu.dr.iter().enumerate() {
        add(&format!("dr{n}"), hex(*value));
    }
    for (n, value) in cpu.vector.k.iter().enumerate() {
        add(&format!("k{n}"), hex(*value));
    }
    for (n, zmm) in cpu.vector.zmm.iter().enumerate() {
        add(&format!("zmm{n}"), bytes(&zmm.0));
    }
    for range in X87 {
        let name = format!("x87 bytes {}-{}", range.start, range.end);
        add(&name, bytes(&cpu.vector.x87.0[range]));
    }
    add("msr", format!("{:x?}", cpu.msr));
    add("activity", format!("{:?}", cpu.activity));
    add("shadow", format!("{:?}", cpu.shadow));
    add("nmi blocked", cpu.nmi_blocked.to_string());
    all
}

/// Most significant byte first.
fn bytes(bytes: &[u8]) -> String {
    bytes
        .iter()
        .rev()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

impl Display for Difference {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "guest instructions:")?;
        for instruction in &self.instructions {
            writeln!(f, "  {:#018x}  {instruction}", instruction.ip())?;
        }
        match self.translated_raises {
            Some(exception) => writeln!(f, "translated code raises {exception:x?}")?,
            None => writeln!(f, "translated code ends at {:#x}", self.translated.rip)?,
        }
        writeln!(f, "stepping ends with {:x?}", self.stepped_ends)?;
        let before = registers(&self.before);
        let translated = registers(&self.translated);
        let stepped = registers(&self.stepped);
        for ((before, translated), stepped) in before.iter().zip(&translated).zip(&stepped) {
            if translated != stepped {
                writeln!(f, "{}:", translated.0)?;
                writeln!(f, "  before     {}", before.1)?;
                writeln!(f, "  translated {}", translated.1)?;
                writeln!(f, "  stepped    {}", stepped.1)?;
            }
        }
        for place in &self.memory {
            writeln!(f, "guest-physical {:#x}:", place.gpa)?;
            for (name, bytes) in [
                ("before    ", &place.before),
                ("translated", &place.first),
                ("stepped   ", &place.second),
            ] {
                writeln!(f, "  {name} {:02x?}", &bytes[..place.len.min(16)])?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(change: impl FnOnce(&mut CpuState)) -> CpuState {
        let mut cpu = CpuState::reset();
        change(&mut cpu);
        cpu
    }

    #[test]
    fn every_kind_of_register_counts() {
        let reset = CpuState::reset();
        let changes: [fn(&mut CpuState); 10] = [
            |cpu| cpu.gpr[15] = 1,
            |cpu| cpu.rip = 1,
            |cpu| cpu.rflags ^= 1,
            |cpu| cpu.vector.zmm[31].0[63] = 1,
            |cpu| cpu.vector.k[7] = 1,
            |cpu| cpu.vector.mxcsr ^= 1,
            |cpu| cpu.vector.x87.0[40] = 1,
            |cpu| cpu.seg[5].base = 1,
            |cpu| cpu.msr.kernel_gs_base = 1,
            |cpu| cpu.cr2 = 1,
        ];
        for (n, change) in changes.into_iter().enumerate() {
            assert!(!same(&reset, &with(change), 0), "change {n}");
        }
        assert!(same(&reset, &with(|cpu| cpu.rflags ^= 0x41), STATUS));
        assert!(same(&reset, &with(|cpu| cpu.vector.x87.0[200] = 1), 0));
        assert!(same(
            &reset,
            &with(|cpu| cpu.shadow = InterruptShadow::Sti),
            0
        ));
    }

    #[test]
    fn both_values_are_printed() {
        let difference = Difference {
            before: CpuState::reset(),
            translated: with(|cpu| cpu.gpr[3] = 0x1234),
            stepped: with(|cpu| cpu.gpr[3] = 0x5678),
            translated_raises: None,
            stepped_ends: Turn::Continue,
            instructions: Vec::new(),
            memory: Vec::new(),
        };
        let text = difference.to_string();
        assert!(text.contains("rbx:"), "{text}");
        assert!(text.contains("translated 0x1234"), "{text}");
        assert!(text.contains("stepped    0x5678"), "{text}");
        assert!(!text.contains("rcx:"), "{text}");
    }
}
