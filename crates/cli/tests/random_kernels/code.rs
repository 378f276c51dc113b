//! Random code: noise, and instructions that reach deep into the machine with random operands.

use crate::random::Random;

/// Model-specific registers that mean something.
const MSRS: &[u32] = &[
    0x10,
    0x1b,
    0x3a,
    0x3b,
    0x8b,
    0xfe,
    0x174,
    0x175,
    0x176,
    0x179,
    0x17a,
    0x1a0,
    0x1d9,
    0x200,
    0x201,
    0x250,
    0x277,
    0x2ff,
    0x6e0,
    0x802,
    0x808,
    0x80b,
    0x80d,
    0x80f,
    0x828,
    0x830,
    0x832,
    0x838,
    0x83e,
    0x83f,
    0xda0,
    0xc000_0080,
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0100,
    0xc000_0101,
    0xc000_0102,
    0xc000_0103,
    0xc001_0015,
    0xc001_001f,
];

/// Ports with a device behind them, and around.
const PORTS: &[u16] = &[
    0x20, 0x21, 0x40, 0x41, 0x42, 0x43, 0x60, 0x61, 0x64, 0x70, 0x71, 0x80, 0x92, 0xa0, 0xa1,
    0x3f8, 0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x3fd, 0x3fe, 0x3ff, 0x600, 0x604, 0x608, 0xb008, 0xcf8,
    0xcf9, 0xcfc, 0x4d0, 0x4d1,
];

/// Appends a little random code for a mode with `bits`.
pub fn noise(random: &mut Random, bits: u32, code: &mut Vec<u8>) {
    match random.below(14) {
        0..=3 => bytes(random, code),
        4 | 5 => two_byte(random, code),
        6 => vector(random, code),
        7 => group(random, code),
        8 => port(random, bits, code),
        9 => msr(random, code),
        10 => control(random, code),
        11 => device(random, bits, code),
        12 => table(random, bits, code),
        _ => other(random, code),
    }
}

fn bytes(random: &mut Random, code: &mut Vec<u8>) {
    for _ in 0..1 + random.below(16) {
        code.push(random.bits() as u8);
    }
}

fn prefix(random: &mut Random, code: &mut Vec<u8>) {
    for _ in 0..random.below(3) {
        code.push(random.pick(&[
            0x66, 0x67, 0xf0, 0xf2, 0xf3, 0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x48, 0x41, 0x4f,
        ]));
    }
}

fn rest(random: &mut Random, code: &mut Vec<u8>) {
    for _ in 0..random.below(8) {
        code.push(random.bits() as u8);
    }
}

fn two_byte(random: &mut Random, code: &mut Vec<u8>) {
    prefix(random, code);
    code.push(0x0f);
    code.push(random.bits() as u8);
    rest(random, code);
}

fn vector(random: &mut Random, code: &mut Vec<u8>) {
    let escape: &[u8] = random.pick(&[
        &[0x62][..],
        &[0xc4][..],
        &[0xc5][..],
        &[0x0f, 0x38][..],
        &[0x0f, 0x3a][..],
        &[0x0f, 0xae][..],
        &[0x0f, 0xc7][..],
    ]);
    prefix(random, code);
    code.extend_from_slice(escape);
    for _ in 0..6 {
        code.push(random.bits() as u8);
    }
}

/// Descriptor tables, far transfers, system groups.
fn group(random: &mut Random, code: &mut Vec<u8>) {
    prefix(random, code);
    let opcode: &[u8] = random.pick(&[
        &[0x0f, 0x00][..],
        &[0x0f, 0x01][..],
        &[0x0f, 0x09][..],
        &[0x0f, 0x20][..],
        &[0x0f, 0x21][..],
        &[0x0f, 0x22][..],
        &[0x0f, 0x23][..],
        &[0x0f, 0x06][..],
        &[0x0f, 0x05][..],
        &[0x0f, 0x07][..],
        &[0x0f, 0x34][..],
        &[0x0f, 0x35][..],
        &[0x0f, 0xaa][..],
        &[0x0f, 0xc7][..],
        &[0x0f, 0x38, 0x82][..],
        &[0x8e][..],
        &[0xff][..],
        &[0xcf][..],
        &[0xcb][..],
        &[0x9a][..],
        &[0xea][..],
        &[0xc4][..],
        &[0xc8][..],
        &[0x9d][..],
        &[0xcd][..],
        &[0x6c][..],
        &[0x6e][..],
        &[0xfb][..],
        &[0xfa][..],
    ]);
    code.extend_from_slice(opcode);
    rest(random, code);
}

/// MOV EAX, imm; the immediate is 16 bits wide in 16-bit code, which makes other code of the rest.
fn set_eax(value: u32, code: &mut Vec<u8>) {
    code.push(0xb8);
    code.extend_from_slice(&value.to_le_bytes());
}

fn set(register: u8, value: u32, code: &mut Vec<u8>) {
    code.push(0xb8 + register);
    code.extend_from_slice(&value.to_le_bytes());
}

fn value(random: &mut Random) -> u32 {
    match random.below(4) {
        0 => random.bits() as u32,
        1 => random.bits() as u32 & 0xff,
        2 => 1 << random.below(32),
        _ => random.pick(&[
            0,
            u32::MAX,
            0x0010_0000,
            0x000c_4500,
            0xfee0_0000,
            0x8000_0000,
        ]),
    }
}

fn port(random: &mut Random, bits: u32, code: &mut Vec<u8>) {
    let port = if random.one_in(6) {
        random.bits() as u16
    } else {
        random.pick(PORTS)
    };
    if bits == 16 {
        code.push(0xba);
        code.extend_from_slice(&port.to_le_bytes());
    } else {
        set(2, port.into(), code);
        set_eax(value(random), code);
    }
    for _ in 0..1 + random.below(3) {
        code.push(random.pick(&[0xee, 0xef, 0xec, 0xed]));
    }
}

fn msr(random: &mut Random, code: &mut Vec<u8>) {
    set(1, random.pick(MSRS), code);
    if random.one_in(3) {
        code.extend_from_slice(&[0x0f, 0x32]);
        return;
    }
    set(2, if random.one_in(2) { 0 } else { value(random) }, code);
    set_eax(value(random), code);
    code.extend_from_slice(&[0x0f, 0x30]);
}

/// MOV to a control or debug register with one bit changed, or with anything.
fn control(random: &mut Random, code: &mut Vec<u8>) {
    let opcode = random.pick(&[0x22, 0x22, 0x23]);
    let register = 0xc0 | (random.below(8) as u8) << 3;
    if random.one_in(2) {
        code.extend_from_slice(&[0x0f, opcode - 2, register]);
        // btc eax, n
        code.extend_from_slice(&[0x0f, 0xba, 0xf8, random.below(32) as u8]);
    } else {
        set_eax(value(random), code);
    }
    code.extend_from_slice(&[0x0f, opcode, register]);
}

/// A store to or load from device registers, the image itself, or a hole.
fn device(random: &mut Random, bits: u32, code: &mut Vec<u8>) {
    let address = match random.below(6) {
        0 | 1 => 0xfee0_0000 + (random.below(0x40) as u32) * 16,
        2 => 0xfec0_0000 + random.pick(&[0, 0x10, 0x20, 0x40]),
        3 => 0x10_0000 + random.below(0x8000) as u32,
        4 => random.below(0x100_0000) as u32 & !7 | random.below(8) as u32,
        _ => random.bits() as u32,
    };
    // mov dword ptr [address], imm or mov eax, [address]
    let sib: &[u8] = if bits == 64 { &[0x04, 0x25] } else { &[0x05] };
    if random.one_in(3) {
        code.push(0x8b);
        code.extend_from_slice(sib);
        code.extend_from_slice(&address.to_le_bytes());
    } else {
        code.push(0xc7);
        code.extend_from_slice(sib);
        code.extend_from_slice(&address.to_le_bytes());
        code.extend_from_slice(&value(random).to_le_bytes());
    }
}

/// Writes into descriptor tables or page tables of the stage, then uses a selector.
fn table(random: &mut Random, bits: u32, code: &mut Vec<u8>) {
    let sib: &[u8] = if bits == 64 { &[0x04, 0x25] } else { &[0x05] };
    let address = crate::stage::GDT + 8 * random.below(16) as u32 + 4 * random.below(2) as u32;
    code.push(0xc7);
    code.extend_from_slice(sib);
    code.extend_from_slice(&address.to_le_bytes());
    let descriptor = match random.below(3) {
        0 => random.bits() as u32,
        1 => 0x00cf_9300 ^ 1 << random.below(32),
        _ => (random.bits() as u32 & 0x00f0_0000) | 0x8000 | (random.bits() as u32 & 0x7f00),
    };
    code.extend_from_slice(&descriptor.to_le_bytes());
    set_eax(8 * random.below(16) as u32 + random.below(8) as u32, code);
    let used: &[u8] = random.pick(&[
        &[0x8e, 0xd8][..],
        &[0x8e, 0xd0][..],
        &[0x8e, 0xe0][..],
        &[0x8e, 0xe8][..],
        &[0x0f, 0x00, 0xd0][..],
        &[0x0f, 0x00, 0xd8][..],
        &[0x0f, 0x02, 0xc8][..],
        &[0x0f, 0x00, 0xe0][..],
        &[0x50, 0x50, 0xcb][..],
        &[0x50, 0x50, 0x50, 0xcf][..],
    ]);
    code.extend_from_slice(used);
}

fn other(random: &mut Random, code: &mut Vec<u8>) {
    let piece: &[u8] = random.pick(&[
        &[0xf3, 0xa4][..],
        &[0xf3, 0xab][..],
        &[0xf2, 0xae][..],
        &[0x9c, 0x80, 0x4c, 0x24, 0x01, 0x01, 0x9d, 0x90, 0x90][..],
        &[0xf4][..],
        &[0xfb, 0xf3, 0x90][..],
        &[0x0f, 0xa2][..],
        &[0x0f, 0xae, 0x2c, 0x24][..],
        &[0x0f, 0xae, 0x0c, 0x24][..],
        &[0x0f, 0xc7, 0x1c, 0x24][..],
        &[0xc8, 0x10, 0x00, 0x1f][..],
        &[0xe8, 0xfb, 0xff, 0xff, 0xff][..],
        &[0xeb, 0xfe][..],
        &[0x0f, 0x0b][..],
        &[0xcc][..],
        &[0xf1][..],
        &[0xce][..],
    ]);
    if piece == [0xf4] && !random.one_in(16) || piece == [0xeb, 0xfe] && !random.one_in(16) {
        return;
    }
    code.extend_from_slice(piece);
}
