//! `pagewarp codec` on files, and the ways output ends.

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use pagewarp_testkit::image::mixed_image;

const PROGRAM: &str = env!("CARGO_BIN_EXE_pagewarp");

fn pagewarp(dir: &Path, args: &[&str]) -> Output {
    Command::new(PROGRAM).current_dir(dir).args(args).output().unwrap()
}

fn ok(dir: &Path, args: &[&str]) -> Output {
    let done = pagewarp(dir, args);
    assert!(done.status.success(), "{args:?}: {}", String::from_utf8_lossy(&done.stderr));
    done
}

/// `old`: pages as in real memory. `new`: the same with a few bytes of each fifth page changed.
fn images(dir: &Path) -> Vec<u8> {
    let bytes = |pages: &[pagewarp_codec::Page]| pages.iter().flat_map(|page| page.0).collect::<Vec<u8>>();
    let mut pages = mixed_image(700, 7);
    std::fs::write(dir.join("old"), bytes(&pages)).unwrap();
    pages.iter_mut().step_by(5).for_each(|page| page.0[100..110].copy_from_slice(b"0123456789"));
    let new = bytes(&pages);
    std::fs::write(dir.join("new"), &new).unwrap();
    new
}

#[test]
fn an_image_comes_back_with_and_without_a_base() {
    let dir = tempfile::tempdir().unwrap();
    let new = images(dir.path());
    for base in [&[][..], &["--base", "old"]] {
        ok(dir.path(), &[&["codec", "encode", "new", "packed"], base].concat());
        ok(dir.path(), &[&["codec", "decode", "packed", "back"], base].concat());
        assert_eq!(std::fs::read(dir.path().join("back")).unwrap(), new);
    }
    let packed = std::fs::metadata(dir.path().join("packed")).unwrap().len();
    assert!(
        packed < new.len() as u64 / 20,
        "against its base the image is a few bytes a page, not {packed} in all"
    );
}

#[test]
fn a_wrong_or_missing_base_and_damage_are_noticed_and_leave_no_output() {
    let dir = tempfile::tempdir().unwrap();
    let new = images(dir.path());
    ok(dir.path(), &["codec", "encode", "new", "packed", "--base", "old"]);
    let mut damaged = std::fs::read(dir.path().join("packed")).unwrap();
    *damaged.last_mut().unwrap() ^= 1;
    std::fs::write(dir.path().join("damaged"), &damaged).unwrap();
    std::fs::write(dir.path().join("cut"), &damaged[..damaged.len() / 2]).unwrap();
    std::fs::write(dir.path().join("zeros"), vec![0; new.len()]).unwrap();
    for args in [
        &["codec", "decode", "packed", "out"][..],
        &["codec", "decode", "packed", "out", "--base", "zeros"],
        &["codec", "decode", "damaged", "out", "--base", "old"],
        &["codec", "decode", "cut", "out", "--base", "old"],
    ] {
        let done = pagewarp(dir.path(), args);
        let said = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(1), "{args:?}: {said}");
        assert!(said.starts_with("error: cannot decode") && said.lines().count() == 1, "{args:?}: {said}");
        assert!(!dir.path().join("out").exists(), "{args:?}");
    }
}

#[test]
fn only_files_are_replaced_and_what_is_written_is_private() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let new = images(dir.path());
    ok(dir.path(), &["codec", "encode", "new", "packed"]);
    // What a symbolic link leads to is written; the link stays.
    std::fs::write(path("target"), "old").unwrap();
    std::os::unix::fs::symlink("target", path("link")).unwrap();
    ok(dir.path(), &["codec", "decode", "packed", "link"]);
    assert!(path("link").is_symlink());
    assert_eq!(std::fs::read(path("target")).unwrap(), new);
    for name in ["packed", "target"] {
        let mode = std::fs::metadata(path(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    // A link to nowhere is no place to write to.
    std::os::unix::fs::symlink("nowhere", path("dangling")).unwrap();
    assert_eq!(pagewarp(dir.path(), &["codec", "decode", "packed", "dangling"]).status.code(), Some(9));
    // A pipe is written to, not replaced.
    assert!(Command::new("mkfifo").arg(path("pipe")).status().unwrap().success());
    let reader = std::thread::spawn({
        let pipe = path("pipe");
        move || std::fs::read(pipe).unwrap()
    });
    ok(dir.path(), &["codec", "decode", "packed", "pipe"]);
    assert!(std::fs::metadata(path("pipe")).unwrap().file_type().is_fifo());
    assert_eq!(reader.join().unwrap(), new);
}

#[test]
fn the_measurement_has_the_published_names() {
    let dir = tempfile::tempdir().unwrap();
    images(dir.path());
    let done = ok(dir.path(), &["codec", "bench", "new", "--base", "old", "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(report["pages"], 700);
    assert_eq!(report["verified"], true);
    for name in ["ratio", "encode_gb_per_s", "decode_gb_per_s", "memcpy_gb_per_s"] {
        assert!(report[name].as_f64() > Some(0.0), "{name} in {report:#}");
    }
    let pages: u64 =
        report["encodings"].as_object().unwrap().values().map(|e| e["pages"].as_u64().unwrap()).sum();
    assert_eq!(pages, 700);
}

/// On the software device: what is measured does not matter, but that every part of it is there does.
#[test]
fn the_measurement_of_a_gpu_has_the_published_names() {
    let dir = tempfile::tempdir().unwrap();
    images(dir.path());
    let done = ok(dir.path(), &["codec", "bench", "new", "--base", "old", "--backend", "gpu", "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!((&report["pages"], &report["verified"]), (&700.into(), &true.into()), "{report:#}");
    assert!(report["ratio"].as_f64() > Some(1.0) && report["device_copy_gb_per_s"].as_f64() > Some(0.0));
    for pass in ["encode", "decode"] {
        for name in
            ["gb_per_s", "upload_ms", "kernel_ms", "readback_ms", "kernel_to_device_copy", "to_scalar_core"]
        {
            assert!(report[pass][name].as_f64() > Some(0.0), "{pass}.{name} in {report:#}");
        }
    }
    for name in ["device", "kind", "driver", "backend"] {
        assert!(report[name].is_string(), "{name} in {report:#}");
    }
    assert_eq!(report["cpu"][0]["simd"], "scalar");
    // The GPU's encodings are those of the CPU, but for LZ4's length.
    let pages = |report: &serde_json::Value, encoding: &str| report["encodings"][encoding]["pages"].clone();
    for encoding in ["zero", "same", "raw", "sparse"] {
        assert_eq!(pages(&report, encoding), pages(&report["cpu"][0], encoding), "{encoding}");
    }
}

#[test]
fn a_reader_that_leaves_early_is_no_error() {
    let mut child =
        Command::new(PROGRAM).arg("man").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let done = child.wait_with_output().unwrap();
    assert_eq!((done.status.code(), done.stderr.as_slice()), (Some(0), &b""[..]));
}

#[test]
fn every_shell_and_every_command_has_its_generated_file() {
    let dir = tempfile::tempdir().unwrap();
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        assert!(!ok(dir.path(), &["completions", shell]).stdout.is_empty());
    }
    ok(dir.path(), &["man", "pages"]);
    for page in ["pagewarp.1", "pagewarp-send.1", "pagewarp-codec-bench.1"] {
        assert!(dir.path().join("pages").join(page).exists(), "{page}");
    }
}

#[test]
fn a_port_in_use_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let dir = tempfile::tempdir().unwrap();
    let done = pagewarp(dir.path(), &["receive", "--run-dir", "run", "--listen", &address]);
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(9));
    assert!(
        said.contains(&address) && said.contains("choose another port") && said.lines().count() == 1,
        "{said}"
    );
}
