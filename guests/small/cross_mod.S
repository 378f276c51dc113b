# cross_mod: code that one CPU changes for another (SDM volume 3, 9.1.3).
#
# order   X patches a function, then stores a flag. Y sees the flag, serializes with
#         CPUID and calls: never the old code.
# chain   X patches. Y calls until it meets the new code and stores a flag. Z sees that
#         flag, serializes and calls: never the old code, though X told Z nothing.
# mutual  two CPUs patch a function for each other at the same time, on one page.
# crowd   one CPU patches, all others call.
# With 4 CPUs or more the last one stores data beside the functions all the while.
# The guest needs 2 CPUs; `chain` is left out with 2. The number of rounds is
# `as --defsym ROUNDS=N`. The immediates are aligned, so a patch is never torn.
#
# QEMU 7.2 (TCG) fails `chain`: a store that comes while the code is being translated is
# lost, and the old code runs for ever. Bochs 2.7 passes.

.include "lib/boot.inc"
.include "lib/apic.inc"
.include "lib/smp.inc"

.ifndef ROUNDS
.set ROUNDS, 100000
.endif
.set FEWER, ROUNDS / 5

    .code64
main64:
    call start_aps
    COUNT WAKE, 0x71
    sti
    mov cpu_count, %rax
    cmp $4, %eax
    jb 1f
    lea -1(%rax), %rdi
    mov %rdi, noise_cpu
    mov $noise, %esi
    call start_job
1:
    .macro TEST test:req, kind:req, rounds:req
    PRINT "\test, \kind: "
    movq $patch_\kind, patch
    movq $\rounds, rounds
    call \test
    mov stale, %rax
    call put_decimal
    PRINT " stale of "
    mov rounds, %rax
    call put_decimal
    PRINT ", early "
    mov early, %rax
    call put_decimal
    PRINT "\n"
    CHECK "\test, \kind: stale code", stale, $0
    CHECK "\test, \kind: gave up waiting", lost, $0
    movq $0, early
    .endm
    TEST order, store, ROUNDS
    TEST order, exchange, FEWER
    TEST order, string, FEWER
    TEST order, opcode, FEWER
    TEST order, locked, FEWER
    cmpq $3, cpu_count
    jb 2f
    TEST chain, store, FEWER
    TEST chain, exchange, FEWER
    TEST chain, locked, FEWER
2:  TEST mutual, store, FEWER
    TEST mutual, exchange, FEWER
    TEST crowd, store, FEWER / 4
    movq $1, quiet
    cmpq $0, noise_cpu
    je 3f
    mov noise_cpu, %rdi
    call finish_job
    PRINT "stores beside the code: "
    mov noise_cell, %rax
    call put_decimal
    PRINT "\n"
3:  FINISH "cross_mod"

# AWAIT memory, register: until memory = register; gives up for good in the end.
.macro AWAIT memory:req, value:req
    push %rcx
    mov $PATIENCE, %ecx
9985: cmpq \value, \memory
    je 9986f
    cmpq $0, lost
    jne 9986f
    pause
    dec %ecx
    jnz 9985b
    incq lost
9986: pop %rcx
.endm

# SERIALIZE: clobbers RAX, RBX, RCX, RDX.
.macro SERIALIZE
    xor %eax, %eax
    xor %ecx, %ecx
    cpuid
.endm

# The ways of patching: RDI = function, R12 = value for it to return. Clobber RAX to RSI.
patch_store:
    mov %r12d, 1(%rdi)
    ret
patch_exchange:
    mov %r12d, %eax
    xchg %eax, 1(%rdi)
    ret
patch_locked:                   # the aligned eight bytes: three before, b8, immediate
    lea -3(%rdi), %rsi
    mov (%rsi), %rax
1:  mov %eax, %ebx
    mov %r12, %rcx
    shl $32, %rcx
    or %rcx, %rbx
    lock cmpxchg %rbx, (%rsi)
    jne 1b
    ret
patch_string:                   # the whole function, byte by byte
    mov %r12d, template + 1
    mov $template, %esi
    mov $6, %ecx
    push %rdi
    rep movsb
    pop %rdi
    ret
patch_opcode:                   # the function becomes a jump to a copy, and comes back
    mov %r12d, 1(%rdi)
    movb $0xb8, (%rdi)
    bt $0, %r12d
    jnc 1f
    mov %r12d, 16 + 1(%rdi)
    movl $11, 1(%rdi)           # jmp to function + 16
    movb $0xe9, (%rdi)
1:  ret
    .data
template: .byte 0xb8, 0, 0, 0, 0, 0xc3
    .text

# order: CPU 0 is X, CPU 1 is Y.
order:
    call reset
    mov $1, %edi
    mov $order_y, %esi
    call start_job
    mov $1, %r12d
1:  mov $function, %edi
    call *patch
    mov %r12, flag
    AWAIT answer, %r12
    inc %r12
    cmp rounds, %r12
    jbe 1b
    mov $1, %edi
    jmp finish_job
order_y:
    mov $1, %r12d
1:  AWAIT flag, %r12
    SERIALIZE
    call function
    cmp %r12d, %eax
    je 2f
    incq stale
2:  call function               # and again, from wherever it is cached now
    cmp %r12d, %eax
    je 3f
    incq stale
3:  mov %r12, answer
    inc %r12
    cmp rounds, %r12
    jbe 1b
    ret

# chain: CPU 0 is X, CPU 1 is Y, CPU 2 is Z.
chain:
    call reset
    mov $1, %edi
    mov $chain_y, %esi
    call start_job
    mov $2, %edi
    mov $chain_z, %esi
    call start_job
    mov $1, %r12d
1:  mov $function, %edi
    call *patch
    AWAIT answer, %r12
    inc %r12
    cmp rounds, %r12
    jbe 1b
    mov $1, %edi
    call finish_job
    mov $2, %edi
    jmp finish_job
chain_y:
    mov $1, %r12d
1:  mov $10 * PATIENCE, %r13d    # a turn may take a few nanoseconds, and X no processor
2:  call function
    cmp %r12d, %eax
    je 3f
    incq early
    cmpq $0, lost
    jne 3f
    dec %r13d
    jnz 2b
    incq lost
3:  mov %r12, flag
    AWAIT answer, %r12
    inc %r12
    cmp rounds, %r12
    jbe 1b
    ret
chain_z:
    mov $1, %r12d
1:  AWAIT flag, %r12
    SERIALIZE
    call function
    cmp %r12d, %eax
    je 2f
    incq stale
2:  mov %r12, answer
    inc %r12
    cmp rounds, %r12
    jbe 1b
    ret

# mutual: CPU n patches functions[n] and calls functions[1 - n].
mutual:
    call reset
    mov $1, %edi
    mov $mutual_side, %esi
    call start_job
    call mutual_side
    mov $1, %edi
    jmp finish_job
mutual_side:
    mov %gs:CPU_INDEX, %r14
    mov %r14, %r15
    xor $1, %r15
    mov $1, %r12d
1:  mov functions(,%r14,8), %rdi
    call *patch
    mov %r12, flags(,%r14,8)
    AWAIT "flags(,%r15,8)", %r12
    SERIALIZE
    mov functions(,%r15,8), %rdi
    call *%rdi
    cmp %r12d, %eax
    je 2f
    lock incq stale
2:  mov %r12, answers(,%r14,8)
    AWAIT "answers(,%r15,8)", %r12
    inc %r12
    cmp rounds, %r12
    jbe 1b
    ret

# crowd: CPU 0 patches; all others but the noisy one call.
crowd:
    call reset
    mov cpu_count, %r13
    cmpq $0, noise_cpu
    je 1f
    dec %r13
1:  mov $1, %edi
2:  mov $crowd_member, %esi
    call start_job
    inc %edi
    cmp %r13d, %edi
    jb 2b
    mov $1, %r12d
3:  mov $function, %edi
    call *patch
    movq $0, answer
    mov %r12, flag
    lea -1(%r13), %r15
    AWAIT answer, %r15
    inc %r12
    cmp rounds, %r12
    jbe 3b
    mov $1, %edi
4:  call finish_job
    inc %edi
    cmp %r13d, %edi
    jb 4b
    ret
crowd_member:
    mov $1, %r12d
1:  AWAIT flag, %r12
    SERIALIZE
    call function
    cmp %r12d, %eax
    je 2f
    lock incq stale
2:  lock incq answer
    inc %r12
    cmp rounds, %r12
    jbe 1b
    ret

# Asleep between its stores, so that it takes no processor from those that wait.
noise:
    APIC_WRITE APIC_DIVIDE, $0xb
    APIC_WRITE APIC_TIMER, $0x20071
    APIC_WRITE APIC_INITIAL_COUNT, $200000
1:  incq noise_cell
    hlt
    cmpq $0, quiet
    je 1b
    APIC_WRITE APIC_TIMER, $0x10000
    ret

reset:
    movq $0, lost
    movq $0, stale
    movq $0, early
    movq $0, flag
    movq $0, answer
    movq $0, flags
    movq $0, flags + 8
    movq $0, answers
    movq $0, answers + 8
    mov $template, %esi
    movl $0, template + 1
    mov $function, %edi
    mov $6, %ecx
    rep movsb
    ret

    .balign 4096
    .skip 3, 0xcc
function:                       # the immediate is 4 bytes aligned
    mov $0, %eax
    ret
    .skip 10, 0xcc
    mov $0, %eax                # function + 16
    ret
    .skip 42, 0xcc
    .balign 64, 0xcc
    .skip 3, 0xcc
function_1:
    mov $0, %eax
    ret
    .balign 64, 0xcc
noise_cell: .quad 0
    .balign 4096

    .data
    .balign 8
functions: .quad function, function_1
    .bss
    .balign 64
flag: .quad 0
    .balign 64
answer: .quad 0
    .balign 64
flags: .skip 16
    .balign 64
answers: .skip 16
    .balign 64
stale: .quad 0
early: .quad 0
lost: .quad 0
rounds: .quad 0
patch: .quad 0
noise_cpu: .quad 0
quiet: .quad 0
