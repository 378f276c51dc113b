//! The seccomp filter under which a machine runs: what the host's kernel does for this process once
//! the machine's files and sockets are open.
//!
//! Two filters, of which the kernel takes the stricter answer. The first makes CLONE3 look unknown:
//! its flags lie in memory, where no filter sees them, and the C library then uses CLONE, whose
//! flags the second filter sees. The second lists what is allowed; everything else is a violation.
//! Both hold for all threads, also those that were started before.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::{c_int, c_void};
use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter_all_threads,
};

use crate::outcome::MachineError;

/// What becomes of a system call that the filter does not list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Seccomp {
    /// There is no filter. The default for those who run machines inside their own process: a
    /// filter is for the whole process and for good.
    #[default]
    Off,
    /// The kernel notes it in its log and allows it.
    Log,
    /// The process says so and ends with [`VIOLATION_STATUS`].
    Enforce,
}

/// The exit status after a violation: the host refused.
pub const VIOLATION_STATUS: c_int = 71;

/// Called before the process ends for a violation.
static FAREWELL: OnceLock<fn()> = OnceLock::new();

/// Sets what is done before the process ends for a violation, for example to restore a terminal.
/// It runs in a signal handler, so it may wait for nothing and allocate nothing. The first counts.
pub fn on_violation(farewell: fn()) {
    let _ = FAREWELL.set(farewell);
}

/// Which arguments of a system call are allowed: all of the conditions, (argument, what of it).
type Conditions = Vec<(u8, Test)>;

enum Test {
    /// The lower 32 bits are this.
    Is(u32),
    /// These of the lower 32 bits are as told.
    Bits { mask: u32, value: u32 },
    /// All 64 bits are zero.
    Null,
}

/// System calls whose arguments do not matter.
///
/// They reach what is open already, this process's own memory, its threads, clocks, and the
/// removal of names (sockets of our own at the end).
const FREE: &[i64] = &[
    // Open files and sockets.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_lseek,
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_dup,
    libc::SYS_accept4,
    libc::SYS_shutdown,
    libc::SYS_setsockopt,
    libc::SYS_getsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_recvfrom,
    // Names: the sockets that this process made go at its end, if they are still its own.
    libc::SYS_statx,
    libc::SYS_newfstatat,
    libc::SYS_unlink,
    // A panic's message names places relative to the working folder, from this program's symbols.
    libc::SYS_readlink,
    libc::SYS_getcwd,
    // Memory. Mappings with PROT_EXEC are below.
    libc::SYS_memfd_create,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    // Threads.
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_getpgrp,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    // Clocks and random numbers.
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
];

/// What the kernel told the process at its start; rustix may ask when it is first used.
const PR_GET_AUXV: u32 = 0x4155_5856;
/// PR_SET_VMA: names of mappings, by the C library.
const PR_SET_VMA: u32 = 0x5356_4d41;

/// System calls of which only these forms are allowed.
fn bound() -> Vec<(i64, Vec<Conditions>)> {
    use Test::{Bits, Is, Null};
    let bit = |n: c_int| n as u32;
    let writing = bit(libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC);
    let executable = bit(libc::PROT_EXEC);
    let thread = bit(libc::CLONE_VM | libc::CLONE_SIGHAND | libc::CLONE_THREAD | libc::CLONE_FILES);
    let one = |argument: u8, values: &[u32]| -> Vec<Conditions> {
        values.iter().map(|&v| vec![(argument, Is(v))]).collect()
    };
    vec![
        // Reading: the kernel and its initial file system after a reset, and /proc/self.
        (
            libc::SYS_openat,
            vec![vec![
                (0, Is(bit(libc::AT_FDCWD))),
                (
                    2,
                    Bits {
                        mask: writing,
                        value: 0,
                    },
                ),
            ]],
        ),
        // Never executable and writable, and executable only as a shared mapping (of a memfd).
        (
            libc::SYS_mmap,
            vec![
                vec![(
                    2,
                    Bits {
                        mask: executable,
                        value: 0,
                    },
                )],
                vec![
                    (2, Is(bit(libc::PROT_READ | libc::PROT_EXEC))),
                    (3, Is(bit(libc::MAP_SHARED))),
                ],
            ],
        ),
        (
            libc::SYS_mprotect,
            vec![vec![(
                2,
                Bits {
                    mask: executable,
                    value: 0,
                },
            )]],
        ),
        // Threads, not processes.
        (
            libc::SYS_clone,
            vec![vec![(
                0,
                Bits {
                    mask: thread,
                    value: thread,
                },
            )]],
        ),
        // The first filter answers.
        (libc::SYS_clone3, vec![]),
        (
            libc::SYS_fcntl,
            one(
                1,
                &[
                    bit(libc::F_DUPFD_CLOEXEC),
                    bit(libc::F_GETFD),
                    bit(libc::F_SETFD),
                    bit(libc::F_GETFL),
                    bit(libc::F_SETFL),
                ],
            ),
        ),
        // A terminal's modes (TIOCSTI, which types at it, is not among them), and non-blocking.
        (
            libc::SYS_ioctl,
            one(
                1,
                &[
                    libc::TCGETS as u32,
                    libc::TCGETS2 as u32,
                    libc::TCSETS as u32,
                    libc::TCSETSW as u32,
                    libc::TCSETSF as u32,
                    libc::TCSETS2 as u32,
                    libc::TCSETSW2 as u32,
                    libc::TCSETSF2 as u32,
                    libc::TIOCGWINSZ as u32,
                    libc::TIOCGPGRP as u32,
                    libc::FIONBIO as u32,
                ],
            ),
        ),
        (
            libc::SYS_prctl,
            one(
                0,
                &[
                    bit(libc::PR_SET_NAME),
                    bit(libc::PR_SET_TIMERSLACK),
                    PR_SET_VMA,
                    PR_GET_AUXV,
                ],
            ),
        ),
        // To the connected peer only.
        (libc::SYS_sendto, vec![vec![(4, Null)]]),
        // Signals to this process only.
        (libc::SYS_tgkill, vec![vec![(0, Is(std::process::id()))]]),
    ]
}

fn rule(conditions: Conditions) -> Result<SeccompRule, BackendError> {
    use SeccompCmpArgLen::{Dword, Qword};
    let conditions = conditions.into_iter().map(|(argument, test)| match test {
        Test::Is(value) => {
            SeccompCondition::new(argument, Dword, SeccompCmpOp::Eq, u64::from(value))
        }
        Test::Bits { mask, value } => {
            let masked = SeccompCmpOp::MaskedEq(u64::from(mask));
            SeccompCondition::new(argument, Dword, masked, u64::from(value))
        }
        Test::Null => SeccompCondition::new(argument, Qword, SeccompCmpOp::Eq, 0),
    });
    SeccompRule::new(conditions.collect::<Result<_, _>>()?)
}

/// The two filters.
fn programs(mismatch: SeccompAction) -> Result<[BpfProgram; 2], BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        FREE.iter().map(|&call| (call, Vec::new())).collect();
    for (call, forms) in bound() {
        let forms = forms.into_iter().map(rule).collect::<Result<_, _>>()?;
        rules.insert(call, forms);
    }
    let unknown = SeccompAction::Errno(libc::ENOSYS as u32);
    let clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let arch = TargetArch::x86_64;
    Ok([
        SeccompFilter::new(clone3, SeccompAction::Allow, unknown, arch)?.try_into()?,
        SeccompFilter::new(rules, mismatch, SeccompAction::Allow, arch)?.try_into()?,
    ])
}

/// From now on the process is confined as `mode` says, for good.
///
/// # Errors
/// The host's kernel refuses the filter.
pub fn confine(mode: Seccomp) -> Result<(), MachineError> {
    let mismatch = match mode {
        Seccomp::Off => return Ok(()),
        Seccomp::Log => SeccompAction::Log,
        Seccomp::Enforce => SeccompAction::Trap,
    };
    install(mismatch).map_err(|source| MachineError::Host {
        what: "a seccomp filter".into(),
        remedy: "use a Linux kernel with CONFIG_SECCOMP_FILTER, or give --seccomp false",
        source,
    })
}

fn install(mismatch: SeccompAction) -> io::Result<()> {
    let programs = programs(mismatch).map_err(io::Error::other)?;
    handle_violations()?;
    for program in &programs {
        apply_filter_all_threads(program).map_err(io::Error::other)?;
    }
    Ok(())
}

fn handle_violations() -> io::Result<()> {
    // SAFETY: all zeroes is a valid `sigaction`.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = on_sigsys;
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the handler is async-signal-safe and lives as long as the process.
    match unsafe { libc::sigaction(libc::SIGSYS, &action, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

extern "C" fn on_sigsys(_: c_int, _: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a `ucontext_t` of the interrupted thread, nobody else's.
    let registers = unsafe { &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    // The kernel puts the number back where it was.
    let call = registers[libc::REG_RAX as usize];
    let address = registers[libc::REG_RIP as usize];
    if let Some(farewell) = FAREWELL.get() {
        farewell();
    }
    let mut text = [0; 256];
    let mut rest = text.as_mut_slice();
    let _ = writeln!(
        rest,
        "trapline: ended, for it made system call {call} (from {address:#x}), which its seccomp \
         filter does not allow; report this, and give --seccomp log or false to run without"
    );
    let left = rest.len();
    let length = text.len() - left;
    // SAFETY: writes initialized bytes of `text`; both calls are async-signal-safe.
    unsafe {
        libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), length);
        libc::_exit(VIOLATION_STATUS);
    }
}

#[cfg(test)]
mod tests;
