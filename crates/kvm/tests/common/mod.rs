//! A guest of a few dozen instructions that does what it is told over the serial port, and what the tests need to drive it.
#![allow(dead_code, reason = "each test file uses its part")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use pagewarp_kvm::{KernelSource, MachineConfig, Vm};

/// Where the guest is loaded and entered.
pub(crate) const LOAD: u32 = 0x10_0000;

// 32-bit protected mode, no paging, interrupts off. For each byte that comes in over the serial port:
//   w  writes a byte to page 1024 and to every third page after it, 100 pages in all, and answers W
//   n  counts up in a register and answers with the low digit
//   e  answers E and leaves an I/O read of an unconnected port in a register, printed by f (0 if it was all ones)
//   r  resets through the keyboard controller
//   x  causes a triple fault
//   others are echoed.
std::arch::global_asm!(
    ".pushsection .rodata",
    ".global pagewarp_test_guest, pagewarp_test_guest_end",
    ".code32",
    "pagewarp_test_guest:",
    "cli",
    "xorl %esi, %esi",
    "movl $'!', %ebx",
    "jmp 8f",
    // wait for a byte
    "1: movl $0x3fd, %edx",
    "inb %dx, %al",
    "incl %edi",
    "testb $1, %al",
    "jz 1b",
    "movl $0x3f8, %edx",
    "inb %dx, %al",
    "movzbl %al, %ebx",
    "cmpb $'w', %al",
    "je 2f",
    "cmpb $'n', %al",
    "je 3f",
    "cmpb $'e', %al",
    "je 4f",
    "cmpb $'r', %al",
    "je 5f",
    "cmpb $'x', %al",
    "je 6f",
    "jmp 8f",
    // w
    "2: movl $0x400000, %eax",
    "movl $100, %ecx",
    "7: incb (%eax)",
    "addl $0x3000, %eax",
    "decl %ecx",
    "jnz 7b",
    "movl $'W', %ebx",
    "jmp 8f",
    // n
    "3: incl %esi",
    "movl %esi, %ebx",
    "andl $7, %ebx",
    "addl $'0', %ebx",
    "jmp 8f",
    // e
    "4: movl $0x1234, %edx",
    "inl %dx, %eax",
    "incl %eax",
    "addl $'E', %eax",
    "movl %eax, %ebx",
    "jmp 8f",
    // r
    "5: movb $0xfe, %al",
    "outb %al, $0x64",
    "jmp 5b",
    // x: an exception without an interrupt table
    "6: movl $0x80000, %esp",
    "pushl $0",
    "pushl $0",
    "lidt (%esp)",
    "ud2",
    // answer
    "8: movl $0x3f8, %edx",
    "movb %bl, %al",
    "outb %al, %dx",
    "movb $10, %al",
    "outb %al, %dx",
    "jmp 1b",
    "pagewarp_test_guest_end:",
    ".code64",
    ".popsection",
    options(att_syntax)
);

unsafe extern "C" {
    static pagewarp_test_guest: u8;
    static pagewarp_test_guest_end: u8;
}

/// The guest's code.
fn code() -> &'static [u8] {
    // SAFETY: the two labels enclose constant bytes of this program.
    unsafe {
        let start = &raw const pagewarp_test_guest;
        let end = &raw const pagewarp_test_guest_end;
        std::slice::from_raw_parts(start, end.offset_from(start) as usize)
    }
}

/// An ELF image of the guest: one note with the PVH entry, one segment.
pub(crate) fn test_guest() -> Arc<[u8]> {
    let code = code();
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    let note_at = 64 + 2 * 56;
    let note_bytes = 20;
    let code_at = note_at + note_bytes;
    elf.extend_from_slice(&[2, 0, 62, 0, 1, 0, 0, 0]); // executable, x86-64
    elf.extend_from_slice(&u64::from(LOAD).to_le_bytes());
    elf.extend_from_slice(&64u64.to_le_bytes());
    elf.extend_from_slice(&[0; 12]);
    for half in [64u16, 56, 2, 0, 0, 0] {
        elf.extend_from_slice(&half.to_le_bytes());
    }
    let mut header = |kind: u32, at: usize, address: u64, bytes: usize| {
        elf.extend_from_slice(&kind.to_le_bytes());
        elf.extend_from_slice(&7u32.to_le_bytes());
        for word in [at as u64, address, address, bytes as u64, bytes as u64, 4] {
            elf.extend_from_slice(&word.to_le_bytes());
        }
    };
    header(4, note_at, 0, note_bytes);
    header(1, code_at, LOAD.into(), code.len());
    for word in [4u32, 4, 18] {
        elf.extend_from_slice(&word.to_le_bytes());
    }
    elf.extend_from_slice(b"Xen\0");
    elf.extend_from_slice(&LOAD.to_le_bytes());
    elf.extend_from_slice(code);
    elf.into()
}

/// A small machine with the test guest.
pub(crate) fn config(name: &str) -> MachineConfig {
    MachineConfig::new(name, 64 << 20, KernelSource::Bytes(test_guest()))
}

/// Whether there is a KVM to test on. Without one a test must fail, unless the environment says that this is known.
pub(crate) fn have_kvm() -> bool {
    if std::path::Path::new("/dev/kvm").exists() {
        return true;
    }
    assert!(
        std::env::var_os("PAGEWARP_ALLOW_NO_KVM").is_some_and(|v| v == "1"),
        "there is no /dev/kvm; set PAGEWARP_ALLOW_NO_KVM=1 to leave the tests out that need it"
    );
    eprintln!("NOT RUN: no /dev/kvm");
    false
}

/// Waits until `done`, or fails with what was waited for.
pub(crate) fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < deadline, "waited for a minute for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Types `command` and returns the line that the guest answers.
pub(crate) fn ask(vm: &Vm, command: u8) -> String {
    let before = vm.serial_counters().lines;
    assert_eq!(vm.type_serial(&[command]).unwrap(), 1);
    wait_for(&format!("an answer to {:?}", command as char), || vm.serial_counters().lines > before);
    vm.console_lines(1).remove(0)
}

/// The test guest, running and ready.
pub(crate) fn booted(config: &MachineConfig) -> Vm {
    let vm = Vm::boot(config, None).unwrap();
    vm.resume().unwrap();
    wait_for("the guest's first line", || vm.serial_counters().lines > 0);
    assert_eq!(vm.console_lines(10), ["!"]);
    vm
}
