//! Entry points for fuzzers and for the property tests that run the same code.

use std::time::Duration;

use pagewarp_wire::fuzzing::{Messages, offer, source_with_offer};
use pagewarp_wire::{Accept, Message};

use crate::control::MigrationControl;
use crate::flow::Flow;
use crate::report::DestinationReport;
use crate::source::peer::Peer;
use crate::vm::RegionInfo;

/// Nothing is waited for here.
const PATIENCE: Duration = Duration::from_secs(60);

/// Reads `data` as what a destination says to a source, through the state machine and into what the source remembers of it; or as its report.
///
/// # Panics
///
/// If what the state machine lets through cannot be kept, or more is kept than there is.
pub fn fuzz_destination_says(data: &[u8]) {
    let [mode, data @ ..] = data else { return };
    if mode & 1 == 0 {
        if let Ok(report) = serde_json::from_slice::<DestinationReport>(data) {
            serde_json::to_vec(&report).expect("what was read can be written");
        }
        return;
    }
    let verify = mode & 2 == 0;
    let mut state = source_with_offer(verify);
    let accept = Accept { encodings: 0x7f, history_slots: 0, max_batch_pages: 256 };
    state.on_receive(&Message::Accept(accept)).expect("what was offered");
    let regions: Vec<_> = offer()
        .regions
        .into_iter()
        .map(|region| RegionInfo { id: region.id, name: region.name, pages: region.pages })
        .collect();
    let pages: u64 = regions.iter().map(|region| region.pages).sum();
    let peer = Peer::new(&regions, verify, PATIENCE);
    // Two epochs are on their way, and then the end.
    let epochs = 1 + u32::from(mode / 4 % 3);
    let mut own: Vec<_> = (0..epochs).map(|epoch| Message::EpochStart { epoch, pages: 1 }).collect();
    own.push(Message::StateEnd { len: 0, xxh3: 0 });
    own.push(Message::Prepare { epoch: epochs - 1, state_len: 0, state_hash: 0 });
    own.reverse();
    let mut theirs = Messages::new(data, true);
    while let Some(message) = theirs.next() {
        if state.on_receive(&message).is_err() {
            return;
        }
        if peer.note(message, false).is_err() {
            return;
        }
        assert!(peer.damaged_pages() <= pages);
        assert_eq!(peer.epochs_done(), state.epochs_done());
        if theirs.byte() & 1 == 0
            && let Some(message) = own.pop()
            && state.on_send(&message).is_err()
        {
            own.push(message);
        }
    }
    if let Some(damaged) = peer.take_damaged() {
        assert!(damaged.epochs.len() <= epochs as usize);
    }
    if state.digests_complete() {
        let flow = Flow::new(MigrationControl::new());
        let digests = peer.wait_digests(&flow).expect("they are all there");
        assert_eq!(digests.iter().map(Vec::len).sum::<usize>() as u64, if verify { pages } else { 0 });
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 20 } else { 2000 }))]

        #[test]
        fn whatever_a_destination_says_is_noted_or_refused(data in vec(any::<u8>(), 0..300)) {
            super::fuzz_destination_says(&data);
        }
    }
}
