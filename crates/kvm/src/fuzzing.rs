//! Entry points for fuzzing and property tests: what a destination parses before it knows that its peer means well.

use crate::control::{Event, Request};
use crate::cpuid;
use crate::layout;
use crate::machine::Machine;
use crate::state::{self, VmState};

/// Parses `data` as a VM state for a machine with one to four vCPUs, as the first byte says.
pub fn fuzz_state(data: &[u8]) {
    let [vcpus, state @ ..] = data else { return };
    if let Ok(state) = VmState::parse(state, u32::from(vcpus % 4) + 1) {
        state.advance_clocks();
    }
}

/// A state that parses, of a machine that has done nothing yet.
pub fn sample_state(vcpus: u32) -> Vec<u8> {
    state::sample(vcpus)
}

/// Parses `data` as a machine description, and does with it what a destination does before it asks KVM.
///
/// # Panics
///
/// If a description that was accepted is not the same after writing and parsing it, or cannot be built from.
pub fn fuzz_machine(data: &[u8]) {
    let Ok(machine) = Machine::parse(data) else { return };
    let again = machine.to_bytes().expect("a parsed description can be written");
    assert_eq!(Machine::parse(&again).expect("its own writing parses"), machine);
    let regions: u64 = layout::regions(machine.memory_bytes).iter().map(|r| r.pages).sum();
    assert_eq!(regions, machine.memory_bytes / 4096);
    assert!(cpuid::missing(&machine.cpuid, &machine.cpuid).is_empty());
    for index in [0, machine.vcpus - 1] {
        cpuid::for_vcpu(&machine.cpuid, index, machine.vcpus).expect("the leaves were counted");
    }
}

/// Reads `data` as a line of the control socket, from either end.
///
/// # Panics
///
/// If a request is another one after it was written and read.
pub fn fuzz_control(data: &[u8]) {
    if let Ok(request) = serde_json::from_slice::<Request>(data) {
        let line = serde_json::to_vec(&request).expect("a request can be written");
        assert!(!line.contains(&b'\n'));
        assert_eq!(serde_json::from_slice::<Request>(&line).expect("its own writing"), request);
    }
    if let Ok(event) = serde_json::from_slice::<Event>(data) {
        let line = serde_json::to_vec(&event).expect("an event can be written");
        let again = serde_json::from_slice::<Event>(&line).expect("its own writing");
        assert_eq!(again.is_final(), event.is_final());
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::state::sample;

    /// A description as a source would write it.
    fn description(memory_mib: u64, vcpus: u32, leaves: &[[u32; 7]]) -> Vec<u8> {
        let cpuid: Vec<_> = leaves
            .iter()
            .map(|[function, index, flags, eax, ebx, ecx, edx]| {
                serde_json::json!({
                    "function": function, "index": index, "flags": flags,
                    "eax": eax, "ebx": ebx, "ecx": ecx, "edx": edx,
                })
            })
            .collect();
        let machine = serde_json::json!({
            "version": 1, "memory_bytes": memory_mib << 20, "vcpus": vcpus, "tsc_khz": 2_000_000, "cpuid": cpuid,
        });
        serde_json::to_vec(&machine).unwrap()
    }

    /// Leaves, most of them such that are read or changed here.
    fn leaves() -> impl Strategy<Value = Vec<[u32; 7]>> {
        let function = prop_oneof![
            proptest::sample::select(vec![
                0u32,
                1,
                4,
                7,
                0xb,
                0xd,
                0x1f,
                0x8000_0001,
                0x8000_0008,
                0x8000_000a,
                0x8000_001e
            ]),
            any::<u32>(),
        ];
        vec((function, 0..4u32, any::<[u32; 5]>()), 0..20).prop_map(|leaves| {
            leaves.into_iter().map(|(f, i, [flags, a, b, c, d])| [f, i, flags, a, b, c, d]).collect()
        })
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused(data in vec(any::<u8>(), 0..2000)) {
            fuzz_state(&data);
            fuzz_machine(&data);
            fuzz_control(&data);
        }

        #[test]
        fn requests_with_any_options_are_read_or_refused(
            request in "status|migrate|watch|cancel|stop|pause|console|resolve|[a-z]{0,5}",
            key in "to|options|lines|resume|[a-z]{0,5}",
            value in "\"\\PC{0,20}\"|[0-9]{1,22}|true|\\{\"connections\":[0-9]{1,20}\\}|\\{\"trace_file\":\"\\PC{0,9}\"\\}",
        ) {
            fuzz_control(format!("{{\"request\":\"{request}\",\"to\":\"h:1\",\"{key}\":{value}}}").as_bytes());
        }

        #[test]
        fn a_state_with_some_bytes_changed_is_parsed_or_refused(
            vcpus in 1..4u8,
            changes in vec((any::<proptest::sample::Index>(), any::<u8>()), 0..4),
            cut in any::<Option<proptest::sample::Index>>(),
        ) {
            let mut data = vec![vcpus - 1];
            data.extend(sample(u32::from(vcpus)));
            prop_assert!(VmState::parse(&data[1..], u32::from(vcpus)).is_ok());
            for (at, value) in changes {
                let at = at.index(data.len());
                data[at] = value;
            }
            data.truncate(cut.map_or(data.len(), |cut| cut.index(data.len())));
            fuzz_state(&data);
        }

        #[test]
        fn a_machine_with_any_leaves_can_be_built_from(leaves in leaves(), vcpus in 1..255u32, granules in 8..4096u64) {
            let data = description(2 * granules, vcpus, &leaves);
            prop_assert!(Machine::parse(&data).is_ok());
            fuzz_machine(&data);
        }

        #[test]
        fn a_machine_out_of_range_is_refused(vcpus in any::<u32>(), memory_mib in 0..1u64 << 40) {
            let fits = (1..=254).contains(&vcpus) && (16..=4 << 20).contains(&memory_mib) && memory_mib % 2 == 0;
            prop_assert_eq!(Machine::parse(&description(memory_mib, vcpus, &[])).is_ok(), fits);
        }
    }
}
