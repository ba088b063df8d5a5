//! The end of the guest: exceptions, panics, and leaving on purpose.

use crate::cpu;
use crate::serial::Serial;

const VECTORS: usize = 32;

#[repr(C)]
struct FaultFrame {
    vector: u64,
    address: u64,
    /// The error code and the instruction's address; for vectors without an error code, the instruction's
    /// address and CS.
    first: u64,
    second: u64,
}

unsafe extern "C" {
    static exception_entries: [u64; VECTORS];
    static mut idt: [[u64; 2]; VECTORS];
    static fault_frame: FaultFrame;
}

/// Fills the interrupt descriptor table, which the boot code has loaded empty.
pub fn install_handlers() {
    for vector in 0..VECTORS {
        // SAFETY: only the address is taken; the entries are 8 bytes apart.
        let entry = unsafe { (&raw const exception_entries).cast::<u64>().add(vector) } as u64;
        // An interrupt gate to ring-0 code (0x08), present; addresses are below 4 GiB.
        let gate = entry & 0xffff | 0x08 << 16 | 0x8e00 << 32 | (entry >> 16 & 0xffff) << 48;
        // SAFETY: `vector` is below VECTORS; only this function writes the table, and no exception is under
        // way.
        unsafe { (&raw mut idt).cast::<[u64; 2]>().add(vector).write_volatile([gate, 0]) };
    }
}

/// Where the exception handler returns to, on a fresh stack.
#[unsafe(no_mangle)]
extern "C" fn fault_main() -> ! {
    // SAFETY: the handler filled it in just now and nothing writes it any more. Any bytes are valid.
    let f = unsafe { (&raw const fault_frame).read_volatile() };
    // Vectors 8, 10 to 14, 17, 21, 29 and 30 push an error code.
    let has_code = 0x6022_7d00_u64 >> f.vector & 1 != 0;
    let (code, rip) = if has_code { (f.first, f.second) } else { (0, f.first) };
    let mut serial = Serial::new();
    serial
        .line(format_args!("FAULT vector={} code={code:#x} rip={rip:#x} address={:#x}", f.vector, f.address));
    serial.flush();
    reset();
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    let mut serial = Serial::new();
    serial.line(format_args!("FAULT {info}"));
    serial.flush();
    reset();
}

/// Resets the machine: through the keyboard controller, or, where there is none, by a triple fault.
pub fn reset() -> ! {
    const KEYBOARD_CONTROLLER: u16 = 0x64;
    const PULSE_RESET: u8 = 0xfe;
    cpu::outb(KEYBOARD_CONTROLLER, PULSE_RESET);
    for _ in 0..1_000_000 {
        cpu::relax();
    }
    for vector in 0..VECTORS {
        // SAFETY: `vector` is below VECTORS. The empty table is the point: the next exception cannot be
        // delivered.
        unsafe { (&raw mut idt).cast::<[u64; 2]>().add(vector).write_volatile([0, 0]) };
    }
    cpu::undefined_instruction();
    loop {
        cpu::relax();
    }
}
