# crash_triple: an exception with an empty IDT: double fault, then triple fault
# (shutdown). RAX holds 0x7219, so that a register dump can be recognized.
.include "lib/boot.inc"
    .code64
main64:
    PRINT "crash_triple: now\n"
    mov $0x7219, %eax
    lidt empty
    ud2
    .data
empty: .word 0
    .quad 0
