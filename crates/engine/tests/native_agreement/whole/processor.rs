//! The processor itself: a child process executes the original bytes at their address.

#![allow(unsafe_code)]

use std::arch::asm;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::case::{
    ALIGNMENT_CHECK, ASTRAY, CODE, CODE_16, CODE_BYTES, Case, DATA, ERROR_BITS, Memory, Outcome,
    PAGE, PAGES, Page,
};
use crate::reference::{self, CODE_32_SELECTOR, CODE_64_SELECTOR, Child, DATA_SELECTOR};

/// Cases handed over at a time.
pub const BATCH: usize = 32;
/// Selects the second descriptor of the local descriptor table: 16-bit data at [`DATA`].
const DATA_16_SELECTOR: u16 = 0xf;
/// The third and those that follow: 16-bit code.
const CODE_16_SELECTOR: u16 = 0x17;
/// Microseconds of its own time after which a case is taken to be endless, twice at most.
const ENDLESS_AFTER: libc::suseconds_t = 20_000;

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
/// RFLAGS.TF.
const TRAP: libc::greg_t = 0x100;
/// The child runs a case.
static RUNNING: AtomicBool = AtomicBool::new(false);
/// Cases begun, and how many they were at the timer's last tick.
static BEGUN: AtomicU64 = AtomicU64::new(0);
static TICKED: AtomicU64 = AtomicU64::new(0);

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
        reference::add_segment(DATA_16_SELECTOR >> 3, DATA as u32, 0xffff, false);
        for (n, segment) in CODE_16.iter().enumerate() {
            let number = (CODE_16_SELECTOR >> 3) + n as u16;
            let base = CODE as u32 - segment.start;
            reference::add_segment(number, base, segment.limit, true);
        }
        reference::handle_faults(on_fault);
        reference::tick(on_tick, ENDLESS_AFTER);
        // A run that went astray gets no further than this process.
        libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_STRICT);
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
        let (code, data) = match case.bits {
            64 => (CODE_64_SELECTOR, DATA_SELECTOR),
            32 => (CODE_32_SELECTOR, DATA_SELECTOR),
            _ => {
                let selector = CODE_16_SELECTOR + ((case.segment as u16) << 3);
                (selector, DATA_16_SELECTOR)
            }
        };
        BEGUN.fetch_add(1, Ordering::SeqCst);
        RUNNING.store(true, Ordering::SeqCst);
        // Nothing from here to the case enters the kernel by SYSCALL, which sets SS.
        asm!(
            "mov ds, {0:x}",
            "mov es, {0:x}",
            "mov ss, {0:x}",
            in(reg) data,
        );
        outcome.registers = reference::enter(&case.registers, case.ip() as u32, code);
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
    clear_alignment_check();
    // SAFETY: the kernel passes the thread's `ucontext_t`.
    unsafe {
        if !RUNNING.swap(false, Ordering::SeqCst) {
            // Not a case: this test is wrong.
            libc::_exit(1);
        }
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        leave(registers, registers[libc::REG_TRAPNO as usize] as u64);
    }
}

/// Ends a case in which two ticks came.
extern "C" fn on_tick(_: c_int, _: *mut libc::siginfo_t, context: *mut c_void) {
    clear_alignment_check();
    let begun = BEGUN.load(Ordering::SeqCst);
    let again = TICKED.swap(begun, Ordering::SeqCst) == begun;
    if again && RUNNING.swap(false, Ordering::SeqCst) {
        // SAFETY: the kernel passes the thread's `ucontext_t`.
        unsafe {
            let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
            leave(registers, ASTRAY.into());
        }
    }
}

/// The kernel lets the handlers begin with the flag that the case had.
#[inline(always)]
fn clear_alignment_check() {
    // SAFETY: the handler's stack is aligned; compiled code does not rely on this flag.
    unsafe {
        asm!(
            "pushfq",
            "and dword ptr [rsp], {0}",
            "popfq",
            const !(ALIGNMENT_CHECK as i32),
        );
    }
}

/// Notes what ended the case, and sends the thread to the end of the assembly.
fn leave(registers: &mut [libc::greg_t; 23], vector: u64) {
    SEEN[0].store(vector, Ordering::SeqCst);
    let others = [libc::REG_RIP, libc::REG_CR2, libc::REG_ERR];
    for (place, register) in SEEN[1..].iter().zip(others) {
        place.store(registers[register as usize] as u64, Ordering::SeqCst);
    }
    registers[libc::REG_RIP as usize] = reference::exit_address() as i64;
    // A run that went astray may have set it.
    registers[libc::REG_EFL as usize] &= !TRAP;
    let selectors = &mut registers[libc::REG_CSGSFS as usize];
    // CS in the lowest 16 bits, SS in the highest.
    *selectors = (*selectors & 0x0000_ffff_ffff_0000)
        | i64::from(CODE_64_SELECTOR)
        | ((u64::from(DATA_SELECTOR) << 48) as i64);
}
