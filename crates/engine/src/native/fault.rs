//! Host faults inside thunks: the handlers send the thread to the thunk's recovery code.

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;

use super::arena::Recovery;
use super::{NativeError, arena};

/// Added to the vector that recovery code returns, to tell vector 0 from success.
pub(super) const FAULTED: u32 = 0x100;

const SIGNALS: [c_int; 4] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL];

/// What handled [`SIGNALS`] before.
static PREVIOUS: OnceLock<[libc::sigaction; SIGNALS.len()]> = OnceLock::new();
static INSTALLED: OnceLock<Result<(), (c_int, i32)>> = OnceLock::new();

/// Installs the handlers, once per process.
pub(crate) fn install() -> Result<(), NativeError> {
    INSTALLED
        .get_or_init(install_all)
        .map_err(|(signal, errno)| NativeError::Signal {
            signal,
            source: std::io::Error::from_raw_os_error(errno),
        })
}

fn install_all() -> Result<(), (c_int, i32)> {
    let failed = |signal| {
        (
            signal,
            std::io::Error::last_os_error().raw_os_error().unwrap_or(0),
        )
    };
    // SAFETY: all zeroes is a valid `sigaction`.
    let zero: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    let mut previous = [zero; SIGNALS.len()];
    for (action, signal) in previous.iter_mut().zip(SIGNALS) {
        // SAFETY: only queries, into a valid place.
        if unsafe { libc::sigaction(signal, ptr::null(), action) } != 0 {
            return Err(failed(signal));
        }
    }
    // Before the first handler is installed: it needs them.
    PREVIOUS.get_or_init(|| previous);
    for signal in SIGNALS {
        let mut action = zero;
        let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = on_fault;
        action.sa_sigaction = handler as usize;
        // On the alternate stack, if the thread has one: a previous handler may be there to report
        // a stack overflow.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: the handler is async-signal-safe and lives as long as the process.
        if unsafe { libc::sigaction(signal, &action, ptr::null_mut()) } != 0 {
            return Err(failed(signal));
        }
    }
    Ok(())
}

extern "C" fn on_fault(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a `ucontext_t` of the interrupted thread, nobody else's.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let address = registers[libc::REG_RIP as usize] as usize;
    // A signal that a process sent is not about the instruction at RIP. Those have codes up to 0.
    // SAFETY: the kernel passes a valid `siginfo_t`.
    let raised_here = unsafe { (*info).si_code } > 0;
    if raised_here {
        match arena::recovery(address) {
            Some(Recovery::Thunk(recovery)) => {
                let vector = registers[libc::REG_TRAPNO as usize] as u8;
                registers[libc::REG_RAX as usize] = i64::from(FAULTED | u32::from(vector));
                registers[libc::REG_RIP as usize] = recovery as i64;
                return;
            }
            Some(Recovery::Translated(recovery)) => {
                registers[libc::REG_RCX as usize] = address as i64;
                registers[libc::REG_RIP as usize] = recovery as i64;
                return;
            }
            None => {}
        }
    }
    chain(signal, info, context);
}

/// Does what would have happened without this module.
fn chain(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    let previous = SIGNALS
        .iter()
        .position(|&own| own == signal)
        .and_then(|index| PREVIOUS.get().and_then(|all| all.get(index)));
    let Some(previous) = previous else { return };
    // SAFETY: the kernel passes a valid `siginfo_t`.
    let sent = unsafe { (*info).si_code } <= 0;
    match previous.sa_sigaction {
        libc::SIG_IGN if sent => {}
        libc::SIG_DFL | libc::SIG_IGN => {
            // A fault happens again on return, then without a handler.
            // SAFETY: restores the action that the process had; both are async-signal-safe.
            unsafe {
                libc::sigaction(signal, previous, ptr::null_mut());
                if sent {
                    libc::raise(signal);
                }
            }
        }
        handler if previous.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: installed with SA_SIGINFO, the handler has this signature.
            let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) =
                unsafe { std::mem::transmute(handler) };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: installed without SA_SIGINFO, the handler has this signature.
            let handler: extern "C" fn(c_int) = unsafe { std::mem::transmute(handler) };
            handler(signal);
        }
    }
}
