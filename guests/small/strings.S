# strings: string instructions of all sizes, directions, prefixes and address sizes, and
# stack instructions in 64-bit and 16-bit operand sizes; registers are precise when a
# fault or the end of a repetition stops them. (segments.S runs them in real mode.)
#
# Bochs 2.7 takes 12 bytes for ENTERW $4, $0 (a processor and QEMU: 6).

.include "lib/boot.inc"

.set ABSENT_PAGE, 0x1600000     # 2 MiB page made absent for the faults

    .code64
main64:
    movq $0, boot_pd + (ABSENT_PAGE >> 21) * 8
    invlpg ABSENT_PAGE
    call moves
    call stores_and_loads
    call compares
    call repeated_faults
    call address_sizes
    call overrides
    call port_strings
    call stack_forms
    call frames
    call calls
    FINISH "strings"

# FILL: source holds 0, 1, 2, ...; target is all 0xee.
fill:
    push %rax
    push %rcx
    push %rdi
    xor %eax, %eax
1:  mov %al, source(%rax)
    movb $0xee, target(%rax)
    inc %eax
    cmp $256, %eax
    jb 1b
    pop %rdi
    pop %rcx
    pop %rax
    ret

# MOVE suffix, size, count, direction (cld, std): from the middle to the middle.
.macro MOVE suffix:req, size:req, count:req, direction:req, sign:req
    call fill
    mov $source + 128, %esi
    mov $target + 128, %edi
    mov $\count, %ecx
    \direction
    rep movs\suffix
    cld
    CHECK "rep movs\suffix \count \direction: rcx", %rcx, $0
    CHECK "rep movs\suffix \count \direction: rsi", %rsi, $source+128+(\sign*\size*\count)
    CHECK "rep movs\suffix \count \direction: rdi", %rdi, $target+128+(\sign*\size*\count)
    # the bytes: those in the range are the source's, the others untouched
    xor %eax, %eax
    xor %edx, %edx
1:  movzbl target(%rax), %ecx
    mov %eax, %ebx
    .if \sign > 0
    sub $128, %ebx
    .else
    sub $128 + \size - \size * \count, %ebx
    .endif
    cmp $\size * \count, %ebx
    mov $0xee, %ebx
    cmovb %eax, %ebx
    cmp %ebx, %ecx
    je 2f
    inc %edx
2:  inc %eax
    cmp $256, %eax
    jb 1b
    CHECK "rep movs\suffix \count \direction: wrong bytes", %rdx, $0
.endm
moves:
    .irp count, 0, 1, 2, 3, 7, 13
    MOVE b, 1, \count, cld, 1
    MOVE w, 2, \count, cld, 1
    MOVE l, 4, \count, cld, 1
    MOVE q, 8, \count, cld, 1
    MOVE b, 1, \count, std, -1
    MOVE w, 2, \count, std, -1
    MOVE l, 4, \count, std, -1
    MOVE q, 8, \count, std, -1
    .endr
    # overlapping: a byte is spread
    call fill
    movb $0x99, target
    mov $target, %esi
    mov $target + 1, %edi
    mov $100, %ecx
    rep movsb
    mov $0x99, %al
    mov $target, %edi
    mov $101, %ecx
    repe scasb
    CHECK "overlapping movsb spreads", %rcx, $0
    setz %al
    movzbl %al, %eax
    CHECK "overlapping movsb spreads all", %rax, $1
    # large, across pages
    mov $big, %edi
    mov $0x3000 / 8, %ecx
    movabs $0x0123456789abcdef, %rax
    rep stosq
    mov $big + 3, %esi
    mov $big + 0x3005, %edi
    mov $0x2ffd, %ecx
    rep movsb
    mov $big + 0x3005, %edi
    mov big + 0x5ffa, %rax
    mov big + 0x2ff8, %rbx
    CHECK "large movsb: the end", %rax, %rbx
    CHECK "large movsb: rdi", %rdi, $big+0x3005
    ret

stores_and_loads:
    call fill
    movabs $0x8877665544332211, %rax
    mov $target, %edi
    stosb
    stosw
    stosl
    stosq
    CHECK "stos: rdi", %rdi, $target+15
    movabs $0x1144332211221111, %rbx
    mov target, %rcx
    CHECK "stos: low", %rcx, %rbx
    movabs $0xee88776655443322, %rbx
    mov target + 8, %rcx
    CHECK "stos: high", %rcx, %rbx
    mov $source + 0x10, %esi
    mov $-1, %rax
    lodsb
    CHECK "lodsb", %rax, $0xffffffffffffff10
    lodsw
    CHECK "lodsw", %rax, $0xffffffffffff1211
    lodsl
    mov $0x16151413, %ebx
    CHECK "lodsl clears the upper half", %rax, %rbx
    lodsq
    movabs $0x1e1d1c1b1a191817, %rbx
    CHECK "lodsq", %rax, %rbx
    CHECK "lods: rsi", %rsi, $source+0x1f
    mov $5, %ecx
    mov $source, %esi
    rep lodsb
    CHECK_MASK "rep lodsb", $0xff, %rax, $4
    CHECK "rep lodsb: rcx", %rcx, $0
    xor %eax, %eax
    mov $target, %edi
    mov $64, %ecx
    pushq $0x8d5
    popfq
    rep stosb
    pushfq
    pop %rax
    CHECK_MASK "rep stosb changes no flags", $0x8d5, %rax, $0x8d5
    pushq $2
    popfq
    ret

# STOP "name", rcx, rsi or rdi, register value, zf
.macro STOP name:req, count:req, register:req, value:req, zf:req
    setz %dl
    movzbl %dl, %edx
    CHECK "\name: rcx", %rcx, $\count
    CHECK "\name: \register", %\register, $\value
    CHECK "\name: ZF", %rdx, $\zf
.endm
compares:
    call fill
    mov $source, %edi
    mov $100, %ecx
    mov $0x20, %al
    repne scasb
    STOP "repne scasb", 100-33, rdi, source+33, 1
    mov $source, %edi
    mov $10, %ecx
    repne scasb
    STOP "repne scasb, not found", 0, rdi, source+10, 0
    mov $source, %edi
    mov $100, %ecx
    xor %eax, %eax
    repe scasb
    STOP "repe scasb", 98, rdi, source+2, 0
    mov $source + 2, %edi
    mov $50, %ecx
    mov $0x2b2a2928, %eax
    repne scasl
    STOP "repne scasl, misaligned", 0, rdi, source+202, 0
    mov $source, %edi
    mov $30, %ecx
    repne scasl
    STOP "repne scasl", 30-11, rdi, source+0x2c, 1
    mov $source + 0x40, %edi
    mov $10, %ecx
    mov $0x2f2e, %eax
    std
    repne scasw
    cld
    STOP "repne scasw downwards", 0, rdi, source+0x40-20, 1
    # comparing
    mov $source, %esi
    mov $copy, %edi
    mov $256, %ecx
    rep movsb
    movb $0xff, copy + 77
    .irp size, b, w, l, q
    mov $source, %esi
    mov $copy, %edi
    mov $32, %ecx
    repe cmps\size
    pushfq
    mov %rcx, counts
    mov %rsi, counts + 8
    pop counts + 16
    .ifc \size, b
    CHECK "repe cmpsb: rcx", counts, $0
    CHECK_MASK "repe cmpsb: ZF", $0x40, counts + 16, $0x40
    .endif
    .ifc \size, w
    CHECK "repe cmpsw: rcx", counts, $0
    .endif
    .ifc \size, l
    CHECK "repe cmpsl: rcx", counts, $12
    CHECK "repe cmpsl: rsi", counts + 8, $source+80
    CHECK_MASK "repe cmpsl: CF and ZF", $0x41, counts + 16, $0x01
    .endif
    .ifc \size, q
    CHECK "repe cmpsq: rcx", counts, $22
    CHECK "repe cmpsq: rsi", counts + 8, $source+80
    .endif
    .endr
    mov $source + 100, %esi
    mov $copy + 90, %edi
    mov $20, %ecx
    repne cmpsb
    STOP "repne cmpsb", 0, rsi, source+120, 0
    # a count of 0 changes nothing, flags included
    mov $source, %esi
    xor %ecx, %ecx
    xor %eax, %eax
    repe cmpsb
    STOP "repe cmpsb of nothing", 0, rsi, source, 1
    ret

repeated_faults:
    mov $ABSENT_PAGE - 16, %edi
    mov $source, %esi
    mov $100, %ecx
    EXPECT_FAULT "rep movsl", 14, 2, rep movsl
    CHECK "rep movsl: rcx", f_rcx, $96
    CHECK "rep movsl: rsi", f_rsi, $source+16
    CHECK "rep movsl: rdi", f_rdi, $ABSENT_PAGE
    CHECK "rep movsl: cr2", f_cr2, $ABSENT_PAGE
    mov $ABSENT_PAGE - 10, %edi
    mov $source, %esi
    mov $100, %ecx
    EXPECT_FAULT "rep movsl, split", 14, 2, rep movsl
    CHECK "rep movsl, split: rcx", f_rcx, $98
    CHECK "rep movsl, split: rdi", f_rdi, $ABSENT_PAGE-2
    CHECK "rep movsl, split: cr2", f_cr2, $ABSENT_PAGE
    mov $ABSENT_PAGE - 12, %esi
    mov $target, %edi
    mov $100, %ecx
    EXPECT_FAULT "rep movsw, source", 14, 0, rep movsw
    CHECK "rep movsw, source: rcx", f_rcx, $94
    CHECK "rep movsw, source: rdi", f_rdi, $target+12
    mov $ABSENT_PAGE - 5, %edi
    mov $0xff, %al
    mov $100, %ecx
    EXPECT_FAULT "repne scasb", 14, 0, repne scasb
    CHECK "repne scasb: rcx", f_rcx, $95
    CHECK "repne scasb: rdi", f_rdi, $ABSENT_PAGE
    mov $ABSENT_PAGE + 0x200000 + 7, %edi     # from above
    mov $100, %ecx
    std
    EXPECT_FAULT "rep stosb downwards", 14, 2, rep stosb
    cld
    CHECK "rep stosb downwards: rcx", f_rcx, $92
    CHECK "rep stosb downwards: cr2", f_cr2, $ABSENT_PAGE+0x1fffff
    CHECK_MASK "the fault saves DF", $0x400, f_rflags, $0x400
    # resumed where it stopped: the handler maps the page
    movq $map_page, handlers + 8 * 14
    mov $ABSENT_PAGE - 1000, %edi
    mov $3000, %ecx
    mov $0x3c, %al
    rep stosb
    movq $0, handlers + 8 * 14
    CHECK "resumed rep stosb: rdi", %rdi, $ABSENT_PAGE+2000
    mov $ABSENT_PAGE - 1000, %edi
    mov $3000, %ecx
    repe scasb
    CHECK "resumed rep stosb: all bytes", %rcx, $0
    movq $0, boot_pd + (ABSENT_PAGE >> 21) * 8
    invlpg ABSENT_PAGE
    ret
map_page:
    movq $ABSENT_PAGE + BOOT_MAP, boot_pd + (ABSENT_PAGE >> 21) * 8
    ret

address_sizes:
    call fill
    movabs $0xffffffff00000003, %rcx        # ECX counts with a 32-bit address size
    movabs $0x7777777700000000 + source, %rsi
    movabs $0x7777777700000000 + target, %rdi
    addr32 rep movsb
    CHECK "addr32 rep movsb: rcx", %rcx, $0
    CHECK "addr32 rep movsb: rsi", %rsi, $source+3
    CHECK "addr32 rep movsb: rdi", %rdi, $target+3
    mov target, %eax
    mov $0xee020100, %ebx
    CHECK "addr32 rep movsb: bytes", %rax, %rbx
    movabs $0x7777777700000000 + source, %rsi
    addr32 lodsb
    CHECK "addr32 lodsb: rsi", %rsi, $source+1
    movabs $0xffffffff00000000, %rcx
    jecxz 1f
    CHECK "jecxz", $0, $1
1:  jrcxz 2f
    jmp 3f
2:  CHECK "jrcxz", $0, $1
3:  movabs $0x100000001, %rcx
    addr32 loop 4f
    CHECK "addr32 loop: rcx", %rcx, $0
    jmp 5f
4:  CHECK "addr32 loop", $0, $1
5:  movabs $0xffffffff00000000 + source, %rax
    movzbl 5(%eax), %ebx
    CHECK "32-bit base", %rbx, $5
    mov $0xfffffffe, %eax
    lea 4(%eax), %rbx
    CHECK "32-bit lea wraps", %rbx, $2
    lea (%eax,%eax), %rbx
    mov $0xfffffffc, %ecx
    CHECK "32-bit lea sum", %rbx, %rcx
    ret

.set FS_BASE, 0xc0000100
overrides:
    call fill
    mov $FS_BASE, %ecx
    mov $0x40, %eax
    xor %edx, %edx
    wrmsr
    mov $source, %esi
    mov $target, %edi
    fs movsb                            # the source is overridden, never the target
    movzbl target, %eax
    CHECK "fs movsb", %rax, $0x40
    mov $source, %esi
    fs lodsb
    CHECK_MASK "fs lodsb", $0xff, %rax, $0x40
    mov $source, %edi
    mov $0, %al
    fs scasb
    setz %al
    movzbl %al, %eax
    CHECK "fs scasb ignores it", %rax, $1
    mov $source, %ebx
    mov $0x11, %al
    fs xlatb
    CHECK_MASK "fs xlat", $0xff, %rax, $0x51
    mov $FS_BASE, %ecx
    xor %eax, %eax
    wrmsr
    ret

# Port strings on a port that nobody has: all ones.
port_strings:
    call fill
    mov $0x2f0, %edx
    mov $target, %edi
    mov $4, %ecx
    rep insb
    CHECK "rep insb: rcx", %rcx, $0
    CHECK "rep insb: rdi", %rdi, $target+4
    mov target, %eax
    mov $0xffffffff, %ebx
    CHECK "rep insb", %rax, %rbx
    mov $ABSENT_PAGE - 2, %edi
    mov $5, %ecx
    EXPECT_FAULT "rep insb", 14, 2, rep insb
    CHECK "rep insb, fault: rcx", f_rcx, $3
    mov $ABSENT_PAGE - 2, %esi
    mov $5, %ecx
    EXPECT_FAULT "rep outsb", 14, 0, rep outsb
    CHECK "rep outsb, fault: rcx", f_rcx, $3
    CHECK "rep outsb, fault: rsi", f_rsi, $ABSENT_PAGE
    mov $source, %esi
    mov $2, %ecx
    rep outsl
    CHECK "rep outsl: rsi", %rsi, $source+8
    ret

# MOVED "name", bytes: by how much RSP is below RBP.
.macro MOVED name:req, bytes:req
    mov %rbp, %rax
    sub %rsp, %rax
    CHECK "\name: rsp", %rax, $\bytes
.endm
stack_forms:
    mov %rsp, %rbp
    movabs $0x1122334455667788, %rcx
    push %rcx
    MOVED "push r64", 8
    pop %rdx
    CHECK "pop r64", %rdx, %rcx
    push %cx
    MOVED "push r16", 2
    xor %edx, %edx
    dec %rdx
    pop %dx
    CHECK "pop r16 keeps the rest", %rdx, $0xffffffffffff7788
    pushq $-2
    MOVED "push imm8", 8
    pop %rdx
    CHECK "push imm8 extends the sign", %rdx, $-2
    pushq $0x7fffffff
    pop %rdx
    CHECK "push imm32", %rdx, $0x7fffffff
    pushw $0x1234
    MOVED "pushw imm16", 2
    pop %dx
    push %rsp
    pop %rdx
    CHECK "push rsp pushes the old value", %rdx, %rbp
    pushq $0x77
    push %rsp
    pop %rsp
    MOVED "pop rsp", 8
    pop %rdx
    mov %rcx, counts
    pushq counts
    popq counts + 8
    CHECK "push and pop memory", counts + 8, %rcx
    # pop to an address that uses rsp: after the increment
    pushq $0
    pushq $0x99
    popq (%rsp)
    pop %rdx
    CHECK "pop (rsp) uses the new rsp", %rdx, $0x99
    pushq $0x55
    pushq (%rsp)
    pop %rdx
    CHECK "push (rsp) uses the old rsp", %rdx, $0x55
    pop %rdx
    MOVED "all popped", 0
    mov $UDATA, %eax
    mov %eax, %fs
    push %fs
    MOVED "push fs", 8
    pop %rdx
    CHECK_MASK "push fs", $0xffff, %rdx, $UDATA
    pushw %fs
    MOVED "pushw fs", 2
    popw %gs
    mov %gs, %eax
    CHECK "popw gs", %rax, $UDATA
    xor %eax, %eax
    mov %eax, %fs
    mov %eax, %gs
    pushq $0xcd7
    popfq
    pushfw
    MOVED "pushfw", 2
    cld
    pop %dx
    CHECK_MASK "pushfw", $0xffff, %rdx, $0xcd7
    pushw $0x8d7
    popfw
    pushfq
    pop %rdx
    CHECK "popfw", %rdx, $0x8d7
    pushq $2
    popfq
    # ID, AC and reserved bits
    pushq $0x240028
    popfq
    pushfq
    pop %rdx
    CHECK "popf: ID and AC, reserved bits fixed", %rdx, $0x240002
    pushq $2
    popfq
    # failing forms leave rsp
    mov $ABSENT_PAGE + 8, %ecx
    TRY 3f
    mov %rcx, %rsp
2:  push %rax
3:  TRIED "push to an absent page", 14, 2, 2b
    ret

frames:
    mov %rsp, %rbp
    mov %rsp, %r12
    mov $0x4444, %ebp
    enter $0x20, $0
    mov %rsp, %rax
    sub %r12, %rax
    CHECK "enter: rsp", %rax, $-0x28
    mov %rbp, %rax
    sub %r12, %rax
    CHECK "enter: rbp", %rax, $-8
    CHECK "enter: saved rbp", (%rbp), $0x4444
    leave
    mov %rsp, %rax
    CHECK "leave: rsp", %rax, %r12
    CHECK "leave: rbp", %rbp, $0x4444
    # nested: the display is copied
    mov $display + 64, %ebp
    movq $0x11, display + 56
    movq $0x22, display + 48
    enter $0x10, $3
    mov %rsp, %rax
    sub %r12, %rax
    CHECK "enter, level 3: rsp", %rax, $-0x30
    CHECK "enter, level 3: first link", -8(%rbp), $0x11
    CHECK "enter, level 3: second link", -16(%rbp), $0x22
    CHECK "enter, level 3: own link", -24(%rbp), %rbp
    leave
    CHECK "enter, level 3: leave", %rbp, $display+64
    mov $0x1234, %ebp
    enterw $4, $0
    mov %r12, %rax
    sub %rsp, %rax
    CHECK "enterw: rsp", %rax, $6
    mov %r12, %rsp
    ret

calls:
    mov %rsp, %r12
    call 1f
1:  pop %rax
    CHECK "call pushes the next rip", %rax, $1b
    pushq $0x11
    pushq $0x22
    pushq $2f
    ret $16
2:  mov %rsp, %rax
    CHECK "ret imm16", %rax, %r12
    mov $3f, %eax
    mov %rax, counts
    call *counts
    jmp 4f
3:  ret
4:  mov %rsp, %rax
    CHECK "call through memory", %rax, %r12
    # the target is read before the push moves rsp
    pushq $5f
    call *(%rsp)
    add $8, %rsp
    jmp 6f
5:  ret
6:  mov %rsp, %rax
    CHECK "call (rsp)", %rax, %r12
    # far returns with 32 and 64 bits
    mov $7f, %eax
    shl $0, %rax
    movl $KCODE64, counts + 4
    mov %eax, counts
    sub $8, %rsp
    mov counts, %rax
    mov %rax, (%rsp)
    lretl
7:  mov %rsp, %rax
    CHECK "lretl", %rax, %r12
    pushq $0x33
    pushq $KCODE64
    pushq $8f
    lretq $8
8:  mov %rsp, %rax
    CHECK "lretq imm16", %rax, %r12
    # call to an absent page: nothing is pushed before the fault of the push
    mov $ABSENT_PAGE, %eax
    TRY 3f
    jmp *%rax
3:  CHECK "jump to an absent page: vector", f_vec, $14
    CHECK "jump to an absent page: rip", f_rip, $ABSENT_PAGE
    TRY 3f
    call *%rax
3:  CHECK "call to an absent page: rip", f_rip, $ABSENT_PAGE
    lea -8(%r12), %rbx
    CHECK "call to an absent page: rsp", f_rsp, %rbx
    # loops over flags
    mov $5, %ecx
    xor %eax, %eax
1:  inc %eax
    cmp $3, %eax
    loopne 1b
    CHECK "loopne", %rcx, $2
    mov $5, %ecx
2:  cmp %eax, %eax
    loope 2b
    CHECK "loope", %rcx, $0
    ret

    .bss
    .balign 4096
source: .skip 256
target: .skip 256
copy: .skip 256
counts: .skip 32
display: .skip 128
    .balign 4096
big: .skip 0x6100
