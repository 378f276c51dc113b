//! The processor itself: a child process executes the original bytes, at their address, with all
//! registers loaded.

#![allow(unsafe_code)]

use std::arch::{asm, global_asm};
use std::ffi::{c_int, c_void};
use std::fs::File;
use std::io::{Read, Write};
use std::mem::offset_of;
use std::os::fd::{FromRawFd, RawFd};
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

use trapline_x86::vector::{VectorState, X87};

use crate::case::{CODE, Case, DATA, Data, NO_FAULT, Outcome, Registers};

/// Cases handed over at a time.
pub const BATCH: usize = 256;

/// Where the child keeps [`Control`]: out of reach for 32-bit addresses, so random code hardly finds
/// it.
const CONTROL: usize = 0x2bd3_7159_6000;

/// Linux's selectors for user code and data.
pub const CODE_32_SELECTOR: u16 = 0x23;
pub const CODE_64_SELECTOR: u16 = 0x33;
pub const DATA_SELECTOR: u16 = 0x2b;
/// Selects the first descriptor of the local descriptor table, at privilege level 3.
const CODE_16_SELECTOR: u16 = 7;

/// From [`CODE`] to a 64-bit jump to the end of the assembly below.
const EXIT: usize = 64;

/// What the assembly below works on.
#[repr(C, align(64))]
struct Control {
    input: Registers,
    output: Registers,
    host_rsp: u64,
    /// 0: XMM, 1: YMM, 2: ZMM and opmask registers.
    width: u32,
    mxcsr: u32,
    fault: u32,
}

/// A far pointer to the instruction.
#[repr(C)]
struct Target {
    offset: AtomicU32,
    selector: AtomicU32,
}

static TARGET: Target = Target {
    offset: AtomicU32::new(0),
    selector: AtomicU32::new(0),
};

const OUTPUT: usize = offset_of!(Control, output);
const VECTOR: usize = offset_of!(Registers, vector);

global_asm!(
    ".macro vectors_load instruction, name",
    ".irp i, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "\\instruction \\name\\i, [rax + {zmm} + 64 * \\i]",
    ".endr",
    ".endm",
    ".macro vectors_store instruction, name",
    ".irp i, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "\\instruction [rax + {zmm} + 64 * \\i], \\name\\i",
    ".endr",
    ".endm",
    ".globl native_reference_enter, native_reference_exit",
    ".hidden native_reference_enter, native_reference_exit",
    "native_reference_enter:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "movabs rax, {control}",
    "mov [rax + {host_rsp}], rsp",
    "fxrstor64 [rax + {x87}]",
    "cmp dword ptr [rax + {width}], 1",
    "jb 1f",
    "je 2f",
    "vectors_load vmovaps, zmm",
    ".irp i, 16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
    "vmovaps zmm\\i, [rax + {zmm} + 64 * \\i]",
    ".endr",
    ".irp i, 0,1,2,3,4,5,6,7",
    "kmovq k\\i, [rax + {k} + 8 * \\i]",
    ".endr",
    "jmp 3f",
    "1: vectors_load movaps, xmm",
    "jmp 3f",
    "2: vectors_load vmovaps, ymm",
    "3: ldmxcsr [rax + {guest_mxcsr}]",
    "push qword ptr [rax + {rflags}]",
    "popfq",
    "mov rcx, [rax + 8]",
    "mov rdx, [rax + 16]",
    "mov rbx, [rax + 24]",
    "mov rsp, [rax + 32]",
    "mov rbp, [rax + 40]",
    "mov rsi, [rax + 48]",
    "mov rdi, [rax + 56]",
    "mov r8, [rax + 64]",
    "mov r9, [rax + 72]",
    "mov r10, [rax + 80]",
    "mov r11, [rax + 88]",
    "mov r12, [rax + 96]",
    "mov r13, [rax + 104]",
    "mov r14, [rax + 112]",
    "mov r15, [rax + 120]",
    "mov rax, [rax]",
    // jmp far [rip + target]
    ".byte 0xff, 0x2d",
    ".long {target} - . - 4",
    "native_reference_exit:",
    "movabs [{control} + {output}], rax",
    "movabs rax, {control} + {output}",
    "mov [rax + 8], rcx",
    "mov [rax + 16], rdx",
    "mov [rax + 24], rbx",
    "mov [rax + 32], rsp",
    "mov [rax + 40], rbp",
    "mov [rax + 48], rsi",
    "mov [rax + 56], rdi",
    "mov [rax + 64], r8",
    "mov [rax + 72], r9",
    "mov [rax + 80], r10",
    "mov [rax + 88], r11",
    "mov [rax + 96], r12",
    "mov [rax + 104], r13",
    "mov [rax + 112], r14",
    "mov [rax + 120], r15",
    "mov rsp, [rax + {host_rsp} - {output}]",
    "pushfq",
    "pop qword ptr [rax + {rflags}]",
    "push 2",
    "popfq",
    "stmxcsr [rax + {guest_mxcsr}]",
    "cmp dword ptr [rax + {width} - {output}], 1",
    "jb 1f",
    "je 2f",
    "vectors_store vmovaps, zmm",
    ".irp i, 16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
    "vmovaps [rax + {zmm} + 64 * \\i], zmm\\i",
    ".endr",
    ".irp i, 0,1,2,3,4,5,6,7",
    "kmovq [rax + {k} + 8 * \\i], k\\i",
    ".endr",
    "vzeroupper",
    "jmp 3f",
    "1: vectors_store movaps, xmm",
    "jmp 3f",
    "2: vectors_store vmovaps, ymm",
    "vzeroupper",
    "3: fxsave64 [rax + {x87}]",
    "fninit",
    "ldmxcsr [rax + {mxcsr} - {output}]",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    control = const CONTROL,
    output = const OUTPUT,
    host_rsp = const offset_of!(Control, host_rsp),
    target = sym TARGET,
    width = const offset_of!(Control, width),
    mxcsr = const offset_of!(Control, mxcsr),
    rflags = const offset_of!(Registers, rflags),
    zmm = const VECTOR + offset_of!(VectorState, zmm),
    x87 = const VECTOR + offset_of!(VectorState, x87),
    k = const VECTOR + offset_of!(VectorState, k),
    guest_mxcsr = const VECTOR + offset_of!(VectorState, mxcsr),
);

unsafe extern "C" {
    fn native_reference_enter();
    fn native_reference_exit();
}

/// Gives an x87 image the form in which this processor saves it.
pub fn canonical(image: &mut X87) {
    let image = ptr::from_mut(image);
    // SAFETY: the image is aligned and has an MXCSR value that FXRSTOR accepts; x87 and XMM
    // registers may be clobbered, MXCSR keeps its value, nothing stays pending.
    unsafe {
        asm!(
            "fxrstor64 [{image}]",
            "fxsave64 [{image}]",
            "fninit",
            image = in(reg) image,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
        );
    }
}

/// What parent and child share.
#[repr(C, align(64))]
pub struct Batch {
    pub cases: [Case; BATCH],
    pub outcomes: [Outcome; BATCH],
    pub count: usize,
}

/// The ends of the pipes that the child serves: from and to its parent.
pub type Ends = (RawFd, RawFd);

/// A child process that works on batches of `B`, which is shared.
pub struct Child<B> {
    batch: *mut B,
    to_child: File,
    from_child: File,
    child: libc::pid_t,
}

impl<B> Child<B> {
    /// Starts a child that does `work`, with a batch of zeroes, which must be a valid `B`.
    pub fn start(work: impl FnOnce(*mut B, Ends)) -> Self {
        // SAFETY: a new shared mapping, all zeroes; `fork`, after which the child makes system
        // calls and computes, nothing else.
        unsafe {
            let batch = map(ptr::null_mut(), size_of::<B>(), libc::MAP_SHARED).cast::<B>();
            let (child_end, to_child) = pipe();
            let (from_child, parent_end) = pipe();
            let parent = libc::getpid();
            let child = libc::fork();
            assert!(child >= 0, "fork");
            if child == 0 {
                libc::close(to_child);
                libc::close(from_child);
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                if libc::getppid() == parent {
                    work(batch, (child_end, parent_end));
                }
                libc::_exit(0);
            }
            libc::close(child_end);
            libc::close(parent_end);
            Self {
                batch,
                to_child: File::from_raw_fd(to_child),
                from_child: File::from_raw_fd(from_child),
                child,
            }
        }
    }

    /// The shared batch; only between [`Self::finish`] and [`Self::begin`].
    pub fn batch(&mut self) -> &mut B {
        // SAFETY: the child does not touch it then.
        unsafe { &mut *self.batch }
    }

    pub fn begin(&mut self) {
        self.to_child.write_all(&[1]).expect("the child listens");
    }

    pub fn finish(&mut self) {
        self.from_child
            .read_exact(&mut [0])
            .expect("the child answers");
    }
}

impl<B> Drop for Child<B> {
    fn drop(&mut self) {
        // SAFETY: ends and reaps the child that `start` made, and unmaps what it shared.
        unsafe {
            libc::kill(self.child, libc::SIGKILL);
            libc::waitpid(self.child, ptr::null_mut(), 0);
            libc::munmap(self.batch.cast(), size_of::<B>());
        }
    }
}

/// The child process that executes single instructions.
pub type Reference = Child<Batch>;

impl Reference {
    /// Starts the child.
    pub fn single() -> Self {
        Self::start(|batch, ends| {
            // SAFETY: in the child, whose batch it is while it works on it.
            unsafe {
                prepare();
                serve(ends, || {
                    for i in 0..(*batch).count {
                        execute(&(&(*batch).cases)[i], &raw mut (&mut (*batch).outcomes)[i]);
                    }
                });
            }
        })
    }
}

fn pipe() -> (RawFd, RawFd) {
    let mut ends = [0; 2];
    // SAFETY: room for two descriptors.
    let result = unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) };
    assert_eq!(result, 0, "pipe");
    (ends[0], ends[1])
}

/// A new mapping; at `address` if that is not null.
///
/// # Safety
/// None; called where allocation is forbidden.
unsafe fn map(address: *mut c_void, bytes: usize, flags: c_int) -> *mut c_void {
    let protection = libc::PROT_READ
        | libc::PROT_WRITE
        | if address as u64 == CODE {
            libc::PROT_EXEC
        } else {
            0
        };
    let fixed = if address.is_null() {
        0
    } else {
        libc::MAP_FIXED_NOREPLACE
    };
    // SAFETY: replaces no mapping.
    let mapped = unsafe {
        libc::mmap(
            address,
            bytes,
            protection,
            flags | fixed | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if mapped == libc::MAP_FAILED || (!address.is_null() && mapped != address) {
        // SAFETY: ends this process.
        unsafe { libc::abort() };
    }
    mapped
}

/// The child: does `work` on every batch until the pipe closes.
///
/// # Safety
/// In a process of its own.
pub unsafe fn serve((from_parent, to_parent): Ends, mut work: impl FnMut()) {
    let mut byte = 0u8;
    // SAFETY: one byte in, one byte out.
    unsafe {
        while libc::read(from_parent, (&raw mut byte).cast(), 1) == 1 {
            work();
            libc::write(to_parent, (&raw const byte).cast(), 1);
        }
    }
}

/// Maps what the assembly works on, and gives flat data segments to code outside 64-bit mode.
///
/// # Safety
/// In the child.
pub unsafe fn set_up_control() {
    // SAFETY: a new mapping at a fixed address.
    unsafe {
        let control = map(
            CONTROL as *mut c_void,
            size_of::<Control>(),
            libc::MAP_PRIVATE,
        )
        .cast::<Control>();
        (*control).width = if is_x86_feature_detected!("avx512bw") {
            2
        } else {
            u32::from(is_x86_feature_detected!("avx"))
        };
        (*control).mxcsr = 0x1f80;
        asm!("mov ds, {0:x}", "mov es, {0:x}", in(reg) DATA_SELECTOR);
    }
}

/// Sends every exception to `handler`, on a stack of its own.
///
/// # Safety
/// In the child; the handler is async-signal-safe.
pub unsafe fn handle_faults(handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void)) {
    // SAFETY: a new mapping, valid structures.
    unsafe {
        let stack = map(ptr::null_mut(), 1 << 18, libc::MAP_PRIVATE);
        let stack = libc::stack_t {
            ss_sp: stack,
            ss_flags: 0,
            ss_size: 1 << 18,
        };
        libc::sigaltstack(&stack, ptr::null_mut());
        for signal in [
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGFPE,
            libc::SIGILL,
            libc::SIGTRAP,
        ] {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            // A tick must not find a fault half handled.
            libc::sigaddset(&mut action.sa_mask, libc::SIGVTALRM);
            libc::sigaction(signal, &action, ptr::null_mut());
        }
    }
}

/// Loads all registers, jumps to `selector`:`ip`, and gives the registers with which
/// [`exit_address`] is reached.
///
/// # Safety
/// In the child, set up; what executes reaches memory of its own only and comes to that exit.
pub unsafe fn enter(before: &Registers, ip: u32, selector: u16) -> Registers {
    let control = CONTROL as *mut Control;
    // SAFETY: mapped by `set_up_control`.
    unsafe {
        TARGET.offset.store(ip, Ordering::Relaxed);
        TARGET.selector.store(selector.into(), Ordering::Relaxed);
        ptr::copy_nonoverlapping(before, &raw mut (*control).input, 1);
        // Whatever is narrower than its field keeps the rest.
        ptr::copy_nonoverlapping(before, &raw mut (*control).output, 1);
        native_reference_enter();
        (*control).output.clone()
    }
}

/// Where a fault's handler sends what [`enter`] entered.
pub fn exit_address() -> u64 {
    let exit: unsafe extern "C" fn() = native_reference_exit;
    exit as usize as u64
}

/// # Safety
/// In the child.
unsafe fn prepare() {
    // SAFETY: own mappings at fixed addresses; handlers that only touch them.
    unsafe {
        map(CODE as *mut c_void, 4096, libc::MAP_PRIVATE);
        map(DATA as *mut c_void, 4096, libc::MAP_PRIVATE);
        set_up_control();
        add_segment(CODE_16_SELECTOR >> 3, CODE as u32, 0xffff, true);
        // jmp [rip]; address
        let exit = (CODE as *mut u8).add(EXIT);
        ptr::copy_nonoverlapping([0xff, 0x25, 0, 0, 0, 0].as_ptr(), exit, 6);
        let target: unsafe extern "C" fn() = native_reference_exit;
        exit.add(6)
            .cast::<u64>()
            .write_unaligned(target as usize as u64);
        handle_faults(on_fault);
    }
}

/// Sends a signal to `handler`, on the faults' stack, whenever the thread has executed user code for
/// `interval` microseconds.
///
/// # Safety
/// As [`handle_faults`], which was called.
pub unsafe fn tick(
    handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void),
    interval: libc::suseconds_t,
) {
    let interval = libc::timeval {
        tv_sec: 0,
        tv_usec: interval,
    };
    let timer = libc::itimerval {
        it_interval: interval,
        it_value: interval,
    };
    // SAFETY: valid structures.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        libc::sigaction(libc::SIGVTALRM, &action, ptr::null_mut());
        libc::setitimer(libc::ITIMER_VIRTUAL, &timer, ptr::null_mut());
    }
}

/// Makes entry `number` of the local descriptor table a 16-bit code or data segment that begins at
/// `base`.
pub fn add_segment(number: u16, base: u32, limit: u32, code: bool) {
    /// `struct user_desc` of the kernel's interface.
    #[repr(C)]
    struct Descriptor {
        entry_number: u32,
        base_addr: u32,
        limit: u32,
        flags: u32,
    }
    const CONTENTS_CODE: u32 = 2 << 1;
    let descriptor = Descriptor {
        entry_number: number.into(),
        base_addr: base,
        limit,
        flags: if code { CONTENTS_CODE } else { 0 },
    };
    // SAFETY: reads the descriptor only. Without the segment, 16-bit cases end the child.
    unsafe {
        libc::syscall(
            libc::SYS_modify_ldt,
            1,
            &descriptor,
            size_of::<Descriptor>(),
        )
    };
}

/// # Safety
/// In the child, set up; `outcome` is valid.
unsafe fn execute(case: &Case, outcome: *mut Outcome) {
    // SAFETY: the addresses are mapped by `serve`; the instruction reaches registers and data only.
    unsafe {
        let control = CONTROL as *mut Control;
        let code = CODE as *mut u8;
        let data = DATA as *mut Data;
        ptr::copy_nonoverlapping(case.bytes.as_ptr(), code, 16);
        // jmp [rip]; address
        let leave = code.add(case.len as usize);
        match case.bits {
            64 => {
                // jmp rel32
                let distance = EXIT as u32 - (case.len + 5);
                leave.write(0xe9);
                leave.add(1).cast::<u32>().write_unaligned(distance);
            }
            bits => {
                // jmp ptr16:32
                let prefix = usize::from(bits == 16);
                leave.write(0x66);
                leave.add(prefix).write(0xea);
                let pointer = leave.add(prefix + 1);
                pointer
                    .cast::<u32>()
                    .write_unaligned(CODE as u32 + EXIT as u32);
                pointer
                    .add(4)
                    .cast::<u16>()
                    .write_unaligned(CODE_64_SELECTOR);
            }
        }
        let selector = match case.bits {
            64 => CODE_64_SELECTOR,
            32 => CODE_32_SELECTOR,
            _ => CODE_16_SELECTOR,
        };
        data.write(case.before.data);
        (&raw mut (*control).fault).write_volatile(NO_FAULT);
        (*outcome).after.registers = enter(&case.before.registers, case.ip() as u32, selector);
        (*outcome).after.data = data.read();
        (*outcome).fault = (&raw const (*control).fault).read_volatile();
    }
}

extern "C" fn on_fault(_: c_int, _: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes the thread's `ucontext_t`; the control page is mapped.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let rip = registers[libc::REG_RIP as usize] as u64;
        let vector = registers[libc::REG_TRAPNO as usize] as u32;
        if rip != u64::from(TARGET.offset.load(Ordering::Relaxed)) {
            // Not the instruction: this test is wrong.
            libc::_exit(1);
        }
        (&raw mut (*(CONTROL as *mut Control)).fault).write_volatile(vector);
        let exit: unsafe extern "C" fn() = native_reference_exit;
        registers[libc::REG_RIP as usize] = exit as usize as i64;
        let selectors = &mut registers[libc::REG_CSGSFS as usize];
        *selectors = *selectors & !0xffff | i64::from(CODE_64_SELECTOR);
    }
}
