# edges: every way to address memory, at every kind of edge, at CPL 0 and 3.
#
# Each form of edges/forms.inc accesses `size` bytes at the address in RBX. The driver runs it on
# both sides of, and across, each edge of edges/places.inc, and compares with an oracle: vector,
# error code, CR2, RIP, all general registers, YMM0, and the bytes around the edge. So nothing may
# change but what the form changes, and nothing at all if it faults. After each form and place the
# rest of the two pages must still be zero.
#
# An access across the last byte of the address space goes on at 0, as one with a 32-bit address
# size goes on above 4 GiB: only effective addresses are cut to 32 bits.

.include "lib/boot.inc"

# What a form does.
.set READ, 1
.set WRITE, 2
.set STACK, 4                   # its segment is SS: #SS where others raise #GP
.set ALIGN16, 8
.set ALIGN32, 0x10
.set LOW, 0x20                  # reaches the first 4 GiB only (32-bit address size)
.set RELATIVE, 0x40             # its last four bytes are a displacement from RIP
.set ABSOLUTE, 0x80             # its last four bytes are the address
.set MOFFS, 0x100               # its last eight bytes are the address
.set PATTERN, 0x200             # writes the first bytes of `pattern`
.set INVERT, 0x400              # writes the complement of what was there
.set FILL, 0x800                # writes FILL_BYTE
.set TO_RAX, 0x1000             # RAX becomes what was read, zero-extended
.set TO_RAX_SIGNED, 0x2000      # sign-extended
.set TO_VECTOR, 0x4000          # the low bytes of YMM0 become what was read
.set JUMPS, 0x8000              # goes to the address that it reads
.set KERNEL, 0x10000            # at CPL 0 only
.set AVX, 0x20000
.set AVX2, 0x40000
.set CANONICAL, 0x80000         # not run where a part is not canonical
.set REPEATED, 0x100000         # REPEATS elements of `size` bytes, RCX counts
.set BACKWARD, 0x200000         # the next element lies below
.set BEFORE_IMMEDIATE, 0x400000 # with RELATIVE: a 32-bit immediate follows
.set BIG, 0x800000              # a save area: only the exception is checked
.set PAIR, 0x1000000            # two instructions, of which each may fault

.set REPEATS, 5
.set FILL_BYTE, 0x5a
.set SCAN_BYTE, 0x3b            # never in memory, nor left in a device's register

# A form's record.
.set FORM_ENTRY, 0
.set FORM_INSTRUCTION, 8
.set FORM_NAME, 16
.set FORM_END, 24
.set FORM_SIZE, 32
.set FORM_FLAGS, 40
.set FORM_RSP, 48               # added to RSP, RSI, RDI by each element
.set FORM_RSI, 56
.set FORM_RDI, 64
.set FORM_MAY, 72               # registers that may change, by their place in a frame
.set FORM_SECOND, 80            # the second instruction of a pair
.set FORM_STEP, 88              # the distance of its address from the first's
.set FORM_BYTES, 96

# Bits of FORM_MAY.
.set MAY_RBP, 1 << (FRAME_RBP / 8)
.set MAY_RDX, 1 << (FRAME_RDX / 8)
.set MAY_RCX, 1 << (FRAME_RCX / 8)
.set MAY_RBX, 1 << (FRAME_RBX / 8)
.set MAY_RAX, 1 << (FRAME_RAX / 8)

# What lies on a side of an edge.
.set RW, 0
.set RO, 1
.set ABSENT_PAGE, 2
.set HOLE_OF_ADDRESSES, 3       # not canonical
.set NO_RAM, 4                  # reads as ones, ignores writes
.set SUPERVISOR, 5
.set DEVICE, 6                  # reads and writes something

# A place's record.
.set PLACE_EDGE, 0
.set PLACE_LEFT, 8
.set PLACE_RIGHT, 16
.set PLACE_LEFT_PAGE, 24        # where its bytes can be seen, or 0
.set PLACE_RIGHT_PAGE, 32
.set PLACE_NAME, 40
.set PLACE_TRACED, 48           # code is executed there before each case
.set PLACE_BYTES, 56

.set WINDOW, 128                # bytes looked at on each side
.set PATTERN_LOW, 0x94837261    # the first four bytes of `pattern`

    .code64
main64:
    call find_features
    call map_places
    .irp number, 6, 12, 13, 14  # IST1: the stack may be at an edge
    GATE \number, 0x8e01
    .endr
    movl $0, user
1:  mov $places, %r15d
2:  mov $forms, %r14d
3:  call run_form
    add $FORM_BYTES, %r14
    cmp $forms_end, %r14
    jb 3b
    call fetches
    add $PLACE_BYTES, %r15
    cmp $places_end, %r15
    jb 2b
    incl user
    cmpl $2, user
    jb 1b
    movl $0, user
    call tables
    FINISH "edges"

find_features:
    mov $1, %eax
    cpuid
    bt $28, %ecx
    jnc 1f
    mov $CR4_BOOT | 0x40000, %eax
    mov %rax, %cr4
    xor %ecx, %ecx
    xor %edx, %edx
    mov $7, %eax
    xsetbv
    orl $AVX, features
    mov $7, %eax
    xor %ecx, %ecx
    cpuid
    bt $5, %ebx
    jnc 1f
    orl $AVX2, features
1:  mov $0xc0000100, %ecx       # FS base
    mov $FS_BASE & 0xffffffff, %eax
    mov $FS_BASE >> 32, %edx
    wrmsr
    mov $0xc0000101, %ecx       # GS base
    mov $GS_BASE & 0xffffffff, %eax
    mov $GS_BASE >> 32, %edx
    wrmsr
    ret

# run_form: R14 = form, R15 = place. Runs it at all distances from the edge, if it may run at all.
run_form:
    mov FORM_FLAGS(%r14), %r13
    mov %r13d, %eax
    and $AVX | AVX2, %eax
    mov features, %ecx
    not %ecx
    test %ecx, %eax
    jnz 9f
    cmpl $0, user
    je 0f
    test $KERNEL, %r13d
    jnz 9f
0:  test $BIG, %r13d            # it would reach registers that do something
    jz 1f
    cmpl $DEVICE, PLACE_LEFT(%r15)
    je 9f
    cmpl $DEVICE, PLACE_RIGHT(%r15)
    je 9f
1:  mov FORM_SIZE(%r14), %rbp
    mov $distances, %r12d
2:  movsbq (%r12), %rax         # times the size
    movsbq 1(%r12), %rcx        # plus bytes
    movzbl 2(%r12), %edx        # for sizes up to this, if not 0
    test %edx, %edx
    jz 4f
    cmp %rdx, %rbp
    ja 3f
4:  imul %rbp, %rax
    sar %rax                    # (in halves)
    add %rcx, %rax
    mov %rax, distance
    call run_case
3:  add $3, %r12
    cmp $distances_end, %r12
    jb 2b
    call check_rest
9:  ret

# Halves of the size, bytes, and the greatest size for which the distance is used (0: all).
    .section .rodata
distances:
    .byte -2, -1, 0
    .byte -2, 0, 0
    .byte -2, 1, 0
    .byte -1, 0, 0
    .byte 0, -1, 0
    .byte 0, 0, 0
    .byte 0, 1, 0
    .byte -6, 0, 8
    .byte 2, 0, 8
    .byte 4, 1, 8
distances_end:
    .text

# fill_window: the bytes around the edge, and the model of them.
fill_window:
    mov $fill, %esi
    mov $model, %edi
    mov $WINDOW * 2 / 8, %ecx
    rep movsq
    cmpl $NO_RAM, PLACE_LEFT(%r15)
    jne 1f
    mov $model, %edi
    call ones
1:  cmpl $NO_RAM, PLACE_RIGHT(%r15)
    jne 2f
    mov $model + WINDOW, %edi
    call ones
2:  test $JUMPS, %r13d
    jz 3f
    mov distance, %rax
    movq $form_end, model + WINDOW(%rax)
3:  call show_model
    mov $model, %esi            # before the form
    mov $original, %edi
    mov $WINDOW * 2 / 8, %ecx
    rep movsq
    cmpq $0, PLACE_TRACED(%r15)
    je 6f
    mov PLACE_RIGHT_PAGE(%r15), %rax
    add $RETURN_AT, %rax
    call *%rax
6:  ret
ones:
    mov $-1, %rax
    mov $WINDOW / 8, %ecx
    rep stosq
    ret

# show_model: writes the model to the pages.
show_model:
    mov PLACE_LEFT_PAGE(%r15), %rdi
    test %rdi, %rdi
    jz 4f
    add $4096 - WINDOW, %rdi
    mov $model, %esi
    mov $WINDOW / 8, %ecx
    rep movsq
4:  mov PLACE_RIGHT_PAGE(%r15), %rdi
    test %rdi, %rdi
    jz 5f
    mov $model + WINDOW, %esi
    mov $WINDOW / 8, %ecx
    rep movsq
5:  ret

# patch_form: writes the displacement or address into the form. Sets ZF if it cannot reach.
patch_form:
    mov case_address, %rax
    test $LOW, %r13d
    jz 1f
    mov %rax, %rcx
    shr $32, %rcx
    jnz 8f
1:  mov FORM_END(%r14), %rdi
    test $MOFFS, %r13d
    jz 2f
    mov %rax, -8(%rdi)
    jmp 9f
2:  test $ABSOLUTE, %r13d
    jnz 3f
    test $RELATIVE, %r13d
    jz 9f
    sub %rdi, %rax
    test $BEFORE_IMMEDIATE, %r13d
    jz 3f
    sub $4, %rdi
3:  test $LOW, %r13d
    jnz 4f
    movslq %eax, %rcx
    cmp %rcx, %rax
    jne 8f
4:  mov %eax, -4(%rdi)
9:  or $1, %eax
    ret
8:  xor %eax, %eax
    ret

# run_case: the form at edge + distance.
run_case:
    mov PLACE_EDGE(%r15), %rax
    add distance, %rax
    mov %rax, case_address
    call patch_form
    jz 9f
    call predict
    cmpl $0, skip
    jne 9f
    call fill_window
    mov FORM_ENTRY(%r14), %rax
    call run_at
    call check_case
9:  ret

# run_at: goes to RAX with the case's address in RBX, at the CPL of `user`, until an exception.
run_at:
    call load_vectors
    mov %rbp, saved
    mov %r12, saved + 8
    mov %r13, saved + 16
    mov %r14, saved + 24
    mov %r15, saved + 32
    TRY case_done
    cmpl $0, user
    jne 1f
    pushq $KDATA
    pushq $form_stack_top
    pushq $2
    pushq $KCODE64
    jmp 2f
1:  pushq $UDATA
    pushq $form_stack_top
    pushq $2
    pushq $UCODE64
2:  push %rax
    mov case_address, %rbx
    mov pattern, %rax
    movabs $0x0123456789abcdef, %rcx
    movabs $0xfedcba9876543210, %rdx
    mov $0x51515151, %esi
    mov $0xd1d1d1d1, %edi
    mov $0xb0b0b0b0, %ebp
    .irp n, 8, 9, 10, 11, 12, 13, 14, 15
    mov $0x01010101 * \n, %r\n
    .endr
    iretq
case_done:
    fninit
    cmpl $0, features
    je 1f
    vmovups %ymm0, vector_after
    vzeroupper
    jmp 2f
1:  movups %xmm0, vector_after
2:  ldmxcsr default_mxcsr
    mov saved, %rbp
    mov saved + 8, %r12
    mov saved + 16, %r13
    mov saved + 24, %r14
    mov saved + 32, %r15
    ret

# A form ends here, at its own CPL, by #UD.
form_end:
    ud2

load_vectors:
    cmpl $0, features
    je 1f
    vmovups pattern, %ymm0
    vpxor %xmm1, %xmm1, %xmm1
    vmovups mask_low_dword, %ymm2
    vmovups mask_high_dword, %ymm3
    vmovups mask_low_qword, %ymm4
    vmovups mask_high_qword, %ymm5
    vmovups mask_all, %ymm6
    vmovups minus_one, %ymm7
    ret
1:  movups pattern, %xmm0
    movups mask_all, %xmm6
    ret

.include "edges/oracle.inc"
.include "edges/places.inc"
.include "edges/forms.inc"
.include "edges/fetches.inc"

    .data
    .balign 32
pattern: .quad 0x8c9dabc094837261, 0x1f2e3d4c5b6a7988, 0x6978879685a4b3c2, 0xd1e0ff0e1d2c3b4a
mask_low_dword: .quad 0x80000000, 0, 0, 0
mask_high_dword: .quad 0, 0, 0, 0x8000000000000000
mask_low_qword: .quad 0x8000000000000000, 0, 0, 0
mask_high_qword: .quad 0, 0, 0, 0x8000000000000000
mask_all: .quad -1, -1, -1, -1
minus_one: .quad -1, -1, -1, -1
default_mxcsr: .long 0x1f80
    .balign 8
# No SCAN_BYTE. A RET at RETURN_AT above the edge.
.set RETURN_AT, 40
fill:
    .set value, 0
    .rept WINDOW * 2
    .if value == WINDOW + RETURN_AT
    .byte 0xc3
    .else
    .byte 0x80 + (value * 5 & 0x7f)
    .endif
    .set value, value + 1
    .endr
fill_bytes: .fill 256, 1, FILL_BYTE
scan_bytes: .fill 256, 1, SCAN_BYTE

    .bss
    .balign 64
model: .skip WINDOW * 2
original: .skip WINDOW * 2
vector_after: .skip 32
sink: .skip 256
before: .skip FRAME_VECTOR      # as f_regs
before_rsp: .quad 0
saved: .skip 40
case_address: .quad 0
distance: .quad 0
features: .long 0
user: .long 0
skip: .long 0
    .balign 16
    .skip 512
form_stack: .skip 1024
form_stack_top:
    .skip 64
