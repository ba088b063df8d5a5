//! Whether a device is of any use still, and why not.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Why a device is of no use any more, once it is. Clones are of the same device.
#[derive(Clone, Debug, Default)]
pub(crate) struct Loss(Arc<Mutex<Option<String>>>);

impl Loss {
    /// The device is of no use any more; only the first reason is kept.
    pub(crate) fn note(&self, reason: &str) {
        self.lock().get_or_insert_with(|| one_line(reason));
    }

    /// The reason, if the device is lost.
    pub(crate) fn reason(&self) -> Option<String> {
        self.lock().clone()
    }

    /// Calls wgpu, whose `poll` panics when a driver reports that its device is gone: that is a loss like any other. `None` if it did.
    ///
    /// A program that is built with `panic = "abort"` ends there instead.
    pub(crate) fn catch<T>(&self, call: impl FnOnce() -> T) -> Option<T> {
        // What the panic left half done is the device's, and nobody uses that any more.
        catch_unwind(AssertUnwindSafe(call))
            .map_err(|panic| self.note(&format!("the driver cannot be talked to: {}", message(&*panic))))
            .ok()
    }

    fn lock(&self) -> MutexGuard<'_, Option<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("for no known reason")
}

/// Messages of drivers have many lines.
pub(crate) fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_a_loss_and_the_first_reason_stays() {
        let loss = Loss::default();
        assert_eq!((loss.catch(|| 7), loss.reason()), (Some(7), None));
        assert_eq!(loss.catch(|| panic!("Error in poll:\n  {}", "gone")), None::<()>);
        let reason = Some("the driver cannot be talked to: Error in poll: gone".to_owned());
        assert_eq!(loss.reason(), reason);
        loss.clone().note("something else");
        assert_eq!(loss.reason(), reason);
    }
}
