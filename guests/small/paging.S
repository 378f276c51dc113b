# paging: permissions of the page walk against an oracle computed here, error code and
# CR2; large pages, reserved bits, accessed and dirty bits, flushes, global pages, PCID;
# accesses across a page edge of which one side faults.
#
# SDM volume 3, chapter 4; AMD APM volume 2, chapter 5. The oracle runs over U/S, R/W and
# NX of the leaf and of one directory (each of three levels) x CR0.WP x SMEP x SMAP x
# RFLAGS.AC x read, write and fetch at CPL 0 and 3. A failing case's number is, from bit 0:
# access (0 to 5), control (WP 1, SMEP 2, SMAP 4, AC 8) at bit 4, directory (U 1, W 2, NX 4)
# at bit 8, leaf at bit 12, directory level at bit 16.
#
# QEMU 7.2 (TCG) leaves P clear in the error code of reserved-bit faults (4.7: set), Bochs
# 2.7 agrees with all of it.

.set BOOT_MAP, 0x83             # the identity map is the supervisor's
.include "lib/boot.inc"

.set TEST, 0x8000000000         # PML4 entry 1: the pages under test
.set USER, 0x10000000000        # PML4 entry 2: code and stack of CPL 3
.set USER_STACK, USER + 0x200000 - 16
.set FRAME0, 0x1400000          # physical pages under test
.set FRAME1, 0x1401000
.set NX, 0x8000000000000000

    .code64
main64:
    call map
    call features
    call permissions
    call absent
    call reserved
    call large_pages
    call accessed_and_dirty
    call flushes
    call global_pages
    call address_spaces
    call page_edges
    FINISH "paging"

map:
    GATE 0x80, 0xee00
    movq $test_pdpt + 7, boot_pml4 + 8
    movq $test_pd + 7, test_pdpt
    movq $test_pt + 7, test_pd
    movq $user_pdpt + 7, boot_pml4 + 16
    movq $user_pd + 7, user_pdpt
    movq $user_pt + 7, user_pd
    movq $user_start + 7, user_pt
    movq $user_stack_page + 7, user_pt + 0xff8
    movw $0x80cd, FRAME0        # int 0x80, for fetches
    movw $0x80cd, FRAME1
    call reset_test
    mov %cr3, %rax
    mov %rax, %cr3
    ret

# reset_test: all levels writable, user, executable; pages 0 and 1 on their frames.
reset_test:
    movq $test_pdpt + 7, boot_pml4 + 8
    movq $test_pd + 7, test_pdpt
    movq $test_pt + 7, test_pd
    movq $FRAME0 + 7, test_pt
    movq $FRAME1 + 7, test_pt + 8
    push %rax
    movabs $TEST, %rax
    invlpg (%rax)
    invlpg 0x1000(%rax)
    pop %rax
    ret

# features: bit 1 SMEP, 2 SMAP as in the control number; the rest by its own variable.
features:
    mov $7, %eax
    xor %ecx, %ecx
    cpuid
    xor %esi, %esi
    bt $7, %ebx
    jnc 1f
    or $2, %esi
1:  bt $20, %ebx
    jnc 2f
    or $4, %esi
2:  mov %esi, supervisor_features
    bt $10, %ebx
    setc has_invpcid
    mov $1, %eax
    cpuid
    bt $17, %ecx
    setc has_pcid
    mov $0x80000001, %eax
    cpuid
    bt $26, %edx
    setc has_1g
    mov $0x80000008, %eax
    cpuid
    movzbl %al, %eax
    mov %eax, physical_bits
    ret

# user_access: the routine in .user at RAX, at CPL 3, RBX = address. Never returns: INT
# 0x80 or a fault ends it.
user_access:
    pushq $UDATA
    movabs $USER_STACK, %rcx
    push %rcx
    pushfq                      # AC as it is
    pushq $UCODE64
    sub $user_start, %rax
    movabs $USER, %rcx
    add %rcx, %rax
    push %rax
    iretq

    .section .user, "ax"
user_read:
    movb (%rbx), %al
    int $0x80
user_write:
    movb $0xcd, (%rbx)
    int $0x80
user_fetch:
    jmp *%rbx
user_stac:
    stac
    int $0x80
    .text

# spread: EAX = combination (U 1, W 2, NX 4). Returns RAX = entry flags with P set.
spread:
    push %rcx
    mov %eax, %ecx
    and $3, %ecx                # U is entry bit 2, W bit 1
    mov spread_table(,%rcx,8), %rcx
    bt $2, %eax
    jnc 1f
    bts $63, %rcx
1:  mov %rcx, %rax
    pop %rcx
    ret
    .section .rodata
    .balign 8
spread_table: .quad 1, 5, 3, 7
    .balign 8
levels: .quad test_pd, test_pdpt, boot_pml4 + 8
level_targets: .quad test_pt, test_pd, test_pdpt
    .text

# R15 control, R14 directory level, R13 directory, R12 leaf, EBP access.
permissions:
    xor %r15d, %r15d
next_control:
    mov %r15d, %eax
    and $6, %eax
    mov supervisor_features, %ecx
    not %ecx
    test %ecx, %eax
    jnz control_done            # the CPU does not have it
    mov $CR0_BOOT & ~0x10000, %eax
    bt $0, %r15d
    jnc 1f
    or $0x10000, %eax
1:  mov %rax, %cr0
    mov $CR4_BOOT, %eax
    bt $1, %r15d
    jnc 1f
    or $0x100000, %eax
1:  bt $2, %r15d
    jnc 1f
    or $0x200000, %eax
1:  mov %rax, %cr4
    xor %r14d, %r14d
next_level:
    xor %r13d, %r13d
next_directory:
    xor %r12d, %r12d
next_leaf:
    xor %ebp, %ebp
next_access:
    call one_access
    inc %ebp
    cmp $6, %ebp
    jb next_access
    inc %r12d
    cmp $8, %r12d
    jb next_leaf
    inc %r13d
    cmp $8, %r13d
    jb next_directory
    call reset_test
    inc %r14d
    cmp $3, %r14d
    jb next_level
control_done:
    inc %r15d
    cmp $16, %r15d
    jb next_control
    mov $CR0_BOOT, %eax
    mov %rax, %cr0
    mov $CR4_BOOT, %eax
    mov %rax, %cr4
    movq $0, check_mark
    ret

one_access:
    # the case's number
    mov %r14d, %eax
    shl $4, %eax
    or %r12d, %eax
    shl $4, %eax
    or %r13d, %eax
    shl $4, %eax
    or %r15d, %eax
    shl $4, %eax
    or %ebp, %eax
    bts $24, %eax
    mov %rax, check_mark
    # the entries, accessed and dirty clear
    call reset_test
    mov %r12d, %eax
    call spread
    or $FRAME0, %rax
    mov %rax, test_pt
    mov %r13d, %eax
    call spread
    or level_targets(,%r14,8), %rax
    mov levels(,%r14,8), %rcx
    mov %rax, (%rcx)
    movabs $TEST, %rbx
    invlpg (%rbx)
    # the oracle: EAX = 1 when allowed, EDX = error code otherwise
    mov %r12d, %esi
    and %r13d, %esi             # U and W
    mov %r12d, %edi
    or %r13d, %edi
    shr $2, %edi                # NX
    mov $1, %eax
    mov oracle_errors(%rbp), %dl
    movzbl %dl, %edx
    cmp $3, %ebp
    jae 3f
    cmp $2, %ebp
    je 2f
    mov %r15d, %ecx             # supervisor data: SMAP without AC
    and $12, %ecx
    cmp $4, %ecx
    jne 1f
    bt $0, %esi
    jnc 1f
    xor %eax, %eax
1:  test %ebp, %ebp
    jz 5f
    bt $1, %esi                 # write: W, or no WP
    jc 5f
    bt $0, %r15d
    jnc 5f
    xor %eax, %eax
    jmp 5f
2:  test %edi, %edi             # supervisor fetch: NX, SMEP
    jz 1f
    xor %eax, %eax
1:  bt $1, %r15d
    jnc 5f
    bt $0, %esi
    jnc 5f
    xor %eax, %eax
    jmp 5f
3:  bt $0, %esi                 # user: U
    jc 1f
    xor %eax, %eax
1:  cmp $4, %ebp
    jne 1f
    bt $1, %esi
    jc 1f
    xor %eax, %eax
1:  cmp $5, %ebp
    jne 5f
    test %edi, %edi
    jz 5f
    xor %eax, %eax
5:  mov %eax, %r8d
    mov %edx, %r9d
    movb $0, FRAME0
    cmp $2, %ebp
    je 1f
    cmp $5, %ebp
    jne 2f
1:  movb $0xcd, FRAME0
2:  # the access, with AC as the case wants it
    TRY access_done
    pushq $2
    bt $3, %r15d
    jnc 1f
    orl $AC, (%rsp)
1:  popfq
    jmp *accesses(,%rbp,8)
supervisor_read:
    movb (%rbx), %al
    int $0x80
supervisor_write:
    movb $0xcd, (%rbx)
    int $0x80
supervisor_fetch:
    jmp *%rbx
go_user_read:
    mov $user_read, %eax
    jmp user_access
go_user_write:
    mov $user_write, %eax
    jmp user_access
go_user_fetch:
    mov $user_fetch, %eax
    jmp user_access
access_done:
    test %r8d, %r8d
    jz 1f
    CHECK "allowed: no fault", f_vec, $0x80
    mov test_pt, %rax
    mov $0x20, %ecx
    cmp $1, %ebp
    je 2f
    cmp $4, %ebp
    jne 3f
2:  mov $0x60, %ecx             # dirty
3:  CHECK_MASK "allowed: accessed and dirty", $0x60, %rax, %rcx
    mov levels(,%r14,8), %rcx
    CHECK_MASK "allowed: accessed directory", $0x20, (%rcx), $0x20
    cmp $1, %ebp
    je 2f
    cmp $4, %ebp
    jne 3f
2:  movzbl FRAME0, %eax
    CHECK "allowed: written", %rax, $0xcd
3:  ret
1:  CHECK "denied: vector", f_vec, $14
    CHECK "denied: error code", f_err, %r9
    CHECK "denied: cr2", f_cr2, %rbx
    CHECK_MASK "denied: not dirty", $0x40, test_pt, $0
    movzbl FRAME0, %eax
    mov oracle_bytes(%rbp), %cl
    movzbl %cl, %ecx
    CHECK "denied: memory unchanged", %rax, %rcx
    ret
    .section .rodata
oracle_errors: .byte 1, 3, 0x11, 5, 7, 0x15
oracle_bytes: .byte 0, 0, 0xcd, 0, 0, 0xcd
    .balign 8
accesses: .quad supervisor_read, supervisor_write, supervisor_fetch
    .quad go_user_read, go_user_write, go_user_fetch
    .text

.macro ALL_ABSENT name:req, entry:req
    call reset_test
    andq $~1, \entry
    movabs $TEST, %rbx
    invlpg (%rbx)
    EXPECT_FAULT "\name: read", 14, 0, mov (%rbx), %eax
    EXPECT_FAULT "\name: write", 14, 2, mov %eax, (%rbx)
    TRY 3f
    jmp *%rbx
3:  CHECK "\name: fetch", f_err, $0x10
    TRY 3f
    mov $user_read, %eax
    jmp user_access
3:  CHECK "\name: user read", f_err, $4
    TRY 3f
    mov $user_write, %eax
    jmp user_access
3:  CHECK "\name: user write", f_err, $6
    TRY 3f
    mov $user_fetch, %eax
    jmp user_access
3:  CHECK "\name: user fetch", f_err, $0x14
    CHECK "\name: cr2", f_cr2, %rbx
    orq $1, \entry              # from absent to present without a flush
    EXPECT_NONE "\name: present again", mov (%rbx), %eax
.endm
absent:
    ALL_ABSENT "absent page", test_pt
    ALL_ABSENT "absent page table", test_pd
    ALL_ABSENT "absent directory", test_pdpt
    ALL_ABSENT "absent pointer table", boot_pml4 + 8
    ret

# RESERVED "name", entry, value: the read of TEST meets a reserved bit there.
.macro RESERVED name:req, entry:req, value:req
    call reset_test
    movabs $\value, %rax
    or %rax, \entry
    movabs $TEST, %rbx
    invlpg (%rbx)
    EXPECT_FAULT "\name: read", 14, 9, mov (%rbx), %eax
    EXPECT_FAULT "\name: write", 14, 11, mov %eax, (%rbx)
    CHECK "\name: cr2", f_cr2, %rbx
    TRY 3f
    mov $user_read, %eax
    jmp user_access
3:  CHECK "\name: user read", f_err, $13
    andq $~1, \entry            # what is absent has no reserved bits
    invlpg (%rbx)
    EXPECT_FAULT "\name: absent", 14, 0, mov (%rbx), %eax
.endm
reserved:
    cmpl $52, physical_bits
    jae 1f
    RESERVED "bit 51 of a PTE", test_pt, 0x0008000000000000
    RESERVED "bit 51 of a PDE", test_pd, 0x0008000000000000
    RESERVED "bit 51 of a PDPTE", test_pdpt, 0x0008000000000000
    RESERVED "bit 51 of a PML4E", boot_pml4 + 8, 0x0008000000000000
1:  RESERVED "page size in a PML4E", boot_pml4 + 8, 0x80
    # a 2 MiB page: bits 13 to 20 are reserved
    RESERVED "bit 20 of a 2 MiB PDE", test_pd, 0x100080
    RESERVED "bit 13 of a 2 MiB PDE", test_pd, 0x2080
    cmpb $0, has_1g
    je 1f
    RESERVED "bit 29 of a 1 GiB PDPTE", test_pdpt, 0x20000080
    RESERVED "bit 13 of a 1 GiB PDPTE", test_pdpt, 0x2080
1:  # NX without EFER.NXE
    mov $0xc0000080, %ecx
    mov $EFER_BOOT & ~0x800, %eax
    xor %edx, %edx
    wrmsr
    RESERVED "NX in a PTE with EFER.NXE clear", test_pt, NX
    RESERVED "NX in a PDE with EFER.NXE clear", test_pd, NX
    mov $0xc0000080, %ecx
    mov $EFER_BOOT, %eax
    xor %edx, %edx
    wrmsr
    call reset_test
    ret

large_pages:
    movq $0, test_pt
    movq $FRAME0 + 0x87, test_pd        # 2 MiB
    movabs $TEST, %rbx
    invlpg (%rbx)
    movq $0x1234567, FRAME0 + 0x1ffff0
    mov 0x1ffff0(%rbx), %rax
    CHECK "2 MiB page: read", %rax, $0x1234567
    CHECK_MASK "2 MiB page: accessed, not dirty", $0x60, test_pd, $0x20
    movq $0x7654321, 0x3008(%rbx)
    CHECK "2 MiB page: write", FRAME0 + 0x3008, $0x7654321
    CHECK_MASK "2 MiB page: dirty", $0x60, test_pd, $0x60
    movq $FRAME0 + 0x85, test_pd
    invlpg 0x5000(%rbx)         # any address of the page
    lea 0x123456(%rbx), %rsi
    EXPECT_FAULT "2 MiB page: read-only", 14, 3, mov %eax, (%rsi)
    CHECK "2 MiB page: cr2", f_cr2, %rsi
    movq $FRAME0 + 0x1087, test_pd      # bit 12 is PAT
    invlpg (%rbx)
    EXPECT_NONE "2 MiB page: PAT", mov (%rbx), %eax
    cmpb $0, has_1g
    je 1f
    movq $0x87, test_pdpt               # 1 GiB at 0
    invlpg (%rbx)
    mov $FRAME0 + 0x1ffff0, %ecx
    mov (%rbx,%rcx), %rax
    CHECK "1 GiB page: read", %rax, $0x1234567
    CHECK_MASK "1 GiB page: accessed, not dirty", $0x60, test_pdpt, $0x20
    movq $0x1111, (%rbx,%rcx)
    CHECK "1 GiB page: write", FRAME0 + 0x1ffff0, $0x1111
    CHECK_MASK "1 GiB page: dirty", $0x60, test_pdpt, $0x60
1:  call reset_test
    ret

accessed_and_dirty:
    movabs $TEST, %rbx
    call reset_test
    CHECK_MASK "untouched: all clear", $0x60, test_pt, $0
    mov (%rbx), %al
    CHECK_MASK "read: accessed", $0x60, test_pt, $0x20
    CHECK_MASK "read: PDE accessed, no dirty bit there", $0x60, test_pd, $0x20
    CHECK_MASK "read: PDPTE accessed", $0x60, test_pdpt, $0x20
    CHECK_MASK "read: PML4E accessed", $0x60, boot_pml4 + 8, $0x20
    CHECK_MASK "the neighbour is untouched", $0x60, test_pt + 8, $0
    mov %al, (%rbx)             # through a TLB entry made by the read
    CHECK_MASK "write after read: dirty", $0x60, test_pt, $0x60
    call reset_test
    xor %eax, %eax
    mov $1, %ecx
    movl $2, FRAME0
    lock cmpxchg %ecx, (%rbx)   # fails, and writes the old value
    CHECK_MASK "failing cmpxchg: dirty", $0x60, test_pt, $0x60
    call reset_test
    movb $0, 0xfff(%rbx)
    CHECK_MASK "last byte: dirty", $0x60, test_pt, $0x60
    CHECK_MASK "last byte: the next page is untouched", $0x60, test_pt + 8, $0
    movw $0, 0xfff(%rbx)
    CHECK_MASK "across the edge: both dirty", $0x60, test_pt + 8, $0x60
    call reset_test
    prefetcht0 (%rbx)
    CHECK_MASK "prefetch: not dirty", $0x40, test_pt, $0
    call reset_test
    xor %ecx, %ecx
    mov %rbx, %rdi
    rep stosb
    CHECK_MASK "rep stosb of nothing: not dirty", $0x40, test_pt, $0
    call reset_test
    mov %rsp, %rcx
    lea 0x800(%rbx), %rsp
    push %rax
    mov %rcx, %rsp
    CHECK_MASK "push: dirty", $0x60, test_pt, $0x60
    call reset_test
    fnsave (%rbx)
    CHECK_MASK "fnsave: dirty", $0x60, test_pt, $0x60
    movw $0x80cd, FRAME0
    call reset_test
    TRY 3f
    jmp *%rbx
3:  CHECK_MASK "fetch: accessed", $0x60, test_pt, $0x20
    ret

# FRESH "name", what flushes...: page 0 is moved to frame 1 and the flush makes it seen.
.macro FRESH name:req, flags:req, flush:vararg
    movq $FRAME0 + \flags, test_pt
    movabs $TEST, %rbx
    invlpg (%rbx)
    mov (%rbx), %eax
    movq $FRAME1 + \flags, test_pt
    \flush
    mov (%rbx), %eax
    CHECK "\name", %rax, $0x1111
.endm
.macro FRAMES
    movl $0x9999, FRAME0
    movl $0x1111, FRAME1
.endm
flushes:
    FRAMES
    mov %cr3, %rdx
    FRESH "invlpg", 7, invlpg 0xfff(%rbx)
    FRESH "mov to cr3", 7, mov %rdx, %cr3
    mov $CR4_BOOT | 0x80, %ecx
    FRESH "setting CR4.PGE", 7, mov %rcx, %cr4
    mov $CR4_BOOT, %ecx
    FRESH "clearing CR4.PGE", 7, mov %rcx, %cr4
    # taking rights away
    movabs $TEST, %rbx
    movq $FRAME0 + 7, test_pt
    invlpg (%rbx)
    mov %eax, (%rbx)
    movq $FRAME0 + 5, test_pt
    invlpg (%rbx)
    EXPECT_FAULT "invlpg after write protection", 14, 3, mov %eax, (%rbx)
    mov (%rbx), %eax
    movq $0, test_pt
    mov %rdx, %cr3
    EXPECT_FAULT "cr3 after unmapping", 14, 0, mov (%rbx), %eax
    # a table replaced above
    call reset_test
    mov (%rbx), %eax
    movq $other_pt + 7, test_pd
    movq $FRAME1 + 7, other_pt
    FRAMES
    mov %rdx, %cr3
    mov (%rbx), %eax
    CHECK "another page table", %rax, $0x1111
    call reset_test
    movabs $NX | 0x1234, %rcx
    EXPECT_NONE "invlpg of a not canonical address", invlpg (%rcx)
    ret

global_pages:
    FRAMES
    mov $CR4_BOOT | 0x80, %eax
    mov %rax, %cr4
    mov $CR4_BOOT, %ecx
    FRESH "global: invlpg", 0x107, invlpg (%rbx)
    FRESH "global: clearing CR4.PGE", 0x107, mov %rcx, %cr4
    mov $CR4_BOOT | 0x80, %eax
    mov %rax, %cr4
    FRESH "global: clearing CR4.PGE again", 0x107, mov %rcx, %cr4
    # not global while CR4.PGE is set
    mov $CR4_BOOT | 0x80, %eax
    mov %rax, %cr4
    mov %cr3, %rdx
    FRESH "not global: cr3", 7, mov %rdx, %cr3
    mov $CR4_BOOT, %eax
    mov %rax, %cr4
    FRESH "G without CR4.PGE: cr3", 0x107, mov %rdx, %cr3
    call reset_test
    ret

.set PCIDE, 0x20000
.macro FLUSH_PCID kind:req, pcid:req, address=$0
    push %rax
    movq $\pcid, descriptor
    movq \address, descriptor + 8
    mov $\kind, %eax
    invpcid descriptor, %rax
    pop %rax
.endm

# Two address spaces that differ in PML4 entry 1: PCID 1 sees frame 0, PCID 2 frame 1.
address_spaces:
    cmpb $0, has_pcid
    je 9f
    FRAMES
    call reset_test
    mov $boot_pml4, %esi
    mov $other_pml4, %edi
    mov $512, %ecx
    rep movsq
    movq $other_pdpt + 7, other_pml4 + 8
    movq $other_pd + 7, other_pdpt
    movq $other_pt + 7, other_pd
    movq $FRAME1 + 7, other_pt
    mov %cr3, %rax
    or $1, %rax
    mov %rax, %cr3
    mov $CR4_BOOT | PCIDE, %ecx
    EXPECT_FAULT "CR4.PCIDE with CR3 11:0 set", 13, 0, mov %rcx, %cr4
    mov $boot_pml4, %eax
    mov %rax, %cr3
    mov %rcx, %cr4
    movabs $TEST, %rbx
    mov $boot_pml4 + 1, %r8d
    mov $other_pml4 + 2, %r9d
    mov %r8, %rax
    mov %rax, %cr3
    mov (%rbx), %eax
    CHECK "PCID 1", %rax, $0x9999
    mov %r9, %cr3
    mov (%rbx), %eax
    CHECK "PCID 2", %rax, $0x1111
    bts $63, %r8
    bts $63, %r9
    mov %r8, %cr3
    mov (%rbx), %eax
    CHECK "PCID 1 again, kept", %rax, $0x9999
    mov %cr3, %rax
    CHECK "cr3 reads bit 63 as 0", %rax, $boot_pml4+1
    mov %r9, %cr3
    mov (%rbx), %eax
    CHECK "PCID 2 again, kept", %rax, $0x1111
    # a load of CR3 without bit 63 flushes that PCID
    movq $FRAME0 + 7, other_pt
    btr $63, %r9
    mov %r9, %cr3
    mov (%rbx), %eax
    CHECK "PCID 2, flushed by cr3", %rax, $0x9999
    movq $FRAME1 + 7, other_pt
    cmpb $0, has_invpcid
    je 8f
    bts $63, %r9
    .irp kind, 0, 1, 2, 3
    # from PCID 1, PCID 2's translation is flushed
    movq $FRAME0 + 7, other_pt
    FLUSH_PCID 2, 0
    mov %r9, %cr3
    mov (%rbx), %eax
    CHECK "invpcid \kind: before", %rax, $0x9999
    mov %r8, %cr3
    movq $FRAME1 + 7, other_pt
    FLUSH_PCID \kind, 2, %rbx
    mov %r9, %cr3
    mov (%rbx), %eax
    CHECK "invpcid \kind", %rax, $0x1111
    .endr
    movq $0, descriptor + 8
    mov $4, %eax
    EXPECT_FAULT "invpcid type 4", 13, 0, invpcid descriptor, %rax
    movq $0x1000, descriptor
    xor %eax, %eax
    EXPECT_FAULT "invpcid with reserved bits", 13, 0, invpcid descriptor, %rax
    movq $2, descriptor
    movabs $NX, %rcx
    mov %rcx, descriptor + 8
    EXPECT_FAULT "invpcid 0, not canonical", 13, 0, invpcid descriptor, %rax
    mov $1, %eax
    EXPECT_NONE "invpcid 1 ignores the address", invpcid descriptor, %rax
8:  mov $boot_pml4, %eax
    mov %rax, %cr3
    mov $CR4_BOOT, %eax
    mov %rax, %cr4
    call reset_test
9:  mov %cr3, %rax
    bts $63, %rax
    EXPECT_FAULT "cr3 bit 63 without PCIDE", 13, 0, mov %rax, %cr3
    ret

# EDGE "name", error, instruction: RBX is 4 bytes before the edge; page 1 faults, and
# nothing is written to page 0.
.macro EDGE name:req, err:req, insn:vararg
    movl $0x55555555, FRAME0 + 0xffc
    movl $0x66666666, FRAME1
    mov $0x77, %eax
    EXPECT_FAULT "\name", 14, \err, \insn
    CHECK "\name: cr2", f_cr2, %rbp
    mov FRAME0 + 0xffc, %eax
    CHECK "\name: page 0 unchanged", %rax, $0x55555555
    mov FRAME1, %eax
    CHECK "\name: page 1 unchanged", %rax, $0x66666666
.endm
page_edges:
    call reset_test
    movabs $TEST + 0xffc, %rbx
    lea 4(%rbx), %rbp
    mov %rsp, %r12
    movq $0, test_pt + 8
    invlpg (%rbp)
    EDGE "read, absent", 0, mov (%rbx), %rcx
    EDGE "write, absent", 2, mov %rax, (%rbx)
    EDGE "add, absent", 2, add %rax, (%rbx)
    EDGE "lock xadd, absent", 2, lock xadd %rax, (%rbx)
    EDGE "movups store, absent", 2, movups %xmm0, (%rbx)
    EDGE "movnti, absent", 2, movnti %rax, (%rbx)
    EDGE "fstpt, absent", 2, fstpt (%rbx)
    EDGE "movbe-like xchg, absent", 2, xchg %rax, (%rbx)
    EDGE "cmpxchg, absent", 2, cmpxchg %rcx, (%rbx)
    EDGE "shld, absent", 2, shldq $4, %rax, (%rbx)
    mov %rbx, %rsi
    mov $scratch, %edi
    EDGE "movsq source, absent", 0, movsq
    mov %rbx, %rdi
    mov $scratch, %esi
    EDGE "movsq destination, absent", 2, movsq
    TRY 3f
    lea 8(%rbx), %rsp
2:  push %rax
3:  TRIED "push across", 14, 2, 2b
    CHECK "push across: cr2", f_cr2, %rbp
    lea 8(%rbx), %rcx
    CHECK "push across: rsp unchanged", f_rsp, %rcx
    movq $FRAME1 + 5, test_pt + 8
    invlpg (%rbp)
    EDGE "write, read-only", 3, mov %rax, (%rbx)
    EDGE "add, read-only", 3, add %rax, (%rbx)
    EDGE "lock add, read-only", 3, lock add %rax, (%rbx)
    EDGE "movups store, read-only", 3, movups %xmm0, (%rbx)
    EXPECT_NONE "read, read-only", mov (%rbx), %rcx
    # page 0 faults
    movq $FRAME1 + 7, test_pt + 8
    movq $0, test_pt
    invlpg (%rbx)
    invlpg (%rbp)
    EXPECT_FAULT "page 0 absent", 14, 2, mov %rax, (%rbx)
    CHECK "page 0 absent: cr2", f_cr2, %rbx
    mov FRAME1, %eax
    CHECK "page 0 absent: page 1 unchanged", %rax, $0x66666666
    movq $0, test_pt + 8
    invlpg (%rbp)
    EXPECT_FAULT "both absent", 14, 2, mov %rax, (%rbx)
    CHECK "both absent: cr2", f_cr2, %rbx
    # an instruction across the edge
    movq $FRAME0 + 7, test_pt
    movl $0x00c0c748, FRAME0 + 0xffc    # mov $imm32, %rax
    TRY 3f
    jmp *%rbx
3:  CHECK "fetch across: vector", f_vec, $14
    CHECK "fetch across: error code", f_err, $0x10
    CHECK "fetch across: cr2", f_cr2, %rbp
    CHECK "fetch across: rip", f_rip, %rbx
    movl $0x80cd80cd, FRAME0 + 0xffc    # the block ends before the edge
    TRY 3f
    jmp *%rbx
3:  CHECK "no fetch beyond the block", f_vec, $0x80
    # a string that meets the edge: precise registers
    lea -4(%rbx), %rdi
    mov $scratch, %esi
    mov $100, %ecx
    EXPECT_FAULT "rep movsb", 14, 2, rep movsb
    CHECK "rep movsb: rcx", f_rcx, $92
    CHECK "rep movsb: rdi", f_rdi, %rbp
    CHECK "rep movsb: rsi", f_rsi, $scratch+8
    CHECK "rep movsb: cr2", f_cr2, %rbp
    lea -20(%rbp), %rdi
    mov $100, %ecx
    EXPECT_FAULT "rep stosl", 14, 2, rep stosl
    CHECK "rep stosl: rcx", f_rcx, $95
    CHECK "rep stosl: rdi", f_rdi, %rbp
    call reset_test
    ret

    .bss
    .balign 4096
test_pdpt: .skip 4096
test_pd: .skip 4096
test_pt: .skip 4096
user_pdpt: .skip 4096
user_pd: .skip 4096
user_pt: .skip 4096
user_stack_page: .skip 4096
other_pml4: .skip 4096
other_pdpt: .skip 4096
other_pd: .skip 4096
other_pt: .skip 4096
scratch: .skip 4096
descriptor: .quad 0, 0
supervisor_features: .long 0
physical_bits: .long 0
has_invpcid: .byte 0
has_pcid: .byte 0
has_1g: .byte 0
