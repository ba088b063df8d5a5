use super::*;
use crate::memory::{first_difference, memory_digest};

fn small() -> SyntheticConfig {
    SyntheticConfig {
        region_pages: vec![700, 333],
        working_set_pages: 500,
        writes_per_s: 50_000,
        ..SyntheticConfig::default()
    }
}

/// Waits until the guest has done so many more writes.
fn let_it_write(guest: &SyntheticGuest, more: u64) {
    let until = guest.writes() + more;
    while guest.writes() < until {
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn dirty(log: &mut dyn DirtyLog, region: u32, pages: u64) -> PageBitmap {
    let mut bitmap = PageBitmap::new(pages);
    log.fetch(region, &mut bitmap).unwrap();
    bitmap
}

fn paused_guest() -> SyntheticGuest {
    let mut guest = SyntheticGuest::start(SyntheticConfig { writes_per_s: 0, ..small() }).unwrap();
    guest.pause().unwrap();
    guest
}

#[test]
fn a_guest_that_wrote_checks_itself_clean_and_a_changed_byte_is_found() {
    let mut guest = SyntheticGuest::start(small()).unwrap();
    assert!(guest.self_check().unwrap_err().to_string().contains("pause it first"));
    let_it_write(&guest, 2000);
    guest.pause().unwrap();
    let (writes, digest) = (guest.writes(), memory_digest(&*guest.memory()).unwrap());
    guest.self_check().unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(
        (guest.writes(), memory_digest(&*guest.memory()).unwrap()),
        (writes, digest),
        "a paused guest writes nothing"
    );

    for (region, page) in [(0, 0), (1, 332)] {
        let memory = guest.memory();
        let mut before = [Page::ZERO];
        memory.read(region, page, &mut before).unwrap();
        let mut changed = before;
        changed[0].0[4095] ^= 1;
        memory.write(region, page, &changed).unwrap();
        let error = guest.self_check().unwrap_err().to_string();
        assert!(
            error.contains(&format!("page {page} of region {region}")) && error.contains("byte 4095"),
            "{error}"
        );
        memory.write(region, page, &before).unwrap();
    }
    guest.self_check().unwrap();
    guest.resume().unwrap();
    let_it_write(&guest, 100);
    guest.pause().unwrap();
    guest.self_check().unwrap();
}

#[test]
fn an_older_version_of_a_page_is_found() {
    let mut guest = SyntheticGuest::start(small()).unwrap();
    let_it_write(&guest, 500);
    guest.pause().unwrap();
    let mut old = vec![Page::ZERO; 700];
    guest.memory().read(0, 0, &mut old).unwrap();
    guest.resume().unwrap();
    let_it_write(&guest, 500);
    guest.pause().unwrap();
    guest.self_check().unwrap();
    guest.memory().write(0, 0, &old).unwrap();
    let error = guest.self_check().unwrap_err().to_string();
    assert!(error.contains("in the working set"), "{error}");
}

#[test]
fn the_log_reports_exactly_the_pages_written() {
    let guest = paused_guest();
    let memory = guest.memory();
    let mut log = guest.dirty_log().unwrap();
    log.start().unwrap();
    assert!(dirty(&mut *log, 0, 700).is_empty() && dirty(&mut *log, 1, 333).is_empty());
    // Zero pages of the image were never touched: both kinds must be seen.
    for page in [0, 63, 64, 65, 200, 699] {
        memory.write(0, page, &[Page([1; 4096])]).unwrap();
    }
    memory.write(1, 332, &[Page::ZERO]).unwrap();
    assert_eq!(dirty(&mut *log, 0, 700).iter().collect::<Vec<_>>(), [0, 63, 64, 65, 200, 699]);
    assert_eq!(dirty(&mut *log, 1, 333).iter().collect::<Vec<_>>(), [332]);
    // Fetching did not clear, reading does not dirty.
    let mut pages = vec![Page::ZERO; 700];
    memory.read(0, 0, &mut pages).unwrap();
    assert_eq!(dirty(&mut *log, 0, 700).count(), 6);

    log.clear(0, 64, &[1, 0, u64::MAX]).unwrap();
    assert_eq!(dirty(&mut *log, 0, 700).iter().collect::<Vec<_>>(), [0, 63, 65, 699], "65 was not named");
    memory.write(0, 64, &[Page([2; 4096])]).unwrap();
    assert!(dirty(&mut *log, 0, 700).contains(64), "it is watched again");
    log.clear(0, 640, &[u64::MAX]).unwrap();
    assert!(!dirty(&mut *log, 0, 700).contains(699));
}

#[test]
fn given_back_pages_are_dirty_until_cleared_also_in_the_next_log() {
    let guest = paused_guest();
    let mut log = guest.dirty_log().unwrap();
    log.start().unwrap();
    let mut taken = PageBitmap::new(333);
    taken.insert(5);
    taken.insert(300);
    log.give_back(1, &taken);
    assert_eq!(dirty(&mut *log, 1, 333), taken);
    log.stop().unwrap();
    assert!(log.fetch(1, &mut taken.clone()).is_err());
    guest.memory().write(1, 7, &[Page::ZERO]).unwrap();
    drop(log);

    let mut log = guest.dirty_log().unwrap();
    log.start().unwrap();
    assert_eq!(dirty(&mut *log, 1, 333), taken);
    log.clear(1, 256, &[1 << 44]).unwrap();
    taken.remove(300);
    assert_eq!(dirty(&mut *log, 1, 333), taken);
}

#[test]
fn one_log_at_a_time_and_only_for_what_exists() {
    let guest = paused_guest();
    let mut log = guest.dirty_log().unwrap();
    assert!(guest.dirty_log().err().unwrap().to_string().contains("in use"));
    assert!(log.clear(0, 0, &[1]).err().unwrap().to_string().contains("not started"));
    log.start().unwrap();
    log.start().unwrap();
    assert!(log.fetch(2, &mut PageBitmap::new(1)).is_err());
    assert!(log.fetch(0, &mut PageBitmap::new(1)).is_err());
    assert!(log.clear(0, 1, &[1]).is_err());
    assert!(log.clear(0, 704, &[1]).is_err());
    drop(log);
    guest.dirty_log().unwrap().start().unwrap();
}

/// The whole pre-copy by hand, against a guest that writes all the time: what the log misses, the checks find.
#[test]
fn a_guest_moves_live_and_nothing_is_lost() {
    let mut source =
        SyntheticGuest::start(SyntheticConfig { region_pages: vec![3001, 1777], ..small() }).unwrap();
    let mut destination = SyntheticDestination::new(1 << 30);
    let ours = source.memory();
    let theirs = destination.prepare(&source.name(), &ours.regions(), &source.machine().unwrap()).unwrap();
    let mut log = source.dirty_log().unwrap();
    log.start().unwrap();
    let mut first = true;
    for epoch in 0..5 {
        if epoch == 4 {
            source.pause().unwrap();
        }
        for region in ours.regions() {
            let mut pages = dirty(&mut *log, region.id, region.pages);
            if first {
                pages = PageBitmap::full(region.pages);
            }
            for (word, bits) in (0..).zip(pages.words().to_vec()) {
                log.clear(region.id, word * 64, &[bits]).unwrap();
                for page in (word * 64..region.pages.min(word * 64 + 64)).filter(|&page| pages.contains(page))
                {
                    let mut copy = [Page::ZERO];
                    ours.read(region.id, page, &mut copy).unwrap();
                    theirs.write(region.id, page, &copy).unwrap();
                }
            }
        }
        first = false;
        if epoch < 4 {
            let_it_write(&source, 500);
        }
    }
    assert_eq!(first_difference(&*ours, &*theirs).unwrap(), None);
    destination.load_state(&source.save_state().unwrap()).unwrap();
    destination.run().unwrap();
    let mut guest = destination.into_guest().unwrap();
    assert!(guest.is_running() && !source.is_running());
    let_it_write(&guest, 500);
    guest.pause().unwrap();
    assert!(guest.writes() >= source.writes() + 500);
    assert!(guest.longest_pause() > Duration::ZERO);
    guest.self_check().unwrap();
    source.self_check().unwrap();
    // Without the last state the destination would not check clean: the check is not blind.
    source.resume().unwrap();
    let_it_write(&source, 100);
    source.pause().unwrap();
    assert!(first_difference(&*ours, &*guest.memory()).unwrap().is_some());
}

#[test]
fn the_destination_refuses_what_does_not_fit() {
    let source = paused_guest();
    let (regions, machine) = (source.memory().regions(), source.machine().unwrap());
    let mut destination = SyntheticDestination::new(1 << 30);
    let error = |result: Result<Arc<dyn GuestMemory>, VmError>| result.err().unwrap().to_string();
    assert!(error(destination.prepare("synthetic", &regions[..1], &machine)).contains("do not match"));
    assert!(error(destination.prepare("other", &regions, &machine)).contains("do not match"));
    assert!(error(destination.prepare("synthetic", &regions, b"{}")).contains("missing field"));
    assert!(
        error(SyntheticDestination::new(1 << 20).prepare("synthetic", &regions, &machine))
            .contains("at most")
    );
    assert!(destination.run().is_err());
    assert!(destination.load_state(b"{}").unwrap_err().to_string().contains("no machine"));
    destination.prepare("synthetic", &regions, &machine).unwrap();
    assert!(destination.run().unwrap_err().to_string().contains("no state"));
    assert!(destination.load_state(br#"{"seed":1,"writes":[1],"last_active_ns":0}"#).is_err());
    assert!(destination.load_state(br#"{"seed":2,"writes":[1,1],"last_active_ns":0}"#).is_err());
    let endless = br#"{"seed":1,"writes":[0,18446744073709551615],"last_active_ns":0}"#;
    assert!(destination.load_state(endless).unwrap_err().to_string().contains("at most"));
    destination.load_state(br#"{"seed":1,"writes":[0,0],"last_active_ns":0}"#).unwrap();
}

#[test]
fn the_rate_can_be_changed() {
    let guest = SyntheticGuest::start(SyntheticConfig { writes_per_s: 0, ..small() }).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(guest.writes(), 0);
    guest.set_writes_per_s(10_000);
    let_it_write(&guest, 10);
}

#[test]
fn runs_are_found_across_words() {
    assert_eq!(runs(&[0b1110, u64::MAX << 63, 1, 0]).collect::<Vec<_>>(), [1..4, 127..129]);
    assert_eq!(runs(&[u64::MAX, u64::MAX]).next(), Some(0..128));
    assert_eq!(runs(&[u64::MAX, u64::MAX]).count(), 1);
    assert_eq!(runs(&[]).count() + runs(&[0]).count(), 0);
}
