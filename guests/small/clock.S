# clock: the clocks of a PC agree roughly, and the interval timer interrupts through the
# 8259 and through the I/O APIC.
#
# Bounds are generous (a factor of two for interrupts, a fifth for clocks): hosts are busy.
# The power-management timer is found through the ACPI tables; without it (no RSDP below
# 1 MiB) its checks are left out. Runs for about three seconds.

.include "lib/boot.inc"
.include "lib/apic.inc"
.include "lib/pm_timer.inc"

.set PIT_HZ, 1193182
.set SLICE, PIT_HZ / 50         # 20 ms
.set PIC_BASE, 0x20
.set IO_APIC, 0xfec00000

    .code64
main64:
    call apic_enable
    call pit_against_tsc
    call find_pm_timer
    call pm_timer
    call real_time_clock
    call counter_modes
    call through_8259
    call through_io_apic
    FINISH "clock"

# read_tsc: RAX. Clobbers RDX.
read_tsc:
    rdtsc
    shl $32, %rdx
    or %rdx, %rax
    ret

# BETWEEN "name", register, low, high
.macro BETWEEN name:req, value:req, low:req, high:req
    mov \value, %r8
    mov \low, %r9
    mov \high, %r10
    call between
    CHECK "\name", %rax, $1
    cmp $1, %eax
    je 9989f
    PRINT "     \name: "
    mov %r8, %rax
    call put_decimal
    PRINT " not within "
    mov %r9, %rax
    call put_decimal
    PRINT " to "
    mov %r10, %rax
    call put_decimal
    PRINT "\n"
9989:
.endm
between:
    xor %eax, %eax
    cmp %r9, %r8
    jb 1f
    cmp %r10, %r8
    ja 1f
    inc %eax
1:  ret

# wait_slice: 20 ms by channel 2, started through port 0x61, mode 0, polled at its output.
wait_slice:
    push %rax
    inb $0x61, %al
    and $0xfc, %al
    outb %al, $0x61             # gate low, speaker off
    mov $0xb0, %al              # channel 2, both bytes, mode 0
    outb %al, $0x43
    mov $SLICE & 0xff, %al
    outb %al, $0x42
    mov $SLICE >> 8, %al
    outb %al, $0x42
    inb $0x61, %al
    or $1, %al
    outb %al, $0x61
1:  inb $0x61, %al
    test $0x20, %al
    jz 1b
    pop %rax
    ret

# shortest_slice: RAX = TSC over the shortest of ECX slices: stalls only lengthen them. Clobbers RBX,
# RCX, RDX, RSI.
shortest_slice:
    mov $-1, %rsi
1:  call read_tsc
    mov %rax, %rbx
    call wait_slice
    call read_tsc
    sub %rbx, %rax
    cmp %rsi, %rax
    cmovb %rax, %rsi
    loop 1b
    mov %rsi, %rax
    ret

pit_against_tsc:
    call wait_slice
    mov $4, %ecx
    call shortest_slice
    mov %rax, slice_tsc
    mov $4, %ecx
    call shortest_slice
    mov slice_tsc, %rcx
    mov %rcx, %rbx
    shr %rbx
    shl %rcx
    BETWEEN "slices of the PIT in TSC, against earlier ones", %rax, %rbx, %rcx
    mov %rax, %rbx
    PRINT "TSC per 20 ms: "
    mov slice_tsc, %rax
    call put_decimal
    PRINT "\n"
    # never backwards
    mov $10000, %ecx
    xor %ebx, %ebx
    xor %edi, %edi
2:  call read_tsc
    cmp %rbx, %rax
    adc $0, %edi
    mov %rax, %rbx
    loop 2b
    CHECK "TSC goes backwards", %rdi, $0
    ret

# pm_elapsed: RAX = ticks since EBX, modulo 2^24. Clobbers RDX.
pm_elapsed:
    mov pm_port, %dx
    inl %dx, %eax
    sub %ebx, %eax
    and $0xffffff, %eax
    ret

pm_timer:
    cmpw $0, pm_port
    je 9f
    mov $-1, %esi               # the shortest of five slices
    mov $5, %ecx
1:  mov pm_port, %dx
    inl %dx, %eax
    mov %eax, %ebx
    call wait_slice
    call pm_elapsed
    cmp %esi, %eax
    cmovb %eax, %esi
    loop 1b
    mov %esi, %eax
    BETWEEN "PM timer over 20 ms of the PIT", %rax, $PM_HZ/50*8/10, $PM_HZ/50*15/10
    ret
9:  PRINT "no PM timer found\n"
    ret

# cmos: AL = register. Returns AL.
cmos:
    outb %al, $0x70
    inb $0x71, %al
    ret
# second: RAX = the seconds register, read outside an update.
second:
1:  mov $10, %al
    call cmos
    test $0x80, %al
    jnz 1b
    xor %eax, %eax
    call cmos
    movzbl %al, %eax
    ret
# next_second: waits until the seconds change.
next_second:
    call second
    mov %eax, %edi
1:  call second
    cmp %edi, %eax
    je 1b
    ret

real_time_clock:
    .irp field, 0, 2, 4, 7, 8
    mov $\field, %al
    call cmos
    mov %al, fields + \field
    .endr
    movzbl fields, %eax
    BETWEEN "RTC: seconds", %rax, $0, $0x59
    movzbl fields + 2, %eax
    BETWEEN "RTC: minutes", %rax, $0, $0x59
    movzbl fields + 7, %eax
    BETWEEN "RTC: day", %rax, $1, $0x31
    movzbl fields + 8, %eax
    BETWEEN "RTC: month", %rax, $1, $0x12
    # A stall at its first edge shortens a second, one at its last lengthens it: one of three.
    mov $3, %ecx
1:  push %rcx
    call next_second
    call read_tsc
    mov %rax, %rsi
    call next_second
    call read_tsc
    sub %rsi, %rax
    mov slice_tsc, %rcx
    imul $30, %rcx, %rbx        # 0.6 s
    imul $80, %rcx, %rdi        # 1.6 s
    pop %rcx
    cmp %rbx, %rax
    jb 2f
    cmp %rdi, %rax
    jbe 3f
2:  loop 1b
3:
    BETWEEN "an RTC second in TSC", %rax, %rbx, %rdi
    ret

counter_modes:
    mov $0x30, %al              # channel 0, mode 0
    outb %al, $0x43
    mov $0xff, %al
    outb %al, $0x40
    outb %al, $0x40
    mov $0xe2, %al              # read back the status of channel 0
    outb %al, $0x43
    inb $0x40, %al
    CHECK_MASK "PIT: status, mode 0", $0x3f, %rax, $0x30
    mov $0, %al                 # latch the count
    outb %al, $0x43
    inb $0x40, %al
    mov %al, %bl
    inb $0x40, %al
    mov %al, %bh
    movzwl %bx, %ebx
    mov $0, %al
    outb %al, $0x43
    inb $0x40, %al
    mov %al, %cl
    inb $0x40, %al
    mov %al, %ch
    movzwl %cx, %ecx
    cmp %ecx, %ebx
    setae %al
    movzbl %al, %eax
    CHECK "PIT: counts down", %rax, $1
    ret

# start_ticks: channel 0 at 200 Hz, mode 2.
start_ticks:
    mov $0x34, %al
    outb %al, $0x43
    mov $(PIT_HZ / 200) & 0xff, %al
    outb %al, $0x40
    mov $(PIT_HZ / 200) >> 8, %al
    outb %al, $0x40
    ret

# count_until_right: as count_200ms, again if a busy host kept this CPU from counting, or let it
# count what was late; but not for ever.
count_until_right:
    mov $10, %r13d
1:  call count_200ms
    cmp $15, %rax
    jb 2f
    cmp $80, %rax
    jbe 3f
2:  dec %r13d
    jnz 1b
3:  ret

# count_200ms: interrupts on for ten slices. Returns the count in RAX.
count_200ms:
    movq $0, ticks
    sti
    mov $10, %ecx
1:  call wait_slice
    loop 1b
    cli
    mov ticks, %rax
    ret

through_8259:
    call start_ticks
    mov $0x11, %al              # ICW1 to ICW4
    outb %al, $0x20
    outb %al, $0xa0
    mov $PIC_BASE, %al
    outb %al, $0x21
    mov $PIC_BASE + 8, %al
    outb %al, $0xa1
    mov $4, %al
    outb %al, $0x21
    mov $2, %al
    outb %al, $0xa1
    mov $1, %al
    outb %al, $0x21
    outb %al, $0xa1
    mov $0xff, %al
    outb %al, $0x21
    outb %al, $0xa1
    inb $0x21, %al
    CHECK_MASK "8259: mask reads back", $0xff, %rax, $0xff
    movq $tick_8259, handlers + 8 * PIC_BASE
    APIC_WRITE APIC_LINT0, $0x700       # ExtINT
    call count_200ms
    CHECK "8259: masked", %rax, $0
    mov $0xfe, %al
    outb %al, $0x21
    call count_until_right
    BETWEEN "8259: 40 ticks in 200 ms", %rax, $15, $80
    # waking from HLT
    movq $0, ticks
1:  sti
    hlt
    cli
    cmpq $3, ticks
    jb 1b
    CHECK "8259: wakes from hlt", $1, $1
    mov $0xff, %al
    outb %al, $0x21
    call count_200ms
    cmp $1, %eax                # one may have been on its way
    setbe %al
    movzbl %al, %eax
    CHECK "8259: masked again", %rax, $1
    APIC_WRITE APIC_LINT0, $0x10000
    ret
tick_8259:
    incq ticks
    mov $0x20, %al
    outb %al, $0x20
    ret

# io_apic_write: ECX = register, EAX = value. Clobbers RDX.
io_apic_write:
    mov $IO_APIC, %edx
    mov %ecx, (%rdx)
    mov %eax, 0x10(%rdx)
    ret
io_apic_read:
    mov $IO_APIC, %edx
    mov %ecx, (%rdx)
    mov 0x10(%rdx), %eax
    ret
.macro REDIRECT pin:req, value:req
    mov $0x11 + 2 * \pin, %ecx
    mov $1, %eax
    call boot_cpu_destination
    call io_apic_write
    mov $0x10 + 2 * \pin, %ecx
    mov $\value, %eax
    call io_apic_write
.endm
boot_cpu_destination:
    APIC_READ APIC_ID
    and $0xff000000, %eax
    ret

# The interval timer is at pin 2 (interrupt source override), or at 0 without one.
through_io_apic:
    mov $1, %ecx
    call io_apic_read
    shr $16, %eax
    and $0xff, %eax
    BETWEEN "I/O APIC: last entry", %rax, $15, $239
    movq $tick_apic, handlers + 8 * 0x50
    REDIRECT 0, 0x10050
    REDIRECT 2, 0x10050
    mov $0x14, %ecx
    call io_apic_read
    CHECK_MASK "I/O APIC: an entry reads back", $0x1afff, %rax, $0x10050
    call count_200ms
    CHECK "I/O APIC: masked", %rax, $0
    REDIRECT 0, 0x50
    REDIRECT 2, 0x50
    call count_until_right
    BETWEEN "I/O APIC: 40 ticks in 200 ms", %rax, $15, $80
    REDIRECT 0, 0x10050
    REDIRECT 2, 0x10050
    call count_200ms
    cmp $1, %eax
    setbe %al
    movzbl %al, %eax
    CHECK "I/O APIC: masked again", %rax, $1
    # mode 0: one interrupt at the end of the count
    REDIRECT 0, 0x50
    REDIRECT 2, 0x50
    mov $0x30, %al
    outb %al, $0x43
    mov $SLICE & 0xff, %al
    outb %al, $0x40
    mov $SLICE >> 8, %al
    outb %al, $0x40
    call count_200ms
    CHECK "PIT mode 0: one interrupt", %rax, $1
    REDIRECT 0, 0x10050
    REDIRECT 2, 0x10050
    ret
tick_apic:
    incq ticks
    APIC_WRITE APIC_EOI, $0
    ret

    .bss
    .balign 8
slice_tsc: .quad 0
ticks: .quad 0
fields: .skip 16
