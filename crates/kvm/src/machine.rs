//! What the destination needs to build an equal machine: a small JSON document that travels ahead of the memory.

use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};

use crate::config::check_size;
use crate::cpuid::{self, Leaf};
use crate::error::Error;

/// The version of the document; another one is refused.
const VERSION: u32 = 1;
/// The longest document that is looked at.
const MAX_BYTES: usize = 1 << 20;
/// More CPUID leaves than any processor has.
const MAX_LEAVES: usize = kvm_bindings::KVM_MAX_CPUID_ENTRIES;

/// The machine as the guest sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Machine {
    version: u32,
    /// Guest memory in bytes; the layout follows from it.
    pub memory_bytes: u64,
    pub vcpus: u32,
    /// How fast the TSC counts; absent if the source's KVM does not tell.
    pub tsc_khz: Option<u32>,
    /// Before the topology is written in.
    pub cpuid: Vec<Leaf>,
}

impl Machine {
    /// A new machine that has everything this host can give.
    pub(crate) fn new(kvm: &Kvm, memory_bytes: u64, vcpus: u32) -> Result<Machine, Error> {
        check_size(memory_bytes, vcpus)?;
        Ok(Machine { version: VERSION, memory_bytes, vcpus, tsc_khz: None, cpuid: cpuid::host(kvm)? })
    }

    /// The document.
    pub(crate) fn to_bytes(&self) -> Result<Vec<u8>, Error> {
        serde_json::to_vec(self).map_err(|e| Error::State(format!("machine description: {e}")))
    }

    /// Reads a document that another host wrote.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Machine, Error> {
        let refuse = |what: String| Error::Peer(format!("machine description: {what}"));
        if bytes.len() > MAX_BYTES {
            return Err(refuse(format!("{} bytes; at most {MAX_BYTES} are looked at", bytes.len())));
        }
        // The version first: the fields of another version are anybody's guess.
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let Version { version } = serde_json::from_slice(bytes).map_err(|e| refuse(e.to_string()))?;
        if version != VERSION {
            return Err(refuse(format!(
                "version {version}; this build knows version {VERSION}; use the same build on both hosts"
            )));
        }
        let machine: Machine = serde_json::from_slice(bytes).map_err(|e| refuse(e.to_string()))?;
        check_size(machine.memory_bytes, machine.vcpus).map_err(|e| refuse(e.to_string()))?;
        if machine.cpuid.len() > MAX_LEAVES {
            return Err(refuse(format!(
                "{} CPUID leaves; expected at most {MAX_LEAVES}",
                machine.cpuid.len()
            )));
        }
        if machine.tsc_khz.is_some_and(|khz| !(1_000..=100_000_000).contains(&khz)) {
            return Err(refuse(format!(
                "TSC frequency {:?} kHz; expected 1 MHz to 100 GHz",
                machine.tsc_khz
            )));
        }
        Ok(machine)
    }

    /// Refuses a machine whose guest has seen processor features that this host does not have.
    pub(crate) fn check_features(&self, kvm: &Kvm) -> Result<(), Error> {
        let missing = cpuid::missing(&self.cpuid, &cpuid::host(kvm)?);
        if missing.is_empty() {
            return Ok(());
        }
        Err(Error::Peer(format!(
            "this host's processor or KVM lacks what the guest has been told it has: {}; migrate to a host like the source",
            missing.join("; ")
        )))
    }
}
