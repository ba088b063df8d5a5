//! What migration is made of, without a network: state, memory, dirty log, and what is refused.

mod common;

use std::sync::Arc;

use common::{ask, booted, config, have_kvm, wait_for};
use pagewarp_codec::Page;
use pagewarp_engine::bitmap::PageBitmap;
use pagewarp_engine::vm::{DestinationVm, GuestMemory, SourceVm};
use pagewarp_kvm::{DestinationMachine, HostConfig, MachineConfig, SourceMachine, Vm};

/// Copies everything that `source` has to a new VM, which is left ready to run.
fn copy(source: &mut SourceMachine) -> (DestinationMachine<'static>, Arc<Vm>) {
    let mut destination = DestinationMachine::new(HostConfig::default(), None);
    let from = source.memory();
    let to = destination.prepare(&source.name(), &from.regions(), &source.machine().unwrap()).unwrap();
    copy_memory(&*from, &*to);
    destination.load_state(&source.save_state().unwrap()).unwrap();
    let vm = destination.vm().unwrap();
    (destination, vm)
}

fn copy_memory(from: &dyn GuestMemory, to: &dyn GuestMemory) {
    assert_eq!(from.regions(), to.regions());
    for region in from.regions() {
        let mut pages = vec![Page::ZERO; 1000];
        for first in (0..region.pages).step_by(pages.len()) {
            let count = (region.pages - first).min(pages.len() as u64) as usize;
            from.read(region.id, first, &mut pages[..count]).unwrap();
            to.write(region.id, first, &pages[..count]).unwrap();
        }
    }
}

#[test]
fn the_guest_goes_on_in_another_vm() {
    if !have_kvm() {
        return;
    }
    for vcpus in [1, 3] {
        let vm = Arc::new(booted(&MachineConfig { vcpus, ..config("copy") }));
        assert_eq!(ask(&vm, b'n'), "1");
        let mut source = SourceMachine::new(vm.clone());
        source.pause().unwrap();
        let (mut destination, copy) = copy(&mut source);
        destination.run().unwrap();
        assert_eq!(ask(&copy, b'n'), "2", "the register that counts must have come along");
        assert_eq!(ask(&copy, b'e'), "E");
        // The source was not harmed.
        source.resume().unwrap();
        assert_eq!(ask(&vm, b'n'), "2");
    }
}

#[test]
fn what_was_typed_and_not_read_yet_comes_along() {
    if !have_kvm() {
        return;
    }
    let vm = Arc::new(booted(&config("typed")));
    let mut source = SourceMachine::new(vm.clone());
    // As much as fits, so that the guest is still at it when it is paused.
    let typed = vm.type_serial(&[b'n'; 64]).unwrap();
    source.pause().unwrap();
    assert_eq!(vm.type_serial(b"n").unwrap(), 0, "what is typed into a paused VM could get lost");
    let answered = vm.serial_counters().lines as usize - 1;
    let (mut destination, copy) = copy(&mut source);
    destination.run().unwrap();
    // The guest may have been paused in the middle of a line, whose end is then the copy's.
    wait_for("all answers", || copy.serial_counters().lines as usize == typed - answered);
    assert_eq!(ask(&copy, b'n'), ((typed + 1) % 8).to_string());
}

/// The pages that the guest's `w` writes.
fn written() -> Vec<u64> {
    (0..100).map(|i| 1024 + 3 * i).collect()
}

#[test]
fn the_dirty_log_has_exactly_the_pages_that_were_written() {
    if !have_kvm() {
        return;
    }
    // Not a multiple of 64 pages at the end of a slot can't be had with 2 MiB granules, so the last word is whole here.
    let vm = Arc::new(booted(&config("dirty")));
    let source = SourceMachine::new(vm.clone());
    let pages = source.memory().regions()[0].pages;
    let mut log = source.dirty_log().unwrap();
    let fetch = |log: &mut dyn pagewarp_engine::vm::DirtyLog| {
        let mut dirty = PageBitmap::new(pages);
        log.fetch(0, &mut dirty).unwrap();
        dirty
    };
    for round in 0..3 {
        log.start().unwrap();
        let all = PageBitmap::full(pages);
        log.clear(0, 0, all.words()).unwrap();
        assert_eq!(fetch(&mut *log).count(), 0, "round {round}");
        assert_eq!(ask(&vm, b'w'), "W");
        assert_eq!(fetch(&mut *log).iter().collect::<Vec<_>>(), written());
        // Fetching alone clears nothing; clearing clears what it was told, in any 64-page range, and no more.
        assert_eq!(fetch(&mut *log).count(), 100);
        let first = 1024;
        log.clear(0, first, &[!0]).unwrap();
        let left = fetch(&mut *log);
        assert_eq!(
            left.iter().collect::<Vec<_>>(),
            written().into_iter().filter(|&p| p >= first + 64).collect::<Vec<_>>()
        );
        // The end of the slot.
        log.clear(0, pages - 64, &[!0]).unwrap();
        // A page that was cleared is watched again.
        assert_eq!(ask(&vm, b'w'), "W");
        assert_eq!(fetch(&mut *log).iter().collect::<Vec<_>>(), written());
        log.stop().unwrap();
    }
}

#[test]
fn pages_given_back_are_dirty_until_they_are_cleared_again() {
    if !have_kvm() {
        return;
    }
    let vm = Arc::new(booted(&config("back")));
    let source = SourceMachine::new(vm.clone());
    let pages = source.memory().regions()[0].pages;
    let mut mine = PageBitmap::new(pages);
    mine.insert(5000);
    mine.insert(5001);
    let mut log = source.dirty_log().unwrap();
    log.start().unwrap();
    log.give_back(0, &mine);
    log.stop().unwrap();

    let mut log = source.dirty_log().unwrap();
    log.start().unwrap();
    let mut others = PageBitmap::full(pages);
    others.remove(5000);
    others.remove(5001);
    log.clear(0, 0, others.words()).unwrap();
    let mut dirty = PageBitmap::new(pages);
    log.fetch(0, &mut dirty).unwrap();
    assert!(dirty.contains(5000) && dirty.contains(5001) && dirty.count() == 2);
    log.clear(0, 0, mine.words()).unwrap();
    dirty.clear();
    log.fetch(0, &mut dirty).unwrap();
    assert!(dirty.is_empty());
}

#[test]
fn the_callers_mistakes_are_errors_and_not_memory_errors() {
    if !have_kvm() {
        return;
    }
    let vm = Arc::new(booted(&config("mistakes")));
    let source = SourceMachine::new(vm);
    let memory = source.memory();
    let pages = memory.regions()[0].pages;
    let mut out = vec![Page::ZERO; 2];
    assert!(memory.read(0, pages - 2, &mut out).is_ok());
    assert!(memory.read(0, pages - 1, &mut out).is_err());
    assert!(memory.read(1, 0, &mut out).is_err());
    assert!(memory.read(0, u64::MAX / 4096, &mut out).is_err());
    assert!(memory.write(0, u64::MAX, &out).is_err());
    let mut log = source.dirty_log().unwrap();
    log.start().unwrap();
    assert!(log.clear(0, 1, &[!0]).is_err());
    assert!(log.clear(0, pages, &[!0]).is_err());
    assert!(log.clear(0, pages - 64, &[!0, !0]).is_err());
    assert!(log.clear(1, 0, &[!0]).is_err());
}

#[test]
fn memory_that_was_never_touched_stays_unallocated() {
    if !have_kvm() {
        return;
    }
    let vm = Arc::new(booted(&MachineConfig { memory_bytes: 256 << 20, ..config("holes") }));
    let mut source = SourceMachine::new(vm.clone());
    source.pause().unwrap();
    let (_destination, copy) = copy(&mut source);
    for vm in [&vm, &copy] {
        assert!(vm.allocated_bytes().unwrap() < 1 << 20, "{} bytes", vm.allocated_bytes().unwrap());
    }
}

#[test]
fn a_mutated_state_is_loaded_or_refused_and_never_more() {
    if !have_kvm() {
        return;
    }
    let mut source = SourceMachine::new(Arc::new(booted(&config("garbage"))));
    source.pause().unwrap();
    let state = source.save_state().unwrap();
    assert!(state.len() < 1 << 20);
    let (mut destination, _) = copy(&mut source);
    // A small generator is enough: every byte is hit.
    let mut seed = 1u64;
    let mut refused = 0;
    for i in 0..state.len() {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let mut bad = state.clone();
        bad[i] ^= (seed >> 56) as u8 | 1;
        refused += u32::from(destination.load_state(&bad).is_err());
    }
    assert!(refused > 0);
    for length in [0, 1, 11, 12, 20, state.len() / 2, state.len() - 1] {
        let message = destination.load_state(&state[..length]).unwrap_err().to_string();
        assert!(message.contains("VM state"), "{message}");
    }
    // The good one still loads, and the machine runs.
    destination.load_state(&state).unwrap();
}

#[test]
fn machines_that_cannot_be_built_here_are_refused() {
    if !have_kvm() {
        return;
    }
    let source = SourceMachine::new(Arc::new(booted(&config("refused"))));
    let regions = source.memory().regions();
    let machine = String::from_utf8(source.machine().unwrap()).unwrap();
    let refuse = |name: &str, regions: &[_], machine: &str| {
        let mut destination = DestinationMachine::new(HostConfig::default(), None);
        destination.prepare(name, regions, machine.as_bytes()).err().expect("it must be refused").to_string()
    };
    assert!(refuse("../x", &regions, &machine).contains("name"));
    assert!(refuse("x", &[], &machine).contains("regions"));
    let mut renamed = regions.clone();
    renamed[0].name = "rom".into();
    assert!(refuse("x", &renamed, &machine).contains("regions"));
    assert!(refuse("x", &regions, "").contains("machine description"));
    assert!(refuse("x", &regions, &machine.replace("\"version\":1", "\"version\":2")).contains("version 2"));
    assert!(refuse("x", &regions, &machine.replace("\"vcpus\":1", "\"vcpus\":0")).contains("vcpus"));
    assert!(refuse("x", &regions, &machine.replace("67108864", "67108865")).contains("memory"));
    assert!(refuse("x", &regions, &machine.replace("67108864", "18446744073709551615")).contains("memory"));
    // A processor with everything.
    let mut other: serde_json::Value = serde_json::from_str(&machine).unwrap();
    for leaf in other["cpuid"].as_array_mut().unwrap() {
        if leaf["function"] == 1 {
            leaf["ecx"] = u32::MAX.into();
        }
    }
    let message = refuse("x", &regions, &other.to_string());
    assert!(message.contains("leaf 0x1.0 ECX bit"), "{message}");
}

#[test]
fn pages_read_the_same_whether_they_were_ever_touched_or_not() {
    if !have_kvm() {
        return;
    }
    let vm = booted(&config("mixed"));
    let memory = SourceMachine::new(Arc::new(vm)).memory();
    let filled = |value: u8| Page([value; 4096]);
    // Islands in untouched memory, one of them zeroed again.
    let islands = [(8000u64, 1u8), (8001, 2), (8010, 3), (8063, 4), (8064, 5), (8065, 0)];
    for (page, value) in islands {
        memory.write(0, page, &[filled(9)]).unwrap();
        memory.write(0, page, &[filled(value)]).unwrap();
    }
    for _ in 0..2 {
        let mut pages = vec![filled(7); 100];
        memory.read(0, 7990, &mut pages).unwrap();
        for (page, read) in (7990..).zip(&pages) {
            let expected = islands.iter().find(|island| island.0 == page).map_or(0, |island| island.1);
            assert!(*read == filled(expected), "page {page}");
        }
    }
}

#[test]
fn memory_above_3_gib_is_a_region_of_its_own() {
    if !have_kvm() {
        return;
    }
    let vm = Arc::new(booted(&MachineConfig { memory_bytes: (3 << 30) + (4 << 20), ..config("high") }));
    let source = SourceMachine::new(vm.clone());
    let memory = source.memory();
    let names: Vec<_> = memory.regions().into_iter().map(|r| (r.id, r.name, r.pages)).collect();
    assert_eq!(names, [(0, "ram-low".into(), 3 << 18), (1, "ram-high".into(), 1 << 10)]);
    let page = Page([5; 4096]);
    memory.write(1, 1023, &[page]).unwrap();
    let mut back = [Page::ZERO];
    memory.read(1, 1023, &mut back).unwrap();
    assert!(back[0] == page);
    let mut log = source.dirty_log().unwrap();
    log.start().unwrap();
    log.clear(1, 0, &[!0; 16]).unwrap();
    let mut dirty = PageBitmap::new(1024);
    log.fetch(1, &mut dirty).unwrap();
    assert!(dirty.is_empty());
    log.stop().unwrap();
}

#[test]
fn huge_pages_work_or_are_missed_with_advice() {
    if !have_kvm() {
        return;
    }
    let huge = HostConfig { huge_pages: true, ..HostConfig::default() };
    let vm = match Vm::boot(&MachineConfig { host: huge.clone(), ..config("huge") }, None) {
        Ok(vm) => Arc::new(vm),
        Err(e) => {
            let message = e.to_string();
            assert!(message.contains("vm.nr_hugepages"), "{message}");
            eprintln!("this host has no huge pages to spare: {message}");
            return;
        }
    };
    vm.resume().unwrap();
    wait_for("the guest's first line", || vm.serial_counters().lines > 0);
    let mut source = SourceMachine::new(vm.clone());
    source.pause().unwrap();
    // To small pages; nothing on the way depends on what backs the memory.
    let (mut destination, copy) = copy(&mut source);
    destination.run().unwrap();
    assert_eq!(ask(&copy, b'n'), "1");
    let memory = source.memory();
    memory.write(0, 9000, &[Page([3; 4096]), Page::ZERO]).unwrap();
    memory.write(0, 9000, &[Page::ZERO, Page([4; 4096])]).unwrap();
    let mut pages = [Page([1; 4096]); 2];
    memory.read(0, 9000, &mut pages).unwrap();
    assert!(pages[0] == Page::ZERO && pages[1] == Page([4; 4096]));
}
