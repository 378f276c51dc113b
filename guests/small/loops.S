# loops: what is the same in every turn of a hot loop may be done once before it: looking at what a
# pointer points to, at where a register leads a call, at what a return finds on the stack. Here
# those change: between two calls of the loop, and within it.

.include "lib/boot.inc"
.include "lib/apic.inc"
.include "lib/smp.inc"
.include "lib/warm.inc"

.set TURNS, 100                 # of a loop in a call of it
.set ROUNDS, 6
.set ALIAS, 0x8000000000        # linear address of page_a or page_b

    .code64
main64:
    call map_alias
    call start_ticking
    mov $ROUNDS, %r15d
1:  call led
    call flagged
    call restored
    call overwritten
    call moving
    call placed
    call remapped_within
    call unmapped_within
    call protected_within
    dec %r15d
    jnz 1b
    call stop_ticking
    FINISH "loops"

map_alias:
    movabs $ALIAS, %rax
    shr $39, %rax
    movq $alias_pdpt + 3, boot_pml4(,%rax,8)
    movq $alias_pd + 3, alias_pdpt
    movq $alias_pt + 3, alias_pd
    movq $page_a + 3, alias_pt
    mov %cr0, %rax
    or $1 << 16, %rax           # WP
    mov %rax, %cr0
    ret
    .bss
    .balign 4096
alias_pdpt: .skip 4096
alias_pd: .skip 4096
alias_pt: .skip 4096
page_a: .skip 4096
page_b: .skip 4096
sum: .quad 0
    .text

.macro CHECKL name:req, actual:req, expected:req
    CHECK_MASK "\name", $0x7fffffff, \actual, \expected
.endm

plus_1: add $1, %ebx
    ret
plus_2: add $2, %ebx
    ret

# A register that the loop does not change leads a call, the next time elsewhere.
loop_led:
    xor %ebx, %ebx
    mov $TURNS, %ecx
1:  call *%rdi
    add $10, %ebx
    call *%r14
    dec %ecx
    jnz 1b
    mov %rbx, sum
    ret
loop_led_1:
    mov $plus_1, %edi
    mov $plus_1, %r14d
    jmp loop_led
led:
    WARM loop_led_1
    CHECK "both as always", sum, $12*TURNS
    mov $plus_2, %edi
    mov $plus_1, %r14d
    call loop_led
    CHECK "the first elsewhere", sum, $13*TURNS
    mov $plus_1, %edi
    mov $plus_2, %r14d
    call loop_led
    CHECK "the second elsewhere", sum, $13*TURNS
    ret

# The callee overwrites the flags, until another one reads those from before the loop.
loop_flagged:
    xor %ebx, %ebx
    mov $TURNS, %ecx
    mov $loop_flagged_turn, %esi
    jmp 1f                      # so that what is made of this ends where the loop begins
1:  bt $0, %r8d
    jmp *%rsi
loop_flagged_turn:
    call *%rdi
    dec %ecx                    # keeps the carry
    jnz loop_flagged_turn
    mov %rbx, sum
    ret
loop_flagged_1:
    mov $plus_1, %edi
    jmp loop_flagged
plus_carry:
    lea 1(%rbx), %ebx
    jnc 1f
    lea 2(%rbx), %ebx
1:  ret
flagged:
    WARM loop_flagged_1
    CHECK "no flags", sum, $TURNS
    mov $plus_carry, %edi
    mov $1, %r8d
    call loop_flagged
    CHECK "the flags of before", sum, $3*TURNS
    mov $plus_carry, %edi
    mov $0, %r8d
    call loop_flagged
    CHECK "other flags", sum, $TURNS
    ret

# The register has its value again at the end of each turn, but another one at the call.
loop_restored:
    xor %ebx, %ebx
    mov $TURNS, %ecx
1:  mov %rdi, %rsi
    mov called, %rdi
    call *%rdi
    mov %rsi, %rdi
    cmp called_changes_at, %rcx
    jne 2f
    movq $plus_2, called
2:  dec %ecx
    jnz 1b
    mov %rbx, sum
    ret
loop_restored_1:
    mov $plus_1, %edi
    jmp loop_restored
    .data
    .balign 8
called: .quad plus_1
called_changes_at: .quad 0
    .text
restored:
    movq $plus_1, called
    movq $0, called_changes_at
    WARM loop_restored_1
    CHECK "one", sum, $TURNS
    movq $TURNS / 2 + 1, called_changes_at
    call loop_restored_1
    CHECK "one becomes two", sum, $TURNS+TURNS/2
    movq $plus_1, called
    ret

# A callee overwrites a part of its return address, by RSP or by another pointer: with what is there
# already, until it is something else.
.macro LOOP_OVERWRITTEN way:req
loop_overwritten_\way:
    xor %ebx, %ebx
    mov %rsp, %rsi
    mov $TURNS, %ecx
1:  call overwriting_\way
back_\way:
    add $1, %ebx
    jmp 2f
    .balign 16
back_elsewhere_\way:
    add $100, %ebx
2:  dec %ecx
    jnz 1b
    sub %rsp, %rsi
    mov %rsi, stack_moved
    mov %rbx, sum
    ret
overwriting_\way:
    mov $back_\way, %eax
    mov $back_elsewhere_\way, %edx
    cmp overwritten_at, %rcx
    cmove %edx, %eax
.endm
    LOOP_OVERWRITTEN by_rsp
    mov %al, (%rsp)
    mov %ah, 1(%rsp)
    ret
    LOOP_OVERWRITTEN by_pointer
    mov %rsp, place
    mov place, %r8
    mov %ax, (%r8)
    ret
    .data
    .balign 8
overwritten_at: .quad 0
    .bss
place: .quad 0
stack_moved: .quad 0
    .text
overwritten:
    .irp way, by_rsp, by_pointer
    movq $0, overwritten_at
    WARM loop_overwritten_\way
    CHECK "returns as always, \way", sum, $TURNS
    movq $TURNS / 2, overwritten_at
    call loop_overwritten_\way
    CHECK "returns elsewhere once, \way", sum, $TURNS-1+100
    CHECK "stack, \way", stack_moved, $0
    .endr
    ret

# A pointer moves on, by what is not known before: each turn reads and writes elsewhere.
loop_moving:
    xor %ebx, %ebx
    mov $TURNS, %ecx
1:  add (%rdi), %ebx
    mov %ebx, 4(%rdi)
    call plus_1
    add %rdx, %rdi
    dec %ecx
    jnz 1b
    mov %rbx, sum
    ret
loop_moving_here:
    mov $place_edge - 8 * TURNS / 2, %edi
    mov $8, %edx
    mov $TURNS, %ecx
1:  mov %ecx, (%rdi)
    movl $0, 4(%rdi)
    add $8, %edi
    dec %ecx
    jnz 1b
    sub $8 * TURNS, %edi
    jmp loop_moving
moving:
    WARM loop_moving_here
    CHECK "sum of all places", sum, $TURNS*(TURNS+1)/2+TURNS
    CHECKL "first sum", place_edge-8*TURNS/2+4, $TURNS
    CHECKL "second sum", place_edge-8*TURNS/2+12, $TURNS+1+TURNS-1
    CHECKL "last sum", place_edge+8*TURNS/2-4, $TURNS*(TURNS+1)/2+TURNS-1
    ret

# What two pointers that the loop does not change point to: on one page, on two, across the edge.
loop_placed:
    xor %ebx, %ebx
    mov $TURNS, %ecx
1:  addl $1, (%rdi)
    add (%rdi), %ebx
    movl %ebx, 8(%rdi)
    call plus_1
    mov 8(%rdi), %ebx
    incl (%r14)
    dec %ecx
    jnz 1b
    mov %rbx, sum
    ret
loop_placed_here:
    mov $place_a, %edi
    mov $place_b, %r14d
clear_places:
    movl $0, (%rdi)
    movl $0, (%r14)
    jmp loop_placed
    .bss
    .balign 4096
    .skip 64
place_a: .skip 64
place_b: .skip 3968
place_edge: .skip 4096
    .text
placed:
    WARM loop_placed_here
    CHECK "sum of one place", sum, $TURNS*(TURNS+1)/2
    CHECK "first place", %rdi, $place_a
    CHECKL "counted up", place_a, $TURNS
    CHECKL "and the other", place_b, $TURNS
    .irp at, -4, -8, -2, -11
    mov $place_edge + \at, %edi
    mov $place_edge + 24 + \at, %r14d
    call clear_places
    CHECK "sum near the edge at \at", sum, $TURNS*(TURNS+1)/2
    CHECKL "counted up at \at", place_edge+\at, $TURNS
    CHECKL "and the other at \at", place_edge+24+\at, $TURNS
    .endr
    # both the same
    mov $place_a, %edi
    mov $place_a, %r14d
    call clear_places
    CHECKL "one place by two pointers", place_a, $2*TURNS
    ret

# While a loop waits, the timer's handler changes what it looks at: a mapping.
# It ends when it sees 2 there.
loop_waiting:
    xor %ebx, %ebx
1:  call plus_1
    mov (%r12), %eax
waiting_store:
    mov %eax, 8(%r12)
    cmp $2, %eax
    jne 1b
    ret
loop_reading:
    xor %ebx, %ebx
1:  call plus_1
reading_load:
    cmpl $2, (%r12)
    jne 1b
    ret

# LATER routine: has the timer's handler call it, once, at the tick after TICKS.
.macro LATER routine:req
    movl $0, hits + 4 * TICK
    movq $\routine, later
    movq $tick_later, handlers + 8 * TICK
.endm
tick_later:
    push %rdi
    call count_interrupt
    pop %rdi
    cmpl $TICKS, hits + 4 * TICK
    jbe 1f
    movq $count_interrupt, handlers + 8 * TICK
    call *later
1:  ret
    .data
    .balign 8
later: .quad 0
    .text

remap:
    movq $page_b + 3, alias_pt
    invlpg (%r12)
    ret
unmap:
    movq $0, alias_pt
    invlpg (%r12)
    ret
protect:
    movq $page_a + 1, alias_pt
    invlpg (%r12)
    ret
map_again:
    movq $page_a + 3, alias_pt
    invlpg (%r12)
    ret

remapped_within:
    movabs $ALIAS, %r12
    movq $1, page_a
    movq $2, page_b
    movq $0, page_a + 8
    movq $0, page_b + 8
    LATER remap
    call loop_waiting
    CHECKL "seen in the page before", page_a+8, $1
    CHECKL "seen in the page mapped now", page_b+8, $2
    call map_again
    ret

unmapped_within:
    movabs $ALIAS, %r12
    movq $1, page_a
    LATER unmap
    TRY 1f
    call loop_reading
1:  sti
    TRIED "unmapped under a loop", 14, 0, reading_load
    CHECK "where", f_cr2, %r12
    call map_again
    ret

protected_within:
    movabs $ALIAS, %r12
    movq $1, page_a
    LATER protect
    TRY 1f
    call loop_waiting
1:  sti
    TRIED "protected under a loop", 14, 3, waiting_store
    call map_again
    ret
