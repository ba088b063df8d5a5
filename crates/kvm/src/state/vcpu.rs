//! The state of one vCPU.

use kvm_bindings::{
    kvm_debugregs, kvm_fpu, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use zerocopy::{FromBytes, IntoBytes};

use super::blob::{Sections, Tag};
use super::msr::Elapsed;
use super::{fpu, msr};
use crate::error::Error;
use crate::ioctl;
use crate::vm::optional;

/// Everything that KVM tells about a vCPU. What the source's KVM does not have is absent.
pub(super) struct VcpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    /// Absent where there is an XSAVE area, which contains it.
    fpu: Option<kvm_fpu>,
    xsave: Option<Box<kvm_xsave>>,
    xcrs: Option<kvm_xcrs>,
    debug_regs: Option<kvm_debugregs>,
    lapic: Option<kvm_lapic_state>,
    msrs: Vec<kvm_msr_entry>,
    events: Option<kvm_vcpu_events>,
    mp_state: Option<kvm_mp_state>,
}

impl VcpuState {
    /// Reads the state of a vCPU that is not running.
    pub(super) fn save(vcpu: &VcpuFd, msr_indices: &[u32]) -> Result<VcpuState, Error> {
        // The MP state first: reading it makes KVM take in INIT and SIPI signals that wait, which changes the rest.
        let mp_state = optional("KVM_GET_MP_STATE", vcpu.get_mp_state());
        // The MSRs ahead of the local APIC: a timer that fires between the two disappears from its MSR and appears in the APIC, so in this
        // order it may tick twice on the destination, and in the other one not at all.
        let mut msrs = msr::save(vcpu, msr_indices)?;
        let lapic = optional("KVM_GET_LAPIC", vcpu.get_lapic());
        if let Some(lapic) = &lapic {
            msr::keep_timer(&mut msrs, lapic);
        }
        let xsave = optional("KVM_GET_XSAVE", vcpu.get_xsave()).map(Box::new);
        let fpu = match &xsave {
            Some(_) => None,
            None => Some(vcpu.get_fpu().map_err(Error::kvm("KVM_GET_FPU"))?),
        };
        Ok(VcpuState {
            regs: vcpu.get_regs().map_err(Error::kvm("KVM_GET_REGS"))?,
            sregs: vcpu.get_sregs().map_err(Error::kvm("KVM_GET_SREGS"))?,
            fpu,
            xsave,
            // On a host without XSAVE there are none; KVM reports that, and refuses to set none.
            xcrs: optional("KVM_GET_XCRS", vcpu.get_xcrs()).filter(|xcrs| xcrs.nr_xcrs > 0),
            debug_regs: optional("KVM_GET_DEBUGREGS", vcpu.get_debug_regs()),
            lapic,
            msrs,
            events: optional("KVM_GET_VCPU_EVENTS", vcpu.get_vcpu_events()),
            mp_state,
        })
    }

    /// Sets the state of a vCPU whose CPUID has been set.
    ///
    /// The order matters: the special registers switch the local APIC on, its registers decide whether the TSC deadline MSR may be set,
    /// and pending events refer to all of it.
    pub(super) fn load(&self, vcpu: &VcpuFd, msr_indices: &[u32], elapsed: Elapsed) -> Result<(), Error> {
        if let Some(mp_state) = self.mp_state {
            vcpu.set_mp_state(mp_state).map_err(lacking(Tag::MpState))?;
        }
        vcpu.set_sregs(&self.sregs).map_err(lacking(Tag::Sregs))?;
        vcpu.set_regs(&self.regs).map_err(lacking(Tag::Regs))?;
        if let Some(fpu) = &self.fpu {
            vcpu.set_fpu(fpu).map_err(lacking(Tag::Fpu))?;
        }
        if let Some(xsave) = &self.xsave {
            ioctl::set_xsave(vcpu, xsave).map_err(lacking(Tag::Xsave))?;
        }
        if let Some(xcrs) = &self.xcrs {
            vcpu.set_xcrs(xcrs).map_err(lacking(Tag::Xcrs))?;
        }
        if let Some(debug_regs) = &self.debug_regs {
            vcpu.set_debug_regs(debug_regs).map_err(lacking(Tag::DebugRegs))?;
        }
        if let Some(lapic) = &self.lapic {
            vcpu.set_lapic(lapic).map_err(lacking(Tag::Lapic))?;
        }
        msr::load(vcpu, &self.msrs, msr_indices, elapsed)?;
        if let Some(events) = &self.events {
            vcpu.set_vcpu_events(events).map_err(lacking(Tag::Events))?;
        }
        Ok(())
    }

    pub(super) fn put(&self, sections: &mut Sections, index: u16) {
        let mut put = |tag, bytes: Option<&[u8]>| {
            if let Some(bytes) = bytes {
                sections.put(index, tag, bytes);
            }
        };
        put(Tag::Regs, Some(self.regs.as_bytes()));
        put(Tag::Sregs, Some(self.sregs.as_bytes()));
        put(Tag::Fpu, self.fpu.as_ref().map(fpu::to_bytes).as_deref());
        put(Tag::Xsave, self.xsave.as_ref().map(|x| x.as_bytes()));
        put(Tag::Xcrs, self.xcrs.as_ref().map(|x| x.as_bytes()));
        put(Tag::DebugRegs, self.debug_regs.as_ref().map(|x| x.as_bytes()));
        put(Tag::Lapic, self.lapic.as_ref().map(|x| x.as_bytes()));
        put(Tag::Msrs, Some(self.msrs.as_slice().as_bytes()));
        put(Tag::Events, self.events.as_ref().map(|x| x.as_bytes()));
        put(Tag::MpState, self.mp_state.as_ref().map(|x| x.as_bytes()));
    }

    pub(super) fn take(sections: &mut Sections, index: u16) -> Result<VcpuState, String> {
        let state = VcpuState {
            regs: required(sections, index, Tag::Regs)?,
            sregs: required(sections, index, Tag::Sregs)?,
            fpu: sections.take(index, Tag::Fpu).map(|bytes| fpu::parse(&bytes)).transpose()?,
            xsave: sections
                .take(index, Tag::Xsave)
                .map(|bytes| exact(Tag::Xsave, &bytes).map(Box::new))
                .transpose()?,
            xcrs: take(sections, index, Tag::Xcrs)?,
            debug_regs: take(sections, index, Tag::DebugRegs)?,
            lapic: take(sections, index, Tag::Lapic)?,
            msrs: parse_msrs(&sections.take(index, Tag::Msrs).unwrap_or_default())?,
            events: take(sections, index, Tag::Events)?,
            mp_state: take(sections, index, Tag::MpState)?,
        };
        if state.fpu.is_none() && state.xsave.is_none() {
            return Err(format!("vCPU {index} has neither {} nor {}", Tag::Fpu.name(), Tag::Xsave.name()));
        }
        Ok(state)
    }
}

/// An error that says which part of the state cannot be set here.
fn lacking(tag: Tag) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |e| {
        Error::Peer(format!(
            "the guest's {} cannot be set on this host: {}; its KVM or its processor differs too much from the source's",
            tag.name(),
            std::io::Error::from_raw_os_error(e.errno())
        ))
    }
}

fn parse_msrs(bytes: &[u8]) -> Result<Vec<kvm_msr_entry>, String> {
    let size = size_of::<kvm_msr_entry>();
    if !bytes.len().is_multiple_of(size) || bytes.len() / size > msr::MAX_MSRS {
        return Err(format!("MSRs: {} bytes; expected at most {} times {size}", bytes.len(), msr::MAX_MSRS));
    }
    bytes.chunks(size).map(|chunk| exact(Tag::Msrs, chunk)).collect()
}

/// A structure of KVM, from exactly its bytes.
pub(super) fn exact<T: FromBytes>(tag: Tag, bytes: &[u8]) -> Result<T, String> {
    T::read_from_bytes(bytes)
        .map_err(|_| format!("{}: {} bytes; expected {}", tag.name(), bytes.len(), size_of::<T>()))
}

pub(super) fn take<T: FromBytes>(sections: &mut Sections, vcpu: u16, tag: Tag) -> Result<Option<T>, String> {
    sections.take(vcpu, tag).map(|bytes| exact(tag, &bytes)).transpose()
}

pub(super) fn required<T: FromBytes>(sections: &mut Sections, vcpu: u16, tag: Tag) -> Result<T, String> {
    take(sections, vcpu, tag)?.ok_or_else(|| format!("{} are missing", tag.name()))
}
