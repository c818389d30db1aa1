/* Puts a pageferry guest program on a PC that QEMU emulates: a multiboot 1 image, of which this is the beginning.

   It copies what lies behind it (a table of: gpa u32, size u32 in 4-byte words, content) to its place, turns on long
   mode with page tables from that table, and enters ring 3 as docs/reference/guest-abi.md says. What stays in ring 0 is the clock
   of that ABI: port 0xf0 is denied in the I/O permission bitmap, and the fault handler answers from the PIT, which
   ticks every ms once the program has asked. A wait is a HLT until the next tick ("perhaps less": the program asks
   again). */

    .set LOAD_GPA, 0x400000
    .set PAGE_TABLES_GPA, 0x10000
    .set INFO_GPA, 0x1000
    .set PROGRAM_STACK, 0x90000 - 8
    .set KERNEL_CS, 0x18
    .set TSS, 0x38
    .set USER_DS, 0x2b
    .set USER_CS, 0x33
    .set CLOCK_PORT, 0xf0
    .set TICK_US, 1000
    .set PIT_DIVISOR, 1193

    .macro gate vector, handler         /* %eax is lost */
    mov $\handler, %eax
    mov %ax, idt + 16 * \vector
    movw $KERNEL_CS, idt + 16 * \vector + 2
    movw $0x8e00, idt + 16 * \vector + 4
    shr $16, %eax
    mov %ax, idt + 16 * \vector + 6
    .endm

    .text
    .code32
    .globl _start
_start:
    .balign 4
header:
    .long 0x1badb002, 0x10003, -(0x1badb002 + 0x10003)
    .long header, LOAD_GPA, 0, 0, enter_32

enter_32:
    cli
    cld
    mov $payload + 4, %esi
1:  mov (%esi), %edi
    mov 4(%esi), %ecx
    add $8, %esi
    test %ecx, %ecx
    jz 2f
    rep movsl
    jmp 1b
2:  gate 13, denied
    gate 0x20, tick
    mov $tss, %eax
    mov %ax, gdt + TSS + 2
    shr $16, %eax
    mov %al, gdt + TSS + 4
    lgdt gdt_pointer
    mov $0x620, %eax                    /* CR4: PAE, OSFXSR, OSXMMEXCPT */
    mov %eax, %cr4
    mov $PAGE_TABLES_GPA, %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx               /* EFER: LME */
    rdmsr
    or $0x100, %eax
    wrmsr
    mov $0x80050033, %eax
    mov %eax, %cr0
    ljmp $KERNEL_CS, $enter_64

    .code64
enter_64:
    mov $USER_DS, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %fs
    mov %eax, %gs
    xor %eax, %eax
    mov %eax, %ss
    mov $kernel_stack, %esp
    lidt idt_pointer
    mov $TSS, %eax
    ltr %ax
    fninit
    /* both PICs: vectors from 0x20 and 0x28, everything masked */
    mov $0x11, %al
    out %al, $0x20
    out %al, $0xa0
    mov $0x20, %al
    out %al, $0x21
    mov $0x28, %al
    out %al, $0xa1
    mov $4, %al
    out %al, $0x21
    mov $2, %al
    out %al, $0xa1
    mov $1, %al
    out %al, $0x21
    out %al, $0xa1
    mov $0xff, %al
    out %al, $0x21
    out %al, $0xa1
    push $USER_DS
    push $PROGRAM_STACK
    push $0x202
    push $USER_CS
    mov payload, %eax
    push %rax
    mov $INFO_GPA, %edi
    xor %esi, %esi
    iretq

tick:                                   /* IRQ 0 */
    push %rax
    incl ticks
    mov $0x20, %al
    out %al, $0x20
    pop %rax
    iretq

denied:                                 /* #GP from ring 3: `in $0xf0, %eax` or `out %eax, $0xf0`, 2 bytes each */
    add $8, %rsp
    push %rbx
    mov 8(%rsp), %rbx
    cmpw $0xe5 | CLOCK_PORT << 8, (%rbx)
    je read_clock
    cmpw $0xe7 | CLOCK_PORT << 8, (%rbx)
    jne die
    sti
    hlt
    cli
    jmp return
read_clock:
    cmpl $0, ticks
    jne 1f
    movl $1, ticks
    mov $0x34, %al                      /* rate generator, low byte and high byte */
    out %al, $0x43
    mov $PIT_DIVISOR & 0xff, %al
    out %al, $0x40
    mov $PIT_DIVISOR >> 8, %al
    out %al, $0x40
    mov $0xfe, %al                      /* and IRQ 0 may come */
    out %al, $0x21
1:  imul $TICK_US, ticks, %eax
return:
    addq $2, 8(%rsp)
    pop %rbx
    iretq

die:                                    /* nothing else is ever right: stand still, and be seen to */
    cli
    hlt
    jmp die

    .balign 16
gdt:
    .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
    .quad 0x00af9b000000ffff            /* 0x18: ring 0, 64 bits */
    .quad 0
    .quad 0x00cff3000000ffff            /* 0x28: ring 3, data */
    .quad 0x00affb000000ffff            /* 0x30: ring 3, 64 bits */
    .word tss_end - tss - 1, 0          /* 0x38: TSS; its base is filled in above */
    .byte 0, 0x89, 0, 0
    .quad 0
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .long gdt
    .balign 16
idt:
    .skip 16 * 0x21
idt_pointer:
    .word idt_pointer - idt - 1
    .quad idt
    .balign 16
tss:
    .long 0
    .quad kernel_stack                  /* RSP0 */
    .skip 90
    .word bitmap - tss
bitmap:
    .skip CLOCK_PORT / 8
    .byte 0x0f                          /* 0xf0 to 0xf3 are denied */
    .skip 0x2000 - CLOCK_PORT / 8 - 1
    .byte 0xff
tss_end:
ticks:
    .long 0
    .balign 16
    .skip 1024
kernel_stack:
payload:                                /* what is put behind the shim: the entry point u32, then the table */
