//! The state of vCPUs and devices: saved from a paused VM, loaded into an equal one on another host.
//!
//! What a KVM does not have is absent from the state. What is in the state must be set on the destination, or loading fails and says what.
//!
//! **Time.** While a VM migrates, the time of the outside world goes on, and so do the guest's TSC and its paravirtual clock: both are
//! advanced by the real time (`CLOCK_REALTIME`) that passed between saving and loading, so that a guest sees a jump of its own work
//! but keeps the right time. The hosts' clocks are taken to agree, as with NTP; what they disagree becomes an error of the guest's clock
//! of the same size. A difference below zero counts as zero, one above an hour as an hour.

mod blob;
mod fpu;
pub(crate) mod msr;
mod vcpu;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use vm_superio::serial::SerialState;
use zerocopy::byteorder::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::devices::serial;
use crate::error::Error;
use crate::vcpu::lock;
use crate::vm::{Vm, optional};
use blob::{Sections, Tag, WHOLE_VM};
use msr::Elapsed;
use vcpu::{VcpuState, required, take};

/// The most that a guest's clocks are advanced.
const MAX_ELAPSED: Duration = Duration::from_secs(3600);

/// The interrupt controllers in the kernel.
const CHIPS: [(Tag, u32); 3] = [
    (Tag::PicMaster, KVM_IRQCHIP_PIC_MASTER),
    (Tag::PicSlave, KVM_IRQCHIP_PIC_SLAVE),
    (Tag::IoApic, KVM_IRQCHIP_IOAPIC),
];

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Time {
    /// `CLOCK_REALTIME` when the TSC was read, in nanoseconds.
    realtime_ns: U64,
    /// Ticks of the guest's TSC in a second, in thousands; 0: the source's KVM did not tell.
    tsc_khz: U64,
}

/// A state that has been read and checked.
pub(crate) struct VmState {
    realtime_ns: u64,
    tsc_khz: u64,
    chips: Vec<(Tag, kvm_irqchip)>,
    pit: Option<kvm_pit_state2>,
    clock: Option<kvm_clock_data>,
    serial: SerialState,
    vcpus: Vec<VcpuState>,
}

fn realtime_ns() -> u64 {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since_1970.as_nanos().try_into().unwrap_or(u64::MAX)
}

/// Saves the state of `vm`, which must be paused.
pub(crate) fn save(vm: &Vm) -> Result<Vec<u8>, Error> {
    let indices = msr::indices(&vm.kvm)?;
    let mut sections = Sections::new();
    let time = Time {
        realtime_ns: realtime_ns().into(),
        tsc_khz: u64::from(vm.machine().tsc_khz.unwrap_or(0)).into(),
    };
    sections.put(WHOLE_VM, Tag::Time, time.as_bytes());
    // Right after the stamp, from which the destination counts: what lies between the two becomes an error of the guest's clock.
    if let Some(clock) = optional("KVM_GET_CLOCK", vm.fd.get_clock()) {
        sections.put(WHOLE_VM, Tag::Clock, clock.as_bytes());
    }
    for (index, vcpu) in vm.vcpus.iter().enumerate() {
        VcpuState::save(&lock(vcpu), &indices)?.put(&mut sections, index as u16);
    }
    for (tag, chip_id) in CHIPS {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        if optional("KVM_GET_IRQCHIP", vm.fd.get_irqchip(&mut chip)).is_some() {
            sections.put(WHOLE_VM, tag, chip.as_bytes());
        }
    }
    if let Some(pit) = optional("KVM_GET_PIT2", vm.fd.get_pit2()) {
        sections.put(WHOLE_VM, Tag::Pit, pit.as_bytes());
    }
    sections.put(WHOLE_VM, Tag::Serial, &serial::save(&vm.devices.serial()));
    Ok(sections.to_bytes())
}

impl VmState {
    /// Reads and checks a state that another host saved, for a machine with `vcpus` vCPUs.
    pub(crate) fn parse(bytes: &[u8], vcpus: u32) -> Result<VmState, Error> {
        VmState::read(bytes, vcpus).map_err(|what| Error::Peer(format!("VM state: {what}")))
    }

    fn read(bytes: &[u8], vcpus: u32) -> Result<VmState, String> {
        let mut sections = Sections::parse(bytes)?;
        let time: Time = required(&mut sections, WHOLE_VM, Tag::Time)?;
        let mut chips = Vec::new();
        for (tag, chip_id) in CHIPS {
            if let Some(chip) = take::<kvm_irqchip>(&mut sections, WHOLE_VM, tag)? {
                if chip.chip_id != chip_id {
                    return Err(format!(
                        "{}: it says it is chip {}; expected {chip_id}",
                        tag.name(),
                        chip.chip_id
                    ));
                }
                chips.push((tag, chip));
            }
        }
        let pit = take(&mut sections, WHOLE_VM, Tag::Pit)?;
        let clock = take(&mut sections, WHOLE_VM, Tag::Clock)?;
        let serial = sections.take(WHOLE_VM, Tag::Serial).ok_or("the serial port is missing")?;
        let serial = serial::parse(&serial)?;
        let vcpus = (0..vcpus as u16)
            .map(|i| VcpuState::take(&mut sections, i).map_err(|what| format!("vCPU {i}: {what}")))
            .collect::<Result<_, _>>()?;
        if let Some((vcpu, tag)) = sections.first() {
            return Err(format!("{} of vCPU {vcpu}, which this machine does not have", tag.name()));
        }
        let (realtime_ns, tsc_khz) = (time.realtime_ns.get(), time.tsc_khz.get());
        if tsc_khz > 100_000_000 {
            return Err(format!("a TSC frequency of {tsc_khz} kHz; expected at most 100 GHz"));
        }
        Ok(VmState { realtime_ns, tsc_khz, chips, pit, clock, serial, vcpus })
    }

    /// Sets the state of `vm`, which must be paused and never have run.
    pub(crate) fn load(&self, vm: &Vm) -> Result<(), Error> {
        let refused = |tag: Tag| {
            move |e: kvm_ioctls::Error| {
                let e = std::io::Error::from_raw_os_error(e.errno());
                Error::Peer(format!("the VM's {} cannot be set on this host: {e}", tag.name()))
            }
        };
        let indices = msr::indices(&vm.kvm)?;
        for (tag, chip) in &self.chips {
            vm.fd.set_irqchip(chip).map_err(refused(*tag))?;
        }
        let elapsed = self.elapsed(realtime_ns());
        if let Some(clock) = self.clock {
            // Advanced here like the TSC, and not by the kernel's own means (`KVM_CLOCK_REALTIME`), which has no limits.
            let nanoseconds = clock.clock.saturating_add(elapsed.time.as_nanos() as u64);
            let clock = kvm_clock_data { clock: nanoseconds, ..Default::default() };
            vm.fd.set_clock(&clock).map_err(refused(Tag::Clock))?;
        }
        for (state, vcpu) in self.vcpus.iter().zip(&vm.vcpus) {
            state.load(&lock(vcpu), &indices, elapsed)?;
        }
        // After the interrupt controllers, whose input the timer is.
        if let Some(pit) = &self.pit {
            vm.fd.set_pit2(pit).map_err(refused(Tag::Pit))?;
        }
        serial::load(&mut vm.devices.serial(), &self.serial)
            .map_err(|e| Error::Peer(format!("the VM's serial port cannot be set on this host: {e}")))
    }

    /// What loading computes from this state by itself, for fuzzing.
    pub(crate) fn advance_clocks(&self) {
        for now_ns in [0, self.realtime_ns, u64::MAX] {
            self.elapsed(now_ns);
        }
    }

    fn elapsed(&self, now_ns: u64) -> Elapsed {
        let time = Duration::from_nanos(now_ns.saturating_sub(self.realtime_ns)).min(MAX_ELAPSED);
        let ticks = time.as_nanos() * u128::from(self.tsc_khz) / 1_000_000;
        Elapsed { time, tsc_ticks: ticks as u64 }
    }
}

/// The state of a machine that has done nothing yet, without what a KVM may lack: for tests.
pub(crate) fn sample(vcpus: u32) -> Vec<u8> {
    use kvm_bindings::{kvm_regs, kvm_sregs, kvm_xsave};

    let mut sections = Sections::new();
    sections.put(WHOLE_VM, Tag::Time, &[0; size_of::<Time>()]);
    sections.put(WHOLE_VM, Tag::Serial, &[0; 9]);
    for index in 0..vcpus as u16 {
        sections.put(index, Tag::Regs, kvm_regs::default().as_bytes());
        sections.put(index, Tag::Sregs, kvm_sregs::default().as_bytes());
        sections.put(index, Tag::Xsave, kvm_xsave::default().as_bytes());
    }
    sections.to_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_are_advanced_within_limits() {
        let state = VmState {
            realtime_ns: 5_000_000_000,
            tsc_khz: 2_000_000,
            chips: Vec::new(),
            pit: None,
            clock: None,
            serial: SerialState::default(),
            vcpus: Vec::new(),
        };
        let ticks = |now| state.elapsed(now).tsc_ticks;
        assert_eq!(ticks(5_500_000_000), 1_000_000_000);
        assert_eq!(ticks(4_000_000_000), 0, "a source whose clock is ahead");
        assert_eq!(ticks(u64::MAX), 3600 * 2_000_000_000, "a source whose clock is far behind");
    }
}
