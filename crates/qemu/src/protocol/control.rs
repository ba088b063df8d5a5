//! What `pagewarp qemu migrate` and `pagewarp qemu receive` say to each other, in JSON, on a connection of their own.

use std::num::NonZeroU8;

use pagewarp_wire::{WireError, malformed};
use serde::{Deserialize, Serialize};

use super::shorten;
use super::text::printable_json;
use crate::bridge::DestinationBridgeReport;

/// A message.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "kebab-case")]
pub enum Message {
    /// First, from the source: what is about to come.
    Prepare(Prepare),
    /// From the destination: its QEMU listens, and will not run the VM by itself.
    Prepared,
    /// From the source, whose QEMU has completed the migration: the VM is the destination's, and the source never will run it.
    Commit {
        /// Whether the destination runs it. One that was paused stays so.
        run: bool,
    },
    /// From the destination: the VM runs there, or is paused there if it is not to run.
    Running(Running),
    /// Last, from the destination, once its bridge has ended.
    Report(Box<DestinationSide>),
    /// From the source, before the commit: it is off.
    Cancel {
        /// Why.
        reason: String,
    },
    /// From the destination: it is off; or, after the commit, the VM does not run.
    Failed {
        /// Why.
        reason: String,
    },
}

/// What the source announces.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Prepare {
    /// The VM's name in QEMU, if it has one.
    pub name: Option<String>,
    /// Its UUID.
    pub uuid: String,
    /// The version of the source QEMU.
    pub qemu_version: String,
    /// Connections for pages beside the main one.
    pub multifd: Option<NonZeroU8>,
    /// Whether the VM runs as the migration begins.
    pub was_running: bool,
    /// How QEMU's stream is going to travel; a source that does not say so knows the bridge only.
    #[serde(default)]
    pub route: Route,
}

/// How QEMU's stream travels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Route {
    /// Through both pagewarp processes, compressed.
    #[default]
    Bridge,
    /// From one QEMU process to the other, as it is, over a connection of [`Purpose::Direct`](super::hello::Purpose::Direct).
    ///
    /// A QEMU whose pagewarp is gone goes on by itself then, until the other one ends. So each side gives the migration up at once when it loses the other: otherwise the source QEMU
    /// might complete it though nobody is left to hand the VM over.
    Direct,
}

/// The news that the VM runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Running {
    /// When it did by the clock of the destination, in microseconds since 1970; absent if QEMU could not tell, or the VM is paused.
    pub resumed_at_us: Option<u64>,
}

/// The destination's account.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DestinationSide {
    /// The bridge's; absent on the direct route, and if it failed after the VM was handed over.
    pub bridge: Option<DestinationBridgeReport>,
    /// The version of the destination QEMU.
    pub qemu_version: String,
    /// CPU time of QEMU's threads other than vCPUs; absent if that could not be told.
    pub qemu_cpu_ms: Option<f64>,
}

impl Message {
    /// The body of the frame. Reasons are shortened: they may come from anywhere, and the frame has a limit.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self.shortened().as_ref().unwrap_or(self)).unwrap_or_default()
    }

    /// Reads the body of a frame, whose length has been checked. Texts can be printed as they are then.
    pub fn decode(body: &[u8]) -> Result<Message, WireError> {
        let message: Message = serde_json::from_slice(body)
            .and_then(|value| serde_json::from_value(printable_json(value)))
            .map_err(|error| malformed("a control message", error, "a message of this version"))?;
        Ok(message.shortened().unwrap_or(message))
    }

    /// The message with a shorter reason, if it has one.
    fn shortened(&self) -> Option<Message> {
        match self {
            Message::Cancel { reason } => Some(Message::Cancel { reason: shorten(reason) }),
            Message::Failed { reason } => Some(Message::Failed { reason: shorten(reason) }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{MAX_MESSAGE, MAX_REASON};
    use super::*;

    #[test]
    fn messages_come_back() {
        for message in [
            Message::Prepare(Prepare { multifd: NonZeroU8::new(4), uuid: "u".into(), ..Prepare::default() }),
            Message::Prepare(Prepare { was_running: true, route: Route::Direct, ..Prepare::default() }),
            Message::Prepared,
            Message::Commit { run: true },
            Message::Commit { run: false },
            Message::Running(Running { resumed_at_us: Some(1 << 50) }),
            Message::Report(Box::default()),
            Message::Cancel { reason: "x".into() },
            Message::Failed { reason: "y".into() },
        ] {
            assert_eq!(Message::decode(&message.encode()), Ok(message));
        }
        // Each of these characters takes six bytes in JSON.
        let long = "\u{1}".repeat(MAX_MESSAGE);
        for message in [Message::Cancel { reason: long.clone() }, Message::Failed { reason: long }] {
            let body = message.encode();
            assert!(body.len() <= MAX_MESSAGE, "{} bytes", body.len());
            let back = Message::decode(&body).unwrap();
            assert!(
                matches!(back, Message::Cancel { reason } | Message::Failed { reason } if reason.len() == MAX_REASON)
            );
        }
        // Whether the VM is to run is never guessed.
        for body in [
            &b"{\"message\":\"dance\"}"[..],
            b"{\"message\":\"commit\"}",
            b"{\"message\":\"commit\",\"run\":1}",
            b"{\"message\":\"prepare\",\"uuid\":\"u\",\"qemu_version\":\"7.2.0\",\"multifd\":null}",
        ] {
            assert!(Message::decode(body).is_err(), "{}", String::from_utf8_lossy(body));
        }
        assert!(Message::decode(b"\xff").is_err());
        // A source from before there were routes.
        let old =
            br#"{"message":"prepare","name":null,"uuid":"u","qemu_version":"7.2.0","multifd":null,"was_running":true}"#;
        assert!(matches!(Message::decode(old), Ok(Message::Prepare(Prepare { route: Route::Bridge, .. }))));
        let colourful = Message::Failed { reason: "\x1b[31mno".into() }.encode();
        assert_eq!(Message::decode(&colourful), Ok(Message::Failed { reason: "\\u{1b}[31mno".into() }));
    }
}
