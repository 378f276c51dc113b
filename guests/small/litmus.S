# litmus: coherence among CPUs. Each test runs its rounds for a given time and counts what
# must never be seen; lib/litmus.inc tells the options and how a test is called.
#
# On 2 to 8 CPUs; the tests with a third party need 3. The expectations are the manuals'
# (SDM volume 3: 9.1.3 code that another processor changes, 4.10 paging caches, 9.2 memory
# ordering). QEMU 7.2 (TCG) and the figures seen: docs/coherence.md.

.include "lib/boot.inc"
.include "lib/apic.inc"
.include "lib/smp.inc"
.include "lib/litmus.inc"
.include "litmus/code.inc"
.include "litmus/restart.inc"
.include "litmus/writes.inc"
.include "litmus/tables.inc"
.include "litmus/paging.inc"
.include "litmus/processor.inc"
.include "litmus/dma.inc"
.include "litmus/figures.inc"

    .code64
main64:
    call litmus_options
    call start_aps
    OPTION "cpus=", 0           # so many are there, however long they take
    mov $1000000000, %ecx
1:  cmp cpu_count, %rax
    jbe 2f
    pause
    dec %ecx
    jnz 1b
2:  COUNT WAKE
    sti
    PRINT "litmus: "
    mov cpu_count, %rax
    call put_decimal
    PRINT " CPUs\n"
    call paging_ready

    LITMUS order, 2, code_ready
    LITMUS halted, 2, code_ready
    LITMUS chain, 3, code_ready
    LITMUS chain_read, 3, code_ready
    LITMUS chain_fresh, 3, code_ready
    LITMUS mutual, 2, code_ready
    LITMUS each_other, 2, code_ready
    LITMUS restart, 3, restart_ready
    LITMUS crossing, 2
    LITMUS beside, 2
    LITMUS stores, 2
    LITMUS shared, 2, shared_ready
    LITMUS shared_code, 2, shared_ready
    LITMUS accessed, 2, processor_ready
    LITMUS pushed, 2, processor_ready
    LITMUS gdt, 2
    LITMUS idt, 2
    LITMUS ldt, 2
    LITMUS tss, 2, tss_ready
    LITMUS roles, 6, roles_ready
    LITMUS shootdown, 2, shootdown_ready
    LITMUS present, 2, shootdown_ready
    mov $PROBE, %eax
    cmpl $PROBE_IDENT, (%rax)
    jne 1f
    LITMUS dma_code, 2, dma_ready
    LITMUS dma_paging, 2, dma_paging_ready
1:  FINISH "litmus"
