//! The host's own means to sense a store: a write-protected page with a signal handler that opens
//! it, and userfaultfd with a thread that does (userfaultfd(2), ioctl_userfaultfd(2)).
#![allow(unsafe_code)]

use std::io;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::thread::JoinHandle;

const PAGE: usize = 4096;

/// The page that the signal handler opens.
static PROTECTED: AtomicUsize = AtomicUsize::new(0);

/// An anonymous page, mapped until the process ends.
fn page() -> io::Result<usize> {
    // SAFETY: a new mapping at an address that the kernel chooses.
    let at = unsafe {
        libc::mmap(
            ptr::null_mut(),
            PAGE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    store(at as usize);
    Ok(at as usize)
}

fn store(page: usize) {
    // SAFETY: `page` is mapped for as long as the process lives, and nobody else uses it; a fault
    // is served by this module.
    unsafe { (page as *mut u64).write_volatile(7) };
}

fn set_protection(page: usize, protection: i32) -> i32 {
    // SAFETY: `page` is a mapping of this module.
    unsafe { libc::mprotect(page as *mut libc::c_void, PAGE, protection) }
}

extern "C" fn open_page(_signal: i32, _info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    let page = PROTECTED.load(SeqCst);
    if set_protection(page, libc::PROT_READ | libc::PROT_WRITE) != 0 {
        // SAFETY: ends the process; the store could not go on.
        unsafe { libc::abort() };
    }
}

/// A page whose stores end in a signal handler.
pub struct ProtectedPage(usize);

impl ProtectedPage {
    pub fn new() -> io::Result<Self> {
        let page = page()?;
        PROTECTED.store(page, SeqCst);
        // SAFETY: all fields of a zeroed `sigaction` are valid; the handler calls only mprotect.
        let done = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = open_page as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigaction(libc::SIGSEGV, &action, ptr::null_mut())
        };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(page))
    }

    pub fn protect(&self) {
        assert_eq!(set_protection(self.0, libc::PROT_READ), 0, "mprotect");
    }

    pub fn store(&self) {
        store(self.0);
    }
}

impl Drop for ProtectedPage {
    fn drop(&mut self) {
        // SAFETY: back to the default handler.
        unsafe { libc::signal(libc::SIGSEGV, libc::SIG_DFL) };
    }
}

const API: u64 = 0xaa;
const FEATURE_WRITE_PROTECT: u64 = 1;
const REGISTER_WRITE_PROTECT: u64 = 2;
const WRITE_PROTECT: u64 = 1;
/// The fields of a fault message: event at 0, flags at 8, address at 16.
const MESSAGE: usize = 32;
const IOCTL_API: libc::c_ulong = 0xc018_aa3f;
const IOCTL_REGISTER: libc::c_ulong = 0xc020_aa00;
const IOCTL_WRITE_PROTECT: libc::c_ulong = 0xc018_aa06;

/// A page whose stores are served by a thread.
pub struct UserfaultPage {
    page: usize,
    descriptor: i32,
    end: i32,
    server: Option<JoinHandle<()>>,
}

/// An ioctl whose argument is an array of 64-bit fields.
fn control(descriptor: i32, request: libc::c_ulong, fields: &mut [u64]) -> io::Result<()> {
    // SAFETY: every request used here reads and writes as many fields as its number says, and
    // callers pass as many.
    match unsafe { libc::ioctl(descriptor, request, fields.as_mut_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn write_protect(descriptor: i32, page: usize, mode: u64) -> io::Result<()> {
    control(
        descriptor,
        IOCTL_WRITE_PROTECT,
        &mut [page as u64, PAGE as u64, mode],
    )
}

impl UserfaultPage {
    pub fn new() -> io::Result<Self> {
        let page = page()?;
        // SAFETY: makes new descriptors only.
        let (descriptor, end) = unsafe {
            let descriptor =
                libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) as i32;
            (descriptor, libc::eventfd(0, libc::EFD_CLOEXEC))
        };
        if descriptor < 0 || end < 0 {
            return Err(io::Error::last_os_error());
        }
        control(descriptor, IOCTL_API, &mut [API, FEATURE_WRITE_PROTECT, 0])?;
        let register = &mut [page as u64, PAGE as u64, REGISTER_WRITE_PROTECT, 0];
        control(descriptor, IOCTL_REGISTER, register)?;
        write_protect(descriptor, page, 0)?;
        let server = std::thread::spawn(move || serve(descriptor, end, page));
        Ok(Self {
            page,
            descriptor,
            end,
            server: Some(server),
        })
    }

    pub fn protect(&self) {
        write_protect(self.descriptor, self.page, WRITE_PROTECT).expect("write-protect");
    }

    pub fn store(&self) {
        store(self.page);
    }
}

/// Opens the page whenever a store has met it.
fn serve(descriptor: i32, end: i32, page: usize) {
    let wanted = |fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    loop {
        let mut waits = [wanted(descriptor), wanted(end)];
        // SAFETY: two valid entries.
        unsafe { libc::poll(waits.as_mut_ptr(), 2, -1) };
        if waits[1].revents != 0 {
            return;
        }
        let mut message = [0u8; MESSAGE];
        // The fault may have gone meanwhile: the descriptor does not block.
        // SAFETY: the buffer is as long as said.
        let read = unsafe { libc::read(descriptor, message.as_mut_ptr().cast(), MESSAGE) };
        if read == MESSAGE as isize {
            write_protect(descriptor, page, 0).expect("the page opens");
        }
    }
}

impl Drop for UserfaultPage {
    fn drop(&mut self) {
        // SAFETY: 8 bytes, as an eventfd takes them.
        unsafe { libc::write(self.end, (&raw const ONE).cast(), 8) };
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
        // SAFETY: nobody uses the descriptors any more.
        unsafe {
            libc::close(self.descriptor);
            libc::close(self.end);
        }
    }
}

static ONE: u64 = 1;
