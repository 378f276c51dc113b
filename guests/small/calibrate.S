# calibrate: the TSC's rate found with the interval timer, the way operating systems do it
# when they start: load channel 2, read the TSC, poll OUT at port 0x61 and read the TSC after
# every poll that finds it low. Systems drop a round in which two readings were far apart,
# and believe the shortest of the others. So a round may be too long but not too short, not
# even when the CPU stood still between the load and the first reading, or between the last
# reading and the poll that finds OUT high. The reference is the PM timer over all rounds.

.include "lib/boot.inc"
.include "lib/pm_timer.inc"

.set ROUNDS, 150
.set LATCH, 11932               # 10 ms
.set PM_TICKS, 3 * LATCH        # the PM timer's rate is three times the interval timer's

    .code64
main64:
    call find_pm_timer
    cmpw $0, pm_port
    je no_reference
    call read_both
    mov %rax, first_tsc
    movq $0, pm_total
    mov $ROUNDS, %ebx
1:  call calibrate_round
    call read_both
    dec %ebx
    jnz 1b
    sub first_tsc, %rax
    mov $PM_TICKS, %ecx
    mul %rcx
    divq pm_total
    mov %rax, %rbx              # 10 ms in TSC
    PRINT "TSC per 10 ms: "
    call put_decimal
    PRINT ", shortest: "
    mov shortest, %rax
    call put_decimal
    PRINT "\n"
    # The last reading of a round is one poll early.
    imul $95, %rbx, %rax
    xor %edx, %edx
    mov $100, %ecx
    div %rcx
    xor %edi, %edi
    cmp %rax, shortest
    adc $0, %edi
    CHECK "a round is too short", %rdi, $0
    FINISH "calibrate"
no_reference:
    PRINT "no PM timer found\n"
    FINISH "calibrate"

# read_tsc: RAX. Clobbers RDX.
read_tsc:
    rdtsc
    shl $32, %rdx
    or %rdx, %rax
    ret

# read_both: RAX = the TSC; the PM timer's ticks since the last call go to pm_total. The timer
# has 24 bits, so calls are less than 4.6 seconds apart. Clobbers RDX.
read_both:
    mov pm_port, %dx
    inl %dx, %eax
    mov %eax, %edx
    sub pm_last, %eax
    mov %edx, pm_last
    and $0xffffff, %eax
    add %rax, pm_total
    jmp read_tsc

# One round. R8: its first reading, R9: the last one.
calibrate_round:
    inb $0x61, %al
    and $0xfd, %al
    or $1, %al
    outb %al, $0x61             # speaker off, gate high
    mov $0xb0, %al              # channel 2, both bytes, mode 0
    outb %al, $0x43
    mov $LATCH & 0xff, %al
    outb %al, $0x42
    mov $LATCH >> 8, %al
    outb %al, $0x42
    call read_tsc
    mov %rax, %r8
    mov %rax, %r9
1:  inb $0x61, %al
    test $0x20, %al
    jnz 2f
    call read_tsc
    mov %rax, %r9
    jmp 1b
2:  sub %r8, %r9
    cmp shortest, %r9
    jae 3f
    mov %r9, shortest
3:  ret

    .data
    .balign 8
shortest: .quad -1

    .bss
    .balign 8
first_tsc: .quad 0
pm_total: .quad 0
pm_last: .long 0
