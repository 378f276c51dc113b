//! Signals: what they interrupt goes on as if nothing had been.

use std::arch::{asm, global_asm};
use std::cell::{Cell, UnsafeCell};
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};

use crate::Load;
use crate::bracket::{Line, Outcome, Verdict, mix};
use crate::os::{self, Context, Mapping};
use crate::registers::{self, Width};

/// Nanoseconds between two alarms of a thread.
const PERIOD: i64 = 4_000_000;

thread_local! {
    /// Alarms that this thread has handled.
    static ALARMS: Cell<u32> = const { Cell::new(0) };
}

extern "C" fn on_alarm(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    registers::clobber(Width::detect());
    ALARMS.set(ALARMS.get() + 1);
}

/// Each thread holds values in all registers until a timer of its own has interrupted it often
/// enough, by a handler that destroys all vector registers.
pub fn timer(load: Load) -> Result<Outcome, String> {
    let verdict = Verdict::default();
    let width = Width::detect();
    os::handle(libc::SIGALRM, on_alarm);
    std::thread::scope(|scope| {
        for thread in 0..u64::from(load.threads) {
            let verdict = &verdict;
            scope.spawn(move || {
                let alarm = match os::Alarm::every(PERIOD) {
                    Ok(alarm) => alarm,
                    Err(error) => return verdict.fail(format!("no timer: {error}")),
                };
                let mut round = 0;
                while ALARMS.get() < load.rounds && !verdict.has_failed() {
                    let seed = thread << 32 | round;
                    if let Err(message) = registers::hold(width, seed, 50_000, false) {
                        verdict.fail(format!("thread {thread}, round {round}: {message}"));
                    }
                    round += 1;
                }
                drop(alarm);
            });
        }
    });
    verdict.finish(mix(u64::from(load.rounds) << 32 | u64::from(load.threads)))
}

/// Signals that each thread has handled on its alternate stack, by the thread's place in the ring.
static HANDLED: [Line<AtomicU32>; 64] = [const { Line(AtomicU32::new(0)) }; 64];

/// Signals that a handler found on the wrong stack.
static ASTRAY: AtomicU32 = AtomicU32::new(0);

thread_local! {
    /// The place in the ring, and the alternate stack's first and last byte.
    static PLACE: Cell<(usize, usize, usize)> = const { Cell::new((0, 0, 0)) };
}

extern "C" fn on_message(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let (place, low, high) = PLACE.get();
    let here = (&raw const place).addr();
    if !(low..=high).contains(&here) {
        ASTRAY.fetch_add(1, Ordering::Relaxed);
    }
    HANDLED[place].0.fetch_add(1, Ordering::Release);
}

/// Pages of an alternate stack; the frame with AVX-512 state alone takes most of one.
const STACK_PAGES: usize = 8;

/// Each thread sends queued signals to the next one in a ring and holds values in all registers
/// meanwhile; none may be lost, and all are handled on the alternate stack.
pub fn threads(load: Load) -> Result<Outcome, String> {
    let verdict = Verdict::default();
    let width = Width::detect();
    let signal = libc::SIGRTMIN() + 1;
    os::handle(signal, on_message);
    let numbers: Vec<AtomicI32> = (0..load.threads).map(|_| AtomicI32::new(0)).collect();
    ASTRAY.store(0, Ordering::Relaxed);
    for handled in &HANDLED {
        handled.0.store(0, Ordering::Relaxed);
    }
    std::thread::scope(|scope| {
        for place in 0..load.threads as usize {
            let (numbers, verdict) = (&numbers, &verdict);
            scope.spawn(move || {
                let stack = match Mapping::anonymous(STACK_PAGES, os::READ | os::WRITE) {
                    Ok(stack) => stack,
                    Err(error) => return verdict.fail(format!("no alternate stack: {error}")),
                };
                let last = stack.at(STACK_PAGES * os::PAGE - 1).addr();
                PLACE.set((place, stack.at(0).addr(), last));
                os::alternate_stack(Some(&stack));
                numbers[place].store(os::thread_number(), Ordering::Release);
                ring(place, load.rounds, numbers, width, verdict);
                os::alternate_stack(None);
            });
        }
    });
    for (place, handled) in HANDLED.iter().enumerate().take(load.threads as usize) {
        let handled = handled.0.load(Ordering::Acquire);
        verdict.equal(
            &format!("the number of signals at {place}"),
            handled,
            load.rounds,
        );
    }
    let astray = ASTRAY.load(Ordering::Relaxed);
    verdict.equal(
        "the number of signals beside the alternate stack",
        astray,
        0,
    );
    verdict.finish(mix(u64::from(load.rounds) * u64::from(load.threads)))
}

/// The part of one thread in [`threads`].
fn ring(place: usize, rounds: u32, numbers: &[AtomicI32], width: Width, verdict: &Verdict) {
    let next = &numbers[(place + 1) % numbers.len()];
    if !verdict.wait(|| next.load(Ordering::Acquire) != 0) {
        return;
    }
    let next = next.load(Ordering::Acquire);
    for round in 0..rounds {
        if !verdict.wait(|| os::send(next, libc::SIGRTMIN() + 1)) {
            return;
        }
        if let Err(message) = registers::hold(width, u64::from(round), 200, false) {
            verdict.fail(format!("thread {place}, round {round}: {message}"));
            return;
        }
    }
    // The thread must live until the last signal has come, and until it has sent its own.
    verdict.wait(|| {
        HANDLED
            .iter()
            .take(numbers.len())
            .all(|h| h.0.load(Ordering::Acquire) >= rounds)
    });
}

global_asm!(
    ".text",
    // Each raises its exception at a known instruction and leaves by `raise_end`, which a handler
    // chooses. RDI: the address to use.
    "raise_invalid: ud2",
    "raise_divide: xor eax, eax; xor edx, edx; xor ecx, ecx",
    "raise_divide_at: div ecx",
    "raise_breakpoint: int3",
    "raise_breakpoint_after: nop",
    "raise_privileged: hlt",
    "raise_execute: jmp rdi",
    // A push onto a page without access: the frame can only be written on the alternate stack.
    "raise_stack: mov r11, rsp; mov rsp, rdi",
    "raise_stack_at: push rax",
    "raise_end: ret",
    // After the push that faulted.
    "raise_stack_end: mov rsp, r11; ret",
);

unsafe extern "C" {
    static raise_invalid: UnsafeCell<u8>;
    static raise_divide: UnsafeCell<u8>;
    static raise_divide_at: UnsafeCell<u8>;
    static raise_breakpoint: UnsafeCell<u8>;
    static raise_breakpoint_after: UnsafeCell<u8>;
    static raise_privileged: UnsafeCell<u8>;
    static raise_execute: UnsafeCell<u8>;
    static raise_stack: UnsafeCell<u8>;
    static raise_stack_at: UnsafeCell<u8>;
    static raise_end: UnsafeCell<u8>;
    static raise_stack_end: UnsafeCell<u8>;
}

/// What the last exception's handler saw: signal, code, instruction and address.
static RAISED: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];

/// Where the handler sends the thread.
static LEAVE_BY: AtomicU64 = AtomicU64::new(0);

extern "C" fn on_exception(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let mut registers = Context::new(context);
    // SAFETY: the kernel gives a live structure.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as u64) };
    let at = *registers.register(libc::REG_RIP);
    for (slot, value) in RAISED.iter().zip([signal as u64, code as u64, at, address]) {
        slot.store(value, Ordering::Relaxed);
    }
    *registers.register(libc::REG_RIP) = match LEAVE_BY.swap(0, Ordering::Relaxed) {
        0 => os::unexpected(signal, at),
        leave => leave,
    };
}

/// Exceptions become signals with the exact instruction, code and address.
pub fn exceptions(load: Load) -> Result<Outcome, String> {
    let verdict = Verdict::default();
    let trouble = |error| format!("the system refused a mapping: {error}");
    let stack = Mapping::anonymous(STACK_PAGES, os::READ | os::WRITE).map_err(trouble)?;
    let closed = Mapping::anonymous(2, os::NONE).map_err(trouble)?;
    let data = Mapping::anonymous(1, os::READ | os::WRITE).map_err(trouble)?;
    os::alternate_stack(Some(&stack));
    let signals = [
        libc::SIGSEGV,
        libc::SIGILL,
        libc::SIGFPE,
        libc::SIGTRAP,
        libc::SIGBUS,
    ];
    for signal in signals {
        os::handle(signal, on_exception);
    }
    let place = |symbol: *const UnsafeCell<u8>| symbol as u64;
    let end = place(&raw const raise_end);
    let top = closed.at(os::PAGE) as u64;
    let page = data.at(0) as u64;
    // INT3 and the general protection exception are SI_KERNEL and come without an address; the
    // pages are mapped, so what they refuse is SEGV_ACCERR.
    let (kernel, access) = (0x80, 2);
    let cases = [
        (
            &raw const raise_invalid,
            0,
            libc::SIGILL,
            2,
            place(&raw const raise_invalid),
            None,
            end,
        ),
        (
            &raw const raise_divide,
            0,
            libc::SIGFPE,
            1,
            place(&raw const raise_divide_at),
            None,
            end,
        ),
        (
            &raw const raise_breakpoint,
            0,
            libc::SIGTRAP,
            kernel,
            place(&raw const raise_breakpoint_after),
            Some(0),
            end,
        ),
        (
            &raw const raise_privileged,
            0,
            libc::SIGSEGV,
            kernel,
            place(&raw const raise_privileged),
            Some(0),
            end,
        ),
        (
            &raw const raise_execute,
            page,
            libc::SIGSEGV,
            access,
            page,
            Some(page),
            end,
        ),
        (
            &raw const raise_stack,
            top,
            libc::SIGSEGV,
            access,
            place(&raw const raise_stack_at),
            Some(top - 8),
            place(&raw const raise_stack_end),
        ),
    ];
    let mut sum = 0;
    'rounds: for _ in 0..load.rounds {
        for (case, (code, operand, signal, reason, at, address, leave)) in
            cases.into_iter().enumerate()
        {
            LEAVE_BY.store(leave, Ordering::Relaxed);
            // SAFETY: the code raises its exception, and the handler leaves it by a return.
            unsafe {
                asm!("call {code}", code = in(reg) code, in("rdi") operand, clobber_abi("C"));
            }
            let raised: [u64; 4] = std::array::from_fn(|i| RAISED[i].load(Ordering::Relaxed));
            // Where nothing else is said, the address is that of the instruction.
            let expected = [signal as u64, reason, at, address.unwrap_or(at)];
            if raised != expected {
                verdict.fail(format!(
                    "case {case}: signal, code, instruction and address are {raised:x?} and must be {expected:x?}"
                ));
                break 'rounds;
            }
            sum = mix(sum ^ raised[0] << 8 ^ raised[1]);
        }
    }
    os::install_handlers();
    os::alternate_stack(None);
    verdict.finish(sum)
}
