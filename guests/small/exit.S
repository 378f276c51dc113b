# exit: leaves at once through the debug-exit port with the value of `exit=N` in the
# Multiboot command line (decimal), or 42. The process exit status is (value << 1) | 1.
.include "lib/boot.inc"
    .code64
main64:
    mov $42, %eax
    mov multiboot_info, %ebx
    testl $4, (%rbx)            # a command line is there
    jz leave_guest
    mov 16(%rbx), %esi
1:  cmpb $0, (%rsi)
    je leave_guest
    cmpl $0x74697865, (%rsi)    # "exit"
    jne 2f
    cmpb $'=', 4(%rsi)
    je 3f
2:  inc %rsi
    jmp 1b
3:  add $5, %rsi
    xor %eax, %eax
4:  movzbl (%rsi), %ecx
    sub $'0', %ecx
    cmp $9, %ecx
    ja leave_guest
    imul $10, %eax
    add %ecx, %eax
    inc %rsi
    jmp 4b
