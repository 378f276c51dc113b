# watched: accesses that trapline's --watch is to report, by instructions whose addresses it prints.
# Needs two CPUs. In the end one of them stores to one place for a while.

.include "lib/boot.inc"
.include "lib/apic.inc"
.include "lib/smp.inc"

.set WINDOW, 0x400000           # eight watched bytes, and four at the next page
.set HAMMERED, 0x410000
.set STORES, 300000

# SITE label: prints "label=address".
.macro SITE label:req
    PRINT "\label="
    mov $\label, %eax
    call put_hex
    PRINT "\n"
.endm

    .code64
main64:
    call start_aps
    SITE store
    SITE inside
    SITE load
    SITE locked
    SITE crossing
    SITE wide
    SITE other
    mov $WINDOW, %ebx
    mov $0x1122334455667788, %rax
store:
    mov %rax, (%rbx)
    mov %rax, 8(%rbx)           # beside: nothing is reported
    mov %al, -1(%rbx)
    mov 8(%rbx), %ecx
inside:
    movb $0x5a, 3(%rbx)
load:
    mov 4(%rbx), %ecx
locked:
    lock incq (%rbx)
crossing:
    mov %rax, 0xffc(%rbx)       # four bytes on each page
    movd %eax, %xmm0
    pshufd $0, %xmm0, %xmm0
wide:
    movups %xmm0, -8(%rbx)
    mov $1, %edi
    mov $other_cpu, %esi
    call start_job
    mov $1, %edi
    call finish_job
    mov $HAMMERED, %ebx
    mov $STORES, %ecx
1:  mov %rcx, (%rbx)
    dec %ecx
    jnz 1b
    CHECK "the last store", %rcx, $0
    FINISH "watched"

other_cpu:
    mov $WINDOW, %ebx
other:
    movl $7, (%rbx)
    ret
