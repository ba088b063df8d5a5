//! What the guest's CPUID instruction says: what KVM supports on this host, with the machine's topology written in.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};
use serde::{Deserialize, Serialize};

use crate::error::Error;

/// One leaf, as it travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Leaf {
    pub function: u32,
    pub index: u32,
    pub flags: u32,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

#[derive(Clone, Copy, Debug)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Leaf {
    fn get(&self, register: Register) -> u32 {
        match register {
            Register::Eax => self.eax,
            Register::Ebx => self.ebx,
            Register::Ecx => self.ecx,
            Register::Edx => self.edx,
        }
    }
}

/// Leaves whose registers are sets of features: what a guest has seen there must exist wherever it goes.
const FEATURES: &[(u32, u32, Register)] = &[
    (0x1, 0, Register::Ecx),
    (0x1, 0, Register::Edx),
    (0x6, 0, Register::Eax),
    (0x7, 0, Register::Ebx),
    (0x7, 0, Register::Ecx),
    (0x7, 0, Register::Edx),
    (0x7, 1, Register::Eax),
    (0x7, 1, Register::Edx),
    (0x7, 2, Register::Edx),
    (0xd, 0, Register::Eax),
    (0xd, 0, Register::Edx),
    (0xd, 1, Register::Eax),
    (0xd, 1, Register::Ecx),
    (0x4000_0001, 0, Register::Eax),
    (0x8000_0001, 0, Register::Ecx),
    (0x8000_0001, 0, Register::Edx),
    (0x8000_0007, 0, Register::Edx),
    (0x8000_0008, 0, Register::Ebx),
    (0x8000_000a, 0, Register::Edx),
    (0x8000_0021, 0, Register::Eax),
];

const HYPERVISOR: u32 = 1 << 31;
const TSC_DEADLINE: u32 = 1 << 24;
const HTT: u32 = 1 << 28;
/// Leaf 0x1 ECX.
const VMX: u32 = 1 << 5;
/// Leaf 0x80000001 ECX.
const SVM: u32 = 1 << 2;
/// Details of SVM.
const SVM_LEAF: u32 = 0x8000_000a;

/// What this host can give to a guest, without topology.
pub(crate) fn host(kvm: &Kvm) -> Result<Vec<Leaf>, Error> {
    let supported =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(Error::kvm("KVM_GET_SUPPORTED_CPUID"))?;
    let mut leaves: Vec<Leaf> = supported.as_slice().iter().map(from_kvm).collect();
    for leaf in leaves.iter_mut().filter(|l| l.function == 1) {
        leaf.ecx |= HYPERVISOR;
        // KVM reports this one as a capability, because it needs the in-kernel APIC.
        if kvm.check_extension(Cap::TscDeadlineTimer) {
            leaf.ecx |= TSC_DEADLINE;
        }
    }
    hide_virtualization(&mut leaves);
    Ok(leaves)
}

/// Takes out what a guest would need to run VMs of its own, because KVM's state of those (`KVM_GET_NESTED_STATE`) does not travel.
///
/// A guest that has been shown it nevertheless, by another build, is refused like any other that lacks something here.
fn hide_virtualization(leaves: &mut Vec<Leaf>) {
    leaves.retain(|leaf| leaf.function != SVM_LEAF);
    for leaf in leaves {
        match leaf.function {
            0x1 => leaf.ecx &= !VMX,
            0x8000_0001 => leaf.ecx &= !SVM,
            _ => {}
        }
    }
}

/// Says what `guest` has that `host` lacks, one item a feature register; empty if the guest can run on the host.
pub(crate) fn missing(guest: &[Leaf], host: &[Leaf]) -> Vec<String> {
    let find = |leaves: &[Leaf], function, index| {
        leaves.iter().find(|l| l.function == function && l.index == index).copied()
    };
    let mut missing = Vec::new();
    let vendor = |leaves: &[Leaf]| find(leaves, 0, 0).map(|l| (l.ebx, l.ecx, l.edx));
    if vendor(guest) != vendor(host) {
        missing.push("a processor of the same vendor (leaf 0x0)".to_owned());
    }
    for &(function, index, register) in FEATURES {
        let wanted = find(guest, function, index).map_or(0, |l| l.get(register));
        let there = find(host, function, index).map_or(0, |l| l.get(register));
        let lacking: Vec<String> =
            (0..32).filter(|bit| (wanted & !there) >> bit & 1 != 0).map(|bit| bit.to_string()).collect();
        if !lacking.is_empty() {
            let name = format!("{register:?}").to_uppercase();
            missing.push(format!("leaf {function:#x}.{index} {name} bit {}", lacking.join(",")));
        }
    }
    missing
}

/// KVM's form of `leaves` for one vCPU of a machine with `vcpus` of them: each a core of its own in one package, the APIC id equal to the index.
pub(crate) fn for_vcpu(leaves: &[Leaf], index: u32, vcpus: u32) -> Result<CpuId, Error> {
    let core_bits = vcpus.next_power_of_two().trailing_zeros();
    let mut entries: Vec<kvm_cpuid_entry2> = leaves.iter().map(to_kvm).collect();
    for entry in &mut entries {
        match entry.function {
            0x1 => {
                entry.ebx = entry.ebx & 0xffff | vcpus.next_power_of_two().min(255) << 16 | index << 24;
                entry.edx = entry.edx & !HTT | if vcpus > 1 { HTT } else { 0 };
            }
            // Cores of the package, and who shares each cache: level 3 all, the others nobody. A type of 0 ends the list.
            0x4 if entry.eax & 0x1f != 0 => {
                let sharing = if entry.eax >> 5 & 7 >= 3 { (1 << core_bits) - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14 | ((1 << core_bits) - 1).min(63) << 26;
            }
            // Two levels, thread and core; the numbers are the bits to shift out of the APIC id.
            0xb | 0x1f => {
                let (shift, count, kind) = match entry.index {
                    0 => (0, 1, 1),
                    1 => (core_bits, vcpus, 2),
                    _ => (0, 0, 0),
                };
                entry.eax = shift;
                entry.ebx = count;
                entry.ecx = entry.index & 0xff | kind << 8;
                entry.edx = index;
            }
            // AMD's version of the same: cores less one, width of the core id; extended APIC id, core id, one thread a core.
            0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | (vcpus - 1) & 0xff | core_bits << 12,
            0x8000_001e => {
                entry.eax = index;
                entry.ebx = index & 0xff;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    CpuId::from_entries(&entries).map_err(|e| Error::Peer(format!("CPUID: {} entries: {e:?}", entries.len())))
}

fn from_kvm(e: &kvm_cpuid_entry2) -> Leaf {
    Leaf {
        function: e.function,
        index: e.index,
        flags: e.flags,
        eax: e.eax,
        ebx: e.ebx,
        ecx: e.ecx,
        edx: e.edx,
    }
}

fn to_kvm(l: &Leaf) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function: l.function,
        index: l.index,
        flags: l.flags,
        eax: l.eax,
        ebx: l.ebx,
        ecx: l.ecx,
        edx: l.edx,
        padding: [0; 3],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, ecx: u32) -> Leaf {
        Leaf { function, index: 0, flags: 0, eax: 0, ebx: 0, ecx, edx: 0 }
    }

    #[test]
    fn a_missing_feature_is_named_by_leaf_register_and_bit() {
        let guest = [leaf(0, 7), leaf(1, 0b1011)];
        assert!(missing(&guest, &guest).is_empty());
        assert!(missing(&guest, &[leaf(0, 7), leaf(1, 0xff)]).is_empty());
        assert_eq!(missing(&guest, &[leaf(0, 7), leaf(1, 0b0010)]), ["leaf 0x1.0 ECX bit 0,3"]);
        assert_eq!(missing(&guest, &[leaf(0, 8), leaf(1, 0xff)]).len(), 1);
        assert_eq!(missing(&guest, &[]).len(), 2);
    }

    #[test]
    fn no_guest_is_shown_virtualization_and_one_that_was_is_refused() {
        let shown =
            vec![leaf(0, 7), leaf(1, !0), leaf(0x8000_0001, !0), Leaf { edx: 1, ..leaf(SVM_LEAF, 0) }];
        let mut host = shown.clone();
        hide_virtualization(&mut host);
        assert_eq!(host, [leaf(0, 7), leaf(1, !VMX), leaf(0x8000_0001, !SVM)]);
        assert!(missing(&host, &host).is_empty());
        let expected = ["leaf 0x1.0 ECX bit 5", "leaf 0x80000001.0 ECX bit 2", "leaf 0x8000000a.0 EDX bit 0"];
        assert_eq!(missing(&shown, &host), expected);
    }

    #[test]
    fn each_vcpu_has_its_apic_id() {
        let leaves = [leaf(1, 0), Leaf { index: 1, ..leaf(0xb, 0) }];
        let entries = for_vcpu(&leaves, 5, 6).unwrap();
        let entries = entries.as_slice();
        assert_eq!(entries[0].ebx >> 24, 5);
        assert_eq!((entries[1].eax, entries[1].ebx, entries[1].edx), (3, 6, 5));
    }
}
