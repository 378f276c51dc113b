# patched: code that is rewritten so often that a monitor may treat it in its own way: every form
# of immediate and of branch displacement, by its own CPU and by another one; opcodes that change
# afterwards; stores that reach beyond the immediate.
#
# The immediates lie in eight aligned bytes, where the processor stores and loads them at once,
# except where a case says so. In the last cases the second CPU rewrites for the first.

.include "lib/boot.inc"
.include "lib/apic.inc"
.include "lib/smp.inc"

.ifndef ROUNDS
.set ROUNDS, 20000
.endif
.set FEWER, ROUNDS / 10

    .code64
main64:
    call start_aps
    COUNT WAKE, 0x71
    sti
    call moves
    call arithmetic
    call memory_operands
    call pushes
    call branches
    call opcode_afterwards
    call never_the_same
    call beyond
    call pieces
    call data_between
    call by_another
    FINISH "patched"

# Another register, value and so opcode each time, for long; then it is left alone.
never_the_same:
    mov $3000, %r8d
1:  mov %r8d, %r9d
    imul $0x9e3779b1, %r9d, %r9d
    mov %r8d, %edx
    and $3, %edx
    lea 0xb8(%rdx), %eax        # mov $imm32, %eax, %ecx, %edx or %ebx
    mov %al, 2f
    mov %r9d, 2f + 1
    call 3f
    mov %r9d, %esi
    CHECK "never the same", %rdi, %rsi
    dec %r8d
    jnz 1b
    movb $0xb8, 2f
    mov $1000, %r8d
4:  call 3f
    CHECK "left alone", %rdi, %rsi
    dec %r8d
    jnz 4b
    ret
    .balign 64
3:  xor %edi, %edi
    xor %eax, %eax
    xor %ecx, %ecx
    xor %ebx, %ebx
    xor %edx, %edx
2:  mov $0, %eax
    or %ecx, %eax
    or %edx, %eax
    or %ebx, %eax
    mov %eax, %edi
    ret

# APART n: what follows is an instruction whose immediate begins n bytes behind here and is
# aligned.
.macro APART bytes:req
    .balign 8, 0x90
    .skip 8 - \bytes, 0x90
.endm

# MOVE "name", register stored, bytes before the immediate, actual, mask, instruction: stores the
# round's number into the immediate right before the instruction executes. Clobbers RAX, RBX,
# R13.
.macro MOVE name:req, stored:req, size:req, before:req, actual:req, mask:req, insn:vararg
    mov $FEWER, %r13d
9982: imul $0x1e3779b1, %r13, %rbx
    xor %eax, %eax
    mov \stored, 9983f - \size
    APART \before
    \insn
9983:
    CHECK_MASK "\name", \mask, \actual, %rbx
    dec %r13d
    jnz 9982b
.endm

    .data
    .balign 8
low32: .quad 0xffffffff
    .text
moves:
    MOVE "mov r8, imm8", %bl, 1, 1, %rax, $0xff, mov $0, %al
    MOVE "mov ah, imm8", %bl, 1, 1, %rax, $0, mov $0, %ah
    MOVE "mov r16, imm16", %bx, 2, 2, %rax, $0xffff, movw $0, %ax
    MOVE "mov r32, imm32", %ebx, 4, 1, %rax, low32, movl $0, %eax
    MOVE "mov r12d, imm32", %ebx, 4, 2, %r12, low32, movl $0, %r12d
    MOVE "mov r15d, imm32", %ebx, 4, 2, %r15, low32, movl $0, %r15d
    MOVE "mov ecx, imm32", %ebx, 4, 1, %rcx, low32, movl $0, %ecx
    MOVE "mov r64, imm32", %ebx, 4, 3, %rax, low32, .byte 0x48, 0xc7, 0xc0, 0, 0, 0, 0
    MOVE "mov r64, imm64", %rbx, 8, 2, %rax, $-1, movabs $0x1111111111111111, %rax
    MOVE "mov r14, imm64", %rbx, 8, 2, %r14, $-1, movabs $0x1111111111111111, %r14
    # the sign
    mov $FEWER, %ebx
1:  mov %rbx, %rcx
    neg %rcx
    mov %ecx, 2f - 4
    APART 3
    .byte 0x48, 0xc7, 0xc0, 0, 0, 0, 0
2:  CHECK "mov r64, negative imm32", %rax, %rcx
    dec %ebx
    jnz 1b
    ret

# Flags go in and come out; the short and the long form.
arithmetic:
    mov $FEWER, %ebx
1:  mov %ebx, 2f - 4
    mov $1000, %eax
    stc
    APART 2
    adc $0x11111111, %ecx               # 81 d1: the flags of the next are checked
2:  mov %ebx, 3f - 4
    mov $1000, %eax
    stc
    APART 1
    adc $0x11111111, %eax
3:  lea 1001(%rbx), %edx
    CHECK "adc eax, imm32 with carry", %rax, %rdx
    mov %bl, 4f - 1
    mov $7, %eax
    clc
    APART 2
    adc $0, %al
4:  lahf
    mov %eax, %esi
    mov $7, %eax
    clc
    adc %bl, %al
    lahf
    CHECK "adc al, imm8: result and flags", %rsi, %rax
    mov %bl, 5f - 1
    mov $7, %r14d
    APART 3
    sub $1, %r14
5:  movsx %bl, %rax
    neg %rax
    add $7, %rax
    CHECK "sub r64, imm8 with its sign", %r14, %rax
    mov %ebx, 6f - 4
    mov %ebx, %eax
    APART 1
    cmp $0x11111111, %eax
6:  sete %al
    CHECK_MASK "cmp eax, imm32", $0xff, %rax, $1
    mov %ebx, 7f - 4
    mov $-1, %rax
    APART 3
    and $0x11111111, %rsi               # of no interest
7:  mov %ebx, 8f - 4
    mov $-1, %edx
    APART 2
    and $0x11111111, %edx
8:  CHECK "and r32, imm32", %rdx, %rbx
    dec %ebx
    jnz 1b
    ret

    .data
    .balign 8
cell: .quad 0
    .text
memory_operands:
    mov $FEWER, %ebx
1:  mov %ebx, 2f - 4
    APART 7
    movl $0x11111111, cell
2:  CHECK_MASK "mov [m], imm32", low32, cell, %rbx
    mov %ebx, 3f - 4
    APART 7
    cmpl $0x11111111, cell
3:  sete %al
    CHECK_MASK "cmp [m], imm32", $0xff, %rax, $1
    mov %ebx, 4f - 4
    mov $cell - 0x40, %r15d
    mov $8, %r14d
    APART 5
    lock addl $0x11111111, 0(%r15,%r14,8)
4:  lea (%rbx,%rbx), %ecx
    CHECK_MASK "lock add [m], imm32", low32, cell, %rcx
    dec %ebx
    jnz 1b
    ret

pushes:
    mov $FEWER, %ebx
1:  mov %rbx, %rcx
    neg %rcx
    mov %ecx, 2f - 4
    APART 1
    pushq $0x11111111
2:  pop %rax
    CHECK "push imm32", %rax, %rcx
    mov %bl, 3f - 1
    APART 1
    pushq $0x11
3:  pop %rax
    movsx %bl, %rcx
    CHECK "push imm8", %rax, %rcx
    dec %ebx
    jnz 1b
    ret

# The target changes with every round, of three.
branches:
    mov $FEWER, %ebx
    xor %edi, %edi
1:  mov targets(,%rdi,8), %rax
    lea -2f(%rax), %ecx
    mov %ecx, 2f - 4
    xor %eax, %eax
    APART 1
    .byte 0xe9, 0, 0, 0, 0              # jmp
2:  ud2
    .balign 64
10: mov $0, %eax
    jmp 3f
    .balign 64
11: mov $1, %eax
    jmp 3f
    .balign 64
12: mov $2, %eax
3:  CHECK "jmp rel32", %rax, %rdi
    mov callees(,%rdi,8), %rax
    lea -4f(%rax), %ecx
    mov %ecx, 4f - 4
    APART 1
    .byte 0xe8, 0, 0, 0, 0              # call
4:  CHECK "call rel32", %rax, %rdi
    # taken or not in turn
    mov conditionals(,%rdi,8), %rax
    lea -5f(%rax), %ecx
    mov %ecx, 5f - 4
    mov $77, %eax
    bt $0, %ebx
    APART 2
    .byte 0x0f, 0x82, 0, 0, 0, 0        # jc
5:  bt $0, %ebx
    setc %cl
    CHECK_MASK "jc rel32, not taken", $0xff, %rcx, $0
    jmp 6f
    .balign 64
13: mov $0, %eax
    jmp 14f
    .balign 64
15: mov $1, %eax
    jmp 14f
    .balign 64
16: mov $2, %eax
14: CHECK "jc rel32, taken", %rax, %rdi
    bt $0, %ebx
    setc %cl
    CHECK_MASK "jc rel32, rightly taken", $0xff, %rcx, $1
6:  inc %edi
    cmp $3, %edi
    jb 7f
    xor %edi, %edi
7:  dec %ebx
    jnz 1b
    ret
    .data
targets: .quad 10b, 11b, 12b
callees: .quad callee0, callee1, callee2
conditionals: .quad 13b, 15b, 16b
    .text
callee0: mov $0, %eax
    ret
    .balign 4096
callee1: mov $1, %eax
    ret
callee2: mov $2, %eax
    ret

# The immediate is rewritten in every round, the opcode in some: mov eax, mov ecx, add eax, a jump.
opcode_afterwards:
    mov $FEWER, %ebx
1:  mov $4, %ecx
    mov %ecx, %eax
    mov %ebx, 3f - 4
    bt $2, %ebx
    jc 2f
    movb $0xb8, 3f - 5          # mov $imm, %eax
    mov $4, %esi
    bt $1, %ebx
    jnc 2f
    movb $0xb9, 3f - 5          # mov $imm, %ecx
    bt $0, %ebx
    jnc 2f
    movb $0x05, 3f - 5          # add $imm, %eax
2:  mov 3f - 5, %r8b
    APART 1
    mov $0x11111111, %eax
3:  cmp $0xb8, %r8b
    jne 4f
    CHECK "opcode afterwards, mov eax", %rax, %rbx
    CHECK "opcode afterwards, ecx stays", %rcx, $4
    jmp 6f
4:  cmp $0xb9, %r8b
    jne 5f
    CHECK "opcode afterwards, mov ecx", %rcx, %rbx
    CHECK "opcode afterwards, eax stays", %rax, $4
    jmp 6f
5:  lea 4(%rbx), %edx
    CHECK "opcode afterwards, add eax", %rax, %rdx
6:  dec %ebx
    jnz 1b
    # a nop of five bytes and a call in its place in turn, by a store of eight
    mov $FEWER, %ebx
7:  xor %eax, %eax
    movabs $0x900000441f0f, %rcx
    bt $0, %ebx
    jnc 8f
    mov $callee1 - 9f, %ecx
    shl $8, %rcx
    mov $0xe8, %cl
    movabs $0x900000000000, %rdx
    movabs $0xffffffffff, %rsi
    and %rsi, %rcx
    or %rdx, %rcx
8:  movabs $0x9090000000000000, %rdx
    or %rdx, %rcx
    mov %rcx, 9f - 5
    .balign 8, 0x90
    .byte 0x0f, 0x1f, 0x44, 0, 0
9:  nop
    nop
    nop
    mov %ebx, %edx
    and $1, %edx
    CHECK "nop and call in turn", %rax, %rdx
    dec %ebx
    jnz 7b
    ret

# A store over the immediate and the next instruction, which changes with it.
beyond:
    mov $FEWER, %ebx
1:  movzbl %bl, %ecx
    and $0x7f, %ecx
    mov %rcx, %rdx
    shl $48, %rdx
    movabs $0x9000c08300000000, %rax     # add $n, %eax; nop
    or %rax, %rdx
    or %rbx, %rdx
    mov %rdx, 2f - 4
    APART 1
    mov $0x11111111, %eax
2:  add $0, %eax
    nop
    add %ebx, %ecx
    CHECK "immediate and next instruction", %rax, %rcx
    dec %ebx
    jnz 1b
    # and the other way round: the end of the instruction before, and the opcode
    mov $FEWER, %ebx
3:  movzbl %bl, %ecx
    and $0x7f, %ecx
    mov %ecx, %edx
    or $0xb800, %edx            # the immediate of add, then the opcode of mov eax
    bt $0, %ebx
    jnc 4f
    or $0xba00, %edx            # ... of mov edx
4:  mov %ebx, 5f - 4
    xor %eax, %eax
    mov %dx, 5f - 6
    xor %edx, %edx
    .balign 8, 0x90
    .skip 4, 0x90
    add $0, %eax
    mov $0x11111111, %eax
5:  bt $0, %ebx
    jc 6f
    CHECK "end of the instruction before, eax", %rax, %rbx
    jmp 7f
6:  CHECK "end of the instruction before, edx", %rdx, %rbx
    CHECK "end of the instruction before, add", %rax, %rcx
7:  dec %ebx
    jnz 3b
    ret

# The immediate in pieces, and one that is not aligned.
pieces:
    mov $FEWER, %ebx
1:  mov %bl, 2f - 4
    mov %bh, 2f - 3
    movw $0x1234, 2f - 2
    APART 1
    mov $0x11111111, %eax
2:  mov %bx, %cx
    and $0xffff, %ecx
    or $0x12340000, %ecx
    CHECK "immediate in pieces", %rax, %rcx
    imul $0x10001, %ebx, %ecx
    mov %ecx, 3f - 4
    .balign 64, 0x90
    .skip 61, 0x90
    mov $0x11111111, %eax
3:  CHECK "immediate across a line", %rax, %rcx
    dec %ebx
    jnz 1b
    ret

# A counter beside code that is executed: many stores to the same bytes; now and then code right
# before and behind it is rewritten, and executed for the first time.
data_between:
    mov $FEWER, %ebx
    movq $0, 2f
1:  incq 2f
    incb 2f + 9
    mov 2f + 9, %cl
    jmp 3f
    .balign 8
2:  .quad 0
    mov $0, %al                 # its immediate is the byte at 2b + 9
    ret
3:  call 2b + 8
    CHECK_MASK "immediate beside a counter", $0xff, %rax, %rcx
    test $0x1f, %bl
    jnz 4f
    mov %ebx, 5f + 1
    call 5f
    CHECK "code derived anew beside it", %rax, %rbx
4:  mov $FEWER + 1, %ecx
    sub %ebx, %ecx
    CHECK "counter beside code", 2b, %rcx
    dec %ebx
    jnz 1b
    ret
5:  mov $0, %eax
    ret

# The second CPU rewrites, the first executes and answers.
by_another:
    movq $0, flag
    movq $0, answer
    mov $1, %edi
    mov $rewriter, %esi
    call start_job
    mov $1, %r12d
1:  cmp %r12, flag
    je 2f
    pause
    jmp 1b
2:  xor %eax, %eax
    xor %ecx, %ecx
    cpuid
    jmp 3f
    APART 1
3:  mov $0, %eax
rewritten:
    CHECK "immediate by another CPU", %rax, %r12
    jmp 4f
    APART 1
4:  .byte 0xe8, 0, 0, 0, 0
rewritten_call:
    mov %r12d, %ecx
    and $1, %ecx
    inc %ecx
    CHECK "call by another CPU", %rax, %rcx
    jmp 5f
    .balign 8
5:  inc %eax
    nop
rewritten_opcode:
    mov %r12d, %edx
    and $2, %edx
    lea 1(%rcx), %ecx
    sub %edx, %ecx
    CHECK_MASK "opcode by another CPU", low32, %rax, %rcx
    mov %r12, answer
    inc %r12
    cmp $FEWER, %r12
    jbe 1b
    mov $1, %edi
    jmp finish_job
rewriter:
    mov $1, %r12d
1:  mov %r12d, rewritten - 4
    mov %r12d, %eax
    and $1, %eax
    mov callees + 8(,%rax,8), %rax
    sub $rewritten_call, %eax
    mov %eax, rewritten_call - 4
    mov $0xc0ff, %eax           # inc %eax
    bt $1, %r12d
    jnc 2f
    mov $0xc8ff, %eax           # dec %eax
2:  mov %ax, rewritten_opcode - 3
    mov %r12, flag
3:  cmp %r12, answer
    je 4f
    pause
    jmp 3b
4:  inc %r12
    cmp $FEWER, %r12
    jbe 1b
    ret
    .data
    .balign 8
flag: .quad 0
answer: .quad 0
    .text
