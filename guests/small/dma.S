# dma: a device writes guest memory (trapline's --device dma-probe; the registers are
# described in crates/devices/src/dma_probe). What was derived from the bytes before, be it
# code or translations, is not used after the device says that it is done.

.include "lib/boot.inc"

.set ROUNDS, 2000
.set PROBE, 0xfeb00000
.set SOURCE, PROBE + 0x08
.set DESTINATION, PROBE + 0x10
.set COPY_LENGTH, PROBE + 0x18
.set COMMAND, PROBE + 0x1c
.set STATUS, PROBE + 0x20
.set COPIED, PROBE + 0x24
.set DONE, 2
.set FAILED, 3
.set WINDOW, 0x8000000000

    .code64
main64:
    mov $PROBE, %eax
    mov (%rax), %eax
    CHECK "the device is there", %rax, $0x414d4454
    call into_code
    call into_page_table
    call into_data
    call refused
    FINISH "dma"

# copy: RSI = source, RDI = destination, ECX = bytes. Returns STATUS in EAX. Clobbers RDX.
copy:
    mov $SOURCE, %edx
    mov %rsi, (%rdx)
    mov %rdi, 8(%rdx)
    mov %ecx, 16(%rdx)
    movl $1, 20(%rdx)
1:  mov $STATUS, %edx
    mov (%rdx), %eax
    pause
    cmp $1, %eax
    je 1b
    ret

# A function that has run is overwritten.
into_code:
    mov $ROUNDS, %ebx
1:  mov %ebx, immediate
    mov $immediate, %esi
    mov $function + 1, %edi
    mov $4, %ecx
    call copy
    CHECK "into code: status", %rax, $DONE
    call function
    CHECK "into code", %rax, %rbx
    dec %ebx
    jnz 1b
    ret

# The page behind a linear address is exchanged, then flushed.
into_page_table:
    movq $window_pdpt + 3, boot_pml4 + 8
    movq $window_pd + 3, window_pdpt
    movq $window_pt + 3, window_pd
    movq $page_a + 3, window_pt
    movq $1, page_a
    movq $2, page_b
    movq $page_a + 3, entries
    movq $page_b + 3, entries + 8
    movabs $WINDOW, %r12
    mov $ROUNDS, %ebx
    mov (%r12), %rax
    CHECK "into a page table: before", %rax, $1
1:  mov %ebx, %r13d
    and $1, %r13d
    lea entries(,%r13,8), %rsi
    mov $window_pt, %edi
    mov $8, %ecx
    call copy
    invlpg (%r12)
    mov (%r12), %rax
    inc %r13
    CHECK "into a page table", %rax, %r13
    dec %ebx
    jnz 1b
    ret

into_data:
    mov $page_a, %edi
    mov $0x5a5a5a5a, %eax
    mov $1024, %ecx
    rep stosl
    mov $page_a, %esi
    mov $page_b + 3, %edi
    mov $0x801, %ecx
    call copy
    CHECK "into data: status", %rax, $DONE
    mov $page_b + 3, %edi
    mov $0x5a, %al
    mov $0x801, %ecx
    repe scasb
    CHECK "into data: bytes that differ", %rcx, $0
    ret

# The device's own registers, the end of memory, and wrapping ranges.
refused:
    mov $page_a, %esi
    mov $SOURCE, %edi
    mov $8, %ecx
    call copy
    CHECK "to its own registers", %rax, $FAILED
    mov $page_a, %edi
    mov $0xb0000000, %esi
    call copy
    CHECK "from a hole", %rax, $FAILED
    mov $-4, %rsi
    call copy
    CHECK "from the end of all addresses", %rax, $FAILED
    mov $page_a, %esi
    mov $-1, %ecx
    call copy
    CHECK "too long", %rax, $FAILED
    ret

    .balign 64
function:
    mov $0, %eax
    ret
    .skip 16, 0xcc

    .bss
    .balign 4096
window_pdpt: .skip 4096
window_pd: .skip 4096
window_pt: .skip 4096
page_a: .skip 4096
page_b: .skip 8192
entries: .skip 16
immediate: .quad 0
