//! What is translated for the goldens.

/// Cases that share a file.
pub struct Family {
    /// Of the file, without its ending.
    pub name: &'static str,
    /// In ring 0, at a kernel's addresses; else in ring 3.
    pub kernel: bool,
    /// The cases are whole blocks, and all of their code is listed: the poll and what stands
    /// behind the block too. Else each is one instruction in the middle of a block.
    pub whole: bool,
    /// Machine code, in hexadecimal. A bar stands between the pieces of a path.
    pub cases: &'static [&'static str],
}

pub const FAMILIES: &[Family] = &[
    // Moves and addresses.
    Family {
        name: "moves",
        kernel: false,
        whole: false,
        cases: &[
            "48 8b 06",                      // mov (%rsi),%rax
            "8b 4d 10",                      // mov 0x10(%rbp),%ecx
            "48 8b 14 cf",                   // mov (%rdi,%rcx,8),%rdx
            "4b 8b 44 ba f8",                // mov -8(%r10,%r15,4),%rax
            "48 8b 1c 24",                   // mov (%rsp),%rbx
            "4c 8b 16",                      // mov (%rsi),%r10
            "66 8b 0e",                      // mov (%rsi),%cx
            "8a 06",                         // mov (%rsi),%al
            "8a 26",                         // mov (%rsi),%ah
            "8a 2e",                         // mov (%rsi),%ch
            "0f b6 06",                      // movzbl (%rsi),%eax
            "0f bf 0e",                      // movswl (%rsi),%ecx
            "48 63 0e",                      // movslq (%rsi),%rcx
            "48 89 06",                      // mov %rax,(%rsi)
            "4c 89 3e",                      // mov %r15,(%rsi)
            "88 2e",                         // mov %ch,(%rsi)
            "c7 06 05 00 00 00",             // movl $5,(%rsi)
            "48 c7 44 24 08 ff ff ff ff",    // movq $-1,8(%rsp)
            "48 8b 05 00 20 00 00",          // mov 0x2000(%rip),%rax
            "c6 05 00 20 00 00 01",          // movb $1,0x2000(%rip)
            "64 48 8b 04 25 28 00 00 00",    // mov %fs:0x28,%rax
            "64 48 8b 07",                   // mov %fs:(%rdi),%rax
            "65 48 8b 07",                   // mov %gs:(%rdi),%rax
            "48 89 c2",                      // mov %rax,%rdx
            "48 89 c8",                      // mov %rcx,%rax
            "4c 89 d0",                      // mov %r10,%rax
            "4d 89 d7",                      // mov %r10,%r15
            "88 e3",                         // mov %ah,%bl
            "88 ea",                         // mov %ch,%dl
            "41 bf 07 00 00 00",             // mov $7,%r15d
            "48 b9 f0 de bc 9a 78 56 34 12", // movabs $0x123456789abcdef0,%rcx
            "48 8d 44 8f 08",                // lea 8(%rdi,%rcx,4),%rax
            "4f 8d 34 3a",                   // lea (%r10,%r15),%r14
            "48 8d 3d 00 20 00 00",          // lea 0x2000(%rip),%rdi
            "4c 8d 1d 00 20 00 00",          // lea 0x2000(%rip),%r11
            "0f 38 f0 06",                   // movbe (%rsi),%eax
            "48 91",                         // xchg %rax,%rcx
            "48 0f 44 06",                   // cmove (%rsi),%rax
            "41 0f ca",                      // bswap %r10d
        ],
    },
    // Arithmetic on registers and memory, and what is locked.
    Family {
        name: "arithmetic",
        kernel: false,
        whole: false,
        cases: &[
            "48 01 c8",             // add %rcx,%rax
            "4d 01 d7",             // add %r10,%r15
            "00 e3",                // add %ah,%bl
            "00 ec",                // add %ch,%ah
            "48 03 06",             // add (%rsi),%rax
            "48 01 06",             // add %rax,(%rsi)
            "00 2e",                // add %ch,(%rsi)
            "83 05 00 20 00 00 01", // addl $1,0x2000(%rip)
            "48 13 06",             // adc (%rsi),%rax
            "48 11 16",             // adc %rdx,(%rsi)
            "ff 06",                // incl (%rsi)
            "48 f7 16",             // notq (%rsi)
            "48 39 c1",             // cmp %rax,%rcx
            "48 3b 06",             // cmp (%rsi),%rax
            "80 3e 00",             // cmpb $0,(%rsi)
            "4d 85 d2",             // test %r10,%r10
            "f6 06 04",             // testb $4,(%rsi)
            "48 0f af 06",          // imul (%rsi),%rax
            "48 f7 e1",             // mul %rcx
            "48 f7 26",             // mulq (%rsi)
            "48 f7 f1",             // div %rcx
            "48 f7 36",             // divq (%rsi)
            "48 99",                // cqo
            "48 c1 e0 03",          // shl $3,%rax
            "48 d3 e0",             // shl %cl,%rax
            "48 d3 f9",             // sar %cl,%rcx
            "49 d3 ea",             // shr %cl,%r10
            "d3 26",                // shll %cl,(%rsi)
            "48 0f a5 d0",          // shld %cl,%rdx,%rax
            "c4 e2 f1 f7 06",       // shlx %rcx,(%rsi),%rax
            "c4 43 fb f0 fa 07",    // rorx $7,%r10,%r15
            "c4 62 c3 f6 c6",       // mulx %rsi,%rdi,%r8
            "48 0f a3 c8",          // bt %rcx,%rax
            "0f ba 26 03",          // btl $3,(%rsi)
            "0f a3 06",             // btl %eax,(%rsi)
            "48 0f bc 06",          // bsf (%rsi),%rax
            "f3 48 0f b8 06",       // popcnt (%rsi),%rax
            "0f 94 c0",             // sete %al
            "0f 94 06",             // sete (%rsi)
            "48 0f 4c c1",          // cmovl %rcx,%rax
            "48 0f c1 c8",          // xadd %rcx,%rax
            "f0 ff 06",             // lock incl (%rsi)
            "f0 48 0f c1 0e",       // lock xadd %rcx,(%rsi)
            "f0 48 0f b1 0e",       // lock cmpxchg %rcx,(%rsi)
            "f0 4c 0f b1 3e",       // lock cmpxchg %r15,(%rsi)
            "f0 48 0f c7 0e",       // lock cmpxchg16b (%rsi)
            "f0 48 0f ba 2e 05",    // lock btsq $5,(%rsi)
            "48 87 06",             // xchg %rax,(%rsi)
            "f2 48 0f 38 f1 06",    // crc32q (%rsi),%rax
            "9f",                   // lahf
            "fc",                   // cld
            "f9",                   // stc
        ],
    },
    // Stack and string instructions.
    Family {
        name: "stack",
        kernel: false,
        whole: false,
        cases: &[
            "50",             // push %rax
            "54",             // push %rsp
            "41 57",          // push %r15
            "6a 05",          // push $5
            "68 78 56 34 12", // push $0x12345678
            "ff 36",          // pushq (%rsi)
            "ff 74 24 08",    // pushq 8(%rsp)
            "58",             // pop %rax
            "5c",             // pop %rsp
            "41 5a",          // pop %r10
            "8f 06",          // popq (%rsi)
            "c9",             // leave
            "c8 20 00 00",    // enter $0x20,$0
            "66 50",          // push %ax
            "f3 a4",          // rep movsb
            "f3 48 ab",       // rep stosq
            "ac",             // lodsb
        ],
    },
    // SSE, AVX, AVX-512, and what is left of the x87.
    Family {
        name: "vector",
        kernel: false,
        whole: false,
        cases: &[
            "0f 10 06",          // movups (%rsi),%xmm0
            "0f 29 0e",          // movaps %xmm1,(%rsi)
            "0f 28 d1",          // movaps %xmm1,%xmm2
            "66 48 0f 6e c1",    // movq %rcx,%xmm0
            "66 41 0f 7e c2",    // movd %xmm0,%r10d
            "66 0f ef c0",       // pxor %xmm0,%xmm0
            "0f 58 c1",          // addps %xmm1,%xmm0
            "0f 58 06",          // addps (%rsi),%xmm0
            "f2 0f 59 06",       // mulsd (%rsi),%xmm0
            "f2 48 0f 2a c1",    // cvtsi2sd %rcx,%xmm0
            "f2 4c 0f 2c 3e",    // cvttsd2si (%rsi),%r15
            "66 0f 2e 06",       // ucomisd (%rsi),%xmm0
            "66 0f d7 c8",       // pmovmskb %xmm0,%ecx
            "66 0f 3a 63 c1 0c", // pcmpistri $0xc,%xmm1,%xmm0
            "66 0f 38 dc 06",    // aesenc (%rsi),%xmm0
            "c5 fe 6f 06",       // vmovdqu (%rsi),%ymm0
            "c5 fd e7 06",       // vmovntdq %ymm0,(%rsi)
            "c5 ec 58 d9",       // vaddps %ymm1,%ymm2,%ymm3
            "c5 ec 58 1c 8e",    // vaddps (%rsi,%rcx,4),%ymm2,%ymm3
            "c4 e2 f5 b8 06",    // vfmadd231pd (%rsi),%ymm1,%ymm0
            "c4 e2 75 90 04 96", // vpgatherdd %ymm1,(%rsi,%ymm2,4),%ymm0
            "c5 f8 77",          // vzeroupper
            "62 e1 fe 48 6f 0e", // vmovdqu64 (%rsi),%zmm17
            "62 f1 f5 58 58 16", // vaddpd (%rsi){1to8},%zmm1,%zmm2
            "62 f1 7f c9 6f 06", // vmovdqu8 (%rsi),%zmm0{%k1}{z}
            "c4 e1 fb 93 c9",    // kmovq %k1,%rcx
            "0f ae 16",          // ldmxcsr (%rsi)
            "0f fe c1",          // paddd %mm1,%mm0
            "dd 06",             // fldl (%rsi)
        ],
    },
    // The kernel's instructions.
    Family {
        name: "system",
        kernel: true,
        whole: false,
        cases: &[
            "48 8b 06",                   // mov (%rsi),%rax
            "48 89 06",                   // mov %rax,(%rsi)
            "f0 ff 06",                   // lock incl (%rsi)
            "65 48 8b 04 25 00 10 00 00", // mov %gs:0x1000,%rax
            "65 ff 07",                   // incl %gs:(%rdi)
            "55",                         // push %rbp
            "fa",                         // cli
            "fb",                         // sti
            "9c",                         // pushfq
            "9d",                         // popfq
            "0f 01 f8",                   // swapgs
            "0f 18 0e",                   // prefetcht0 (%rsi)
            "0f ae e8",                   // lfence
            "0f 31",                      // rdtsc
            "0f 32",                      // rdmsr
            "0f 20 d8",                   // mov %cr3,%rax
            "0f 22 d8",                   // mov %rax,%cr3
            "8c d8",                      // mov %ds,%eax
            "f3 90",                      // pause
            "0f a2",                      // cpuid
            "0f 01 cb",                   // stac
            "0f 01 3e",                   // invlpg (%rsi)
        ],
    },
    // Branches: each is a whole block.
    Family {
        name: "control",
        kernel: false,
        whole: true,
        cases: &[
            "eb 3e",             // jmp .+0x40
            "eb be",             // jmp .-0x40
            "eb fe",             // jmp .
            "e9 fb 2f 00 00",    // jmp .+0x3000
            "74 3e",             // je .+0x40
            "75 be",             // jne .-0x40
            "0f 82 fa 2f 00 00", // jb .+0x3000
            "e8 3b 00 00 00",    // call .+0x40
            "e8 fb cf ff ff",    // call .-0x3000
            "c3",                // ret
            "c2 10 00",          // ret $0x10
            "ff e0",             // jmp *%rax
            "41 ff e7",          // jmp *%r15
            "ff 26",             // jmp *(%rsi)
            "ff 25 00 20 00 00", // jmp *0x2000(%rip)
            "ff 24 cf",          // jmp *(%rdi,%rcx,8)
            "ff d0",             // call *%rax
            "41 ff d7",          // call *%r15
            "ff 15 00 20 00 00", // call *0x2000(%rip)
            "e3 1e",             // jrcxz .+0x20
            "e2 de",             // loop .-0x20
            "0f 05",             // syscall
            "f4",                // hlt
            "0f 0b",             // ud2
            "cc",                // int3
        ],
    },
    // Short blocks.
    Family {
        name: "blocks",
        kernel: false,
        whole: true,
        cases: &[
            "48 01 c8 48 39 d0 75 f8", // add %rcx,%rax; cmp %rdx,%rax; jne .-6
            "48 8b 06 48 01 c2 48 83 c6 08 48 ff c9 75 f1", // mov (%rsi),%rax; add %rax,%rdx; add $8,%rsi; dec %rcx; jne .-13
            "55 48 89 e5 53 48 83 ec 18 48 89 fb e8 fb 00 00 00", // push %rbp; mov %rsp,%rbp; push %rbx; sub $0x18,%rsp; mov %rdi,%rbx; call .+0x100
            "48 83 c4 18 5b 5d c3", // add $0x18,%rsp; pop %rbx; pop %rbp; ret
            "48 3b 07 48 8b 4f 08 74 1e", // cmp (%rdi),%rax; mov 8(%rdi),%rcx; je .+0x20
            "0f 10 06 0f 59 07 0f 58 c8 0f 11 0a", // movups (%rsi),%xmm0; mulps (%rdi),%xmm0; addps %xmm0,%xmm1; movups %xmm1,(%rdx)
            "0f 28 c8 0f a2 0f 28 d1",             // movaps %xmm0,%xmm1; cpuid; movaps %xmm1,%xmm2
            "f3 0f 1e fa 48 85 ff 0f 84 fa 2f 00 00", // endbr64; test %rdi,%rdi; je .+0x3000
        ],
    },
    // Short blocks in the kernel.
    Family {
        name: "kernel",
        kernel: true,
        whole: true,
        cases: &[
            "9c fa 65 48 8b 04 25 00 10 00 00 ff 40 08 c3", // pushfq; cli; mov %gs:0x1000,%rax; incl 8(%rax); ret
            "e8 3b 00 00 00",                               // call .+0x40
            "ff e0",                                        // jmp *%rax
            "0f 82 fa 2f 00 00",                            // jb .+0x3000
            "fa 48 01 c1",                                  // cli; add %rax,%rcx
            "0f 01 f8 65 48 89 24 25 14 00 00 00 65 48 8b 24 25 10 00 00 00", // swapgs; mov %rsp,%gs:0x14; mov %gs:0x10,%rsp
        ],
    },
    // Paths: what stands behind a bar is where the branch before it went.
    Family {
        name: "paths",
        kernel: false,
        whole: true,
        cases: &[
            "48 85 c0 74 3e | 48 8b 03 48 8b 53 08", // test %rax,%rax; je .+0x40; mov (%rbx),%rax; mov 8(%rbx),%rdx
            "e8 00 00 00 00 | 48 8b 04 24",          // call .+5; mov (%rsp),%rax
            "ff d0 | 48 8d 47 01 c3 | 48 85 c0", // call *%rax; lea 1(%rdi),%rax; ret; test %rax,%rax
            "ff 24 cf | 31 c0",                  // jmp *(%rdi,%rcx,8); xor %eax,%eax
            // A loop: call *%rdi; add $8,%rsp; add (%rbx),%rax; dec %rcx; jne to the call
            "ff d7 | 48 83 c4 08 48 03 03 48 ff c9 75 f2",
        ],
    },
];
