# segments: descriptor loads and their faults in 64-bit, compatibility, 32-bit and real
# mode; limits, call gates, LAR/LSL/VERR/VERW, system tables, FS and GS bases, UMIP.
#
# SDM volume 3, chapters 5, 8 and 21; AMD APM volume 2, chapter 4. Bochs 2.7 agrees with
# all of it but the 16-bit task, which has not run there. QEMU 7.2 (TCG) checks neither
# limits nor types on data accesses and takes table, LDT and FS bases that are not canonical;
# it ends at the first limit of the stack. Of the 16-bit task it gets only PF of the first
# flags wrong.

.include "lib/boot.inc"

    .code64
main64:
    call long_loads
    call query
    call bases
    call user_system_registers
    call compatibility
    call call_gates
    call protected
    call real
    FINISH "segments"

# DESCRIPTOR slot (0 to 7), value
.macro DESCRIPTOR slot:req, value:req
    push %rax
    movabs $\value, %rax
    mov %rax, gdt + SCRATCH + 8 * \slot
    pop %rax
.endm
.macro LOAD_FAULT name:req, register:req, selector:req, vec:req, err:req
    mov $\selector, %eax
    EXPECT_FAULT "\name", \vec, \err, mov %eax, %\register
.endm
.macro LOAD name:req, register:req, selector:req
    mov $\selector, %eax
    EXPECT_NONE "\name", mov %eax, %\register
.endm

long_loads:
    DESCRIPTOR 0, 0x00cf92000000ffff    # data, writable, accessed bit clear
    DESCRIPTOR 1, 0x00cf90000000ffff    # data, read-only
    DESCRIPTOR 2, 0x00cf98000000ffff    # code, execute-only
    DESCRIPTOR 3, 0x00cf9a000000ffff    # code, readable
    DESCRIPTOR 4, 0x00cf9e000000ffff    # code, readable, conforming
    DESCRIPTOR 5, 0x00cff2000000ffff    # data, DPL 3
    DESCRIPTOR 6, 0x00cf1a000000ffff    # code, absent
    DESCRIPTOR 7, 0x00008200000000ff    # LDT
    LOAD "ds: writable data", ds, SCRATCH
    mov gdt + SCRATCH + 5, %al
    CHECK_MASK "loading sets the accessed bit", $0xff, %rax, $0x93
    LOAD "ds: read-only data", ds, SCRATCH+8
    LOAD_FAULT "ds: execute-only code", ds, SCRATCH+16, 13, SCRATCH+16
    LOAD "ds: readable code", ds, SCRATCH+24
    LOAD_FAULT "ds: RPL above DPL", ds, SCRATCH+3, 13, SCRATCH
    LOAD "ds: conforming code with RPL 3", ds, SCRATCH+35
    LOAD "ds: DPL 3 with RPL 0", ds, SCRATCH+40
    LOAD "ds: DPL 3 with RPL 3", ds, SCRATCH+43
    LOAD_FAULT "ds: absent code", ds, SCRATCH+48, 11, SCRATCH+48
    LOAD_FAULT "ds: LDT descriptor", ds, SCRATCH+56, 13, SCRATCH+56
    LOAD "ss: writable data", ss, SCRATCH
    LOAD_FAULT "ss: read-only data", ss, SCRATCH+8, 13, SCRATCH+8
    LOAD_FAULT "ss: code", ss, SCRATCH+24, 13, SCRATCH+24
    LOAD_FAULT "ss: DPL 3", ss, SCRATCH+40, 13, SCRATCH+40
    LOAD_FAULT "ss: RPL 3", ss, SCRATCH+3, 13, SCRATCH
    mov $KDATA, %eax
    mov %eax, %ss
    mov %eax, %ds
    mov %eax, %es
    # a failed load leaves the register
    mov $SCRATCH+16, %ecx
    EXPECT_FAULT "es: execute-only", 13, SCRATCH+16, mov %ecx, %es
    mov %es, %eax
    CHECK "a failed load changes nothing", %rax, $KDATA
    # the other instructions that load
    movw $SCRATCH, far_pointer + 4
    movl $0x1234, far_pointer
    EXPECT_NONE "lfs", lfs far_pointer, %eax
    CHECK "lfs: offset", %rax, $0x1234
    mov %fs, %eax
    CHECK "lfs: selector", %rax, $SCRATCH
    movw $SCRATCH+16, far_pointer + 4
    mov $0x77, %eax
    EXPECT_FAULT "lgs: execute-only", 13, SCRATCH+16, lgs far_pointer, %eax
    CHECK "lgs: the offset stays", %rax, $0x77
    pushq $SCRATCH
    EXPECT_NONE "pop fs", pop %fs
    TRY 3f
    pushq $SCRATCH+16
2:  pop %gs
3:  TRIED "pop gs, execute-only", 13, SCRATCH+16, 2b
    lea -8(%rsp), %rax
    CHECK "pop gs: rsp stays", f_rsp, %rax
    # an LDT: slot 7 describes it, 128 bits wide
    mov $SCRATCH+48, %eax
    DESCRIPTOR 6, 0x000082000000000f    # two entries
    DESCRIPTOR 7, 0
    mov $ldt, %ecx
    mov %cx, gdt + SCRATCH + 48 + 2
    shr $16, %ecx
    mov %cl, gdt + SCRATCH + 48 + 4
    EXPECT_NONE "lldt", lldt %ax
    sldt %ecx
    CHECK "sldt", %rcx, $SCRATCH+48
    LOAD "ds from the LDT", ds, 0x0c
    LOAD_FAULT "beyond the LDT", ds, 0x14, 13, 0x14
    DESCRIPTOR 7, 0x8000
    mov $SCRATCH+48, %eax
    EXPECT_FAULT "lldt, base not canonical", 13, SCRATCH+48, lldt %ax
    DESCRIPTOR 7, 0x100000000000
    mov $SCRATCH+48, %eax
    EXPECT_FAULT "lldt, upper type not 0", 13, SCRATCH+48, lldt %ax
    DESCRIPTOR 7, 0
    andb $0x7f, gdt + SCRATCH + 48 + 5
    mov $SCRATCH+48, %eax
    EXPECT_FAULT "lldt, absent", 11, SCRATCH+48, lldt %ax
    mov $SCRATCH+48|4, %eax
    EXPECT_FAULT "lldt, selector of the LDT", 13, SCRATCH+48|4, lldt %ax
    xor %eax, %eax
    lldt %ax
    LOAD_FAULT "ds from no LDT", ds, 0x0c, 13, 0x0c
    mov $KDATA, %eax
    mov %eax, %ds
    # far jumps and calls
    .macro FAR name:req, selector:req, vec:req, err:req
    movl $3f, far_pointer
    movw $\selector, far_pointer + 4
    TRY 3f
2:  ljmpl *far_pointer
3:  TRIED "far jmp, \name", \vec, \err, 2b
    .endm
    FAR "null", 0, 13, 0
    FAR "data", KDATA, 13, KDATA
    FAR "code of DPL 3", 0x30, 13, 0x30
    FAR "RPL 3 to code of DPL 0", KCODE64+3, 13, KCODE64
    FAR "beyond the GDT", 0x1000, 13, 0x1000
    FAR "TSS", KTSS, 13, KTSS
    FAR "64-bit code", KCODE64, NO_FAULT, 0
    DESCRIPTOR 0, 0x00af1a000000ffff
    FAR "absent", SCRATCH, 11, SCRATCH
    DESCRIPTOR 0, 0x00af9e000000ffff
    FAR "conforming", SCRATCH, NO_FAULT, 0
    mov %cs, %eax
    CHECK "conforming: cs", %rax, $SCRATCH
    FAR "back", KCODE64, NO_FAULT, 0
    mov %rsp, %rbx
    rex.W lcall *far_pointer_64         # m16:64
1:  mov %rsp, %rax
    CHECK "far call: rsp restored", %rax, %rbx
    CHECK "far call: pushed cs", %rcx, $KCODE64
    CHECK "far call: pushed rip", %rdx, $1b
    ret

far_callee:
    mov (%rsp), %rdx
    mov 8(%rsp), %rcx
    lretq

# LAR, LSL, VERR and VERW: ZF, and the destination when it is set. Bits 19 to 16 of what
# LAR gives are undefined.
.macro QUERY name:req, insn:req, selector:req, zf:req, value=$0x5555, mask=$-1
    mov $\selector, %ecx
    mov $0x5555, %eax
    \insn %ecx, %eax
    setz %dl
    movzbl %dl, %edx
    CHECK "\insn \name: ZF", %rdx, $\zf
    mov \value, %ecx
    CHECK_MASK "\insn \name", \mask, %rax, %rcx
.endm
.macro VERIFY name:req, insn:req, selector:req, zf:req
    mov $\selector, %ecx
    \insn %cx
    setz %dl
    movzbl %dl, %edx
    CHECK "\insn \name: ZF", %rdx, $\zf
.endm
query:
    DESCRIPTOR 0, 0x00cf92000000ffff
    DESCRIPTOR 1, 0x0040900000001234    # read-only, byte limit
    DESCRIPTOR 2, 0x00cf98000000ffff    # execute-only
    DESCRIPTOR 3, 0x00cf9e000000ffff    # conforming
    DESCRIPTOR 4, 0x00008e0000080000    # interrupt gate
    QUERY "data", lar, SCRATCH, 1, $0x00cf9200, $0xf0ff00
    QUERY "data", lsl, SCRATCH, 1, $0xffffffff
    QUERY "byte limit", lsl, SCRATCH+8, 1, $0x1234
    QUERY "null", lar, 0, 0
    QUERY "null", lsl, 0, 0
    QUERY "beyond the GDT", lar, 0x1000, 0
    QUERY "RPL above DPL", lar, SCRATCH+3, 0
    QUERY "conforming with RPL 3", lar, SCRATCH+27, 1, $0x00cf9e00, $0xf0ff00
    QUERY "interrupt gate", lar, SCRATCH+32, 0
    QUERY "interrupt gate", lsl, SCRATCH+32, 0
    QUERY "absent data", lar, ABSENT, 1, $0x00cf1300, $0xf0ff00
    QUERY "busy TSS", lar, KTSS, 1, $0x00008b00, $0xf0ff00
    QUERY "busy TSS", lsl, KTSS, 1, $0x67
    VERIFY "data", verr, SCRATCH, 1
    VERIFY "data", verw, SCRATCH, 1
    VERIFY "read-only", verr, SCRATCH+8, 1
    VERIFY "read-only", verw, SCRATCH+8, 0
    VERIFY "execute-only", verr, SCRATCH+16, 0
    VERIFY "code", verr, KCODE64, 1
    VERIFY "code", verw, KCODE64, 0
    VERIFY "null", verr, 0, 0
    VERIFY "TSS", verr, KTSS, 0
    VERIFY "RPL above DPL", verr, SCRATCH+3, 0
    VERIFY "conforming with RPL 3", verr, SCRATCH+27, 1
    str %eax
    CHECK "str", %rax, $KTSS
    sgdt table_pointer
    CHECK_MASK "sgdt: limit", $0xffff, table_pointer, $0xff
    CHECK "sgdt: base", table_pointer + 2, $gdt
    sidt table_pointer
    CHECK_MASK "sidt: limit", $0xffff, table_pointer, $0xfff
    CHECK "sidt: base", table_pointer + 2, $idt
    movabs $0x8000000000000000, %rax
    mov %rax, table_pointer + 2
    EXPECT_FAULT "lgdt, not canonical", 13, 0, lgdt table_pointer
    lgdt gdt_pointer            # for emulators that took the base
    TRY 3f
2:  lidt table_pointer
    lidt idt_pointer
3:  TRIED "lidt, not canonical", 13, 0, 2b
    ret

.set FS_BASE, 0xc0000100
.set GS_BASE, 0xc0000101
bases:
    mov $FS_BASE, %ecx
    mov $0x12345678, %eax
    mov $0x7fff, %edx
    wrmsr
    rdmsr
    CHECK "FS base, low", %rax, $0x12345678
    CHECK "FS base, high", %rdx, $0x7fff
    mov $scratch, %eax
    xor %edx, %edx
    wrmsr
    movq $0x4711, scratch + 16
    mov $16, %ebx
    mov %fs:(%rbx), %rax
    CHECK "fs-relative load", %rax, $0x4711
    xor %ecx, %ecx
    .byte 0x64; lea 16(%rcx), %rax
    CHECK "lea ignores the base", %rax, $16
    # 32-bit addresses wrap before the base is added
    mov $0xffffffff, %ebx
    movq $0x815, scratch
    mov %fs:1(%ebx), %rax
    CHECK "addr32 wraps, then the base", %rax, $0x815
    # loading a selector replaces the base
    DESCRIPTOR 0, 0x00cf92000000ffff
    mov $scratch, %eax
    mov %ax, gdt + SCRATCH + 2
    shr $16, %eax
    mov %al, gdt + SCRATCH + 4
    mov $SCRATCH, %eax
    mov %eax, %gs
    mov %gs:16, %rax
    CHECK "gs from a descriptor with a base", %rax, $0x4711
    mov $GS_BASE, %ecx
    rdmsr
    CHECK "GS base from a descriptor", %rax, $scratch
    mov $SCRATCH, %eax
    mov %eax, %ds                       # no base in 64-bit mode
    mov scratch + 16, %rax
    CHECK "ds has no base", %rax, $0x4711
    mov $KDATA, %eax
    mov %eax, %ds
    mov $7, %eax
    xor %ecx, %ecx
    cpuid
    bt $0, %ebx
    jnc 1f
    mov $CR4_BOOT | 0x10000, %eax       # FSGSBASE
    mov %rax, %cr4
    movabs $0xffff800012345678, %rcx
    EXPECT_NONE "wrfsbase", wrfsbase %rcx
    rdfsbase %rax
    CHECK "rdfsbase", %rax, %rcx
    wrfsbase %ecx
    rdfsbase %rax
    CHECK "wrfsbase, 32 bits", %rax, $0x12345678
    wrgsbase %rcx
    rdgsbase %eax
    CHECK "rdgsbase, 32 bits", %rax, $0x12345678
    movabs $0x0000800000000000, %rcx
    EXPECT_FAULT "wrfsbase, not canonical", 13, 0, wrfsbase %rcx
    USER_NONE "user rdfsbase", rdfsbase %rax
    mov $CR4_BOOT, %eax
    mov %rax, %cr4
1:  xor %eax, %eax
    mov %eax, %fs
    mov %eax, %gs
    ret

user_system_registers:
    USER_NONE "user sgdt", sgdt table_pointer
    USER_NONE "user smsw", smsw %eax
    USER_NONE "user str", str %eax
    mov $7, %eax
    xor %ecx, %ecx
    cpuid
    bt $2, %ecx
    jnc 1f
    mov $CR4_BOOT | 0x800, %eax         # UMIP
    mov %rax, %cr4
    USER_FAULT "user sgdt with UMIP", 13, 0, sgdt table_pointer
    USER_FAULT "user sidt with UMIP", 13, 0, sidt table_pointer
    USER_FAULT "user sldt with UMIP", 13, 0, sldt %eax
    USER_FAULT "user str with UMIP", 13, 0, str %eax
    USER_FAULT "user smsw with UMIP", 13, 0, smsw %eax
    EXPECT_NONE "sgdt with UMIP at CPL 0", sgdt table_pointer
    mov $CR4_BOOT, %eax
    mov %rax, %cr4
1:  # loads at CPL 3
    mov $KDATA, %eax
    USER_FAULT "user ds, DPL 0", 13, KDATA, mov %eax, %ds
    mov $UDATA & ~3, %eax
    USER_NONE "user ds, DPL 3 with RPL 0", mov %eax, %ds
    USER_FAULT "user ss with RPL 0", 13, UDATA & ~3, mov %eax, %ss
    mov $UDATA, %eax
    USER_NONE "user ss", mov %eax, %ss
    xor %eax, %eax
    USER_FAULT "user ss, null", 13, 0, mov %eax, %ss
    ret

# 32-bit code under the 64-bit kernel.
.macro COMPATIBILITY
    movl $1f, far_pointer
    movw $KCODE32, far_pointer + 4
    ljmpl *far_pointer
    .code32
1:
.endm
.macro LONG
    ljmp $KCODE64, $2f
    .code64
2:
.endm
compatibility:
    mov %rsp, %r15
    movabs $0x1122334455667788, %rbx
    COMPATIBILITY
    mov $5, %eax
    push %eax
    pop %ecx
    .byte 0x40                  # inc %eax
    mov %esp, %edx
    LONG
    CHECK "compatibility mode: opcode 40 is inc", %rax, $6
    CHECK "compatibility mode: push and pop", %rcx, $5
    mov %r15d, %ecx
    CHECK "compatibility mode: esp", %rdx, %rcx
    mov %rsp, %rcx
    CHECK "compatibility mode: r15 is kept", %r15, %rcx
    # limits
    DESCRIPTOR 0, 0x0040920000000fff    # data, limit 0xfff
    DESCRIPTOR 1, 0x0040960000000fff    # expand-down: valid above 0xfff
    DESCRIPTOR 2, 0x0000960000000fff    # expand-down, 16 bits: 0x1000 to 0xffff
    DESCRIPTOR 3, 0x00cf90000000ffff    # read-only
    DESCRIPTOR 4, 0x00cf98000000ffff    # execute-only code
    .macro LIMIT name:req, selector:req, vec:req, err:req, insn:vararg
    COMPATIBILITY
    mov $\selector, %eax
    mov %eax, %es
    LONG
    TRY 9f
    COMPATIBILITY
8:  \insn
    LONG
9:  TRIED "\name", \vec, \err, 8b
    .endm
    LIMIT "last byte", SCRATCH, NO_FAULT, 0, movb %es:0xfff, %al
    LIMIT "last dword", SCRATCH, NO_FAULT, 0, mov %es:0xffc, %eax
    LIMIT "one byte beyond", SCRATCH, 13, 0, movb %es:0x1000, %al
    LIMIT "a dword across the limit", SCRATCH, 13, 0, mov %es:0xffd, %eax
    LIMIT "write across the limit", SCRATCH, 13, 0, mov %eax, %es:0xffd
    LIMIT "across the top of 4 GiB", SCRATCH, 13, 0, mov %es:0xfffffffe, %eax
    LIMIT "expand-down, below", SCRATCH+8, 13, 0, movb %es:0xfff, %al
    LIMIT "expand-down, first byte", SCRATCH+8, NO_FAULT, 0, movb %es:0x1000, %al
    LIMIT "expand-down, 16 bits, last byte", SCRATCH+16, NO_FAULT, 0, movb %es:0xffff, %al
    LIMIT "expand-down, 16 bits, beyond", SCRATCH+16, 13, 0, movb %es:0x10000, %al
    LIMIT "read-only, read", SCRATCH+24, NO_FAULT, 0, movb %es:0x2000, %al
    LIMIT "read-only, write", SCRATCH+24, 13, 0, movb %al, %es:0x2000
    LIMIT "null", 0, 13, 0, movb %es:0x2000, %al
    xor %ecx, %ecx
    LIMIT "cs is not writable", KDATA, 13, 0, movb %al, %cs:0x2000
    # the stack segment: #SS
    TRY 9f
    COMPATIBILITY
    mov $SCRATCH, %eax
    mov %eax, %ss
8:  movb %ss:0x1000, %al
    .code64
9:  TRIED "ss beyond the limit", 12, 0, 8b
    TRY 9f
    COMPATIBILITY
    mov $SCRATCH, %eax
    mov %eax, %ss
    mov $0x2000, %esp
8:  push %eax
    .code64
9:  TRIED "push beyond the limit", 12, 0, 8b
    CHECK "push beyond the limit: rsp", f_rsp, $0x2000
    # a segment with a base
    DESCRIPTOR 0, 0x00cf92000000ffff
    mov $scratch, %eax
    mov %ax, gdt + SCRATCH + 2
    shr $16, %eax
    mov %al, gdt + SCRATCH + 4
    movq $0x2468, scratch + 8
    COMPATIBILITY
    mov $SCRATCH, %eax
    mov %eax, %es
    mov %es:8, %ebx
    mov $-8, %ecx
    mov %es:16(%ecx), %edx
    LONG
    CHECK "a base is added", %rbx, $0x2468
    CHECK "a base is added, wrapping", %rdx, $0x2468
    # a code segment with a limit
    DESCRIPTOR 0, 0x00409a0000000fff
    movl $0x1000, far_pointer
    movw $SCRATCH, far_pointer + 4
    TRY 3f
2:  ljmpl *far_pointer
3:  TRIED "far jmp beyond the code limit", 13, 0, 2b
    # 32-bit only opcodes, exceptions from there
    TRY 9f
    COMPATIBILITY
    mov $2, %eax
    mov $table_pointer, %ecx
    movl $3, (%ecx)
    movl $10, 4(%ecx)
8:  bound %eax, (%ecx)
    .code64
9:  TRIED "bound", 5, NO_ERROR, 8b
    CHECK "exception from 32-bit code: cs", f_cs, $KCODE32
    TRY 9f
    COMPATIBILITY
    mov $0x7f, %al
    add $1, %al
    into
8:
    .code64
9:  TRIED "into", 4, NO_ERROR, 8b
    TRY 9f
    COMPATIBILITY
    mov $0x12, %al
8:  aam $0
    .code64
9:  TRIED "aam by 0", 0, NO_ERROR, 8b
    TRY 9f
    COMPATIBILITY
8:  movl $0, %cs:0
    .code64
9:  TRIED "write through cs", 13, 0, 8b
    COMPATIBILITY
    mov $0x27, %al
    add $0x35, %al
    daa
    movzx %al, %ebx
    mov $123, %al
    aam
    movzx %ax, %ecx
    push %ds
    pop %es
    mov $0x11111111, %eax
    mov $0x22222222, %edx
    pusha
    xor %eax, %eax
    xor %edx, %edx
    popa
    LONG
    CHECK "daa", %rbx, $0x62
    CHECK "popa", %rdx, $0x22222222
    # user mode, 32 bits
    GATE 0x90, 0xee00
    TRY 9f
    pushq $UDATA
    pushq $user_stack_top
    pushq $2
    pushq $UCODE32
    pushq $1f
    iretq
    .code32
1:  push $0x77
    pop %ebx
    int $0x90
8:
    .code64
9:  TRIED "32-bit user code", 0x90, NO_ERROR, 8b
    CHECK "32-bit user code: cs", f_cs, $UCODE32
    CHECK "32-bit user code: ss", f_ss, $UDATA
    CHECK "32-bit user code: ebx", f_rbx, $0x77
    ret

# Call gates of 64-bit mode are 16 bytes wide.
.macro CALL_GATE selector:req, target:req, attributes:req
    mov $\target, %eax
    mov %ax, gdt + SCRATCH
    movw $\selector, gdt + SCRATCH + 2
    movw $\attributes, gdt + SCRATCH + 4
    shr $16, %eax
    mov %ax, gdt + SCRATCH + 6
    movq $0, gdt + SCRATCH + 8
.endm
call_gates:
    movl $0, far_pointer
    movw $SCRATCH, far_pointer + 4
    CALL_GATE KCODE64, gate_target, 0xec00
    mov %rsp, %rbx
    EXPECT_NONE "call gate", lcalll *far_pointer
    mov %rsp, %rax
    CHECK "call gate: came back", %rax, %rbx
    CHECK "call gate: ran at CPL 0", gate_cs, $KCODE64
    CHECK "call gate: pushed cs", gate_frame + 8, $KCODE64
    movw $SCRATCH + 3, far_pointer + 4
    # from CPL 3: the stack is RSP0, with ss, rsp, cs, rip
    TRY 3f
    call enter_user
1:  lcalll *far_pointer
2:  ud2
3:  TRIED "user call gate, back again", 6, NO_ERROR, 2b
    CHECK "user call gate: rip", gate_frame, $2b
    CHECK "user call gate: cs", gate_frame + 8, $UCODE64
    CHECK "user call gate: rsp", gate_frame + 16, $user_stack_top
    CHECK "user call gate: ss", gate_frame + 24, $UDATA
    CHECK "user call gate: handler ss", gate_ss, $0
    CHECK "user call gate: stack", gate_rsp, $(kernel_stack_top-32)
    CALL_GATE KCODE64, gate_target, 0x8c00
    USER_FAULT "user call gate, DPL 0", 13, SCRATCH, lcalll *far_pointer
    CALL_GATE KCODE64, gate_target, 0x6c00
    USER_FAULT "user call gate, absent", 11, SCRATCH, lcalll *far_pointer
    CALL_GATE KCODE32, gate_target, 0xec00
    USER_FAULT "call gate to 32-bit code", 13, KCODE32, lcalll *far_pointer
    CALL_GATE KDATA, gate_target, 0xec00
    USER_FAULT "call gate to data", 13, KDATA, lcalll *far_pointer
    CALL_GATE 0, gate_target, 0xec00
    USER_FAULT "call gate to null", 13, 0, lcalll *far_pointer
    CALL_GATE KCODE64, gate_target, 0xec00
    movb $0xc, gdt + SCRATCH + 13       # type field of the upper half must be 0
    USER_FAULT "call gate, upper type not 0", 13, SCRATCH, lcalll *far_pointer
    CALL_GATE KCODE64, gate_target, 0xec00
    USER_FAULT "jmp through a gate to inner code", 13, KCODE64, ljmpl *far_pointer
    ret
gate_target:
    mov %cs, %eax
    mov %rax, gate_cs
    mov %ss, %eax
    mov %rax, gate_ss
    mov %rsp, gate_rsp
    .irp offset, 0, 8, 16, 24
    mov \offset(%rsp), %rax
    mov %rax, gate_frame + \offset
    .endr
    lretq

.include "lib/legacy.inc"

    .data
    .balign 8
ldt: .quad 0, 0x00cf92000000ffff
far_pointer_64: .quad far_callee
    .word KCODE64
    .bss
    .balign 16
far_pointer: .skip 16
table_pointer: .skip 16
gate_cs: .quad 0
gate_ss: .quad 0
gate_rsp: .quad 0
gate_frame: .skip 32
    .balign 4096
scratch: .skip 4096
