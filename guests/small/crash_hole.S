# crash_hole: jumps, without paging, to a physical address where nothing is. A PC
# reads all ones there: FF FF is no instruction, the #UD finds no IDT, and the CPU
# shuts down. QEMU (TCG) reads zeros (ADD [EAX], AL) and runs on through the hole
# without an end. A monitor may stop with a message or reach the triple fault.
.include "lib/multiboot.inc"
    .code32
    .globl _start
_start:
    lidt empty
    mov $0xd0000000, %eax
    jmp *%eax
    .data
empty: .word 0
    .long 0
