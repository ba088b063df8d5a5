//! The few machine instructions that Rust has no words for, and the memory routines the compiler calls.

use core::arch::asm;
use core::arch::x86_64::{__cpuid, _mm_pause, _rdtsc, CpuidResult};

/// Writes a byte to an I/O port.
pub fn outb(port: u16, value: u8) {
    // SAFETY: ring 3 runs with IOPL 3, so the instruction is allowed; devices cannot reach the guest's
    // memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
}

/// Reads a byte from an I/O port.
pub fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: as in `outb`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// The time-stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: CR4.TSD is clear, so ring 3 may read it.
    unsafe { _rdtsc() }
}

/// Tells the core (and a hypervisor) that this is a wait loop.
pub fn relax() {
    _mm_pause();
}

/// CPUID.
pub fn cpuid(leaf: u32) -> CpuidResult {
    __cpuid(leaf)
}

/// Raises an exception; see `exit`.
pub fn undefined_instruction() {
    // SAFETY: raises #UD, whose handler does not return here.
    unsafe { asm!("ud2", options(nomem, nostack)) };
}

/// Memory routines that compiled code calls. There is no libc, so they are here; ring 3 runs `rep` natively.
mod mem {
    use core::arch::asm;

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
        // `rep movsb` is slow to start, and most copies are words of text. Short ones are two possibly
        // overlapping moves.
        if n <= 32 {
            // SAFETY: the caller passes `n` valid bytes on both sides, and each move stays inside them.
            unsafe {
                match n {
                    16.. => ends::<u128>(to, from, n),
                    8.. => ends::<u64>(to, from, n),
                    4.. => ends::<u32>(to, from, n),
                    2.. => ends::<u16>(to, from, n),
                    1 => to.write(from.read()),
                    0 => {}
                }
            }
            return to;
        }
        // SAFETY: the caller passes `n` valid bytes on both sides, not overlapping; DF is clear by the ABI.
        unsafe {
            asm!("rep movsb", inout("rcx") n => _, inout("rdi") to => _, inout("rsi") from => _, options(nostack, preserves_flags));
        }
        to
    }

    /// Copies the first and the last `size_of::<T>()` of `n` bytes.
    ///
    /// # Safety
    /// `n` bytes are valid on both sides, and `n` is at least `size_of::<T>()`.
    unsafe fn ends<T: Copy>(to: *mut u8, from: *const u8, n: usize) {
        let last = n - size_of::<T>();
        // SAFETY: by the caller's promise both moves lie inside the `n` bytes; both are read before either is
        // written.
        unsafe {
            let (a, b) = (from.cast::<T>().read_unaligned(), from.add(last).cast::<T>().read_unaligned());
            to.cast::<T>().write_unaligned(a);
            to.add(last).cast::<T>().write_unaligned(b);
        }
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
        if (to as usize).wrapping_sub(from as usize) >= n {
            // SAFETY: the caller passes `n` valid bytes on both sides; `to` is below `from` or beyond its
            // end, so copying forwards reads every byte before it is written. DF is clear by the ABI.
            unsafe {
                asm!("rep movsb", inout("rcx") n => _, inout("rdi") to => _, inout("rsi") from => _, options(nostack, preserves_flags));
            }
            return to;
        }
        // SAFETY: the caller passes `n` valid bytes on both sides; backwards, as `to` lies inside `from`. DF
        // is restored.
        unsafe {
            asm!(
                "std", "rep movsb", "cld",
                inout("rcx") n => _, inout("rdi") to.wrapping_add(n).wrapping_sub(1) => _,
                inout("rsi") from.wrapping_add(n).wrapping_sub(1) => _, options(nostack)
            );
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memset(to: *mut u8, value: i32, n: usize) -> *mut u8 {
        // SAFETY: the caller passes `n` writable bytes; DF is clear by the ABI.
        unsafe {
            asm!("rep stosb", inout("rcx") n => _, inout("rdi") to => _, in("al") value as u8, options(nostack, preserves_flags));
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
        for i in 0..n {
            // SAFETY: the caller passes `n` readable bytes on both sides.
            let (x, y) = unsafe { (a.add(i).read(), b.add(i).read()) };
            if x != y {
                return i32::from(x) - i32::from(y);
            }
        }
        0
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
        // SAFETY: the same contract.
        unsafe { memcmp(a, b, n) }
    }
}
