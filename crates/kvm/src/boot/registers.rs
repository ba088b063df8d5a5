//! The registers with which the first vCPU enters a kernel.

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::GuestMemoryMmap;

use super::write;
use crate::error::Error;
use crate::layout;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Present, writable.
const TABLE: u64 = 0x3;
/// Present, writable, 2 MiB.
const LARGE_PAGE: u64 = 0x83;

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// 32-bit protected mode, paging off, EBX = start info.
    Pvh { rip: u32 },
    /// Long mode, the first 4 GiB mapped one to one, RSI = boot_params.
    Linux64 { rip: u64 },
}

/// Segment descriptors as they stand in a GDT: flat, 4 GiB.
const GDT: [u64; 5] = [0, 0, CODE_64, DATA, TASK];
const CODE_32: u64 = 0x00cf_9b00_0000_ffff;
const CODE_64: u64 = 0x00af_9b00_0000_ffff;
const DATA: u64 = 0x00cf_9300_0000_ffff;
const TASK: u64 = 0x0000_8b00_0000_0067;

/// The hidden part of a segment register, from a descriptor.
fn segment(descriptor: u64, selector: u16) -> kvm_segment {
    let bits = |at: u32, count: u32| (descriptor >> at & ((1 << count) - 1)) as u8;
    let granular = bits(55, 1);
    let limit = (descriptor & 0xffff | descriptor >> 32 & 0xf_0000) as u32;
    kvm_segment {
        base: descriptor >> 16 & 0xff_ffff | descriptor >> 32 & 0xff00_0000,
        limit: if granular == 1 { limit << 12 | 0xfff } else { limit },
        selector,
        type_: bits(40, 4),
        s: bits(44, 1),
        dpl: bits(45, 2),
        present: bits(47, 1),
        avl: bits(52, 1),
        l: bits(53, 1),
        db: bits(54, 1),
        g: granular,
        unusable: 0,
        padding: 0,
    }
}

/// Maps the first 4 GiB one to one, and writes the GDT that Linux expects: code at 0x10, data at 0x18.
pub(super) fn write_long_mode_tables(guest: &GuestMemoryMmap) -> Result<(), Error> {
    let bytes = |words: &[u64]| words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<_>>();
    write(guest, &bytes(&GDT), layout::GDT)?;
    let table = |i: u64| layout::PAGE_TABLES + i * 0x1000;
    write(guest, &bytes(&[table(1) | TABLE]), table(0))?;
    let directories: Vec<u64> = (0..4).map(|i| table(2 + i) | TABLE).collect();
    write(guest, &bytes(&directories), table(1))?;
    let pages: Vec<u64> = (0..4 * 512).map(|i| i << 21 | LARGE_PAGE).collect();
    write(guest, &bytes(&pages), table(2))
}

/// Sets the registers of the first vCPU; the others wait for it to start them.
pub(crate) fn set_registers(vcpu: &VcpuFd, entry: Entry) -> Result<(), Error> {
    let mut sregs = vcpu.get_sregs().map_err(Error::kvm("KVM_GET_SREGS"))?;
    let mut regs = kvm_regs { rflags: 2, ..Default::default() };
    let code = match entry {
        Entry::Pvh { rip } => {
            regs.rip = rip.into();
            regs.rbx = layout::PVH_START_INFO;
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr4 = 0;
            CODE_32
        }
        Entry::Linux64 { rip } => {
            regs.rip = rip;
            regs.rsi = layout::ZERO_PAGE;
            regs.rsp = layout::BOOT_STACK;
            regs.rbp = layout::BOOT_STACK;
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.cr3 = layout::PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
            sregs.gdt.base = layout::GDT;
            sregs.gdt.limit = (size_of_val(&GDT) - 1) as u16;
            CODE_64
        }
    };
    sregs.cs = segment(code, 0x10);
    let data = segment(DATA, 0x18);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(TASK, 0x20);
    vcpu.set_sregs(&sregs).map_err(Error::kvm("KVM_SET_SREGS"))?;
    vcpu.set_regs(&regs).map_err(Error::kvm("KVM_SET_REGS"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_unpack_to_what_they_say() {
        let code = segment(CODE_64, 0x10);
        assert_eq!((code.base, code.limit, code.type_, code.l, code.db), (0, u32::MAX, 0xb, 1, 0));
        let data = segment(DATA, 0x18);
        assert_eq!((data.limit, data.type_, data.s, data.db, data.g), (u32::MAX, 3, 1, 1, 1));
        let task = segment(TASK, 0x20);
        assert_eq!((task.limit, task.type_, task.s, task.g), (0x67, 0xb, 0, 0));
    }
}
