# smp: start of application processors, interprocessor interrupts of all delivery modes,
# masking, priorities, NMI blocking, the APIC timer; in xAPIC and in x2APIC mode.
#
# Needs at least 2 CPUs. SDM volume 3, chapter 11 (local APIC), 9.4 (multiprocessor start).
# Lowest-priority delivery is only asked for in xAPIC mode and only for "exactly one CPU":
# which one is model-specific.
#
# Emulators differ from the manual:
# - QEMU 7.2 (TCG) delivers the illegal vector 5 and leaves the ESR clear, lets a
#   software-disabled APIC unmask its vectors, keeps NMIs blocked when an IRET faults, and has
#   neither x2APIC nor TSC deadline.
# - Bochs 2.7 leaves the TSC-deadline MSR as it was after the interrupt (11.5.4.1: 0),
#   keeps the xAPIC logical identifier in x2APIC mode and leaves that mode on INIT.

.include "lib/boot.inc"
.include "lib/apic.inc"
.include "lib/smp.inc"

    .code64
main64:
    call start_aps
    GATE 2, 0x8e01              # NMI on a stack of its own
    PRINT "smp: "
    mov cpu_count, %rax
    call put_decimal
    PRINT " CPUs\n"
    COUNT 0x31, 0x35, 0x40, 0x41, 0x42, 0x45, 0x51, 0x61, 0x71, 0xe1, WAKE
    movq $ignore, handlers + 8 * SPURIOUS
    COUNT 0x05                  # QEMU delivers this illegal vector
    call starts
    call counters
    call apic_tests
    movq $0x100, check_mark     # failures in x2APIC mode are marked as such
    mov $1, %eax
    cpuid
    bt $21, %ecx
    jnc 1f
    call all_to_x2apic
    call apic_tests
    call x2apic_registers
1:  movq $0, check_mark
    FINISH "smp"

apic_tests:
    call fixed_physical
    call fixed_logical
    call shorthands
    call nmis
    call interrupt_flag
    call task_priority
    call in_service_order
    call errors
    call timer
    call halts
    call init_again
    ret

# FOR_EACH_AP / NEXT_AP: EDI runs over the application processors.
.macro FOR_EACH_AP
    mov $1, %edi
9998:
.endm
.macro NEXT_AP
    inc %edi
    cmp cpu_count, %rdi
    jb 9998b
.endm

# HITS "name", cpu, vector, count: waits for them and checks the number.
.macro HITS name:req, cpu:req, vec:req, count:req
    push %rdi
    push %rsi
    push %rdx
    mov \cpu, %edi
    mov $\vec, %esi
    mov \count, %edx
    call wait_hits
    CHECK "\name", %rax, %rdx
    pop %rdx
    pop %rsi
    pop %rdi
.endm

starts:
    FOR_EACH_AP
    mov %edi, %ebx
    shl $6, %ebx
    CHECK "AP starts once", percpu + CPU_STARTS(%rbx), $1
    CHECK "AP starts with cs from the SIPI vector", percpu + CPU_START_CS(%rbx), $(TRAMPOLINE>>4)
    NEXT_AP
    mov $APIC_BASE_MSR, %ecx
    rdmsr
    mov $APIC_MMIO | 0x900, %ebx
    CHECK_MASK "boot CPU: BSP, enabled, base", $~0x6ff, %rax, %rbx
    mov $ap_reads_base, %esi
    call start_all
    call finish_all
    CHECK "APs: BSP flag clear, enabled", base_sum, $0
    ret
ap_reads_base:
    mov $APIC_BASE_MSR, %ecx
    rdmsr
    and $0x900, %eax
    xor $0x800, %eax
    lock add %rax, base_sum
    ret

# Every CPU adds in four ways.
.set ROUNDS, 5000
counters:
    mov $count_up, %esi
    call start_all
    call count_up
    mov $1, %edi
    call finish_all
    mov cpu_count, %rax
    imul $ROUNDS, %rax
    CHECK "lock inc", counter_inc, %rax
    CHECK "lock xadd", counter_xadd, %rax
    CHECK "lock cmpxchg", counter_cmpxchg, %rax
    CHECK "xchg lock", counter_locked, %rax
    CHECK "lock add across a cache line", counter_split, %rax
    CHECK "lock cmpxchg16b", counter_wide, %rax
    CHECK "lock bts and btr", counter_bit, %rax
    ret
count_up:
    mov $ROUNDS, %r8d
1:  lock incq counter_inc
    mov $1, %eax
    lock xadd %rax, counter_xadd
    mov counter_cmpxchg, %rax
2:  lea 1(%rax), %rbx
    lock cmpxchg %rbx, counter_cmpxchg
    jne 2b
    mov $1, %eax
3:  xchg %eax, counter_lock
    test %eax, %eax
    jz 4f
    pause
    jmp 3b
4:  incq counter_locked
    movl $0, counter_lock
    lock addq $1, counter_split
    mov counter_wide, %rax
    mov counter_wide + 8, %rdx
5:  lea 1(%rax), %rbx
    mov %rdx, %rcx
    lock cmpxchg16b counter_wide
    jne 5b
6:  lock btsl $7, counter_bit_lock
    jnc 7f
    pause
    jmp 6b
7:  incq counter_bit
    lock btrl $7, counter_bit_lock
    dec %r8d
    jnz 1b
    ret

fixed_physical:
    call clear_hits
    sti
    FOR_EACH_AP
    mov %edi, %eax
    shl $6, %eax
    mov percpu + CPU_APIC_ID(%rax), %edx
    mov $0x40, %eax
    call send_ipi
    HITS "fixed, physical: the target", %edi, 0x40, $1
    NEXT_AP
    HITS "fixed, physical: the sender", $0, 0x40, $0
    FOR_EACH_AP
    HITS "fixed, physical: nobody else", %edi, 0x40, $1
    NEXT_AP
    mov percpu + CPU_APIC_ID, %edx
    mov $0x40, %eax
    call send_ipi
    HITS "fixed, physical: itself", $0, 0x40, $1
    mov $0xff, %edx
    cmpb $0, x2apic
    je 1f
    mov $-1, %edx
1:  mov $0x42, %eax
    call send_ipi
    xor %edi, %edi
2:  HITS "fixed, physical: broadcast", %edi, 0x42, $1
    inc %edi
    cmp cpu_count, %rdi
    jb 2b
    cli
    ret

# Logical destinations: every CPU answers to the bit of its index. In x2APIC mode the
# identifiers are the processor's: (id >> 4) << 16 | 1 << (id & 15).
fixed_logical:
    cmpb $0, x2apic
    jne logical_x2apic
    movl $-1, model
    mov $flat_identifier, %esi
    call start_all
    call flat_identifier
    call finish_all
    call logical_targets
    call lowest_priority
    movl $0x0fffffff, model
    mov $cluster_identifier, %esi
    call start_all
    call cluster_identifier
    call finish_all
    # in the cluster model, the targets of two clusters are told apart
    call clear_hits
    sti
    IPI 0x45 | ICR_LOGICAL, $0x1f       # cluster 1, all members: CPUs 2 and 3
    xor %edi, %edi
1:  mov %edi, %ebx
    shr %ebx
    cmp $1, %ebx
    sete %bl
    movzbl %bl, %ebx
    HITS "fixed, logical cluster", %edi, 0x45, %ebx
    inc %edi
    cmp cpu_count, %rdi
    jb 1b
    IPI 0x45 | ICR_LOGICAL, $0x02       # cluster 0, member 1: CPU 1
    HITS "fixed, logical cluster: one member", $1, 0x45, $1
    HITS "fixed, logical cluster: not the other", $0, 0x45, $0
    cli
    movl $-1, model
    ret

logical_x2apic:
    call clear_hits
    sti
    FOR_EACH_AP
    mov %edi, %ebx
    shl $6, %ebx
    mov percpu + CPU_APIC_ID(%rbx), %rcx
    mov %ecx, %edx
    shr $4, %edx
    shl $16, %edx
    and $15, %ecx
    mov $1, %eax
    shl %cl, %eax
    or %eax, %edx
    mov $0x45 | ICR_LOGICAL, %eax
    call send_ipi
    HITS "fixed, logical x2APIC", %edi, 0x45, $1
    NEXT_AP
    HITS "fixed, logical x2APIC: nobody else", $0, 0x45, $0
    FOR_EACH_AP
    HITS "fixed, logical x2APIC: once", %edi, 0x45, $1
    NEXT_AP
    mov $0x4e | ICR_LOGICAL, %eax       # no member: nobody
    xor %edx, %edx
    call send_ipi
    cli
    ret

flat_identifier:
    mov %gs:CPU_INDEX, %ecx
    mov $0x01000000, %eax
    shl %cl, %eax
set_identifier:
    mov $APIC_LDR, %ecx
    call apic_write
    APIC_WRITE APIC_DFR, model
    ret
# Two CPUs a cluster.
cluster_identifier:
    mov %gs:CPU_INDEX, %ecx
    mov %ecx, %eax
    shr %eax
    shl $28, %eax
    mov $0x01000000, %ebx
    and $1, %ecx
    shl %cl, %ebx
    or %ebx, %eax
    jmp set_identifier

logical_targets:
    call clear_hits
    sti
    # each on its own, then CPUs 0 and 1 at once
    xor %edi, %edi
1:  mov %edi, %ecx
    mov $1, %edx
    shl %cl, %edx
    mov $0x45 | ICR_LOGICAL, %eax
    call send_ipi
    HITS "fixed, logical flat", %edi, 0x45, $1
    inc %edi
    cmp cpu_count, %rdi
    jb 1b
    IPI 0x42 | ICR_LOGICAL, $3
    xor %edi, %edi
2:  cmp $2, %edi
    setb %bl
    movzbl %bl, %ebx
    HITS "fixed, logical flat: two of them", %edi, 0x42, %ebx
    HITS "fixed, logical flat: once", %edi, 0x45, $1
    inc %edi
    cmp cpu_count, %rdi
    jb 2b
    cli
    ret

lowest_priority:
    call clear_hits
    sti
    mov $0x41, %esi
    mov $1, %ebx
    # each is taken before the next is sent: two requests of one vector at one CPU are one interrupt
1:  IPI 0x41 | ICR_LOGICAL | ICR_LOWEST, $0xff
    mov $PATIENCE, %ecx
2:  call hits_of_all
    cmp %ebx, %eax
    jae 3f
    pause
    dec %ecx
    jnz 2b
3:  inc %ebx
    cmp $20, %ebx
    jbe 1b
    call settle
    cli
    call hits_of_all
    CHECK "lowest priority: one CPU each time", %rax, $20
    ret

# hits_of_all: ESI = vector. Returns RAX, clobbers RDI.
hits_of_all:
    push %rdx
    xor %edi, %edi
    xor %edx, %edx
1:  call hits_of
    add %eax, %edx
    inc %edi
    cmp cpu_count, %rdi
    jb 1b
    mov %edx, %eax
    pop %rdx
    ret

shorthands:
    call clear_hits
    sti
    IPI 0x40 | ICR_SELF
    IPI 0x41 | ICR_ALL
    IPI 0x42 | ICR_OTHERS
    HITS "self", $0, 0x40, $1
    HITS "all including self: self", $0, 0x41, $1
    HITS "all excluding self: self", $0, 0x42, $0
    FOR_EACH_AP
    HITS "self: others", %edi, 0x40, $0
    HITS "all including self: others", %edi, 0x41, $1
    HITS "all excluding self: others", %edi, 0x42, $1
    NEXT_AP
    cli
    ret

nmis:
    call clear_hits
    FOR_EACH_AP
    mov %edi, %ebx
    shl $6, %ebx
    mov percpu + CPU_APIC_ID(%rbx), %edx
    mov $ICR_NMI, %eax
    call send_ipi
    HITS "NMI wakes a halted CPU", %edi, 2, $1
    NEXT_AP
    # with interrupts off, in HLT
    movq $0, step
    mov $halt_without_interrupts, %rsi
    mov $1, %edi
    call start_job
    WAIT_FOR "CPU 1 is about to halt", step, $1
    call settle
    mov percpu + CPU_SIZE + CPU_APIC_ID, %edx
    mov $0x40, %eax
    call send_ipi
    HITS "cli; hlt is not woken by an interrupt", $1, 0x40, $0
    CHECK "cli; hlt stays halted", step, $1
    mov $ICR_NMI, %eax
    call send_ipi
    WAIT_FOR "cli; hlt is woken by NMI", step, $2
    mov $1, %edi
    call finish_job
    HITS "the interrupt comes with sti", $1, 0x40, $1
    # a second NMI waits for the IRET of the first
    call clear_hits
    movq $0, step
    movq $0, nmi_depth
    movq $0, nmi_most
    movq $0, nmi_release
    movq $nested_nmi, handlers + 8 * 2
    mov $ICR_NMI, %eax
    call send_ipi
    WAIT_FOR "first NMI", step, $1
    call send_ipi
    call settle
    call send_ipi               # a third one merges with the second
    call settle
    CHECK "second NMI is held", step, $1
    movq $1, nmi_release
    HITS "NMIs: one held, one merged", $1, 2, $2
    CHECK "NMIs do not nest", nmi_most, $1
    # an IRET lets the next one in even if it faults: before the handler's first instruction
    # (6.7.1)
    call clear_hits
    GATE 2, 0x8e00              # they nest: on the stack they meet
    movq $0, step
    movq $0, nmi_depth
    movq $0, nmi_release
    movq $0, nmi_rip
    movq $0, nmi_rip_in_fault
    movq $faulting_nmi, handlers + 8 * 2
    movq $after_faulting_iret, handlers + 8 * 13
    mov $ICR_NMI, %eax
    call send_ipi
    WAIT_FOR "NMI whose IRET will fault", step, $1
    call send_ipi
    call settle
    CHECK "NMI before the IRET is held", step, $1
    movq $1, nmi_release
    HITS "NMIs: one within the other's faulting IRET", $1, 2, $2
    CHECK "NMI comes when an IRET has faulted", nmi_rip_in_fault, $trap_stubs+16*13
    movq $0, handlers + 8 * 13
    GATE 2, 0x8e01
    movq $count_nmi, handlers + 8 * 2
    ret
halt_without_interrupts:
    cli
    movq $1, step
    hlt
    movq $2, step
    sti
    nop
    ret
nested_nmi:
    lock incq nmi_depth
    mov nmi_depth, %rax
    cmp nmi_most, %rax
    jbe 1f
    mov %rax, nmi_most
1:  movq $1, step
2:  pause
    cmpq $0, nmi_release
    je 2b
    lock decq nmi_depth
    jmp count_only
faulting_nmi:
    lock incq step
    cmpq $0, nmi_depth
    jne 4f
    movq $1, nmi_depth
2:  pause
    cmpq $0, nmi_release
    je 2b
    mov %rsp, %rax
    pushq $KDATA
    push %rax
    pushfq
    pushq $0                    # CS
    pushq $faulting_iret
faulting_iret:
    iretq
3:  add $40, %rsp
    jmp count_only
4:  mov FRAME_RIP(%rdi), %rax
    mov %rax, nmi_rip
    jmp count_only
after_faulting_iret:
    mov nmi_rip, %rax
    mov %rax, nmi_rip_in_fault
    movq $3b, FRAME_RIP(%rdi)
    ret

# IRR "name", vector, 0 or 1: the request bit of this CPU.
.macro REQUEST name:req, base:req, vec:req, expected:req
    push %rax
    APIC_READ (\base+((\vec)>>5)*16)
    shr $((\vec)&31), %eax
    and $1, %eax
    CHECK "\name", %rax, \expected
    pop %rax
.endm
# PEND vector: sends it to this CPU and waits until it is requested.
.macro PEND vec:req
    IPI \vec | ICR_SELF
9999: APIC_READ (APIC_IRR+((\vec)>>5)*16)
    bt $((\vec)&31), %eax
    jnc 9999b
.endm

interrupt_flag:
    call clear_hits
    cli
    PEND 0x41
    HITS "held by IF", $0, 0x41, $0
    REQUEST "held by IF: IRR", APIC_IRR, 0x41, $1
    REQUEST "held by IF: ISR", APIC_ISR, 0x41, $0
    sti
    nop
1:  nop
    HITS "taken after sti", $0, 0x41, $1
    cli
    REQUEST "taken: IRR", APIC_IRR, 0x41, $0
    REQUEST "taken and ended: ISR", APIC_ISR, 0x41, $0
    CHECK "sti: one instruction runs first", last_rip, $1b
    call clear_hits
    PEND 0x41
    sti
    cli
    HITS "sti; cli takes nothing", $0, 0x41, $0
    pushfq
    orl $IF, (%rsp)
    popfq
1:  nop
    cli
    CHECK "popf takes it at once", last_rip, $1b
    call clear_hits
    PEND 0x41
    mov %rsp, %rax
    pushq $KDATA
    push %rax
    pushq $IF | 2
    pushq $KCODE64
    pushq $1f
    iretq
1:  nop
    cli
    CHECK "iret takes it at once", last_rip, $1b
    call clear_hits
    PEND 0x41
    sti
    hlt                         # must not sleep
1:  cli
    CHECK "sti; hlt: taken behind hlt", last_rip, $1b
    HITS "sti; hlt: once", $0, 0x41, $1
    # sti with IF already set opens no shadow
    call clear_hits
    cli
    # two requests of one vector are one, one more in service is another
    PEND 0x41
    PEND 0x41
    sti
    nop
    nop
    cli
    HITS "two requests of a vector are one", $0, 0x41, $1
    ret

task_priority:
    call clear_hits
    cli
    mov $4, %eax
    mov %rax, %cr8
    APIC_READ APIC_TPR
    CHECK "cr8 is TPR 7:4", %rax, $0x40
    sti
    PEND 0x41
    PEND 0x31
    HITS "TPR holds its own class", $0, 0x41, $0
    HITS "TPR holds lower classes", $0, 0x31, $0
    IPI 0x51 | ICR_SELF
    HITS "TPR lets higher classes pass", $0, 0x51, $1
    mov $3, %eax
    mov %rax, %cr8
    HITS "lowered: the higher comes", $0, 0x41, $1
    HITS "lowered: the lower stays", $0, 0x31, $0
    APIC_WRITE APIC_TPR, $0x2f
    HITS "TPR register lowers as well", $0, 0x31, $1
    mov %cr8, %rax
    CHECK "TPR 7:4 is cr8", %rax, $2
    APIC_READ APIC_PPR
    CHECK_MASK "PPR follows TPR", $0xff, %rax, $0x2f
    mov $15, %eax
    mov %rax, %cr8
    PEND 0xe1
    HITS "TPR 15 holds all", $0, 0xe1, $0
    IPI ICR_NMI, percpu + CPU_APIC_ID
    HITS "TPR 15 does not hold NMI", $0, 2, $1
    xor %eax, %eax
    mov %rax, %cr8
    nop
    HITS "TPR 0 holds none", $0, 0xe1, $1
    cli
    ret

in_service_order:
    call clear_hits
    cli
    PEND 0x41
    PEND 0x61
    PEND 0x31
    PEND 0x51
    sti
    nop
    nop
    nop
    HITS "four vectors: the last", $0, 0x31, $1
    cli
    mov delivered, %rax
    CHECK "four vectors: the highest first", %rax, $0x31415161
    # in service, lower and equal classes wait for the EOI, higher ones nest
    call clear_hits
    movq $nesting, handlers + 8 * 0x41
    PEND 0x41
    sti
    nop
    nop
    cli
    movq $count_interrupt, handlers + 8 * 0x41
    mov delivered, %rax
    movabs $0xcc3545bb61aa, %rbx
    CHECK "nesting: order", %rax, %rbx
    ret
nesting:
    call log_entry_aa
    REQUEST "nesting: ISR of the vector", APIC_ISR, 0x41, $1
    APIC_READ APIC_PPR
    CHECK_MASK "nesting: PPR class", $0xf0, %rax, $0x40
    PEND 0x35
    PEND 0x45
    sti
    IPI 0x61 | ICR_SELF
    mov $0x61, %esi
    xor %edi, %edi
    mov $1, %edx
    call wait_hits
    mov $0xbb, %al
    call log_entry
    APIC_WRITE APIC_EOI, $0
    mov $0x35, %esi
    call wait_hits
    mov $0xcc, %al
    call log_entry
    cli
    ret
log_entry_aa:
    mov $0xaa, %al
log_entry:
    push %rcx
    mov delivered_count, %rcx
    mov %al, delivered(%rcx)
    incq delivered_count
    pop %rcx
    ret

errors:
    APIC_WRITE APIC_ESR, $0
    APIC_WRITE APIC_ESR, $0
    APIC_READ APIC_ESR
    CHECK "ESR is clear", %rax, $0
    IPI 0x05 | ICR_SELF
    APIC_WRITE APIC_ESR, $0
    APIC_READ APIC_ESR
    and $0x60, %eax
    setnz %al
    movzbl %al, %eax
    CHECK "illegal vector is in the ESR", %rax, $1
    APIC_WRITE APIC_ESR, $0
    # software-disabled: the local vectors are masked and stay so
    APIC_WRITE APIC_SVR, $SPURIOUS
    APIC_WRITE APIC_TIMER, $0x41
    APIC_READ APIC_TIMER
    CHECK_MASK "disabled APIC keeps its vectors masked", $0x10000, %rax, $0x10000
    APIC_WRITE APIC_SVR, $(0x100|SPURIOUS)
    APIC_READ APIC_TIMER
    CHECK "enabling does not unmask", %rax, $0x10041
    APIC_WRITE APIC_TIMER, $0x10000
    APIC_READ APIC_VERSION
    CHECK_MASK "version register", $0xf0, %rax, $0x10
    APIC_READ APIC_ID
    cmpb $0, x2apic
    jne 1f
    shr $24, %eax
1:  CHECK "identifier register", %rax, percpu + CPU_APIC_ID
    ret

.set TICKS, 200000
timer:
    call clear_hits
    APIC_WRITE APIC_DIVIDE, $0xb        # by 1
    APIC_WRITE APIC_TIMER, $0x51
    sti
    APIC_WRITE APIC_INITIAL_COUNT, $TICKS
    APIC_READ APIC_CURRENT_COUNT
    cmp $TICKS, %eax
    setbe %al
    movzbl %al, %eax
    CHECK "one-shot: counts down from the initial count", %rax, $1
    HITS "one-shot", $0, 0x51, $1
    APIC_READ APIC_CURRENT_COUNT
    CHECK "one-shot: ends at 0", %rax, $0
    call settle
    HITS "one-shot: only once", $0, 0x51, $1
    call clear_hits
    APIC_WRITE APIC_TIMER, $0x20051     # periodic
    APIC_WRITE APIC_INITIAL_COUNT, $TICKS
    mov $0x51, %esi
    xor %edi, %edi
    mov $5, %edx
    call wait_hits
    cmp $5, %eax
    setae %al
    movzbl %al, %eax
    CHECK "periodic", %rax, $1
    APIC_READ APIC_INITIAL_COUNT
    CHECK "periodic: initial count reads back", %rax, $TICKS
    APIC_WRITE APIC_INITIAL_COUNT, $0
    call settle
    call clear_hits
    call settle
    call settle
    HITS "periodic: stopped by count 0", $0, 0x51, $0
    APIC_WRITE APIC_TIMER, $0x10051     # masked
    APIC_WRITE APIC_INITIAL_COUNT, $1000
1:  APIC_READ APIC_CURRENT_COUNT
    test %eax, %eax
    jnz 1b
    call settle
    HITS "masked", $0, 0x51, $0
    APIC_WRITE APIC_TIMER, $0x51
    HITS "masked: nothing is kept", $0, 0x51, $0
    mov $1, %eax
    cpuid
    bt $24, %ecx
    jnc 9f
    APIC_WRITE APIC_TIMER, $0x40051     # TSC deadline
    mfence
    rdtsc
    shl $32, %rdx
    or %rdx, %rax
    lea TICKS * 5(%rax), %rbx
    mov $0x6e0, %ecx
    mov %ebx, %eax
    mov %rbx, %rdx
    shr $32, %rdx
    wrmsr
    HITS "deadline", $0, 0x51, $1
    rdtsc
    shl $32, %rdx
    or %rdx, %rax
    cmp %rbx, %rax
    setae %al
    movzbl %al, %eax
    CHECK "deadline: not before", %rax, $1
    rdmsr
    shl $32, %rdx
    or %rdx, %rax
    CHECK "deadline: the MSR is 0 afterwards", %rax, $0
    APIC_READ APIC_CURRENT_COUNT
    CHECK "deadline: current count reads 0", %rax, $0
    mov $1, %eax                # long past
    xor %edx, %edx
    wrmsr
    HITS "deadline in the past", $0, 0x51, $2
    rdtsc
    add $100, %edx              # far off, then disarmed
    wrmsr
    xor %eax, %eax
    xor %edx, %edx
    wrmsr
    rdmsr
    CHECK "deadline disarmed", %rax, $0
    APIC_WRITE APIC_TIMER, $0x51
    HITS "deadline: no more", $0, 0x51, $2
    APIC_WRITE APIC_INITIAL_COUNT, $0
    EXPECT_NONE "deadline MSR outside its mode", wrmsr
9:  cli
    ret

# Every AP sleeps and is woken by its own timer; then all interrupt each other in a ring.
halts:
    call clear_hits
    mov $sleep_by_timer, %esi
    call start_all
    call finish_all
    FOR_EACH_AP
    HITS "AP timer wakes hlt", %edi, 0x71, $3
    NEXT_AP
    call clear_hits
    sti
    mov $ring, %esi
    call start_all
    call ring
    call finish_all
    xor %edi, %edi
1:  HITS "ring of interrupts", %edi, 0x42, $RING
    inc %edi
    cmp cpu_count, %rdi
    jb 1b
    cli
    ret
sleep_by_timer:
    APIC_WRITE APIC_DIVIDE, $0xb
    APIC_WRITE APIC_TIMER, $0x71
    mov %gs:CPU_INDEX, %ebx
    shl $8, %ebx
    add $0x71, %ebx
    xor %r8d, %r8d
1:  cli
    APIC_WRITE APIC_INITIAL_COUNT, $TICKS
    inc %r8d
2:  sti
    hlt
    cli
    cmp %r8d, hits(,%rbx,4)
    jb 2b
    cmp $3, %r8d
    jb 1b
    sti
    APIC_WRITE APIC_TIMER, $0x10000
    ret
# Each CPU interrupts the next one and waits until that one has counted it.
.set RING, 200
ring:
    mov %gs:CPU_INDEX, %ebx
    inc %ebx
    cmp cpu_count, %rbx
    jb 1f
    xor %ebx, %ebx
1:  mov %ebx, %ecx
    shl $6, %ecx
    mov percpu + CPU_APIC_ID(%rcx), %edx
    shl $8, %ebx
    add $0x42, %ebx
    xor %r8d, %r8d
2:  mov $0x42, %eax
    call send_ipi
    inc %r8d
    mov $PATIENCE, %ecx
3:  cmp %r8d, hits(,%rbx,4)
    jae 4f
    pause
    dec %ecx
    jnz 3b
    ret                         # lost: the count tells
4:  cmp $RING, %r8d
    jb 2b
    ret

# INIT stops a running CPU until a SIPI, which may name another page.
init_again:
    mov cpu_count, %rdi
    dec %edi
    mov %edi, %ebx
    shl $6, %ebx
    mov percpu + CPU_APIC_ID(%rbx), %edx
    # a SIPI without INIT is ignored
    mov percpu + CPU_STARTS(%rbx), %r12
    mov $ICR_STARTUP | (TRAMPOLINE >> 12), %eax
    call send_ipi
    call settle
    CHECK "SIPI without INIT is ignored", percpu + CPU_STARTS(%rbx), %r12
    # one that counts for ever, with interrupts off
    movq $0, spinner
    mov $count_for_ever, %esi
    call start_job
    mov $PATIENCE, %ecx
1:  cmpq $0, spinner
    jne 2f
    pause
    dec %ecx
    jnz 1b
2:  mov $ICR_INIT, %eax
    call send_ipi
    mov $1000, %ecx             # on a busy host the INIT may take its time
3:  mov spinner, %rax
    call settle
    cmp spinner, %rax
    je 4f
    dec %ecx
    jnz 3b
4:  CHECK "INIT stops a CPU that runs", spinner, %rax
    test %rax, %rax
    setnz %al
    movzbl %al, %eax
    CHECK "it had run", %rax, $1
    call clear_hits
    mov $0x40, %eax
    call send_ipi
    HITS "waiting for SIPI: no interrupt", %edi, 0x40, $0
    push %rdi
    mov $TRAMPOLINE + 0x1000, %edi
    call copy_trampoline
    pop %rdi
    mov $ICR_STARTUP | ((TRAMPOLINE + 0x1000) >> 12), %eax
    call send_ipi
    inc %r12
    mov $PATIENCE, %ecx
3:  cmp %r12, percpu + CPU_STARTS(%rbx)
    je 4f
    pause
    dec %ecx
    jnz 3b
4:  CHECK "started again", percpu + CPU_STARTS(%rbx), %r12
    CHECK "started again: cs", percpu + CPU_START_CS(%rbx), $((TRAMPOLINE+0x1000)>>4)
    mov $0x51, %eax
    call send_ipi
    HITS "started again: takes interrupts", %edi, 0x51, $1
    mov $ICR_STARTUP | (TRAMPOLINE >> 12), %eax
    call send_ipi
    call settle
    CHECK "a second SIPI is ignored", percpu + CPU_STARTS(%rbx), %r12
    CHECK "INIT keeps the APIC mode", percpu + CPU_START_MODE(%rbx), x2apic
    ret
ignore:
    ret
count_for_ever:
    cli
1:  incq spinner
    jmp 1b

# The APs switch with a job that ends without a wake-up, then the boot CPU.
all_to_x2apic:
    mov $to_x2apic, %esi
    call start_all
    call finish_all
    call to_x2apic
    movq $1, x2apic
    ret
to_x2apic:
    mov $APIC_BASE_MSR, %ecx
    rdmsr
    or $0x400, %eax
    wrmsr
    ret

.macro X2APIC_FAULT name:req, register:req, insn:req
    mov $0x800 + (\register >> 4), %ecx
    xor %eax, %eax
    xor %edx, %edx
    EXPECT_FAULT "\name", 13, 0, \insn
.endm
x2apic_registers:
    X2APIC_FAULT "x2APIC: DFR does not exist", APIC_DFR, rdmsr
    X2APIC_FAULT "x2APIC: ICR high does not exist", APIC_ICR_HIGH, rdmsr
    X2APIC_FAULT "x2APIC: LDR is read-only", APIC_LDR, wrmsr
    X2APIC_FAULT "x2APIC: ID is read-only", APIC_ID, wrmsr
    X2APIC_FAULT "x2APIC: IRR is read-only", APIC_IRR, wrmsr
    X2APIC_FAULT "x2APIC: EOI is write-only", APIC_EOI, rdmsr
    X2APIC_FAULT "x2APIC: self IPI is write-only", 0x3f0, rdmsr
    X2APIC_FAULT "x2APIC: reserved register", 0x3d0, rdmsr
    mov $0x80b, %ecx
    mov $1, %eax
    xor %edx, %edx
    EXPECT_FAULT "x2APIC: EOI takes 0 only", 13, 0, wrmsr
    mov $0x808, %ecx
    mov $0x100, %eax
    EXPECT_FAULT "x2APIC: reserved TPR bits", 13, 0, wrmsr
    mov $APIC_BASE_MSR, %ecx
    rdmsr
    and $~0x800, %eax
    EXPECT_FAULT "x2APIC without the enable bit", 13, 0, wrmsr
    rdmsr
    and $~0x400, %eax
    EXPECT_FAULT "x2APIC back to xAPIC", 13, 0, wrmsr
    call clear_hits
    sti
    mov $0x83f, %ecx
    mov $0x40, %eax
    xor %edx, %edx
    wrmsr
    HITS "x2APIC: self IPI", $0, 0x40, $1
    cli
    APIC_READ APIC_LDR
    mov percpu + CPU_APIC_ID, %rcx
    mov %ecx, %edx
    shr $4, %edx
    shl $16, %edx
    and $15, %ecx
    mov $1, %ebx
    shl %cl, %ebx
    or %ebx, %edx
    CHECK "x2APIC: LDR", %rax, %rdx
    ret

    .bss
    .balign 64
counter_inc: .quad 0
counter_xadd: .quad 0
counter_cmpxchg: .quad 0
counter_locked: .quad 0
counter_bit: .quad 0
counter_lock: .long 0
counter_bit_lock: .long 0
    .balign 64
counter_wide: .quad 0, 0
    .balign 64
    .skip 60
counter_split: .quad 0
    .balign 64
base_sum: .quad 0
step: .quad 0
nmi_depth: .quad 0
nmi_most: .quad 0
nmi_release: .quad 0
nmi_rip: .quad 0                # where the second one came
nmi_rip_in_fault: .quad 0       # what that was when the #GP of the first one's IRET was handled
spinner: .quad 0
model: .long 0
