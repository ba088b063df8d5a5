//! `pagewarp status`, `pagewarp cancel` and `pagewarp resolve`.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, bail};
use pagewarp_kvm::control::{Event, Request, Status, VmState, list};

use crate::args::{CancelArgs, ResolveArgs, StatusArgs};
use crate::progress;
use crate::say;
use crate::table::Table;
use crate::units::{human_bytes, human_ms};
use crate::vm::Vm;

/// Runs `pagewarp status`.
pub(super) fn status(args: &StatusArgs, run_dir: &Path) -> Result<()> {
    let text = match &args.name {
        Some(name) => {
            let status = ask_status(&mut Vm::open(run_dir, name)?)?;
            if args.json { serde_json::to_string_pretty(&status)? + "\n" } else { one(&status) }
        }
        None => {
            // A VM that ends between the listing and the question is no longer one of this host.
            let all: Vec<Status> = list(run_dir)
                .with_context(|| format!("cannot read `{}`", run_dir.display()))?
                .iter()
                .filter_map(|name| Vm::open(run_dir, name).ok())
                .filter_map(|mut vm| ask_status(&mut vm).ok())
                .collect();
            if args.json { serde_json::to_string_pretty(&all)? + "\n" } else { many(&all) }
        }
    };
    std::io::stdout().write_all(text.as_bytes()).context("cannot print the status")
}

/// Runs `pagewarp cancel`.
pub(super) fn cancel(args: &CancelArgs, run_dir: &Path) -> Result<()> {
    let mut vm = Vm::open(run_dir, &args.name)?;
    vm.ask(&Request::Cancel).with_context(|| format!("cannot cancel the migration of `{}`", args.name))?;
    say!("cancelling the migration of `{}`; it goes on here", args.name);
    Ok(())
}

/// Runs `pagewarp resolve`.
pub(super) fn resolve(args: &ResolveArgs, run_dir: &Path) -> Result<()> {
    let mut vm = Vm::open(run_dir, &args.name)?;
    vm.ask(&Request::Resolve { resume: args.resume })
        .with_context(|| format!("cannot resolve `{}`", args.name))?;
    say!("`{}` {}", args.name, if args.resume { "runs here" } else { "is discarded here" });
    Ok(())
}

fn ask_status(vm: &mut Vm) -> Result<Status> {
    match vm.ask(&Request::Status)? {
        Event::Status(status) => Ok(*status),
        other => {
            bail!("the VM process answered {other:?} to a status request; its version does not fit this one")
        }
    }
}

fn state_name(state: VmState) -> &'static str {
    match state {
        VmState::Running => "running",
        VmState::Paused => "paused",
        VmState::Migrating => "migrating",
        VmState::InDoubt => "in doubt",
        VmState::Receiving => "receiving",
        VmState::Migrated => "migrated",
        VmState::Stopped => "stopped",
    }
}

fn one(status: &Status) -> String {
    let mut table = Table::default();
    table.row(["name".to_owned(), status.name.clone()]);
    table.row(["state".to_owned(), state_name(status.state).to_owned()]);
    table.row(["process".to_owned(), status.pid.to_string()]);
    table.row(["memory".to_owned(), human_bytes(status.memory_bytes)]);
    table.row(["vCPUs".to_owned(), status.vcpus.to_string()]);
    table.row(["here for".to_owned(), human_ms(status.uptime_ms)]);
    table.row([
        "console".to_owned(),
        format!("{} lines, {}", status.serial_lines, human_bytes(status.serial_bytes)),
    ]);
    if let Some(listening) = &status.listening {
        table.row(["listening".to_owned(), listening.clone()]);
    }
    let mut text = table.to_string();
    if let Some(progress) = &status.progress {
        text.push_str(&format!("migration: {}\n", progress::line(progress)));
    }
    if status.state == VmState::InDoubt {
        text.push_str(&format!(
            "The hand-over was committed but never confirmed. Look at the destination: if the VM runs there,\n\
             `pagewarp resolve {0} --discard`; if it surely does not and never will, `pagewarp resolve {0} --resume`.\n",
            status.name
        ));
    }
    text
}

fn many(all: &[Status]) -> String {
    if all.is_empty() {
        return "no VMs on this host\n".to_owned();
    }
    let mut table = Table::new(["name", "state", "memory", "vCPUs", "process", "here for"]);
    for status in all {
        table.row([
            status.name.clone(),
            state_name(status.state).to_owned(),
            human_bytes(status.memory_bytes),
            status.vcpus.to_string(),
            status.pid.to_string(),
            human_ms(status.uptime_ms),
        ]);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(state: VmState) -> Status {
        Status {
            name: "db1".into(),
            state,
            pid: 42,
            memory_bytes: 1 << 30,
            vcpus: 2,
            uptime_ms: 61_000.0,
            serial_lines: 3,
            serial_bytes: 120,
            listening: None,
            progress: None,
        }
    }

    #[test]
    fn a_vm_in_doubt_comes_with_the_way_out() {
        let text = one(&sample(VmState::InDoubt));
        assert!(text.contains("pagewarp resolve db1 --discard") && text.contains("--resume"), "{text}");
        assert!(!one(&sample(VmState::Running)).contains("resolve"));
    }

    #[test]
    fn the_list_has_a_line_per_vm() {
        assert_eq!(many(&[]), "no VMs on this host\n");
        assert_eq!(many(&[sample(VmState::Running), sample(VmState::Migrating)]).lines().count(), 3);
    }
}
