# Boot: from the PVH entry (32-bit protected mode, paging off, EBX = start info) to ring 3 in long mode.
#
# Everything after the iretq runs in ring 3 with interrupts off, with I/O ports allowed twice over (I/O
# privilege 3 and a bitmap: hypervisors that emulate supervisor mode may honour only one of the two). Ring 3
# is not about protection: some hypervisors without hardware virtualization run user mode natively but emulate
# supervisor mode at about a million instructions a second. So this file is short, and its tables come
# ready-made from the linker.

.section .note.pvh, "a", @note
    .balign 4
    .long 4                     # length of the name
    .long 8                     # length of the descriptor
    .long 18                    # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_start

.section .text.boot, "ax"
.code32
.global pvh_start
pvh_start:
    cli
    cld
    movl $tss, %eax             # the base address of a system descriptor is scattered over it
    movw %ax, gdt_tss + 2
    shrl $16, %eax
    movb %al, gdt_tss + 4
    movb %ah, gdt_tss + 7
    lgdt gdt_pointer
    lidt idt_pointer
    movl %cr4, %eax
    orl $0x620, %eax            # PAE, OSFXSR, OSXMMEXCPT: long mode, and SSE for the compiled code
    movl %eax, %cr4
    movl $pml4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx      # EFER
    rdmsr
    orl $0x100, %eax            # LME
    wrmsr
    movl %cr0, %eax
    andl $0xfffffff3, %eax      # no EM, no TS
    orl $0x80000023, %eax       # PG, NE, MP, PE
    movl %eax, %cr0
    ljmpl $0x08, $long_mode
.code64
long_mode:
    movl $0x1b, %eax
    movl %eax, %ds
    movl %eax, %es
    xorl %ecx, %ecx
    movl %ecx, %fs
    movl %ecx, %gs
    movl $0x10, %ecx
    movl %ecx, %ss
    movl $kernel_stack_top, %esp
    movl $0x28, %ecx
    ltr %cx
    movl %ebx, %edi             # first argument of guest_main: the start info
    xorl %ebp, %ebp
    pushq $0x1b                 # ss
    pushq $user_stack_top - 8   # rsp, as after a call
    pushq $0x3002               # rflags: IOPL 3, interrupts off
    pushq $0x23                 # cs
    pushq $guest_main
    iretq

# Exceptions. Each vector has an 8-byte entry that pushes its number; the common part copies the frame to
# where ring 3 finds it, and returns into ring 3 at fault_main, which reports it and never comes back.
.balign 8
.global exception_entries
exception_entries:
.set vector, 0
.rept 32
    .balign 8
    pushq $vector
    jmp exception_common
    .set vector, vector + 1
.endr

exception_common:
    btsl $0, fault_entered
    jc second_fault
    popq %rax
    movq %rax, fault_frame      # vector
    movq %cr2, %rcx
    movq %rcx, fault_frame + 8
    popq %rdx                   # error code, or rip for the vectors without one
    movq %rdx, fault_frame + 16
    popq %rdx
    movq %rdx, fault_frame + 24
    movl $kernel_stack_top, %esp
    pushq $0x1b
    pushq $user_stack_top - 8
    pushq $0x3002
    pushq $0x23
    pushq $fault_main
    iretq

second_fault:                   # reporting the first one failed: a triple fault resets the machine
    lidt empty_idt_pointer
    ud2

.section .data.boot, "aw"
.balign 16
gdt:
    .quad 0
    .quad 0x00af9b000000ffff    # 0x08 ring-0 code, 64 bit
    .quad 0x00cf93000000ffff    # 0x10 ring-0 data
    .quad 0x00cff3000000ffff    # 0x18 ring-3 data (0x1b)
    .quad 0x00affb000000ffff    # 0x20 ring-3 code, 64 bit (0x23)
gdt_tss:
    .quad 0x0000890000000000 + (tss_end - tss - 1)    # 0x28 TSS, base filled in by the boot code
    .quad 0
gdt_end:
.balign 8
tss:
    .long 0
    .quad kernel_stack_top      # rsp0
    .fill 90, 1, 0
    .word 104                   # the I/O bitmap follows: all ports below 0x800 are allowed
    .fill 256, 1, 0
    .byte 0xff
tss_end:
.balign 8
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
.balign 8
idt_pointer:
    .word 32 * 16 - 1
    .long idt
.balign 8
empty_idt_pointer:
    .fill 10, 1, 0

# Page tables, complete except for the arena's directories, which ring 3 fills in (arena.rs). Entries carry P,
# RW, US, and A and D so that the processor never writes them.
#   0 .. 4 GiB            identity: the image, and whatever the loader put below 4 GiB
#   512 GiB .. 576 GiB    arena: the usable RAM, made contiguous
.balign 4096
pml4:
    .quad pdpt_low + 0x27
    .quad pdpt_arena + 0x27
    .fill 510, 8, 0
pdpt_low:
    .set index, 0
    .rept 4
    .quad pd_low + index * 4096 + 0x27
    .set index, index + 1
    .endr
    .fill 508, 8, 0
pd_low:
    .set index, 0
    .rept 4 * 512
    .quad index * 0x200000 + 0xe7
    .set index, index + 1
    .endr
pdpt_arena:
    .set index, 0
    .rept 64
    .quad pd_arena + index * 4096 + 0x27
    .set index, index + 1
    .endr
    .fill 448, 8, 0

.section .bss.boot, "aw", @nobits
.balign 4096
.global pd_arena
pd_arena:
    .skip 64 * 4096
.global idt
idt:
    .skip 32 * 16
.balign 16
.global fault_frame
fault_frame:
    .skip 32
fault_entered:
    .skip 4
.balign 16
    .skip 4096
kernel_stack_top:
    .skip 65536
user_stack_top:
