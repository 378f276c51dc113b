//! A Multiboot kernel that survives its own code: random code in small chunks, and an exception
//! handler that sets the machine up again and goes on with the next chunk.

use crate::code::noise;
use crate::random::Random;

use crate::support::{HEADER_BYTES, LOAD, multiboot};

// Places of the image, from the load address.
const ENTRY: u32 = 0x40;
pub const GDT: u32 = LOAD + 0x600;
const GDTR: u32 = LOAD + 0x700;
const IDTR: u32 = LOAD + 0x710;
const COUNTER: u32 = LOAD + 0x720;
const TARGET: u32 = LOAD + 0x728;
const REGISTERS: u32 = LOAD + 0x740;
const TSS: u32 = LOAD + 0x800;
const IDT: u32 = LOAD + 0x1000;
const PML4: u32 = LOAD + 0x2000;
const PDPT: u32 = LOAD + 0x3000;
const CHUNKS: u32 = LOAD + 0x4000;
const STACK: u32 = 0x20_0000;

const CHUNK_COUNT: u32 = 256;
const CHUNK_BYTES: u32 = 64;

/// Selectors of the stage's GDT.
const CODE: u16 = 8;
const DATA: u16 = 0x10;
const CODE_16: u16 = 0x18;
const CODE_64: u16 = 0x20;
const USER_DATA: u16 = 0x2b;
const USER_CODE_64: u16 = 0x33;
const TSS_SELECTOR: u16 = 0x38;

/// What the chunks are executed as.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Width {
    Bits16,
    Bits32,
    Bits64,
    /// 64-bit code at privilege level 3.
    User64,
}

impl Width {
    fn long(self) -> bool {
        matches!(self, Self::Bits64 | Self::User64)
    }
}

/// A kernel with random chunks.
pub fn kernel(random: &mut Random, width: Width) -> Vec<u8> {
    let mut body = vec![0; (CHUNKS - LOAD + CHUNK_COUNT * CHUNK_BYTES) as usize];
    let mut put = |address: u32, bytes: &[u8]| {
        let at = (address - LOAD) as usize;
        body[at..at + bytes.len()].copy_from_slice(bytes);
    };
    let handler = LOAD + 0x200;
    put(
        LOAD + HEADER_BYTES,
        &jump(LOAD + HEADER_BYTES, LOAD + ENTRY),
    );
    put(LOAD + ENTRY, &entry(LOAD + ENTRY, width, handler));
    put(handler, &next_chunk(width, handler));
    for (n, descriptor) in [
        0,
        0x00cf_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        // Its base is the load address.
        0x0000_9b10_0000_ffffu64,
        0x00af_9b00_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        0x0000_8910_0800_0067,
    ]
    .iter()
    .enumerate()
    {
        put(GDT + 8 * n as u32, &descriptor.to_le_bytes());
    }
    let pointer = |limit: u16, base: u32| {
        let mut bytes = limit.to_le_bytes().to_vec();
        bytes.extend_from_slice(&u64::from(base).to_le_bytes());
        bytes
    };
    put(GDTR, &pointer(0x7f, GDT));
    put(IDTR, &pointer(0xfff, IDT));
    for vector in 0..256 {
        let selector = if width.long() { CODE_64 } else { CODE };
        let low = handler & 0xffff | u32::from(selector) << 16;
        let high = handler & 0xffff_0000 | 0x8e00;
        let size = if width.long() { 16 } else { 8 };
        put(IDT + size * vector, &low.to_le_bytes());
        put(IDT + size * vector + 4, &high.to_le_bytes());
    }
    for n in 0..16 {
        let value = match random.below(4) {
            0 => random.bits(),
            1 => u64::from(LOAD) + random.below(0x8000) as u64,
            2 => random.below(0x100) as u64,
            _ => random.pick(&[0xfee0_0000, 0xfec0_0000, 0xffff_ffff_ffff_f000, 0xff_fffc]),
        };
        put(REGISTERS + 8 * n, &value.to_le_bytes());
    }
    if width.long() {
        put(TSS + 4, &u64::from(STACK).to_le_bytes());
    } else {
        put(TSS + 4, &STACK.to_le_bytes());
        put(TSS + 8, &u32::from(DATA).to_le_bytes());
    }
    put(PML4, &u64::from(PDPT | 7).to_le_bytes());
    for n in 0..4 {
        put(PDPT + 8 * n, &(u64::from(n) << 30 | 0x87).to_le_bytes());
    }
    for n in 0..CHUNK_COUNT {
        let mut code = Vec::new();
        while code.len() < CHUNK_BYTES as usize {
            let bits = match width {
                Width::Bits16 => 16,
                Width::Bits32 => 32,
                _ => 64,
            };
            noise(random, bits, &mut code);
        }
        put(CHUNKS + CHUNK_BYTES * n, &code[..CHUNK_BYTES as usize]);
    }
    multiboot(&body[HEADER_BYTES as usize..])
}

/// Machine code with absolute 32-bit addresses.
struct Assembler(Vec<u8>);

impl Assembler {
    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }
    fn dword(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }
}

/// JMP rel32 from `at` to `to`.
fn jump(at: u32, to: u32) -> Vec<u8> {
    let mut code = vec![0xe9];
    code.extend_from_slice(&to.wrapping_sub(at + 5).to_le_bytes());
    code
}

/// The entry, in 32-bit protected mode: own tables, paging for 64-bit code, then the first chunk.
fn entry(at: u32, width: Width, handler: u32) -> Vec<u8> {
    let mut a = Assembler(Vec::new());
    a.bytes(&[0xfa]);
    // lgdt; lidt
    a.bytes(&[0x0f, 0x01, 0x15]).dword(GDTR);
    a.bytes(&[0x0f, 0x01, 0x1d]).dword(IDTR);
    if width.long() {
        // mov eax, cr4; or eax, PAE | OSFXSR | OSXMMEXCPT | OSXSAVE; mov cr4, eax
        a.bytes(&[0x0f, 0x20, 0xe0, 0x0d]).dword(0x4_0620);
        a.bytes(&[0x0f, 0x22, 0xe0]);
        // mov eax, PML4; mov cr3, eax
        a.bytes(&[0xb8]).dword(PML4);
        a.bytes(&[0x0f, 0x22, 0xd8]);
        // mov ecx, EFER; mov eax, LME | SCE; xor edx, edx; wrmsr
        a.bytes(&[0xb9]).dword(0xc000_0080);
        a.bytes(&[0xb8]).dword(0x101);
        a.bytes(&[0x31, 0xd2, 0x0f, 0x30]);
        // mov eax, cr0; or eax, PG | MP; mov cr0, eax
        a.bytes(&[0x0f, 0x20, 0xc0, 0x0d]).dword(0x8000_0002);
        a.bytes(&[0x0f, 0x22, 0xc0]);
    }
    // mov ax, TSS; ltr ax
    a.bytes(&[0x66, 0xb8]).bytes(&TSS_SELECTOR.to_le_bytes());
    a.bytes(&[0x0f, 0x00, 0xd8]);
    // jmp far handler
    let selector = if width.long() { CODE_64 } else { CODE };
    a.bytes(&[0xea])
        .dword(handler)
        .bytes(&selector.to_le_bytes());
    assert!(at + (a.0.len() as u32) < handler);
    a.0
}

/// Everything goes on here: restores tables, segments and stack and enters the next chunk.
fn next_chunk(width: Width, at: u32) -> Vec<u8> {
    let mut a = Assembler(Vec::new());
    // An absolute operand through CS: DS may be unusable.
    let absolute = |a: &mut Assembler, opcode: &[u8], register: u8, address: u32| {
        a.bytes(opcode);
        if width.long() {
            a.bytes(&[0x04 | register << 3, 0x25]);
        } else {
            a.bytes(&[0x05 | register << 3]);
        }
        a.dword(address);
    };
    a.bytes(&[0xfa, 0xfc]);
    absolute(&mut a, &[0x2e, 0x0f, 0x01], 2, GDTR);
    absolute(&mut a, &[0x2e, 0x0f, 0x01], 3, IDTR);
    // mov eax, DATA; mov ds, es, ss, fs, gs
    a.bytes(&[0xb8]).dword(DATA.into());
    a.bytes(&[0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, 0x8e, 0xe0, 0x8e, 0xe8]);
    a.bytes(&[0xbc]).dword(STACK);
    if width.long() {
        // xor ecx, ecx; xor edx, edx; mov eax, 7; xsetbv
        a.bytes(&[0x31, 0xc9, 0x31, 0xd2, 0xb8, 7, 0, 0, 0, 0x0f, 0x01, 0xd1]);
    }
    // inc dword [COUNTER]; mov eax, [COUNTER]
    absolute(&mut a, &[0xff], 0, COUNTER);
    absolute(&mut a, &[0x8b], 0, COUNTER);
    // cmp eax, CHUNK_COUNT; jb over; mov al, 0x10; out 0xf4, al
    a.bytes(&[0x3d]).dword(CHUNK_COUNT);
    a.bytes(&[0x72, 4, 0xb0, 0x10, 0xe6, 0xf4]);
    // imul eax, eax, CHUNK_BYTES; add eax, CHUNKS; mov [TARGET], eax
    a.bytes(&[0x6b, 0xc0, CHUNK_BYTES as u8]);
    let chunks = match width {
        Width::Bits16 => CHUNKS - LOAD,
        _ => CHUNKS,
    };
    a.bytes(&[0x05]).dword(chunks);
    absolute(&mut a, &[0x89], 0, TARGET);
    match width {
        Width::Bits32 | Width::Bits16 => {
            a.bytes(&[0xbc]).dword(REGISTERS);
            a.bytes(&[0x61]);
            a.bytes(&[0xbc]).dword(STACK - 0x100);
            if width == Width::Bits32 {
                absolute(&mut a, &[0xff], 4, TARGET);
            } else {
                // mov word [TARGET + 4], CODE_16; jmp far [TARGET]
                absolute(&mut a, &[0x66, 0xc7], 0, TARGET + 4);
                a.bytes(&CODE_16.to_le_bytes());
                absolute(&mut a, &[0xff], 5, TARGET);
            }
        }
        Width::Bits64 | Width::User64 => {
            for register in 0..16u8 {
                if register != 4 {
                    let prefix = 0x48 | (register >> 3) << 2;
                    let place = REGISTERS + 8 * u32::from(register);
                    absolute(&mut a, &[prefix, 0x8b], register & 7, place);
                }
            }
            if width == Width::Bits64 {
                a.bytes(&[0xbc]).dword(STACK - 0x100);
                absolute(&mut a, &[0xff], 4, TARGET);
            } else {
                // An IRET frame: SS, RSP, RFLAGS with IF, CS, RIP.
                a.bytes(&[0x6a, USER_DATA as u8, 0x68])
                    .dword(STACK - 0x1000);
                a.bytes(&[0x68]).dword(0x202);
                a.bytes(&[0x6a, USER_CODE_64 as u8]);
                absolute(&mut a, &[0xff], 6, TARGET);
                a.bytes(&[0x48, 0xcf]);
            }
        }
    }
    assert!(at + (a.0.len() as u32) < GDT);
    a.0
}
