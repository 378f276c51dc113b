//! Linux as far as the checks need it: mappings, futexes, signals and accesses that may fault.

use std::arch::{asm, global_asm};
use std::cell::UnsafeCell;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::AtomicU32;

/// Bytes of a page.
pub const PAGE: usize = 4096;

pub const READ: i32 = libc::PROT_READ;
pub const WRITE: i32 = libc::PROT_WRITE;
pub const EXECUTE: i32 = libc::PROT_EXEC;
pub const NONE: i32 = libc::PROT_NONE;

/// A range of pages at a fixed address that this value owns.
pub struct Mapping {
    address: *mut u8,
    length: usize,
}

// SAFETY: it is an address range; what is done with it is up to the checks.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps fresh zeroed pages.
    pub fn anonymous(pages: usize, protection: i32) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        Self::map(ptr::null_mut(), pages * PAGE, protection, flags, -1, 0)
    }

    /// Maps pages of a file, shared.
    pub fn shared(file: &OwnedFd, page: usize, pages: usize, prot: i32) -> io::Result<Self> {
        let flags = libc::MAP_SHARED;
        Self::map(
            ptr::null_mut(),
            pages * PAGE,
            prot,
            flags,
            file.as_raw_fd(),
            page,
        )
    }

    fn map(
        at: *mut u8,
        length: usize,
        prot: i32,
        flags: i32,
        fd: i32,
        page: usize,
    ) -> io::Result<Self> {
        let offset = (page * PAGE) as libc::off_t;
        // SAFETY: a new range, or one that the caller owns.
        let address = unsafe { libc::mmap(at.cast(), length, prot, flags, fd, offset) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            address: address.cast(),
            length,
        })
    }

    /// Puts another page of a file in this range's place, which may be unmapped.
    pub fn replace(&self, file: &OwnedFd, page: usize, protection: i32) -> io::Result<()> {
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        let same = Self::map(
            self.address,
            self.length,
            protection,
            flags,
            file.as_raw_fd(),
            page,
        )?;
        std::mem::forget(same);
        Ok(())
    }

    /// Takes the pages away; the value still owns the range, so nothing else may map meanwhile.
    pub fn unmap(&self) -> io::Result<()> {
        // SAFETY: the range is this value's own.
        checked(unsafe { libc::munmap(self.address.cast(), self.length) })
    }

    pub fn protect(&self, protection: i32) -> io::Result<()> {
        // SAFETY: the range is this value's own.
        checked(unsafe { libc::mprotect(self.address.cast(), self.length, protection) })
    }

    /// The address of a byte of the range.
    pub fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset < self.length);
        self.address.wrapping_add(offset)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is this value's own, and its use ends here.
        unsafe { libc::munmap(self.address.cast(), self.length) };
    }
}

fn checked(result: i32) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// An anonymous file of the given size.
pub fn memory_file(pages: usize) -> io::Result<OwnedFd> {
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(c"stress".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and is owned by nobody else.
    let file = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: a live descriptor.
    checked(unsafe { libc::ftruncate(fd, (pages * PAGE) as libc::off_t) })?;
    Ok(file)
}

/// Lets another thread run on this processor.
pub fn give_way() {
    std::thread::yield_now();
}

/// Sleeps while the word has this value.
pub fn futex_wait(word: &AtomicU32, value: u32) {
    let operation = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
    let forever = ptr::null::<libc::timespec>();
    // SAFETY: the word is alive; every result means "look again".
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, value, forever) };
}

/// Wakes one sleeper.
pub fn futex_wake(word: &AtomicU32) {
    let operation = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the word is alive.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, 1) };
}

/// The calling thread's number for [`send`].
pub fn thread_number() -> i32 {
    // SAFETY: it takes nothing and cannot fail.
    unsafe { libc::gettid() }
}

/// Sends a signal to one thread of this process; false if the queue is full.
pub fn send(thread: i32, signal: i32) -> bool {
    // SAFETY: only numbers are passed.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal) == 0 }
}

/// A timer that sends SIGALRM to the thread that made it, again and again until it is dropped.
pub struct Alarm(libc::timer_t);

impl Alarm {
    /// Starts it; the period is in nanoseconds.
    pub fn every(period: i64) -> io::Result<Self> {
        // SAFETY: a zeroed structure is a valid one.
        let mut event: libc::sigevent = unsafe { MaybeUninit::zeroed().assume_init() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = libc::SIGALRM;
        event.sigev_notify_thread_id = thread_number();
        let mut timer = ptr::null_mut();
        // SAFETY: both structures are alive.
        checked(unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer) })?;
        let alarm = Self(timer);
        let time = libc::timespec {
            tv_sec: 0,
            tv_nsec: period,
        };
        let periodic = libc::itimerspec {
            it_interval: time,
            it_value: time,
        };
        // SAFETY: a live timer, and the old value is not asked for.
        checked(unsafe { libc::timer_settime(timer, 0, &periodic, ptr::null_mut()) })?;
        Ok(alarm)
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        // SAFETY: the timer is this value's own.
        unsafe { libc::timer_delete(self.0) };
    }
}

/// A handler that is told the signal and may change the interrupted thread's registers.
pub type Handler = extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);

/// Installs a handler; it runs on the alternate stack if the thread has one.
pub fn handle(signal: i32, handler: Handler) {
    // SAFETY: a zeroed structure is a valid one, and the handler has the signature of SA_SIGINFO.
    unsafe {
        let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        libc::sigaction(signal, &action, ptr::null_mut());
    }
}

/// Makes the mapping the calling thread's alternate signal stack, or takes it away.
pub fn alternate_stack(stack: Option<&Mapping>) {
    let description = libc::stack_t {
        ss_sp: stack.map_or(ptr::null_mut(), |s| s.address.cast()),
        ss_flags: if stack.is_some() { 0 } else { libc::SS_DISABLE },
        ss_size: stack.map_or(0, |s| s.length),
    };
    // SAFETY: the structure is alive, and the callers keep the stack until they take it away.
    unsafe { libc::sigaltstack(&description, ptr::null_mut()) };
}

/// Writes to the debug-exit port; returns only if that is refused or has no effect.
pub fn debug_exit(value: u8) -> io::Error {
    // SAFETY: only numbers are passed.
    if unsafe { libc::ioperm(0xf4, 1, 1) } != 0 {
        return io::Error::last_os_error();
    }
    // SAFETY: the port was just granted, and no device of a Linux machine has it.
    unsafe { asm!("out 0xf4, al", in("al") value) };
    io::Error::other("nothing listens at the port")
}

/// The registers of an interrupted thread.
pub struct Context(*mut libc::ucontext_t);

impl Context {
    /// Of a handler's third argument.
    pub fn new(argument: *mut libc::c_void) -> Self {
        Self(argument.cast())
    }

    /// A general register, by its number in `libc` (`REG_RIP` and so on).
    pub fn register(&mut self, number: i32) -> &mut u64 {
        // SAFETY: the kernel's context outlives the handler in which this value lives.
        let register = unsafe { &mut (*self.0).uc_mcontext.gregs[number as usize] };
        // SAFETY: the same size and alignment.
        unsafe { &mut *ptr::from_mut(register).cast() }
    }
}

global_asm!(
    ".text",
    "stress_load:",
    "xor edx, edx",
    "stress_load_access:",
    "mov rax, [rdi]",
    "ret",
    "stress_store:",
    "xor eax, eax",
    "stress_store_access:",
    "mov [rdi], rsi",
    "stress_return:",
    "ret",
);

/// The registers RAX and RDX, as a function returns two words.
#[repr(C)]
struct Pair(u64, u64);

unsafe extern "C" {
    fn stress_load(address: *const u64) -> Pair;
    fn stress_store(address: *mut u64, value: u64) -> u64;
    static stress_load_access: UnsafeCell<u8>;
    static stress_store_access: UnsafeCell<u8>;
    static stress_return: UnsafeCell<u8>;
}

/// Reads a word, `None` if that faults.
pub fn try_load(address: *const u8) -> Option<u64> {
    // SAFETY: a fault at its only access is handled below.
    let Pair(value, faulted) = unsafe { stress_load(address.cast()) };
    (faulted == 0).then_some(value)
}

/// Writes a word; false if that faults.
pub fn try_store(address: *mut u8, value: u64) -> bool {
    // SAFETY: the callers pass addresses in mappings of their own; a fault is handled below.
    unsafe { stress_store(address.cast(), value) == 0 }
}

/// Makes accesses by [`try_load`] and [`try_store`] survive their faults.
pub fn install_handlers() {
    handle(libc::SIGSEGV, on_fault);
}

extern "C" fn on_fault(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let mut registers = Context::new(context);
    let at = *registers.register(libc::REG_RIP);
    // SAFETY: the kernel gives a live structure, and this signal carries an address.
    let address = unsafe { (*info).si_addr() } as u64;
    let expected = *registers.register(libc::REG_RDI);
    if address == expected && at == &raw const stress_load_access as u64 {
        *registers.register(libc::REG_RDX) = 1;
    } else if address == expected && at == &raw const stress_store_access as u64 {
        *registers.register(libc::REG_RAX) = 1;
    } else {
        unexpected(signal, at);
    }
    *registers.register(libc::REG_RIP) = &raw const stress_return as u64;
}

/// Ends the program from within a handler, where nothing may be formatted by allocation.
pub fn unexpected(signal: i32, at: u64) -> ! {
    let mut text = *b"\nunexpected signal 00 at 0000000000000000: FAILED\n";
    text[19] = b'0' + (signal / 10 % 10) as u8;
    text[20] = b'0' + (signal % 10) as u8;
    for (digit, place) in text[25..41].iter_mut().enumerate() {
        *place = b"0123456789abcdef"[(at >> (60 - 4 * digit)) as usize & 15];
    }
    // SAFETY: the buffer is alive, and both calls are allowed in handlers.
    unsafe {
        libc::write(1, text.as_ptr().cast(), text.len());
        libc::_exit(1)
    }
}
