//! Whether a VM can migrate through the bridge, and what its QEMU has to be told before. No I/O: [`Seen::ask`] asks, the rest decides.

use std::collections::BTreeMap;
use std::num::NonZeroU8;

use serde_json::{Map, Value};

use super::client::{QmpError, Version};
use super::vm::{MigrationStatus, RunState, Vm};

/// The longest `downtime-limit` that QEMU takes, in milliseconds.
pub const MAX_DOWNTIME_MS: u64 = 2_000_000;

/// What a migration should be like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wish {
    /// Connections for pages beside the main one; `None`: QEMU sends everything over one connection. Must be the same on both sides.
    pub multifd: Option<NonZeroU8>,
    /// How long the guest may stand still at the switchover, in milliseconds. Of no meaning to a destination.
    pub downtime_ms: u64,
    /// Whether the VM is to run at the destination, when it is told so. Of no meaning to a source.
    pub run: bool,
    /// Whether the source waits, stopped, to be told to switch over. Of no meaning to a destination.
    pub pause_before_switchover: bool,
}

impl Default for Wish {
    fn default() -> Wish {
        Wish { multifd: None, downtime_ms: 300, run: true, pause_before_switchover: false }
    }
}

/// What a QEMU says about itself before a migration.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Its version.
    pub version: Version,
    /// What its machine is doing.
    pub run: RunState,
    /// How its last migration went, or that there is one.
    pub migration: MigrationStatus,
    /// Which migration capabilities it has, and which are on.
    pub capabilities: BTreeMap<String, bool>,
    /// Its migration parameters.
    pub parameters: Map<String, Value>,
}

impl Seen {
    /// Asks a QEMU.
    pub fn ask(vm: &mut Vm) -> Result<Seen, QmpError> {
        Ok(Seen {
            version: vm.version(),
            run: vm.status()?,
            migration: vm.migration()?,
            capabilities: vm.capabilities()?,
            parameters: vm.parameters()?,
        })
    }
}

/// What a QEMU has to be told before `migrate` or `migrate-incoming`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// Capabilities to turn on and off; all of them exist in that QEMU.
    pub capabilities: BTreeMap<&'static str, bool>,
    /// Parameters to set.
    pub parameters: Map<String, Value>,
}

impl Plan {
    /// Tells it.
    pub fn apply(self, vm: &mut Vm) -> Result<(), QmpError> {
        vm.set_capabilities(self.capabilities)?;
        vm.set_parameters(self.parameters)
    }
}

/// Why a migration is not even started.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The wish.
    #[error("a downtime of {downtime_ms} ms is not possible; choose 1 to {MAX_DOWNTIME_MS} ms")]
    Downtime {
        /// The downtime that was asked for.
        downtime_ms: u64,
    },
    /// A capability that is needed is not there.
    #[error(
        "QEMU {version} has no migration capability `{capability}`, which this migration needs; {}",
        if *capability == "multifd" { "migrate without --multifd" } else { "use QEMU 6.2 or later" }
    )]
    Lacks {
        /// The version of QEMU.
        version: Version,
        /// The capability.
        capability: &'static str,
    },
    /// A capability is on that the bridge cannot carry, or that makes it useless.
    #[error(
        "the migration capability `{capability}` is on, {why}; turn it off (migrate-set-capabilities) on both sides, then try again"
    )]
    Capability {
        /// The capability.
        capability: &'static str,
        /// What is wrong with it.
        why: &'static str,
    },
    /// QEMU would encrypt.
    #[error(
        "the migration parameter `tls-creds` is {creds:?}: QEMU would encrypt, and nothing of what it sends could be compressed; set it to \"\" \
         on both sides and let the bridge encrypt"
    )]
    Tls {
        /// The value.
        creds: String,
    },
    /// QEMU would compress.
    #[error(
        "the migration parameter `multifd-compression` is {method:?}: the bridge compresses better what was not compressed before; set it to \
         \"none\" on both sides"
    )]
    MultifdCompression {
        /// The value.
        method: String,
    },
    /// Not a live migration.
    #[error(
        "the migration parameter `mode` is {mode:?}, which restarts QEMU on the same host; set it to \"normal\" to migrate to another one"
    )]
    Mode {
        /// The value.
        mode: String,
    },
    /// One migration at a time.
    #[error(
        "a migration of this VM is under way (status {status:?}); wait for its end, or cancel it with migrate_cancel"
    )]
    UnderWay {
        /// QEMU's status of the migration.
        status: String,
    },
    /// The source is in no state to migrate.
    #[error("this VM cannot be migrated while its state is {state:?}; {}", source_advice(state))]
    SourceState {
        /// QEMU's name of the state.
        state: String,
    },
    /// The guest has something that cannot be moved.
    #[error("QEMU says that this VM cannot be migrated: {}; remove what is named there, then try again", reasons.join("; "))]
    Blocked {
        /// QEMU's reasons.
        reasons: Vec<String>,
    },
    /// The destination does not wait for a migration.
    #[error(
        "the destination QEMU is in state {state:?} and was expected in \"inmigrate\"; start it with the source's machine and devices and \
         -incoming defer"
    )]
    NotIncoming {
        /// QEMU's name of the state.
        state: String,
    },
    /// The destination listens elsewhere.
    #[error(
        "the destination QEMU already waits for a migration at an address of its own (status {status:?}); start it with -incoming defer, so that \
         pagewarp can name the address"
    )]
    AlreadyListening {
        /// QEMU's status of the migration.
        status: String,
    },
    /// The destination took part in a migration that failed.
    #[error(
        "the destination QEMU has had a migration that ended as {status:?} and takes no other; start it again with -incoming defer"
    )]
    Spent {
        /// QEMU's status of the migration.
        status: String,
    },
}

fn source_advice(state: &str) -> &'static str {
    match state {
        "postmigrate" | "finish-migrate" => {
            "it was migrated before: if it runs at the destination, migrate it from there; if it runs nowhere, `cont` lets it go on here"
        }
        "inmigrate" => "it waits for an incoming migration itself: name the QMP socket of the source",
        "shutdown" | "guest-panicked" | "internal-error" => "the guest has ended: reset or start it",
        _ => "expected \"running\" or \"paused\": wait, or bring it there with `cont`",
    }
}

/// Capabilities that must be off, on both sides, and why.
const MUST_BE_OFF: [(&str, &str); 7] = [
    (
        "xbzrle",
        "which makes QEMU send differences of pages instead of pages, so that the bridge cannot compress them",
    ),
    ("compress", "which makes QEMU compress pages one by one, so that the bridge cannot compress them"),
    // QEMU 7.2 does not let the VM go on at its source then, not even when it is told to cancel.
    (
        "postcopy-ram",
        "which lets a migration go over to post-copy, and a VM whose migration fails after that is lost on both sides",
    ),
    ("background-snapshot", "which is for snapshots to files and not for live migration"),
    ("x-colo", "which keeps two VMs in step and never ends as a migration does"),
    ("mapped-ram", "which needs a file and does not go through a connection"),
    ("rdma-pin-all", "which is for RDMA, and the bridge takes sockets only"),
];

/// The states in which QEMU migrates a source.
const SOURCE_STATES: [&str; 4] = ["running", "paused", "suspended", "prelaunch"];

/// What to tell a source before `migrate`, or why not to.
pub fn source(seen: &Seen, wish: &Wish) -> Result<Plan, Refusal> {
    if !(1..=MAX_DOWNTIME_MS).contains(&wish.downtime_ms) {
        // QEMU takes 0 and then ends after the first pass, whatever is dirty by then.
        return Err(Refusal::Downtime { downtime_ms: wish.downtime_ms });
    }
    if seen.migration.is_under_way() {
        return Err(Refusal::UnderWay { status: seen.migration.status.clone() });
    }
    if !SOURCE_STATES.contains(&seen.run.status.as_str()) {
        return Err(Refusal::SourceState { state: seen.run.status.clone() });
    }
    if !seen.migration.blocked_reasons.is_empty() {
        return Err(Refusal::Blocked { reasons: seen.migration.blocked_reasons.clone() });
    }
    let mut plan = both(seen, wish)?;
    let pause = "pause-before-switchover";
    if seen.capabilities.contains_key(pause) {
        plan.capabilities.insert(pause, wish.pause_before_switchover);
    } else if wish.pause_before_switchover {
        return Err(Refusal::Lacks { version: seen.version, capability: pause });
    }
    // Not for Unix sockets.
    if seen.capabilities.contains_key("zero-copy-send") {
        plan.capabilities.insert("zero-copy-send", false);
    }
    // QEMU counts before compression: its limit of 128 MiB/s would hold back what the link could carry. The bridge's own reading
    // sets the pace. All versions take 0 for no limit.
    plan.parameters.insert("max-bandwidth".to_owned(), 0.into());
    plan.parameters.insert("downtime-limit".to_owned(), wish.downtime_ms.into());
    Ok(plan)
}

/// What to tell a destination before `migrate-incoming`, or why not to.
pub fn destination(seen: &Seen, wish: &Wish) -> Result<Plan, Refusal> {
    if seen.run.status != "inmigrate" {
        return Err(Refusal::NotIncoming { state: seen.run.status.clone() });
    }
    let status = &seen.migration.status;
    if seen.migration.is_under_way() || (seen.migration.is_listening && status == "none") {
        return Err(Refusal::AlreadyListening { status: status.clone() });
    }
    if status != "none" {
        return Err(Refusal::Spent { status: status.clone() });
    }
    let mut plan = both(seen, wish)?;
    // Otherwise QEMU takes the locks of the images as soon as the VM is loaded, and a source that goes on after all does not get them back.
    // With it, `cont` takes them: a VM that stays paused would be without its images.
    let late = "late-block-activate";
    if seen.capabilities.contains_key(late) {
        plan.capabilities.insert(late, wish.run);
    }
    Ok(plan)
}

/// What holds for both sides.
fn both(seen: &Seen, wish: &Wish) -> Result<Plan, Refusal> {
    let is_on = |capability| seen.capabilities.get(capability).copied().unwrap_or(false);
    for (capability, why) in MUST_BE_OFF {
        if is_on(capability) {
            return Err(Refusal::Capability { capability, why });
        }
    }
    // Versions differ in whether what is not set is missing, null or empty.
    let text = |key| seen.parameters.get(key).and_then(Value::as_str).unwrap_or("");
    let creds = text("tls-creds");
    if !creds.is_empty() {
        return Err(Refusal::Tls { creds: creds.to_owned() });
    }
    let mode = text("mode");
    if !matches!(mode, "" | "normal") {
        return Err(Refusal::Mode { mode: mode.to_owned() });
    }
    let mut plan = Plan::default();
    // `events`: to learn of the end at once. `return-path`: without it, a source counts as delivered what it wrote to the bridge, and a
    // migration that failed at the destination looks complete.
    for (capability, on) in [("events", true), ("return-path", true), ("multifd", wish.multifd.is_some())] {
        if seen.capabilities.contains_key(capability) {
            plan.capabilities.insert(capability, on);
        } else if on {
            return Err(Refusal::Lacks { version: seen.version, capability });
        }
    }
    if let Some(channels) = wish.multifd {
        let method = text("multifd-compression");
        if !matches!(method, "" | "none") {
            return Err(Refusal::MultifdCompression { method: method.to_owned() });
        }
        plan.parameters.insert("multifd-channels".to_owned(), channels.get().into());
    }
    Ok(plan)
}

#[cfg(test)]
mod tests;
