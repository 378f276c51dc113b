# debug: single step, breakpoints on execution and data, general detect, RF.
#
# SDM volume 3, chapter 18; AMD APM volume 2, chapter 13. Bochs 2.7 agrees with all of it but
# FRAME_HIT, which it has not run. QEMU 7.2 (TCG) misses a data breakpoint of a locked instruction,
# aborts with an assertion at one on the frame of an exception, and has no general detect.

.include "lib/boot.inc"

.set HOLE, 0x180000000          # virtual addresses without a mapping

    .code64
main64:
    call single_step
    call breakpoints
    call resume_flag
    FINISH "debug"

.set B0, 1
.set BD, 1 << 13
.set BS, 1 << 14

# STEP "name", rip, instructions: the TF that the POPFQ sets traps at rip.
.macro STEP name:req, rip:req
    CHECK "\name: vector", f_vec, $1
    CHECK "\name: rip", f_rip, $\rip
    CHECK_MASK "\name: dr6", $0xe00f, f_dr6, $BS
    CHECK_MASK "\name: handler has TF clear", $TF, f_handler_rflags, $0
.endm
.macro CLEAR_DR6
    mov $0xffff0ff0, %eax
    mov %rax, %dr6
.endm

single_step:
    CLEAR_DR6
    TRY 3f
    pushq $TF | 2
    popfq
    nop
2:  nop
3:  STEP "step over nop", 2b
    CHECK_MASK "step: saved TF, no RF", $TF | RF, f_rflags, $TF
    CLEAR_DR6
    TRY 3f
    pushq $2
    pushq $TF | 2
    popfq
    popfq                       # clears TF, and still traps
2:  nop
3:  STEP "step over popf", 2b
    CHECK_MASK "step over popf: saved TF", $TF, f_rflags, $0
    CLEAR_DR6
    mov $KDATA, %ecx
    TRY 3f
    pushq $TF | 2
    popfq
    mov %ecx, %ss               # blocks the trap behind it
    nop
2:  nop
3:  STEP "step over mov ss", 2b
    CLEAR_DR6
    mov $scratch, %esi
    mov $scratch + 64, %edi
    mov $5, %ecx
    TRY 3f
    pushq $TF | 2
    popfq
2:  rep movsb
    nop
3:  STEP "step over rep movsb", 2b
    CHECK "step over rep movsb: rcx", f_rcx, $4
    CLEAR_DR6
    mov $1, %ecx
    TRY 3f
    pushq $TF | 2
    popfq
    rep movsb
2:  nop
3:  STEP "step over the last rep movsb", 2b
    CLEAR_DR6
    TRY 3f
    pushq $TF | 2
    popfq
    jmp 2f
    nop
2:  nop
3:  STEP "step over jmp", 2b
    CLEAR_DR6
    TRY 3f
    pushq $TF | 2
    popfq
    xor %eax, %eax
    ud2
3:  CHECK "step before ud2: vector", f_vec, $1
    TRY 3f
    pushq $TF | 2
    popfq
2:  ud2
3:  TRIED "ud2 wins over the step", 6, NO_ERROR, 2b
    CHECK_MASK "ud2 wins over the step: saved TF", $TF, f_rflags, $TF
    TRY 3f
    pushq $TF | 2
    popfq
    int $0x81
2:
3:  TRIED "int with TF", 0x81, NO_ERROR, 2b
    CHECK_MASK "int with TF: saved TF", $TF, f_rflags, $TF
    # SYSCALL with TF in SFMASK clear keeps TF; IRET that sets TF traps one later
    CLEAR_DR6
    TRY 3f
    mov %rsp, %rax
    pushq $KDATA
    push %rax
    pushq $TF | 2
    pushq $KCODE64
    pushq $1f
    iretq
1:  nop
2:  nop
3:  STEP "step after iret", 2b
    CLEAR_DR6
    movq $TF | 2, user_rflags
    TRY 3f
    call enter_user
    nop
2:  nop
3:  STEP "user step", 2b
    CHECK "user step: cs", f_cs, $UCODE64
    movq $2, user_rflags
    CLEAR_DR6
    ret

# DR7: BREAK n, kind (0 execute, 1 write, 3 read or write), length field (0 1 byte,
# 1 2 bytes, 2 8 bytes, 3 4 bytes). Clobbers RAX.
.macro BREAK number:req, kind:req, length:req, address:req
    CLEAR_DR6
    mov $\address, %eax
    mov %rax, %dr\number
    mov $0x400 | (2 << (2 * \number)) | (\kind << (16 + 4 * \number)) | (\length << (18 + 4 * \number)), %eax
    mov %rax, %dr7
.endm
.macro HIT name:req, number:req, rip:req
    CHECK "\name: vector", f_vec, $1
    CHECK "\name: rip", f_rip, $\rip
    CHECK_MASK "\name: dr6", $0xe000 | (1 << \number), f_dr6, $(1<<\number)
.endm
.macro DATA_HIT name:req, number:req, insn:vararg
    CLEAR_DR6
    TRY 9995f
    \insn
9994: nop
9995: HIT "\name", \number, 9994b
.endm

# FRAME_HIT "name", vector, instruction: it pushes SS to the address in DR0.
.macro FRAME_HIT name:req, vec:req, insn:vararg
    mov %rsp, %rbx
    and $-16, %rbx
    sub $8, %rbx
    BREAK 0, 1, 2, 0
    mov %rbx, %dr0
    TRY 9995f
    \insn
9995: mov $0x400, %eax          # before anything else is pushed
    mov %rax, %dr7
    HIT "\name", 0, (trap_stubs + 16 * (\vec))
.endm

breakpoints:
    .irp n, 0, 1, 2, 3
    BREAK \n, 0, 0, 2f
    TRY 3f
    nop
2:  nop
3:  HIT "execution, dr\n", \n, 2b
    CHECK_MASK "execution, dr\n: no RF saved", $RF, f_rflags, $0
    BREAK \n, 1, 3, scratch
    DATA_HIT "write of dr\n", \n, movl $1, scratch
    EXPECT_NONE "read of a write breakpoint, dr\n", mov scratch, %eax
    .endr
    BREAK 0, 1, 0, scratch + 4
    DATA_HIT "write 1 byte", 0, movb $1, scratch + 4
    DATA_HIT "qword write over 1 byte", 0, mov %rax, scratch
    DATA_HIT "push-like write over 1 byte", 0, movups %xmm0, scratch
    EXPECT_NONE "write before 1 byte", movl $1, scratch
    EXPECT_NONE "write behind 1 byte", movb $1, scratch + 5
    BREAK 0, 1, 1, scratch + 2
    DATA_HIT "write into the second byte", 0, movb $1, scratch + 3
    EXPECT_NONE "write behind 2 bytes", movb $1, scratch + 4
    BREAK 0, 3, 2, scratch + 8
    DATA_HIT "read the last of 8 bytes", 0, movb scratch + 15, %al
    DATA_HIT "write the last of 8 bytes", 0, movb %al, scratch + 15
    DATA_HIT "read and write", 0, incl scratch + 8
    DATA_HIT "locked", 0, lock incl scratch + 8
    EXPECT_NONE "read behind 8 bytes", movb scratch + 16, %al
    BREAK 1, 3, 3, scratch
    mov $scratch + 8, %edi
    mov $scratch - 8, %esi
    mov $4, %ecx
    CLEAR_DR6
    TRY 3f
2:  rep movsl
3:  CHECK "rep movs: vector", f_vec, $1
    CHECK_MASK "rep movs: dr6", $2, f_dr6, $2
    CHECK_MASK "rep movs: behind the reading iteration", $-1, f_rcx, $1
    # a fault before the access leaves no breakpoint hit
    movabs $HOLE, %rbx
    BREAK 0, 3, 0, 0
    mov %rbx, %dr0
    EXPECT_FAULT "data breakpoint on an absent page", 14, 0, mov (%rbx), %eax
    # what an event pushes: #DB comes before the handler's first instruction
    FRAME_HIT "frame of an exception", 6, ud2
    FRAME_HIT "frame of an interrupt instruction", 0x81, int $0x81
    # general detect
    CLEAR_DR6
    mov $0x2400, %eax
    mov %rax, %dr7
    TRY 3f
2:  mov %dr0, %rax
3:  CHECK "general detect: vector", f_vec, $1
    CHECK "general detect: rip", f_rip, $2b
    CHECK_MASK "general detect: dr6", $0xe00f, f_dr6, $BD
    mov %dr7, %rax
    CHECK_MASK "general detect: GD is cleared", $0x2000, %rax, $0
    mov $0x400, %eax
    mov %rax, %dr7
    # DR4 and DR5
    mov $0x1234, %eax
    mov %rax, %dr0
    CLEAR_DR6
    EXPECT_NONE "dr4 is dr6", .byte 0x0f, 0x21, 0xe3
    mov %dr6, %rax
    CHECK "dr4 is dr6", %rbx, %rax
    mov $CR4_BOOT | 8, %eax     # DE
    mov %rax, %cr4
    EXPECT_FAULT "dr4 with CR4.DE", 6, NO_ERROR, .byte 0x0f, 0x21, 0xe3
    EXPECT_FAULT "dr5 with CR4.DE", 6, NO_ERROR, .byte 0x0f, 0x23, 0xeb
    mov $CR4_BOOT, %eax
    mov %rax, %cr4
    mov %dr7, %rax
    CHECK "dr7 reads bit 10 as 1", %rax, $0x400
    xor %eax, %eax
    mov %rax, %dr6
    mov %dr6, %rax
    CHECK_MASK "dr6 reads its fixed ones", $0xe0ff0, %rax, $0xe0ff0
    CHECK_MASK "dr6 reads bit 12 as 0", $0x1000, %rax, $0
    CLEAR_DR6
    ret

# RF on the way in by IRET holds off the breakpoint for one instruction.
resume_flag:
    BREAK 0, 0, 0, 2f
    TRY 4f
    mov %rsp, %rax
    pushq $KDATA
    push %rax
    pushq $RF | 2
    pushq $KCODE64
    pushq $2f
    iretq
2:  nop
3:  jmp 2b
4:  CHECK "second time: vector", f_vec, $1
    CHECK "second time: rip", f_rip, $2b
    CHECK_MASK "second time: dr6", $0xe00f, f_dr6, $B0
    BREAK 0, 0, 0, 3f
    TRY 4f
    mov %rsp, %rax
    pushq $KDATA
    push %rax
    pushq $RF | 2
    pushq $KCODE64
    pushq $2f
    iretq
2:  nop                         # uses RF up
3:  nop
4:  HIT "RF lasts one instruction", 0, 3b
    # PUSHF saves RF as 0
    xor %ebx, %ebx
    mov $0x400, %eax
    mov %rax, %dr7
    mov %rsp, %rax
    pushq $KDATA
    push %rax
    pushq $RF | 2
    pushq $KCODE64
    pushq $2f
    iretq
2:  pushfq
    pop %rax
    CHECK "pushf saves RF as 0", %rax, $2
    CLEAR_DR6
    ret

    .bss
    .balign 64
    .skip 64
scratch: .skip 1024
