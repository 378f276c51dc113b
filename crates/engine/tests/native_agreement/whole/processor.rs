//! The processor itself: a child process executes the original bytes at their address.

#![allow(unsafe_code)]

use std::arch::asm;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::case::{CODE, CODE_BYTES, Case, DATA, ERROR_BITS, Memory, Outcome, PAGE, PAGES, Page};
use crate::reference::{self, CODE_32_SELECTOR, CODE_64_SELECTOR, Child, DATA_SELECTOR};

/// Cases handed over at a time.
pub const BATCH: usize = 32;
/// Selects the second descriptor of the local descriptor table: 16-bit code at [`CODE`].
const CODE_16_SELECTOR: u16 = 0xf;
/// The third: 16-bit data at [`DATA`].
const DATA_16_SELECTOR: u16 = 0x17;

#[repr(C, align(4096))]
pub struct Batch {
    pub cases: [Case; BATCH],
    pub outcomes: [Outcome; BATCH],
}

/// The child process.
pub struct Processor(Child<Batch>);

impl Processor {
    pub fn start() -> Self {
        Self(Child::start(|batch: *mut Batch, ends| {
            // SAFETY: in the child; the batch is its own while it works on it.
            unsafe {
                let places = prepare();
                reference::serve(ends, || {
                    for i in 0..BATCH {
                        let case = &raw const (*batch).cases[i];
                        execute(&*case, &mut (*batch).outcomes[i], &places);
                    }
                });
            }
        }))
    }

    pub fn batch(&mut self) -> &mut Batch {
        self.0.batch()
    }

    pub fn execute(&mut self) {
        self.0.begin();
        self.0.finish();
    }
}

/// Writable views of what instructions see under its protection.
struct Places {
    code: *mut u8,
    memory: *mut Memory,
}

/// The exception that ended the case: vector, RIP, CR2, error code.
static SEEN: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];
/// The child runs a case.
static RUNNING: AtomicBool = AtomicBool::new(false);

/// # Safety
/// In the child.
unsafe fn prepare() -> Places {
    // SAFETY: new mappings that replace none, and handlers that are async-signal-safe.
    unsafe {
        reference::set_up_control();
        let file = libc::memfd_create(c"native agreement".as_ptr(), libc::MFD_CLOEXEC);
        let bytes = PAGE + size_of::<Memory>();
        let view = |address: u64, bytes: usize, protection: c_int, offset: usize| {
            let fixed = if address == 0 {
                0
            } else {
                libc::MAP_FIXED_NOREPLACE
            };
            let mapped = libc::mmap(
                address as *mut c_void,
                bytes,
                protection,
                libc::MAP_SHARED | fixed,
                file,
                offset as libc::off_t,
            );
            if mapped == libc::MAP_FAILED {
                libc::abort();
            }
            mapped.cast::<u8>()
        };
        if file < 0 || libc::ftruncate(file, bytes as libc::off_t) != 0 {
            libc::abort();
        }
        let all = view(0, bytes, libc::PROT_READ | libc::PROT_WRITE, 0);
        view(CODE, PAGE, libc::PROT_READ | libc::PROT_EXEC, 0);
        for (n, page) in PAGES.iter().enumerate() {
            let protection = match page {
                Page::Writable => libc::PROT_READ | libc::PROT_WRITE,
                Page::ReadOnly => libc::PROT_READ,
                Page::Hole => continue,
            };
            let at = view(DATA + (n * PAGE) as u64, PAGE, protection, (n + 1) * PAGE);
            // Present from now on.
            at.read_volatile();
        }
        all.write_bytes(0xcc, PAGE);
        reference::add_segment(CODE_16_SELECTOR >> 3, CODE as u32, true);
        reference::add_segment(DATA_16_SELECTOR >> 3, DATA as u32, false);
        reference::handle_faults(on_fault);
        Places {
            code: all,
            memory: all.add(PAGE).cast(),
        }
    }
}

/// # Safety
/// In the child, prepared.
unsafe fn execute(case: &Case, outcome: &mut Outcome, places: &Places) {
    // SAFETY: the views are mapped; a case reaches nothing else but by a fault.
    unsafe {
        ptr::copy_nonoverlapping(case.code.as_ptr(), places.code, CODE_BYTES);
        ptr::copy_nonoverlapping(&case.memory, places.memory, 1);
        let (ip, code, data) = match case.bits {
            64 => (CODE, CODE_64_SELECTOR, DATA_SELECTOR),
            32 => (CODE, CODE_32_SELECTOR, DATA_SELECTOR),
            _ => (0, CODE_16_SELECTOR, DATA_16_SELECTOR),
        };
        RUNNING.store(true, Ordering::SeqCst);
        // Nothing from here to the case enters the kernel by SYSCALL, which sets SS.
        asm!(
            "mov ds, {0:x}",
            "mov es, {0:x}",
            "mov ss, {0:x}",
            in(reg) data,
        );
        outcome.registers = reference::enter(&case.registers, ip as u32, code);
        asm!("mov ds, {0:x}", "mov es, {0:x}", in(reg) DATA_SELECTOR);
        ptr::copy_nonoverlapping(places.memory, &mut outcome.memory, 1);
        let [vector, rip, address, error] = [0, 1, 2, 3].map(|n| SEEN[n].load(Ordering::SeqCst));
        outcome.vector = vector as u32;
        outcome.rip = rip;
        outcome.address = if vector == 14 { address } else { 0 };
        outcome.error = if vector == 14 {
            error as u32 & ERROR_BITS
        } else {
            0
        };
    }
}

extern "C" fn on_fault(_: c_int, _: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes the thread's `ucontext_t`.
    unsafe {
        if !RUNNING.swap(false, Ordering::SeqCst) {
            // Not a case: this test is wrong.
            libc::_exit(1);
        }
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        for (place, register) in SEEN.iter().zip([
            libc::REG_TRAPNO,
            libc::REG_RIP,
            libc::REG_CR2,
            libc::REG_ERR,
        ]) {
            place.store(registers[register as usize] as u64, Ordering::SeqCst);
        }
        registers[libc::REG_RIP as usize] = reference::exit_address() as i64;
        let selectors = &mut registers[libc::REG_CSGSFS as usize];
        // CS in the lowest 16 bits, SS in the highest.
        *selectors = (*selectors & 0x0000_ffff_ffff_0000)
            | i64::from(CODE_64_SELECTOR)
            | ((u64::from(DATA_SELECTOR) << 48) as i64);
    }
}
