//! Ctrl-C during a demo: waits end early, and guards end the children.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::exit::{Exit, failure};

static INTERRUPTED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// From now on SIGINT and SIGTERM make [`check`] fail instead of ending the process. The second one ends it.
pub fn watch() -> Result<()> {
    let flag = INTERRUPTED.get_or_init(Arc::default);
    for signal in [SIGINT, SIGTERM] {
        // In this order: the shutdown fires on the flag that an earlier signal has set.
        signal_hook::flag::register_conditional_shutdown(signal, Exit::Cancelled as i32, flag.clone())
            .and_then(|_| signal_hook::flag::register(signal, flag.clone()))
            .context("cannot watch for Ctrl-C")?;
    }
    Ok(())
}

/// Fails if somebody pressed Ctrl-C.
pub fn check() -> Result<()> {
    if INTERRUPTED.get().is_some_and(|flag| flag.load(Ordering::Relaxed)) {
        bail!(failure(Exit::Cancelled, "interrupted"));
    }
    Ok(())
}
