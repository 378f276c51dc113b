//! Rows that need the kernel, or change code.

use std::ptr;
use std::sync::OnceLock;

use crate::Row;

pub const ROWS: &[Row] = &[
    ("system-call", "call", system_call),
    ("page-fault", "fault", page_fault),
    ("fork-exit", "process", fork_exit),
    ("fork-exec", "process", fork_exec),
    ("pipe", "round trip", pipe),
    ("rewrite", "rewrite", rewrite),
];

fn system_call() -> u64 {
    for _ in 0..500 {
        // SAFETY: it takes no arguments and changes nothing.
        unsafe { libc::syscall(libc::SYS_getppid) };
    }
    500
}

/// Fresh pages of memory.
fn map(bytes: usize, protection: i32) -> *mut u8 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping at an address that the kernel chooses.
    let address = unsafe { libc::mmap(ptr::null_mut(), bytes, protection, flags, -1, 0) };
    assert_ne!(address, libc::MAP_FAILED, "no memory");
    address.cast()
}

fn page_fault() -> u64 {
    let bytes = 1 << 20;
    let pages = map(bytes, libc::PROT_READ | libc::PROT_WRITE);
    for page in (0..bytes).step_by(4096) {
        // SAFETY: within the mapping.
        unsafe { pages.add(page).write_volatile(1) };
    }
    // SAFETY: the mapping made above.
    unsafe { libc::munmap(pages.cast(), bytes) };
    256
}

/// Waits for any child.
fn wait() {
    // SAFETY: no status is asked for.
    unsafe { libc::wait(ptr::null_mut()) };
}

fn fork_exit() -> u64 {
    for _ in 0..10 {
        // SAFETY: the child leaves at once.
        unsafe {
            if libc::fork() == 0 {
                libc::_exit(0);
            }
        }
        wait();
    }
    10
}

fn fork_exec() -> u64 {
    let program = c"/proc/self/exe";
    let arguments = [program.as_ptr(), c"--leave".as_ptr(), ptr::null()];
    for _ in 0..5 {
        // SAFETY: the child becomes this program anew, or leaves; the strings end with zero.
        unsafe {
            if libc::fork() == 0 {
                libc::execv(program.as_ptr(), arguments.as_ptr());
                libc::_exit(1);
            }
        }
        wait();
    }
    5
}

/// Sends or receives a byte.
fn transfer(file: i32, send: bool) {
    let mut byte = [0u8];
    // SAFETY: one byte of a buffer of one.
    unsafe {
        if send {
            libc::write(file, byte.as_ptr().cast(), 1);
        } else {
            libc::read(file, byte.as_mut_ptr().cast(), 1);
        }
    }
}

fn pipe() -> u64 {
    let rounds = 200;
    let mut files = [0i32; 4];
    let (there, back) = files.split_at_mut(2);
    // SAFETY: room for two descriptors each; the child only reads, writes and leaves.
    unsafe {
        assert_eq!(libc::pipe(there.as_mut_ptr()), 0);
        assert_eq!(libc::pipe(back.as_mut_ptr()), 0);
        if libc::fork() == 0 {
            for _ in 0..rounds {
                transfer(there[0], false);
                transfer(back[1], true);
            }
            libc::_exit(0);
        }
    }
    for _ in 0..rounds {
        transfer(there[1], true);
        transfer(back[0], false);
    }
    wait();
    for file in files {
        // SAFETY: opened above.
        unsafe { libc::close(file) };
    }
    rounds
}

/// A page with `mov $N, %eax; ret`.
pub fn function() -> *mut u8 {
    static PAGE: OnceLock<usize> = OnceLock::new();
    *PAGE.get_or_init(|| {
        let page = map(4096, libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC);
        // SAFETY: within the mapping.
        unsafe { page.copy_from([0xb8, 0, 0, 0, 0, 0xc3].as_ptr(), 6) };
        page as usize
    }) as *mut u8
}

fn rewrite() -> u64 {
    let code = function();
    for n in 0..200u32 {
        // SAFETY: the page holds a function without arguments whose constant is at offset 1.
        unsafe {
            code.add(1).cast::<u32>().write_unaligned(n);
            let function: extern "C" fn() -> u32 = std::mem::transmute(code);
            assert_eq!(function(), n, "old code ran");
        }
    }
    200
}
