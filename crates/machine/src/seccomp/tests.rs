//! Each case runs in a process of its own, forked from the test's: a filter is for good.

use super::*;

/// What a confined child ends with: its exit status, or `None` if a signal ended it.
fn confined(mismatch: SeccompAction, act: fn() -> c_int) -> (Option<c_int>, c_int) {
    // Prepared before the fork: the child of a process with threads may not allocate.
    let programs = programs(mismatch).unwrap();
    // SAFETY: the child calls async-signal-safe functions only, and ends by `_exit`.
    unsafe {
        let child = libc::fork();
        assert!(child >= 0, "fork");
        if child == 0 {
            let null = libc::open(c"/dev/null".as_ptr(), libc::O_WRONLY);
            libc::dup2(null, libc::STDERR_FILENO);
            if handle_violations().is_err() {
                libc::_exit(101);
            }
            for program in &programs {
                if apply_filter_all_threads(program).is_err() {
                    libc::_exit(102);
                }
            }
            libc::_exit(act());
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &mut status, 0), child);
        let exited = libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status));
        (exited, libc::WTERMSIG(status))
    }
}

fn stops(what: &str, act: fn() -> c_int) {
    let (status, signal) = confined(SeccompAction::Trap, act);
    assert_eq!(status, Some(VIOLATION_STATUS), "{what}, signal {signal}");
}

fn lets(what: &str, act: fn() -> c_int) {
    let (status, signal) = confined(SeccompAction::Trap, act);
    assert_eq!(status, Some(0), "{what}, signal {signal}");
}

/// 0 if the system call succeeded, 1 if the kernel refused it in its usual way.
fn outcome(result: libc::c_long) -> c_int {
    c_int::from(result < 0)
}

macro_rules! call {
    ($number:expr $(, $argument:expr)*) => {
        // Wide, for the call takes all 64 bits of each.
        // SAFETY: the arguments are valid for the call, or the filter stops it.
        unsafe { libc::syscall($number $(, $argument as libc::c_long)*) }
    };
}

const PAGE: usize = 4096;

fn map(protection: c_int, flags: c_int) -> c_int {
    let flags = flags | libc::MAP_ANONYMOUS;
    outcome(call!(
        libc::SYS_mmap,
        0usize,
        PAGE,
        protection,
        flags,
        -1,
        0
    ))
}

#[test]
fn programs_and_processes_are_out_of_reach() {
    stops("execve", || {
        let nothing = [ptr::null::<i8>()];
        let path = c"/bin/true".as_ptr();
        outcome(call!(
            libc::SYS_execve,
            path,
            nothing.as_ptr(),
            nothing.as_ptr()
        ))
    });
    stops("execveat", || {
        outcome(call!(libc::SYS_execveat, -1, 0, 0, 0, 0))
    });
    stops("ptrace", || {
        outcome(call!(libc::SYS_ptrace, libc::PTRACE_TRACEME, 0, 0, 0))
    });
    stops("process_vm_writev", || {
        outcome(call!(libc::SYS_process_vm_writev, 1, 0, 0, 0, 0, 0))
    });
    stops("fork", || outcome(call!(libc::SYS_fork)));
    stops("clone without CLONE_THREAD", || {
        outcome(call!(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0))
    });
    stops("kill", || outcome(call!(libc::SYS_kill, 1, 0)));
    // Init's.
    stops("tgkill of another process", || {
        outcome(call!(libc::SYS_tgkill, 1, 1, 0))
    });
}

#[test]
fn clone3_is_unknown() {
    lets("clone3", || {
        let result = call!(libc::SYS_clone3, 0usize, 0usize);
        c_int::from(result != -1 || io::Error::last_os_error().raw_os_error() != Some(libc::ENOSYS))
    });
}

#[test]
fn files_open_for_reading_only() {
    lets("openat to read", || {
        let path = c"/dev/null".as_ptr();
        outcome(call!(
            libc::SYS_openat,
            libc::AT_FDCWD,
            path,
            libc::O_RDONLY | libc::O_CLOEXEC,
            0
        ))
    });
    stops("openat to write", || {
        let path = c"/dev/null".as_ptr();
        outcome(call!(
            libc::SYS_openat,
            libc::AT_FDCWD,
            path,
            libc::O_WRONLY,
            0
        ))
    });
    stops("openat to read and write", || {
        let path = c"/dev/null".as_ptr();
        outcome(call!(
            libc::SYS_openat,
            libc::AT_FDCWD,
            path,
            libc::O_RDWR,
            0
        ))
    });
    stops("openat to create", || {
        let path = c"/dev/null".as_ptr();
        outcome(call!(
            libc::SYS_openat,
            libc::AT_FDCWD,
            path,
            libc::O_RDONLY | libc::O_CREAT,
            0
        ))
    });
    stops("rename", || outcome(call!(libc::SYS_rename, 0, 0)));
    stops("chmod", || outcome(call!(libc::SYS_chmod, 0, 0)));
    stops("io_uring_setup", || {
        outcome(call!(libc::SYS_io_uring_setup, 1, 0))
    });
}

#[test]
fn the_network_is_out_of_reach() {
    stops("socket", || {
        outcome(call!(libc::SYS_socket, libc::AF_INET, libc::SOCK_STREAM, 0))
    });
    stops("connect", || outcome(call!(libc::SYS_connect, 0, 0, 0)));
    stops("bind", || outcome(call!(libc::SYS_bind, 0, 0, 0)));
    stops("sendto an address", || {
        let address = [0u8; 16];
        outcome(call!(libc::SYS_sendto, 0, 0, 0, 0, address.as_ptr(), 16))
    });
    stops("TIOCSTI", || {
        outcome(call!(libc::SYS_ioctl, 0, libc::TIOCSTI, 0))
    });
}

#[test]
fn memory_is_writable_or_executable() {
    lets("mmap to write", || {
        map(libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE)
    });
    stops("mmap to write and execute", || {
        let all = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        map(all, libc::MAP_SHARED)
    });
    stops("private mmap to execute", || {
        map(libc::PROT_READ | libc::PROT_EXEC, libc::MAP_PRIVATE)
    });
    lets("the two mappings of an arena", || {
        let file = call!(libc::SYS_memfd_create, c"test".as_ptr(), libc::MFD_CLOEXEC);
        let sized = call!(libc::SYS_ftruncate, file, PAGE);
        let map = |protection: c_int| {
            call!(
                libc::SYS_mmap,
                0usize,
                PAGE,
                protection,
                libc::MAP_SHARED,
                file,
                0
            )
        };
        let writable = map(libc::PROT_READ | libc::PROT_WRITE);
        let executable = map(libc::PROT_READ | libc::PROT_EXEC);
        outcome(file.min(sized).min(writable).min(executable))
    });
    stops("mprotect to execute", || {
        outcome(call!(
            libc::SYS_mprotect,
            0usize,
            0usize,
            libc::PROT_READ | libc::PROT_EXEC
        ))
    });
}

#[test]
fn log_mode_lets_through() {
    let (status, _) = confined(SeccompAction::Log, || outcome(call!(libc::SYS_getppid)));
    assert_eq!(status, Some(0));
    stops("the same, enforced", || outcome(call!(libc::SYS_getppid)));
}

/// Says to the test below that it is the child.
const PANIC: &str = "TRAPLINE_TEST_PANIC";

#[test]
fn a_panic_is_told_with_its_backtrace() {
    if std::env::var_os(PANIC).is_some() {
        confine(Seccomp::Enforce).unwrap();
        panic!("told");
    }
    let name = std::thread::current().name().unwrap().to_owned();
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &name, "--nocapture"])
        .envs([(PANIC, "1"), ("RUST_BACKTRACE", "full")])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(101), "{said}");
    assert!(said.contains("told"), "{said}");
    assert!(
        said.contains("a_panic_is_told_with_its_backtrace"),
        "{said}"
    );
    assert!(said.contains("tests.rs:"), "{said}");
}
