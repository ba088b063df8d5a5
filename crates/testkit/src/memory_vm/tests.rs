use super::*;
use crate::memory::{first_difference, memory_digest};

fn dirty(log: &mut dyn DirtyLog, region: u32, pages: u64) -> Vec<u64> {
    let mut bitmap = PageBitmap::new(pages);
    log.fetch(region, &mut bitmap).unwrap();
    bitmap.iter().collect()
}

#[test]
fn the_log_reports_scripted_writes_until_they_are_cleared() {
    let vm = MemoryVm::new(&[100, 70], 1).rounds(
        vec![vec![(0, 3), (0, 99), (1, 69)], vec![(0, 4)]],
        Mutation::Counter,
        1,
    );
    let before = memory_digest(&*vm.memory()).unwrap();
    let mut log = vm.dirty_log().unwrap();
    log.start().unwrap();
    assert_eq!(dirty(&mut *log, 0, 100), [3, 99]);
    assert_eq!(dirty(&mut *log, 1, 70), [69]);
    assert_ne!(memory_digest(&*vm.memory()).unwrap(), before);
    // Page 3 is cleared, page 99 is not named, page 4 comes with the second round.
    log.clear(0, 0, &[1 << 3]).unwrap();
    assert_eq!(dirty(&mut *log, 0, 100), [4, 99]);
    log.clear(0, 64, &[u64::MAX]).unwrap();
    assert_eq!(dirty(&mut *log, 0, 100), [4]);
}

#[test]
fn a_write_after_the_copy_is_dirty_again() {
    let mut rng = SplitMix64::new(1);
    let vm = MemoryVm::new(&[64], 1).script(move |moment, guest| {
        if let Moment::Copied { region, first_page, .. } = moment {
            assert!(guest.mutate(region, first_page, Mutation::Counter, &mut rng));
        }
    });
    let mut log = vm.dirty_log().unwrap();
    log.start().unwrap();
    let mut copy = [Page::ZERO; 2];
    vm.memory().read(0, 5, &mut copy).unwrap();
    assert_eq!(dirty(&mut *log, 0, 64), [5]);
    vm.core.script.lock().unwrap().take();
    let mut now = copy;
    vm.memory().read(0, 5, &mut now).unwrap();
    assert!(copy[0] != now[0] && copy[1] == now[1]);
}

#[test]
fn given_back_pages_outlive_the_log() {
    let vm = MemoryVm::new(&[100], 1).rounds(vec![vec![(0, 7)]], Mutation::Nothing, 1);
    let mut log = vm.dirty_log().unwrap();
    log.start().unwrap();
    assert_eq!(dirty(&mut *log, 0, 100), [7]);
    let mut taken = PageBitmap::new(100);
    taken.insert(42);
    log.give_back(0, &taken);
    log.stop().unwrap();
    assert!(!vm.is_logging());
    assert!(log.fetch(0, &mut taken).is_err());
    drop(log);

    let mut log = vm.dirty_log().unwrap();
    log.start().unwrap();
    assert_eq!(dirty(&mut *log, 0, 100), [42]);
    log.clear(0, 0, &[u64::MAX, u64::MAX]).unwrap();
    assert_eq!(dirty(&mut *log, 0, 100), [0u64; 0]);
}

#[test]
fn a_log_without_manual_protect_clears_on_fetch() {
    let vm = MemoryVm::new(&[100], 1).rounds(vec![vec![(0, 7)]], Mutation::Nothing, 1).clear_on_fetch();
    let mut log = vm.dirty_log().unwrap();
    log.start().unwrap();
    assert_eq!(dirty(&mut *log, 0, 100), [7]);
    assert_eq!(dirty(&mut *log, 0, 100), [0u64; 0]);
    vm.guest().write(0, 9, &Page::ZERO);
    log.clear(0, 0, &[u64::MAX]).unwrap();
    assert_eq!(dirty(&mut *log, 0, 100), [9], "clear does nothing in this mode");
}

#[test]
fn misuse_is_an_error() {
    let mut vm = MemoryVm::new(&[100], 1);
    let mut log = vm.dirty_log().unwrap();
    assert!(vm.dirty_log().err().unwrap().to_string().contains("in use"));
    assert!(log.clear(0, 0, &[1]).is_err());
    log.start().unwrap();
    assert!(log.clear(0, 32, &[1]).is_err());
    assert!(log.clear(0, 64, &[1, 1]).is_err());
    assert!(log.clear(1, 0, &[1]).is_err());
    assert!(log.fetch(0, &mut PageBitmap::new(99)).is_err());
    assert!(vm.save_state().unwrap_err().to_string().contains("pause it first"));
    let mut destination = MemoryDestination::new(&vm.probe());
    assert!(destination.load_state(b"x").is_err());
    assert!(destination.run().is_err());
    let huge = [RegionInfo { id: 0, name: "ram".into(), pages: u64::MAX }];
    assert!(destination.prepare("vm", &huge, b"").err().unwrap().to_string().contains("at most"));
}

#[test]
fn a_paused_guest_writes_nothing() {
    let mut vm = MemoryVm::new(&[100], 1).script(|moment, guest| {
        if moment == Moment::Pause {
            assert!(guest.write(0, 11, &Page([7; 4096])));
        }
    });
    let mut log = vm.dirty_log().unwrap();
    log.start().unwrap();
    vm.pause().unwrap();
    assert!(!vm.guest().write(0, 12, &Page::ZERO));
    assert_eq!(dirty(&mut *log, 0, 100), [11]);
    assert_eq!(vm.save_state().unwrap(), b"a state");
    vm.resume().unwrap();
    assert!(vm.guest().write(0, 12, &Page::ZERO));
}

#[test]
fn a_move_by_hand_ends_with_exactly_one_running() {
    let mut source = MemoryVm::new(&[130, 5], 3).identity("vm", b"m", b"s");
    let mut destination = MemoryDestination::new(&source.probe());
    let ours = source.memory();
    let theirs = destination.prepare(&source.name(), &ours.regions(), &source.machine().unwrap()).unwrap();
    source.pause().unwrap();
    for region in ours.regions() {
        let mut pages = vec![Page::ZERO; region.pages as usize];
        ours.read(region.id, 0, &mut pages).unwrap();
        theirs.write(region.id, 0, &pages).unwrap();
    }
    destination.load_state(&source.save_state().unwrap()).unwrap();
    destination.probe().fail_nth(Step::Run, 0);
    assert!(destination.run().is_err());
    let ledger = source.probe().ledger().clone();
    assert_eq!(ledger.running(), 0);
    destination.run().unwrap();
    assert_eq!((ledger.running(), ledger.most_running()), (1, 1));
    assert_eq!(first_difference(&*ours, &*theirs).unwrap(), None);
    assert_eq!((destination.name(), destination.machine()), ("vm", &b"m"[..]));
    assert_eq!(source.probe().history(), [Step::Machine, Step::Pause, Step::SaveState]);

    let mut next = destination.into_source();
    assert!(next.probe().is_running());
    next.pause().unwrap();
    assert_eq!(next.save_state().unwrap(), b"s");
    assert_eq!(ledger.running(), 0);
}
