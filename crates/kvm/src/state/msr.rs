//! Model-specific registers.

use std::time::Duration;

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_lapic_state, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use crate::error::Error;

/// More MSRs than any KVM lists.
pub(super) const MAX_MSRS: usize = 1024;

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// The local APIC's timer register, and its mode in there.
const LAPIC_LVTT: usize = 0x320;
const LVTT_MODE: u32 = 3 << 17;
const LVTT_TSC_DEADLINE: u32 = 2 << 17;

/// The time that passed between saving and loading, and the ticks of the guest's TSC in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Elapsed {
    pub time: Duration,
    pub tsc_ticks: u64,
}

/// The MSRs that make up a guest's state on this host, in the order in which they have to be set: the TSC first, and the TSC deadline
/// last, because setting it arms a timer by the TSC.
pub(crate) fn indices(kvm: &Kvm) -> Result<Vec<u32>, Error> {
    let list = kvm.get_msr_index_list().map_err(Error::kvm("KVM_GET_MSR_INDEX_LIST"))?;
    let mut indices: Vec<u32> =
        list.as_slice().iter().copied().filter(|&i| i != MSR_TSC && i != MSR_TSC_DEADLINE).collect();
    indices.insert(0, MSR_TSC);
    indices.push(MSR_TSC_DEADLINE);
    Ok(indices)
}

/// Reads those of `indices` that this vCPU has.
pub(super) fn save(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, Error> {
    let mut saved = Vec::with_capacity(indices.len());
    let mut left = indices;
    while !left.is_empty() {
        let asked = &left[..left.len().min(KVM_MAX_MSR_ENTRIES)];
        let mut msrs = entries(asked.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }))?;
        // KVM stops at the first one that this vCPU does not have, because its CPUID does not show the feature.
        let got = vcpu.get_msrs(&mut msrs).map_err(Error::kvm("KVM_GET_MSRS"))?;
        saved.extend_from_slice(&msrs.as_slice()[..got]);
        let next = if got < asked.len() { got + 1 } else { got };
        left = &left[next..];
    }
    Ok(saved)
}

/// Makes sure that a guest with its local APIC's timer in TSC-deadline mode gets its next tick.
///
/// The deadline reads as 0 once the timer has fired, also where its interrupt has not reached the APIC's registers yet: then the tick would
/// be in neither. The time of saving in its place fires at once on the destination. A guest whose timer was not armed gets one tick
/// that it did not ask for, as it may on real hardware.
pub(super) fn keep_timer(msrs: &mut [kvm_msr_entry], lapic: &kvm_lapic_state) {
    let lvtt: [u8; 4] = std::array::from_fn(|i| lapic.regs[LAPIC_LVTT + i] as u8);
    if u32::from_le_bytes(lvtt) & LVTT_MODE != LVTT_TSC_DEADLINE {
        return;
    }
    let Some(now) = msrs.iter().find(|msr| msr.index == MSR_TSC).map(|msr| msr.data) else { return };
    if let Some(deadline) = msrs.iter_mut().find(|msr| msr.index == MSR_TSC_DEADLINE && msr.data == 0) {
        deadline.data = now;
    }
}

/// Sets `saved`, as another host's `save` returned it. `known` are the MSRs of this host.
pub(super) fn load(
    vcpu: &VcpuFd,
    saved: &[kvm_msr_entry],
    known: &[u32],
    elapsed: Elapsed,
) -> Result<(), Error> {
    let mut wanted = Vec::with_capacity(saved.len());
    for &entry in saved {
        match entry.index {
            MSR_TSC => {
                wanted.push(kvm_msr_entry { data: entry.data.wrapping_add(elapsed.tsc_ticks), ..entry });
            }
            index if known.contains(&index) => wanted.push(entry),
            // Something that this host does not have and that the guest does not use.
            _ if entry.data == 0 => {}
            index => {
                return Err(Error::Peer(format!(
                    "MSR {index:#x}: the guest has it set to {:#x}, and this host's KVM does not know it",
                    entry.data
                )));
            }
        }
    }
    let position = |entry: &kvm_msr_entry| known.iter().position(|&i| i == entry.index);
    wanted.sort_by_key(position);
    let mut left = &wanted[..];
    while !left.is_empty() {
        let batch = &left[..left.len().min(KVM_MAX_MSR_ENTRIES)];
        let set = vcpu.set_msrs(&entries(batch.iter().copied())?).map_err(Error::kvm("KVM_SET_MSRS"))?;
        if let Some(refused) = batch.get(set) {
            check_refused(vcpu, refused)?;
            left = &left[set + 1..];
        } else {
            left = &left[set..];
        }
    }
    Ok(())
}

/// Passes a refused MSR if it already has the value: some can only be read, and are the same everywhere.
fn check_refused(vcpu: &VcpuFd, refused: &kvm_msr_entry) -> Result<(), Error> {
    let (index, wanted) = (refused.index, refused.data);
    let mut probe = entries([kvm_msr_entry { index, ..Default::default() }].into_iter())?;
    let found = match vcpu.get_msrs(&mut probe) {
        Ok(1) => Some(probe.as_slice()[0].data),
        _ => None,
    };
    if found == Some(wanted) || (found.is_none() && wanted == 0) {
        return Ok(());
    }
    let found = found.map_or("does not have it".to_owned(), |value| format!("has {value:#x} and keeps it"));
    Err(Error::Peer(format!("MSR {index:#x}: the guest has it set to {wanted:#x}, and this host {found}")))
}

fn entries(list: impl Iterator<Item = kvm_msr_entry>) -> Result<Msrs, Error> {
    let list: Vec<_> = list.collect();
    Msrs::from_entries(&list).map_err(|e| Error::State(format!("a list of {} MSRs: {e:?}", list.len())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_that_has_passed_is_kept_and_others_are_left_alone() {
        let deadline_after = |mode: u32, deadline: u64| {
            let mut lapic = kvm_lapic_state::default();
            for (reg, byte) in lapic.regs[LAPIC_LVTT..].iter_mut().zip(mode.to_le_bytes()) {
                *reg = byte as _;
            }
            let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
            let mut msrs = [msr(MSR_TSC, 1000), msr(MSR_TSC_DEADLINE, deadline)];
            keep_timer(&mut msrs, &lapic);
            assert_eq!(msrs[0].data, 1000);
            msrs[1].data
        };
        assert_eq!(deadline_after(LVTT_TSC_DEADLINE | 0xec, 0), 1000);
        assert_eq!(deadline_after(LVTT_TSC_DEADLINE | 0xec, 1500), 1500);
        assert_eq!(deadline_after(0xec, 0), 0, "a timer in one-shot mode");
    }
}
