//! The FPU state of a KVM without XSAVE, field by field: kvm-bindings does not give this structure's bytes.

use kvm_bindings::kvm_fpu;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Fpu {
    fpr: [[u8; 16]; 8],
    fcw: U16,
    fsw: U16,
    ftwx: u8,
    zero: u8,
    last_opcode: U16,
    last_ip: U64,
    last_dp: U64,
    xmm: [[u8; 16]; 16],
    mxcsr: U32,
}

pub(super) fn to_bytes(fpu: &kvm_fpu) -> Vec<u8> {
    let wire = Fpu {
        fpr: fpu.fpr,
        fcw: fpu.fcw.into(),
        fsw: fpu.fsw.into(),
        ftwx: fpu.ftwx,
        zero: 0,
        last_opcode: fpu.last_opcode.into(),
        last_ip: fpu.last_ip.into(),
        last_dp: fpu.last_dp.into(),
        xmm: fpu.xmm,
        mxcsr: fpu.mxcsr.into(),
    };
    wire.as_bytes().to_vec()
}

pub(super) fn parse(bytes: &[u8]) -> Result<kvm_fpu, String> {
    let wire = Fpu::read_from_bytes(bytes)
        .map_err(|_| format!("FPU: {} bytes; expected {}", bytes.len(), size_of::<Fpu>()))?;
    Ok(kvm_fpu {
        fpr: wire.fpr,
        fcw: wire.fcw.get(),
        fsw: wire.fsw.get(),
        ftwx: wire.ftwx,
        last_opcode: wire.last_opcode.get(),
        last_ip: wire.last_ip.get(),
        last_dp: wire.last_dp.get(),
        xmm: wire.xmm,
        mxcsr: wire.mxcsr.get(),
        ..Default::default()
    })
}
