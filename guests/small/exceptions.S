# exceptions: vector, error code and saved state of every exception in 64-bit mode (#DB is
# in debug.S).
#
# The processor's manual is the authority (Intel SDM volume 3, chapters 6 and 18; AMD APM
# volume 2, chapter 8). What user mode can reach was also compared with a processor (AMD
# Zen 4). Emulators differ from it:
# - Bochs 2.7: IRET to an absent SS is #NP (a processor: #SS).
# - QEMU 7.2 (TCG): INT n errors hold n * 16 + 2 (n * 8 + 2); faults save RF = 0 (1);
#   not canonical stack addresses are #GP (#SS); a jump to a not canonical address faults
#   at the target (at the jump); no #AC; ICEBP is #UD (#DB); LOCK MOV runs (#UD); null selectors in LTR, a null LDT,
#   RPL 3 in a null SS and reserved bits in CR0 and MXCSR pass (#GP).

.include "lib/boot.inc"

.set NONCANONICAL, 0x8000000000000000
.set HOLE, 0x180000000          # virtual addresses without a mapping

    .code64
main64:
    call divide
    call software_interrupts
    call undefined_opcodes
    call device_not_available
    call segment_faults
    call general_protection
    call control_registers
    call privileged_at_cpl3
    call page_faults
    call floating_point
    call alignment
    call double_faults
    call gates_and_stacks
    call returns
    call system_calls
    FINISH "exceptions"

divide:
    xor %ecx, %ecx
    mov $5, %eax
    xor %edx, %edx
    EXPECT_FAULT "div by 0", 0, NO_ERROR, div %ecx
    CHECK "div by 0 leaves eax", f_rax, $5
    EXPECT_FAULT "div r64 by 0", 0, NO_ERROR, div %rcx
    mov $0x80000000, %eax
    cltd
    mov $-1, %ecx
    EXPECT_FAULT "idiv overflow", 0, NO_ERROR, idiv %ecx
    movabs $0x8000000000000000, %rax
    cqto
    mov $-1, %rcx
    EXPECT_FAULT "idiv r64 overflow", 0, NO_ERROR, idiv %rcx
    mov $0x1000, %eax
    mov $1, %ecx
    EXPECT_FAULT "div r8 overflow", 0, NO_ERROR, div %cl
    movl $0, scratch
    EXPECT_FAULT "div m32 by 0", 0, NO_ERROR, divl scratch
    CHECK "fault: cs", f_cs, $KCODE64
    CHECK "fault: ss", f_ss, $KDATA
    CHECK "fault: rsp", f_rsp, fault_stack
    xor %ecx, %ecx
    USER_FAULT "user div by 0", 0, NO_ERROR, div %ecx
    ret

software_interrupts:
    EXPECT_TRAP "int3", 3, NO_ERROR, int3
    CHECK_MASK "int3: no RF", $RF, f_rflags, $0
    EXPECT_TRAP "cd 03", 3, NO_ERROR, .byte 0xcd, 3
    EXPECT_TRAP "int 0x81", 0x81, NO_ERROR, int $0x81
    EXPECT_TRAP "icebp", 1, NO_ERROR, .byte 0xf1
    USER_FAULT "user int3, DPL 0", 13, 3*8+2, int3
    USER_FAULT "user int 0x81, DPL 0", 13, 0x81*8+2, int $0x81
    USER_FAULT "user int 14, DPL 0", 13, 14*8+2, int $14
    GATE 3, 0xee00
    GATE 0x81, 0xee00
    USER_TRAP "user int3", 3, NO_ERROR, int3
    CHECK "user int3: cs", f_cs, $UCODE64
    CHECK "user int3: ss", f_ss, $UDATA
    CHECK "user int3: rsp", f_rsp, $user_stack_top
    CHECK "user int3: stack from RSP0", f_frame_end, $kernel_stack_top
    CHECK "user int3: handler ss", f_handler_ss, $0
    CHECK "user int3: handler cs", f_handler_cs, $KCODE64
    USER_TRAP "user int 0x81", 0x81, NO_ERROR, int $0x81
    USER_TRAP "user icebp ignores DPL", 1, NO_ERROR, .byte 0xf1
    GATE 3, 0x8e00
    # gates that cannot be used
    GATE 0x82, 0x0e00
    EXPECT_FAULT "gate not present", 11, 0x82*8+2, int $0x82
    GATE 0x83, 0xe200
    EXPECT_FAULT "gate of no gate type", 13, 0x83*8+2, int $0x83
    GATE 0x83, 0x8500
    EXPECT_FAULT "task gate in 64-bit mode", 13, 0x83*8+2, int $0x83
    GATE 0x83, 0x8e00
    movw $KCODE32, idt + 0x83*16 + 2
    EXPECT_FAULT "gate to 32-bit code", 13, KCODE32, int $0x83
    movw $KDATA, idt + 0x83*16 + 2
    EXPECT_FAULT "gate to data", 13, KDATA, int $0x83
    movw $0, idt + 0x83*16 + 2
    EXPECT_FAULT "gate with null cs", 13, 0, int $0x83
    movw $0x1000, idt + 0x83*16 + 2
    EXPECT_FAULT "gate beyond the GDT", 13, 0x1000, int $0x83
    movw $UCODE64, idt + 0x83*16 + 2
    EXPECT_FAULT "gate to outer code", 13, UCODE64 & ~3, int $0x83
    GATE 0x83, 0x8e00
    # a hardware exception through such a gate: EXT is set
    GATE 0, 0x0e00
    xor %ecx, %ecx
    # contributory #DE and contributory #NP make #DF, a benign #UD and #NP do not
    EXPECT_FAULT "#DE through an absent gate", 8, 0, div %ecx
    GATE 0, 0x8e00
    GATE 6, 0x0e00
    EXPECT_FAULT "#UD through an absent gate", 11, 6*8+3, ud2
    EXPECT_FAULT "int 6 through an absent gate", 11, 6*8+2, int $6
    GATE 6, 0x8e00
    # beyond the limit
    movw $0x80*16-1, idt_pointer
    lidt idt_pointer
    EXPECT_FAULT "int beyond the IDT", 13, 0x80*8+2, int $0x80
    EXPECT_TRAP "int at the end of the IDT", 0x7f, NO_ERROR, int $0x7f
    movw $0x7f*16+14, idt_pointer
    lidt idt_pointer
    EXPECT_FAULT "int past a cut gate", 13, 0x7f*8+2, int $0x7f
    movw $4095, idt_pointer
    lidt idt_pointer
    ret

undefined_opcodes:
    EXPECT_FAULT "ud2", 6, NO_ERROR, ud2
    EXPECT_FAULT "ud1", 6, NO_ERROR, .byte 0x0f, 0xb9, 0xc0
    EXPECT_FAULT "lock on a register", 6, NO_ERROR, .byte 0xf0, 0x01, 0xc0
    mov $scratch, %ebx
    EXPECT_FAULT "lock mov", 6, NO_ERROR, .byte 0xf0, 0x89, 0x03
    EXPECT_FAULT "lock cmp", 6, NO_ERROR, .byte 0xf0, 0x39, 0x03
    EXPECT_FAULT "lock nop", 6, NO_ERROR, .byte 0xf0, 0x90
    .irp opcode, 0x06, 0x07, 0x0e, 0x16, 0x17, 0x1e, 0x1f, 0x27, 0x2f, 0x37, 0x3f, 0x60, 0x61, 0xce, 0xd6, 0x9a, 0xea, 0x82, 0xd4, 0xd5
    EXPECT_FAULT "opcode \opcode in 64-bit mode", 6, NO_ERROR, .byte \opcode, 0, 0, 0, 0, 0, 0
    .endr
    EXPECT_FAULT "mov to cs", 6, NO_ERROR, .byte 0x8e, 0xc8
    EXPECT_FAULT "mov to segment register 6", 6, NO_ERROR, .byte 0x8e, 0xf0
    EXPECT_FAULT "mov from cr1", 6, NO_ERROR, .byte 0x0f, 0x20, 0xc8
    EXPECT_FAULT "mov from cr5", 6, NO_ERROR, .byte 0x0f, 0x20, 0xe8
    EXPECT_FAULT "mov from cr9", 6, NO_ERROR, .byte 0x44, 0x0f, 0x20, 0xc8
    EXPECT_FAULT "mov from dr8", 6, NO_ERROR, .byte 0x44, 0x0f, 0x21, 0xc0
    EXPECT_FAULT "group 5 /7", 6, NO_ERROR, .byte 0xff, 0xf8
    EXPECT_FAULT "group 4 /2", 6, NO_ERROR, .byte 0xfe, 0xd0
    EXPECT_FAULT "lea from a register", 6, NO_ERROR, .byte 0x8d, 0xc0
    EXPECT_FAULT "lgdt from a register form", 6, NO_ERROR, .byte 0x0f, 0x01, 0xd6
    EXPECT_FAULT "cmpxchg8b on a register", 6, NO_ERROR, .byte 0x0f, 0xc7, 0xc8
    EXPECT_FAULT "prefix before VEX", 6, NO_ERROR, .byte 0x66, 0xc5, 0xf8, 0x77
    EXPECT_FAULT "VEX with CR4.OSXSAVE clear", 6, NO_ERROR, .byte 0xc5, 0xf8, 0x77
    EXPECT_FAULT "xgetbv with CR4.OSXSAVE clear", 6, NO_ERROR, xgetbv
    EXPECT_FAULT "rdfsbase with CR4.FSGSBASE clear", 6, NO_ERROR, rdfsbase %rax
    EXPECT_FAULT "15 bytes and one more", 13, 0, .byte 0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x90
    EXPECT_NONE "15 bytes", .byte 0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x90
    mov $CR4_BOOT & ~0x200, %eax
    mov %rax, %cr4
    EXPECT_FAULT "movaps with CR4.OSFXSR clear", 6, NO_ERROR, movaps %xmm0, %xmm1
    mov $CR4_BOOT, %eax
    mov %rax, %cr4
    USER_FAULT "user ud2", 6, NO_ERROR, ud2
    CHECK_MASK "#UD saves RF", $RF, f_rflags, $RF
    ret

device_not_available:
    mov $CR0_BOOT | 8, %eax     # TS
    mov %rax, %cr0
    EXPECT_FAULT "fld1 with TS", 7, NO_ERROR, fld1
    EXPECT_FAULT "movaps with TS", 7, NO_ERROR, movaps %xmm0, %xmm1
    EXPECT_FAULT "fwait with TS and MP", 7, NO_ERROR, fwait
    EXPECT_FAULT "fxsave with TS", 7, NO_ERROR, fxsave scratch
    EXPECT_NONE "sfence with TS", sfence
    mov $(CR0_BOOT | 8) & ~2, %eax
    mov %rax, %cr0
    EXPECT_NONE "fwait with TS without MP", fwait
    clts
    EXPECT_NONE "movaps after clts", movaps %xmm0, %xmm1
    mov $CR0_BOOT | 4, %eax     # EM
    mov %rax, %cr0
    EXPECT_FAULT "fld1 with EM", 7, NO_ERROR, fld1
    EXPECT_FAULT "movaps with EM", 6, NO_ERROR, movaps %xmm0, %xmm1
    EXPECT_NONE "fwait with EM", fwait
    mov $CR0_BOOT, %eax
    mov %rax, %cr0
    ret

segment_faults:
    mov $ABSENT, %eax
    EXPECT_FAULT "mov ds, absent", 11, ABSENT, mov %eax, %ds
    EXPECT_FAULT "mov fs, absent", 11, ABSENT, mov %eax, %fs
    EXPECT_FAULT "mov ss, absent", 12, ABSENT, mov %eax, %ss
    mov $ABSENT | 3, %eax
    EXPECT_FAULT "mov ds, absent, RPL above DPL", 13, ABSENT, mov %eax, %ds
    mov $0x1000, %eax
    EXPECT_FAULT "mov ds, beyond the GDT", 13, 0x1000, mov %eax, %ds
    mov $0x14, %eax
    EXPECT_FAULT "mov ds, of a null LDT", 13, 0x14, mov %eax, %ds
    mov $KTSS, %eax
    EXPECT_FAULT "mov ds, system segment", 13, KTSS, mov %eax, %ds
    EXPECT_FAULT "ltr, busy", 13, KTSS, ltr %ax
    xor %eax, %eax
    EXPECT_FAULT "ltr, null", 13, 0, ltr %ax
    andb $~2, gdt + KTSS + 5    # an emulator that took the null selector lost its TSS
    mov $KTSS, %eax
    ltr %ax
    xor %eax, %eax
    EXPECT_NONE "mov ss, null at CPL 0", mov %eax, %ss
    EXPECT_NONE "mov ds, null", mov %eax, %ds
    EXPECT_NONE "lldt, null", lldt %ax
    mov $3, %eax
    EXPECT_FAULT "mov ss, null with RPL 3", 13, 0, mov %eax, %ss
    mov $UDATA, %eax
    EXPECT_FAULT "mov ss, outer", 13, UDATA & ~3, mov %eax, %ss
    mov $KCODE64, %eax
    EXPECT_FAULT "mov ss, code", 13, KCODE64, mov %eax, %ss
    mov $KDATA, %eax
    mov %eax, %ss
    mov %eax, %ds
    EXPECT_FAULT "ltr, data", 13, KDATA, ltr %ax
    EXPECT_FAULT "lldt, data", 13, KDATA, lldt %ax
    movabs $NONCANONICAL, %rbp
    EXPECT_FAULT "rbp not canonical", 12, 0, mov (%rbp), %eax
    EXPECT_FAULT "rbp not canonical, ds prefix", 12, 0, mov %ds:(%rbp), %eax
    EXPECT_FAULT "rbp not canonical, fs prefix", 13, 0, mov %fs:(%rbp), %eax
    GATE 12, 0x8e02             # stacks for whatever is raised instead
    GATE 13, 0x8e01
    GATE 8, 0x8e01
    TRY 3f
    mov %rbp, %rsp
2:  push %rax
3:  TRIED "push with rsp not canonical", 12, 0, 2b
    CHECK "push with rsp not canonical: rsp", f_rsp, %rbp
    CHECK "#SS: stack from IST2", f_frame_end, $ist2_stack_top
    TRY 3f
    mov %rbp, %rsp
2:  pop %rax
3:  TRIED "pop with rsp not canonical", 12, 0, 2b
    TRY 3f
    mov %rbp, %rsp
2:  call segment_faults
3:  TRIED "call with rsp not canonical", 12, 0, 2b
    TRY 3f
    mov %rbp, %rsp
2:  ret
3:  TRIED "ret with rsp not canonical", 12, 0, 2b
    GATE 12, 0x8e00
    GATE 13, 0x8e00
    GATE 8, 0x8e00
    ret

general_protection:
    movabs $NONCANONICAL, %rbx
    EXPECT_FAULT "load, not canonical", 13, 0, mov (%rbx), %eax
    EXPECT_FAULT "store, not canonical", 13, 0, mov %eax, (%rbx)
    CHECK_MASK "#GP saves RF", $RF, f_rflags, $RF
    EXPECT_FAULT "movaps, not canonical", 13, 0, movaps (%rbx), %xmm0
    movabs $0x7ffffffffffffffc, %rbx
    EXPECT_FAULT "load, far from canonical", 13, 0, mov (%rbx), %rax
    movabs $0x00007ffffffffffc, %rbx
    EXPECT_FAULT "load across the canonical edge", 13, 0, mov 4(%rbx), %rax
    # far returns: the frame is pushed first, the fault is at LRETQ itself
    .macro FAR_RETURN name:req, selector:req, vec:req, err:req
    TRY 3f
    pushq $\selector
    pushq $3f
2:  lretq
3:  TRIED "lret, \name", \vec, \err, 2b
    .endm
    FAR_RETURN "null cs", 0, 13, 0
    FAR_RETURN "null cs with RPL 3", 3, 13, 0
    FAR_RETURN "data", KDATA, 13, KDATA
    FAR_RETURN "system segment", KTSS, 13, KTSS
    FAR_RETURN "beyond the GDT", 0x1000, 13, 0x1000
    FAR_RETURN "null LDT", 0x0c, 13, 0x0c
    FAR_RETURN "RPL 0 to outer code", 0x30, 13, 0x30
    movabs $0x00afdb000000ffff & ~0x0000800000000000, %rax
    mov %rax, gdt + SCRATCH     # 64-bit code, not present
    mov $0x00cf9b000000ffff | 0x0020000000000000, %rax
    mov %rax, gdt + SCRATCH + 8 # L and D both set
    FAR_RETURN "absent code, DPL 2", SCRATCH | 2, 11, SCRATCH
    FAR_RETURN "L and D", SCRATCH + 8, 13, SCRATCH + 8
    TRY 3f
    pushq $KCODE64
    movabs $NONCANONICAL, %rax
    push %rax
2:  lretq
3:  TRIED "lret, rip not canonical", 13, 0, 2b
    TRY 3f
    push %rax
2:  ret
3:  TRIED "ret, not canonical", 13, 0, 2b
    EXPECT_FAULT "jmp, not canonical", 13, 0, jmp *%rax
    EXPECT_FAULT "call, not canonical", 13, 0, call *%rax
    mov %rax, scratch
    EXPECT_FAULT "jmp through memory, not canonical", 13, 0, jmp *scratch
    CHECK "call, not canonical, pushes nothing", f_rsp, fault_stack
    # instructions with an alignment of their own
    EXPECT_FAULT "movaps, misaligned", 13, 0, movaps scratch + 8, %xmm0
    EXPECT_FAULT "movdqa store, misaligned", 13, 0, movdqa %xmm0, scratch + 1
    EXPECT_FAULT "addps, misaligned", 13, 0, addps scratch + 4, %xmm0
    EXPECT_NONE "movups, misaligned", movups scratch + 1, %xmm0
    EXPECT_FAULT "cmpxchg16b, misaligned", 13, 0, cmpxchg16b scratch + 8
    EXPECT_FAULT "fxsave, misaligned", 13, 0, fxsave scratch + 8
    EXPECT_NONE "fxsave", fxsave scratch
    movl $0xffffffff, scratch + 24
    EXPECT_FAULT "fxrstor with reserved MXCSR bits", 13, 0, fxrstor scratch
    EXPECT_FAULT "ldmxcsr with reserved bits", 13, 0, ldmxcsr scratch + 24
    ret

# MOVE_FAULT "name", register, value: a MOV to a control or debug register.
.macro MOVE_FAULT name:req, register:req, value:req
    movabs $\value, %rax
    EXPECT_FAULT "\name", 13, 0, mov %rax, %\register
.endm
.macro MSR_FAULT name:req, msr:req, value:req
    mov $\msr, %ecx
    mov $(\value) & 0xffffffff, %eax
    mov $(\value) >> 32, %edx
    EXPECT_FAULT "wrmsr, \name", 13, 0, wrmsr
.endm

control_registers:
    MOVE_FAULT "cr0: PG without PE", cr0, CR0_BOOT & ~1
    MOVE_FAULT "cr0: NW without CD", cr0, CR0_BOOT | 0x20000000
    MOVE_FAULT "cr0: bit 32", cr0, CR0_BOOT | 0x100000000
    MOVE_FAULT "cr0: PG cleared in 64-bit mode", cr0, CR0_BOOT & ~0x80000000
    MOVE_FAULT "cr4: PAE cleared in 64-bit mode", cr4, CR4_BOOT & ~0x20
    MOVE_FAULT "cr4: bit 15", cr4, CR4_BOOT | 0x8000
    MOVE_FAULT "cr4: bit 31", cr4, CR4_BOOT | 0x80000000
    MOVE_FAULT "cr4: bit 32", cr4, CR4_BOOT | 0x100000000
    MOVE_FAULT "cr3: bit 52", cr3, 0x0010000000000000
    MOVE_FAULT "cr8: bit 4", cr8, 0x10
    MOVE_FAULT "cr8: bit 63", cr8, 0x8000000000000000
    MOVE_FAULT "dr7: bit 32", dr7, 0x100000400
    MOVE_FAULT "dr6: bit 32", dr6, 0x1ffff0ff0
    mov %cr0, %rax
    CHECK_MASK "cr0 unchanged", $0x3f, %rax, $CR0_BOOT & 0x3f
    mov %cr4, %rax
    CHECK "cr4 unchanged", %rax, $CR4_BOOT
    # ET cannot be cleared, other reserved low bits cannot be set
    mov $(CR0_BOOT & ~0x10) | 0x40, %eax
    mov %rax, %cr0
    mov %cr0, %rax
    CHECK_MASK "cr0: ET stays set, bit 6 clear", $0xffff, %rax, $CR0_BOOT & 0xffff
    mov $9, %eax
    mov %rax, %cr8
    xor %eax, %eax
    mov %cr8, %rax
    CHECK "cr8 keeps its value", %rax, $9
    xor %eax, %eax
    mov %rax, %cr8
    smsw %eax
    CHECK_MASK "smsw reads cr0", $0x3f, %rax, $CR0_BOOT & 0x3f
    mov $0, %eax
    lmsw %ax
    smsw %eax
    CHECK_MASK "lmsw cannot clear PE", $0xf, %rax, $1
    mov $CR0_BOOT, %eax
    mov %rax, %cr0
    MSR_FAULT "EFER reserved bit", 0xc0000080, 0x80000000
    MSR_FAULT "EFER.LME while paging", 0xc0000080, 0x801
    MSR_FAULT "FS base not canonical", 0xc0000100, 0x8000000000000000
    MSR_FAULT "GS base not canonical", 0xc0000101, 0x0000800000000000
    MSR_FAULT "kernel GS base not canonical", 0xc0000102, 0x0000800000000000
    MSR_FAULT "LSTAR not canonical", 0xc0000082, 0x8000000000000000
    MSR_FAULT "unknown MSR", 0x3fff0000, 0
    MSR_FAULT "APIC base reserved bits", 0x1b, 0xfff0000000000000
    mov $0x3fff0000, %ecx
    EXPECT_FAULT "rdmsr, unknown MSR", 13, 0, rdmsr
    mov $0xc0000080, %ecx
    rdmsr
    CHECK "EFER has LMA", %rax, $EFER_BOOT | 0x400
    ret

privileged_at_cpl3:
    mov $1, %eax
    xor %ecx, %ecx
    cpuid
    mov %ecx, %r12d
    xor %ecx, %ecx
    .macro PRIVILEGED name:req, insn:vararg
    USER_FAULT "user \name", 13, 0, \insn
    .endm
    PRIVILEGED "hlt", hlt
    PRIVILEGED "cli", cli
    PRIVILEGED "sti", sti
    PRIVILEGED "in", inb $0x21, %al
    PRIVILEGED "out", outb %al, $0x21
    PRIVILEGED "in dx", inl %dx, %eax
    PRIVILEGED "ins", insb
    PRIVILEGED "rep outs", rep outsb
    PRIVILEGED "mov from cr0", mov %cr0, %rax
    PRIVILEGED "mov to cr0", mov %rax, %cr0
    PRIVILEGED "mov to cr3", mov %rax, %cr3
    PRIVILEGED "mov from cr8", mov %cr8, %rax
    PRIVILEGED "mov from dr7", mov %dr7, %rax
    PRIVILEGED "mov to dr0", mov %rax, %dr0
    PRIVILEGED "lgdt", lgdt gdt_pointer
    PRIVILEGED "lidt", lidt idt_pointer
    PRIVILEGED "ltr", ltr %ax
    PRIVILEGED "lldt", lldt %ax
    PRIVILEGED "lmsw", lmsw %ax
    PRIVILEGED "clts", clts
    PRIVILEGED "invlpg", invlpg (%rax)
    PRIVILEGED "wbinvd", wbinvd
    PRIVILEGED "invd", invd
    PRIVILEGED "rdmsr", rdmsr
    PRIVILEGED "wrmsr", wrmsr
    PRIVILEGED "swapgs", swapgs
    PRIVILEGED "sysret", sysretq
    PRIVILEGED "sysexit", sysexitq
    PRIVILEGED "rdpmc with CR4.PCE clear", rdpmc
    TRY 3f
    call enter_user
    pushq $KCODE64
    pushq $3f
2:  lretq
3:  TRIED "user lret to CPL 0", 13, KCODE64, 2b
    USER_NONE "user rdtsc", rdtsc
    mov $CR4_BOOT | 4, %eax     # TSD
    mov %rax, %cr4
    PRIVILEGED "rdtsc with CR4.TSD", rdtsc
    EXPECT_NONE "rdtsc with CR4.TSD at CPL 0", rdtsc
    mov $CR4_BOOT, %eax
    mov %rax, %cr4
    USER_FAULT "user mov from cr1", 6, NO_ERROR, .byte 0x0f, 0x20, 0xc8
    bt $26, %r12d               # XSAVE exists
    jnc 1f
    mov $CR4_BOOT | 0x40000, %eax
    mov %rax, %cr4
    xor %ecx, %ecx
    PRIVILEGED "xsetbv", xsetbv
    USER_NONE "user xgetbv", xgetbv
    xor %ecx, %ecx
    xgetbv
    mov %rax, %r13
    xor %eax, %eax
    EXPECT_FAULT "xsetbv without x87", 13, 0, xsetbv
    mov $5, %eax
    EXPECT_FAULT "xsetbv, AVX without SSE", 13, 0, xsetbv
    mov $1, %ecx
    mov $3, %eax
    EXPECT_FAULT "xsetbv, XCR1", 13, 0, xsetbv
    xor %ecx, %ecx
    mov $3, %eax
    EXPECT_NONE "xsetbv, x87 and SSE", xsetbv
    EXPECT_FAULT "AVX with XCR0.AVX clear", 6, NO_ERROR, .byte 0xc5, 0xf8, 0x77
    mov %r13, %rax
    xsetbv
    mov $CR4_BOOT, %eax
    mov %rax, %cr4
1:  # IOPL 3, and the I/O permission bitmap
    movq $0x3002, user_rflags
    USER_NONE "user cli with IOPL 3", cli
    USER_NONE "user in with IOPL 3", inb $0x21, %al
    movq $2, user_rflags
    movw $0x68, tss + 0x66
    movw $0x68 + 9, gdt + KTSS  # limit: ports 0 to 0x4f (the byte behind counts too)
    andb $~2, gdt + KTSS + 5
    movb $0xfd, tss + 0x68 + 4  # port 0x21 allowed
    movb $0xff, tss + 0x68 + 9
    mov $KTSS, %eax
    ltr %ax
    USER_NONE "user in, port allowed", inb $0x21, %al
    movb $0xff, tss + 0x68 + 4
    PRIVILEGED "in, port denied", inb $0x21, %al
    movb $0xfd, tss + 0x68 + 4
    PRIVILEGED "in, second port denied", inw $0x21, %ax
    PRIVILEGED "in, port beyond the TSS", inb $0x50, %al
    # popf and iret at CPL 3 leave IF and IOPL alone
    movq $0x202, user_rflags
    TRY 3f
    call enter_user
    pushq $0x3002
    popfq
2:  ud2
3:  TRIED "user popf", 6, NO_ERROR, 2b
    CHECK_MASK "user popf leaves IF and IOPL", $0x3200, f_rflags, $0x200
    movq $2, user_rflags
    ret

# The 2 MiB page at PAGE is given other flags for a case and its own after it.
.set PAGE, 0x1400000
.macro PAGE_FAULT kind:req, name:req, entry:req, err:req, insn:vararg
    movabs $\entry, %rcx
    mov %rcx, boot_pd + (PAGE >> 21) * 8
    invlpg PAGE
    mov $PAGE + 0x123, %ebx
    \kind "\name", 14, \err, \insn
    CHECK "\name: cr2", f_cr2, $PAGE + 0x123
.endm

page_faults:
    movabs $HOLE, %rbx
    EXPECT_FAULT "read, not present", 14, 0, mov (%rbx), %eax
    CHECK "read, not present: cr2", f_cr2, %rbx
    EXPECT_FAULT "write, not present", 14, 2, mov %eax, (%rbx)
    CHECK_MASK "#PF saves RF", $RF, f_rflags, $RF
    EXPECT_FAULT "read and write, not present", 14, 2, addl $1, (%rbx)
    EXPECT_FAULT "locked, not present", 14, 2, lock xadd %eax, (%rbx)
    EXPECT_FAULT "failing cmpxchg, not present", 14, 2, cmpxchg %ecx, (%rbx)
    USER_FAULT "user read, not present", 14, 4, mov (%rbx), %eax
    USER_FAULT "user write, not present", 14, 6, mov %eax, (%rbx)
    TRY 3f
    jmp *%rbx
3:  movabs $HOLE, %rcx
    CHECK "fetch, not present: vector", f_vec, $14
    CHECK "fetch, not present: error code", f_err, $0x10
    CHECK "fetch, not present: cr2", f_cr2, %rcx
    CHECK "fetch, not present: rip", f_rip, %rcx
    PAGE_FAULT EXPECT_FAULT, "write, read-only", PAGE + 0x85, 3, mov %eax, (%rbx)
    PAGE_FAULT USER_FAULT, "user write, read-only", PAGE + 0x85, 7, mov %eax, (%rbx)
    PAGE_FAULT USER_FAULT, "user read, supervisor", PAGE + 0x83, 5, mov (%rbx), %eax
    PAGE_FAULT EXPECT_FAULT, "read, reserved bit", PAGE + 0x2087, 9, mov (%rbx), %eax
    PAGE_FAULT EXPECT_FAULT, "write, reserved bit", PAGE + 0x2087, 11, mov %eax, (%rbx)
    PAGE_FAULT USER_FAULT, "user read, reserved bit", PAGE + 0x2087, 13, mov (%rbx), %eax
    movabs $0x8000000000000087 + PAGE, %rcx
    mov %rcx, boot_pd + (PAGE >> 21) * 8
    invlpg PAGE
    mov $PAGE, %ebx
    TRY 3f
    jmp *%rbx
3:  CHECK "fetch, NX: vector", f_vec, $14
    CHECK "fetch, NX: error code", f_err, $0x11
    CHECK "fetch, NX: rip", f_rip, $PAGE
    CHECK "fetch, NX: cr2", f_cr2, $PAGE
    movq $PAGE + BOOT_MAP, boot_pd + (PAGE >> 21) * 8
    invlpg PAGE
    ret

floating_point:
    fninit
    movw $0x37b, scratch        # division by zero unmasked
    fldcw scratch
    fldz
    fld1
    EXPECT_NONE "fdiv by 0 is reported late", fdiv %st(1), %st
    EXPECT_FAULT "fwait, pending", 16, NO_ERROR, fwait
    EXPECT_FAULT "fld1, pending", 16, NO_ERROR, fld1
    EXPECT_NONE "fnstsw, pending", fnstsw %ax
    CHECK_MASK "fnstsw: ES and ZE", $0x84, %rax, $0x84
    EXPECT_NONE "fnclex, pending", fnclex
    EXPECT_NONE "fwait, cleared", fwait
    fninit
    movl $0x1d80, scratch       # MXCSR: division by zero unmasked
    ldmxcsr scratch
    xorps %xmm0, %xmm0
    mov $1, %eax
    cvtsi2ss %eax, %xmm1
    movaps %xmm1, %xmm2
    EXPECT_FAULT "divss by 0", 19, NO_ERROR, divss %xmm0, %xmm1
    ucomiss %xmm1, %xmm2
    setz %al
    CHECK_MASK "divss by 0 leaves xmm1", $0xff, %rax, $1
    stmxcsr scratch
    mov scratch, %eax
    CHECK_MASK "divss by 0 sets ZE", $0x3f, %rax, $4
    mov $CR4_BOOT & ~0x400, %eax
    mov %rax, %cr4
    EXPECT_FAULT "divss by 0 with CR4.OSXMMEXCPT clear", 6, NO_ERROR, divss %xmm0, %xmm1
    mov $CR4_BOOT, %eax
    mov %rax, %cr4
    movl $0x1f80, scratch
    ldmxcsr scratch
    EXPECT_NONE "divss by 0, masked", divss %xmm0, %xmm1
    ret

alignment:
    mov $CR0_BOOT | 0x40000, %eax       # AM
    mov %rax, %cr0
    mov $scratch, %ebx
    movq $AC | 2, user_rflags
    USER_FAULT "user misaligned dword", 17, 0, mov 1(%rbx), %eax
    CHECK_MASK "#AC saves RF and AC", $RF | AC, f_rflags, $RF | AC
    USER_FAULT "user misaligned word", 17, 0, movw $1, 1(%rbx)
    USER_FAULT "user misaligned qword", 17, 0, mov 4(%rbx), %rax
    lea 1(%rbx), %rsi
    USER_FAULT "user misaligned lodsw", 17, 0, lodsw
    USER_NONE "user aligned dword", mov 4(%rbx), %eax
    USER_NONE "user byte", mov 1(%rbx), %al
    USER_FAULT "user misaligned movaps is #GP", 13, 0, movaps 4(%rbx), %xmm0
    pushq $AC | 2
    popfq
    EXPECT_NONE "misaligned dword at CPL 0", mov 1(%rbx), %eax
    pushq $2
    popfq
    movq $2, user_rflags
    USER_NONE "user misaligned dword with AC clear", mov 1(%rbx), %eax
    mov $CR0_BOOT, %eax
    mov %rax, %cr0
    movq $AC | 2, user_rflags
    USER_NONE "user misaligned dword with AM clear", mov 1(%rbx), %eax
    movq $2, user_rflags
    ret

# Vector 8 goes to IST1, so that the handler has a stack whatever happened.
double_faults:
    GATE 8, 0x8e01
    GATE 13, 0x0e00
    movabs $NONCANONICAL, %rbx
    TRY 3f
    mov (%rbx), %eax
3:  CHECK "#GP then #NP: #DF", f_vec, $8
    CHECK "#DF: error code", f_err, $0
    CHECK "#DF: stack from IST1", f_frame_end, $ist1_stack_top
    CHECK "#DF: cs", f_cs, $KCODE64
    GATE 13, 0x8e00
    GATE 14, 0x0e00
    movabs $HOLE, %rbx
    TRY 3f
    mov (%rbx), %eax
3:  CHECK "#PF then #NP: #DF", f_vec, $8
    CHECK "#DF after #PF: cr2", f_cr2, %rbx
    GATE 14, 0x8e01
    # a stack that cannot be pushed to: #PF during the delivery
    movabs $HOLE + 0x1000, %rax
    mov %rax, tss + 0x2c        # IST2
    GATE 6, 0x8e02
    EXPECT_FAULT "#UD then #PF: #PF", 14, 2, ud2
    mov $HOLE + 0xff8, %rbx
    CHECK "#UD then #PF: cr2", f_cr2, %rbx
    GATE 0, 0x8e02
    xor %ecx, %ecx
    EXPECT_FAULT "#DE then #PF: #PF", 14, 2, div %ecx
    GATE 13, 0x8e02
    movabs $NONCANONICAL, %rbx
    EXPECT_FAULT "#GP then #PF: #PF", 14, 2, mov (%rbx), %eax
    EXPECT_FAULT "int then #PF: #PF", 14, 2, int $6
    GATE 14, 0x8e02
    movabs $HOLE, %rbx
    TRY 3f
    mov (%rbx), %eax
3:  CHECK "#PF then #PF: #DF", f_vec, $8
    mov $HOLE + 0xff8, %rbx
    CHECK "#PF then #PF: cr2 of the second", f_cr2, %rbx
    # a stack that is not canonical: #SS during the delivery
    movabs $NONCANONICAL, %rax
    mov %rax, tss + 0x2c
    GATE 14, 0x8e00
    TRY 3f
    ud2
3:  CHECK "#UD then #SS: #SS", f_vec, $12
    TRY 3f
    mov 1(%rax), %eax
3:  CHECK "#GP then #SS: #DF", f_vec, $8
    GATE 0, 0x8e00
    GATE 6, 0x8e00
    GATE 13, 0x8e00
    movq $ist2_stack_top, tss + 0x2c
    ret

gates_and_stacks:
    GATE 0x90, 0x8e00
    GATE 0x91, 0x8f00
    pushq $0x4602 | AC          # NT, IF, and a few status flags stay as they are
    popfq
    stc
    EXPECT_TRAP "interrupt gate", 0x90, NO_ERROR, int $0x90
    CHECK "interrupt gate: handler rflags", f_handler_rflags, $0x403 | AC
    CHECK "interrupt gate: saved rflags", f_rflags, $0x4603 | AC
    pushq $0x4602 | AC
    popfq
    EXPECT_TRAP "trap gate", 0x91, NO_ERROR, int $0x91
    CHECK "trap gate: handler rflags", f_handler_rflags, $0x602 | AC
    CHECK "trap gate: saved rflags", f_rflags, $0x4602 | AC
    pushq $2
    popfq
    mov %rsp, %rbx
    .irp offset, 0, 1, 4, 8, 15
    mov %rbx, %rax
    sub $\offset, %rax
    mov %rsp, %rdx
    mov %rax, %rsp
    EXPECT_TRAP "int with rsp - \offset", 0x90, NO_ERROR, int $0x90
    mov %rdx, %rsp
    CHECK "rsp - \offset: saved rsp", f_rsp, %rax
    and $~15, %rax
    CHECK "rsp - \offset: frame is aligned", f_frame_end, %rax
    .endr
    GATE 0x90, 0x8e02
    EXPECT_TRAP "IST2", 0x90, NO_ERROR, int $0x90
    CHECK "IST2: stack", f_frame_end, $ist2_stack_top
    CHECK "IST2: handler ss without a change of CPL", f_handler_ss, $KDATA
    movq $ist2_stack_top - 8, tss + 0x2c
    EXPECT_TRAP "IST2, misaligned", 0x90, NO_ERROR, int $0x90
    CHECK "IST2, misaligned: stack", f_frame_end, $(ist2_stack_top-16)
    movq $ist2_stack_top, tss + 0x2c
    GATE 0x90, 0xee02
    USER_TRAP "user, IST2", 0x90, NO_ERROR, int $0x90
    CHECK "user, IST2: stack", f_frame_end, $ist2_stack_top
    CHECK "user, IST2: handler ss", f_handler_ss, $0
    GATE 0x90, 0xee00
    movq $kernel_stack_top - 4, tss + 4
    USER_TRAP "user, RSP0 misaligned", 0x90, NO_ERROR, int $0x90
    CHECK "user, RSP0 misaligned: stack", f_frame_end, $(kernel_stack_top-16)
    movq $kernel_stack_top, tss + 4
    ret

.macro IRET_FAULT name:req, vec:req, err:req, ss:req, rflags:req, cs:req, rip:req
    movabs $\rip, %rax
    TRY 3f
    pushq $\ss
    push %rsp
    pushq $\rflags
    pushq $\cs
    push %rax
2:  iretq
3:  TRIED "iret, \name", \vec, \err, 2b
.endm

returns:
    IRET_FAULT "null cs", 13, 0, KDATA, 2, 0, 3f
    IRET_FAULT "cs is data", 13, KDATA, KDATA, 2, KDATA, 3f
    IRET_FAULT "cs beyond the GDT", 13, 0x1000, KDATA, 2, 0x1000, 3f
    IRET_FAULT "ss beyond the GDT", 13, 0x1000, 0x1000, 2, KCODE64, 3f
    IRET_FAULT "ss of other privilege", 13, UDATA & ~3, UDATA, 2, KCODE64, 3f
    IRET_FAULT "to CPL 3, ss of CPL 0", 13, KDATA, KDATA, 2, UCODE64, 3f
    IRET_FAULT "to CPL 3, null ss", 13, 0, 3, 2, UCODE64, 3f
    IRET_FAULT "ss absent", 12, ABSENT, ABSENT, 2, KCODE64, 3f
    IRET_FAULT "rip not canonical", 13, 0, KDATA, 2, KCODE64, NONCANONICAL
    IRET_FAULT "cs with RPL 3, DPL 0", 13, KCODE64, UDATA, 2, KCODE64 + 3, 3f
    # NT: no task return in long mode
    TRY 3f
    pushq $KDATA
    push %rsp
    pushq $2
    pushq $KCODE64
    pushq $3f
    pushq $0x4002
    popfq
2:  iretq
3:  TRIED "iret with NT", 13, 0, 2b
    # the same level: rsp and ss are restored all the same
    mov %rsp, %rbx
    pushq $0
    pushq $user_stack_top
    pushq $0x246
    pushq $KCODE64
    pushq $1f
    iretq
1:  mov %rsp, %rax
    mov %rbx, %rsp
    CHECK "iret: rsp", %rax, $user_stack_top
    mov %ss, %eax
    CHECK "iret: null ss at CPL 0", %rax, $0
    pushfq
    pop %rax
    CHECK "iret: rflags", %rax, $0x246
    cli
    mov $KDATA, %eax
    mov %eax, %ss
    # to CPL 3: data segments of inner levels become null
    mov $UDATA, %eax
    mov %eax, %ds
    mov $KDATA, %eax
    mov %eax, %es
    mov %eax, %fs
    mov $UDATA, %eax
    mov %eax, %gs
    TRY 3f
    call enter_user
    mov %ds, %eax
    mov %es, %ebx
    mov %fs, %ecx
    mov %gs, %edx
2:  ud2
3:  TRIED "segments at CPL 3", 6, NO_ERROR, 2b
    CHECK "user ds stays", f_rax, $UDATA
    CHECK "kernel es becomes null", f_rbx, $0
    CHECK "kernel fs becomes null", f_rcx, $0
    CHECK "user gs stays", f_rdx, $UDATA
    ret

.macro WRITE_MSR msr:req, value:req
    mov $\msr, %ecx
    mov $(\value) & 0xffffffff, %eax
    mov $(\value) >> 32, %edx
    wrmsr
.endm

.set STAR, 0xc0000081
.set LSTAR, 0xc0000082
.set CSTAR, 0xc0000083
.set SFMASK, 0xc0000084
.set GS_BASE, 0xc0000101
.set KERNEL_GS_BASE, 0xc0000102

system_calls:
    WRITE_MSR STAR, 0x0023000800000000
    mov $LSTAR, %ecx
    mov $syscall_entry, %eax
    xor %edx, %edx
    wrmsr
    WRITE_MSR SFMASK, 0x601             # IF, DF, CF
    movq $0x246 | 0x401 | AC, user_rflags
    TRY 3f
    call enter_user
    syscall
1:  mov %cs, %eax
    mov %ss, %ebx
2:  ud2
3:  TRIED "after sysret", 6, NO_ERROR, 2b
    CHECK "sysret: cs", f_rax, $UCODE64
    CHECK "sysret: ss", f_rbx, $UDATA
    CHECK_MASK "sysret: rflags from r11", $0x40ed7, f_rflags, $0x246 | 0x401 | AC
    CHECK "syscall: rcx", syscall_rcx, $1b
    CHECK "syscall: r11", syscall_r11, $0x246 | 0x401 | AC
    CHECK "syscall: rflags", syscall_rflags, $0x46 | AC
    CHECK "syscall: cs", syscall_cs, $KCODE64
    CHECK "syscall: ss", syscall_ss, $KDATA
    CHECK "syscall: rsp is the caller's", syscall_rsp, $user_stack_top
    movq $2, user_rflags
    # to 32-bit code, with the upper halves of the stack pointer cut by nobody
    TRY 3f
    mov $1f, %ecx
    mov $2, %r11d
    mov %rsp, %rbx
    mov $user_stack_top, %esp
    sysretl
    .code32
1:  mov %cs, %eax
    mov %ss, %ecx
2:  ud2
    .code64
3:  TRIED "sysret to 32-bit code", 6, NO_ERROR, 2b
    CHECK "sysret to 32-bit code: cs", f_rax, $UCODE32
    CHECK "sysret to 32-bit code: ss", f_rcx, $UDATA
    mov $0xc0000080, %ecx
    mov $EFER_BOOT & ~1, %eax
    xor %edx, %edx
    wrmsr
    EXPECT_FAULT "syscall with SCE clear", 6, NO_ERROR, syscall
    EXPECT_FAULT "sysret with SCE clear", 6, NO_ERROR, sysretq
    mov $0xc0000080, %ecx
    mov $EFER_BOOT, %eax
    wrmsr
    WRITE_MSR GS_BASE, 0x0000111133334444
    WRITE_MSR KERNEL_GS_BASE, 0xffff888877776666
    swapgs
    mov $GS_BASE, %ecx
    rdmsr
    shl $32, %rdx
    or %rdx, %rax
    movabs $0xffff888877776666, %rbx
    CHECK "swapgs: GS base", %rax, %rbx
    mov $KERNEL_GS_BASE, %ecx
    rdmsr
    shl $32, %rdx
    or %rdx, %rax
    movabs $0x0000111133334444, %rbx
    CHECK "swapgs: kernel GS base", %rax, %rbx
    mov $scratch, %eax
    xor %edx, %edx
    wrmsr
    swapgs
    movq $0x55aa, scratch + 8
    mov %gs:8, %rax
    CHECK "swapgs: gs-relative load", %rax, $0x55aa
    WRITE_MSR GS_BASE, 0
    ret

syscall_entry:
    mov %rcx, syscall_rcx
    mov %r11, syscall_r11
    mov %rsp, syscall_rsp
    mov $kernel_stack_top, %esp
    pushfq
    pop syscall_rflags
    mov %cs, %eax
    mov %rax, syscall_cs
    mov %ss, %eax
    mov %rax, syscall_ss
    mov syscall_rsp, %rsp
    sysretq

    .bss
    .balign 64
    .skip 64
scratch: .skip 1024
syscall_rcx: .quad 0
syscall_r11: .quad 0
syscall_rflags: .quad 0
syscall_rsp: .quad 0
syscall_cs: .quad 0
syscall_ss: .quad 0
