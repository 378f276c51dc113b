# selfmod: code that a CPU changes for itself. A store into an instruction that is not
# yet executed takes effect without any serializing instruction (SDM volume 3, 12.6), be
# it the very next one; stores beside code must not cost it its life.

.include "lib/boot.inc"

.set ROUNDS, 2000
.set ALIAS, 0x8000000000        # another linear address of code_area

    .code64
main64:
    call next_instruction
    call same_block
    call loop_body
    call data_beside_code
    call string_over_code
    call kinds_of_store
    call alias
    call page_edge
    call overlapping
    call remapped
    call generated
    call patched_by_handler
    call stack_in_code_page
    FINISH "selfmod"

# The immediate of the next instruction is stored right before it.
next_instruction:
    mov $ROUNDS, %ebx
1:  mov %ebx, 2f + 1
2:  mov $0, %eax
    CHECK "next instruction, dword", %rax, %rbx
    mov %bl, 3f + 1
3:  mov $0, %al
    mov %rbx, %rcx
    CHECK_MASK "next instruction, byte", $0xff, %rax, %rbx
    dec %ebx
    jnz 1b
    # the opcode itself: inc becomes dec and back
    mov $ROUNDS, %ebx
    xor %ecx, %ecx
4:  mov $0xc1ff, %eax           # inc %ecx
    bt $0, %ebx
    jnc 5f
    mov $0xc9ff, %eax           # dec %ecx
5:  movw %ax, 6f
6:  ud2
    dec %ebx
    jnz 4b
    CHECK "next instruction, opcode", %rcx, $0
    ret

# Some instructions ahead in the same straight line, also shorter and longer ones.
same_block:
    movb $0xff, 1f              # inc %ecx
    xor %ecx, %ecx
    add $1, %ecx
    mov %ecx, %edx
1:  .byte 0x0f, 0xc1            # ud
    CHECK "ahead in the block", %rcx, $2
    movb $0x0f, 1b
    xor %ecx, %ecx
    movl $0x90909090, 2f        # four for one
    lea 1(%rcx), %ecx
2:  mov $0x90901234, %ecx
    CHECK_MASK "ahead, nops over the opcode", $0xff, %rcx, $1
    movl $0x901234b9, 2b
    # one that jumps over a trap which the store puts there
    movw $0x02eb, 3f
    nop
    nop
3:  ud2
    ud2
    movw $0x0b0f, 3b
    CHECK "ahead, a jump", $1, $1
    ret

# A loop whose body changes an instruction of itself that ran already.
loop_body:
    movl $0, 2f + 1
    xor %ebx, %ebx
    xor %edi, %edi
    mov $ROUNDS, %ecx
1:
2:  mov $0, %eax
    cmp %edi, %eax
    je 3f
    inc %ebx
3:  inc %edi
    mov %edi, 2b + 1            # backwards
    dec %ecx
    jnz 1b
    CHECK "loop body: stale rounds", %rbx, $0
    ret

# A counter between instructions, on the same line.
data_beside_code:
    movq $0, 3f
    mov $20000, %ecx
1:  incq 3f
    jmp 2f
3:  .quad 0
2:  dec %ecx
    jnz 1b
    CHECK "counter beside code", 3b, $20000
    ret

string_over_code:
    # nops over traps that follow
    mov $ROUNDS / 10, %ebx
1:  mov $8, %ecx
    mov $2f, %edi
    mov $0x0b0f, %eax
    mov $4, %ecx
    rep stosw                   # four ud2
    mov $2f, %edi
    mov $0x90, %al
    mov $8, %ecx
    rep stosb
2:  .skip 8, 0x0f
    dec %ebx
    jnz 1b
    CHECK "rep stosb over what follows", $1, $1
    # code copied over what follows
    mov $ROUNDS / 10, %ebx
3:  mov %ebx, templates + 1
    mov $templates, %esi
    mov $4f, %edi
    mov $5, %ecx
    rep movsb
4:  .skip 5, 0x0f
    CHECK "rep movsb over what follows", %rax, %rbx
    dec %ebx
    jnz 3b
    # the same, one iteration that ends in the middle of an instruction
    mov $0x42, %al
    mov $5f + 1, %edi
    mov $1, %ecx
    rep stosb
5:  mov $0, %eax
    CHECK "rep stosb into the immediate", %rax, $0x42
    # downwards
    mov $6f + 7, %edi
    mov $0x90, %al
    mov $8, %ecx
    std
    rep stosb
6:  .skip 8, 0x0f
    cld
    CHECK "rep stosb downwards", $1, $1
    ret
    .data
templates: mov $0, %eax         # copied
    .text

# PATCH "name", value, what stores it...: a function that was called before is changed.
.macro PATCH name:req, insn:vararg
    mov $500, %ebx
9981: mov %ebx, %eax
    xor %edx, %edx
    mov $function + 1, %edi
    mov $value, %esi
    mov %ebx, value
    \insn
    call function
    CHECK "patched by \name", %rax, %rbx
    dec %ebx
    jnz 9981b
.endm
kinds_of_store:
    PATCH "mov dword", mov %eax, (%rdi)
    PATCH "movsd", movsl
    PATCH "stosd", stosl
    PATCH "xchg", xchg %eax, (%rdi)
    PATCH "movd", call store_movd
    PATCH "movnti", movnti %eax, (%rdi)
    PATCH "add", call store_add
    PATCH "lock xadd", call store_xadd
    PATCH "lock cmpxchg", call store_cmpxchg
    PATCH "lock cmpxchg8b", call store_cmpxchg8b
    PATCH "push", call store_push
    PATCH "fistp", call store_fistp
    PATCH "movups", call store_movups
    PATCH "pop", call store_pop
    PATCH "bytes", call store_bytes
    PATCH "lock btc", call store_btc
    ret
store_movd:
    movd %eax, %xmm0
    movd %xmm0, (%rdi)
    ret
store_add:
    sub (%rdi), %eax
    add %eax, (%rdi)
    ret
store_xadd:
    sub (%rdi), %eax
    lock xadd %eax, (%rdi)
    ret
store_cmpxchg:
    mov %eax, %ecx
    mov (%rdi), %eax
    lock cmpxchg %ecx, (%rdi)
    ret
store_cmpxchg8b:
    push %rbx
    mov %eax, %ebx
    mov (%rdi), %eax
    mov 4(%rdi), %edx
    mov %edx, %ecx
    lock cmpxchg8b (%rdi)
    pop %rbx
    ret
store_push:                     # b8 imm32 c3, pushed as the quadword at the function
    shl $8, %rax
    mov $0xb8, %al
    mov $0xc3, %ecx
    shl $40, %rcx
    or %rcx, %rax
    mov %rsp, %rcx
    lea 7(%rdi), %rsp
    push %rax
    mov %rcx, %rsp
    ret
store_pop:
    mov %eax, %eax
    mov $0xc3, %ecx
    shl $32, %rcx
    or %rcx, %rax
    push %rax
    popq (%rdi)
    ret
store_fistp:
    fildl (%rsi)
    fistpl (%rdi)
    ret
store_movups:
    movups -1(%rdi), %xmm0
    movups %xmm0, bytes16
    mov %eax, bytes16 + 1
    movups bytes16, %xmm0
    movups %xmm0, -1(%rdi)
    ret
store_bytes:
    mov %al, (%rdi)
    mov %ah, 1(%rdi)
    movw $0, 2(%rdi)
    ret
store_btc:
    movl $0, (%rdi)
    xor %ecx, %ecx
1:  bt %ecx, %eax
    jnc 2f
    lock btcl %ecx, (%rdi)
2:  inc %ecx
    cmp $32, %ecx
    jb 1b
    ret

# Stores through another linear address, and execution there.
alias:
    movq $alias_pdpt + 3, boot_pml4 + 8
    movq $alias_pd + 3, alias_pdpt
    movq $alias_pt + 3, alias_pd
    movq $code_area + 3, alias_pt
    movq $code_area + 0x1003, alias_pt + 8
    movq $code_area + 0x2003, alias_pt + 16
    movl $0x000000b8, code_area         # mov $imm32, %eax; ret
    movl $0xc300, code_area + 4
    movabs $ALIAS, %r12
    mov $ROUNDS / 4, %ebx
1:  mov %ebx, 1(%r12)
    mov $code_area, %eax
    call *%rax
    CHECK "stored at the alias, run at home", %rax, %rbx
    lea 7(%rbx), %ecx
    mov %ecx, code_area + 1
    call *%r12
    CHECK "stored at home, run at the alias", %rax, %rcx
    dec %ebx
    jnz 1b
    ret

# Stores and instructions across the edge of a page.
page_edge:
    movq $0, code_area + 0xff8          # data up to the edge, code from it on
    movl $0x000000b8, code_area + 0x1000
    movl $0xc300, code_area + 0x1004
    mov $ROUNDS / 4, %ebx
1:  mov %rbx, %rax
    shl $40, %rax
    movabs $0xb811111111, %rcx
    or %rcx, %rax
    mov %rax, code_area + 0xffc         # four bytes of data, b8, three of the immediate
    mov $code_area + 0x1000, %eax
    call *%rax
    CHECK "store across, code behind the edge", %rax, %rbx
    dec %ebx
    jnz 1b
    # code up to the edge, data behind it
    movl $0xc3000000, code_area + 0xffc
    movb $0xb8, code_area + 0xffa
    mov $ROUNDS / 4, %ebx
2:  # the immediate at 0xffb to 0xffe, the return at 0xfff
    mov %bl, code_area + 0xffb
    movb $0, code_area + 0xffd
    movabs $0x33333333c3000000, %rcx
    mov %bh, %cl
    mov %rcx, code_area + 0xffc         # across: immediate, ret, data
    mov $code_area + 0xffa, %eax
    call *%rax
    CHECK "store across, code before the edge", %rax, %rbx
    dec %ebx
    jnz 2b
    # an instruction across the edge, patched in either page
    movb $0xb8, code_area + 0xffe
    movb $0xc3, code_area + 0x1003
    mov $ROUNDS / 4, %ebx
3:  movl %ebx, code_area + 0xfff
    mov $code_area + 0xffe, %eax
    call *%rax
    CHECK "instruction across, all of it", %rax, %rbx
    movb $0x55, code_area + 0x1001      # bits 23:16 of the immediate
    mov $code_area + 0xffe, %eax
    call *%rax
    mov %ebx, %ecx
    or $0x550000, %ecx
    CHECK "instruction across, second page", %rax, %rcx
    movb $0x77, code_area + 0xfff
    mov $code_area + 0xffe, %eax
    call *%rax
    mov $0x77, %cl
    CHECK "instruction across, first page", %rax, %rcx
    dec %ebx
    jnz 3b
    ret

# One byte sequence, entered at two places.
overlapping:
    mov $code_area + 0x800, %edi
    movabs $0xc3909042b0b8, %rax        # b8 b0 42 90 90 c3: mov eax, ... or mov al, 0x42
    mov %rax, (%rdi)
    mov $ROUNDS / 10, %ebx
1:  call *%rdi
    mov $0x909042b0, %ecx
    CHECK "entered at the start", %rax, %rcx
    xor %eax, %eax
    lea 1(%rdi), %rcx
    call *%rcx
    CHECK "entered inside", %rax, $0x42
    dec %ebx
    jnz 1b
    mov $0x17, %al                      # both views see a store
    mov %al, 2(%rdi)
    xor %eax, %eax
    lea 1(%rdi), %rcx
    call *%rcx
    CHECK "entered inside, patched", %rax, $0x17
    call *%rdi
    mov $0x909017b0, %ecx
    CHECK "entered at the start, patched", %rax, %rcx
    ret

# The page behind a linear address is exchanged.
remapped:
    movl $0x000001b8, code_area
    movl $0xc300, code_area + 4
    movl $0x000002b8, code_area + 0x2000
    movl $0xc300, code_area + 0x2004
    movabs $ALIAS, %r12
    mov $ROUNDS / 10, %ebx
1:  movq $code_area + 3, alias_pt
    invlpg (%r12)
    call *%r12
    CHECK "first page", %rax, $1
    movq $code_area + 0x2003, alias_pt
    invlpg (%r12)
    call *%r12
    CHECK "second page", %rax, $2
    dec %ebx
    jnz 1b
    movq $code_area + 3, alias_pt
    mov %cr3, %rax
    mov %rax, %cr3
    call *%r12
    CHECK "first page again", %rax, $1
    ret

# A function of another length and content each time, at the same place.
generated:
    mov $ROUNDS / 2, %ebx
1:  mov $code_area + 0x400, %edi
    mov $0xb8, %al
    stosb
    mov %ebx, %eax
    stosl
    mov %ebx, %ecx
    and $31, %ecx
    mov %ecx, %esi
    jz 3f
2:  mov $0x01c083, %eax                 # add $1, %eax
    stosl
    dec %edi
    dec %ecx
    jnz 2b
3:  mov $0xc3, %al
    stosb
    mov $code_area + 0x400, %eax
    call *%rax
    add %ebx, %esi
    CHECK "generated code", %rax, %rsi
    dec %ebx
    jnz 1b
    ret

# An exception handler replaces the faulting instruction.
patched_by_handler:
    movq $replace, handlers + 8 * 6
    mov $ROUNDS / 10, %ebx
    xor %ecx, %ecx
1:  movw $0x0b0f, 2f
2:  ud2
    inc %ecx
    dec %ebx
    jnz 1b
    movq $0, handlers + 8 * 6
    CHECK "replaced by the handler", %rcx, $ROUNDS/10
    CHECK "the handler ran each time", replaced, $ROUNDS/10
    ret
replace:
    mov FRAME_RIP(%rdi), %rax
    movw $0x9066, (%rax)
    incq replaced
    ret

# Pushes, calls and returns on a stack in the page of the running code.
stack_in_code_page:
    mov %rsp, %r12
    mov $5f, %esp
    mov $ROUNDS, %ebx
    xor %ecx, %ecx
1:  call 3f
    push %rbx
    pop %rax
    cmp %eax, %ebx
    je 2f
    inc %ecx
2:  dec %ebx
    jnz 1b
    jmp 6f
3:  pushfq
    popfq
    ret
    .skip 64
5:  nop
6:  mov %r12, %rsp
    CHECK "stack in the code page", %rcx, $0
    ret

    .balign 64
function:
    mov $0, %eax
    ret
    .skip 16, 0xcc

    .bss
    .balign 4096
code_area: .skip 0x3000
alias_pdpt: .skip 4096
alias_pd: .skip 4096
alias_pt: .skip 4096
bytes16: .skip 16
value: .quad 0
replaced: .quad 0
