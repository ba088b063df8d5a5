//! Every input in `fuzz/corpus`, as it is and with some bytes changed, goes through the function that its fuzz target calls. So what the fuzzers once found is tested
//! where there is no fuzzer; and Miri, which interprets the program and sees what it does to memory, has something to interpret (`scripts/miri.sh`).

use std::fs;
use std::path::{Path, PathBuf};

type Target = (&'static str, fn(&[u8]));

const PURE: &[Target] = &[
    ("codec_batch", pagewarp_codec::fuzzing::fuzz_decode_batch),
    ("codec_container", pagewarp_codec::fuzzing::fuzz_container),
    ("codec_encode", pagewarp_codec::fuzzing::fuzz_encode_page),
    ("codec_page", pagewarp_codec::fuzzing::fuzz_decode_page),
    ("wire_batch_meta", pagewarp_wire::fuzzing::fuzz_batch_meta),
    ("wire_frame", pagewarp_wire::fuzzing::fuzz_frame),
    ("wire_session", pagewarp_wire::fuzzing::fuzz_session),
];

#[cfg(miri)]
const OTHERS: &[Target] = &[];
#[cfg(not(miri))]
const OTHERS: &[Target] = &[
    ("engine_source", pagewarp_engine::fuzzing::fuzz_destination_says),
    ("kvm_control", pagewarp_kvm::fuzzing::fuzz_control),
    ("kvm_machine", pagewarp_kvm::fuzzing::fuzz_machine),
    ("kvm_state", pagewarp_kvm::fuzzing::fuzz_state),
    ("net_stream", pagewarp_net::fuzzing::fuzz_stream),
    ("net_tls", pagewarp_net::fuzzing::fuzz_tls),
    ("qemu_control", pagewarp_qemu::fuzzing::fuzz_control),
    ("qemu_peer", pagewarp_qemu::fuzzing::fuzz_peer),
    ("qemu_qmp", pagewarp_qemu::fuzzing::fuzz_qmp),
    ("qemu_stream", pagewarp_qemu::fuzzing::fuzz_stream),
];

/// Changed inputs for each one of the corpus.
const CHANGED: usize = if cfg!(miri) { 0 } else { 100 };
/// The longest that Miri gets.
const LONGEST: usize = 300;

fn fuzz() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz")
}

fn inputs(target: &str) -> Vec<Vec<u8>> {
    let dir = fuzz().join("corpus").join(target);
    let files = fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut paths: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    paths.sort();
    let inputs = paths
        .iter()
        .map(|path| fs::read(path).unwrap())
        .filter(|input| !cfg!(miri) || input.len() <= LONGEST);
    let mut inputs: Vec<_> = inputs.collect();
    // Spread over all of them. Miri takes half a minute for some.
    let few = std::env::var("PAGEWARP_MIRI_INPUTS").map_or(1, |number| number.parse().expect("a number"));
    let step = if cfg!(miri) { inputs.len().div_ceil(few) } else { 1 };
    inputs = inputs.into_iter().step_by(step).collect();
    assert!(!inputs.is_empty(), "no inputs in {}", dir.display());
    inputs
}

/// The next of a row of numbers that look as if they were drawn.
fn draw(state: &mut u64, below: usize) -> usize {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    (*state % below as u64) as usize
}

/// One to three bytes changed, taken away or doubled.
fn change(input: &[u8], state: &mut u64) -> Vec<u8> {
    let mut changed = input.to_vec();
    for _ in 0..=draw(state, 3) {
        let at = draw(state, changed.len() + 1).min(changed.len().saturating_sub(1));
        match (draw(state, 4), changed.get(at).copied()) {
            (_, None) => changed.push(draw(state, 256) as u8),
            (0, Some(byte)) => changed.insert(at, byte),
            (1, Some(_)) => drop(changed.remove(at)),
            (2, Some(byte)) => changed[at] = byte ^ 1 << draw(state, 8),
            (_, Some(_)) => changed[at] = draw(state, 256) as u8,
        }
    }
    changed
}

fn replay(targets: &[Target]) {
    for (name, run) in targets {
        let inputs = inputs(name);
        let mut state = 0x9e37_79b9_7f4a_7c15;
        for input in &inputs {
            run(input);
            (0..CHANGED).for_each(|_| run(&change(input, &mut state)));
        }
        eprintln!("{name}: {} inputs", inputs.len());
    }
}

#[test]
fn what_is_pure_keeps_its_promises() {
    replay(PURE);
}

#[test]
fn everything_else_does_too() {
    replay(OTHERS);
}

#[test]
#[cfg(not(miri))]
fn no_fuzz_target_is_left_out() {
    let manifest = fs::read_to_string(fuzz().join("Cargo.toml")).unwrap();
    let names = manifest.split("[[bin]]").skip(1).map(|bin| bin.split('"').nth(1).unwrap_or_default());
    let mut names: Vec<_> = names.collect();
    names.sort_unstable();
    let mut known: Vec<_> = PURE.iter().chain(OTHERS).map(|(name, _)| *name).collect();
    known.sort_unstable();
    assert_eq!(names, known);
}

/// A small corpus: what matters, and not whatever a fuzzer leaves behind.
#[test]
#[cfg(not(miri))]
fn the_corpus_is_small() {
    let sizes: Vec<_> =
        PURE.iter().chain(OTHERS).flat_map(|(name, _)| inputs(name)).map(|input| input.len()).collect();
    let bytes: usize = sizes.iter().sum();
    assert!(bytes <= 200 << 10, "{bytes} bytes in {} files; see scripts/fuzz-corpus.sh", sizes.len());
}
