# paths: loops that are executed so long, with a timer that interrupts them, that a monitor may
# have made one piece of what lies in them; then something in them changes. What the path was made
# of is taken back piece by piece: a branch's direction, a call's target, a return address, the
# code of the other pages, their mapping, the memory that it touches.

.include "lib/boot.inc"
.include "lib/apic.inc"
.include "lib/smp.inc"
.include "lib/warm.inc"

.set TURNS, 100                 # of a loop in a call of it
.set ROUNDS, 6
.set ALIAS, 0x8000000000        # linear address of far_a or far_b
.set HOLE, ALIAS + 0x2000

    .code64
main64:
    call map_alias
    call start_ticking
    mov $ROUNDS, %r15d
1:  call rewritten
    call remapped
    call turned
    call redirected
    call returned
    call strayed
    call faulting
    dec %r15d
    jnz 1b
    call stop_ticking
    FINISH "paths"

map_alias:
    movabs $ALIAS, %rax
    shr $39, %rax
    movq $alias_pdpt + 3, boot_pml4(,%rax,8)
    movq $alias_pd + 3, alias_pdpt
    movq $alias_pt + 3, alias_pd
    movq $far_a + 3, alias_pt
    movq $data_page + 3, alias_pt + 8
    movq $0, alias_pt + 16
    ret
    .bss
    .balign 4096
alias_pdpt: .skip 4096
alias_pd: .skip 4096
alias_pt: .skip 4096
data_page: .skip 4096
sum: .quad 0
    .text

# The callee lies on another page; it returns what is to be added.
loop_far:
    movabs $ALIAS, %r12
    xor %ebx, %ebx
    mov $TURNS, %ecx
1:  call *%r12
    add %eax, %ebx
    dec %ecx
    jnz 1b
    mov %rbx, sum
    ret

    .balign 4096
far_a:
    mov $1, %eax
    ret
    .balign 4096
far_b:
    mov $1000, %eax
    ret
    .balign 4096
loop_near:
    xor %ebx, %ebx
    mov $TURNS, %ecx
1:  call near
    add %eax, %ebx
    dec %ecx
    jnz 1b
    mov %rbx, sum
    ret
near:
    mov $3, %eax
    ret

# Code of the path is rewritten: the callee's immediate, its opcode, an instruction behind it.
rewritten:
    WARM loop_near
    CHECK "before", sum, $3*TURNS
    movl $5, near + 1
    call loop_near
    CHECK "immediate of the callee", sum, $5*TURNS
    movl $3, near + 1
    WARM loop_near
    CHECK "and back", sum, $3*TURNS
    movl $0x90c0ff48, near      # inc %rax, nop; the rest of the immediate is add %al, (%rax)
    movb $0xc3, near + 3
    mov $0, %eax
    call loop_near              # 1 is added, then 2 and so on
    CHECK "opcode of the callee", sum, $TURNS*(TURNS+1)/2
    movl $0x000003b8, near
    call loop_near
    CHECK "opcode back", sum, $3*TURNS
    WARM loop_far
    CHECK "far before", sum, $TURNS
    movl $7, far_a + 1
    call loop_far
    CHECK "code on the other page", sum, $7*TURNS
    movl $1, far_a + 1
    call loop_far
    CHECK "code on the other page, back", sum, $TURNS
    ret

# Another page is mapped where the path goes.
remapped:
    WARM loop_far
    CHECK "first page", sum, $TURNS
    movabs $ALIAS, %r12
    movq $far_b + 3, alias_pt
    invlpg (%r12)
    call loop_far
    CHECK "second page", sum, $1000*TURNS
    movq $far_a + 3, alias_pt
    mov %cr3, %rax
    mov %rax, %cr3
    call loop_far
    CHECK "first page again", sum, $TURNS
    # no page at all
    movq $0, alias_pt
    invlpg (%r12)
    TRY 1f
    call loop_far
1:  sti                         # not so behind a fault
    movq $0, fault_resume
    CHECK "no page: vector", f_vec, $14
    CHECK "no page: error code", f_err, $0x10
    CHECK "no page: saved rip", f_rip, %r12
    CHECK "what was done before", %rcx, $TURNS
    CHECK "and added", %rbx, $0
    movq $far_a + 3, alias_pt
    invlpg (%r12)
    ret

# The branches go the other way.
loop_turned:
    xor %ebx, %ebx
    mov $TURNS, %ecx
1:  testb $1, turn
    jz 2f
    add $10, %ebx
    jmp 3f
2:  add $1, %ebx
3:  testb $2, turn
    jnz 4f
    add $100, %ebx
4:  cmp $TURNS / 2 + 1, %ecx
    jne 5f
    mov turn_later, %al
    mov %al, turn
5:  dec %ecx
    jnz 1b
    mov %rbx, sum
    ret
    .data
turn: .byte 0
turn_later: .byte 0
    .text
turned:
    xor %edx, %edx
1:  mov %dl, turn
    mov %dl, turn_later
    WARM loop_turned
    mov $1, %eax
    mov $10, %ecx
    bt $0, %edx
    cmovc %ecx, %eax
    lea 100(%rax), %ecx
    bt $1, %edx
    cmovnc %ecx, %eax
    imul $TURNS, %eax
    mov %rax, %rsi
    CHECK "both as always", sum, %rsi
    # in the middle of the loop it changes
    mov %dl, %al
    xor $3, %al
    mov %al, turn_later
    call loop_turned
    CHECK "turned midway", sum, $(1+10+100)*TURNS/2
    inc %edx
    cmp $4, %edx
    jb 1b
    ret

# Calls and jumps through pointers that change midway.
loop_redirected:
    xor %ebx, %ebx
    mov $TURNS, %ecx
    mov $plus_1, %edi
1:  call *%rdi
    jmp *pointer
back_one:
    add $100, %ebx
    jmp 2f
back_two:
    add $200, %ebx
2:  cmp redirect_at, %rcx
    jne 3f
    mov $plus_2, %edi
    movq $back_two, pointer
3:  dec %ecx
    jnz 1b
    mov %rbx, sum
    ret
plus_1: add $1, %ebx
    ret
plus_2: add $2, %ebx
    ret
    .data
    .balign 8
pointer: .quad back_one
redirect_at: .quad 0
    .text
redirected:
    movq $back_one, pointer
    movq $0, redirect_at
    WARM loop_redirected
    CHECK "one way", sum, $101*TURNS
    movq $TURNS / 2 + 1, redirect_at
    call loop_redirected
    CHECK "two ways", sum, $(101+202)*TURNS/2
    movq $back_two, pointer
    movq $TURNS, redirect_at
    WARM loop_redirected
    CHECK "the other way", sum, $202*TURNS-1
    ret

# A callee returns elsewhere, and with more taken from the stack.
loop_returned:
    xor %ebx, %ebx
    mov %rsp, %rsi
    mov $TURNS, %ecx
1:  push $1
    push $2
    call callee
    add $1, %ebx
    jmp 3f
2:  add $1000, %ebx
3:  dec %ecx
    jnz 1b
    sub %rsp, %rsi
    mov %rsi, stack_moved
    mov %rbx, sum
    ret
callee:
    cmp elsewhere_at, %rcx
    jne 1f
    movq $2b, (%rsp)
1:  ret $16
    .data
    .balign 8
elsewhere_at: .quad 0
    .bss
stack_moved: .quad 0
    .text
returned:
    movq $0, elsewhere_at
    WARM loop_returned
    CHECK "returns as always", sum, $TURNS
    CHECK "stack", stack_moved, $0
    movq $TURNS / 2, elsewhere_at
    call loop_returned
    CHECK "returned elsewhere once", sum, $TURNS-1+1000
    CHECK "stack after that", stack_moved, $0
    ret

# The stack pointer leads to another page, and the accesses cross pages.
loop_strayed:
    xor %ebx, %ebx
    mov $TURNS, %ecx
1:  mov (%rdi), %eax
    add %eax, %ebx
    movl %ecx, 4(%rdi)
    add 4(%rdi), %ebx
    sub %ecx, %ebx
    call near
    add %rdx, %rdi
    dec %ecx
    jnz 1b
    mov %rbx, sum
    ret
strayed:
    mov $data_page, %edi
    mov $1024, %ecx
    mov $9, %eax
    rep stosl
    mov $data_page, %edi
    mov $0, %edx
    WARM loop_strayed_here
    CHECK "one place", sum, $9*TURNS
    mov $stray_page - 4, %edi   # each access lies on two pages or the next
    movl $11, (%rdi)
    call loop_strayed
    CHECK "across the edge", sum, $11*TURNS
    mov $stray_page - 2, %edi   # and this one on both
    movl $17, (%rdi)
    call loop_strayed
    CHECK "on the edge", sum, $17*TURNS
    mov $stray_page - 8 * TURNS / 2, %edi
    mov $8, %edx
    mov %edi, %esi
    mov $TURNS, %ecx
1:  movl $13, (%rsi)
    movl $0, 4(%rsi)
    add $8, %esi
    dec %ecx
    jnz 1b
    call loop_strayed
    CHECK "over the edge", sum, $13*TURNS
    ret
loop_strayed_here:
    mov $data_page, %edi
    xor %edx, %edx
    jmp loop_strayed
    .bss
    .balign 4096
    .skip 4096
stray_page: .skip 4096
    .text

# A fault in the middle, with exact state.
loop_faulting:
    xor %ebx, %ebx
    mov $TURNS, %ecx
1:  add $1, %ebx
    call near
    cmp fault_at, %rcx
    cmove %rdx, %rdi
    add $1, %ebx
load_of_path:
    mov (%rdi), %eax
    add $1, %ebx
    dec %ecx
    jnz 1b
    ret
    .data
    .balign 8
fault_at: .quad 0
    .text
loop_faulting_here:
    mov $data_page, %edi
    mov %rdi, %rdx
    jmp loop_faulting
faulting:
    movq $0, fault_at
    WARM loop_faulting_here
    CHECK "no fault", %rbx, $3*TURNS
    movq $TURNS / 2, fault_at
    movabs $HOLE, %rdx
    mov $data_page, %edi
    TRY 1f
    call loop_faulting
1:  sti
    TRIED "fault in a path", 14, 0, load_of_path
    CHECK "turns left", %rcx, $TURNS/2
    CHECK "turns done", %rbx, $3*(TURNS/2)+2
    CHECK "where to", %rdi, %rdx
    mov %cr2, %rax
    CHECK "CR2", %rax, %rdx
    ret
