//! Lets go of a source QEMU whose migration has failed.
//!
//! QEMU has to notice on its main channel, and is best left alone on all others: up to 8.x, a channel of multifd that breaks while QEMU waits for another one
//! at the mark between two epochs leaves it waiting for ever (`multifd_send_sync_main`). Such a migration cannot even be cancelled. So what the
//! channels carry is taken and dropped until QEMU, having noticed, closes them.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use pagewarp_engine::control::MigrationControl;
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use tracing::{debug, info};

use super::{LOOK, Left, SourceBridge};
use crate::bridge::socket::{Beginning, Socket};

/// How long QEMU may take to notice.
const NOTICE: Duration = Duration::from_secs(10);
/// The same, if somebody wants the bridge to end.
const HURRIED: Duration = Duration::from_secs(2);
/// Once all channels are closed, how long more of them are waited for: QEMU opens them one after another.
const QUIET: Duration = Duration::from_millis(200);
/// How long a single one is listened to before the others are.
const TURN: Duration = Duration::from_millis(2);

/// Keeps the channels, and those that QEMU opens yet, until QEMU closes them. Its main channel must have been ended. Returns connections that came meanwhile and
/// may be of the next migration: nothing was taken from them.
pub(super) fn let_go(
    bridge: &SourceBridge<'_>,
    mut left: Left,
    control: &MigrationControl,
) -> VecDeque<Socket> {
    let begin = Instant::now();
    let mut last = begin;
    let mut early = VecDeque::new();
    let mut scratch = vec![0; 256 << 10];
    let notice = || if control.is_cancelled() { HURRIED } else { NOTICE };
    if !left.is_empty() {
        info!("the migration has failed; waiting for the source QEMU to close its channels");
    }
    while begin.elapsed() < notice() && (!left.is_empty() || last.elapsed() < QUIET) {
        match bridge.accept() {
            Ok(socket) => early.extend(socket),
            Err(error) => {
                // No descriptors left, it may be: closing some is what this is about.
                debug!(%error, "no more connections of QEMU for now");
                std::thread::sleep(LOOK);
            }
        }
        if early.iter().any(|socket| socket.beginning() == Beginning::Main) {
            // QEMU begins no other migration before it has done with this one.
            break;
        }
        for socket in std::mem::take(&mut early) {
            match socket.beginning() {
                Beginning::Multifd => left.others.push(socket),
                _ if socket.is_left_over() => {}
                _ => early.push_back(socket),
            }
        }
        let before = left.len();
        left.taken.retain(|connection| !has_ended(&connection.qemu, &mut scratch));
        left.others.retain(|channel| !has_ended(channel, &mut scratch));
        if left.len() != before {
            last = Instant::now();
        }
    }
    if !left.is_empty() {
        debug!(left = left.len(), "the source QEMU has not closed its channels");
    }
    early
}

impl Left {
    fn len(&self) -> usize {
        self.taken.len() + self.others.len()
    }

    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Takes what there is, for a short time. Returns whether there will be no more.
fn has_ended(channel: &Socket, scratch: &mut [u8]) -> bool {
    let begin = Instant::now();
    while begin.elapsed() < TURN {
        match recv(channel, &mut *scratch, RecvFlags::DONTWAIT) {
            Ok((_, 0)) => return true,
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return false,
            Err(_) => return true,
        }
    }
    false
}
