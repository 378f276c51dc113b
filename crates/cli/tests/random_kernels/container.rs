//! Images around code: random bytes, and each kind of kernel with its headers whole or damaged.

use std::path::Path;

use crate::code::noise;
use crate::random::Random;
use crate::stage::{self, Width};
use crate::support::multiboot;

/// Files to mutate.
pub struct Guests(Vec<Vec<u8>>);

impl Guests {
    /// Reads every file in `folder`; none without one.
    pub fn read(folder: Option<&Path>) -> Self {
        let Some(folder) = folder else {
            return Self(Vec::new());
        };
        let mut paths: Vec<_> = std::fs::read_dir(folder)
            .expect("TRAPLINE_FUZZ_GUESTS names a folder")
            .filter_map(|entry| entry.ok().map(|entry| entry.path()))
            .filter(|path| path.is_file())
            .collect();
        paths.sort();
        Self(
            paths
                .iter()
                .filter_map(|path| std::fs::read(path).ok())
                .collect(),
        )
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }
}

/// A kernel of some kind, and the kind's name.
pub fn kernel(random: &mut Random, guests: &Guests) -> (&'static str, Vec<u8>) {
    let (kind, mut image) = match random.below(if guests.0.is_empty() { 12 } else { 16 }) {
        0 => return ("noise", plain(random)),
        1 => ("Multiboot, bare", multiboot(&bare(random))),
        2 => ("ELF, bare", elf(&bare(random))),
        3 => ("bzImage, bare", bz_image(&bare(random))),
        4..=6 => (
            "Multiboot, 32-bit stage",
            stage::kernel(random, Width::Bits32),
        ),
        7 => (
            "Multiboot, 16-bit stage",
            stage::kernel(random, Width::Bits16),
        ),
        8 | 9 => (
            "Multiboot, 64-bit stage",
            stage::kernel(random, Width::Bits64),
        ),
        10 => (
            "Multiboot, user stage",
            stage::kernel(random, Width::User64),
        ),
        11 => {
            let code = bare(random);
            let mut image = match random.below(3) {
                0 => multiboot(&code),
                1 => elf(&code),
                _ => bz_image(&code),
            };
            damage_header(random, &mut image);
            return ("damaged header", image);
        }
        _ => ("mutated guest", mutated(random, &guests.0)),
    };
    if random.one_in(40) {
        image.truncate(random.below(image.len()));
    }
    (kind, image)
}

fn plain(random: &mut Random) -> Vec<u8> {
    let mut bytes = vec![0; random.below(20_000)];
    random.fill(&mut bytes);
    bytes
}

fn bare(random: &mut Random) -> Vec<u8> {
    let mut code = Vec::new();
    while code.len() < 8192 {
        noise(random, 32, &mut code);
    }
    code
}

/// An ELF64 file with a PVH entry note: code at 1 MiB.
pub fn elf(code: &[u8]) -> Vec<u8> {
    const NOTE: usize = 64 + 2 * 56;
    const OFFSET: usize = 0x1000;
    const LOAD: u64 = 0x10_0000;
    let mut image = vec![0; OFFSET];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &2u16.to_le_bytes());
    put(18, &62u16.to_le_bytes());
    put(20, &1u32.to_le_bytes());
    put(24, &LOAD.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(52, &64u16.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &2u16.to_le_bytes());
    let mut segment = |at: usize, kind: u32, offset: u64, address: u64, bytes: u64| {
        put(at, &kind.to_le_bytes());
        put(at + 4, &7u32.to_le_bytes());
        for (n, value) in [offset, address, address, bytes, bytes, 4]
            .iter()
            .enumerate()
        {
            put(at + 8 + 8 * n, &value.to_le_bytes());
        }
    };
    segment(64, 1, OFFSET as u64, LOAD, code.len() as u64);
    segment(64 + 56, 4, NOTE as u64, 0, 20);
    put(NOTE, &4u32.to_le_bytes());
    put(NOTE + 4, &4u32.to_le_bytes());
    put(NOTE + 8, &18u32.to_le_bytes());
    put(NOTE + 12, b"Xen\0");
    put(NOTE + 16, &(LOAD as u32).to_le_bytes());
    image.extend_from_slice(code);
    image
}

/// A bzImage whose 64-bit entry leads into `code`.
pub fn bz_image(code: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 2 * 512];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1f4, &(((0x200 + code.len()) / 16) as u32).to_le_bytes());
    put(0x1fe, &0xaa55u16.to_le_bytes());
    put(0x200, &[0xeb, 0x66]);
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x230, &0x1000u32.to_le_bytes());
    put(0x234, &[1]);
    put(0x236, &1u16.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x258, &0x20_0000u64.to_le_bytes());
    put(0x260, &0x10_0000u32.to_le_bytes());
    image.resize(image.len() + 0x200, 0x90);
    image.extend_from_slice(code);
    image
}

fn damage_header(random: &mut Random, image: &mut Vec<u8>) {
    let header = if image.len() > 0x270 {
        0x270
    } else {
        image.len()
    };
    for _ in 0..1 + random.below(6) {
        let at = random.below(header);
        image[at] = match random.below(4) {
            0 => 0,
            1 => 0xff,
            2 => image[at] ^ 1 << random.below(8),
            _ => random.bits() as u8,
        };
    }
    if random.one_in(4) {
        image.truncate(random.below(image.len()));
    }
}

fn mutated(random: &mut Random, guests: &[Vec<u8>]) -> Vec<u8> {
    let mut image = guests[random.below(guests.len())].clone();
    if image.is_empty() {
        return image;
    }
    // The first page is headers.
    let first = if random.one_in(8) {
        0
    } else {
        0x1000.min(image.len() - 1)
    };
    for _ in 0..1 << random.below(8) {
        let at = first + random.below(image.len() - first);
        match random.below(4) {
            0 => image[at] ^= 1 << random.below(8),
            1 => image[at] = random.bits() as u8,
            2 => {
                let from = first + random.below(image.len() - first);
                let n = random.below(64).min(image.len() - at.max(from));
                image.copy_within(from..from + n, at);
            }
            _ => {
                let mut code = Vec::new();
                noise(random, 64, &mut code);
                let n = code.len().min(image.len() - at);
                image[at..at + n].copy_from_slice(&code[..n]);
            }
        }
    }
    image
}
