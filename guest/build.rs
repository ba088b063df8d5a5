//! Builds the bare-metal guest image (`image/`) into `$OUT_DIR/guest.elf`.
//!
//! The image is `no_std` code for ring 3 of an otherwise empty machine. No bare-metal target has to be
//! installed for it: the compiler that builds the workspace builds it too, for `x86_64-unknown-linux-gnu`
//! without start files, without a libc, without position independence, and with the image's own linker
//! script. `core` is all it takes from the target.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

const IMAGE_TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() {
    println!("cargo::rerun-if-changed=image");
    println!("cargo::rerun-if-changed=build.rs");
    let manifest = PathBuf::from(var("CARGO_MANIFEST_DIR"));
    let image = manifest.join("image");
    let elf = Path::new(&var("OUT_DIR")).join("guest.elf");

    let mut rustc = Command::new(var("RUSTC"));
    rustc
        .arg("--crate-name=pagewarp_guest_image")
        .args(["--edition", "2024", "--crate-type", "bin"])
        .args(["--target", IMAGE_TARGET])
        // A warning here would never be seen, as cargo keeps what build scripts print to itself.
        .args(["-D", "warnings"])
        .args(["-C", "opt-level=3", "-C", "panic=abort", "-C", "codegen-units=1"])
        // Fixed addresses below 4 GiB: the boot code runs in 32-bit mode and takes addresses of symbols.
        .args(["-C", "relocation-model=static", "-C", "code-model=small"])
        // Nothing walks frames in the guest, and unwind tables would only be dead weight in the loaded
        // segment.
        .args(["-C", "force-unwind-tables=no", "-C", "strip=symbols"])
        .args(["-C", "link-arg=-nostdlib", "-C", "link-arg=-nostartfiles"])
        .args(["-C", "link-arg=-static", "-C", "link-arg=-no-pie"])
        .args(["-C", "link-arg=-Wl,--build-id=none,--gc-sections,-z,norelro"])
        .arg("-C")
        .arg(format!("link-arg=-Wl,-T,{}", image.join("link.ld").display()))
        // Panic messages name files; keep the checkout's place out of the image so that it is reproducible.
        .arg(format!("--remap-path-prefix={}=guest", manifest.display()))
        .arg("-o")
        .arg(&elf)
        .arg(image.join("main.rs"));
    let status =
        rustc.status().unwrap_or_else(|e| panic!("cannot run {rustc:?} to build the guest image: {e}"));
    assert!(
        status.success(),
        "building the guest image failed ({status}); it needs the rust-std component of {IMAGE_TARGET} and a C linker (cc)"
    );
}

fn var(name: &str) -> String {
    env::var(name).unwrap_or_else(|e| panic!("cargo sets {name} for build scripts, but: {e}"))
}
