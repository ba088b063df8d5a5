//! The bare-metal test guest. docs/guest.md says what it does; boot.s says how it gets here.

#![no_std]
#![no_main]

mod arena;
mod clock;
mod cpu;
mod fault;
mod params;
mod pvh;
mod rng;
mod run;
mod serial;
mod workloads;

use clock::Clock;
use params::{HELP, Kind, Params};
use serial::Serial;
use workloads::{PAGE_WORDS, Plan};

core::arch::global_asm!(include_str!("boot.s"), options(att_syntax));

/// Ring 3 starts here.
#[unsafe(no_mangle)]
extern "C" fn guest_main(start_info: u64) -> ! {
    fault::install_handlers();
    let mut serial = Serial::new();
    serial.init();
    if let Err(problem) = guest(start_info, &mut serial) {
        serial.line(format_args!("FAULT {problem}"));
    }
    serial.flush();
    fault::reset();
}

fn guest(start_info: u64, serial: &mut Serial) -> Result<(), &'static str> {
    let handover = pvh::Handover::read(start_info)?;
    serial.line(format_args!("pagewarp-guest start cmdline=\"{}\"", handover.cmdline()));
    let parsed = Params::parse(handover.cmdline(), |word| {
        serial.line(format_args!("warning unknown parameter {word} ignored"));
    });
    let params = match parsed {
        Ok(params) => params,
        Err(bad) => {
            serial.line(format_args!("error in {}: expected {}; parameters are:", bad.word, bad.expected));
            HELP.lines().for_each(|line| serial.line(format_args!("{line}")));
            return Err("bad command line");
        }
    };
    serial.flush();
    let clock = Clock::new(params.tsc_khz);
    let start = cpu::tsc();
    let mem = arena::map(&handover.ram, params.mem_mib);
    let pages = mem.len() / PAGE_WORDS;
    if pages == 0 {
        return Err("no usable memory above the image; give the machine at least 8 MiB");
    }
    let mib = pages / 256;
    serial.line(format_args!(
        "pagewarp-guest fill workload={} mem_mib={mib} tsc_khz={} tsc_from={}",
        params.workload.name(),
        clock.khz,
        clock.source
    ));
    serial.flush();
    let plan = |default_percent| {
        let filled = pages * params.fill_percent.unwrap_or(default_percent) as usize / 100;
        let working_set = params.ws_mib.map_or(filled, |mib| (mib as usize * 256).min(filled));
        Plan { filled, working_set, seed: params.seed }
    };
    let ready = |serial: &mut Serial, plan: Option<Plan>| {
        let fill_ms = clock.us(cpu::tsc() - start) / 1000;
        let (filled, ws) = plan.map_or((0, 0), |p| (p.filled / 256, p.working_set / 256));
        let workload = params.workload.name();
        serial.line(format_args!(
            "pagewarp-guest ready workload={workload} mem_mib={mib} filled_mib={filled} ws_mib={ws} rate={} seed={} fill_ms={fill_ms}",
            params.rate, params.seed
        ));
        serial.flush();
    };
    match params.workload {
        Kind::Idle => {
            let mut idle = workloads::idle::Idle::new(mem, params.seed);
            ready(serial, None);
            run::run(&mut idle, &params, &clock, start, serial);
        }
        Kind::Kv => {
            let plan = plan(68);
            let mut kv = workloads::kv::Kv::new(arena::bytes(mem), arena::BASE, plan);
            ready(serial, Some(plan));
            run::run(&mut kv, &params, &clock, start, serial);
        }
        Kind::Graph => {
            let plan = plan(90);
            let mut graph = workloads::graph::Graph::new(arena::bytes(mem), plan);
            ready(serial, Some(plan));
            run::run(&mut graph, &params, &clock, start, serial);
        }
        Kind::Uniform => {
            let plan = plan(100);
            let mut uniform = workloads::uniform::Uniform::new(mem, plan);
            ready(serial, Some(plan));
            run::run(&mut uniform, &params, &clock, start, serial);
        }
    }
    Ok(())
}
