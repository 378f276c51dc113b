//! Synthetic images of every format, whole, cut and damaged.

use std::io::Cursor;
use std::path::PathBuf;

use linux_loader::bootparam::{boot_params, setup_header};
use linux_loader::loader::elf::start_info::{hvm_modlist_entry, hvm_start_info};
use proptest::prelude::*;
use trapline_x86::Gpr;
use vm_memory::ByteValued;

use super::layout::{BOOT_INFO, CMDLINE};
use super::*;
use crate::outcome::Blame;

const RAM: u64 = 16 << 20;
/// What the synthetic kernels' code is filled with.
const FILLING: u8 = 0x90;

fn ram(bytes: u64) -> GuestMemoryMmap<()> {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes as usize)]).unwrap()
}

fn request<'a>(cmdline: &'a str, initramfs: Option<&'a Path>) -> LoadRequest<'a> {
    LoadRequest {
        kernel: Path::new("the-kernel"),
        initramfs,
        cmdline,
        acpi_rsdp: Some(0xe_0000),
    }
}

fn try_load(memory: &GuestMemoryMmap<()>, kernel: &[u8]) -> Result<BootState, LoadError> {
    load_from(memory, Cursor::new(kernel), &request("", None))
}

/// The kernel fault that loading `kernel` ends with.
fn fault(kernel: &[u8]) -> KernelFault {
    match try_load(&ram(RAM), kernel) {
        Err(LoadError::Kernel { fault, .. }) => fault,
        other => panic!("{other:?}"),
    }
}

fn read<T: ByteValued>(memory: &GuestMemoryMmap<()>, address: u64) -> T {
    memory.read_obj(GuestAddress(address)).unwrap()
}

fn string(memory: &GuestMemoryMmap<()>, address: u64) -> String {
    let bytes = (address..)
        .map(|a| read::<u8>(memory, a))
        .take_while(|b| *b != 0);
    String::from_utf8(bytes.collect()).unwrap()
}

/// A file that is removed with the value.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str, content: &[u8]) -> Self {
        let name = format!("trapline-load-{}-{name}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, content).unwrap();
        Self(path)
    }
}
impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

const BZIMAGE_LOAD: u64 = 4 << 20;
const BZIMAGE_INIT: u64 = 2 << 20;

fn bzimage_with(change: impl FnOnce(&mut setup_header)) -> Vec<u8> {
    let mut header = setup_header {
        setup_sects: 1,
        syssize: 1024 / 16,
        boot_flag: 0xaa55,
        // Skips to 0x26c.
        jump: 0x6aeb,
        header: 0x5372_6448,
        version: 0x020f,
        loadflags: 1,
        initrd_addr_max: 0x7fff_ffff,
        relocatable_kernel: 1,
        kernel_alignment: 2 << 20,
        xloadflags: 1,
        cmdline_size: 255,
        pref_address: BZIMAGE_LOAD,
        init_size: BZIMAGE_INIT as u32,
        ..Default::default()
    };
    change(&mut header);
    let mut image = vec![0; 1024 + 1024];
    image[1024..].fill(FILLING);
    let bytes = header.as_slice();
    image[0x1f1..0x1f1 + bytes.len()].copy_from_slice(bytes);
    image
}

fn bzimage() -> Vec<u8> {
    bzimage_with(|_| {})
}

#[derive(Clone, Copy)]
struct ElfOptions {
    wide: bool,
    pvh: Option<u32>,
    multiboot: Option<u32>,
    entry: u64,
    memory_bytes: u64,
    physical: u64,
}

const ELF: ElfOptions = ElfOptions {
    wide: true,
    pvh: Some(0x10_0010),
    multiboot: None,
    entry: 0x10_0010,
    memory_bytes: 0x2000,
    physical: 0x10_0000,
};

/// An ELF file with one segment (its 256 bytes at offset 0x200) and one of notes at 0x180.
fn elf(o: ElfOptions) -> Vec<u8> {
    let mut f = b"\x7fELF".to_vec();
    f.extend([if o.wide { 2 } else { 1 }, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let word = |f: &mut Vec<u8>, v: u64| match o.wide {
        true => f.extend(v.to_le_bytes()),
        false => f.extend((v as u32).to_le_bytes()),
    };
    f.extend(2u16.to_le_bytes());
    f.extend(if o.wide { 62u16 } else { 3 }.to_le_bytes());
    f.extend(1u32.to_le_bytes());
    word(&mut f, o.entry);
    word(&mut f, if o.wide { 64 } else { 52 });
    word(&mut f, 0);
    f.extend(0u32.to_le_bytes());
    for v in if o.wide {
        [64u16, 56, 2, 0, 0, 0]
    } else {
        [52, 32, 2, 0, 0, 0]
    } {
        f.extend(v.to_le_bytes());
    }
    for (kind, offset, address, file, memory) in [
        (4u32, 0x180, 0, 0x28, 0x28),
        (1, 0x200, o.physical, 0x100, o.memory_bytes),
    ] {
        f.extend(kind.to_le_bytes());
        if o.wide {
            f.extend(5u32.to_le_bytes());
        }
        for v in [offset, address, address, file, memory] {
            word(&mut f, v);
        }
        if !o.wide {
            f.extend(5u32.to_le_bytes());
        }
        word(&mut f, 4);
    }
    f.resize(0x180, 0);
    if let Some(entry) = o.pvh {
        // A note of someone else comes first.
        for v in [4u32, 4, 18, u32::from_le_bytes(*b"GNU\0"), 7] {
            f.extend(v.to_le_bytes());
        }
        for v in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), entry] {
            f.extend(v.to_le_bytes());
        }
    }
    f.resize(0x1c0, 0);
    if let Some(flags) = o.multiboot {
        for v in multiboot_header(flags) {
            f.extend(v.to_le_bytes());
        }
    }
    f.resize(0x200, 0);
    f.resize(0x300, FILLING);
    f
}

fn multiboot_header(flags: u32) -> [u32; 3] {
    [
        0x1bad_b002,
        flags,
        0u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags),
    ]
}

/// A flat Multiboot image of 256 bytes: header address, load, load end, bss end, entry.
fn flat(addresses: [u32; 5]) -> Vec<u8> {
    // 16 bytes before the header.
    let mut f = vec![FILLING; 16];
    for v in multiboot_header(0x1_0003).into_iter().chain(addresses) {
        f.extend(v.to_le_bytes());
    }
    f.resize(256, FILLING);
    f
}

const FLAT: [u32; 5] = [0x10_0010, 0x10_0000, 0x10_0100, 0x10_1000, 0x10_0030];

#[test]
fn a_bzimage_gets_its_zero_page() {
    let memory = ram(RAM);
    let initramfs = Scratch::new("zero-page", &[7; 5000]);
    let request = request("console=ttyS0", Some(&initramfs.0));
    let state = load_from(&memory, Cursor::new(bzimage()), &request).unwrap();

    assert_eq!(state.protocol, Protocol::Linux64);
    assert_eq!(state.entry, BZIMAGE_LOAD + 0x200);
    assert_eq!(state.registers, [(Gpr::Rsi, BOOT_INFO)]);
    assert_eq!(read::<u8>(&memory, BZIMAGE_LOAD + 1023), FILLING);
    assert_eq!(string(&memory, CMDLINE), "console=ttyS0");

    let params: boot_params = read(&memory, BOOT_INFO);
    let header = params.hdr;
    assert_eq!(
        (header.type_of_loader, { header.cmd_line_ptr }),
        (0xff, CMDLINE as u32)
    );
    assert_eq!({ params.acpi_rsdp_addr }, 0xe_0000);
    let (start, size) = ({ header.ramdisk_image }, { header.ramdisk_size });
    assert_eq!((u64::from(start), size), (RAM - 0x2000, 5000));
    assert_eq!(read::<u8>(&memory, u64::from(start) + 4999), 7);
    let map: Vec<_> = params.e820_table[..params.e820_entries.into()]
        .iter()
        .map(|e| ({ e.addr }, { e.size }, { e.r#type }))
        .collect();
    assert_eq!(
        map,
        [
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0x6_0400, 2),
            (0x10_0000, RAM - 0x10_0000, 1)
        ]
    );
}

#[test]
fn header_fields_behind_its_end_are_not_copied() {
    let memory = ram(RAM);
    // The header ends at 0x264: without handover_offset (0x264) and kernel_info_offset.
    let image = bzimage_with(|h| {
        h.jump = 0x62eb;
        h.handover_offset = 0x1234;
    });
    try_load(&memory, &image).unwrap();
    let params: boot_params = read(&memory, BOOT_INFO);
    assert_eq!({ params.hdr.handover_offset }, 0);
    assert_eq!({ params.hdr.init_size }, BZIMAGE_INIT as u32);
}

#[test]
fn a_command_line_may_be_too_long_for_the_kernel() {
    let kernel = bzimage();
    let long = "x".repeat(256);
    let load_with = |cmdline| load_from(&ram(RAM), Cursor::new(&kernel), &request(cmdline, None));
    assert!(load_with(&long[..255]).is_ok());
    let error = load_with(&long).unwrap_err();
    assert!(matches!(
        error,
        LoadError::CommandLine {
            length: 256,
            limit: 255
        }
    ));
    assert_eq!(error.blame(), Blame::Usage);
    assert!(matches!(load_with("a\0b"), Err(LoadError::CommandLineNul)));
}

#[test]
fn an_initramfs_must_fit_and_exist() {
    let kernel = bzimage();
    let load_with =
        |path: &Path| load_from(&ram(RAM), Cursor::new(&kernel), &request("", Some(path)));
    let fault = |path: &Path| match load_with(path) {
        Err(LoadError::Initramfs { fault, .. }) => fault,
        other => panic!("{other:?}"),
    };
    let room = (RAM - BZIMAGE_LOAD - BZIMAGE_INIT) as usize;
    assert!(load_with(&Scratch::new("fits", &vec![0; room]).0).is_ok());
    let large = Scratch::new("large", &vec![0; room + 1]);
    assert!(matches!(fault(&large.0), InitramfsFault::DoesNotFit { .. }));
    assert!(matches!(
        fault(Path::new("/nonexistent")),
        InitramfsFault::Open(_)
    ));
    assert!(matches!(
        fault(Path::new("/dev/null")),
        InitramfsFault::NotRegular
    ));
    assert!(matches!(
        fault(&Scratch::new("empty", &[]).0),
        InitramfsFault::Empty
    ));
}

#[test]
fn bzimages_that_the_protocol_cannot_start_are_refused() {
    let unsuitable = |image: &[u8]| matches!(fault(image), KernelFault::Unsuitable(_));
    assert!(unsuitable(&bzimage_with(|h| h.version = 0x020b)));
    assert!(unsuitable(&bzimage_with(|h| h.xloadflags = 0)));
    assert!(unsuitable(&bzimage_with(|h| h.loadflags = 0)));
    let image = bzimage_with(|h| h.pref_address = 0x1000);
    assert!(matches!(
        fault(&image),
        KernelFault::TooLow { start: 0x1000 }
    ));
    let image = bzimage_with(|h| h.pref_address = u64::MAX - 5);
    assert!(matches!(fault(&image), KernelFault::TooHigh { .. }));
    let image = bzimage_with(|h| h.init_size = 13 << 20);
    assert!(matches!(fault(&image), KernelFault::TooLittleMemory { .. }));
    let image = bzimage_with(|h| h.payload_length = 2000);
    assert!(matches!(
        fault(&image),
        KernelFault::Truncated {
            have: 2048,
            need: 3024
        }
    ));
}

#[test]
fn pvh_gets_its_start_info() {
    let memory = ram(RAM);
    // What an earlier kernel left where this one wants zeros.
    memory.write_obj(0xffu8, GuestAddress(0x10_1fff)).unwrap();
    let initramfs = Scratch::new("pvh", &[7; 10]);
    for options in [ELF, ElfOptions { wide: false, ..ELF }] {
        let request = request("quiet", Some(&initramfs.0));
        let state = load_from(&memory, Cursor::new(elf(options)), &request).unwrap();
        assert_eq!((state.protocol, state.entry), (Protocol::Pvh, 0x10_0010));
        assert_eq!(state.registers, [(Gpr::Rbx, BOOT_INFO)]);
        assert_eq!(read::<u8>(&memory, 0x10_00ff), FILLING);
        assert_eq!(read::<u8>(&memory, 0x10_1fff), 0);

        let info: hvm_start_info = read(&memory, BOOT_INFO);
        assert_eq!(
            (info.magic, info.version, info.rsdp_paddr),
            (0x336e_c578, 1, 0xe_0000)
        );
        assert_eq!(string(&memory, info.cmdline_paddr), "quiet");
        assert_eq!((info.nr_modules, info.memmap_entries), (1, 3));
        let module: hvm_modlist_entry = read(&memory, info.modlist_paddr);
        assert_eq!((read::<u8>(&memory, module.paddr), module.size), (7, 10));
        // The third entry is the RAM from 1 MiB.
        assert_eq!(read::<u64>(&memory, info.memmap_paddr + 48), 0x10_0000);
        assert_eq!(read::<u32>(&memory, info.memmap_paddr + 64), 1);
    }
}

#[test]
fn elf_files_that_cannot_be_started_are_refused() {
    let refused = |change: fn(&mut ElfOptions)| {
        let mut options = ELF;
        change(&mut options);
        fault(&elf(options))
    };
    assert!(matches!(refused(|o| o.pvh = None), KernelFault::NoEntry));
    assert!(matches!(
        refused(|o| o.pvh = Some(0x20_0000)),
        KernelFault::Damaged(_)
    ));
    assert!(matches!(
        refused(|o| o.memory_bytes = 0xff),
        KernelFault::Damaged(_)
    ));
    assert!(matches!(
        refused(|o| o.memory_bytes = u64::MAX),
        KernelFault::Damaged(_)
    ));
    assert!(matches!(
        refused(|o| o.memory_bytes = RAM),
        KernelFault::TooLittleMemory { .. }
    ));
    let low = refused(|o| (o.physical, o.pvh) = (0x7000, Some(0x7010)));
    assert!(matches!(low, KernelFault::TooLow { start: 0x7000 }));
    let mut arm = elf(ELF);
    arm[18] = 183;
    assert!(matches!(fault(&arm), KernelFault::Unsuitable(_)));
}

fn multiboot_info(memory: &GuestMemoryMmap<()>, offset: u64) -> u64 {
    read::<u32>(memory, BOOT_INFO + offset).into()
}

#[test]
fn a_flat_multiboot_image_gets_its_information() {
    let memory = ram(RAM);
    memory.write_obj(0xffu8, GuestAddress(0x10_0fff)).unwrap();
    let initramfs = Scratch::new("flat", &[7; 10]);
    let request = request("a b", Some(&initramfs.0));
    let state = load_from(&memory, Cursor::new(flat(FLAT)), &request).unwrap();
    assert_eq!(
        (state.protocol, state.entry),
        (Protocol::Multiboot, 0x10_0030)
    );
    assert_eq!(
        state.registers,
        [(Gpr::Rax, 0x2bad_b002), (Gpr::Rbx, BOOT_INFO)]
    );
    assert_eq!(read::<u32>(&memory, 0x10_0010), 0x1bad_b002);
    assert_eq!(read::<u8>(&memory, 0x10_0fff), 0);

    let info = |offset| multiboot_info(&memory, offset);
    assert_eq!(info(0), 0b10_0100_1101);
    assert_eq!((info(4), info(8)), (639, 15 * 1024));
    assert_eq!(string(&memory, info(16)), "a b");
    assert_eq!(string(&memory, info(64)), "trapline");
    assert_eq!(info(20), 1);
    let module = |n: u64| u64::from(read::<u32>(&memory, info(24) + 4 * n));
    assert_eq!((module(0), module(1)), (0x10_1000, 0x10_100a));
    assert_eq!(string(&memory, module(2)), "");
    assert_eq!(read::<u8>(&memory, module(0)), 7);
    assert_eq!(info(44), 3 * 24);
    assert_eq!(read::<u32>(&memory, info(48)), 20);
    assert_eq!(read::<u64>(&memory, info(48) + 48 + 4), 0x10_0000);
}

#[test]
fn multiboot_takes_elf_files_of_both_classes() {
    for wide in [false, true] {
        let memory = ram(RAM);
        let options = ElfOptions {
            wide,
            pvh: None,
            multiboot: Some(3),
            ..ELF
        };
        let state = try_load(&memory, &elf(options)).unwrap();
        assert_eq!(
            (state.protocol, state.entry),
            (Protocol::Multiboot, 0x10_0010)
        );
        assert_eq!(read::<u8>(&memory, 0x10_00ff), FILLING);
        assert_eq!(multiboot_info(&memory, 0) & 8, 0, "no modules");
    }
}

#[test]
fn multiboot_headers_that_make_no_sense_are_refused() {
    let [header, load, load_end, bss_end, entry] = FLAT;
    for addresses in [
        [load - 1, load, load_end, bss_end, entry],
        [load + 0x11, load, load_end, bss_end, entry],
        [header, load, load - 1, bss_end, entry],
        [header, load, load_end, load_end - 1, entry],
        [header, load, load_end, bss_end, load - 1],
        [header, load, load_end, bss_end, bss_end],
    ] {
        assert!(
            matches!(fault(&flat(addresses)), KernelFault::Damaged(_)),
            "{addresses:x?}"
        );
    }
    let image = flat([header, load, load_end + 1, bss_end, entry]);
    assert!(matches!(
        fault(&image),
        KernelFault::Truncated {
            have: 256,
            need: 257
        }
    ));
    let image = flat([0x7010, 0x7000, 0x7100, 0, 0x7030]);
    assert!(matches!(fault(&image), KernelFault::TooLow { .. }));
    let image = flat([header, load, load_end, u32::MAX, entry]);
    assert!(matches!(fault(&image), KernelFault::TooHigh { .. }));
    let image = elf(ElfOptions {
        pvh: None,
        multiboot: Some(1 << 3),
        ..ELF
    });
    assert!(matches!(fault(&image), KernelFault::Unsuitable(_)));
    // Load end 0 means the whole file, bss end 0 nothing to clear.
    assert!(try_load(&ram(RAM), &flat([header, load, 0, 0, entry])).is_ok());
    let mut wrong_sum = flat(FLAT);
    wrong_sum[16 + 8] ^= 1;
    assert!(matches!(fault(&wrong_sum), KernelFault::Unknown));
}

#[test]
fn every_cut_of_every_image_is_refused() {
    let memory = ram(RAM);
    for image in [
        bzimage(),
        elf(ELF),
        elf(ElfOptions { wide: false, ..ELF }),
        flat(FLAT),
    ] {
        assert!(try_load(&memory, &image).is_ok());
        for length in 0..image.len() {
            let error = try_load(&memory, &image[..length]).unwrap_err();
            assert_eq!(error.blame(), Blame::Input, "{length}: {error}");
        }
    }
}

#[test]
fn errors_are_one_sentence_with_the_path() {
    let error = try_load(&ram(RAM), b"no kernel").unwrap_err().to_string();
    assert!(
        error.starts_with("cannot boot the-kernel: it is neither"),
        "{error}"
    );
    let missing = LoadRequest {
        kernel: Path::new("/nonexistent/k"),
        ..request("", None)
    };
    let error = load(&ram(RAM), &missing).unwrap_err().to_string();
    assert!(error.contains("/nonexistent/k: No such file"), "{error}");
    let folder = LoadRequest {
        kernel: Path::new("/"),
        ..request("", None)
    };
    assert!(
        load(&ram(RAM), &folder)
            .unwrap_err()
            .to_string()
            .contains("not a regular file")
    );
}

#[test]
fn too_little_memory_for_anything_is_an_error() {
    for image in [bzimage(), elf(ELF), flat(FLAT)] {
        for bytes in [4096, 0x8000, 0x1_0000, 0x10_0000] {
            assert!(try_load(&ram(bytes), &image).is_err());
        }
    }
}

fn damaged(image: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let change = (
        0..image.len(),
        prop_oneof![any::<u8>(), Just(0), Just(0xff), Just(0x7f)],
    );
    proptest::collection::vec(change, 1..8).prop_map(move |changes| {
        let mut image = image.clone();
        for (at, value) in changes {
            image[at] = value;
        }
        image
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
        let _ = try_load(&ram(RAM), &bytes);
    }

    #[test]
    fn damaged_images_never_panic(
        image in prop_oneof![
            damaged(bzimage()),
            damaged(elf(ELF)[..0x1e0].to_vec()),
            damaged(elf(ELF)),
            damaged(elf(ElfOptions { wide: false, pvh: None, multiboot: Some(3), ..ELF })),
            damaged(flat(FLAT)[..64].to_vec()),
            damaged(flat(FLAT)),
        ]
    ) {
        let _ = try_load(&ram(RAM), &image);
    }
}
