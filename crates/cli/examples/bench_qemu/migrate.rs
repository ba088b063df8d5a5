//! One migration.

use std::path::Path;
use std::time::Duration;

use pagewarp_testkit::netns::{End, NetPair};
use serde_json::Value;

use crate::args::{Args, Load};
use crate::course::{Course, guest_clock_lost_ms, guest_pause_ms, ms};
use crate::machines::{self, Counters, Machines};
use crate::mode::Mode;
use crate::process::Tool;
use crate::record::{Check, Cpu, Outcome, Run, Sides};

/// Where the destination QEMU listens when alone.
const QEMU_PORT: u16 = 4444;
/// Where pagewarp listens.
const PAGEWARP_PORT: u16 = 7474;
/// How long the end of a migration may take from its beginning or from its cancellation.
const END: Duration = Duration::from_secs(60);

/// Starts the VM, migrates it and notes everything in `run`.
pub(crate) fn perform(run: &mut Run, args: &Args, pagewarp: &Path, load: &Load) -> Result<Outcome, String> {
    let mut machines = Machines::start(args, load, run.link_rate())?;
    run.qemu_version = machines.source_vm.version().to_string();
    let (outcome, course) = if run.mode.is_pagewarp() {
        through_pagewarp(run, args, pagewarp, &mut machines)?
    } else {
        qemu_alone(run, args, &mut machines)?
    };
    if outcome != Outcome::Completed {
        return Ok(outcome);
    }
    // It has done its part and takes memory and, at its end, time.
    machines.source_vm.quit().map_err(|e| e.to_string())?;
    let (sweeps, errors) = machines::check(&mut machines.destination);
    run.check = Some(Check { sweeps, errors });
    let (source, destination) = (machines.source.serial(), machines.destination.serial());
    run.guest_pause_ms = course.resumed.and_then(|resumed| guest_pause_ms(&destination, resumed));
    run.guest_clock_lost_ms = guest_clock_lost_ms(&source, &destination);
    if errors > 0 {
        return Err(format!("the guest found {errors} errors in its memory"));
    }
    Ok(outcome)
}

fn qemu_alone(run: &mut Run, args: &Args, machines: &mut Machines) -> Result<(Outcome, Course), String> {
    let text = |e: pagewarp_qemu::qmp::QmpError| e.to_string();
    run.mode.prepare(&mut machines.source_vm, true, args).map_err(text)?;
    run.mode.prepare(&mut machines.destination_vm, false, args).map_err(text)?;
    let mut relays = Relays::start(run.mode, machines)?;
    machines.destination_vm.migrate_incoming(&relays.to_destination).map_err(text)?;
    let before = Counters::read(machines)?;
    let mut course = Course::start();
    machines.source_vm.migrate(&relays.from_source).map_err(text)?;
    let mut cancelled_at = None;
    loop {
        course.look(machines)?;
        if course.is_complete() {
            note(run, machines, &course, before, relays.cpu())?;
            return Ok((Outcome::Completed, course));
        }
        match (course.status.as_str(), &course.destination_gone) {
            // QEMU 7.2 says one or the other, as its thread happens to see the closed connection or the cancellation first.
            ("cancelled" | "failed", _) if cancelled_at.is_some() => {
                note(run, machines, &course, before, relays.cpu())?;
                return Ok((Outcome::DidNotConverge, course));
            }
            ("failed" | "cancelled", _) => {
                let status = machines.source_vm.migration().map_err(text)?;
                return Err(format!("the source QEMU gave up: {status:?}"));
            }
            (_, Some(gone)) if cancelled_at.is_none() => return Err(gone.clone()),
            _ => {}
        }
        if overdue(&course, args, cancelled_at)? {
            cancelled_at = Some(course.elapsed());
            run.query_migrate = query_migrate(machines);
            machines.source_vm.cancel().map_err(text)?;
        }
    }
}

/// What stands between the two QEMU processes when they are alone: nothing, or the relays of [`Mode::relay`].
struct Relays {
    /// Where the source QEMU connects to, and where the destination QEMU listens.
    from_source: String,
    to_destination: String,
    /// On the source and on the destination.
    tools: Option<[Tool; 2]>,
}

impl Relays {
    fn start(mode: Mode, machines: &Machines) -> Result<Relays, String> {
        let tcp = |port| format!("tcp:{}:{port}", NetPair::DESTINATION);
        let Some(option) = mode.relay() else {
            return Ok(Relays { from_source: tcp(QEMU_PORT), to_destination: tcp(QEMU_PORT), tools: None });
        };
        let dir = machines.dir();
        let unix = |name: &str| format!("unix:{}", dir.join(name).display());
        let (near, far, link) = (unix("relay-near"), unix("relay-far"), tcp(PAGEWARP_PORT));
        let program = std::env::current_exe().map_err(|e| e.to_string())?;
        let start = |end, from: &str, to: &str| {
            let args = [option, from, to].map(str::to_owned);
            let mut tool = Tool::start(&machines.net, end, &program, &args, dir)?;
            tool.wait_until_it_says("relaying")?;
            Ok::<_, String>(tool)
        };
        let destination = start(End::Destination, &link, &far)?;
        let source = start(End::Source, &near, &link)?;
        Ok(Relays { from_source: near, to_destination: far, tools: Some([source, destination]) })
    }

    fn cpu(&mut self) -> [Duration; 2] {
        self.tools.as_mut().map_or([Duration::ZERO; 2], |tools| tools.each_mut().map(Tool::cpu))
    }
}

fn through_pagewarp(
    run: &mut Run,
    args: &Args,
    pagewarp: &Path,
    machines: &mut Machines,
) -> Result<(Outcome, Course), String> {
    let dir = machines.dir().to_owned();
    let to = format!("{}:{PAGEWARP_PORT}", NetPair::DESTINATION);
    let (history, downtime) = (args.history.to_string(), args.downtime_ms.to_string());
    let compression = args.compression();
    let common = ["--history", &history, "--backend", "cpu", "--plaintext", "--json"];
    let command = |words: &[&str], end| {
        let qmp = machines.second_qmp(end).display().to_string();
        [words, &["--qmp", &qmp], &common].concat().into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let receive = command(&["qemu", "receive", "--listen", &to], End::Destination);
    let mut migrate = command(
        &["qemu", "migrate", "--to", &to, "--downtime-ms", &downtime, "--compression", &compression],
        End::Source,
    );
    if run.mode == Mode::PagewarpBridge {
        migrate.extend(["--route", "bridge"].map(str::to_owned));
    }
    if let Some(channels) = run.mode.multifd(args.channels) {
        migrate.extend(["--multifd".to_owned(), channels.to_string()]);
    }

    let mut receiver = Tool::start(&machines.net, End::Destination, pagewarp, &receive, &dir)?;
    receiver.wait_until_it_says("waiting for a VM")?;
    let before = Counters::read(machines)?;
    let mut course = Course::start();
    let mut sender = Tool::start(&machines.net, End::Source, pagewarp, &migrate, &dir)?;
    let mut cancelled_at = None;
    loop {
        course.look(machines)?;
        let ended = (sender.look(), receiver.look());
        run.peak_rss_bytes =
            Some(Sides { source: sender.peak_rss_bytes(), destination: receiver.peak_rss_bytes() });
        match ended {
            (Some(sent), _) if !sent.status.success() => {
                note(run, machines, &course, before, [sender.cpu(), receiver.cpu()])?;
                if cancelled_at.is_some() && course.resumed.is_none() {
                    return Ok((Outcome::DidNotConverge, course));
                }
                return Err(format!(
                    "pagewarp migrate: {}; pagewarp receive: {}",
                    last_line(&sender),
                    last_line(&receiver)
                ));
            }
            (Some(_), Some(received)) if course.is_complete() => {
                note(run, machines, &course, before, [sender.cpu(), receiver.cpu()])?;
                run.pagewarp_migrate = serde_json::from_str(&sender.output()).ok();
                run.pagewarp_receive = serde_json::from_str(&receiver.output()).ok();
                // The VM runs, but what the report lacks would be missed.
                return match received.status.success() && run.pagewarp_migrate.is_some() {
                    true => Ok((Outcome::Completed, course)),
                    false => Err(format!("pagewarp receive: {}", last_line(&receiver))),
                };
            }
            _ => {}
        }
        if overdue(&course, args, cancelled_at)? {
            cancelled_at = Some(course.elapsed());
            run.query_migrate = query_migrate(machines);
            sender.interrupt();
        }
    }
}

/// Whether to give up now. An error where even that is of no use.
fn overdue(course: &Course, args: &Args, cancelled_at: Option<Duration>) -> Result<bool, String> {
    let elapsed = course.elapsed();
    match cancelled_at {
        Some(at) if elapsed > at + END => {
            Err(format!("no end in {END:?} after it was cancelled: {course:?}"))
        }
        Some(_) => Ok(false),
        None if elapsed > args.limit + END => Err(format!("no end in {elapsed:?}: {course:?}")),
        // A guest that stands still is about to move.
        None => Ok(elapsed > args.limit && course.stopped.is_none()),
    }
}

/// What can be read when a migration has ended, whichever way.
fn note(
    run: &mut Run,
    machines: &mut Machines,
    course: &Course,
    before: Counters,
    pagewarp_cpu: [Duration; 2],
) -> Result<(), String> {
    // Waits until QEMU knows its downtime.
    let status = machines.source_vm.ended_migration(END).map_err(|e| e.to_string())?;
    let used = Counters::read(machines)?.since(before);
    run.total_ms = course.total_ms();
    run.downtime_ms = course.downtime_ms();
    run.elapsed_ms = ms(course.elapsed());
    run.qemu_downtime_ms = status.downtime_ms;
    // What was cancelled knows no counters any more.
    run.epochs = Some(status.ram.as_ref().map_or(course.passes, |ram| ram.dirty_sync_count));
    run.wire_bytes = Some(used.sent_bytes);
    run.wire_back_bytes = Some(used.received_bytes);
    run.cpu = Some(Cpu {
        source_qemu_ms: ms(used.source_cpu),
        destination_qemu_ms: ms(used.destination_cpu),
        source_pagewarp_ms: ms(pagewarp_cpu[0]),
        destination_pagewarp_ms: ms(pagewarp_cpu[1]),
    });
    if status.ram.is_some() {
        run.query_migrate = query_migrate(machines);
    }
    Ok(())
}

fn query_migrate(machines: &mut Machines) -> Option<Value> {
    machines.source_vm.qmp().execute("query-migrate", Value::Null).ok()
}

fn last_line(tool: &Tool) -> String {
    tool.errors().lines().last().unwrap_or("nothing").to_owned()
}
