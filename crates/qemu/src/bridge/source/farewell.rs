//! Lets go of a source QEMU whose migration has failed.
//!
//! QEMU has to notice on its main channel, and is best left alone on all others: up to 8.x, a channel of multifd that breaks while QEMU waits for another one
//! at the mark between two epochs leaves it waiting for ever (`multifd_send_sync_main`). Such a migration cannot even be cancelled. So what the
//! channels carry is taken and dropped until QEMU, having noticed, closes them.

use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use tracing::debug;

use super::SourceBridge;
use crate::bridge::socket::Socket;

/// How long QEMU may take to notice.
const NOTICE: Duration = Duration::from_secs(10);
/// Once all channels are closed, how long more of them are waited for: QEMU opens them one after another.
const QUIET: Duration = Duration::from_millis(200);
/// How long a single one is listened to before the others are.
const TURN: Duration = Duration::from_millis(2);

/// Keeps `channels`, and those that QEMU opens yet, until QEMU closes them. Its main channel must have been ended. Returns the main channel of the
/// next migration, if that comes meanwhile.
pub(super) fn let_go(bridge: &SourceBridge<'_>, mut channels: Vec<Socket>) -> Option<Socket> {
    let begin = Instant::now();
    let mut last = begin;
    let mut scratch = vec![0; 256 << 10];
    while begin.elapsed() < NOTICE && (!channels.is_empty() || last.elapsed() < QUIET) {
        match bridge.accept() {
            Ok(Some(socket)) if socket.is_left_over() => {}
            Ok(Some(socket)) if socket.begins_unlike_multifd() => return Some(socket),
            Ok(Some(socket)) => channels.push(socket),
            Ok(None) => {}
            Err(error) => {
                debug!(%error, "no more connections of QEMU");
                return None;
            }
        }
        let before = channels.len();
        channels.retain(|channel| !has_ended(channel, &mut scratch));
        if channels.len() != before {
            last = Instant::now();
        }
    }
    if !channels.is_empty() {
        debug!(left = channels.len(), "the source QEMU does not close its channels");
    }
    None
}

/// Takes what there is, for a short time. Returns whether there will be no more.
fn has_ended(channel: &Socket, scratch: &mut [u8]) -> bool {
    let begin = Instant::now();
    while begin.elapsed() < TURN {
        match recv(channel, &mut *scratch, RecvFlags::DONTWAIT) {
            Ok((_, 0)) => return true,
            Ok(_) => {}
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return false,
            Err(_) => return true,
        }
    }
    false
}
