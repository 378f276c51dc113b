# hang: one CPU spins for ever with interrupts off. For time limits and signals.
.include "lib/boot.inc"
    .code64
main64:
    PRINT "hang: spinning\n"
    cli
1:  jmp 1b
