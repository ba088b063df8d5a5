//! The Mesa layer that orders GPUs for desktops (`VK_LAYER_MESA_device_select`).
//!
//! Switching it off takes an environment variable, and setting one takes `unsafe`.

use std::ffi::OsStr;

/// Switches the layer off (see its manifest in `/usr/share/vulkan/implicit_layer.d`).
const SWITCH: &str = "NODEVICE_SELECT";
/// How the names begin of the variables that tell the layer what to do.
const WISHES: &[u8] = b"MESA_VK_DEVICE_SELECT";

/// Keeps the layer out of this process and those that it starts: where there is no window system, it complains on standard error, and nobody here wants the
/// order that it brings. Call it first in `main`. A user who has set a variable of the layer finds it as it was.
///
/// Does nothing in a process that has more threads than this one, because a variable must not change while another thread may read it.
pub fn switch_off_device_select() {
    if std::env::vars_os().any(|(name, _)| is_of_the_layer(&name)) || !is_only_thread() {
        return;
    }
    // SAFETY: this is the only thread of the process, and it does nothing else meanwhile, so that nobody reads the environment.
    unsafe { std::env::set_var(SWITCH, "1") };
}

fn is_of_the_layer(name: &OsStr) -> bool {
    name == SWITCH || name.as_encoded_bytes().starts_with(WISHES)
}

fn is_only_thread() -> bool {
    std::fs::read_dir("/proc/self/task").is_ok_and(|threads| threads.count() == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_of_the_layer_are_told_from_others() {
        for name in ["NODEVICE_SELECT", "MESA_VK_DEVICE_SELECT", "MESA_VK_DEVICE_SELECT_FORCE_DEFAULT_DEVICE"]
        {
            assert!(is_of_the_layer(name.as_ref()), "{name}");
        }
        assert!(!is_of_the_layer("MESA_LOADER_DRIVER_OVERRIDE".as_ref()));
    }

    #[test]
    fn a_process_with_threads_is_left_as_it_is() {
        // The test itself runs on a thread beside the first one.
        assert!(!is_only_thread());
    }
}
